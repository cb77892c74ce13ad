/* The elementwise passes of a network with softplus, log(1 + exp(a)), of which every array is read and written once. */

#include "vectors.h"

#define LANES (VECTOR_BYTES / 4)

INLINE void activate_vector(float *a, float *slope) {
    const vf zero = {0};
    vf x = V(a);
    vi positive = x > 0;
    vf e = exponential(choose(positive, -x, x), 0), one = zero + 1.0f;
    V(a) = choose(positive, x, zero) + logarithm(e);
    V(slope) = choose(positive, one, e) / (1 + e);
}

/* Puts the value in the place of `a`, and the slope into `slope`: `count` numbers. */
void activate(float *a, float *slope, long count) {
    long i = 0;
    for (; i + LANES <= count; i += LANES) activate_vector(a + i, slope + i);
    if (i < count) {
        float last[LANES] = {0}, last_slope[LANES];
        for (long j = i; j < count; j++) last[j - i] = a[j];
        activate_vector(last, last_slope);
        for (long j = i; j < count; j++) a[j] = last[j - i], slope[j] = last_slope[j - i];
    }
}

/* With g = slope r and the cotangent of g in `bar`: bend = softplus''(a) r bar in `bend`, and slope bar in `bar`. */
void pull(float *bar, const float *slope, const float *g, float *bend, long count) {
    for (long i = 0; i < count; i++) {
        float down = slope[i] * bar[i];
        bend[i] = g[i] * (bar[i] - down);
        bar[i] = down;
    }
}
