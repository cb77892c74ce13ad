/* An evaluation of the network for a group's images, the vector-Jacobian product, and their pullback; and the memory for them.
   Included by convnet.c. */

/* Memory ---------------------------------------------------------------------------------------------------------------- */

struct arena {
    float *memory;
    long used;
};

/* So many numbers, from the beginning of a cache line; as long as there is no memory they are only counted. */
static float *claim(struct arena *arena, long count) {
    float *found = arena->memory ? arena->memory + arena->used : NULL;
    arena->used += (count + 15) / 16 * 16;
    return found;
}

/* What an evaluation leaves of the state f and of the hidden layers; after it come the probes'. */
static long claim_evaluation(struct work *w, struct arena *arena) {
    const struct job *job = w->job;
    for (int64_t i = 1; i <= job->layers; i++) {
        struct cells *c = w->at + i;
        long count = w->samples * w->pixels * c->channels;
        c->h = claim(arena, count);
        if (job->layer[i - 1].gate) c->y = claim(arena, count);
        if (i == job->layers) break;
        c->slope = claim(arena, count);
        if (bends(job)) c->curvature = claim(arena, count);
    }
    return arena->used;
}

/* What a product leaves. */
static long claim_product(struct work *w, struct arena *arena) {
    const struct job *job = w->job;
    for (int64_t i = 0; i < job->layers; i++) {
        struct cells *c = w->at + i;
        long count = w->samples * w->pixels * c->channels;
        c->g = claim(arena, count);
        if (!i) continue;
        if (bends(job)) c->r = claim(arena, count);
        c->scaled = job->layer[i - 1].gate ? claim(arena, count) : c->g;
    }
    return arena->used;
}

/* Numbers of the tape that an evaluation of a whole group takes. */
static long tape_of(struct work *w) {
    struct arena none = {NULL, 0};
    long evaluation = claim_evaluation(w, &none);
    none.used = 0;
    return evaluation + w->job->probes * claim_product(w, &none);
}

static void claim_buffers(struct work *w, struct arena *arena) {
    const struct job *job = w->job;
    long v = 0, m = 0, widest = 0, group = job->group;
    for (int64_t i = 0; i < job->layers; i++) {
        const struct layer *layer = job->layer + i;
        long few = least(layer->inputs, layer->outputs), many = layer->inputs + layer->outputs - few;
        long strip = strip_of(layer->inputs, layer->outputs), columns = (9 * few + LANES - 1) / LANES * LANES;
        long tiles = SIDE * SIDE * (strip * many + PAD), sums = w->pixels * columns;
        if (sums < STRIP * many) sums = STRIP * many;
        long needed = layer->kind == MANY ? tiles : sums, patched = layer->kind == MANY ? tiles : STRIP * 9 * few;
        if (needed > m) m = needed;
        if (patched > v) v = patched;
        if (many > widest) widest = many;
        if (columns > widest) widest = columns;
    }
    w->widest = widest;
    w->v = claim(arena, v), w->m = claim(arena, m);
    w->tile = claim(arena, OUT * OUT * widest), w->zeros = claim(arena, widest);
    float *alternate[2] = {claim(arena, group * w->pixels * widest), claim(arena, group * w->pixels * widest)};
    for (int64_t i = 0; i <= job->layers; i++) {
        struct cells *c = w->at + i;
        long n = c->channels, count = group * w->pixels * n;
        c->p = i && i < job->layers ? alternate[i % 2] : claim(arena, count);
        c->bar = claim(arena, count);
        if (!i) continue;
        c->shift = claim(arena, group * BORDERS * n), c->sums = claim(arena, group * BORDERS * n);
        if (!job->layer[i - 1].gate) continue;
        c->scale = claim(arena, group * n), c->scale_bar = claim(arena, group * n);
        if (i == job->layers) c->scaled = claim(arena, count);
    }
    w->rate = group * w->state;
    w->stage = claim(arena, w->rate), w->unit = claim(arena, w->rate), w->rates = claim(arena, job->stages * w->rate);
    w->scratch = arena->memory ? arena->memory + arena->used : NULL;
    claim_evaluation(w, arena), claim_product(w, arena);
}

static void close_work(struct work *w) { free(w->at), free(w->counted), free(w->border), free(w->memory); }

/* 0, or 1 where memory is short; then there is nothing to close. */
static int open_work(struct work *w, const struct job *job) {
    struct arena arena = {NULL, 0};
    memset(w, 0, sizeof(*w));
    w->job = job, w->pixels = job->height * job->width, w->samples = job->group;
    w->state = w->pixels * job->layer[0].inputs;
    w->at = calloc(job->layers + 1, sizeof(*w->at)), w->border = malloc(w->pixels), w->counted = calloc(job->stages, sizeof(int));
    if (w->at && w->border && w->counted) {
        for (int64_t i = 0; i <= job->layers; i++)
            w->at[i].channels = i ? job->layer[i - 1].outputs : job->layer[0].inputs;
        claim_buffers(w, &arena);
        w->memory = arena.memory = room(arena.used);
    }
    if (!w->memory) {
        close_work(w);
        return 1;
    }
    arena.used = 0;
    claim_buffers(w, &arena);
    memset(w->zeros, 0, sizeof(float) * w->widest);
    for (long p = 0; p < w->pixels; p++) {
        long row = p / job->width, column = p % job->width;
        w->border[p] = 3 * (!row ? 0 : row + 1 == job->height ? 2 : 1) + (!column ? 0 : column + 1 == job->width ? 2 : 1);
    }
    for (int64_t i = job->stages - 1; i >= 0; i--) { /* what weighs nothing, and no later stage starts from, is passed over */
        w->counted[i] = job->b[i] != 0;
        for (int64_t j = i + 1; j < job->stages; j++) w->counted[i] |= w->counted[j] && job->a[j * job->stages + i] != 0;
    }
    return 0;
}

/* Takes a group. */
static void hold(struct work *w, int64_t group) {
    const struct job *job = w->job;
    w->start = group * job->group, w->samples = least(job->group, job->batch - w->start);
}

/* Where the evaluation of a stage, from the state z, leaves what the pullback needs. */
static void arrange(struct work *w, int64_t at, float *z) {
    const struct job *job = w->job;
    struct arena arena = {w->scratch, 0};
    if (job->tape) {
        long samples = w->samples;
        w->samples = job->group; /* all groups have as much room */
        arena.memory = job->tape + (w->start / job->group * job->steps * job->stages + at) * tape_of(w);
        w->samples = samples;
    }
    w->at[0].h = z;
    w->kept = claim_evaluation(w, &arena);
    w->probed = arena.memory + w->kept;
}

/* Takes a probe into use. */
static void probe(struct work *w, int64_t k) {
    const struct job *job = w->job;
    struct arena arena = {w->probed, 0};
    struct cells *last = w->at + job->layers;
    long each = claim_product(w, &arena), count = w->samples * w->state;
    if (job->tape) {
        arena.memory += k * each, arena.used = 0;
        claim_product(w, &arena);
    }
    if (job->eps) {
        last->g = (float *)job->eps + (k * job->batch + w->start) * w->state;
    } else {
        last->g = w->unit;
        memset(w->unit, 0, sizeof(float) * count);
        for (long s = 0; s < w->samples; s++)
            w->unit[s * w->state + k / job->channels * last->channels + k % job->channels] = 1;
    }
    if (!last->scale) {
        last->scaled = last->g;
        return;
    }
    for (long i = 0; i < count; i++)
        last->scaled[i] = last->g[i] * last->scale[i / w->state * last->channels + i % last->channels];
}

/* Time and context ---------------------------------------------------------------------------------------------------------- */

static const float *context_of(const struct work *w, const struct layer *layer, long sample) {
    const struct job *job = w->job;
    return job->context ? job->context + (w->start + sample) * job->contexts + layer->context : w->zeros;
}

static float sigmoid(float a) { return a > 0 ? 1 / (1 + expf(-a)) : expf(a) / (1 + expf(a)); }

/* Shifts and scales at a time; nothing has gathered of their cotangents yet. */
static void enter(const struct work *w, float t) {
    const struct job *job = w->job;
    for (int64_t i = 0; i < job->layers; i++) {
        const struct layer *layer = job->layer + i;
        struct cells *c = w->at + i + 1;
        long n = c->channels;
        memset(c->sums, 0, sizeof(float) * w->samples * BORDERS * n);
        if (c->scale) memset(c->scale_bar, 0, sizeof(float) * w->samples * n);
        for (long s = 0; s < w->samples; s++) {
            const float *given = context_of(w, layer, s);
            float *shift = c->shift + s * BORDERS * n, *scale = c->scale ? c->scale + s * n : NULL;
            const float *gated = job->context ? given + n : given;
            for (long k = 0; scale && k < n; k++) scale[k] = sigmoid(t * layer->gate[k] + layer->gate[n + k] + gated[k]);
            for (long b = 0; b < BORDERS; b++)
                for (long k = 0; k < n; k++)
                    shift[b * n + k] = (scale ? layer->bias[k] * scale[k] : layer->bias[k]) + t * layer->time[b * n + k] + given[k];
        }
    }
}

/* Adds what bias, time, gate and context get of the cotangents that were gathered at that time. */
static void pull_entries(const struct work *w, float *bars, float t) {
    const struct job *job = w->job;
    for (int64_t i = 0; i < job->layers; i++) {
        const struct layer *layer = job->layer + i;
        const struct cells *c = w->at + i + 1;
        long n = c->channels;
        float *bias = bars + layer->bars + weights(layer) * (layer->kind == MANY ? 2 : 1), *time = bias + n, *gate = time + BORDERS * n;
        for (long s = 0; s < w->samples; s++) {
            const float *sums = c->sums + s * BORDERS * n, *scale = c->scale ? c->scale + s * n : NULL;
            float *context = job->context ? job->context_bar + (w->start + s) * job->contexts + layer->context : NULL;
            for (long k = 0; k < n; k++) {
                float total = 0;
                for (long b = 0; b < BORDERS; b++) {
                    total += sums[b * n + k];
                    time[b * n + k] += t * sums[b * n + k];
                }
                bias[k] += scale ? total * scale[k] : total;
                if (context) context[k] += total;
                if (!scale) continue;
                float bar = (c->scale_bar[s * n + k] + layer->bias[k] * total) * scale[k] * (1 - scale[k]);
                gate[k] += t * bar, gate[n + k] += bar;
                if (context) context[n + k] += bar;
            }
        }
    }
}

/* An evaluation and its pullback --------------------------------------------------------------------------------------------- */

/* f at the state at hand, with the slopes that a product needs where it is `sloped`. */
static void evaluate(const struct work *w, int sloped) {
    const struct job *job = w->job;
    for (int64_t i = 0; i < job->layers; i++)
        apply(w, i, w->at[i].h, NULL, NULL, i + 1 < job->layers ? evaluated_by[job->activation][sloped] : rated);
}

/* w = eps' df/dz for a probe. */
static void multiply(struct work *w, int64_t k) {
    probe(w, k);
    for (int64_t i = w->job->layers - 1; i >= 0; i--)
        apply_transposed(w, i, w->at[i + 1].scaled, NULL, NULL, i ? multiplied : multiplied_state);
}

static float dot(const float *x, const float *y, long count) {
    vf sums = {0};
    float total = 0;
    long i = 0;
    for (; i + LANES <= count; i += LANES) sums += CV(x + i) * CV(y + i);
    for (; i < count; i++) total += x[i] * y[i];
    for (int l = 0; l < LANES; l++) total += sums[l];
    return total;
}

/* Adds weight (l', E', n') to q; E' once, with the first probe. */
static void add_integrals(const struct work *w, float *q, float weight, int64_t k) {
    const struct job *job = w->job;
    const float *f = w->at[job->layers].h, *eps = w->at[job->layers].g, *product = w->at[0].g;
    float each = weight * (float)job->weight;
    for (long s = 0; s < w->samples; s++, q += INTEGRALS) {
        long from = s * w->state;
        q[0] += each * dot(eps + from, product + from, w->state);
        q[2] += each * dot(product + from, product + from, w->state);
        if (!k) q[1] += weight * dot(f + from, f + from, w->state);
    }
}

/* The transpose of the product, for the probe in use, the first one or another. */
static void pull_product(const struct work *w, float *bars, int first) {
    const struct job *job = w->job;
    for (int64_t i = 0; i < job->layers; i++) {
        const struct cells *to = w->at + i + 1;
        Finish *finish = transposed_by[job->activation][first];
        if (i + 1 == job->layers) finish = to->scale ? scaled_last : NULL; /* the probe is held constant */
        apply(w, i, w->at[i].p, to->scaled, bars, finish);
    }
}

/* The cotangent of the state, given that of f in the last cells; `probed`: after the transpose of a product. */
static void pull_state(const struct work *w, float *bars, int probed) {
    const struct job *job = w->job;
    const struct cells *c = w->at + job->layers;
    long n = c->channels;
    for (long s = 0; s < w->samples; s++)
        for (long p = 0; p < w->pixels; p++)
            for (long k = 0; k < n; k++) {
                long at = (s * w->pixels + p) * n + k;
                c->sums[(s * BORDERS + w->border[p]) * n + k] += c->bar[at];
                if (!c->scale) continue;
                c->scale_bar[s * n + k] += c->bar[at] * c->y[at];
                c->bar[at] *= c->scale[s * n + k];
            }
    for (int64_t i = job->layers - 1; i >= 0; i--)
        apply_transposed(w, i, w->at[i + 1].bar, w->at[i].h, bars, !i ? pulled_state : probed ? pulled_after : pulled_alone);
}
