/* Same-size 3x3 convolutions of channels-last float32 images, one at a time: Winograd's between many channels and many
 * (winograd.h); between few channels and many the direct sum, as products with the 9 few-channel pixels around each pixel. */

#include "winograd.h"

#define STRIP 48 /* tiles or pixels */

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

static Grid grid_of(const Job *job) {
    return (Grid){job->height, job->width, (job->height + OUT - 1) / OUT, (job->width + OUT - 1) / OUT};
}

static const float *shift_at(const Job *job, long image, long row, long column) {
    return job->shift + image * job->strides[0] + row * job->strides[1] + column * job->strides[2];
}

/* Where part i of the outputs begins, at a whole vector. */
static long bound(const Job *job, long i) { return job->outputs / LANES * i / job->parts * LANES; }

int lanes(void) { return LANES; }

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
                    LANES, m + e * m_plane, outputs, 0);
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

/* gradient += alpha sum over all tiles of (A y A') * (B' d B), y being the cotangent; the gradient of U is (36, inputs,
 * outputs). Every number is summed up by one thread, in one order: a unit of work is one of the
 * rows of the tiles, for one part of the outputs. */
int accumulate(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long inputs = job->inputs, outputs = job->outputs, most = inputs > outputs ? inputs : outputs;
    long v_plane = STRIP * inputs + PAD, m_plane = STRIP * outputs + PAD;
    long plane = inputs * outputs;
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
                        LANES, job->gradient + (SIDE * i + j) * plane + from, outputs, 1);
        }
    }
    free(v), free(zeros);
    return 0;
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
        product(count, many, 9 * few, a, 9 * few, 1, job->weight, many, LANES, m, many, 0);
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
    long size = grid.height * grid.width;
    float *z = calloc((size + 1) * columns, sizeof(float)), *zeros = z + size * columns;
    if (!z) return 1;
    for (long image = start; image < stop; image++) {
        const float *from = job->x + image * size * many;
        product(size, columns, many, from, many, 1, job->weight, columns, LANES, z, columns, 0);
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
 * its channels; the gradient is (9 few, many). */
int accumulate_patches(const Job *job, long start, long stop) {
    Grid grid = grid_of(job);
    long few = job->inputs, many = job->outputs, from = bound(job, start), to = bound(job, stop);
    float *a = calloc(STRIP * 9 * few + few, sizeof(float)), *zeros = a + STRIP * 9 * few;
    if (!a) return 1;
    for (long base = 0; base < job->count; base += STRIP) {
        long rows = least(job->count - base, STRIP);
        patches(&grid, job->x, (float)job->alpha, few, base, rows, zeros, a);
        product(9 * few, to - from, rows, a, 1, 9 * few, job->y + base * many + from, many, LANES, job->gradient + from,
                many, 1);
    }
    free(a);
    return 0;
}
