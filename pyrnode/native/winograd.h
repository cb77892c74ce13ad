/* Same-size 3x3 convolutions of channels-last float32 images, in pieces: what conv.c does for one convolution and images.h
 * for a whole network. Between many channels and many by Winograd's F(4x4, 3x3) (Lavin & Gray 2016, arXiv:1509.09308): 36
 * multiplications for 4x4 outputs where the direct sum takes 144.
 *
 * With d a 6x6 tile of the input, overlapping its neighbours by two, and U = G g G' the transformed filter (conv.py),
 *
 *     y = A' [ U * (B' d B) ] A,    and for the gradient of the filter    dU += (A dy A') * (B' d B),
 *
 * where * is elementwise in the tile and, for each of its 36 elements, a matrix product over channels or tiles. Tiles
 * are taken in strips that fit the caches; all vectors run over channels, whose numbers are multiples of LANES.
 *
 * A, B and G are those of interpolation at 0, P, -P, Q, -Q and infinity. P = 5/8, Q = 3/2 keep the rounding errors at twice those of
 * a direct sum, where the usual 1 and 2 multiply them by four or five (cf. Barabasz et al. 2020, arXiv:1803.10986). */

#ifndef WINOGRAD_H
#define WINOGRAD_H

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define LANES (VECTOR_BYTES / 4)
#define ROWS (VECTOR_BYTES == 64 ? 12 : 6) /* of the block of a product that is kept in registers, two vectors wide */
#define PAD 16 /* floats between the planes of a buffer, whose distance would else be a power of two */
#define SIDE 6 /* of a tile of the input */
#define OUT 4  /* of its outputs */
#define P 0.625f
#define Q 1.5f

typedef struct {
    long height, width, down, across; /* of an image: pixels, tiles */
} Grid;

typedef struct {
    long image, row, column; /* the tile's own pixels begin at (row, column); its input one before */
} Tile;

static Tile tile_of(const Grid *grid, long index) {
    long each = grid->down * grid->across, within = index % each;
    return (Tile){index / each, within / grid->across * OUT, within % grid->across * OUT};
}

/* Where the pixels of a square of `side` begin; zeros stand for those outside the image. */
static void pixels(const Grid *grid, const float *x, long channels, long image, long top, long left, int side,
                   const float *zeros, const float **d) {
    x += image * grid->height * grid->width * channels;
    for (long i = top; i < top + side; i++)
        for (long j = left; j < left + side; j++) {
            int inside = i >= 0 && i < grid->height && j >= 0 && j < grid->width;
            *d++ = inside ? x + (i * grid->width + j) * channels : zeros;
        }
}

/* Element i of B' d. */
INLINE vf input(int i, const vf *d) {
    switch (i) {
    case 0: return P * P * Q * Q * d[0] - (P * P + Q * Q) * d[2] + d[4];
    case 1: return (d[4] - Q * Q * d[2]) + P * (d[3] - Q * Q * d[1]);
    case 2: return (d[4] - Q * Q * d[2]) - P * (d[3] - Q * Q * d[1]);
    case 3: return (d[4] - P * P * d[2]) + Q * (d[3] - P * P * d[1]);
    case 4: return (d[4] - P * P * d[2]) - Q * (d[3] - P * P * d[1]);
    default: return P * P * Q * Q * d[1] - (P * P + Q * Q) * d[3] + d[5];
    }
}

/* Element i of A' m. */
INLINE vf output(int i, const vf *m) {
    switch (i) {
    case 0: return m[0] + (m[1] + m[2]) + (m[3] + m[4]);
    case 1: return P * (m[1] - m[2]) + Q * (m[3] - m[4]);
    case 2: return P * P * (m[1] + m[2]) + Q * Q * (m[3] + m[4]);
    default: return P * P * P * (m[1] - m[2]) + Q * Q * Q * (m[3] - m[4]) + m[5];
    }
}

/* Element i of A y. */
INLINE vf cotangent(int i, const vf *y) {
    switch (i) {
    case 0: return y[0];
    case 1: return (y[0] + P * P * y[2]) + P * (y[1] + P * P * y[3]);
    case 2: return (y[0] + P * P * y[2]) - P * (y[1] + P * P * y[3]);
    case 3: return (y[0] + Q * Q * y[2]) + Q * (y[1] + Q * Q * y[3]);
    case 4: return (y[0] + Q * Q * y[2]) - Q * (y[1] + Q * Q * y[3]);
    default: return y[3];
    }
}

/* Column j of B' d, for one vector of channels: its elements from `first` to `last`. */
INLINE void input_column(int first, int last, const float *const *d, int j, long k, vf r[SIDE][SIDE]) {
    vf column[SIDE];
#pragma GCC unroll 6
    for (int i = 0; i < SIDE; i++) column[i] = CV(d[SIDE * i + j] + k);
#pragma GCC unroll 6
    for (int i = first; i < last; i++) r[i][j] = input(i, column);
}

/* Row i of B' d B, from that of B' d. */
INLINE void input_row(const vf *r, float *v, long plane) {
#pragma GCC unroll 6
    for (int j = 0; j < SIDE; j++) V(v + j * plane) = input(j, r);
}

/* c (+)= sum over k of a[r, k] b[k, :] for `rows` rows r and `vectors` vectors, all held in registers; the second vector of a row of b
 * is `b_next` after the first. */
INLINE void block(int rows, int vectors, int add, long depth, const float *a, long a_row, long a_step, const float *b,
                  long b_step, long b_next, float *c, long c_row) {
    vf sum[ROWS][2] = {0};
    for (long k = 0; k < depth; k++, a += a_step, b += b_step) {
        vf left = CV(b), right = left;
        if (vectors > 1) right = CV(b + b_next);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            sum[r][0] += a[r * a_row] * left;
            if (vectors > 1) sum[r][1] += a[r * a_row] * right;
        }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int j = 0; j < vectors; j++) {
            float *target = c + r * c_row + j * LANES;
            if (add) sum[r][j] += CV(target);
            V(target) = sum[r][j];
        }
}

/* The same for any number of rows and columns; blocks of rows are as even as can be. Vector j of a row of b is `b_next` after the one before. */
static __attribute__((noinline)) void product(long rows, long columns, long depth, const float *a, long a_row, long a_step,
                                              const float *b, long b_step, long b_next, float *c, long c_row, int add) {
    long blocks = (rows + ROWS - 1) / ROWS, vectors = columns / LANES;
    for (long j = 0; j < vectors; j += 2)
        for (long i = 0; i < blocks; i++) {
            long r = rows * i / blocks;
            const float *from = a + r * a_row, *with = b + j * b_next;
            float *to = c + r * c_row + j * LANES;
#define BLOCK(n) \
    case n: \
        if (j + 1 < vectors) \
            block(n, 2, add, depth, from, a_row, a_step, with, b_step, b_next, to, c_row); \
        else \
            block(n, 1, add, depth, from, a_row, a_step, with, b_step, b_next, to, c_row); \
        break;
            switch (rows * (i + 1) / blocks - r) {
                BLOCK(1) BLOCK(2) BLOCK(3) BLOCK(4) BLOCK(5) BLOCK(6)
#if VECTOR_BYTES == 64
                BLOCK(7) BLOCK(8) BLOCK(9) BLOCK(10) BLOCK(11) BLOCK(12)
#endif
            }
#undef BLOCK
        }
}

/* Room for `count` floats, from the beginning of a cache line, so that few vectors lie across two. */
static float *room(long count) { return aligned_alloc(64, (sizeof(float) * count + 63) / 64 * 64); }

typedef struct {
    long image, row, column;
} Pixel;

static Pixel pixel_of(const Grid *grid, long index) {
    long size = grid->height * grid->width, within = index % size;
    return (Pixel){index / size, within / grid->width, within % grid->width};
}

static void next(const Grid *grid, Pixel *at) {
    if (++at->column < grid->width) return;
    at->column = 0;
    if (++at->row < grid->height) return;
    at->row = 0, at->image++;
}

/* Whether all 9 pixels around it are the image's. */
static int inner(const Grid *grid, const Pixel *at) {
    return at->row > 0 && at->row + 1 < grid->height && at->column > 0 && at->column + 1 < grid->width;
}

/* alpha times the 9 pixels around each of the pixels from `base` on: rows of 9 `few` numbers. */
static void patches(const Grid *grid, const float *x, float alpha, long few, long base, long count,
                    const float *zeros, float *to) {
    Pixel at = pixel_of(grid, base);
    for (long p = base; p < base + count; p++, next(grid, &at)) {
        if (inner(grid, &at)) {
            const float *d = x + (p - grid->width - 1) * few;
            for (int i = 0; i < 3; i++, d += grid->width * few)
                for (long k = 0; k < 3 * few; k++) *to++ = alpha * d[k];
            continue;
        }
        const float *d[9];
        pixels(grid, x, few, at.image, at.row - 1, at.column - 1, 3, zeros, d);
        for (int e = 0; e < 9; e++)
            for (long k = 0; k < few; k++) *to++ = alpha * d[e][k];
    }
}

#endif
