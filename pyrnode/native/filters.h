/* The weights between many channels and many, transformed before a solve, and their gradients after it. Included by convnet.c. */

/* G, (SIDE, 3): the interpolation's, in double precision. */
static void interpolation(double g[SIDE][3]) {
    const double points[SIDE - 1] = {0, P, -P, Q, -Q};
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < 3; j++) {
            double weight = 1;
            for (int k = 0; k < SIDE - 1 && i < SIDE - 1; k++)
                if (k != i) weight *= points[i] - points[k];
            g[i][j] = i < SIDE - 1 ? pow(points[i], j) / weight : j == 2;
        }
}

/* Units of work of a layer: LANES of its inputs. */
static int64_t units(const struct layer *layer) { return (layer->inputs + LANES - 1) / LANES; }

/* The layer of a unit, and where its inputs begin. */
static const struct layer *layer_of(const struct job *job, int64_t unit, long *row) {
    const struct layer *layer = job->layer;
    for (; unit >= units(layer); layer++) unit -= units(layer);
    *row = unit * LANES;
    return layer;
}

/* U = G g G' of the filters (3, 3) of LANES channels, the filters `step` apart; turned: of filters in reverse. */
INLINE void transform_filters(const double g[SIDE][3], const float *filters, long step, int turned, float *u, long plane) {
    double from[9][LANES], half[SIDE][3][LANES];
    for (int e = 0; e < 9; e++)
        for (int l = 0; l < LANES; l++) from[e][l] = filters[l * step + (turned ? 8 - e : e)];
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < 3; j++)
            for (int l = 0; l < LANES; l++)
                half[i][j][l] = g[i][0] * from[j][l] + g[i][1] * from[3 + j][l] + g[i][2] * from[6 + j][l];
    for (int i = 0; i < SIDE; i++)
        for (int j = 0; j < SIDE; j++)
            for (int l = 0; l < LANES; l++)
                u[(SIDE * i + j) * plane + l] = (float)(g[j][0] * half[i][0][l] + g[j][1] * half[i][1][l] + g[j][2] * half[i][2][l]);
}

/* The transposed transformation: G' dU G of LANES channels, added to filters. */
INLINE void gather_filters(const double g[SIDE][3], double u[SIDE * SIDE][LANES], int turned, double filters[9][LANES]) {
    double half[3][SIDE][LANES];
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < SIDE; j++)
            for (int l = 0; l < LANES; l++) {
                half[i][j][l] = 0;
                for (int k = 0; k < SIDE; k++) half[i][j][l] += g[k][i] * u[SIDE * k + j][l];
            }
    for (int i = 0; i < 3; i++)
        for (int j = 0; j < 3; j++)
            for (int k = 0; k < SIDE; k++)
                for (int l = 0; l < LANES; l++) filters[turned ? 8 - 3 * i - j : 3 * i + j][l] += g[k][j] * half[i][k][l];
}

/* For threads.c: `forward` and `backward` of some units, from their weights. */
int transform(const struct job *job, long start, long stop) {
    double g[SIDE][3];
    interpolation(g);
    for (long unit = start; unit < stop; unit++) {
        long row;
        const struct layer *layer = layer_of(job, unit, &row);
        long inputs = layer->inputs, outputs = layer->outputs, plane = inputs * outputs;
        if (layer->kind != MANY) continue;
        for (long k = row; k < row + LANES; k++)
            for (long o = 0; o < outputs; o += LANES)
                transform_filters(g, layer->weight + (o * inputs + k) * 9, inputs * 9, 0, layer->forward + o * inputs + k * LANES,
                                  plane);
        for (long o = 0; o < outputs; o++)
            transform_filters(g, layer->weight + (o * inputs + row) * 9, 9, 1, layer->backward + row * outputs + o * LANES, plane);
    }
    return 0;
}

/* The sum over the parts, in their order, of the gradient of LANES filters, transformed back. */
INLINE void gather_parts(const struct job *job, const double g[SIDE][3], long from, long plane, int turned, double filters[9][LANES]) {
    double u[SIDE * SIDE][LANES] = {0};
    for (int64_t part = 0; part < job->parts; part++)
        for (int e = 0; e < SIDE * SIDE; e++)
            for (int l = 0; l < LANES; l++) u[e][l] += job->bars[part * job->size + from + e * plane + l];
    memset(filters, 0, 9 * sizeof(*filters));
    gather_filters(g, u, turned, filters);
}

/* For threads.c: the gradients of some units' weights. Those of a layer's entries, and of a weight that is not transformed, are summed up
   in the first part, with its first unit. */
int gather(const struct job *job, long start, long stop) {
    double g[SIDE][3], filters[9][LANES];
    interpolation(g);
    for (long unit = start; unit < stop; unit++) {
        long row;
        const struct layer *layer = layer_of(job, unit, &row);
        long inputs = layer->inputs, outputs = layer->outputs, plane = inputs * outputs, all = 36 * plane;
        int many = layer->kind == MANY;
        long from = layer->bars + (many ? 2 * all : 0), count = (many ? 0 : 9 * plane) + (1 + BORDERS + 2 * !!layer->gate) * outputs;
        for (int64_t part = 1; !row && part < job->parts; part++) add(job->bars + from, job->bars + part * job->size + from, 1, count);
        if (!many) continue;
        for (long k = row; k < row + LANES; k++)
            for (long o = 0; o < outputs; o += LANES) {
                gather_parts(job, g, layer->bars + k * outputs + o, plane, 0, filters);
                for (int l = 0; l < LANES; l++)
                    for (int e = 0; e < 9; e++) layer->weight_bar[((o + l) * inputs + k) * 9 + e] = (float)filters[e][l];
            }
        for (long o = 0; o < outputs; o++) {
            gather_parts(job, g, layer->bars + all + o * inputs + row, plane, 1, filters);
            for (int l = 0; l < LANES; l++)
                for (int e = 0; e < 9; e++) layer->weight_bar[(o * inputs + row + l) * 9 + e] += (float)filters[e][l];
        }
    }
    return 0;
}
