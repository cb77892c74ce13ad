/* A block of samples side by side, features by rows, samples along the vectors: the functions of numbers, and the products,
   that the kernels of whole solves share. Included by them for each type REAL. */

#ifndef NAME
#define ROW_BYTES 256                     /* of one feature of a block */
#define VECTORS (ROW_BYTES / VECTOR_BYTES) /* of one feature of a block */
#define PADDING_BYTES 128                 /* a row of a weight's gradient is a multiple of this */
#define PASTE_(name, suffix) name##_##suffix
#define PASTE(name, suffix) PASTE_(name, suffix)
#define NAME(name) PASTE(name, SUFFIX)
#endif

#undef vec
#undef ivec
#undef half
#undef LANES
#undef WIDTH

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


/* Numbers in a row of a weight's gradient with so many columns. */
INLINE int64_t NAME(padded)(int64_t columns) {
    int64_t unit = PADDING_BYTES / (int64_t)sizeof(REAL);
    return (columns + unit - 1) / unit * unit;
}

INLINE REAL NAME(lane_sum)(vec v) {
    union { vec whole; half part[2]; } split = {v};
    half x = split.part[0] + split.part[1];
    REAL low = 0, high = 0;
    for (int i = 0; i < WIDTH / 4; i++) low += x[i], high += x[WIDTH / 4 + i];
    return WIDTH == 2 ? x[0] : low + high;
}

/* A sample's numbers into its lane of as many rows, and back. */
INLINE void NAME(put)(vec *rows, int64_t lane, const REAL *sample, int64_t count) {
    for (int64_t j = 0; j < count; j++) ((REAL *)rows)[j * LANES + lane] = sample[j];
}

INLINE void NAME(take)(const vec *rows, int64_t lane, REAL *sample, int64_t count) {
    for (int64_t j = 0; j < count; j++) sample[j] = ((const REAL *)rows)[j * LANES + lane];
}
