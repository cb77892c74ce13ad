/* The elementwise passes of a network with softplus, log(1 + exp(a)), of which every array is read and written once. */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int vi __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
#define V(pointer) (*(vf *)(pointer))
#define CV(pointer) (*(const vf *)(pointer))
#define INLINE static inline __attribute__((always_inline))

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* exp(x) for x of at most 0, with an error of about one rounding (Cephes); below -87 as at -87. */
INLINE vf exponential(vf x) {
    const vf zero = {0};
    x = choose(x < -87.0f, zero - 87.0f, x);
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the rounded integer */
    vf shifted = x * 1.44269504088896341f + magic;
    vf n = shifted - magic, power = (vf)(((vi)shifted << 23) + 0x3f800000);
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f, s = r * r;
    vf p = (1.6666665459e-1f * r + 5.0000001201e-1f)
           + s * ((8.3334519073e-3f * r + 4.1665795894e-2f) + s * (1.9875691500e-4f * r + 1.3981999507e-3f));
    return power * (p * s + r) + power;
}

/* log(1 + e) for e in [0, 1], with an error of about one rounding (Cephes). */
INLINE vf logarithm(vf e) {
    const vf zero = {0};
    vi large = e > 0.41421356f;
    vf x = choose(large, e * 0.5f - 0.5f, e), y = x * x;
    vf p = (-2.4999993993e-1f * x + 3.3333331174e-1f)
           + y * ((-1.6668057665e-1f * x + 2.0000714765e-1f)
                  + y * ((-1.2420140846e-1f * x + 1.4249322787e-1f)
                         + y * ((-1.1514610310e-1f * x + 1.1676998740e-1f) + y * 7.0376836292e-2f)));
    return x - 0.5f * y + p * x * y + choose(large, zero + 0.693147180559945f, zero);
}

INLINE void activate_vector(float *a, float *slope) {
    const vf zero = {0};
    vf x = V(a);
    vi positive = x > 0;
    vf e = exponential(choose(positive, -x, x)), one = zero + 1.0f;
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
