/* The sums of one layer, or of its transpose, for the images of a group; and in the same pass, while the input is transformed, the
   gradient of its weight. Included by convnet.c. */

#define STRIP_BYTES 393216 /* of transformed tiles, which stay in the second cache */
#define STRIP 48           /* pixels */

/* Tiles of a strip between so many channels, at most. */
static long strip_of(long inputs, long outputs) {
    long tiles = STRIP_BYTES / (SIDE * SIDE * sizeof(float) * (inputs + outputs));
    return tiles < 6 ? 6 : least(tiles, 96);
}

static void transform_input(const struct work *w, const Grid *grid, const float *x, long channels, const Tile *at, float *v,
                            long plane) {
    const float *d[SIDE * SIDE];
    pixels(grid, x, channels, at->image, at->row - 1, at->column - 1, SIDE, w->zeros, d);
    for (long k = 0; k < channels; k += LANES) {
        vf r[SIDE][SIDE];
        for (int j = 0; j < SIDE; j++) input_column(0, SIDE, d, j, k, r);
        for (int i = 0; i < SIDE; i++) input_row(r[i], v + SIDE * i * plane + k, plane);
    }
}

static void transform_cotangent(const struct work *w, const Grid *grid, const float *y, long channels, const Tile *at,
                                float *m, long plane) {
    const float *d[OUT * OUT];
    pixels(grid, y, channels, at->image, at->row, at->column, OUT, w->zeros, d);
    for (long k = 0; k < channels; k += LANES) {
        vf r[SIDE][OUT];
#pragma GCC unroll 4
        for (int j = 0; j < OUT; j++) {
            vf column[OUT];
#pragma GCC unroll 4
            for (int i = 0; i < OUT; i++) column[i] = CV(d[OUT * i + j] + k);
#pragma GCC unroll 6
            for (int i = 0; i < SIDE; i++) r[i][j] = cotangent(i, column);
        }
        for (int i = 0; i < SIDE; i++)
#pragma GCC unroll 6
            for (int j = 0; j < SIDE; j++) V(m + (SIDE * i + j) * plane + k) = cotangent(j, r[i]);
    }
}

/* The 4x4 outputs of a tile, (OUT, OUT, channels). */
static void transform_output(const float *m, long plane, long channels, float *tile) {
    for (long k = 0; k < channels; k += LANES) {
        vf r[OUT][SIDE];
        for (int j = 0; j < SIDE; j++) {
            vf column[SIDE];
#pragma GCC unroll 6
            for (int i = 0; i < SIDE; i++) column[i] = CV(m + (SIDE * i + j) * plane + k);
#pragma GCC unroll 4
            for (int i = 0; i < OUT; i++) r[i][j] = output(i, column);
        }
        for (int i = 0; i < OUT; i++)
#pragma GCC unroll 4
            for (int j = 0; j < OUT; j++) V(tile + (OUT * i + j) * channels + k) = output(j, r[i]);
    }
}

/* Between many channels and many. Without u there is no sum, without `other`, the output's cotangent, no gradient. */
static void winograd(const struct work *w, const float *u, long inputs, long outputs, const float *x, const float *other,
                     float *gradient, Finish *finish, long to) {
    long height = w->job->height, width = w->job->width;
    Grid grid = {height, width, (height + OUT - 1) / OUT, (width + OUT - 1) / OUT};
    long tiles = w->samples * grid.down * grid.across, most = strip_of(inputs, outputs), strips = (tiles + most - 1) / most;
    long longest = (tiles + strips - 1) / strips, v_plane = longest * inputs + PAD, m_plane = longest * outputs + PAD;
    for (long strip = 0; strip < strips; strip++) {
        long base = tiles * strip / strips, count = tiles * (strip + 1) / strips - base;
        for (long t = 0; t < count; t++) {
            Tile at = tile_of(&grid, base + t);
            transform_input(w, &grid, x, inputs, &at, w->v + t * inputs, v_plane);
        }
        for (int e = 0; other && e < SIDE * SIDE; e++) {
            if (!e)
                for (long t = 0; t < count; t++) {
                    Tile at = tile_of(&grid, base + t);
                    transform_cotangent(w, &grid, other, outputs, &at, w->m + t * outputs, m_plane);
                }
            product(inputs, outputs, count, w->v + e * v_plane, 1, inputs, w->m + e * m_plane, outputs, LANES,
                    gradient + e * inputs * outputs, outputs, 1);
        }
        if (!u) continue;
        for (int e = 0; e < SIDE * SIDE; e++)
            product(count, outputs, inputs, w->v + e * v_plane, inputs, 1, u + e * inputs * outputs, LANES, inputs * LANES,
                    w->m + e * m_plane, outputs, 0);
        for (long t = 0; t < count; t++) {
            Tile at = tile_of(&grid, base + t);
            long down = least(OUT, height - at.row), across = least(OUT, width - at.column);
            transform_output(w->m + t * outputs, m_plane, outputs, w->tile);
            for (long i = 0; i < down; i++)
                finish(w, to, at.image, w->tile + i * OUT * outputs, (at.row + i) * width + at.column, across);
        }
    }
}

/* From few channels to many; the weight is (9 few, many), and its gradient. */
static void widen(const struct work *w, const float *weight, long few, long many, const float *x, const float *other,
                  float *gradient, Finish *finish, long to) {
    Grid grid = {w->job->height, w->job->width, 0, 0};
    long strips = (w->pixels + STRIP - 1) / STRIP;
    for (long sample = 0; sample < w->samples; sample++)
        for (long strip = 0; strip < strips; strip++) {
            long from = w->pixels * strip / strips, count = w->pixels * (strip + 1) / strips - from;
            long base = sample * w->pixels + from;
            patches(&grid, x, 1, few, base, count, w->zeros, w->v);
            if (other)
                product(9 * few, many, count, w->v, 1, 9 * few, other + base * many, many, LANES, gradient, many, 1);
            if (!finish) continue;
            product(count, many, 9 * few, w->v, 9 * few, 1, weight, many, LANES, w->m, many, 0);
            finish(w, to, sample, w->m, from, count);
        }
}

/* From many channels to few; the weight is (many, columns), of which 9 few are used and the rest are there for the vectors'
   length. The products of every pixel with the whole filter come first, then the sum over the filter. The gradient is that of
   `widen`, (9 few, many). */
static void narrow(const struct work *w, const float *weight, long many, long few, const float *x, const float *other,
                   float *gradient, Finish *finish, long to) {
    Grid grid = {w->job->height, w->job->width, 0, 0};
    long columns = (9 * few + LANES - 1) / LANES * LANES, strips = (w->pixels + STRIP - 1) / STRIP;
    for (long sample = 0; sample < w->samples; sample++) {
        const float *from = x + sample * w->pixels * many;
        for (long strip = 0; other && strip < strips; strip++) {
            long first = w->pixels * strip / strips, count = w->pixels * (strip + 1) / strips - first;
            patches(&grid, other, 1, few, sample * w->pixels + first, count, w->zeros, w->v);
            product(9 * few, many, count, w->v, 1, 9 * few, from + first * many, many, LANES, gradient, many, 1);
        }
        if (!finish) continue;
        product(w->pixels, columns, many, from, many, 1, weight, columns, LANES, w->m, columns, 0);
        Pixel at = {0, 0, 0};
        for (long p = 0; p < w->pixels; p++, next(&grid, &at)) {
            const float *d[9];
            if (inner(&grid, &at))
                for (int e = 0; e < 9; e++) d[e] = w->m + (p + (e / 3 - 1) * grid.width + e % 3 - 1) * columns;
            else
                pixels(&grid, w->m, columns, 0, at.row - 1, at.column - 1, 3, w->zeros, d);
            for (long k = 0; k < few; k++) {
                float sum = 0;
                for (int e = 0; e < 9; e++) sum += d[e][e * few + k];
                w->tile[k] = sum;
            }
            finish(w, to, sample, w->tile, p, 1);
        }
    }
}

/* Numbers in a layer's weight, as the gradient is summed up: of MANY, where W and its transpose have each their own, in one of the two. */
INLINE long weights(const struct layer *layer) {
    return layer->inputs * layer->outputs * (layer->kind == MANY ? SIDE * SIDE : 9);
}

/* W x of layer i, which ends in `finish` at the layer's own cells; and of the gradient y x' that part where y is `other`. */
static void apply(const struct work *w, int64_t i, const float *x, const float *other, float *bars, Finish *finish) {
    const struct layer *layer = w->job->layer + i;
    float *gradient = bars ? bars + layer->bars : NULL;
    if (layer->kind == MANY)
        winograd(w, finish ? layer->forward : NULL, layer->inputs, layer->outputs, x, other, gradient, finish, i + 1);
    else if (layer->kind == FROM_FEW)
        widen(w, layer->forward, layer->inputs, layer->outputs, x, other, gradient, finish, i + 1);
    else
        narrow(w, layer->forward, layer->inputs, layer->outputs, x, other, gradient, finish, i + 1);
}

/* W' y of layer i, which ends at the cells before it; of the gradient that part where x is `other`. */
static void apply_transposed(const struct work *w, int64_t i, const float *y, const float *other, float *bars, Finish *finish) {
    const struct layer *layer = w->job->layer + i;
    float *gradient = bars ? bars + layer->bars : NULL;
    if (layer->kind == MANY)
        winograd(w, layer->backward, layer->outputs, layer->inputs, y, other, bars ? gradient + weights(layer) : NULL,
                 finish, i);
    else if (layer->kind == FROM_FEW)
        narrow(w, layer->backward, layer->outputs, layer->inputs, y, other, gradient, finish, i);
    else
        widen(w, layer->backward, layer->outputs, layer->inputs, y, other, gradient, finish, i);
}
