/* A block of samples side by side, features by rows, samples along the vectors: the functions of numbers, and the products,
   that the kernels of whole solves share. Included by them for each type REAL. */

#ifndef ROW_BYTES
#define ROW_BYTES 256                     /* of one feature of a block */
#define VECTORS (ROW_BYTES / VECTOR_BYTES) /* of one feature of a block */
#define PADDING_BYTES 128                 /* a row of a weight's gradient is a multiple of this */
#endif

#include "activations.h"

#undef half
#undef LANES

#define half NAME(half)
typedef REAL half __attribute__((vector_size(VECTOR_BYTES / 2)));
#define LANES (ROW_BYTES / (int)sizeof(REAL))

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
