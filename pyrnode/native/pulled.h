/* The pullback of an evaluation of the potential, and the solves along a grid. Included by potential.c for each type REAL. */

/* Where a part's gradients gather: W by layer, A, of rows that are padded; then the biases, w, b, and Σ M, that ∇²Φ's
   quadratic term comes to. */
#undef gradients
#define gradients NAME(gradients)
struct gradients {
    REAL *weights, *A, *biases, *last, *linear, *M;
};

static struct gradients NAME(places)(const struct job *job, REAL *bars) {
    int64_t m = job->width, inner = NAME(padded)(m), outer = NAME(padded)(job->inputs);
    struct gradients to;
    to.weights = bars;
    to.A = to.weights + m * outer + (job->layers - 1) * m * inner;
    to.biases = to.A + job->rank * outer;
    to.last = to.biases + job->layers * m;
    to.linear = to.last + m;
    to.M = to.linear + job->inputs;
    return to;
}

static REAL *NAME(weight)(const struct job *job, const struct gradients *to, int64_t i) {
    int64_t m = job->width;
    return i ? to->weights + m * NAME(padded)(job->inputs) + (i - 1) * m * NAME(padded)(m) : to->weights;
}

/* out (rows, padded columns) += Σ over lanes of a (rows, LANES) b (columns, LANES)ᵀ; b is turned over in the scratch. */
static void NAME(gradient)(const struct work *w, REAL *out, const vec *a, const vec *b, int64_t rows, int64_t columns) {
    int64_t stride = NAME(padded)(columns), vectors = stride / WIDTH, lanes = w->live * WIDTH;
    for (int64_t i = 0; i < lanes; i++)
        for (int64_t j = 0; j < columns; j++) w->scratch[i * stride + j] = ((const REAL *)b)[j * LANES + i];
    NAME(tiles)(1, (vec *)out, vectors, (const REAL *)a, LANES, (const vec *)w->scratch, vectors, rows, lanes,
                (columns + WIDTH - 1) / WIDTH);
}

INLINE REAL NAME(row_product)(const struct work *w, const vec *x, const vec *y) {
    vec total = NAME(all)(0);
    for (int64_t v = 0; v < w->live; v++) total += y ? x[v] * y[v] : x[v];
    return NAME(lane_sum)(total);
}

INLINE int64_t NAME(pair)(int64_t d, int64_t p, int64_t q) {
    return p <= q ? p * d - p * (p - 1) / 2 + q - p : q * d - q * (q - 1) / 2 + p - q;
}

/* Adds what comes of the cotangent c_bar of c = h φ'' y, (width, LANES). */
static void NAME(weigh)(const struct work *w, const struct layer *at, const vec *c_bar) {
    int64_t curve = w->job->curve;
    EACH(n, w->job->width) {
        vec bent = at->h * c_bar[n];
        at->a_bar[n] += bent * at->y[n] * NAME(twist)(curve, at->root[n], at->slope[n], at->bend[n]);
        at->y_bar[n] += bent * at->bend[n];
    }
}

/* J M of direction p into `out`, given J (d, width, LANES). */
static void NAME(mixed)(const struct work *w, vec *out, const vec *J, int64_t p) {
    int64_t d = w->job->d, m = w->job->width, wide = m * VECTORS;
    const vec *own = w->M + NAME(pair)(d, p, p) * VECTORS;
    EACH(n, m) out[n] = own[n % VECTORS] * J[p * wide + n];
    for (int64_t q = 0; w->job->normed && q < d; q++) {
        const vec *M = w->M + NAME(pair)(d, p, q) * VECTORS;
        if (q != p) EACH(n, m) out[n] += M[n % VECTORS] * J[q * wide + n];
    }
}

/* Pulls back trace and norm, whose cotangents are in M, down to the first layer. */
static void NAME(pull_curvature)(const struct work *w, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t d = job->d, m = job->width, wide = m * VECTORS;
    vec *c_bar = w->spare;
    for (int64_t i = job->layers - 1; i > 0; i--) {
        const struct layer *at = w->layers + i;
        int top = i == job->layers - 1;
        memset(c_bar, 0, (size_t)(m * ROW_BYTES));
        for (int64_t p = 0; p < d; p++) {
            vec *J_bar = w->J_bar + p * wide, *U_bar = w->U_bar + p * wide;
            const vec *J = at->J + p * wide;
            NAME(mixed)(w, J_bar, at->J, p);
            EACH(n, m) {
                c_bar[n] += J[n] * J_bar[n];
                J_bar[n] *= 2 * at->c[n];
                if (top) continue;
                at->a_bar[n] += at->h * at->bend[n] * J[n] * U_bar[n];
                J_bar[n] += at->h * at->slope[n] * U_bar[n];
            }
            NAME(gradient)(w, NAME(weight)(job, to, i), J_bar, at->U + p * wide, m, m);
            NAME(product)(w, !top, U_bar, job->wt[i], J_bar, m, m);
        }
        NAME(weigh)(w, at, c_bar);
    }
}

/* The rest of it: layer 0, whose Jacobian is W_0, and the quadratic term. */
static void NAME(pull_first)(const struct work *w, const struct gradients *to) {
    const struct job *job = w->job;
    const struct layer *at = w->layers;
    int64_t d = job->d, m = job->width, wide = m * VECTORS, stride = NAME(padded)(job->inputs);
    vec *c_bar = w->spare;
    memset(c_bar, 0, (size_t)(m * ROW_BYTES));
    for (int64_t p = 0; p < d; p++)
        for (int64_t q = p; q < d; q++) {
            int64_t pair = NAME(pair)(d, p, q);
            const vec *M = w->M + pair * VECTORS;
            if (p != q && !job->normed) continue;
            to->M[pair] += NAME(row_product)(w, M, NULL);
            const REAL *products = (const REAL *)job->pairs + pair * m;
            const REAL *left = (const REAL *)job->columns + p * m, *right = (const REAL *)job->columns + q * m;
            for (int64_t k = 0; k < m; k++) {
                REAL twice = p == q ? 1 : 2;
                for (int64_t v = 0; v < w->live; v++) c_bar[k * VECTORS + v] += twice * products[k] * M[v];
                REAL sum = 2 * NAME(row_product)(w, at->c + k * VECTORS, M);
                to->weights[k * stride + p] += sum * right[k];
                if (p != q) to->weights[k * stride + q] += sum * left[k];
            }
        }
    NAME(weigh)(w, at, c_bar);
    for (int64_t p = 0; job->layers > 1 && p < d; p++)
        for (int64_t k = 0; k < m; k++) {
            const vec *U_bar = w->U_bar + p * wide + k * VECTORS;
            REAL entry = ((const REAL *)job->columns)[p * m + k];
            for (int64_t v = 0; v < w->live; v++) at->a_bar[k * VECTORS + v] += at->bend[k * VECTORS + v] * U_bar[v] * entry;
            to->weights[k * stride + p] += NAME(row_product)(w, U_bar, at->slope + k * VECTORS);
        }
}

/* Pulls G_bar back through the gradient and the network, after the curvature: into s_bar; adds to all gradients. */
static void NAME(pull_gradient)(const struct work *w, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t m = job->width, S = job->inputs;
    vec *q = w->q_rows, *v_bar = w->spare;
    memcpy(q, w->G_bar, (size_t)(S * ROW_BYTES));
    for (int64_t i = 0; i < job->layers; i++) {
        const struct layer *at = w->layers + i;
        NAME(gradient)(w, NAME(weight)(job, to, i), at->v, q, m, i ? m : S);
        NAME(product)(w, 0, v_bar, job->w[i], q, m, i ? m : S);
        EACH(n, m) {
            at->a_bar[n] += at->h * at->bend[n] * at->y[n] * v_bar[n];
            vec moved = at->h * at->slope[n] * v_bar[n] + at->y_bar[n];
            q[n] = i ? q[n] + moved : moved;
        }
    }
    for (int64_t k = 0; k < m; k++) to->last[k] += NAME(row_product)(w, q + k * VECTORS, NULL);
    for (int64_t i = job->layers - 1; i >= 0; i--) {
        const struct layer *at = w->layers + i;
        int top = i == job->layers - 1;
        if (!top) EACH(n, m) at->a_bar[n] += at->h * at->slope[n] * w->u_bar[n];
        NAME(gradient)(w, NAME(weight)(job, to, i), at->a_bar, at->input, m, i ? m : S);
        for (int64_t k = 0; k < m; k++) to->biases[i * m + k] += NAME(row_product)(w, at->a_bar + k * VECTORS, NULL);
        NAME(product)(w, i && !top, i ? w->u_bar : w->s_bar, job->wt[i], at->a_bar, i ? m : S, m);
    }
    for (int64_t j = 0; j < S; j++) to->linear[j] += NAME(row_product)(w, w->G_bar + j * VECTORS, NULL);
    NAME(product)(w, 0, w->AG, job->A, w->G_bar, job->rank, S);
    NAME(gradient)(w, to->A, w->As, w->G_bar, job->rank, S);
    NAME(gradient)(w, to->A, w->AG, w->s, job->rank, S);
    NAME(product)(w, 1, w->s_bar, job->At, w->AG, S, job->rank);
    if (!job->context) return;
    EACH(n, m) w->context_bar[n] += w->layers[0].a_bar[n];
    EACH(n, S) w->context_bar[m * VECTORS + n] += w->G_bar[n];
}

/* Loads the state or its cotangent, and the context, of a block; lanes without a sample hold zeros. */
static int64_t NAME(load)(struct work *w, int64_t block, const void *z) {
    const struct job *job = w->job;
    int64_t start = block * LANES, d = job->d, length = job->width + job->inputs;
    int64_t count = job->batch - start < LANES ? job->batch - start : LANES;
    w->live = (count + 2 * WIDTH - 1) / (2 * WIDTH) * 2; /* vectors go in pairs through a product */
    memset(w->state, 0, (size_t)(d * ROW_BYTES));
    memset(w->integrals, 0, 5 * ROW_BYTES);
    memset(w->context, 0, (size_t)(length * ROW_BYTES));
    memset(w->context_bar, 0, (size_t)(length * ROW_BYTES));
    for (int64_t i = 0; i < count; i++) {
        NAME(put)(w->state, i, (const REAL *)z + (start + i) * d, d);
        if (job->context) NAME(put)(w->context, i, (const REAL *)job->context + (start + i) * length, length);
    }
    return count;
}

/* For threads.c: blocks `first` to `last` of the batch; 0, or 1 where memory is short. */
int NAME(forward)(const struct job *job, long first, long last) {
    struct work space, *w = &space;
    if (NAME(open)(w, job)) return 1;
    int64_t d = job->d, rows = d * VECTORS, all = job->stages * job->steps;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = NAME(load)(w, block, job->z0);
        for (int64_t step = 0; step < job->steps; step++) {
            for (int64_t i = 0; i < job->stages; i++) {
                int64_t at = step * job->stages + i;
                memcpy(w->s, w->state, (size_t)(d * ROW_BYTES));
                for (int64_t j = 0; j < i; j++) {
                    REAL weight = (REAL)(job->h[step] * job->a[i * job->stages + j]);
                    if (weight) EACH(n, d) w->s[n] += weight * w->rates[j * rows + n];
                }
                if (job->record) memcpy((vec *)job->record + (block * all + at) * rows, w->s, (size_t)(d * ROW_BYTES));
                NAME(evaluate)(w, job->times[at]);
                EACH(n, d) w->rates[i * rows + n] = -w->G[n];
                if (!job->integrals || !job->b[i]) continue;
                NAME(curvature)(w);
                NAME(add_integrals)(w, (REAL)(job->h[step] * job->b[i]));
            }
            for (int64_t i = 0; i < job->stages; i++)
                EACH(n, d) w->state[n] += (REAL)(job->h[step] * job->b[i]) * w->rates[i * rows + n];
        }
        for (int64_t i = 0; i < count; i++) {
            NAME(take)(w->state, i, (REAL *)job->z1 + (start + i) * d, d);
            NAME(take)(w->integrals, i, (REAL *)job->q + (start + i) * job->integrals, job->integrals);
        }
    }
    NAME(close)(w);
    return 0;
}

/* Pulls back a stage with the weight `share` in its step, whose rate has the cotangent in the first rows of G_bar. */
static void NAME(stage_back)(const struct work *w, REAL share, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t d = job->d, m = job->width;
    int timed = job->inputs > d, curved = job->integrals && share;
    for (int64_t i = 0; i < job->layers; i++) {
        memset(w->layers[i].a_bar, 0, (size_t)(m * ROW_BYTES));
        memset(w->layers[i].y_bar, 0, (size_t)(m * ROW_BYTES));
    }
    if (curved) {
        NAME(curvature)(w);
        NAME(hamilton)(w);
    }
    for (int64_t v = 0; v < w->live; v++) {
        vec zero = NAME(all)(0), energy = zero, rise = zero;
        if (curved) {
            vec residual = w->residual[v], signed_one = NAME(select)(residual > 0, zero + 1, NAME(select)(residual < 0, zero - 1, zero));
            energy = 2 * share * w->integrals[VECTORS + v], rise = share * signed_one * w->integrals[4 * VECTORS + v];
        }
        for (int64_t j = 0; j < d; j++) { /* of ∇Φ = -f */
            int64_t n = j * VECTORS + v;
            w->G_bar[n] = energy * w->G[n] - w->G_bar[n] - rise * w->G[n];
        }
        if (timed) w->G_bar[d * VECTORS + v] = rise;
        for (int64_t p = 0, pair = 0; curved && p < d; p++)
            for (int64_t q = p; q < d; q++, pair++) {
                vec M = 2 * share * w->integrals[2 * VECTORS + v] * w->H[pair * VECTORS + v];
                w->M[pair * VECTORS + v] = p == q ? M - share * w->integrals[v] : M;
            }
    }
    if (curved) {
        NAME(pull_curvature)(w, to);
        NAME(pull_first)(w, to);
    }
    NAME(pull_gradient)(w, to);
}

/* The reverse of `forward`, from its record, of blocks `first` to `last`; adds to the gradients. */
static void NAME(reverse)(struct work *w, int64_t first, int64_t last, const struct gradients *to) {
    const struct job *job = w->job;
    int64_t d = job->d, rows = d * VECTORS, s = job->stages, length = job->width + job->inputs;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = NAME(load)(w, block, job->z1_bar);
        for (int64_t i = 0; i < count; i++)
            NAME(put)(w->integrals, i, (const REAL *)job->q_bar + (start + i) * job->integrals, job->integrals);
        for (int64_t step = job->steps - 1; step >= 0; step--) {
            memcpy(w->total, w->state, (size_t)(d * ROW_BYTES));
            for (int64_t i = s - 1; i >= 0; i--) {
                int64_t at = step * s + i;
                memcpy(w->s, (const vec *)job->record + (block * job->steps * s + at) * rows, (size_t)(d * ROW_BYTES));
                NAME(evaluate)(w, job->times[at]);
                REAL share = (REAL)(job->h[step] * job->b[i]);
                EACH(n, d) w->G_bar[n] = share * w->state[n];
                for (int64_t k = i + 1; k < s; k++) {
                    REAL weight = (REAL)(job->h[step] * job->a[k * s + i]);
                    if (weight) EACH(n, d) w->G_bar[n] += weight * w->bars[k * rows + n];
                }
                NAME(stage_back)(w, share, to);
                memcpy(w->bars + i * rows, w->s_bar, (size_t)(d * ROW_BYTES));
                EACH(n, d) w->total[n] += w->s_bar[n];
            }
            memcpy(w->state, w->total, (size_t)(d * ROW_BYTES));
        }
        for (int64_t i = 0; i < count; i++) {
            NAME(take)(w->state, i, (REAL *)job->z0_bar + (start + i) * d, d);
            if (job->context) NAME(take)(w->context_bar, i, (REAL *)job->context_bar + (start + i) * length, length);
        }
    }
}

/* For threads.c: parts `first` to `last` of the blocks, each with gradients of its own. */
int NAME(backward)(const struct job *job, long first, long last) {
    int64_t blocks = (job->batch + LANES - 1) / LANES;
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    for (int64_t part = first; part < last; part++) {
        struct gradients to = NAME(places)(job, job->bars[part]);
        NAME(reverse)(&w, blocks * part / job->parts, blocks * (part + 1) / job->parts, &to);
    }
    NAME(close)(&w);
    return 0;
}
