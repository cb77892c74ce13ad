/* Vectors of numbers of the type REAL, and the activations with their derivatives. Included for each type by what computes with it. */

#ifndef ACTIVATIONS_H
#define ACTIVATIONS_H

#include <math.h>
#include <stdint.h>

#include "vectors.h"

enum activation { SOFTPLUS, TANH, SILU, GELU, ELU };
#define PASTE_(name, suffix) name##_##suffix
#define PASTE(name, suffix) PASTE_(name, suffix)
#define NAME(name) PASTE(name, SUFFIX)
#endif

#undef vec
#undef ivec
#undef WIDTH

#define vec NAME(vec)
#define ivec NAME(ivec)
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER ivec __attribute__((vector_size(VECTOR_BYTES)));
#define WIDTH (VECTOR_BYTES / (int)sizeof(REAL))

INLINE vec NAME(all)(REAL x) {
    vec zero = {0};
    return x - zero; /* which is x itself, so that nothing is computed; x + 0 is not where x is -0 */
}

INLINE vec NAME(select)(ivec mask, vec yes, vec no) {
    return (vec)((mask & (ivec)yes) | (~mask & (ivec)no));
}

INLINE vec NAME(magnitude)(vec x) {
    return (vec)((ivec)x & ~((INTEGER)1 << (8 * sizeof(REAL) - 1)));
}

#if SINGLE
INLINE vec NAME(exponential)(vec x, int less) { return exponential(x, less); }

INLINE vec NAME(logarithm)(vec e) { return logarithm(e); }
#else
INLINE vec NAME(exponential)(vec x, int less) {
    for (int i = 0; i < WIDTH; i++) x[i] = less ? expm1(x[i]) : exp(x[i]);
    return x;
}

INLINE vec NAME(logarithm)(vec e) {
    for (int i = 0; i < WIDTH; i++) e[i] = log1p(e[i]);
    return e;
}
#endif

INLINE vec NAME(hyperbolic)(vec x) {
    vec m = NAME(magnitude)(x), e = NAME(exponential)(-2 * m, 0), far = (1 - e) / (1 + e);
#if SINGLE
    vec y = x * x;
    vec p = (((-5.70498872745e-3f * y + 2.06390887954e-2f) * y - 5.37397155531e-2f) * y + 1.33314422036e-1f) * y
            - 3.33332819422e-1f;
    return NAME(select)(m < 0.625f, x + x * y * p, NAME(select)(x < 0, -far, far));
#else
    for (int i = 0; i < WIDTH; i++) far[i] = tanh(x[i]);
    return far;
#endif
}

/* Of a: the value, the slope and the curvature of the activation. */
INLINE void NAME(activate)(int activation, vec a, vec *value, vec *slope, vec *curvature) {
    if (activation == TANH) {
        vec h = NAME(hyperbolic)(a);
        *value = h, *slope = 1 - h * h, *curvature = -2 * h * *slope;
        return;
    }
    if (activation == GELU) {
        vec normal, density;
        for (int i = 0; i < WIDTH; i++) {
            normal[i] = (REAL)(SINGLE ? 0.5f * erfcf((float)(-0.70710678118654752f * a[i])) : 0.5 * erfc(-M_SQRT1_2 * a[i]));
            density[i] = (REAL)((SINGLE ? expf((float)(-0.5f * a[i] * a[i])) : exp(-0.5 * a[i] * a[i])) * 0.3989422804014327);
        }
        *value = a * normal, *slope = normal + a * density, *curvature = density * (2 - a * a);
        return;
    }
    ivec positive = a > 0;
    vec below = -NAME(magnitude)(a), one = NAME(all)(1), zero = NAME(all)(0);
    if (activation == ELU) {
        vec h = NAME(exponential)(below, 1);
        *value = NAME(select)(positive, a, h);
        *slope = NAME(select)(positive, one, h + 1), *curvature = NAME(select)(positive, zero, h + 1);
        return;
    }
    vec e = NAME(exponential)(below, 0);
    vec sigma = NAME(select)(positive, one, e) / (1 + e);
    if (activation == SOFTPLUS) {
        *value = NAME(select)(positive, a, zero) + NAME(logarithm)(e);
        *slope = sigma, *curvature = sigma * (1 - sigma);
    } else {
        *value = a * sigma, *slope = sigma * (1 + a * (1 - sigma));
        *curvature = sigma * (1 - sigma) * (2 + a * (1 - 2 * sigma));
    }
}

INLINE vec NAME(sigmoid)(vec a) {
    vec e = NAME(exponential)(-NAME(magnitude)(a), 0);
    return NAME(select)(a > 0, NAME(all)(1), e) / (1 + e);
}
