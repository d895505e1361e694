/* Random networks, poolings, sums and streams, with each array in memory of exactly its size: for a build with
   -fsanitize=address,undefined (tests/native/test_sanitized.py). Arguments: the first seed, and how many. */

#ifdef FUSED
#include "fused.c"
#elif defined(POOLING)
#include "pooling.c"
#elif defined(SUMS)
#include "sums.c"
#else
#include "noise.c"
#endif

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static uint64_t state;

static uint64_t draw(void) { /* splitmix64 */
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static int64_t upto(int64_t least, int64_t most) { return least + (int64_t)(draw() % (uint64_t)(most - least + 1)); }

static float *floats(int64_t count) {
    float *p = aligned_alloc(64, (size_t)((count * 4 + 63) / 64 * 64)); /* as torch aligns; the end is a line's */
    for (int64_t i = 0; i < count; i++) p[i] = (float)(int64_t)upto(-1000, 1000) / 1000;
    return p;
}

static float *exact(int64_t count) {
    float *p = malloc((size_t)count * 4 + 1);
    for (int64_t i = 0; i < count; i++) p[i] = (float)(int64_t)upto(-1000, 1000) / 1000;
    return p;
}

#ifdef FUSED
static int64_t place(int64_t *size, int64_t count) {
    int64_t at = *size;
    *size = ROUND(at + count);
    return at;
}

static void one(void) {
    Layer layer[12];
    Head head[3];
    int64_t size = 0, count = 0, image = upto(0, 2) > 0, c = upto(1, image ? 4 : 40), h = 1, w = 1;
    if (image) h = upto(1, 12), w = upto(1, 12);
    int64_t inputs = c * h * w;
    for (int64_t left = image ? upto(0, 4) : 0; left > 0; left--) {
        Layer l = {.kind = upto(CONV, NORM), .act = upto(NONE, TANH), .c = c, .h = h, .w = w, .oc = c, .oh = h, .ow = w,
                   .kh = 1, .kw = 1, .groups = 1, .weight = -1, .bias = -1, .eps = 1e-5, .scale = 1};
        if (l.kind == CONV) {
            l.kh = upto(1, 6), l.kw = upto(1, 6), l.ph = upto(0, l.kh - 1), l.pw = upto(0, l.kw - 1), l.oc = upto(1, 14);
            l.oh = h + 2 * l.ph - l.kh + 1, l.ow = w + 2 * l.pw - l.kw + 1;
            if (l.oh < 1 || l.ow < 1) continue;
            l.weight = place(&size, l.oc * c * l.kh * l.kw);
            if (upto(0, 2)) l.bias = place(&size, l.oc);
        } else if (l.kind == POOL) {
            l.act = NONE, l.kh = upto(1, 3), l.kw = upto(1, 3);
            int64_t more = upto(0, 1); /* whether windows over the edge count */
            l.oh = (h + more * (l.kh - 1)) / l.kh, l.ow = (w + more * (l.kw - 1)) / l.kw;
            if (l.oh < 1 || l.ow < 1) continue;
        } else {
            while (c % (l.groups = upto(1, c))) continue;
            l.weight = place(&size, c), l.bias = place(&size, c);
        }
        layer[count++] = l, c = l.oc, h = l.oh, w = l.ow;
    }
    if (image) {
        layer[count++] = (Layer){.kind = FLATTEN, .c = c, .h = h, .w = w, .oc = c * h * w, .oh = 1, .ow = 1, .kh = 1, .kw = 1,
                                 .groups = 1, .weight = -1, .bias = -1};
        c = c * h * w;
    }
    for (int64_t left = upto(0, 3); left > 0; left--) {
        Layer l = {.kind = upto(0, 3) ? LINEAR : BOUNDED, .act = upto(NONE, TANH), .c = c, .h = 1, .w = 1, .oc = c, .oh = 1,
                   .ow = 1, .kh = 1, .kw = 1, .groups = 1, .weight = -1, .bias = -1, .eps = 1e-5, .scale = 2};
        if (l.kind == LINEAR) {
            l.oc = upto(1, 50), l.weight = place(&size, l.oc * ROUND(c));
            if (upto(0, 2)) l.bias = place(&size, l.oc);
        } else
            l.act = NONE;
        layer[count++] = l, c = l.oc;
    }
    int64_t heads = upto(1, 3), samples = upto(1, 30), batch = upto(1, 20), epochs = upto(1, 2);
    const void *y[3];
    const float *weights[3];
    for (int64_t i = 0; i < heads; i++) {
        Head t = {.kind = upto(CLASS, VALUE), .features = c, .bias = -1, .importance = 1, .spread = 2};
        t.size = t.kind == CLASS ? upto(1, 20) : 1, t.weight = place(&size, t.size * ROUND(c));
        if (upto(0, 2)) t.bias = place(&size, t.size);
        weights[i] = t.kind == CLASS && upto(0, 1) ? exact(t.size) : NULL;
        if (t.kind == CLASS) {
            int64_t *labels = malloc(8 * (size_t)samples);
            for (int64_t s = 0; s < samples; s++) labels[s] = upto(-1, t.size - 1);
            y[i] = labels;
        } else
            y[i] = exact(samples);
        head[i] = t;
    }
    Plan plan = {.layers = count, .heads = heads, .parameters = size, .batch = batch, .flat_input = !image,
                 .momentum = upto(0, 1) * 0.5, .weight_decay = upto(0, 1) * 0.01, .nesterov = upto(0, 1)};
    double rates[30], losses[3] = {0};
    for (int64_t i = 0; i < 2 * (count + heads); i++) rates[i] = upto(0, 3) ? 0.01 : 0;
    float *start = floats(size), *work = floats(size), *x = exact(samples * inputs);
    int64_t *order = malloc(8 * (size_t)(samples * epochs));
    for (int64_t i = 0; i < samples * epochs; i++) order[i] = upto(0, samples - 1);
    Net *net = fused_open(&plan, layer, head, inputs);
    fused_rates(net, rates);
    for (int again = 0; again < 2; again++)
        fused_train(net, start, work, x, inputs, y, weights, order, samples, batch, epochs * ((samples + batch - 1) / batch),
                    losses);
    fused_close(net);
    for (int64_t i = 0; i < heads; i++) free((void *)y[i]), free((void *)weights[i]);
    free(start), free(work), free(x), free(order);
}
#elif defined(POOLING)
static void one(void) {
    int64_t n = upto(1, 4), h = upto(1, 9), w = upto(1, 9), c = upto(1, 40), kh = upto(1, 4), kw = upto(1, 4), more = upto(0, 1);
    int64_t oh = (h + more * (kh - 1)) / kh, ow = (w + more * (kw - 1)) / kw;
    if (!oh || !ow) return;
    float *x = exact(n * h * w * c), *out = exact(n * oh * ow * c), *dx = exact(n * h * w * c);
    int32_t *places = malloc(4 * (size_t)(n * oh * ow * c));
    pool_forward(x, out, places, n, h, w, c, oh, ow, kh, kw, upto(0, 1));
    pool_backward(out, places, dx, n, h, w, c, oh, ow, kh, kw);
    free(x), free(out), free(dx), free(places);
}
#elif defined(SUMS)
static void one(void) {
    int64_t clients = upto(1, 5), size = upto(1, 5000), begin = upto(0, size - 1), end = upto(begin, size);
    const float *works[5];
    double weights[5], *total = calloc((size_t)size, 8);
    for (int64_t k = 0; k < clients; k++) works[k] = exact(size), weights[k] = (double)upto(0, 9);
    if (!add_up(total, works, weights, clients, begin, end, (int)upto(0, 1))) abort();
    for (int64_t k = 0; k < clients; k++) free((void *)works[k]);
    free(total);
}
#else
static void one(void) {
    uint8_t key[16], counter[16];
    for (int i = 0; i < 16; i++) key[i] = (uint8_t)draw(), counter[i] = upto(0, 1) ? 0xff : (uint8_t)draw();
    Stream *stream = malloc((size_t)noise_size());
    noise_open(stream, key, counter);
    int64_t count = upto(0, 700), groups = upto(0, 5);
    double *uniform = malloc(8 * (size_t)count + 1);
    float *normal = malloc(4 * (size_t)(2 * PAIRS * groups) + 1);
    noise_uniform(stream, uniform, count);
    noise_normals(stream, normal, groups, 0.5f);
    free(uniform), free(normal), free(stream);
}
#endif

int main(int argc, char **argv) {
    uint64_t first = argc > 1 ? strtoull(argv[1], 0, 10) : 0, count = argc > 2 ? strtoull(argv[2], 0, 10) : 100;
    for (uint64_t seed = first; seed < first + count; seed++) {
        state = seed * 0x5851f42d4c957f2du;
        if (argc > 3) fprintf(stderr, "seed %llu\n", (unsigned long long)seed);
        one();
    }
    return 0;
}
