/* Vectors of the processor's own width, and the functions of them that more than one kernel needs. */

#ifndef VECTORS_H
#define VECTORS_H

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef int vi __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
#define V(pointer) (*(vf *)(pointer))
#define CV(pointer) (*(const vf *)(pointer))

INLINE long least(long a, long b) { return a < b ? a : b; }

INLINE vf choose(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

/* exp(x) - less, for x of at most 0, with an error of about one rounding (Cephes); below -87 as at -87. */
INLINE vf exponential(vf x, int less) {
    const vf zero = {0};
    x = choose(x < -87.0f, zero - 87.0f, x);
    const float magic = 12582912.0f; /* 1.5 * 2^23: the sum's last bits are the rounded integer */
    vf shifted = x * 1.44269504088896341f + magic;
    vf n = shifted - magic, power = (vf)(((vi)shifted << 23) + 0x3f800000);
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f, s = r * r; /* pairs of terms: a shorter chain than Horner's */
    vf p = (1.6666665459e-1f * r + 5.0000001201e-1f)
           + s * ((8.3334519073e-3f * r + 4.1665795894e-2f) + s * (1.9875691500e-4f * r + 1.3981999507e-3f));
    return power * (p * s + r) + (power - (float)less);
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

#endif
