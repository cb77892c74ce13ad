/* Solves of the augmented system along a grid for a network of same-size 3x3 convolutions, and their reverse; float32.

   A group of a few samples goes through a whole solve, and a whole reverse, in one thread, which takes the next group when it is
   done: threads meet once a solve, and one whose core is busy takes fewer groups. The mathematics and its names are those of
   pyrnode/dynamics/layered.py and pyrnode/engines/backprop.py.

   winograd.h has the sums, passes.h what is done with each of them pixel by pixel, layers.h an evaluation of the network and its
   pullback; here are the steps. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define REAL float
#define INTEGER int32_t
#define SUFFIX f32
#define SINGLE 1
#include "activations.h"
#include "winograd.h"

#define INTEGRALS 4 /* l, E, n, 0 */
#define BORDERS 9   /* kinds of pixels by the border that they lie on: first, middle and last rows by columns */

enum kind { MANY, FROM_FEW, TO_FEW };

/* Arrays are of whole vectors of channels, but for an image's few ones. A layer's gradients follow each other from `bars` on in
   those of a part: of `forward`, of `backward` (of MANY), of bias, time and, where there is one, gate. */
struct layer {
    int64_t kind, inputs, outputs;
    float *forward, *backward;       /* weights of the layer and of its transpose: U in panels of LANES outputs, or the filters */
    const float *weight;             /* of MANY, (outputs, inputs, 3, 3) */
    float *weight_bar;               /* its gradient */
    const float *bias;               /* (outputs) */
    const float *time;               /* (BORDERS, outputs): by what time is multiplied in the shift */
    const float *gate;               /* (2, outputs): s = sigmoid(t gate[0] + gate[1]) scales the sum and the bias; or none */
    int64_t context;                 /* where a sample's context for the layer begins: of the shift and, with a gate, of that */
    int64_t bars;
};

/* Images are (batch, height, width, channels as the first layer has them); convnet.py has the same. */
struct job {
    int64_t batch, channels, height, width, layers, activation, stages, steps, probes;
    double weight;                    /* of a probe */
    const struct layer *layer;        /* (layers) */
    const double *a, *b, *times, *h;  /* tableau: (stages, stages), (stages); (steps, stages); (steps) */
    const float *z0, *eps, *context;  /* images; (probes) of them, or none for the unit vectors; (batch, contexts), or none */
    int64_t contexts;
    float *z1, *q;                    /* images, (batch, INTEGRALS) */
    float *record;                    /* states of all stages, (groups, steps, stages, images of the group); or none */
    float *tape;                      /* and what their evaluations leave (layers.h); or none */
    const float *z1_bar, *q_bar;
    float *z0_bar, *context_bar;
    float *bars;                      /* (parts, size): gradients of a part of the groups, however many threads */
    int64_t size, parts, group;       /* group: samples that go side by side */
    int64_t *next;                    /* the next group, or part, that no thread has taken */
};

static void add(float *to, const float *x, float weight, long count) {
    for (long n = 0; n < count; n++) to[n] += weight * x[n];
}

#include "filters.h"

#include "passes.h"

#include "sums.h"

#include "layers.h"

/* Where the states of a stage of the group's are kept. */
static float *stage_at(const struct work *w, int64_t at) {
    return w->job->record + (w->start * w->job->stages * w->job->steps + at * w->samples) * w->state;
}

/* Takes a group; 0 where there is none left. */
static int64_t take(const struct job *job) { return __atomic_fetch_add(job->next, 1, __ATOMIC_RELAXED); }

static void solve(struct work *w) {
    const struct job *job = w->job;
    long count = w->samples * w->state;
    float *y = job->z1 + w->start * w->state, *q = job->q + w->start * INTEGRALS;
    memcpy(y, job->z0 + w->start * w->state, sizeof(float) * count);
    if (job->probes) memset(q, 0, sizeof(float) * w->samples * INTEGRALS);
    for (int64_t step = 0; step < job->steps; step++) {
        double h = job->h[step];
        for (int64_t i = 0; i < job->stages; i++) {
            int64_t at = step * job->stages + i;
            if (!w->counted[i]) continue;
            float *z = job->record ? stage_at(w, at) : w->stage;
            memcpy(z, y, sizeof(float) * count);
            for (int64_t j = 0; j < i; j++) {
                float weight = (float)(h * job->a[i * job->stages + j]);
                if (weight) add(z, w->rates + j * w->rate, weight, count);
            }
            int probed = job->probes && job->b[i];
            arrange(w, at, z);
            enter(w, (float)job->times[at]);
            evaluate(w, probed || job->tape);
            memcpy(w->rates + i * w->rate, w->at[job->layers].h, sizeof(float) * count);
            for (int64_t k = 0; probed && k < job->probes; k++) {
                multiply(w, k);
                add_integrals(w, q, (float)(h * job->b[i]), k);
            }
        }
        for (int64_t i = 0; i < job->stages; i++)
            if (job->b[i]) add(y, w->rates + i * w->rate, (float)(h * job->b[i]), count);
    }
}

/* For threads.c: any of the groups, until all are taken; 0, or 1 where memory is short. */
int forward(const struct job *job, long first, long last) {
    struct work w;
    (void)first, (void)last;
    if (open_work(&w, job)) return 1;
    for (int64_t group; (group = take(job)) * job->group < job->batch;) {
        hold(&w, group);
        solve(&w);
    }
    close_work(&w);
    return 0;
}

/* The cotangent of the stage's rate into that of f: h (b z_bar + sum of a bars) + 2 h b E_bar f. */
static void rate_bar(const struct work *w, int64_t stage, double h, const float *z_bar, const float *q_bar) {
    const struct job *job = w->job;
    long count = w->samples * w->state;
    float *bar = w->at[job->layers].bar;
    const float *f = w->at[job->layers].h;
    memset(bar, 0, sizeof(float) * count);
    if (job->b[stage]) add(bar, z_bar, (float)(h * job->b[stage]), count);
    for (int64_t j = stage + 1; j < job->stages; j++) {
        float weight = (float)(h * job->a[j * job->stages + stage]);
        if (weight && w->counted[j]) add(bar, w->rates + j * w->rate, weight, count);
    }
    for (long s = 0; job->probes && job->b[stage] && s < w->samples; s++)
        add(bar + s * w->state, f + s * w->state, (float)(2 * h * job->b[stage]) * q_bar[s * INTEGRALS + 1], w->state);
}

/* The cotangent of the product, weight (l_bar eps + 2 n_bar w), for a probe in use. */
static void product_bar(const struct work *w, float weight, const float *q_bar) {
    const float *eps = w->at[w->job->layers].g, *product = w->at[0].g;
    float *bar = w->at[0].p;
    for (long s = 0; s < w->samples; s++) {
        float l = weight * q_bar[s * INTEGRALS], n = 2 * weight * q_bar[s * INTEGRALS + 2];
        for (long i = s * w->state; i < (s + 1) * w->state; i++) bar[i] = l * eps[i] + n * product[i];
    }
}

static void reverse(struct work *w, float *bars) {
    const struct job *job = w->job;
    long count = w->samples * w->state;
    float *z_bar = job->z0_bar + w->start * w->state;
    const float *q_bar = job->q_bar + w->start * INTEGRALS;
    memcpy(z_bar, job->z1_bar + w->start * w->state, sizeof(float) * count);
    for (int64_t step = job->steps - 1; step >= 0; step--) {
        double h = job->h[step];
        for (int64_t i = job->stages - 1; i >= 0; i--) {
            int64_t at = step * job->stages + i;
            if (!w->counted[i]) continue;
            int probed = job->probes && job->b[i];
            arrange(w, at, stage_at(w, at));
            enter(w, (float)job->times[at]);
            if (!job->tape) evaluate(w, 1);
            for (int64_t k = 0; probed && k < job->probes; k++) {
                if (job->tape)
                    probe(w, k);
                else
                    multiply(w, k);
                product_bar(w, (float)(h * job->b[i] * job->weight), q_bar);
                pull_product(w, bars, k == 0);
            }
            rate_bar(w, i, h, z_bar, q_bar);
            pull_state(w, bars, probed);
            pull_entries(w, bars, (float)job->times[at]);
            memcpy(w->rates + i * w->rate, w->at[0].bar, sizeof(float) * count);
        }
        for (int64_t i = job->stages - 1; i >= 0; i--)
            if (w->counted[i]) add(z_bar, w->rates + i * w->rate, 1, count);
    }
}

/* For threads.c: any of the parts, until all are taken. */
int backward(const struct job *job, long first, long last) {
    int64_t groups = (job->batch + job->group - 1) / job->group;
    struct work w;
    (void)first, (void)last;
    if (open_work(&w, job)) return 1;
    for (int64_t part; (part = take(job)) < job->parts;) {
        float *bars = job->bars + part * job->size;
        memset(bars, 0, sizeof(float) * job->size);
        for (int64_t group = groups * part / job->parts; group < groups * (part + 1) / job->parts; group++) {
            hold(&w, group);
            reverse(&w, bars);
        }
    }
    close_work(&w);
    return 0;
}

int lanes(void) { return LANES; }

/* Numbers on the tape of one evaluation of a group. */
long tape(const struct job *job) {
    struct work w;
    if (open_work(&w, job)) return -1;
    long count = tape_of(&w);
    close_work(&w);
    return count;
}
