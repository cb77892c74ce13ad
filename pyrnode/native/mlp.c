/* Fixed-step solves of the augmented system for a multilayer perceptron, and their reverse.

   A block of LANES samples goes through the whole solve before the next one begins: its states, activations and
   cotangents stay in the cache, features by rows, samples along the vectors. The mathematics and its names are those of
   pyrnode/dynamics/layered.py and pyrnode/engines/backprop.py; the reverse evaluates every stage again.

   The lower part of the file is compiled for float and for double. */

#ifndef REAL

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define ROW_BYTES 256                     /* of one feature of a block */
#define VECTORS (ROW_BYTES / VECTOR_BYTES) /* of one feature of a block */
#define PADDING_BYTES 128                 /* a row of a weight's gradient is a multiple of this */

enum activation { SOFTPLUS, TANH, SILU, GELU, ELU };

/* Pointers are to arrays in C order, of floats or doubles; T = steps * stages, sum = sum of widths[1...]. */
struct job {
    int64_t batch, layers, activation, stages, steps, probes;
    double weight;          /* of a probe */
    const int64_t *widths;  /* layers + 1 */
    const double *a, *b;    /* tableau: (stages, stages), (stages) */
    const double *h;        /* lengths of the steps */
    const void *const *w;   /* weights (out, in) by layer */
    const void *const *wt;  /* and transposed */
    const void *shift;      /* (T, sum) */
    const void *scale;      /* (T, sum), or none */
    const void *z0;         /* (batch, d) */
    const void *eps;        /* (probes, batch, d) */
    void *z1;               /* (batch, d) */
    void *q;                /* (batch, 4): l, E, n, 0 */
    void *record;           /* states of all stages, (blocks, T, d, LANES); or none */
    const void *z1_bar;     /* (batch, d) */
    const void *q_bar;      /* (batch, 4) */
    void *z0_bar;           /* (batch, d) */
    void *const *bars;      /* (parts): gradients of a part of the blocks, however many threads: weights, shifts, scales */
    int64_t parts;
};

#define PASTE_(name, suffix) name##_##suffix
#define PASTE(name, suffix) PASTE_(name, suffix)
#define NAME(name) PASTE(name, SUFFIX)

#define REAL float
#define INTEGER int32_t
#define SUFFIX f32
#define SINGLE 1
#include "mlp.c"
#undef REAL
#undef INTEGER
#undef SUFFIX
#undef SINGLE
#define REAL double
#define INTEGER int64_t
#define SUFFIX f64
#define SINGLE 0
#include "mlp.c"

#else /* ------------------------------------------------------------------------------------------------------------ */

#define vec NAME(vec)
#define ivec NAME(ivec)
#define half NAME(half)
typedef REAL vec __attribute__((vector_size(VECTOR_BYTES)));
typedef INTEGER ivec __attribute__((vector_size(VECTOR_BYTES)));
typedef REAL half __attribute__((vector_size(VECTOR_BYTES / 2)));
#define LANES (ROW_BYTES / (int)sizeof(REAL))
#define WIDTH (VECTOR_BYTES / (int)sizeof(REAL))

/* Activations -------------------------------------------------------------------------------------------------------- */

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

/* Products ----------------------------------------------------------------------------------------------------------- */

/* `rows` rows by two vectors of out (+)= a b; strides from row to row, of out and b in vectors. */
INLINE void NAME(tile)(int rows, int add, vec *out, int64_t out_stride, const REAL *a, int64_t a_stride, const vec *b,
                       int64_t b_stride, int64_t inner) {
    vec sum[6][2];
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++) sum[i][0] = sum[i][1] = NAME(all)(0);
    for (int64_t k = 0; k < inner; k++) {
        vec left = b[k * b_stride], right = b[k * b_stride + 1];
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++) {
            vec x = NAME(all)(a[i * a_stride + k]);
            sum[i][0] += x * left, sum[i][1] += x * right;
        }
    }
#pragma GCC unroll 6
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int j = 0; j < 2; j++) out[i * out_stride + j] = add ? out[i * out_stride + j] + sum[i][j] : sum[i][j];
}

INLINE void NAME(tiles)(int add, vec *out, int64_t out_stride, const REAL *a, int64_t a_stride, const vec *b,
                        int64_t b_stride, int64_t rows, int64_t inner, int64_t columns) {
#define TILE(n) NAME(tile)(n, add, out + i * out_stride + j, out_stride, a + i * a_stride, a_stride, b + j, b_stride, inner)
    for (int64_t j = 0; j < columns; j += 2)
        for (int64_t i = 0; i < rows; i += 6)
            switch (rows - i) {
            case 5: TILE(5); break;
            case 4: TILE(4); break;
            case 3: TILE(3); break;
            case 2: TILE(2); break;
            case 1: TILE(1); break;
            default: TILE(6);
            }
#undef TILE
}

/* out (rows, LANES) = a (rows, inner) b (inner, LANES). */
static void NAME(product)(vec *out, const REAL *a, const vec *b, int64_t rows, int64_t inner) {
    NAME(tiles)(0, out, VECTORS, a, inner, b, VECTORS, rows, inner, VECTORS);
}

/* Numbers in a row of a weight's gradient with so many columns. */
INLINE int64_t NAME(padded)(int64_t columns) {
    int64_t unit = PADDING_BYTES / (int64_t)sizeof(REAL);
    return (columns + unit - 1) / unit * unit;
}

/* out (rows, padded columns) += Σ over lanes of a (rows, LANES) b (columns, LANES)ᵀ; b is turned over in `scratch`. */
static void NAME(gradient)(REAL *out, const vec *a, const vec *b, REAL *scratch, int64_t rows, int64_t columns) {
    int64_t stride = NAME(padded)(columns), vectors = stride / WIDTH;
    for (int64_t i = 0; i < LANES; i++)
        for (int64_t j = 0; j < columns; j++) scratch[i * stride + j] = ((const REAL *)b)[j * LANES + i];
    NAME(tiles)(1, (vec *)out, vectors, (const REAL *)a, LANES, (const vec *)scratch, vectors, rows, LANES,
                (columns + WIDTH - 1) / WIDTH);
}

INLINE REAL NAME(lane_sum)(vec v) {
    union { vec whole; half part[2]; } split = {v};
    half x = split.part[0] + split.part[1];
    REAL low = 0, high = 0;
    for (int i = 0; i < WIDTH / 4; i++) low += x[i], high += x[WIDTH / 4 + i];
    return WIDTH == 2 ? x[0] : low + high;
}

/* One evaluation and its pullback ------------------------------------------------------------------------------------- */

/* A block's rows in the scratch memory; those of a layer i begin at `offset[i]` in each (0: the state). */
#define work NAME(work)
struct work {
    const struct job *job;
    int64_t *offset, sum; /* of the layers' widths: a row of the tables */
    vec *h, *y, *slope, *curvature, *r, *g, *p, *a_bar;
    REAL *scratch; /* of the widest layer, transposed */
    vec *eps, *integrals, *state, *rates, *bars;
    void *memory;
};

static int NAME(open)(struct work *w, const struct job *job) {
    int64_t layers = job->layers, rows = 0, widest = 0, d = job->widths[0];
    w->job = job;
    w->offset = malloc((size_t)(layers + 1) * sizeof(int64_t));
    if (!w->offset) return 1;
    for (int64_t i = 0; i <= layers; i++) {
        w->offset[i] = rows * VECTORS, rows += job->widths[i];
        if (job->widths[i] > widest) widest = job->widths[i];
    }
    w->sum = rows - d;
    int64_t total = 8 * rows + (2 * job->stages + 3) * d + 4 + NAME(padded)(widest);
    w->memory = aligned_alloc(ROW_BYTES, (size_t)(total * ROW_BYTES));
    if (!w->memory) {
        free(w->offset);
        return 1;
    }
    memset(w->memory, 0, (size_t)(total * ROW_BYTES));
    vec *next = w->memory, **parts[] = {&w->h, &w->y, &w->slope, &w->curvature, &w->r, &w->g, &w->p, &w->a_bar};
    for (int i = 0; i < 8; i++) *parts[i] = next, next += rows * VECTORS;
    w->eps = next, next += d * VECTORS;
    w->state = next, next += d * VECTORS;
    w->rates = next, next += job->stages * d * VECTORS;
    w->bars = next, next += (job->stages + 1) * d * VECTORS;
    w->integrals = next, next += 4 * VECTORS;
    w->scratch = (REAL *)next;
    return 0;
}

static void NAME(close)(struct work *w) {
    free(w->memory);
    free(w->offset);
}

/* Rows (d, LANES) from samples (LANES, d), zero where there are none, and back. */
static void NAME(load)(vec *rows, const REAL *samples, int64_t count, int64_t d) {
    REAL *to = (REAL *)rows;
    for (int64_t j = 0; j < d; j++)
        for (int64_t i = 0; i < LANES; i++) to[j * LANES + i] = i < count ? samples[i * d + j] : 0;
}

static void NAME(load_probe)(const struct work *w, int64_t probe, int64_t start, int64_t count) {
    const struct job *job = w->job;
    int64_t d = job->widths[0];
    NAME(load)(w->eps, (const REAL *)job->eps + (probe * job->batch + start) * d, count, d);
}

static void NAME(store)(REAL *samples, const vec *rows, int64_t count, int64_t d) {
    const REAL *from = (const REAL *)rows;
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < d; j++) samples[i * d + j] = from[j * LANES + i];
}

/* From the products y of a layer: the layer's output, scaled and shifted, and where it is hidden the activation of that
   with its slope and curvature. */
INLINE void NAME(finish)(int activation, int hidden, int64_t rows, const vec *y, const REAL *scale, const REAL *shift,
                         vec *h, vec *slope, vec *curvature) {
    for (int64_t j = 0; j < rows; j++) {
        REAL s = scale ? scale[j] : 1, b = shift[j];
        for (int64_t n = j * VECTORS; n < (j + 1) * VECTORS; n++) {
            vec a = y[n] * s + b;
            if (hidden)
                NAME(activate)(activation, a, h + n, slope + n, curvature + n);
            else
                h[n] = a;
        }
    }
}

/* f at the state in h[0], at stage `at` of all: into the last layer's rows of h. */
static void NAME(evaluate)(const struct work *w, int64_t at) {
    const struct job *job = w->job;
    const REAL *shift = (const REAL *)job->shift + at * w->sum;
    const REAL *scale = job->scale ? (const REAL *)job->scale + at * w->sum : NULL;
    for (int64_t i = 1; i <= job->layers; i++) {
        int64_t rows = job->widths[i], start = w->offset[i];
        vec *h = w->h + start, *y = scale ? w->y + start : h;
        NAME(product)(y, job->w[i - 1], w->h + w->offset[i - 1], rows, job->widths[i - 1]);
#define FINISH(activation, hidden) \
    NAME(finish)(activation, hidden, rows, y, scale, shift, h, w->slope + start, w->curvature + start)
        if (i == job->layers)
            FINISH(ELU, 0);
        else
            switch (job->activation) {
            case SOFTPLUS: FINISH(SOFTPLUS, 1); break;
            case TANH: FINISH(TANH, 1); break;
            case SILU: FINISH(SILU, 1); break;
            case GELU: FINISH(GELU, 1); break;
            default: FINISH(ELU, 1);
            }
#undef FINISH
        shift += rows;
        if (scale) scale += rows;
    }
}

/* w = εᵀ ∂f/∂z into r[0], given the evaluation; leaves r and g (scaled). */
static void NAME(multiply)(const struct work *w, int64_t at) {
    const struct job *job = w->job;
    const REAL *scale = job->scale ? (const REAL *)job->scale + (at + 1) * w->sum : NULL;
    for (int64_t i = job->layers; i > 0; i--) {
        int64_t rows = job->widths[i], start = w->offset[i];
        vec *g = w->g + start;
        if (scale) scale -= rows;
        for (int64_t j = 0; j < rows; j++) {
            REAL s = scale ? scale[j] : 1;
            for (int v = 0; v < VECTORS; v++) {
                int64_t n = j * VECTORS + v;
                g[n] = (i == job->layers ? w->eps[n] : w->r[start + n] * w->slope[start + n]) * s;
            }
        }
        NAME(product)(w->r + w->offset[i - 1], job->wt[i - 1], g, job->widths[i - 1], rows);
    }
}

/* Adds weight * (l', E', n') of one evaluation to the integrals; E' once, with the first probe. */
static void NAME(add_integrals)(const struct work *w, REAL weight, int64_t probe) {
    const struct job *job = w->job;
    int64_t d = job->widths[0];
    const vec *f = w->h + w->offset[job->layers];
    REAL each = weight * (REAL)job->weight;
    for (int64_t i = 0; i < d * VECTORS; i++) {
        int64_t v = i % VECTORS;
        w->integrals[v] += each * w->eps[i] * w->r[i];
        w->integrals[2 * VECTORS + v] += each * w->r[i] * w->r[i];
        if (!probe) w->integrals[VECTORS + v] += weight * f[i] * f[i];
    }
}

INLINE REAL NAME(row_sum)(const vec *x, const vec *y) {
    vec total = NAME(all)(0);
    for (int v = 0; v < VECTORS; v++) total += y ? x[v] * y[v] : x[v];
    return NAME(lane_sum)(total);
}

/* The transpose of the product, for one probe: adds to a_bar of the hidden layers, and to the gradients. */
static void NAME(pull_product)(const struct work *w, int64_t at, REAL *w_bar, REAL *s_bar) {
    const struct job *job = w->job;
    int64_t done = 0;
    const REAL *scale = job->scale ? (const REAL *)job->scale + at * w->sum : NULL;
    for (int64_t i = 1; i <= job->layers; i++) {
        int64_t rows = job->widths[i], columns = job->widths[i - 1], start = w->offset[i];
        const vec *p = w->p + w->offset[i - 1];
        vec *g_bar = w->p + start;
        NAME(gradient)(w_bar, w->g + start, p, w->scratch, rows, columns);
        w_bar += rows * NAME(padded)(columns);
        if (i == job->layers && !scale) return; /* ε is held constant */
        NAME(product)(g_bar, job->w[i - 1], p, rows, columns);
        for (int64_t j = 0; j < rows; j++) {
            vec *bar = g_bar + j * VECTORS;
            vec total = NAME(all)(0);
            for (int v = 0; v < VECTORS; v++) {
                int64_t n = start + j * VECTORS + v;
                if (scale) {
                    total += bar[v] * (i == job->layers ? w->eps[j * VECTORS + v] : w->slope[n] * w->r[n]);
                    bar[v] *= scale[done + j];
                }
                if (i == job->layers) continue;
                w->a_bar[n] += w->curvature[n] * w->r[n] * bar[v];
                bar[v] *= w->slope[n];
            }
            if (scale) s_bar[done + j] += NAME(lane_sum)(total);
        }
        done += rows;
    }
}

/* The cotangent of the state into a_bar[0], given that of f in the last layer's rows of a_bar; adds to the gradients. */
static void NAME(pull_state)(const struct work *w, int64_t at, REAL *w_bar, REAL *b_bar, REAL *s_bar) {
    const struct job *job = w->job;
    int64_t done = w->sum;
    const REAL *scale = job->scale ? (const REAL *)job->scale + at * w->sum : NULL;
    for (int64_t i = 1; i <= job->layers; i++) w_bar += job->widths[i] * NAME(padded)(job->widths[i - 1]);
    for (int64_t i = job->layers; i > 0; i--) {
        int64_t rows = job->widths[i], columns = job->widths[i - 1], start = w->offset[i], before = w->offset[i - 1];
        vec *bar = w->a_bar + start;
        done -= rows;
        w_bar -= rows * NAME(padded)(columns);
        for (int64_t j = 0; j < rows; j++) {
            b_bar[done + j] += NAME(row_sum)(bar + j * VECTORS, NULL);
            if (!scale) continue;
            s_bar[done + j] += NAME(row_sum)(bar + j * VECTORS, w->y + start + j * VECTORS);
            for (int v = 0; v < VECTORS; v++) bar[j * VECTORS + v] *= scale[done + j];
        }
        NAME(gradient)(w_bar, bar, w->h + before, w->scratch, rows, columns);
        vec *h_bar = i > 1 ? w->r + before : w->a_bar; /* r has had its use */
        NAME(product)(h_bar, job->wt[i - 1], bar, columns, rows);
        if (i == 1) return;
        for (int64_t n = 0; n < columns * VECTORS; n++) w->a_bar[before + n] += w->slope[before + n] * h_bar[n];
    }
}

/* Solves -------------------------------------------------------------------------------------------------------------- */

/* For threads.c: blocks `first` to `last` of the batch; 0, or 1 where memory is short. */
int NAME(forward)(const struct job *job, long first, long last) {
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    int64_t d = job->widths[0], rows = d * VECTORS, all = job->stages * job->steps;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = job->batch - start < LANES ? job->batch - start : LANES;
        NAME(load)(w.state, (const REAL *)job->z0 + start * d, count, d);
        memset(w.integrals, 0, 4 * ROW_BYTES);
        for (int64_t step = 0; step < job->steps; step++) {
            for (int64_t i = 0; i < job->stages; i++) {
                int64_t at = step * job->stages + i;
                memcpy(w.h, w.state, (size_t)(d * ROW_BYTES));
                for (int64_t j = 0; j < i; j++) {
                    REAL weight = (REAL)(job->h[step] * job->a[i * job->stages + j]);
                    if (weight)
                        for (int64_t n = 0; n < rows; n++) w.h[n] += weight * w.rates[j * rows + n];
                }
                if (job->record)
                    memcpy((char *)job->record + (block * all + at) * d * ROW_BYTES, w.h, (size_t)(d * ROW_BYTES));
                NAME(evaluate)(&w, at);
                memcpy(w.rates + i * rows, w.h + w.offset[job->layers], (size_t)(d * ROW_BYTES));
                if (job->b[i])
                    for (int64_t k = 0; k < job->probes; k++) {
                        NAME(load_probe)(&w, k, start, count);
                        NAME(multiply)(&w, at);
                        NAME(add_integrals)(&w, (REAL)(job->h[step] * job->b[i]), k);
                    }
            }
            for (int64_t i = 0; i < job->stages; i++)
                for (int64_t n = 0; n < rows; n++) w.state[n] += (REAL)(job->h[step] * job->b[i]) * w.rates[i * rows + n];
        }
        NAME(store)((REAL *)job->z1 + start * d, w.state, count, d);
        if (job->probes) NAME(store)((REAL *)job->q + start * 4, w.integrals, count, 4);
    }
    NAME(close)(&w);
    return 0;
}

/* The reverse of `forward`, from its record; adds to the gradients of weights (all layers one after the other), shifts
   and scales (as the tables are). */
static void NAME(reverse)(const struct work *work, int64_t first, int64_t last, REAL *w_bar, REAL *b_bar, REAL *s_bar) {
    const struct job *job = work->job;
    struct work w = *work;
    int64_t d = job->widths[0], rows = d * VECTORS, all = job->stages * job->steps, layers = job->layers;
    vec *z_bar = w.state, *total = w.bars + job->stages * rows, *f = w.h + w.offset[layers];
    vec *f_bar = w.a_bar + w.offset[layers];
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = job->batch - start < LANES ? job->batch - start : LANES;
        NAME(load)(z_bar, (const REAL *)job->z1_bar + start * d, count, d);
        if (job->probes) NAME(load)(w.integrals, (const REAL *)job->q_bar + start * 4, count, 4);
        for (int64_t step = job->steps - 1; step >= 0; step--) {
            memcpy(total, z_bar, (size_t)(d * ROW_BYTES));
            for (int64_t i = job->stages - 1; i >= 0; i--) {
                int64_t at = step * job->stages + i;
                REAL share = (REAL)(job->h[step] * job->b[i]);
                memcpy(w.h, (char *)job->record + (block * all + at) * d * ROW_BYTES, (size_t)(d * ROW_BYTES));
                NAME(evaluate)(&w, at);
                memset(w.a_bar + w.offset[1], 0, (size_t)(w.offset[layers] - w.offset[1]) * VECTOR_BYTES);
                int probed = job->probes && share;
                for (int64_t k = 0; probed && k < job->probes; k++) {
                    NAME(load_probe)(&w, k, start, count);
                    NAME(multiply)(&w, at);
                    REAL each = share * (REAL)job->weight;
                    for (int64_t n = 0; n < rows; n++) {
                        int64_t v = n % VECTORS;
                        w.p[n] = each * (w.integrals[v] * w.eps[n] + 2 * w.integrals[2 * VECTORS + v] * w.r[n]);
                    }
                    NAME(pull_product)(&w, at, w_bar, s_bar ? s_bar + at * w.sum : NULL);
                }
                for (int64_t n = 0; n < rows; n++) {
                    vec bar = share * z_bar[n];
                    for (int64_t j = i + 1; j < job->stages; j++)
                        bar += (REAL)(job->h[step] * job->a[j * job->stages + i]) * w.bars[j * rows + n];
                    if (probed) bar += 2 * share * w.integrals[VECTORS + n % VECTORS] * f[n];
                    f_bar[n] = bar;
                }
                NAME(pull_state)(&w, at, w_bar, b_bar + at * w.sum, s_bar ? s_bar + at * w.sum : NULL);
                memcpy(w.bars + i * rows, w.a_bar, (size_t)(d * ROW_BYTES));
                for (int64_t n = 0; n < rows; n++) total[n] += w.a_bar[n];
            }
            memcpy(z_bar, total, (size_t)(d * ROW_BYTES));
        }
        NAME(store)((REAL *)job->z0_bar + start * d, z_bar, count, d);
    }
}

/* For threads.c: parts `first` to `last` of the blocks, each with gradients of its own. */
int NAME(backward)(const struct job *job, long first, long last) {
    int64_t blocks = (job->batch + LANES - 1) / LANES, weights = 0, sum = 0;
    for (int64_t i = 1; i <= job->layers; i++)
        weights += job->widths[i] * NAME(padded)(job->widths[i - 1]), sum += job->widths[i];
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    for (int64_t part = first; part < last; part++) {
        REAL *w_bar = job->bars[part], *b_bar = w_bar + weights;
        REAL *s_bar = job->scale ? b_bar + job->stages * job->steps * sum : NULL;
        NAME(reverse)(&w, blocks * part / job->parts, blocks * (part + 1) / job->parts, w_bar, b_bar, s_bar);
    }
    NAME(close)(&w);
    return 0;
}

#undef vec
#undef ivec
#undef half
#undef work
#undef LANES
#undef WIDTH

#endif
