/* The potential on a block of samples: its gradient, and the curvature's trace and norm. Included by potential.c for each
   type REAL. */

#undef work
#define work NAME(work)

/* A layer's rows, (width, LANES) each. */
#undef layer
#define layer NAME(layer)
struct layer {
    const vec *input;                    /* u_{i-1}, or s */
    vec *u, *root, *slope, *bend, *y, *v; /* u_i, of a_i, and of the way back */
    vec *c;                              /* h_i φ'' y */
    vec *a_bar, *y_bar;
    vec *J, *U;                          /* (d, width, LANES): ∂a_i/∂z, and that of the input; none of layer 0 */
    REAL h;
};

struct work {
    const struct job *job;
    int64_t live;  /* vectors of a row that hold samples, in pairs; the others are passed over */
    int64_t pairs; /* d (d + 1) / 2 */
    struct layer *layers;
    vec *s, *G, *As, *residual; /* (inputs), (inputs), (rank), 1 */
    vec *H, *M;                 /* ∇²Φ and its cotangent, (pairs) */
    vec *integrals, *context;   /* (5), (width + inputs) */
    vec *state, *rates, *bars, *total, *context_bar;
    vec *q_rows, *G_bar, *AG, *s_bar, *u_bar, *spare; /* of the pullback */
    vec *U_bar, *J_bar;                               /* (d, width, LANES) */
    REAL *scratch;                                    /* the widest rows, transposed */
    void *memory;
};

INLINE int64_t NAME(most)(int64_t a, int64_t b) { return a > b ? a : b; }

static int NAME(open)(struct work *w, const struct job *job) {
    int64_t d = job->d, m = job->width, S = job->inputs, wide = job->integrals ? d * m : 0, stages = job->stages;
    int64_t pairs = d * (d + 1) / 2, widest = NAME(padded)(NAME(most)(NAME(most)(m, S), job->rank));
    vec **parts[] = {&w->s, &w->G, &w->As, &w->residual, &w->H, &w->M, &w->integrals, &w->context, &w->state, &w->rates,
                     &w->bars, &w->total, &w->context_bar, &w->q_rows, &w->G_bar, &w->AG, &w->s_bar, &w->u_bar, &w->spare,
                     &w->U_bar, &w->J_bar, (vec **)&w->scratch};
    int64_t sizes[] = {S, S, job->rank, 1, pairs, pairs, 5, m + S, d, stages * d, stages * d, d, m + S, NAME(most)(m, S), S,
                       job->rank, S, m, m, wide, wide, widest};
    int64_t count = sizeof(sizes) / sizeof(*sizes), total = 0;
    for (int64_t i = 0; i < count; i++) total += sizes[i];
    total += job->layers * 9 * m + (job->layers - 1) * 2 * wide;
    w->job = job, w->pairs = pairs, w->live = VECTORS;
    w->layers = calloc((size_t)job->layers, sizeof(struct layer));
    w->memory = aligned_alloc(ROW_BYTES, (size_t)(total * ROW_BYTES));
    if (!w->layers || !w->memory) {
        free(w->layers), free(w->memory);
        return 1;
    }
    memset(w->memory, 0, (size_t)(total * ROW_BYTES));
    vec *next = w->memory;
    for (int64_t i = 0; i < count; i++) *parts[i] = next, next += sizes[i] * VECTORS;
    for (int64_t i = 0; i < job->layers; i++) {
        struct layer *at = w->layers + i;
        vec **rows[] = {&at->u, &at->root, &at->slope, &at->bend, &at->y, &at->v, &at->c, &at->a_bar, &at->y_bar};
        for (int j = 0; j < 9; j++) *rows[j] = next, next += m * VECTORS;
        at->input = i ? w->layers[i - 1].u : w->s;
        at->h = i ? (REAL)(1.0 / (double)(job->layers - 1)) : 1;
        if (i) at->J = next, at->U = next + wide * VECTORS, next += 2 * wide * VECTORS;
    }
    return 0;
}

static void NAME(close)(struct work *w) {
    free(w->memory);
    free(w->layers);
}

/* out (rows, LANES) (+)= a (rows, inner) b (inner, LANES). */
static void NAME(product)(const struct work *w, int add, vec *out, const void *a, const vec *b, int64_t rows, int64_t inner) {
    NAME(tiles)(add, out, VECTORS, a, inner, b, VECTORS, rows, inner, w->live);
}

/* For every vector of so many rows that holds samples. */
#define EACH(n, rows) \
    for (int64_t row_ = 0; row_ < (rows); row_++) \
        for (int64_t n = row_ * VECTORS; n < row_ * VECTORS + w->live; n++)

/* Of a: φ, φ', φ'' and the root that φ''' is a simple function of. */
INLINE void NAME(curve)(int64_t curve, vec a, vec *value, vec *root, vec *slope, vec *bend) {
    if (curve == CURVED_SOFTPLUS) {
        vec e = NAME(exponential)(-NAME(magnitude)(a), 0), one = NAME(all)(1), zero = NAME(all)(0);
        ivec positive = a > 0;
        vec sigma = NAME(select)(positive, one, e) / (1 + e);
        *value = NAME(select)(positive, a, zero) + NAME(logarithm)(e);
        *root = *slope = sigma, *bend = sigma * (1 - sigma);
        return;
    }
    vec h = NAME(hyperbolic)(a), square = h * h;
    *root = h;
    if (curve == CURVED_TANH) {
        *value = h, *slope = 1 - square, *bend = -2 * h * *slope;
        return;
    }
    vec m = NAME(magnitude)(a);
    *value = m + NAME(logarithm)(NAME(exponential)(-2 * m, 0)), *slope = h, *bend = 1 - square;
}

INLINE vec NAME(twist)(int64_t curve, vec root, vec slope, vec bend) {
    if (curve == LOGCOSH) return -2 * root * bend;
    return curve == CURVED_TANH ? slope * (6 * root * root - 2) : bend * (1 - 2 * root);
}

/* φ(a) and its derivatives of a layer whose products are in `u`; the last layer's value is nobody's. */
INLINE void NAME(finish)(const struct work *w, int64_t curve, int64_t i) {
    const struct job *job = w->job;
    const struct layer *at = w->layers + i;
    const REAL *bias = job->bias[i];
    for (int64_t k = 0; k < job->width; k++)
        for (int64_t n = k * VECTORS; n < k * VECTORS + w->live; n++) {
            vec a = at->u[n] + bias[k], value;
            if (!i && job->context) a += w->context[n];
            NAME(curve)(curve, a, &value, at->root + n, at->slope + n, at->bend + n);
            at->u[n] = i ? at->input[n] + at->h * value : value;
        }
}

/* ∇Φ at the state in the first rows of s, and at the time t: into G; the negative of its first d rows is f. */
static void NAME(evaluate)(const struct work *w, double t) {
    const struct job *job = w->job;
    int64_t m = job->width, S = job->inputs, last = job->layers - 1;
    if (S > job->d)
        for (int64_t v = 0; v < VECTORS; v++) w->s[job->d * VECTORS + v] = NAME(all)((REAL)t);
    for (int64_t i = 0; i <= last; i++) {
        NAME(product)(w, 0, w->layers[i].u, job->w[i], w->layers[i].input, m, i ? m : S);
        switch (job->curve) {
        case LOGCOSH: NAME(finish)(w, LOGCOSH, i); break;
        case CURVED_TANH: NAME(finish)(w, CURVED_TANH, i); break;
        default: NAME(finish)(w, CURVED_SOFTPLUS, i);
        }
    }
    for (int64_t k = 0; k < m; k++)
        for (int64_t v = 0; v < w->live; v++) w->layers[last].y[k * VECTORS + v] = NAME(all)(((const REAL *)job->last)[k]);
    for (int64_t i = last; i >= 0; i--) {
        const struct layer *at = w->layers + i;
        EACH(n, m) at->v[n] = at->h * at->slope[n] * at->y[n];
        if (!i) break;
        memcpy(w->layers[i - 1].y, at->y, (size_t)(m * ROW_BYTES));
        NAME(product)(w, 1, w->layers[i - 1].y, job->wt[i], at->v, m, m);
    }
    NAME(product)(w, 0, w->As, job->A, w->s, job->rank, S);
    for (int64_t j = 0; j < S; j++)
        for (int64_t v = 0; v < w->live; v++) {
            vec slope = NAME(all)(((const REAL *)job->linear)[j]);
            w->G[j * VECTORS + v] = job->context ? slope + w->context[(m + j) * VECTORS + v] : slope;
        }
    NAME(product)(w, 1, w->G, job->wt[0], w->layers[0].v, S, m);
    NAME(product)(w, 1, w->G, job->At, w->As, S, job->rank);
}

/* The layers' Jacobians and weights c of an evaluation, and ∇²Φ of them (H, by pairs p <= q). */
static void NAME(curvature)(const struct work *w) {
    const struct job *job = w->job;
    int64_t m = job->width, d = job->d, wide = m * VECTORS;
    for (int64_t i = 0; i < job->layers; i++) {
        const struct layer *at = w->layers + i, *under = at - 1;
        EACH(n, m) at->c[n] = at->h * at->bend[n] * at->y[n];
        for (int64_t p = 0; i && p < d; p++) {
            vec *U = at->U + p * wide;
            const REAL *column = (const REAL *)job->columns + p * m;
            if (i == 1)
                EACH(n, m) U[n] = under->slope[n] * column[n / VECTORS];
            else
                EACH(n, m) U[n] = under->U[p * wide + n] + under->h * under->slope[n] * under->J[p * wide + n];
            NAME(product)(w, 0, at->J + p * wide, job->w[i], U, m, m);
        }
    }
    int64_t pair = 0;
    for (int64_t p = 0; p < d; p++)
        for (int64_t q = p; q < d; q++, pair++)
            for (int64_t v = 0; v < w->live; v++) w->H[pair * VECTORS + v] = NAME(all)(((const REAL *)job->gram)[pair]);
    NAME(product)(w, 1, w->H, job->pairs, w->layers[0].c, w->pairs, m);
    for (int64_t i = 1; i < job->layers; i++) {
        const struct layer *at = w->layers + i;
        vec *weighted = w->spare;
        pair = 0;
        for (int64_t p = 0; p < d; p++) {
            EACH(n, m) weighted[n] = at->c[n] * at->J[p * wide + n];
            for (int64_t q = p; q < d; q++, pair++) EACH(n, m) w->H[pair * VECTORS + n % VECTORS] += weighted[n] * at->J[q * wide + n];
        }
    }
}

/* H' before its sign is lost: ∂Φ/∂t - ½|∇Φ|². */
static void NAME(hamilton)(const struct work *w) {
    const struct job *job = w->job;
    for (int64_t v = 0; v < w->live; v++) {
        vec total = NAME(all)(0);
        for (int64_t j = 0; j < job->d; j++) total += w->G[j * VECTORS + v] * w->G[j * VECTORS + v];
        w->residual[v] = (job->inputs > job->d ? w->G[job->d * VECTORS + v] : NAME(all)(0)) - (REAL)0.5 * total;
    }
}

/* Adds weight * (l', E', n', 0, H') of an evaluation to the integrals. */
static void NAME(add_integrals)(const struct work *w, REAL weight) {
    const struct job *job = w->job;
    NAME(hamilton)(w);
    for (int64_t v = 0; v < w->live; v++) {
        vec trace = NAME(all)(0), energy = trace, norm = trace;
        int64_t pair = 0;
        for (int64_t p = 0; p < job->d; p++) {
            vec f = w->G[p * VECTORS + v];
            energy += f * f;
            for (int64_t q = p; q < job->d; q++, pair++) {
                vec h = w->H[pair * VECTORS + v];
                if (p == q) trace -= h;
                norm += p == q ? h * h : 2 * h * h;
            }
        }
        w->integrals[v] += weight * trace;
        w->integrals[VECTORS + v] += weight * energy;
        w->integrals[2 * VECTORS + v] += weight * norm;
        w->integrals[4 * VECTORS + v] += weight * NAME(magnitude)(w->residual[v]);
    }
}
