/* Steps that every sample chooses for itself, as engines/runge_kutta.py takes them, and their reverse. Included by mlp.c for
   each type REAL.

   The samples of a block attempt a step together, each with its own time and length. Whoever has arrived makes room for
   the next sample that waits; when none waits, the block gets narrower. No lane's numbers depend on another's. */

/* The samples on their way, in the first `count` lanes. */
#define lanes NAME(lanes)
struct lanes {
    int64_t count, sample[LANES], attempts[LANES], accepted[LANES];
    double t[LANES], h[LANES], grow[LANES]; /* h: signed, of the next step; grow: by which it may, at most */
    struct step *last[LANES];               /* the last accepted step, where steps are kept */
    struct arena arena;
};

/* out (rows, LANES) = base + h Σ_j weights_j rates_j; without a base h Σ_j weights_j rates_j. */
static void NAME(combine)(const struct work *w, vec *out, const vec *base, const vec *rates, int64_t rows,
                          const double *weights, int64_t count) {
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < w->live; v++) {
            int64_t n = i * VECTORS + v;
            vec total = NAME(all)(0);
            for (int64_t j = 0; j < count; j++)
                if (weights[j]) total += (REAL)weights[j] * rates[j * rows * VECTORS + n];
            out[n] = base ? base[n] + total * w->length[v] : total * w->length[v];
        }
}

/* Adds the squares of some rows of an error, relative to `atol + rtol max(|old|, |new|)`, to total. */
static void NAME(add_squares)(const struct work *w, vec *total, const vec *error, const vec *old, const vec *new,
                              int64_t rows) {
    REAL atol = (REAL)w->job->atol, rtol = (REAL)w->job->rtol;
    for (int64_t i = 0; i < rows; i++)
        for (int64_t v = 0; v < w->live; v++) {
            int64_t n = i * VECTORS + v;
            vec a = NAME(magnitude)(old[n]), b = NAME(magnitude)(new[n]);
            vec ratio = error[n] / (atol + rtol * NAME(select)(a > b, a, b)); /* of a NaN in `new`: a NaN */
            total[v] += ratio * ratio;
        }
}

/* The norm that comes of such a sum, for each lane: the root of the mean over the state and the integrals in control. */
static void NAME(norm)(const struct work *w, double *size, const vec *total) {
    REAL count = (REAL)(w->job->widths[0] + w->job->controlled);
    for (int64_t i = 0; i < w->live * WIDTH; i++) {
        REAL mean = ((const REAL *)total)[i] / count;
        size[i] = SINGLE ? (double)sqrtf((float)mean) : sqrt(mean);
    }
}

/* The rates of state and integrals (where `probed`) at the state in h[0] and the times in w->time. */
static void NAME(rate)(struct work *w, vec *rate, vec *q_rate, int probed) {
    const struct job *job = w->job;
    NAME(entered)(w);
    NAME(evaluate)(w, probed && job->probes);
    memcpy(rate, w->h + w->offset[job->layers], (size_t)(job->widths[0] * ROW_BYTES));
    memset(q_rate, 0, INTEGRALS * ROW_BYTES);
    for (int64_t k = 0; probed && k < job->probes; k++) {
        NAME(multiply)(w, k);
        NAME(add_integrals)(w, q_rate, 1, k);
    }
}

/* For threads.c: the rates at the start and the first steps' lengths of blocks `first` to `last`: the state would change by
   as much as itself. */
int NAME(start)(const struct job *job, long first, long last) {
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    int64_t d = job->widths[0];
    double span = fabs(job->t1 - job->t0), t[LANES], h[LANES] = {0}, size[LANES], speed[LANES];
    for (int i = 0; i < LANES; i++) t[i] = job->t0;
    for (int64_t block = first; block < last; block++) {
        int64_t start = block * LANES, count = NAME(load)(&w, block, job->z0);
        vec total[2][VECTORS];
        NAME(reach)(&w, t, h, 0);
        memcpy(w.h, w.state, (size_t)(d * ROW_BYTES));
        NAME(rate)(&w, w.rates, w.q_rates, 1);
        memset(total, 0, sizeof total);
        NAME(add_squares)(&w, total[0], w.state, w.state, w.state, d);
        NAME(add_squares)(&w, total[1], w.rates, w.state, w.state, d);
        NAME(norm)(&w, size, total[0]);
        NAME(norm)(&w, speed, total[1]);
        for (int64_t i = 0; i < count; i++) {
            double next = (size[i] < 1 ? 1 : size[i]) / speed[i]; /* a NaN stays one */
            next = isnan(next) ? span * 1e-6 : fmin(next, span);
            job->first[start + i] = copysign(next, job->t1 - job->t0);
            NAME(take)(w.rates, i, (REAL *)job->rate + (start + i) * d, d);
            NAME(take)(w.q_rates, i, (REAL *)job->q_rate + (start + i) * INTEGRALS, INTEGRALS);
        }
    }
    NAME(close)(&w);
    return 0;
}

/* Lets the next sample that waits into a lane; 0 where none does. */
static int NAME(admit)(const struct work *w, struct lanes *on, int64_t lane) {
    const struct job *job = w->job;
    int64_t sample = __atomic_fetch_add(&job->shared->next, 1, __ATOMIC_RELAXED), d = job->widths[0];
    if (sample >= job->batch) return 0;
    const REAL none[INTEGRALS] = {0};
    NAME(put)(w->state, lane, (const REAL *)job->z0 + sample * d, d);
    NAME(put)(w->integrals, lane, none, INTEGRALS);
    NAME(put)(w->rates, lane, (const REAL *)job->rate + sample * d, d);
    NAME(put)(w->q_rates, lane, (const REAL *)job->q_rate + sample * INTEGRALS, INTEGRALS);
    NAME(put_held)(w, lane, sample);
    on->sample[lane] = sample, on->attempts[lane] = on->accepted[lane] = 0, on->last[lane] = NULL;
    on->t[lane] = job->t0, on->h[lane] = job->first[sample], on->grow[lane] = 10;
    return 1;
}

/* Puts the sample of the last lane into another, and gives the last lane up. */
static void NAME(close_up)(const struct work *w, struct lanes *on, int64_t lane) {
    int64_t from = --on->count, d = w->job->widths[0];
    if (from == lane) return;
    REAL *rows = (REAL *)w->state, *q_rows = (REAL *)w->q_rates;
    int64_t own = (w->rates - w->state) / VECTORS + d;
    for (int64_t j = 0; j < own; j++) rows[j * LANES + lane] = rows[j * LANES + from];
    for (int64_t j = 0; j < INTEGRALS; j++) q_rows[j * LANES + lane] = q_rows[j * LANES + from];
    on->sample[lane] = on->sample[from], on->last[lane] = on->last[from];
    on->attempts[lane] = on->attempts[from], on->accepted[lane] = on->accepted[from];
    on->t[lane] = on->t[from], on->h[lane] = on->h[from], on->grow[lane] = on->grow[from];
}

/* The norm of the error from that of its estimates; two are combined as in Hairer's DOP853. */
INLINE double NAME(both)(const struct job *job, const double *fifth, const double *third) {
    double square = *fifth * *fifth;
    return job->e3 ? square / fmax(sqrt(square + 0.01 * *third * *third), 1e-300) : *fifth;
}

/* One step for every lane: the new state is left in h[0], its rates behind those of the stages; the size of the error, of
   the state's alone where that rejects the step. */
static void NAME(attempt)(struct work *w, const struct lanes *on, const double *h, vec *q_new, double *size) {
    const struct job *job = w->job;
    int64_t d = job->widths[0], s = job->stages, rows = d * VECTORS, q_rows = INTEGRALS * VECTORS;
    NAME(scaled)(w->length, h, 1);
    memcpy(w->stages, w->state, (size_t)(d * ROW_BYTES));
    for (int64_t i = 1; i <= s; i++) {
        NAME(combine)(w, w->h, w->state, w->rates, d, i < s ? job->a + i * s : job->b, i);
        if (i < s) memcpy(w->stages + i * rows, w->h, (size_t)(d * ROW_BYTES));
        NAME(reach)(w, on->t, h, i < s ? job->c[i] : 1);
        int probed = i == s || job->b[i] || job->e[i] || (job->e3 && job->e3[i]);
        NAME(rate)(w, w->rates + i * rows, w->q_rates + i * q_rows, probed);
    }
    NAME(combine)(w, q_new, w->integrals, w->q_rates, INTEGRALS, job->b, s);
    double alone[2][LANES] = {0}, all[2][LANES] = {0};
    vec q_error[INTEGRALS * VECTORS], total[VECTORS];
    for (int estimate = 0; estimate < (job->e3 ? 2 : 1); estimate++) {
        const double *e = estimate ? job->e3 : job->e;
        NAME(combine)(w, w->bars, NULL, w->rates, d, e, s + 1);
        NAME(combine)(w, q_error, NULL, w->q_rates, INTEGRALS, e, s + 1);
        memset(total, 0, sizeof total);
        NAME(add_squares)(w, total, w->bars, w->state, w->h, d);
        NAME(norm)(w, alone[estimate], total);
        NAME(add_squares)(w, total, q_error, w->integrals, q_new, job->controlled);
        NAME(norm)(w, all[estimate], total);
    }
    for (int64_t i = 0; i < on->count; i++) {
        size[i] = NAME(both)(job, &alone[0][i], &alone[1][i]);
        if (size[i] <= 1) size[i] = NAME(both)(job, &all[0][i], &all[1][i]);
    }
}

/* Keeps the step of a lane; 1 where memory is short. */
static int NAME(keep)(const struct work *w, struct lanes *on, int64_t lane, double h) {
    const struct job *job = w->job;
    int64_t count = job->stages * job->widths[0];
    struct step *step = append(&on->arena, job->shared, sizeof(struct step) + (size_t)count * sizeof(REAL));
    if (!step) return 1;
    *step = (struct step){on->last[lane], on->t[lane], h};
    NAME(take)(w->stages, lane, (REAL *)(step + 1), count);
    on->last[lane] = step;
    return 0;
}

/* The lane's sample has arrived. */
static void NAME(deliver)(const struct work *w, const struct lanes *on, int64_t lane) {
    const struct job *job = w->job;
    int64_t sample = on->sample[lane], d = job->widths[0];
    NAME(take)(w->state, lane, (REAL *)job->z1 + sample * d, d);
    if (job->probes) NAME(take)(w->integrals, lane, (REAL *)job->q + sample * INTEGRALS, INTEGRALS);
    job->counts[2 * sample] = on->attempts[lane], job->counts[2 * sample + 1] = on->accepted[lane];
    if (job->ends) job->ends[sample] = on->last[lane];
}

/* Attempts a step in all lanes, and settles what comes of it; 1 where memory is short. */
static int NAME(advance)(struct work *w, struct lanes *on) {
    const struct job *job = w->job;
    int64_t d = job->widths[0], s = job->stages, rows = d * VECTORS, q_rows = INTEGRALS * VECTORS;
    double h[LANES] = {0}, size[LANES], smallest = 16 * 2.220446049250313e-16 * fmax(fabs(job->t0), fabs(job->t1));
    int arrived[LANES], stuck = 0;
    union { vec whole[VECTORS]; INTEGER lane[LANES]; } accepted;
    vec q_new[INTEGRALS * VECTORS];
    memset(&accepted, 0, sizeof accepted);
    NAME(hold)(w, on->count);
    for (int64_t i = 0; i < on->count; i++) {
        double left = job->t1 - on->t[i];
        arrived[i] = fabs(on->h[i]) >= fabs(left) * (1 - 1e-10);
        h[i] = arrived[i] ? left : on->h[i];
    }
    NAME(attempt)(w, on, h, q_new, size);
    for (int64_t i = 0; i < on->count; i++) {
        int ok = size[i] <= 1; /* a NaN is not: the step is taken again, shorter */
        double factor = 0.9 * pow(fmax(size[i], 1e-10), -1 / job->order);
        factor = isnan(size[i]) ? 0.2 : fmax(factor, 0.2);
        if (ok && job->ends && NAME(keep)(w, on, i, h[i])) return 1;
        accepted.lane[i] = -ok;
        on->h[i] = h[i] * fmin(factor, on->grow[i]);
        on->grow[i] = ok ? 10 : 1; /* no growth right after a rejected step */
        if (ok) on->t[i] += h[i];
        on->attempts[i]++, on->accepted[i] += ok, arrived[i] &= ok;
        if (!arrived[i]) stuck |= fabs(on->h[i]) < smallest || on->attempts[i] >= job->most;
    }
    for (int64_t n = 0; n < rows; n++) {
        ivec ok = (ivec)accepted.whole[n % VECTORS];
        w->state[n] = NAME(select)(ok, w->h[n], w->state[n]);
        w->rates[n] = NAME(select)(ok, w->rates[s * rows + n], w->rates[n]);
    }
    for (int64_t n = 0; n < q_rows; n++) {
        ivec ok = (ivec)accepted.whole[n % VECTORS];
        w->integrals[n] = NAME(select)(ok, q_new[n], w->integrals[n]);
        w->q_rates[n] = NAME(select)(ok, w->q_rates[s * q_rows + n], w->q_rates[n]);
    }
    if (stuck) __atomic_store_n(&job->shared->failed, 1, __ATOMIC_RELAXED);
    for (int64_t i = on->count - 1; i >= 0; i--)
        if (arrived[i]) {
            NAME(deliver)(w, on, i);
            if (!NAME(admit)(w, on, i)) NAME(close_up)(w, on, i);
        }
    return 0;
}

/* For threads.c: all samples that wait, whatever the range; threads that do the same share them out. */
int NAME(travel)(const struct job *job, long first, long last) {
    (void)first, (void)last;
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    struct lanes on = {.count = 0};
    while (on.count < LANES && NAME(admit)(&w, &on, on.count)) on.count++;
    int short_of_memory = 0;
    while (on.count && !short_of_memory && !__atomic_load_n(&job->shared->failed, __ATOMIC_RELAXED))
        short_of_memory = NAME(advance)(&w, &on);
    NAME(close)(&w);
    return short_of_memory;
}

/* The reverse of a block of the ranking: its lanes' steps from the last one back; those with most come first. */
static void NAME(return_block)(struct work *w, int64_t block, struct gradients *to) {
    const struct job *job = w->job;
    int64_t start = block * LANES, d = job->widths[0];
    int64_t count = job->batch - start < LANES ? job->batch - start : LANES;
    const struct step *at[LANES];
    double t[LANES] = {0}, h[LANES] = {0};
    memset(w->state, 0, (size_t)((w->rates - w->state) * VECTOR_BYTES));
    memset(w->context_bar, 0, (size_t)((w->stages - w->context_bar) * VECTOR_BYTES));
    memset(w->stages, 0, (size_t)(job->stages * d * ROW_BYTES));
    for (int64_t i = 0; i < count; i++) {
        int64_t sample = job->ranking[start + i];
        at[i] = job->ends[sample];
        NAME(put)(w->state, i, (const REAL *)job->z1_bar + sample * d, d);
        if (job->probes) NAME(put)(w->integrals, i, (const REAL *)job->q_bar + sample * INTEGRALS, INTEGRALS);
        NAME(put_held)(w, i, sample);
    }
    for (int64_t n = count;;) {
        while (n && !at[n - 1]) h[--n] = 0; /* of no length, it adds nothing to the gradients */
        if (!n) break;
        for (int64_t i = 0; i < n; i++) {
            t[i] = at[i]->t, h[i] = at[i]->h;
            NAME(put)(w->stages, i, (const REAL *)(at[i] + 1), job->stages * d);
            at[i] = at[i]->before;
        }
        NAME(hold)(w, n);
        NAME(step_back)(w, w->stages, t, h, 0, to);
    }
    for (int64_t i = 0; i < count; i++) NAME(take_bars)(w, i, job->ranking[start + i]);
}

/* For threads.c: the reverse of `travel`, whatever the range; threads that do the same share the parts out. */
int NAME(back)(const struct job *job, long first, long last) {
    (void)first, (void)last;
    int64_t blocks = (job->batch + LANES - 1) / LANES, part;
    struct work w;
    if (NAME(open)(&w, job)) return 1;
    while ((part = __atomic_fetch_add(&job->shared->next, 1, __ATOMIC_RELAXED)) < job->parts) {
        REAL *bars = job->bars[part];
        struct gradients to = {bars, bars + NAME(weights)(job), 0};
        for (int64_t block = part; block < blocks; block += job->parts) NAME(return_block)(&w, block, &to);
    }
    NAME(close)(&w);
    return 0;
}
