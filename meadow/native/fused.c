/* Mini-batch SGD of a small network: the whole local training of a client in one function.

   A network is a list of layers, a list of heads, and one flat vector of parameters (client/trainers/fused.py makes them from
   a model). A batch of n samples passes all layers forward and backward; each weight is updated in the pass that computes its
   gradient. Layouts of activations, n samples of c x h x w:

     flat    [sample][features], rows padded with zeros to `stride` floats, a multiple of 16
     image   [c][h][w][sample]: the samples of a pixel are neighbours, so a row of an image is one long vector, which a
             convolution shifts by n floats per pixel; narrow images waste nothing

   Rows of linear weights are also padded with zeros to a multiple of 16; the padding stays zero.

   Only one thread may use a Net at a time. meadow/native/fused.py declares Layer, Head and Plan again; fused_sizes lets it
   compare the sizes. Needs GCC 12 or Clang (__builtin_shufflevector). */

#if !defined(__has_builtin)
#error "needs GCC 12 or Clang"
#elif !__has_builtin(__builtin_shufflevector)
#error "needs GCC 12 or Clang"
#endif

#include <float.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))
/* A function with many tiles, which the compiler must not clone for constant arguments. */
#if defined(__clang__)
#define LARGE static __attribute__((noinline))
#else
#define LARGE static __attribute__((noinline, noclone))
#endif
#define ROUND(x) (((x) + LANES - 1) / LANES * LANES)

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));

enum { LINEAR, CONV, POOL, NORM, BOUNDED, FLATTEN };
enum { NONE, RELU, TANH };
enum { CLASS, VALUE };

typedef struct {
    int64_t kind, act;
    int64_t c, h, w;          /* of the input; flat: c features, h = w = 1 */
    int64_t oc, oh, ow;       /* of the output */
    int64_t kh, kw, ph, pw;   /* kernel and padding of CONV; window of POOL */
    int64_t groups;           /* of NORM */
    int64_t weight, bias;     /* offsets in the parameters; -1: none */
    double rate_w, rate_b;    /* 0: it does not learn */
    double eps, scale;        /* of NORM and BOUNDED */
} Layer;

typedef struct {
    int64_t kind, size, features, weight, bias;
    double rate_w, rate_b, importance, offset, spread;
} Head;

typedef struct {
    int64_t layers, heads, parameters, batch, flat_input;
    double momentum, weight_decay;
    int64_t nesterov;
} Plan;

typedef struct {
    float *out, *grad, *padded, *dpadded, *flipped, *dw, *mean, *rstd;
    int32_t *arg;
    int64_t in_row, out_row, n; /* floats per row of the padded buffers, and their batch size */
} Work;

typedef struct {
    Plan plan;
    Layer *layer;
    Head *head;
    Work *work;
    float *input, *features_grad, *logits, *moment;
} Net;

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec spread(float x) { return (vec){0} + x; }

INLINE float sum(vec v) {
    typedef float v8 __attribute__((vector_size(32)));
    typedef float v4 __attribute__((vector_size(16)));
    v8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    v4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
    return (b[0] + b[1]) + (b[2] + b[3]);
}

/* Interleave halves and add: merges two vectors of partial sums. */
INLINE vec fold(vec a, vec b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
           __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
}

/* The sums of 16 vectors, in order. */
INLINE vec sums(const vec *v) {
    vec a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) a[i] = fold(v[2 * i], v[2 * i + 1]);
    for (int i = 0; i < 4; i++) b[i] = fold(a[2 * i], a[2 * i + 1]);
    for (int i = 0; i < 2; i++) c[i] = fold(b[2 * i], b[2 * i + 1]);
    vec d = fold(c[0], c[1]);
    return __builtin_shufflevector(d, d, 0, 8, 4, 12, 2, 10, 6, 14, 1, 9, 5, 13, 3, 11, 7, 15);
}

/* --- the step of SGD ------------------------------------------------------------------------------------------------ */

typedef struct { float rate, momentum, decay; int nesterov; } Step;

/* A client's first step reads the common start (`from`) and writes its own parameters (`w`); later both are the same. */
INLINE void step_vec(const float *from, float *w, float *m, vec g, Step s) {
    vec now = load(from);
    if (s.decay != 0) g += s.decay * now;
    if (s.momentum != 0) {
        vec b = s.momentum * load(m) + g;
        store(m, b);
        if (s.nesterov) g += s.momentum * b;
        else g = b;
    }
    store(w, now - s.rate * g);
}

INLINE void step_one(const float *from, float *w, float *m, float g, Step s) {
    if (s.decay != 0) g += s.decay * *from;
    if (s.momentum != 0) {
        float b = s.momentum * *m + g;
        *m = b;
        g = s.nesterov ? g + s.momentum * b : b;
    }
    *w = *from - s.rate * g;
}

static void step_all(const float *from, float *w, float *m, const float *g, int64_t count, Step s) {
    for (int64_t i = 0; i < count; i++) step_one(from + i, w + i, s.momentum != 0 ? m + i : m, g[i], s);
}

static Step step_of(const Plan *p, double rate) {
    return (Step){(float)rate, (float)p->momentum, (float)p->weight_decay, (int)p->nesterov};
}

/* --- linear layers: y[n][j] = x[n][i] w[j][i] + b[j] ------------------------------------------------------------------ */

/* Tiles of products are up to SIDE x SIDE vectors of sums, which the registers hold. TILES(T, a, b): T(a, b) with both as
   constants, so that the compiler unrolls it. */
#define SIDE 5
#define TILES_OF(T, a, b) ((b) == 5 ? T(a, 5) : (b) == 4 ? T(a, 4) : (b) == 3 ? T(a, 3) : (b) == 2 ? T(a, 2) : T(a, 1))
#define TILES(T, a, b)                                                                                                  \
    ((a) == 5   ? TILES_OF(T, 5, b)                                                                                     \
     : (a) == 4 ? TILES_OF(T, 4, b)                                                                                     \
     : (a) == 3 ? TILES_OF(T, 3, b)                                                                                     \
     : (a) == 2 ? TILES_OF(T, 2, b)                                                                                     \
                : TILES_OF(T, 1, b))

INLINE int least(int64_t left) { return (int)(left < SIDE ? left : SIDE); }

/* `rows` samples by `outs` outputs: the products of each pair, summed up. */
INLINE void forward_tile(const int rows, const int outs, const float *x, const float *w, int64_t xs, float *got) {
    vec acc[2 * LANES] = {{0}};
    for (int64_t i = 0; i < xs; i += LANES) {
        vec c[SIDE];
#pragma GCC unroll 5
        for (int r = 0; r < outs; r++) c[r] = load(w + r * xs + i);
#pragma GCC unroll 5
        for (int q = 0; q < rows; q++) {
            vec a = load(x + q * xs + i);
#pragma GCC unroll 5
            for (int r = 0; r < outs; r++) acc[q * outs + r] += a * c[r];
        }
    }
    store(got, sums(acc));
    if (rows * outs > LANES) store(got + LANES, sums(acc + LANES));
}

LARGE void linear_forward(const float *x, int64_t in, const float *w, const float *b, float *y, int64_t out, int64_t n,
                           int64_t act) {
    int64_t xs = ROUND(in), ys = ROUND(out);
    for (int64_t j = 0; j < out; j += SIDE)
        for (int64_t s = 0; s < n; s += SIDE) {
            float got[2 * LANES];
            int rows = least(n - s), outs = least(out - j);
#define TILE(q, r) forward_tile(q, r, x + s * xs, w + j * xs, xs, got)
            TILES(TILE, rows, outs);
#undef TILE
            for (int q = 0; q < rows; q++)
                for (int r = 0; r < outs; r++) y[(s + q) * ys + j + r] = got[q * outs + r];
        }
    for (int64_t s = 0; s < n; s++) {
        float *row = y + s * ys;
        if (b)
            for (int64_t j = 0; j < out; j++) row[j] += b[j];
        if (act == RELU)
            for (int64_t j = 0; j < out; j++) row[j] = row[j] > 0 ? row[j] : 0;
        if (act == TANH)
            for (int64_t j = 0; j < out; j++) row[j] = tanhf(row[j]);
    }
}

/* dx[n][i] (+)= dy[n][j] w[j][i], `rows` samples by `wide` vectors at a time. */
INLINE void back_tile(const int rows, const int wide, const float *dy, int64_t ys, const float *w, int64_t xs, int64_t out,
                      float *dx, int add) {
    vec acc[SIDE][SIDE];
#pragma GCC unroll 5
    for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) acc[q][r] = add ? load(dx + q * xs + r * LANES) : (vec){0};
    for (int64_t j = 0; j < out; j++) {
        vec c[SIDE];
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) c[r] = load(w + j * xs + r * LANES);
#pragma GCC unroll 5
        for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
            for (int r = 0; r < wide; r++) acc[q][r] += dy[q * ys + j] * c[r];
    }
#pragma GCC unroll 5
    for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) store(dx + q * xs + r * LANES, acc[q][r]);
}

LARGE void linear_back(const float *dy, const float *w, float *dx, int64_t in, int64_t out, int64_t n, int add) {
    int64_t xs = ROUND(in), ys = ROUND(out);
    for (int64_t i = 0; i < xs; i += SIDE * LANES)
        for (int64_t s = 0; s < n; s += SIDE) {
#define TILE(q, r) back_tile(q, r, dy + s * ys, ys, w + i, xs, out, dx + s * xs + i, add)
            TILES(TILE, least(n - s), least((xs - i) / LANES));
#undef TILE
        }
}

/* w[j][i] moves against dy[n][j] x[n][i], `rows` outputs by `wide` vectors at a time. */
INLINE void update_tile(const int rows, const int wide, const float *dy, int64_t ys, const float *x, int64_t xs, int64_t n,
                        const float *from, float *w, float *m, Step step) {
    vec acc[SIDE][SIDE];
#pragma GCC unroll 5
    for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) acc[q][r] = (vec){0};
    for (int64_t s = 0; s < n; s++) {
        vec c[SIDE];
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) c[r] = load(x + s * xs + r * LANES);
#pragma GCC unroll 5
        for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
            for (int r = 0; r < wide; r++) acc[q][r] += dy[s * ys + q] * c[r];
    }
    if (step.decay == 0 && step.momentum == 0) {
#pragma GCC unroll 5
        for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
            for (int r = 0; r < wide; r++) {
                int64_t at = q * xs + r * LANES;
                store(w + at, load(from + at) - step.rate * acc[q][r]);
            }
        return;
    }
    /* Spill the registers, so that the rest is a loop: unrolled, its conditions would be half of the code. */
    float got[SIDE * SIDE * LANES];
#pragma GCC unroll 5
    for (int q = 0; q < rows; q++)
#pragma GCC unroll 5
        for (int r = 0; r < wide; r++) store(got + (q * wide + r) * LANES, acc[q][r]);
#pragma GCC unroll 1
    for (int i = 0; i < rows * wide; i++) {
        int64_t at = i / wide * xs + i % wide * LANES;
        step_vec(from + at, w + at, m + at, load(got + i * LANES), step);
    }
}

LARGE void linear_update(const float *dy, const float *x, const float *from, float *w, float *m, int64_t in, int64_t out,
                          int64_t n, Step step) {
    int64_t xs = ROUND(in), ys = ROUND(out);
    for (int64_t i = 0; i < xs; i += SIDE * LANES)
        for (int64_t j = 0; j < out; j += SIDE) {
#define TILE(q, r) update_tile(q, r, dy + j, ys, x + i, xs, n, from + j * xs + i, w + j * xs + i, m + j * xs + i, step)
            TILES(TILE, least(out - j), least((xs - i) / LANES));
#undef TILE
        }
}

static void bias_update(const float *dy, const float *from, float *b, float *m, int64_t out, int64_t n, Step step) {
    int64_t ys = ROUND(out);
    for (int64_t j = 0; j < ys; j += LANES) {
        vec sums = {0};
        float g[LANES];
        for (int64_t s = 0; s < n; s++) sums += load(dy + s * ys + j);
        store(g, sums);
        step_all(from + j, b + j, m + j, g, out - j < LANES ? out - j : LANES, step);
    }
}

/* --- convolutions, stride 1 ------------------------------------------------------------------------------------------- */

/* One row of `chans` output channels, `wide` vectors of it. x: the first input row, of channels `plane` floats apart. all: -1,
   or 0 if only what is above 0 is let through. */
INLINE void conv_tile(const int chans, const int wide, const float *x, int64_t plane, int64_t row, int64_t n, int64_t c,
                      int64_t kh, int64_t kw, const float *w, const float *b, float *y, int64_t yplane, int32_t all) {
    vec acc[6][4];
#pragma GCC unroll 6
    for (int q = 0; q < chans; q++)
#pragma GCC unroll 4
        for (int r = 0; r < wide; r++) acc[q][r] = spread(b[q]);
    int64_t k = c * kh * kw;
    for (int64_t i = 0; i < c; i++)
        for (int64_t u = 0; u < kh; u++) {
            const float *at = x + i * plane + u * row, *ww = w + (i * kh + u) * kw;
            for (int64_t v = 0; v < kw; v++) {
                vec a[4];
#pragma GCC unroll 4
                for (int r = 0; r < wide; r++) a[r] = load(at + v * n + r * LANES);
#pragma GCC unroll 6
                for (int q = 0; q < chans; q++)
#pragma GCC unroll 4
                    for (int r = 0; r < wide; r++) acc[q][r] += a[r] * ww[q * k + v];
            }
        }
#pragma GCC unroll 6
    for (int q = 0; q < chans; q++)
#pragma GCC unroll 4
        for (int r = 0; r < wide; r++) {
            vec o = acc[q][r];
            store(y + q * yplane + r * LANES, (vec)((ivec)o & ((o > 0) | all)));
        }
}

/* y[oc][oh][ow n] of x[c][oh + kh - 1][(ow + kw - 1) n], whose rows are `row` floats apart. */
LARGE void conv(const float *x, int64_t row, int64_t c, const float *w, const float *b, int64_t kh, int64_t kw, float *y,
                 int64_t oc, int64_t oh, int64_t ow, int64_t n, int64_t act) {
    static const float none[6] = {0};
    int64_t yrow = ROUND(ow * n), plane = (oh + kh - 1) * row;
    int32_t all = act == RELU ? 0 : -1;
    for (int64_t r = 0; r < oh; r++)
        for (int64_t o = 0; o < oc; o += 6) {
            int chans = (int)(oc - o < 6 ? oc - o : 6);
            for (int64_t t = 0; t < yrow; t += 4 * LANES) {
                int wide = (int)((yrow - t) / LANES < 4 ? (yrow - t) / LANES : 4);
#define TILE(q, e)                                                                                                      \
    conv_tile(q, e, x + r * row + t, plane, row, n, c, kh, kw, w + o * c * kh * kw, b ? b + o : none,                    \
              y + (o * oh + r) * yrow + t, oh * yrow, all)
#define CHANS(e)                                                                                                        \
    (chans == 6 ? TILE(6, e) : chans == 5 ? TILE(5, e) : chans == 4 ? TILE(4, e) : chans == 3 ? TILE(3, e) :             \
     chans == 2 ? TILE(2, e) : TILE(1, e))
                wide == 4 ? CHANS(4) : wide == 3 ? CHANS(3) : wide == 2 ? CHANS(2) : CHANS(1);
#undef CHANS
#undef TILE
            }
        }
}

/* dw of `chans` output channels and `taps` columns of the kernel: sums over all pixels and samples of dy x. */
INLINE void dw_tile(const int chans, const int taps, const float *dy, int64_t dplane, int64_t drow, const float *x,
                    int64_t row, int64_t n, int64_t oh, int64_t length, float *dw, int64_t k) {
    vec acc[4][5];
#pragma GCC unroll 4
    for (int q = 0; q < chans; q++)
#pragma GCC unroll 5
        for (int v = 0; v < taps; v++) acc[q][v] = (vec){0};
    for (int64_t r = 0; r < oh; r++)
        for (int64_t t = 0; t < length; t += LANES) {
            vec a[5], d[4];
#pragma GCC unroll 4
            for (int q = 0; q < chans; q++) d[q] = load(dy + q * dplane + r * drow + t);
#pragma GCC unroll 5
            for (int v = 0; v < taps; v++) a[v] = load(x + r * row + t + v * n);
#pragma GCC unroll 4
            for (int q = 0; q < chans; q++)
#pragma GCC unroll 5
                for (int v = 0; v < taps; v++) acc[q][v] += d[q] * a[v];
        }
#pragma GCC unroll 4
    for (int q = 0; q < chans; q++)
#pragma GCC unroll 5
        for (int v = 0; v < taps; v++) dw[q * k + v] = sum(acc[q][v]);
}

LARGE void conv_dw(const float *dy, int64_t drow, int64_t dplane, const float *x, int64_t row, const Layer *l, int64_t n,
                    float *dw) {
    int64_t k = l->c * l->kh * l->kw, plane = (l->h + 2 * l->ph) * row;
    for (int64_t o = 0; o < l->oc; o += 4) {
        int chans = (int)(l->oc - o < 4 ? l->oc - o : 4);
        for (int64_t i = 0; i < l->c; i++)
            for (int64_t u = 0; u < l->kh; u++)
                for (int64_t v = 0; v < l->kw; v += 5) {
                    int taps = (int)(l->kw - v < 5 ? l->kw - v : 5);
#define TILE(q, e)                                                                                                      \
    dw_tile(q, e, dy + o * dplane, dplane, drow, x + i * plane + u * row + v * n, row, n, l->oh, l->ow * n,              \
            dw + o * k + (i * l->kh + u) * l->kw + v, k)
#define CHANS(e) (chans == 4 ? TILE(4, e) : chans == 3 ? TILE(3, e) : chans == 2 ? TILE(2, e) : TILE(1, e))
                    taps == 5 ? CHANS(5) : taps == 4 ? CHANS(4) : taps == 3 ? CHANS(3) : taps == 2 ? CHANS(2) : CHANS(1);
#undef CHANS
#undef TILE
                }
    }
}

/* Layouts of the padded copies for a batch of n: room behind each row for a shifted vector, zeros all around. */
static void lay_out(const Layer *l, Work *k, int64_t n) {
    if (k->n == n) return;
    k->n = n;
    k->in_row = ROUND((l->w + 2 * l->pw) * n) + 5 * LANES;
    k->out_row = ROUND((l->ow + 2 * (l->kw - 1 - l->pw)) * n) + 5 * LANES;
    memset(k->padded, 0, sizeof(float) * l->c * (l->h + 2 * l->ph) * k->in_row);
    memset(k->dpadded, 0, sizeof(float) * l->oc * (l->oh + 2 * (l->kh - 1 - l->ph)) * k->out_row);
}

static void conv_forward(const Layer *l, Work *k, const float *x, const float *p, int64_t n) {
    lay_out(l, k, n);
    int64_t xrow = ROUND(l->w * n), rows = l->h + 2 * l->ph;
    for (int64_t c = 0; c < l->c; c++)
        for (int64_t y = 0; y < l->h; y++)
            memcpy(k->padded + (c * rows + y + l->ph) * k->in_row + l->pw * n, x + (c * l->h + y) * xrow,
                   sizeof(float) * l->w * n);
    conv(k->padded, k->in_row, l->c, p + l->weight, l->bias >= 0 ? p + l->bias : 0, l->kh, l->kw, k->out, l->oc, l->oh, l->ow,
         n, l->act);
    if (l->act == TANH)
        for (int64_t i = 0; i < l->oc * l->oh * ROUND(l->ow * n); i++) k->out[i] = tanhf(k->out[i]);
}

/* Turns the gradient of an activation's output into that of its input. */
INLINE float before(float d, float out, int64_t act) {
    return act == RELU ? (out > 0 ? d : 0.0f) : act == TANH ? d * (1 - out * out) : d;
}

static void conv_backward(const Net *net, const Layer *l, Work *k, float *dx, const float *from, float *p, int64_t n) {
    int64_t yrow = ROUND(l->ow * n), qh = l->kh - 1 - l->ph, qw = l->kw - 1 - l->pw, rows = l->oh + 2 * qh;
    int64_t area = l->kh * l->kw;
    for (int64_t c = 0; c < l->oc; c++)
        for (int64_t y = 0; y < l->oh; y++) {
            const float *d = k->grad + (c * l->oh + y) * yrow, *o = k->out + (c * l->oh + y) * yrow;
            float *to = k->dpadded + (c * rows + y + qh) * k->out_row + qw * n;
            for (int64_t i = 0; i < l->ow * n; i++) to[i] = before(d[i], o[i], l->act);
        }
    if (dx) {
        for (int64_t o = 0; o < l->oc; o++)
            for (int64_t c = 0; c < l->c; c++)
                for (int64_t a = 0; a < area; a++)
                    k->flipped[(c * l->oc + o) * area + a] = from[l->weight + (o * l->c + c) * area + area - 1 - a];
        conv(k->dpadded, k->out_row, l->oc, k->flipped, 0, l->kh, l->kw, dx, l->c, l->h, l->w, n, NONE);
    }
    const float *dy = k->dpadded + qh * k->out_row + qw * n;
    int64_t dplane = rows * k->out_row;
    if (l->rate_w > 0) {
        conv_dw(dy, k->out_row, dplane, k->padded, k->in_row, l, n, k->dw);
        step_all(from + l->weight, p + l->weight, net->moment + l->weight, k->dw, l->oc * l->c * area,
                 step_of(&net->plan, l->rate_w));
    }
    if (l->bias >= 0 && l->rate_b > 0)
        for (int64_t c = 0; c < l->oc; c++) {
            vec g = {0};
            for (int64_t y = 0; y < l->oh; y++)
                for (int64_t i = 0; i < l->ow * n; i += LANES) g += load(dy + c * dplane + y * k->out_row + i);
            int64_t at = l->bias + c;
            step_one(from + at, p + at, net->moment + at, sum(g), step_of(&net->plan, l->rate_b));
        }
}

/* --- pooling, normalisation, flattening --------------------------------------------------------------------------------- */

/* The maximum of windows that do not overlap; the first of equal values wins, as in torch. */
static void pool_forward(const Layer *l, Work *k, const float *x, int64_t n) {
    int64_t xrow = ROUND(l->w * n), yrow = ROUND(l->ow * n);
    for (int64_t c = 0; c < l->c; c++)
        for (int64_t y = 0; y < l->oh; y++)
            for (int64_t q = 0; q < l->ow; q++) {
                float *restrict out = k->out + (c * l->oh + y) * yrow + q * n;
                int32_t *restrict arg = k->arg + (c * l->oh + y) * yrow + q * n;
                const float *first = x + (c * l->h + y * l->kh) * xrow + q * l->kw * n;
                for (int64_t s = 0; s < n; s++) out[s] = first[s], arg[s] = 0;
                for (int64_t u = 0; u < l->kh && y * l->kh + u < l->h; u++)
                    for (int64_t v = 0; v < l->kw && q * l->kw + v < l->w; v++) {
                        const float *restrict at = first + u * xrow + v * n;
                        int32_t which = (int32_t)(u * l->kw + v);
                        for (int64_t s = 0; s < n; s++) {
                            arg[s] = at[s] > out[s] ? which : arg[s];
                            out[s] = at[s] > out[s] ? at[s] : out[s];
                        }
                    }
            }
}

static void pool_backward(const Layer *l, const Work *k, float *dx, int64_t n) {
    int64_t xrow = ROUND(l->w * n), yrow = ROUND(l->ow * n);
    if (l->h % l->kh || l->w % l->kw) memset(dx, 0, sizeof(float) * l->c * l->h * xrow);
    for (int64_t c = 0; c < l->c; c++)
        for (int64_t y = 0; y < l->oh; y++)
            for (int64_t q = 0; q < l->ow; q++) {
                const float *restrict d = k->grad + (c * l->oh + y) * yrow + q * n;
                const int32_t *restrict arg = k->arg + (c * l->oh + y) * yrow + q * n;
                for (int64_t u = 0; u < l->kh && y * l->kh + u < l->h; u++)
                    for (int64_t v = 0; v < l->kw && q * l->kw + v < l->w; v++) {
                        float *restrict to = dx + (c * l->h + y * l->kh + u) * xrow + (q * l->kw + v) * n;
                        int32_t which = (int32_t)(u * l->kw + v);
                        for (int64_t s = 0; s < n; s++) to[s] = arg[s] == which ? d[s] : 0.0f;
                    }
            }
}

/* Group normalisation with weight and bias (Wu and He 2018). Keeps the normalised input in `padded`. */
static void norm_forward(const Layer *l, Work *k, const float *x, const float *p, int64_t n) {
    int64_t row = ROUND(l->w * n), per = l->c / l->groups;
    float count = (float)(per * l->h * l->w);
    for (int64_t g = 0; g < l->groups; g++) {
        float *restrict mean = k->mean + g * n, *restrict rstd = k->rstd + g * n;
        for (int64_t s = 0; s < n; s++) mean[s] = rstd[s] = 0;
        for (int64_t r = g * per * l->h; r < (g + 1) * per * l->h; r++)
            for (int64_t q = 0; q < l->w; q++)
                for (int64_t s = 0; s < n; s++) mean[s] += x[r * row + q * n + s];
        for (int64_t s = 0; s < n; s++) mean[s] /= count;
        for (int64_t r = g * per * l->h; r < (g + 1) * per * l->h; r++)
            for (int64_t q = 0; q < l->w; q++)
                for (int64_t s = 0; s < n; s++) {
                    float d = x[r * row + q * n + s] - mean[s];
                    rstd[s] += d * d;
                }
        for (int64_t s = 0; s < n; s++) rstd[s] = 1 / sqrtf(rstd[s] / count + (float)l->eps);
        for (int64_t r = g * per * l->h; r < (g + 1) * per * l->h; r++) {
            float weight = p[l->weight + r / l->h], bias = p[l->bias + r / l->h];
            for (int64_t q = 0; q < l->w; q++)
                for (int64_t s = 0; s < n; s++) {
                    float hat = (x[r * row + q * n + s] - mean[s]) * rstd[s], v = hat * weight + bias;
                    k->padded[r * row + q * n + s] = hat;
                    k->out[r * row + q * n + s] = l->act == RELU ? (v > 0 ? v : 0) : l->act == TANH ? tanhf(v) : v;
                }
        }
    }
}

static void norm_backward(const Net *net, const Layer *l, Work *k, float *dx, const float *from, float *p, int64_t n) {
    int64_t row = ROUND(l->w * n), per = l->c / l->groups;
    float count = (float)(per * l->h * l->w);
    for (int64_t g = 0; g < l->groups; g++) {
        float *restrict one = k->mean + g * n, *rstd = k->rstd + g * n, *restrict two = k->dw;
        for (int64_t s = 0; s < n; s++) one[s] = two[s] = 0; /* means of dhat, and of dhat hat */
        for (int64_t c = g * per; c < (g + 1) * per; c++) {
            float dweight = 0, dbias = 0, weight = from[l->weight + c];
            int64_t w = l->weight + c, b = l->bias + c;
            for (int64_t r = c * l->h; r < (c + 1) * l->h; r++)
                for (int64_t q = 0; q < l->w; q++)
                    for (int64_t s = 0; s < n; s++) {
                        int64_t at = r * row + q * n + s;
                        float d = before(k->grad[at], k->out[at], l->act);
                        k->grad[at] = d;
                        dbias += d, dweight += d * k->padded[at];
                        one[s] += d * weight, two[s] += d * weight * k->padded[at];
                    }
            if (dx) /* the weight is used again below */
                for (int64_t r = c * l->h; r < (c + 1) * l->h; r++)
                    for (int64_t i = 0; i < l->w * n; i++) dx[r * row + i] = k->grad[r * row + i] * weight;
            if (l->rate_w > 0) step_one(from + w, p + w, net->moment + w, dweight, step_of(&net->plan, l->rate_w));
            if (l->rate_b > 0) step_one(from + b, p + b, net->moment + b, dbias, step_of(&net->plan, l->rate_b));
        }
        if (dx)
            for (int64_t r = g * per * l->h; r < (g + 1) * per * l->h; r++)
                for (int64_t q = 0; q < l->w; q++)
                    for (int64_t s = 0; s < n; s++) {
                        int64_t at = r * row + q * n + s;
                        dx[at] = rstd[s] * (dx[at] - one[s] / count - k->padded[at] * two[s] / count);
                    }
    }
}

/* Layer normalisation of flat features, without parameters, times `scale`. */
static void bounded_forward(const Layer *l, Work *k, const float *x, int64_t n) {
    int64_t row = ROUND(l->c);
    for (int64_t s = 0; s < n; s++) {
        float mean = 0, var = 0;
        for (int64_t i = 0; i < l->c; i++) mean += x[s * row + i];
        mean /= (float)l->c;
        for (int64_t i = 0; i < l->c; i++) var += (x[s * row + i] - mean) * (x[s * row + i] - mean);
        k->rstd[s] = 1 / sqrtf(var / (float)l->c + (float)l->eps);
        for (int64_t i = 0; i < l->c; i++) k->out[s * row + i] = (x[s * row + i] - mean) * k->rstd[s] * (float)l->scale;
    }
}

static void bounded_backward(const Layer *l, const Work *k, float *dx, int64_t n) {
    int64_t row = ROUND(l->c);
    float scale = (float)l->scale;
    for (int64_t s = 0; s < n; s++) {
        const float *d = k->grad + s * row, *o = k->out + s * row;
        float one = 0, two = 0;
        for (int64_t i = 0; i < l->c; i++) one += d[i], two += d[i] * o[i] / scale;
        one /= (float)l->c, two /= (float)l->c;
        for (int64_t i = 0; i < l->c; i++) dx[s * row + i] = scale * k->rstd[s] * (d[i] - one - o[i] / scale * two);
    }
}

/* image [c][h][w][sample] -> flat [sample][c h w], and back. */
static void flatten(const Layer *l, float *image, float *flat, int64_t n, int back) {
    int64_t row = ROUND(l->w * n), to = ROUND(l->oc);
    for (int64_t r = 0; r < l->c * l->h; r++)
        for (int64_t q = 0; q < l->w; q++) {
            float *a = image + r * row + q * n, *b = flat + r * l->w + q;
            if (back)
                for (int64_t s = 0; s < n; s++) a[s] = b[s * to];
            else
                for (int64_t s = 0; s < n; s++) b[s * to] = a[s];
        }
}

/* --- heads and losses ---------------------------------------------------------------------------------------------------- */

/* The loss of a batch, its mean over the samples that have the target; logits become the gradient. Labels -1 and values
   that are no number are missing. weights: of the classes, or 0. */
static double loss(const Head *h, float *logits, const void *y, const float *weights, const int64_t *index, int64_t n) {
    int64_t row = ROUND(h->size), known = 0;
    const int64_t *label = y;
    const float *value = y;
    for (int64_t s = 0; s < n; s++) known += h->kind == CLASS ? label[index[s]] >= 0 : value[index[s]] == value[index[s]];
    float share = (float)(h->importance / (known ? known : 1));
    double total = 0;
    for (int64_t s = 0; s < n; s++) {
        float *z = logits + s * row;
        if (h->kind == CLASS) {
            int64_t truth = label[index[s]];
            float most = z[0], sum = 0;
            for (int64_t j = 1; j < h->size; j++) most = z[j] > most ? z[j] : most;
            if (truth < 0) {
                for (int64_t j = 0; j < h->size; j++) z[j] = 0;
                continue;
            }
            float weight = weights ? weights[truth] : 1.0f, at = z[truth] - most;
            for (int64_t j = 0; j < h->size; j++) sum += z[j] = expf(z[j] - most);
            total += weight * (logf(sum) - at);
            for (int64_t j = 0; j < h->size; j++) z[j] = share * weight * (z[j] / sum - (j == truth));
        } else {
            float truth = value[index[s]], error = z[0] - (truth - (float)h->offset) / (float)h->spread;
            int is_known = truth == truth;
            total += is_known ? error * error : 0;
            z[0] = is_known ? 2 * share * error : 0;
        }
    }
    return known ? total / (double)known : 0;
}

/* --- the network ----------------------------------------------------------------------------------------------------------- */

/* Allocate floats, all 0, with five more vectors behind them. Without memory returns NULL and sets `*whole` to 0. */
static void *zeros(int64_t floats, int *whole) {
    size_t bytes = sizeof(float) * (size_t)ROUND(floats + 5 * LANES);
    void *p = aligned_alloc(64, bytes);
    if (p) memset(p, 0, bytes);
    else *whole = 0;
    return p;
}

/* Copy bytes, at least one. Without memory returns NULL and sets `*whole` to 0. */
static void *copy(const void *from, int64_t bytes, int *whole) {
    void *p = malloc((size_t)bytes + 1);
    if (p) memcpy(p, from, (size_t)bytes);
    else *whole = 0;
    return p;
}

void fused_close(Net *net) {
    for (int64_t i = 0; net->work && i < net->plan.layers; i++) {
        Work *k = net->work + i;
        free(k->out), free(k->grad), free(k->padded), free(k->dpadded), free(k->flipped), free(k->dw), free(k->mean);
        free(k->rstd), free(k->arg);
    }
    free(net->layer), free(net->head), free(net->work), free(net->input), free(net->features_grad), free(net->logits);
    free(net->moment), free(net);
}

/* Sizes of Plan, Layer and Head, to check the declarations in Python. */
void fused_sizes(int64_t *sizes) { sizes[0] = sizeof(Plan), sizes[1] = sizeof(Layer), sizes[2] = sizeof(Head); }

/* Allocate a network for batches of up to `plan.batch` samples; NULL without memory. */
Net *fused_open(const Plan *plan, const Layer *layers, const Head *heads, int64_t input) {
    Net *net = calloc(1, sizeof(Net));
    if (!net) return NULL;
    int whole = 1;
    int64_t n = plan->batch, features = heads[0].features, widest = LANES;
    net->plan = *plan;
    net->layer = copy(layers, sizeof(Layer) * plan->layers, &whole);
    net->head = copy(heads, sizeof(Head) * plan->heads, &whole);
    net->work = calloc(plan->layers + 1, sizeof(Work));
    whole &= net->work != NULL;
    for (int64_t i = 0; whole && i < plan->layers; i++) {
        const Layer *l = layers + i;
        Work *k = net->work + i;
        int64_t out = l->oh * l->ow == 1 ? n * ROUND(l->oc) + l->oc * ROUND(n) : l->oc * l->oh * ROUND(l->ow * n);
        k->out = zeros(out, &whole), k->grad = zeros(out, &whole);
        if (l->kind == CONV) {
            k->padded = zeros(l->c * (l->h + 2 * l->ph) * (ROUND((l->w + 2 * l->pw) * n) + 5 * LANES), &whole);
            k->dpadded = zeros(l->oc * (l->oh + 2 * l->kh) * (ROUND((l->ow + 2 * l->kw) * n) + 5 * LANES), &whole);
            k->flipped = zeros(l->c * l->oc * l->kh * l->kw, &whole), k->dw = zeros(l->c * l->oc * l->kh * l->kw, &whole);
        }
        if (l->kind == POOL) k->arg = zeros(out, &whole);
        if (l->kind == NORM) k->padded = zeros(out, &whole), k->mean = zeros(l->groups * n, &whole), k->dw = zeros(n, &whole);
        if (l->kind == NORM || l->kind == BOUNDED) k->rstd = zeros((l->groups + 1) * n, &whole);
    }
    for (int64_t i = 0; i < plan->heads; i++) widest = heads[i].size > widest ? heads[i].size : widest;
    net->input = zeros(plan->flat_input ? n * ROUND(input) : input * ROUND(n), &whole);
    net->features_grad = zeros(n * ROUND(features), &whole);
    net->logits = zeros(n * ROUND(widest), &whole);
    net->moment = zeros(plan->momentum != 0 ? plan->parameters : 0, &whole);
    if (!whole) fused_close(net), net = NULL;
    return net;
}

/* Set a round's rates: weight and bias of each layer, then of each head. */
void fused_rates(Net *net, const double *rates) {
    for (int64_t i = 0; i < net->plan.layers; i++) net->layer[i].rate_w = *rates++, net->layer[i].rate_b = *rates++;
    for (int64_t i = 0; i < net->plan.heads; i++) net->head[i].rate_w = *rates++, net->head[i].rate_b = *rates++;
}

static void gather(Net *net, const Layer *l, const float *x, int64_t size, const int64_t *index, int64_t n) {
    if (net->plan.flat_input) {
        for (int64_t s = 0; s < n; s++) memcpy(net->input + s * ROUND(size), x + index[s] * size, sizeof(float) * size);
        return;
    }
    int64_t row = ROUND(l->w * n);
    for (int64_t s = 0; s < n; s++)
        for (int64_t r = 0; r < l->c * l->h; r++)
            for (int64_t q = 0; q < l->w; q++) net->input[r * row + q * n + s] = x[index[s] * size + r * l->w + q];
}

/* One step on n samples; adds n times each head's loss to `losses`. */
static void batch_step(Net *net, const float *from, float *p, const float *x, int64_t size, const void *const *y,
                       const float *const *weights, const int64_t *index, int64_t n, double *losses) {
    const Plan *plan = &net->plan;
    int64_t layers = plan->layers, first = layers; /* the lowest layer that learns */
    for (int64_t i = layers; i-- > 0;)
        if (net->layer[i].rate_w > 0 || net->layer[i].rate_b > 0) first = i;
    gather(net, net->layer, x, size, index, n);
    float *in = net->input;
    for (int64_t i = 0; i < layers; i++) {
        const Layer *l = net->layer + i;
        Work *k = net->work + i;
        const float *bias = l->bias >= 0 ? from + l->bias : 0;
        if (l->kind == LINEAR) linear_forward(in, l->c, from + l->weight, bias, k->out, l->oc, n, l->act);
        if (l->kind == CONV) conv_forward(l, k, in, from, n);
        if (l->kind == POOL) pool_forward(l, k, in, n);
        if (l->kind == NORM) norm_forward(l, k, in, from, n);
        if (l->kind == BOUNDED) bounded_forward(l, k, in, n);
        if (l->kind == FLATTEN) flatten(l, in, k->out, n, 0);
        in = k->out;
    }
    for (int64_t i = 0; i < plan->heads; i++) {
        const Head *h = net->head + i;
        float *dx = layers ? net->work[layers - 1].grad : net->features_grad;
        const float *bias = h->bias >= 0 ? from + h->bias : 0;
        linear_forward(in, h->features, from + h->weight, bias, net->logits, h->size, n, NONE);
        losses[i] += loss(h, net->logits, y[i], weights[i], index, n) * (double)n;
        if (first < layers) linear_back(net->logits, from + h->weight, dx, h->features, h->size, n, i > 0);
        if (h->rate_w > 0)
            linear_update(net->logits, in, from + h->weight, p + h->weight,
                          net->moment + (plan->momentum != 0 ? h->weight : 0), h->features, h->size, n,
                          step_of(plan, h->rate_w));
        if (h->bias >= 0 && h->rate_b > 0)
            bias_update(net->logits, from + h->bias, p + h->bias, net->moment + (plan->momentum != 0 ? h->bias : 0),
                        h->size, n, step_of(plan, h->rate_b));
    }
    for (int64_t i = layers; i-- > first;) {
        const Layer *l = net->layer + i;
        Work *k = net->work + i;
        float *below = i ? net->work[i - 1].out : net->input, *dx = i > first ? net->work[i - 1].grad : 0;
        if (l->kind == LINEAR) {
            int64_t row = ROUND(l->oc);
            if (l->act != NONE)
                for (int64_t s = 0; s < n; s++)
                    for (int64_t j = 0; j < l->oc; j++)
                        k->grad[s * row + j] = before(k->grad[s * row + j], k->out[s * row + j], l->act);
            if (dx) linear_back(k->grad, from + l->weight, dx, l->c, l->oc, n, 0);
            if (l->rate_w > 0)
                linear_update(k->grad, below, from + l->weight, p + l->weight,
                              net->moment + (plan->momentum != 0 ? l->weight : 0), l->c, l->oc, n,
                              step_of(plan, l->rate_w));
            if (l->bias >= 0 && l->rate_b > 0)
                bias_update(k->grad, from + l->bias, p + l->bias, net->moment + (plan->momentum != 0 ? l->bias : 0),
                            l->oc, n, step_of(plan, l->rate_b));
        }
        if (l->kind == CONV) conv_backward(net, l, k, dx, from, p, n);
        if (l->kind == POOL && dx) pool_backward(l, k, dx, n);
        if (l->kind == NORM) norm_backward(net, l, k, dx, from, p, n);
        if (l->kind == BOUNDED && dx) bounded_backward(l, k, dx, n);
        if (l->kind == FLATTEN && dx) flatten(l, dx, k->grad, n, 1);
    }
}

/* Whether every array learns. */
static int all_learn(const Net *net) {
    int all = 1;
    for (int64_t i = 0; i < net->plan.layers; i++) {
        const Layer *l = net->layer + i;
        all &= (l->weight < 0 || l->rate_w > 0) && (l->bias < 0 || l->rate_b > 0);
    }
    for (int64_t i = 0; i < net->plan.heads; i++)
        all &= net->head[i].rate_w > 0 && (net->head[i].bias < 0 || net->head[i].rate_b > 0);
    return all;
}

/* Train one client: `steps` (one or more) steps over batches of `batch` of its samples, in the order that `order` gives for
   each epoch (epochs x samples indices), from `start`. p: what it becomes. */
void fused_train(Net *net, const float *start, float *p, const float *x, int64_t size, const void *const *y,
                 const float *const *weights, const int64_t *order, int64_t samples, int64_t batch, int64_t steps,
                 double *losses) {
    int64_t per = (samples + batch - 1) / batch;
    int copied = !all_learn(net);
    if (copied) memcpy(p, start, sizeof(float) * net->plan.parameters);
    if (net->plan.momentum != 0) memset(net->moment, 0, sizeof(float) * net->plan.parameters);
    for (int64_t t = 0; t < steps; t++) {
        int64_t begin = t % per * batch, n = samples - begin < batch ? samples - begin : batch;
        const int64_t *index = order + t / per * samples + begin;
        batch_step(net, t || copied ? p : start, p, x, size, y, weights, index, n, losses);
    }
}
