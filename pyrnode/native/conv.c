/* Same-size 3x3 convolutions of channels-last float32 images. Between many channels and many by Winograd's F(2x2, 3x3) (Lavin & Gray 2016,
 * arXiv:1509.09308): 16 multiplications for 2x2 outputs where the direct sum takes 36.
 *
 * With d a 4x4 tile of the input, overlapping its neighbours by two, and U = G g G' the transformed kernel (conv.py),
 *
 *     y = A' [ U * (B' d B) ] A,    and for the gradient of the kernel    dU += (A dy A') * (B' d B),
 *
 * where * is elementwise in the tile and, for each of its 16 elements, a matrix product over channels or tiles. Tiles
 * are taken in strips that fit the caches; all vectors run over channels, whose numbers are multiples of LANES.
 *
 * Between few channels and many, the direct sum, as products with the 9 few-channel pixels around each pixel. */

#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define LANES (VECTOR_BYTES / 4)
#define ROWS (VECTOR_BYTES == 64 ? 12 : 6) /* of the block of a product that is kept in registers, two vectors wide */
#define STRIP 48                           /* tiles; a multiple of ROWS */
#define PAD 16 /* floats between the 16 planes of a buffer, whose distance would else be a power of two */

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
    return (Grid){job->height, job->width, (job->height + 1) / 2, (job->width + 1) / 2};
}

static const float *shift_at(const Job *job, long image, long row, long column) {
    return job->shift + image * job->strides[0] + row * job->strides[1] + column * job->strides[2];
}

/* Where part i of the outputs begins, at a whole vector. */
static long bound(const Job *job, long i) { return job->outputs / LANES * i / job->parts * LANES; }

static Tile tile_of(const Grid *grid, long index) {
    long each = grid->down * grid->across, within = index % each;
    return (Tile){index / each, within / grid->across * 2, within % grid->across * 2};
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

/* Row i of B' d B, for one vector of channels. */
INLINE void input_row(int i, const float *const *d, long k, float *v, long plane) {
    static const int first[4] = {0, 1, 2, 1}, second[4] = {2, 2, 1, 3};
    vf r[4];
    for (int j = 0; j < 4; j++) {
        vf a = CV(d[4 * first[i] + j] + k), b = CV(d[4 * second[i] + j] + k);
        if (i == 1) r[j] = a + b;
        else r[j] = a - b;
    }
    V(v) = r[0] - r[2];
    V(v + plane) = r[1] + r[2];
    V(v + 2 * plane) = r[2] - r[1];
    V(v + 3 * plane) = r[1] - r[3];
}

/* Row i of A dy A', for one vector of channels. */
INLINE void cotangent_row(int i, const float *const *dy, long k, float alpha, float *m, long plane) {
    vf r[2];
    for (int j = 0; j < 2; j++) {
        vf a = alpha * CV(dy[j] + k), b = alpha * CV(dy[2 + j] + k);
        switch (i) {
        case 0: r[j] = a; break;
        case 1: r[j] = a + b; break;
        case 2: r[j] = a - b; break;
        default: r[j] = -b;
        }
    }
    V(m) = r[0];
    V(m + plane) = r[0] + r[1];
    V(m + 2 * plane) = r[0] - r[1];
    V(m + 3 * plane) = -r[1];
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

/* y = conv(x, U) + shift for tiles; the weight U is (16, inputs, outputs). */
int convolve(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long inputs = job->inputs, outputs = job->outputs;
    long v_plane = STRIP * inputs + PAD, m_plane = STRIP * outputs + PAD;
    float *v = room(16 * (v_plane + m_plane)), *m = v + 16 * v_plane;
    float *zeros = calloc(inputs, sizeof(float));
    if (!v || !zeros) {
        free(v), free(zeros);
        return 1;
    }
    for (long base = start; base < stop; base += STRIP) {
        long tiles = stop - base < STRIP ? stop - base : STRIP;
        for (long t = 0; t < tiles; t++) {
            Tile at = tile_of(&grid, base + t);
            const float *d[16];
            pixels(&grid, job->x, inputs, at.image, at.row - 1, at.column - 1, 4, zeros, d);
            for (long k = 0; k < inputs; k += LANES)
#pragma GCC unroll 4
                for (int i = 0; i < 4; i++) input_row(i, d, k, v + 4 * i * v_plane + t * inputs + k, v_plane);
        }
        for (int e = 0; e < 16; e++)
            product(tiles, outputs, inputs, v + e * v_plane, inputs, 1, job->weight + e * inputs * outputs, outputs,
                    m + e * m_plane, outputs, 0);
        for (long t = 0; t < tiles; t++) {
            Tile at = tile_of(&grid, base + t);
            int down = at.row + 1 < grid.height ? 2 : 1, across = at.column + 1 < grid.width ? 2 : 1;
            for (long k = 0; k < outputs; k += LANES) {
                const float *from = m + t * outputs + k;
                vf r[2][4], out[2][2];
                for (int j = 0; j < 4; j++, from += m_plane) {
                    vf a = CV(from + 4 * m_plane), b = CV(from + 8 * m_plane);
                    r[0][j] = CV(from) + a + b;
                    r[1][j] = a - b - CV(from + 12 * m_plane);
                }
                for (int i = 0; i < 2; i++) {
                    out[i][0] = r[i][0] + r[i][1] + r[i][2];
                    out[i][1] = r[i][1] - r[i][2] - r[i][3];
                }
                for (int i = 0; i < down; i++)
                    for (int j = 0; j < across; j++) {
                        long row = at.row + i, column = at.column + j;
                        vf value = out[i][j];
                        if (job->shift) value += CV(shift_at(job, at.image, row, column) + k);
                        V(job->y + ((at.image * grid.height + row) * grid.width + column) * outputs + k) = value;
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
    for (long t = 0; t < tiles; t++) {
        Tile at = tile_of(grid, base + t);
        const float *d[16];
        pixels(grid, job->x, job->inputs, at.image, at.row - 1, at.column - 1, 4, zeros, d);
        for (long k = 0; k < job->inputs; k += LANES) input_row(i, d, k, v + t * job->inputs + k, v_plane);
        pixels(grid, job->y, job->outputs, at.image, at.row, at.column, 2, zeros, d);
        for (long k = from; k < to; k += LANES)
            cotangent_row(i, d, k, (float)job->alpha, m + t * job->outputs + k, m_plane);
    }
}

/* gradient += alpha sum over all tiles of (A y A') * (B' d B), y being the cotangent; the gradient of U is (16, inputs
 * rounded up to ROWS, outputs). Every number is summed up by one thread, in one order: a unit of work is one of the four
 * rows of the tiles, for one part of the outputs. */
int accumulate(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long inputs = job->inputs, outputs = job->outputs, most = inputs > outputs ? inputs : outputs;
    long v_plane = STRIP * inputs + PAD, m_plane = STRIP * outputs + PAD;
    long rounded = (inputs + ROWS - 1) / ROWS * ROWS;
    float *v = room(4 * (v_plane + m_plane)), *m = v + 4 * v_plane;
    float *zeros = calloc(most, sizeof(float));
    if (!v || !zeros) {
        free(v), free(zeros);
        return 1;
    }
#define PLANES(i) gradient_planes(i, &grid, job, from, to, base, tiles, zeros, v, v_plane, m, m_plane)
    for (long part = start / 4; 4 * part < stop; part++) {
        long first = start > 4 * part ? start - 4 * part : 0, last = stop - 4 * part < 4 ? stop - 4 * part : 4;
        long from = bound(job, part), to = bound(job, part + 1);
        for (long base = 0; base < job->count; base += STRIP) {
            long tiles = job->count - base < STRIP ? job->count - base : STRIP;
            for (long i = first; i < last; i++) {
                switch (i) {
                case 0: PLANES(0); break;
                case 1: PLANES(1); break;
                case 2: PLANES(2); break;
                default: PLANES(3);
                }
                for (int j = 0; j < 4; j++)
                    product(inputs, to - from, tiles, v + j * v_plane, 1, inputs, m + j * m_plane + from, outputs,
                            job->gradient + (4 * i + j) * rounded * outputs + from, outputs, 1);
            }
        }
    }
    free(v), free(zeros);
    return 0;
}

/* alpha times the 9 pixels around each of the pixels from `base` on: rows of 9 `few` numbers. */
static void patches(const Grid *grid, const float *x, float alpha, long few, long base, long count,
                    const float *zeros, float *to) {
    for (long p = base; p < base + count; p++) {
        long within = p % (grid->height * grid->width);
        const float *d[9];
        pixels(grid, x, few, p / (grid->height * grid->width), within / grid->width - 1, within % grid->width - 1, 3,
               zeros, d);
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
        long count = stop - base < STRIP ? stop - base : STRIP;
        patches(&grid, job->x, 1, few, base, count, zeros, a);
        product(count, many, 9 * few, a, 9 * few, 1, job->weight, many, m, many, 0);
        for (long p = 0; p < count; p++) {
            long image = (base + p) / (grid.height * grid.width), within = (base + p) % (grid.height * grid.width);
            const float *shift = job->shift ? shift_at(job, image, within / grid.width, within % grid.width) : NULL;
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
 * and the rest are there for the vectors' length. The products of every pixel with the whole kernel come first, then
 * the sum over the kernel. */
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
        for (long p = 0; p < size; p++) {
            const float *d[9];
            pixels(&grid, z, columns, 0, p / grid.width - 1, p % grid.width - 1, 3, zeros, d);
            const float *shift = job->shift ? shift_at(job, image, p / grid.width, p % grid.width) : NULL;
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
        long rows = job->count - base < STRIP ? job->count - base : STRIP;
        patches(&grid, job->x, (float)job->alpha, few, base, rows, zeros, a);
        product(9 * few, to - from, rows, a, 1, 9 * few, job->y + base * many + from, many, job->gradient + from, many, 1);
    }
    free(a);
    return 0;
}
