/* The elementwise passes of a network with softplus, log(1 + exp(a)), of which every array is read and written once. */

#include "vectors.h"

#define LANES (VECTOR_BYTES / 4)
#define BLOCK 1024 /* numbers of a unit of work: whole vectors */

/* What a function below works on, for threads.c; softplus.py has the same. */
typedef struct {
    float *values, *slope;
    const float *g;
    float *bend;
    long count;
} Job;

INLINE void activate_vector(float *a, float *slope) {
    const vf zero = {0};
    vf x = V(a);
    vi positive = x > 0;
    vf e = exponential(choose(positive, -x, x), 0), one = zero + 1.0f;
    V(a) = choose(positive, x, zero) + logarithm(e);
    V(slope) = choose(positive, one, e) / (1 + e);
}

/* Puts the value of softplus in the place of its argument, and the slope beside it. */
int activate(const Job *job, long start, long stop) {
    float *a = job->values, *slope = job->slope;
    long i = start * BLOCK, end = least(stop * BLOCK, job->count);
    for (; i + LANES <= end; i += LANES) activate_vector(a + i, slope + i);
    if (i < end) {
        float last[LANES] = {0}, last_slope[LANES];
        for (long j = i; j < end; j++) last[j - i] = a[j];
        activate_vector(last, last_slope);
        for (long j = i; j < end; j++) a[j] = last[j - i], slope[j] = last_slope[j - i];
    }
    return 0;
}

/* With g = slope r and the cotangent of g for values: bend = softplus''(a) r values, and slope values in their place. */
int pull(const Job *job, long start, long stop) {
    float *bar = job->values, *bend = job->bend;
    const float *slope = job->slope, *g = job->g;
    long end = least(stop * BLOCK, job->count);
    for (long i = start * BLOCK; i < end; i++) {
        float down = slope[i] * bar[i];
        bend[i] = g[i] * (bar[i] - down);
        bar[i] = down;
    }
    return 0;
}
