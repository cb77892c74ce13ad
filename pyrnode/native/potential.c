/* Solves of the augmented system along a grid for dynamics that are the gradient of a potential, and their reverse.

   As in mlp.c a block of LANES samples goes through a solve side by side. The mathematics and its names are those of
   pyrnode/dynamics/scalar.py and pyrnode/dynamics/bound_potential.py: trace and norm of the Jacobian are exact, and the
   reverse evaluates every stage again.

   The headers are compiled for float and for double: curved.h evaluates, pulled.h pulls back and has the solves. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "vectors.h"

enum curve { LOGCOSH, CURVED_SOFTPLUS, CURVED_TANH };

/* Pointers are to arrays in C order, of floats or doubles; the width is the same for all layers. */
struct job {
    int64_t batch, d, inputs, width, layers, rank, curve, stages, steps;
    int64_t integrals;       /* columns of q: 0, or l, E, n, 0, or these and H */
    int64_t normed;          /* the norm has a cotangent */
    const double *a, *b;     /* tableau: (stages, stages), (stages) */
    const double *h, *times; /* lengths of the steps; times of the stages (steps * stages) */
    const void *const *w;    /* weights by layer: (width, inputs), then (width, width) */
    const void *const *wt;   /* and transposed */
    const void *const *bias; /* (width) by layer */
    const void *last;        /* w (width) */
    const void *A, *At;      /* (rank, inputs), and transposed */
    const void *linear;      /* b (inputs) */
    const void *columns;     /* W_0 in z, transposed: (d, width) */
    const void *pairs;       /* products of two of its columns p <= q: (d (d + 1) / 2, width) */
    const void *gram;        /* AᵀA in z: of the same pairs */
    const void *context;     /* (batch, width + inputs), or none */
    const void *z0;          /* (batch, d) */
    void *z1, *q;            /* (batch, d), (batch, integrals) */
    void *record;            /* states of all stages, (blocks, steps * stages, d, LANES); or none */
    const void *z1_bar, *q_bar;
    void *z0_bar, *context_bar;
    void *const *bars;       /* (parts): gradients of a part of the blocks; `struct gradients` says of what */
    int64_t parts;
};

#define REAL float
#define INTEGER int32_t
#define SUFFIX f32
#define SINGLE 1
#include "blocks.h"
#include "curved.h"
#include "pulled.h"
#undef REAL
#undef INTEGER
#undef SUFFIX
#undef SINGLE
#define REAL double
#define INTEGER int64_t
#define SUFFIX f64
#define SINGLE 0
#include "blocks.h"
#include "curved.h"
#include "pulled.h"
