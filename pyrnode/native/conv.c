/* Same-size 3x3 convolutions of channels-last float32 images. Between many channels and many by Winograd's F(4x4, 3x3) (Lavin & Gray 2016,
 * arXiv:1509.09308): 36 multiplications for 4x4 outputs where the direct sum takes 144.
 *
 * With d a 6x6 tile of the input, overlapping its neighbours by two, and U = G g G' the transformed filter (conv.py),
 *
 *     y = A' [ U * (B' d B) ] A,    and for the gradient of the filter    dU += (A dy A') * (B' d B),
 *
 * where * is elementwise in the tile and, for each of its 36 elements, a matrix product over channels or tiles. Tiles
 * are taken in strips that fit the caches; all vectors run over channels, whose numbers are multiples of LANES.
 *
 * A, B and G are those of interpolation at 0, P, -P, Q, -Q and infinity. P = 5/8, Q = 3/2 keep the rounding errors at twice those of
 * a direct sum, where the usual 1 and 2 multiply them by four or five (cf. Barabasz et al. 2020, arXiv:1803.10986).
 *
 * Between few channels and many, the direct sum, as products with the 9 few-channel pixels around each pixel. */

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define LANES (VECTOR_BYTES / 4)
#define ROWS (VECTOR_BYTES == 64 ? 12 : 6) /* of the block of a product that is kept in registers, two vectors wide */
#define STRIP 48                           /* tiles or pixels; a multiple of ROWS */
#define PAD 16 /* floats between the planes of a buffer, whose distance would else be a power of two */
#define SIDE 6 /* of a tile of the input */
#define OUT 4  /* of its outputs */
#define P 0.625f
#define Q 1.5f

/* What a function below works on; conv.py has the same. Images are (n, height, width, channels). */
typedef struct {
    const float *x, *weight, *shift; /* the shift, if there is one, is read by its strides over (image, row, column) */
    float *y, *gradient;
    long strides[3], height, width, inputs, outputs;
    long columns; /* of the weight of `narrow` */
    long count;   /* of the tiles or pixels that a gradient sums over */
    long parts;   /* into which the gradients' outputs are divided */
    double alpha;
} Job;

typedef struct {
    long height, width, down, across; /* of an image: pixels, tiles */
} Grid;

typedef struct {
    long image, row, column; /* the tile's own pixels begin at (row, column); its input one before */
} Tile;

static Grid grid_of(const Job *job) {
    return (Grid){job->height, job->width, (job->height + OUT - 1) / OUT, (job->width + OUT - 1) / OUT};
}

static const float *shift_at(const Job *job, long image, long row, long column) {
    return job->shift + image * job->strides[0] + row * job->strides[1] + column * job->strides[2];
}

/* Where part i of the outputs begins, at a whole vector. */
static long bound(const Job *job, long i) { return job->outputs / LANES * i / job->parts * LANES; }

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

/* c (+)= sum over k of a[r, k] b[k, :] for ROWS rows r and `vectors` vectors, all held in registers. */
INLINE void block(long depth, const float *a, long a_row, long a_step, const float *b, long b_step, float *c,
                  long c_row, int vectors, int add) {
    vf sum[ROWS][2] = {0};
    for (long k = 0; k < depth; k++, a += a_step, b += b_step) {
        vf right[2];
        for (int j = 0; j < vectors; j++) right[j] = CV(b + j * LANES);
        for (int r = 0; r < ROWS; r++)
            for (int j = 0; j < vectors; j++) sum[r][j] += a[r * a_row] * right[j];
    }
    for (int r = 0; r < ROWS; r++)
        for (int j = 0; j < vectors; j++) {
            float *target = c + r * c_row + j * LANES;
            if (add) sum[r][j] += CV(target);
            V(target) = sum[r][j];
        }
}

/* The same for any number of rows and columns; rows beyond the last, up to a multiple of ROWS, are computed too. */
INLINE void product(long rows, long columns, long depth, const float *a, long a_row, long a_step, const float *b,
                    long b_step, float *c, long c_row, int add) {
    long j = 0;
    for (; j + 2 * LANES <= columns; j += 2 * LANES)
        for (long r = 0; r < rows; r += ROWS)
            block(depth, a + r * a_row, a_row, a_step, b + j, b_step, c + r * c_row + j, c_row, 2, add);
    for (; j < columns; j += LANES)
        for (long r = 0; r < rows; r += ROWS)
            block(depth, a + r * a_row, a_row, a_step, b + j, b_step, c + r * c_row + j, c_row, 1, add);
}

/* Room for `count` floats, from the beginning of a cache line, so that few vectors lie across two. */
static float *room(long count) { return aligned_alloc(64, (sizeof(float) * count + 63) / 64 * 64); }

int lanes(void) { return LANES; }

int block_rows(void) { return ROWS; }

/* The functions below are for threads.c: they do the units of work from `start` to `stop`, and give 0, or 1 if there is
 * no memory. */

/* y = conv(x, U) + shift for tiles; the weight U is (36, inputs, outputs). */
int convolve(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long inputs = job->inputs, outputs = job->outputs;
    long v_plane = STRIP * inputs + PAD, m_plane = STRIP * outputs + PAD;
    float *v = room(SIDE * SIDE * (v_plane + m_plane)), *m = v + SIDE * SIDE * v_plane;
    float *zeros = calloc(inputs, sizeof(float));
    if (!v || !zeros) {
        free(v), free(zeros);
        return 1;
    }
    for (long base = start; base < stop; base += STRIP) {
        long tiles = least(stop - base, STRIP);
        for (long t = 0; t < tiles; t++) {
            Tile at = tile_of(&grid, base + t);
            const float *d[SIDE * SIDE];
            pixels(&grid, job->x, inputs, at.image, at.row - 1, at.column - 1, SIDE, zeros, d);
            for (long k = 0; k < inputs; k += LANES) {
                vf r[SIDE][SIDE];
                for (int j = 0; j < SIDE; j++) input_column(0, SIDE, d, j, k, r);
                for (int i = 0; i < SIDE; i++) input_row(r[i], v + SIDE * i * v_plane + t * inputs + k, v_plane);
            }
        }
        for (int e = 0; e < SIDE * SIDE; e++)
            product(tiles, outputs, inputs, v + e * v_plane, inputs, 1, job->weight + e * inputs * outputs, outputs,
                    m + e * m_plane, outputs, 0);
        for (long t = 0; t < tiles; t++) {
            Tile at = tile_of(&grid, base + t);
            long down = least(OUT, grid.height - at.row), across = least(OUT, grid.width - at.column);
            for (long k = 0; k < outputs; k += LANES) {
                const float *from = m + t * outputs + k;
                vf r[OUT][SIDE], out[OUT];
                for (int j = 0; j < SIDE; j++) {
                    vf column[SIDE];
#pragma GCC unroll 6
                    for (int i = 0; i < SIDE; i++) column[i] = CV(from + (SIDE * i + j) * m_plane);
#pragma GCC unroll 4
                    for (int i = 0; i < OUT; i++) r[i][j] = output(i, column);
                }
                for (int i = 0; i < down; i++) {
                    long row = at.row + i;
                    float *to = job->y + ((at.image * grid.height + row) * grid.width + at.column) * outputs + k;
#pragma GCC unroll 4
                    for (int j = 0; j < OUT; j++) out[j] = output(j, r[i]);
                    for (int j = 0; j < across; j++) {
                        if (job->shift) out[j] += CV(shift_at(job, at.image, row, at.column + j) + k);
                        V(to + j * outputs) = out[j];
                    }
                }
            }
        }
    }
    free(v), free(zeros);
    return 0;
}

/* The planes of row i of the tiles of one strip, for the gradient: B' d B of all inputs, A dy A' of some outputs. */
INLINE void gradient_planes(int i, const Grid *grid, const Job *job, long from, long to, long base, long tiles,
                            const float *zeros, float *v, long v_plane, float *m, long m_plane) {
    const float *d[SIDE * SIDE];
    float alpha = (float)job->alpha;
    for (long t = 0; t < tiles; t++) {
        Tile at = tile_of(grid, base + t);
        pixels(grid, job->x, job->inputs, at.image, at.row - 1, at.column - 1, SIDE, zeros, d);
        for (long k = 0; k < job->inputs; k += LANES) {
            vf r[SIDE][SIDE];
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; j++) input_column(i, i + 1, d, j, k, r);
            input_row(r[i], v + t * job->inputs + k, v_plane);
        }
        pixels(grid, job->y, job->outputs, at.image, at.row, at.column, OUT, zeros, d);
        for (long k = from; k < to; k += LANES) {
            vf r[OUT];
#pragma GCC unroll 4
            for (int j = 0; j < OUT; j++) {
                vf column[OUT];
#pragma GCC unroll 4
                for (int l = 0; l < OUT; l++) column[l] = CV(d[OUT * l + j] + k);
                r[j] = alpha * cotangent(i, column);
            }
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; j++) V(m + j * m_plane + t * job->outputs + k) = cotangent(j, r);
        }
    }
}

/* gradient += alpha sum over all tiles of (A y A') * (B' d B), y being the cotangent; the gradient of U is (36, inputs
 * rounded up to ROWS, outputs). Every number is summed up by one thread, in one order: a unit of work is one of the
 * rows of the tiles, for one part of the outputs. */
int accumulate(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long inputs = job->inputs, outputs = job->outputs, most = inputs > outputs ? inputs : outputs;
    long v_plane = STRIP * inputs + PAD, m_plane = STRIP * outputs + PAD;
    long plane = (inputs + ROWS - 1) / ROWS * ROWS * outputs;
    float *v = room(SIDE * (v_plane + m_plane)), *m = v + SIDE * v_plane;
    float *zeros = calloc(most, sizeof(float));
    if (!v || !zeros) {
        free(v), free(zeros);
        return 1;
    }
#define PLANES(i) gradient_planes(i, &grid, job, from, to, base, tiles, zeros, v, v_plane, m, m_plane)
    for (long unit = start; unit < stop; unit++) {
        long i = unit % SIDE, from = bound(job, unit / SIDE), to = bound(job, unit / SIDE + 1);
        for (long base = 0; base < job->count; base += STRIP) {
            long tiles = least(job->count - base, STRIP);
            switch (i) {
            case 0: PLANES(0); break;
            case 1: PLANES(1); break;
            case 2: PLANES(2); break;
            case 3: PLANES(3); break;
            case 4: PLANES(4); break;
            default: PLANES(5);
            }
            for (int j = 0; j < SIDE; j++)
                product(inputs, to - from, tiles, v + j * v_plane, 1, inputs, m + j * m_plane + from, outputs,
                        job->gradient + (SIDE * i + j) * plane + from, outputs, 1);
        }
    }
    free(v), free(zeros);
    return 0;
}

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

/* y = conv(x, w) + shift from few channels to many, for pixels; the weight is (9 few, many). */
int widen(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long few = job->inputs, many = job->outputs;
    float *a = calloc(STRIP * (9 * few + many) + few, sizeof(float)), *m = a + STRIP * 9 * few, *zeros = m + STRIP * many;
    if (!a) return 1;
    for (long base = start; base < stop; base += STRIP) {
        long count = least(stop - base, STRIP);
        patches(&grid, job->x, 1, few, base, count, zeros, a);
        product(count, many, 9 * few, a, 9 * few, 1, job->weight, many, m, many, 0);
        Pixel at = pixel_of(&grid, base);
        for (long p = 0; p < count; p++, next(&grid, &at)) {
            const float *shift = job->shift ? shift_at(job, at.image, at.row, at.column) : NULL;
            for (long k = 0; k < many; k += LANES) {
                vf value = CV(m + p * many + k);
                if (shift) value += CV(shift + k);
                V(job->y + (base + p) * many + k) = value;
            }
        }
    }
    free(a);
    return 0;
}

/* y = conv(x, w) + shift from many channels to few, for images; the weight is (many, columns), of which 9 few are used
 * and the rest are there for the vectors' length. The products of every pixel with the whole filter come first, then
 * the sum over the filter. */
int narrow(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long many = job->inputs, few = job->outputs, columns = job->columns;
    long size = grid.height * grid.width, whole = size / ROWS * ROWS;
    float *z = calloc((size + ROWS) * columns + ROWS * many + columns, sizeof(float));
    float *tail = z + (size + ROWS) * columns, *zeros = tail + ROWS * many;
    if (!z) return 1;
    for (long image = start; image < stop; image++) {
        const float *from = job->x + image * size * many;
        product(whole, columns, many, from, many, 1, job->weight, columns, z, columns, 0);
        if (whole < size) { /* no block may read beyond the last image */
            memcpy(tail, from + whole * many, sizeof(float) * (size - whole) * many);
            product(ROWS, columns, many, tail, many, 1, job->weight, columns, z + whole * columns, columns, 0);
        }
        Pixel at = {0, 0, 0};
        for (long p = 0; p < size; p++, next(&grid, &at)) {
            const float *d[9];
            if (inner(&grid, &at))
                for (int e = 0; e < 9; e++) d[e] = z + (p + (e / 3 - 1) * grid.width + e % 3 - 1) * columns;
            else
                pixels(&grid, z, columns, 0, at.row - 1, at.column - 1, 3, zeros, d);
            const float *shift = job->shift ? shift_at(job, image, at.row, at.column) : NULL;
            for (long k = 0; k < few; k++) {
                float sum = shift ? shift[k] : 0;
                for (int e = 0; e < 9; e++) sum += d[e][e * few + k];
                job->y[(image * size + p) * few + k] = sum;
            }
        }
    }
    free(z);
    return 0;
}

/* gradient += alpha sum over all pixels of (the 9 pixels of x around it) y, y being the cotangent of `widen`, for parts of
 * its channels; the gradient is (9 few rounded up to ROWS, many). */
int accumulate_patches(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long few = job->inputs, many = job->outputs, from = bound(job, start), to = bound(job, stop);
    float *a = calloc(STRIP * 9 * few + ROWS + few, sizeof(float)), *zeros = a + STRIP * 9 * few + ROWS;
    if (!a) return 1;
    for (long base = 0; base < job->count; base += STRIP) {
        long rows = least(job->count - base, STRIP);
        patches(&grid, job->x, (float)job->alpha, few, base, rows, zeros, a);
        product(9 * few, to - from, rows, a, 1, 9 * few, job->y + base * many + from, many, job->gradient + from, many, 1);
    }
    free(a);
    return 0;
}
