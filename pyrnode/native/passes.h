/* What is done with a layer's sums, pixel by pixel, while they are in the cache: shift, scale and activation in an evaluation, slopes
   in the product, and their transposes. Included by convnet.c. */

/* A layer's output, or the state (of which h, g, p and bar alone are in use), for the images of a group. */
struct cells {
    long channels;
    float *h, *slope;
    float *curvature, *r; /* of activations whose second derivative is not the slope times something */
    float *y;             /* the sum before it is scaled; with gates alone */
    float *g, *scaled;    /* of the product: the probe's, and times the scale, which without a gate is the same array */
    float *p, *bar;
    float *shift, *scale, *sums, *scale_bar; /* by sample: (BORDERS, channels), but for the scale's (channels); scales with gates alone */
};

struct work {
    const struct job *job;
    struct cells *at; /* (layers + 1) */
    long pixels, state; /* of an image; numbers in one */
    long start, samples; /* of the group at hand */
    unsigned char *border; /* (pixels) */
    int *counted; /* (stages) */
    float *stage, *rates, *unit, *probed;
    long rate, kept; /* from one stage's rates to the next; what an evaluation leaves before its probes */
    float *v, *m, *tile, *zeros;
    long widest; /* numbers in `zeros` */
    float *scratch, *memory;
};

INLINE int bends(const struct job *job) { return job->activation == SILU || job->activation == GELU; }

/* The function that a sum ends in: for `count` pixels of a sample from `pixel` on, given their sums y. */
typedef void Finish(const struct work *w, long j, long sample, const float *y, long pixel, long count);

#define EACH_PIXEL \
    const struct cells *c = w->at + j; \
    long n = c->channels, at = (sample * w->pixels + pixel) * n; \
    for (long i = 0; i < count; i++, at += n, y += n)
#define EACH_VECTOR for (long k = 0; k < n; k += LANES)

/* A hidden layer's value and, where they are asked for, slope and curvature. */
INLINE void evaluated(int activation, int sloped, const struct work *w, long j, long sample, const float *y, long pixel,
                      long count) {
    EACH_PIXEL {
        const float *shift = c->shift + (sample * BORDERS + w->border[pixel + i]) * n;
        EACH_VECTOR {
            vf a = CV(y + k);
            if (c->scale) {
                V(c->y + at + k) = a;
                a *= CV(c->scale + sample * n + k);
            }
            a += CV(shift + k);
            vec value, slope, curvature;
            NAME(activate)(activation, (vec)a, &value, &slope, &curvature);
            V(c->h + at + k) = (vf)value;
            if (!sloped) continue;
            V(c->slope + at + k) = (vf)slope;
            if (activation == SILU || activation == GELU) V(c->curvature + at + k) = (vf)curvature;
        }
    }
}

/* The transposed product: the product's share in the hidden layer's cotangent (the first one, or one more), and p. */
INLINE void transposed(int activation, int first, const struct work *w, long j, long sample, const float *y, long pixel,
                       long count) {
    EACH_PIXEL EACH_VECTOR {
        vf bar = CV(y + k), g = CV(c->g + at + k), bend = g, h;
        if (c->scale) {
            V(c->scale_bar + sample * n + k) += bar * g;
            bar *= CV(c->scale + sample * n + k);
        }
        vf slope = CV(c->slope + at + k), zero = {0};
        switch (activation) {
        case SOFTPLUS: bend = g * (1 - slope); break;
        case TANH: bend = -2 * CV(c->h + at + k) * g; break;
        case ELU: h = CV(c->h + at + k), bend = choose(h < 0, g, zero); break;
        default: bend = CV(c->curvature + at + k) * CV(c->r + at + k);
        }
        bend *= bar;
        if (!first) bend += CV(c->bar + at + k);
        V(c->bar + at + k) = bend;
        V(c->p + at + k) = slope * bar;
    }
}

#define INSTANCES(name, activation) \
    static void name##_##activation##_0(const struct work *w, long j, long sample, const float *y, long pixel, long count) { \
        name(activation, 0, w, j, sample, y, pixel, count); \
    } \
    static void name##_##activation##_1(const struct work *w, long j, long sample, const float *y, long pixel, long count) { \
        name(activation, 1, w, j, sample, y, pixel, count); \
    }
#define FAMILY(name) \
    INSTANCES(name, SOFTPLUS) INSTANCES(name, TANH) INSTANCES(name, SILU) INSTANCES(name, GELU) INSTANCES(name, ELU) \
    static Finish *const name##_by[5][2] = {{name##_SOFTPLUS_0, name##_SOFTPLUS_1}, {name##_TANH_0, name##_TANH_1}, \
                                            {name##_SILU_0, name##_SILU_1}, {name##_GELU_0, name##_GELU_1}, \
                                            {name##_ELU_0, name##_ELU_1}};
FAMILY(evaluated)
FAMILY(transposed)
#undef FAMILY
#undef INSTANCES

/* The last layer's output, f. */
static void rated(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL {
        const float *shift = c->shift + (sample * BORDERS + w->border[pixel + i]) * n;
        for (long k = 0; k < n; k++) {
            if (c->scale) c->y[at + k] = y[k];
            c->h[at + k] = (c->scale ? y[k] * c->scale[sample * n + k] : y[k]) + shift[k];
        }
    }
}

/* The product at a hidden layer: r, and g. */
static void multiplied(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL EACH_VECTOR {
        vf r = CV(y + k), g = r * CV(c->slope + at + k);
        if (c->r) V(c->r + at + k) = r;
        V(c->g + at + k) = g;
        if (c->scale) V(c->scaled + at + k) = g * CV(c->scale + sample * n + k);
    }
}

/* A hidden layer's cotangent, scaled as the next sum takes it; what shift and scale get of it is gathered. Where nothing was probed
   the product has no share. */
INLINE void pulled(int probed, const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL {
        float *sums = c->sums + (sample * BORDERS + w->border[pixel + i]) * n;
        EACH_VECTOR {
            vf bar = CV(y + k) * CV(c->slope + at + k);
            if (probed) bar += CV(c->bar + at + k);
            V(sums + k) += bar;
            if (c->scale) {
                V(c->scale_bar + sample * n + k) += bar * CV(c->y + at + k);
                bar *= CV(c->scale + sample * n + k);
            }
            V(c->bar + at + k) = bar;
        }
    }
}

static void pulled_alone(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    pulled(0, w, j, sample, y, pixel, count);
}

static void pulled_after(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    pulled(1, w, j, sample, y, pixel, count);
}

/* What the last layer's scale gets of the transposed product. */
static void scaled_last(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL for (long k = 0; k < n; k++) c->scale_bar[sample * n + k] += y[k] * c->g[at + k];
}

/* The product itself, and the cotangent of the state. */
static void multiplied_state(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL for (long k = 0; k < n; k++) c->g[at + k] = y[k];
}

static void pulled_state(const struct work *w, long j, long sample, const float *y, long pixel, long count) {
    EACH_PIXEL for (long k = 0; k < n; k++) c->bar[at + k] = y[k];
}
