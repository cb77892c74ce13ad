/* Solves along a grid, and their reverse. Included by mlp.c for each type REAL. */

/* Loads the state or its cotangent, the probes and the contexts of a block; lanes without a sample hold zeros. */
static int64_t NAME(load)(struct work *w, int64_t block, const void *z) {
    const struct job *job = w->job;
    int64_t start = block * LANES, count = job->batch - start < LANES ? job->batch - start : LANES, d = job->widths[0];
    NAME(hold)(w, count);
    memset(w->state, 0, (size_t)((w->rates - w->state) * VECTOR_BYTES)); /* integrals, probes and contexts too */
    for (int64_t i = 0; i < count; i++) {
        NAME(put)(w->state, i, (const REAL *)z + (start + i) * d, d);
        NAME(put_held)(w, i, start + i);
    }
    return count;
}

/* For threads.c: blocks `first` to `last` of the batch; 0, or 1 where memory is short. */
int NAME(forward)(const struct job *job, long first, long last) {
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    int64_t d = job->widths[0], rows = d * VECTORS, all = job->stages * job->steps;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = NAME(load)(&w, block, job->z0);
        for (int64_t step = 0; step < job->steps; step++) {
            for (int64_t i = 0; i < job->stages; i++) {
                int64_t at = step * job->stages + i;
                memcpy(w.h, w.state, (size_t)(d * ROW_BYTES));
                for (int64_t j = 0; j < i; j++) {
                    REAL weight = (REAL)(job->h[step] * job->a[i * job->stages + j]);
                    if (weight)
                        for (int64_t n = 0; n < rows; n++) w.h[n] += weight * w.rates[j * rows + n];
                }
                if (job->record)
                    memcpy((char *)job->record + (block * all + at) * d * ROW_BYTES, w.h, (size_t)(d * ROW_BYTES));
                NAME(tabulated)(&w, at);
                NAME(evaluate)(&w, job->probes && job->b[i]);
                memcpy(w.rates + i * rows, w.h + w.offset[job->layers], (size_t)(d * ROW_BYTES));
                for (int64_t k = 0; job->b[i] && k < job->probes; k++) {
                    NAME(multiply)(&w, k);
                    NAME(add_integrals)(&w, w.integrals, (REAL)(job->h[step] * job->b[i]), k);
                }
            }
            for (int64_t i = 0; i < job->stages; i++)
                for (int64_t n = 0; n < rows; n++) w.state[n] += (REAL)(job->h[step] * job->b[i]) * w.rates[i * rows + n];
        }
        for (int64_t i = 0; i < count; i++) {
            NAME(take)(w.state, i, (REAL *)job->z1 + (start + i) * d, d);
            if (job->probes) NAME(take)(w.integrals, i, (REAL *)job->q + (start + i) * INTEGRALS, INTEGRALS);
        }
    }
    NAME(close)(&w);
    return 0;
}

/* The reverse of `forward`, from its record, of blocks `first` to `last`; adds to the gradients. */
static void NAME(reverse)(struct work *w, int64_t first, int64_t last, struct gradients *to) {
    const struct job *job = w->job;
    int64_t d = job->widths[0], all = job->stages * job->steps;
    double h[LANES];
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = NAME(load)(w, block, job->z1_bar);
        memset(w->context_bar, 0, (size_t)((w->stages - w->context_bar) * VECTOR_BYTES));
        for (int64_t i = 0; job->probes && i < count; i++)
            NAME(put)(w->integrals, i, (const REAL *)job->q_bar + (start + i) * INTEGRALS, INTEGRALS);
        for (int64_t step = job->steps - 1; step >= 0; step--) {
            int64_t at = step * job->stages;
            for (int i = 0; i < LANES; i++) h[i] = job->h[step];
            const void *states = (const char *)job->record + (block * all + at) * d * ROW_BYTES;
            NAME(step_back)(w, states, NULL, h, at, to);
        }
        for (int64_t i = 0; i < count; i++) NAME(take_bars)(w, i, start + i);
    }
}

/* For threads.c: parts `first` to `last` of the blocks, each with gradients of its own. */
int NAME(backward)(const struct job *job, long first, long last) {
    int64_t blocks = (job->batch + LANES - 1) / LANES;
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    for (int64_t part = first; part < last; part++) {
        REAL *bars = job->bars[part];
        struct gradients to = {bars, bars + NAME(weights)(job), 0};
        NAME(reverse)(&w, blocks * part / job->parts, blocks * (part + 1) / job->parts, &to);
    }
    NAME(close)(&w);
    return 0;
}
