/* Solves of the augmented system for a multilayer perceptron, and their reverse: along a grid, and with steps that every
   sample chooses for itself.

   A block of LANES samples goes through a solve side by side: its states, activations and cotangents stay in the cache,
   features by rows, samples along the vectors. The mathematics and its names are those of pyrnode/dynamics/layered.py
   and pyrnode/engines/backprop.py; the reverse evaluates every stage again.

   The headers are compiled for float and for double: network.h evaluates and pulls back, fixed.h and adaptive.h step. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

#define INTEGRALS 4                       /* l, E, n, 0 */

/* Pointers are to arrays in C order, of floats or doubles; sum = sum of widths[1...]. */
struct job {
    int64_t batch, layers, activation, stages, probes;
    double weight;          /* of a probe */
    const int64_t *widths;  /* layers + 1 */
    const double *a, *b, *c; /* tableau: (stages, stages), (stages), (stages) */
    const void *const *w;   /* weights (out, in) by layer */
    const void *const *wt;  /* and transposed */
    const void *z0;         /* (batch, d) */
    const void *eps;        /* (probes, batch, d); none for the unit vectors */
    const void *context;    /* (batch, sum), what it adds to the shifts; or none */
    void *z1;               /* (batch, d) */
    void *q;                /* (batch, 4): l, E, n, 0 */
    const void *z1_bar;     /* (batch, d) */
    const void *q_bar;      /* (batch, 4) */
    void *z0_bar;           /* (batch, d) */
    void *context_bar;      /* (batch, sum), where there is a context */
    void *const *bars;      /* (parts): gradients of a part of the blocks, however many threads: weights, then entries */
    int64_t parts;
    /* Along a grid, T = steps * stages: */
    int64_t steps;
    const double *h;        /* lengths of the steps */
    const void *shift;      /* (T, sum) */
    const void *scale;      /* (T, sum), or none */
    void *record;           /* states of all stages, (blocks, T, d, LANES); or none */
    /* Adaptive: */
    int64_t terms;          /* of the entries: 1, 2 or 4 */
    const void *entries;    /* (terms, sum): how time enters, bias, time's weight in the shift, and in the gate, its bias */
    const double *e, *e3;   /* weights of the error estimates, (stages + 1); the second one, or none */
    double t0, t1, rtol, atol, order;
    int64_t controlled, most; /* integrals in the norm of the error; attempts of a sample */
    double *first;          /* (batch): the first step's length */
    void *rate, *q_rate;    /* (batch, d), (batch, 4): at the start */
    int64_t *counts;        /* (batch, 2): attempts, accepted steps */
    struct step **ends;     /* (batch): the last step of each; or none, where none is kept */
    const int64_t *ranking; /* (batch): samples by falling number of accepted steps */
    struct shared *shared;
};

/* What threads write to. */
struct shared {
    int64_t next;   /* sample, or part */
    int64_t failed; /* a sample is stuck */
    struct chunk *chunks;
};

/* An accepted step of a sample; the states of its stages, (stages, d), follow. */
struct step {
    struct step *before;
    double t, h;
};

/* Memory of accepted steps, and where the next one goes. */
struct chunk {
    struct chunk *next;
};

struct arena {
    char *next, *end;
};

#define CHUNK_BYTES 65536

static struct step *append(struct arena *arena, struct shared *shared, size_t bytes) {
    bytes = (bytes + 15) / 16 * 16;
    if ((size_t)(arena->end - arena->next) < bytes) {
        size_t size = bytes > CHUNK_BYTES ? bytes : CHUNK_BYTES;
        char *memory = malloc(16 + size);
        if (!memory) return NULL;
        struct chunk *chunk = (struct chunk *)memory;
        chunk->next = __atomic_exchange_n(&shared->chunks, chunk, __ATOMIC_ACQ_REL);
        arena->next = memory + 16, arena->end = arena->next + size;
    }
    struct step *step = (struct step *)arena->next;
    arena->next += bytes;
    return step;
}

/* Frees the steps of a solve. */
void discard(struct chunk *chunk) {
    while (chunk) {
        struct chunk *next = chunk->next;
        free(chunk);
        chunk = next;
    }
}

#define REAL float
#define INTEGER int32_t
#define SUFFIX f32
#define SINGLE 1
#include "blocks.h"
#include "network.h"
#include "fixed.h"
#include "adaptive.h"
#undef REAL
#undef INTEGER
#undef SUFFIX
#undef SINGLE
#define REAL double
#define INTEGER int64_t
#define SUFFIX f64
#define SINGLE 0
#include "blocks.h"
#include "network.h"
#include "fixed.h"
#include "adaptive.h"
