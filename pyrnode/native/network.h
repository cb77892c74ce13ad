/* A multilayer perceptron on a block of samples: its evaluation, the vector-Jacobian product, and their pullback. Included by
   mlp.c for each type REAL. */

#undef work
#undef gradients
#undef lanes

/* One evaluation and its pullback ------------------------------------------------------------------------------------- */

/* A block's rows in the scratch memory; those of a layer i begin at `offset[i]` in each (0: the state). */
#define work NAME(work)
struct work {
    const struct job *job;
    int64_t *offset, sum; /* of the layers' widths: a row of the tables */
    int64_t live;         /* vectors of a row that hold samples; the others are passed over */
    vec *h, *y, *slope, *curvature, *r, *g, *p, *a_bar;
    vec *shift, *scale;   /* of all layers (sum), the scale by lane or not; no scale where it is 1, no shift by lane */
    int by_lane;
    REAL *scratch; /* of the widest layer, transposed */
    vec *eps;      /* the probe in use */
    vec *state, *integrals, *probes, *context, *rates, *q_rates; /* a sample's own: from the state to the first of the rates */
    vec *context_bar;
    vec *stages, *bars, *weights, *time, *length;
    void *memory;
};

static int NAME(open)(struct work *w, const struct job *job) {
    int64_t layers = job->layers, rows = 0, widest = 0, d = job->widths[0], s = job->stages;
    w->job = job;
    w->offset = malloc((size_t)(layers + 1) * sizeof(int64_t));
    if (!w->offset) return 1;
    for (int64_t i = 0; i <= layers; i++) {
        w->offset[i] = rows * VECTORS, rows += job->widths[i];
        if (job->widths[i] > widest) widest = job->widths[i];
    }
    w->sum = rows - d, w->live = VECTORS, w->by_lane = job->terms != 0;
    int64_t held = job->eps ? job->probes * d : d, given = job->context ? w->sum : 0;
    vec **parts[] = {&w->h, &w->y, &w->slope, &w->curvature, &w->r, &w->g, &w->p, &w->a_bar, &w->shift, &w->scale,
                     &w->state, &w->integrals, &w->probes, &w->context, &w->rates, &w->q_rates, &w->context_bar, &w->stages,
                     &w->bars, &w->weights, &w->time, &w->length, (vec **)&w->scratch};
    int64_t sizes[] = {rows, rows, rows, rows, rows, rows, rows, rows, w->sum, w->sum, d, INTEGRALS, held, given,
                       (s + 1) * d, (s + 1) * INTEGRALS, given, s * d, (s + 1) * d, s, 1, 1, NAME(padded)(widest)};
    int64_t count = sizeof(sizes) / sizeof(*sizes), total = 0;
    for (int64_t i = 0; i < count; i++) total += sizes[i];
    w->memory = aligned_alloc(ROW_BYTES, (size_t)(total * ROW_BYTES));
    if (!w->memory) {
        free(w->offset);
        return 1;
    }
    memset(w->memory, 0, (size_t)(total * ROW_BYTES));
    vec *next = w->memory;
    for (int64_t i = 0; i < count; i++) *parts[i] = next, next += sizes[i] * VECTORS;
    if (job->terms ? job->terms < 4 : !job->scale) w->scale = NULL;
    return 0;
}

static void NAME(close)(struct work *w) {
    free(w->memory);
    free(w->offset);
}

/* Takes so many samples, in the first lanes; vectors go in pairs through a product. */
static void NAME(hold)(struct work *w, int64_t count) { w->live = (count + 2 * WIDTH - 1) / (2 * WIDTH) * 2; }

/* out (rows, LANES) = a (rows, inner) b (inner, LANES). */
static void NAME(product)(const struct work *w, vec *out, const REAL *a, const vec *b, int64_t rows, int64_t inner) {
    NAME(tiles)(0, out, VECTORS, a, inner, b, VECTORS, rows, inner, w->live);
}

/* out (rows, padded columns) += Σ over lanes of a (rows, LANES) b (columns, LANES)ᵀ; b is turned over in the scratch. */
static void NAME(gradient)(const struct work *w, REAL *out, const vec *a, const vec *b, int64_t rows, int64_t columns) {
    int64_t stride = NAME(padded)(columns), vectors = stride / WIDTH, lanes = w->live * WIDTH;
    for (int64_t i = 0; i < lanes; i++)
        for (int64_t j = 0; j < columns; j++) w->scratch[i * stride + j] = ((const REAL *)b)[j * LANES + i];
    NAME(tiles)(1, (vec *)out, vectors, (const REAL *)a, LANES, (const vec *)w->scratch, vectors, rows, lanes,
                (columns + WIDTH - 1) / WIDTH);
}

/* The probes of a sample, and its context, into its lane. */
static void NAME(put_held)(const struct work *w, int64_t lane, int64_t sample) {
    const struct job *job = w->job;
    int64_t d = job->widths[0];
    for (int64_t k = 0; job->eps && k < job->probes; k++)
        NAME(put)(w->probes + k * d * VECTORS, lane, (const REAL *)job->eps + (k * job->batch + sample) * d, d);
    if (job->context) NAME(put)(w->context, lane, (const REAL *)job->context + sample * w->sum, w->sum);
}

/* Takes a probe into use. */
static void NAME(probe)(struct work *w, int64_t probe) {
    int64_t d = w->job->widths[0];
    if (w->job->eps) {
        w->eps = w->probes + probe * d * VECTORS;
        return;
    }
    w->eps = w->probes;
    memset(w->eps, 0, (size_t)(d * ROW_BYTES));
    for (int v = 0; v < VECTORS; v++) w->eps[probe * VECTORS + v] = NAME(all)(1);
}

/* Shifts and scales of an evaluation at a time that all samples share, from row `at` of the tables. */
static void NAME(tabulated)(const struct work *w, int64_t at) {
    const REAL *shift = (const REAL *)w->job->shift + at * w->sum, *scale = (const REAL *)w->job->scale + at * w->sum;
    for (int64_t j = 0; j < w->sum; j++) {
        w->shift[j] = NAME(all)(shift[j]);
        if (w->scale) w->scale[j] = NAME(all)(scale[j]);
    }
}

/* The scales at each sample's own time, s = σ(t u + g); where there are none nothing is left to do. */
static void NAME(entered)(const struct work *w) {
    const REAL *u = (const REAL *)w->job->entries + 2 * w->sum, *g = u + w->sum;
    for (int64_t j = 0; w->scale && j < w->sum; j++)
        for (int64_t i = 0; i < w->live; i++) w->scale[j * VECTORS + i] = NAME(sigmoid)(w->time[i] * u[j] + g[j]);
}

/* Where the entry of row j and vector v is. */
INLINE int64_t NAME(entry)(const struct work *w, int64_t j, int64_t v) { return w->by_lane ? j * VECTORS + v : j; }

/* From the products y of a layer, whose first row is `first` of all: the layer's output, scaled and shifted, and where it
   is hidden the activation of that, with its slope and curvature where they are asked for. */
INLINE void NAME(finish)(const struct work *w, int activation, int hidden, int sloped, int scaled, int64_t rows, int64_t first,
                         const vec *y, vec *h, vec *slope, vec *curvature) {
    const vec *context = w->job->context ? w->context + first * VECTORS : NULL;
    const REAL *b = w->by_lane ? (const REAL *)w->job->entries + first : NULL, *later = w->job->terms > 1 ? b + w->sum : NULL;
    for (int64_t j = 0; j < rows; j++)
        for (int64_t v = 0; v < w->live; v++) {
            int64_t n = j * VECTORS + v, at = NAME(entry)(w, first + j, v);
            vec shift = w->by_lane ? NAME(all)(b[j]) : w->shift[first + j];
            if (w->by_lane && scaled) shift *= w->scale[at];
            if (later) shift += w->time[v] * later[j]; /* b s + t v */
            vec a = scaled ? y[n] * w->scale[at] + shift : y[n] + shift;
            if (context) a += context[n];
            vec unread[2];
            if (hidden)
                NAME(activate)(activation, a, h + n, sloped ? slope + n : unread, sloped ? curvature + n : unread + 1);
            else
                h[n] = a;
        }
}

/* f at the state in h[0], with the entries at hand: into the last layer's rows of h; the slopes are for what may follow. */
static void NAME(evaluate)(const struct work *w, int sloped) {
    const struct job *job = w->job;
    int64_t first = 0;
    for (int64_t i = 1; i <= job->layers; i++) {
        int64_t rows = job->widths[i], start = w->offset[i];
        vec *h = w->h + start, *y = w->scale ? w->y + start : h;
        NAME(product)(w, y, job->w[i - 1], w->h + w->offset[i - 1], rows, job->widths[i - 1]);
#define FINISH(activation, hidden, sloped) \
    NAME(finish)(w, activation, hidden, sloped, w->scale != NULL, rows, first, y, h, w->slope + start, w->curvature + start)
        if (i == job->layers)
            FINISH(ELU, 0, 0);
        else
            switch (2 * job->activation + (sloped != 0)) {
            case 2 * SOFTPLUS: FINISH(SOFTPLUS, 1, 0); break;
            case 2 * SOFTPLUS + 1: FINISH(SOFTPLUS, 1, 1); break;
            case 2 * TANH: FINISH(TANH, 1, 0); break;
            case 2 * TANH + 1: FINISH(TANH, 1, 1); break;
            case 2 * SILU: FINISH(SILU, 1, 0); break;
            case 2 * SILU + 1: FINISH(SILU, 1, 1); break;
            case 2 * GELU: FINISH(GELU, 1, 0); break;
            case 2 * GELU + 1: FINISH(GELU, 1, 1); break;
            case 2 * ELU: FINISH(ELU, 1, 0); break;
            default: FINISH(ELU, 1, 1);
            }
#undef FINISH
        first += rows;
    }
}

/* w = εᵀ ∂f/∂z into r[0] for a probe, given the evaluation; leaves r and g (scaled). */
static void NAME(multiply)(struct work *w, int64_t probe) {
    const struct job *job = w->job;
    int64_t first = w->sum;
    NAME(probe)(w, probe);
    for (int64_t i = job->layers; i > 0; i--) {
        int64_t rows = job->widths[i], columns = job->widths[i - 1], start = w->offset[i];
        vec *g = w->g + start, *r = w->r + w->offset[i - 1];
        first -= rows;
        for (int64_t j = 0; j < rows; j++)
            for (int64_t v = 0; v < w->live; v++) {
                int64_t n = j * VECTORS + v;
                g[n] = i == job->layers ? w->eps[n] : w->r[start + n] * w->slope[start + n];
                if (w->scale) g[n] *= w->scale[NAME(entry)(w, first + j, v)];
            }
        if (i < job->layers || job->eps) {
            NAME(product)(w, r, job->wt[i - 1], g, columns, rows);
            continue;
        }
        const REAL *row = (const REAL *)job->w[i - 1] + probe * columns; /* of a unit vector: one row of the weight */
        for (int64_t j = 0; j < columns; j++)
            for (int64_t v = 0; v < w->live; v++) r[j * VECTORS + v] = row[j] * g[probe * VECTORS + v];
    }
}

/* Adds weight * (l', E', n') of one evaluation to q; E' once, with the first probe. */
static void NAME(add_integrals)(const struct work *w, vec *q, REAL weight, int64_t probe) {
    const struct job *job = w->job;
    const vec *f = w->h + w->offset[job->layers];
    REAL each = weight * (REAL)job->weight;
    for (int64_t j = 0; j < job->widths[0]; j++)
        for (int64_t v = 0; v < w->live; v++) {
            int64_t i = j * VECTORS + v;
            q[v] += each * w->eps[i] * w->r[i];
            q[2 * VECTORS + v] += each * w->r[i] * w->r[i];
            if (!probe) q[VECTORS + v] += weight * f[i] * f[i];
        }
}

/* Where a part's gradients gather: of the weights, all layers one after the other, and of the entries: of the shifts and
   the scales of an evaluation in row `at` of tables, or of the terms. */
#define gradients NAME(gradients)
struct gradients {
    REAL *weights, *entries;
    int64_t at;
};

INLINE REAL NAME(row_sum)(const struct work *w, const vec *x) {
    vec total = NAME(all)(0);
    for (int64_t v = 0; v < w->live; v++) total += x[v];
    return NAME(lane_sum)(total);
}

INLINE REAL NAME(row_product)(const struct work *w, const vec *x, const vec *y) {
    vec total = NAME(all)(0);
    for (int64_t v = 0; v < w->live; v++) total += x[v] * y[v];
    return NAME(lane_sum)(total);
}

/* Adds the gradients that come of the cotangent x y of the scale in row j. */
INLINE void NAME(pull_scale)(const struct work *w, const struct gradients *to, int64_t j, const vec *x, const vec *y) {
    if (!w->by_lane) {
        const struct job *job = w->job;
        to->entries[(job->steps * job->stages + to->at) * w->sum + j] += NAME(row_product)(w, x, y);
        return;
    }
    vec gate[VECTORS];
    for (int64_t v = 0; v < w->live; v++) {
        vec s = w->scale[j * VECTORS + v];
        gate[v] = x[v] * y[v] * s * (1 - s);
    }
    to->entries[2 * w->sum + j] += NAME(row_product)(w, gate, w->time);
    to->entries[3 * w->sum + j] += NAME(row_sum)(w, gate);
}

/* Adds those that come of the shift's in row j. */
INLINE void NAME(pull_shift)(const struct work *w, const struct gradients *to, int64_t j, const vec *bar) {
    if (!w->by_lane) {
        to->entries[to->at * w->sum + j] += NAME(row_sum)(w, bar);
        return;
    }
    to->entries[j] += w->scale ? NAME(row_product)(w, bar, w->scale + j * VECTORS) : NAME(row_sum)(w, bar);
    if (w->job->terms > 1) to->entries[w->sum + j] += NAME(row_product)(w, bar, w->time);
    if (!w->scale) return;
    vec bias[VECTORS];
    for (int v = 0; v < VECTORS; v++) bias[v] = NAME(all)(((const REAL *)w->job->entries)[j]);
    NAME(pull_scale)(w, to, j, bar, bias);
}

/* The transpose of the product, for one probe: adds to a_bar of the hidden layers, and to the gradients. */
static void NAME(pull_product)(const struct work *w, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t first = 0;
    REAL *w_bar = to->weights;
    for (int64_t i = 1; i <= job->layers; i++) {
        int64_t rows = job->widths[i], columns = job->widths[i - 1], start = w->offset[i];
        const vec *p = w->p + w->offset[i - 1];
        vec *g_bar = w->p + start;
        NAME(gradient)(w, w_bar, w->g + start, p, rows, columns);
        w_bar += rows * NAME(padded)(columns);
        if (i == job->layers && !w->scale) return; /* ε is held constant */
        NAME(product)(w, g_bar, job->w[i - 1], p, rows, columns);
        for (int64_t j = 0; j < rows; j++) {
            vec *bar = g_bar + j * VECTORS, g[VECTORS];
            if (w->scale) {
                for (int64_t v = 0; v < w->live; v++) {
                    int64_t n = start + j * VECTORS + v;
                    g[v] = i == job->layers ? w->eps[j * VECTORS + v] : w->slope[n] * w->r[n];
                }
                NAME(pull_scale)(w, to, first + j, bar, g);
            }
            for (int64_t v = 0; v < w->live; v++) {
                int64_t n = start + j * VECTORS + v;
                if (w->scale) bar[v] *= w->scale[NAME(entry)(w, first + j, v)];
                if (i == job->layers) continue;
                w->a_bar[n] += w->curvature[n] * w->r[n] * bar[v];
                bar[v] *= w->slope[n];
            }
        }
        first += rows;
    }
}

/* The cotangent of the state into a_bar[0], given that of f in the last layer's rows of a_bar; adds to the gradients. */
static void NAME(pull_state)(const struct work *w, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t first = w->sum;
    REAL *w_bar = to->weights;
    for (int64_t i = 1; i <= job->layers; i++) w_bar += job->widths[i] * NAME(padded)(job->widths[i - 1]);
    for (int64_t i = job->layers; i > 0; i--) {
        int64_t rows = job->widths[i], columns = job->widths[i - 1], start = w->offset[i], before = w->offset[i - 1];
        vec *bar = w->a_bar + start;
        first -= rows;
        w_bar -= rows * NAME(padded)(columns);
        for (int64_t j = 0; job->context && j < rows; j++)
            for (int64_t v = 0; v < w->live; v++) w->context_bar[(first + j) * VECTORS + v] += bar[j * VECTORS + v];
        for (int64_t j = 0; j < rows; j++) {
            NAME(pull_shift)(w, to, first + j, bar + j * VECTORS);
            if (!w->scale) continue;
            NAME(pull_scale)(w, to, first + j, bar + j * VECTORS, w->y + start + j * VECTORS);
            for (int64_t v = 0; v < w->live; v++) bar[j * VECTORS + v] *= w->scale[NAME(entry)(w, first + j, v)];
        }
        NAME(gradient)(w, w_bar, bar, w->h + before, rows, columns);
        vec *h_bar = i > 1 ? w->r + before : w->a_bar; /* r has had its use */
        NAME(product)(w, h_bar, job->wt[i - 1], bar, columns, rows);
        if (i == 1) return;
        for (int64_t j = 0; j < columns; j++)
            for (int64_t n = j * VECTORS; n < j * VECTORS + w->live; n++) w->a_bar[before + n] += w->slope[before + n] * h_bar[n];
    }
}

/* h times a coefficient of the tableau, for each lane. */
static void NAME(scaled)(vec *out, const double *h, double coefficient) {
    for (int64_t i = 0; i < LANES; i++) ((REAL *)out)[i] = (REAL)(h[i] * coefficient);
}

/* The times at a node of the steps from t. */
static void NAME(reach)(const struct work *w, const double *t, const double *h, double node) {
    for (int64_t i = 0; i < LANES; i++) ((REAL *)w->time)[i] = (REAL)(t[i] + node * h[i]);
}

/* Pulls the cotangents of state and integrals back through a step from t by h, (LANES) each, given the states of its
   stages (stages, d, LANES); of a grid the stages' rows of the tables begin at `at`. Adds to the gradients. */
static void NAME(step_back)(struct work *w, const vec *states, const double *t, const double *h, int64_t at,
                            struct gradients *to) {
    const struct job *job = w->job;
    int64_t d = job->widths[0], rows = d * VECTORS, layers = job->layers;
    vec *z_bar = w->state, *total = w->bars + job->stages * rows, *f = w->h + w->offset[layers];
    vec *f_bar = w->a_bar + w->offset[layers], share[VECTORS];
    memcpy(total, z_bar, (size_t)(d * ROW_BYTES));
    for (int64_t i = job->stages - 1; i >= 0; i--) {
        NAME(scaled)(share, h, job->b[i]);
        memcpy(w->h, states + i * rows, (size_t)(d * ROW_BYTES));
        if (w->by_lane) {
            NAME(reach)(w, t, h, job->c[i]);
            NAME(entered)(w);
        } else {
            to->at = at + i;
            NAME(tabulated)(w, at + i);
        }
        NAME(evaluate)(w, 1);
        memset(w->a_bar + w->offset[1], 0, (size_t)(w->offset[layers] - w->offset[1]) * VECTOR_BYTES);
        int probed = job->probes && job->b[i];
        for (int64_t k = 0; probed && k < job->probes; k++) {
            NAME(multiply)(w, k);
            for (int64_t j = 0; j < d; j++)
                for (int64_t v = 0; v < w->live; v++) {
                    int64_t n = j * VECTORS + v;
                    vec each = share[v] * (REAL)job->weight;
                    w->p[n] = each * (w->integrals[v] * w->eps[n] + 2 * w->integrals[2 * VECTORS + v] * w->r[n]);
                }
            NAME(pull_product)(w, to);
        }
        for (int64_t k = i + 1; k < job->stages; k++)
            NAME(scaled)(w->weights + k * VECTORS, h, job->a[k * job->stages + i]);
        for (int64_t j = 0; j < d; j++)
            for (int64_t v = 0; v < w->live; v++) {
                int64_t n = j * VECTORS + v;
                vec bar = share[v] * z_bar[n];
                for (int64_t k = i + 1; k < job->stages; k++) bar += w->weights[k * VECTORS + v] * w->bars[k * rows + n];
                if (probed) bar += 2 * share[v] * w->integrals[VECTORS + v] * f[n];
                f_bar[n] = bar;
            }
        NAME(pull_state)(w, to);
        memcpy(w->bars + i * rows, w->a_bar, (size_t)(d * ROW_BYTES));
        for (int64_t j = 0; j < d; j++)
            for (int64_t n = j * VECTORS; n < j * VECTORS + w->live; n++) total[n] += w->a_bar[n];
    }
    memcpy(z_bar, total, (size_t)(d * ROW_BYTES));
}

/* A sample's cotangents of start state and context, where they go. */
static void NAME(take_bars)(const struct work *w, int64_t lane, int64_t sample) {
    const struct job *job = w->job;
    int64_t d = job->widths[0];
    NAME(take)(w->state, lane, (REAL *)job->z0_bar + sample * d, d);
    if (job->context) NAME(take)(w->context_bar, lane, (REAL *)job->context_bar + sample * w->sum, w->sum);
}

/* Numbers in a part's gradients of the weights. */
static int64_t NAME(weights)(const struct job *job) {
    int64_t count = 0;
    for (int64_t i = 1; i <= job->layers; i++) count += job->widths[i] * NAME(padded)(job->widths[i - 1]);
    return count;
}
