/* Max pooling of channels-last images, [n][h][w][c], bit-identical to torch, which is slow on few channels. Windows do not
   overlap; the first of equal values wins, and NaN wins over all; ReLU may follow.

   LANES channels of a pixel are processed at once, even if it has fewer: later writes, from front to back, overwrite the
   excess. The last pixels are processed value by value. */

#include <stdint.h>
#include <string.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

/* Writes out[n][oh][ow][c], and the maximum's position in its window; -1 where ReLU blocks the gradient. */
INLINE void forward(const float *x, float *out, int32_t *place, int64_t n, int64_t h, int64_t w, int64_t c, int64_t oh,
                    int64_t ow, int64_t kh, int64_t kw, int64_t relu) {
    const float *end = x + n * h * w * c, *full = out + n * oh * ow * c;
    for (int64_t r = 0; r < n * oh; r++) {
        int64_t y = r % oh * kh, rows = h - y < kh ? h - y : kh;
        const float *line = x + (r / oh * h + y) * w * c;
        for (int64_t q = 0; q < ow; q++, out += c, place += c) {
            int64_t columns = w - q * kw < kw ? w - q * kw : kw;
            const float *at = line + q * kw * c;
            int64_t last = ((rows - 1) * w + columns - 1) * c, whole = (c + LANES - 1) / LANES * LANES;
            if (at + last + whole > end || out + whole > full) {
                for (int64_t k = 0; k < c; k++) {
                    out[k] = at[k], place[k] = 0;
                    for (int64_t u = 0; u < rows; u++)
                        for (int64_t v = 0; v < columns; v++) {
                            float now = at[(u * w + v) * c + k];
                            if (now > out[k] || now != now) out[k] = now, place[k] = (int32_t)(u * kw + v);
                        }
                    if (relu && out[k] <= 0) out[k] = out[k] < 0 ? 0 : out[k], place[k] = -1;
                }
                continue;
            }
            for (int64_t k = 0; k < c; k += LANES) {
                vec most = *(const vec *)(at + k);
                ivec where = {0};
                for (int64_t u = 0; u < rows; u++)
                    for (int64_t v = 0; v < columns; v++) {
                        vec now = *(const vec *)(at + (u * w + v) * c + k);
                        ivec more = (now > most) | (now != now);
                        most = (vec)(((ivec)now & more) | ((ivec)most & ~more));
                        where = (more & (int32_t)(u * kw + v)) | (where & ~more);
                    }
                if (relu) {
                    ivec under = most < 0, no = most <= 0; /* -0 stays as it is, as in torch */
                    most = (vec)((ivec)most & ~under), where |= no;
                }
                *(vec *)(out + k) = most;
                *(ivec *)(place + k) = where;
            }
        }
    }
}

INLINE void backward(const float *d, const int32_t *place, float *dx, int64_t n, int64_t h, int64_t w, int64_t c, int64_t oh,
                     int64_t ow, int64_t kh, int64_t kw) {
    const float *end = d + n * oh * ow * c;
    for (int64_t i = 0; i < n; i++, d += oh * ow * c, place += oh * ow * c)
        for (int64_t y = 0; y < h; y++, dx += w * c) {
            if (y / kh >= oh) { /* outside all windows */
                memset(dx, 0, sizeof(float) * w * c);
                continue;
            }
            float *to = dx;
            for (int64_t q = 0; q < ow; q++)
                for (int64_t v = 0; v < kw && q * kw + v < w; v++, to += c) {
                    int64_t from = (y / kh * ow + q) * c, whole = (c + LANES - 1) / LANES * LANES;
                    int32_t which = (int32_t)(y % kh * kw + v);
                    if (d + from + whole > end) { /* so it is at the end of dx too */
                        for (int64_t k = 0; k < c; k++) to[k] = place[from + k] == which ? d[from + k] : 0;
                        continue;
                    }
                    for (int64_t k = 0; k < c; k += LANES) {
                        ivec there = *(const ivec *)(place + from + k) == which;
                        *(vec *)(to + k) = (vec)((ivec) * (const vec *)(d + from + k) & there);
                    }
                }
            memset(to, 0, sizeof(float) * (dx + w * c - to));
        }
}

void pool_forward(const float *x, float *out, int32_t *place, int64_t n, int64_t h, int64_t w, int64_t c, int64_t oh,
                  int64_t ow, int64_t kh, int64_t kw, int64_t relu) {
    if (kh == 2 && kw == 2)
        forward(x, out, place, n, h, w, c, oh, ow, 2, 2, relu);
    else if (kh == 1 && kw == 2)
        forward(x, out, place, n, h, w, c, oh, ow, 1, 2, relu);
    else
        forward(x, out, place, n, h, w, c, oh, ow, kh, kw, relu);
}

void pool_backward(const float *d, const int32_t *place, float *dx, int64_t n, int64_t h, int64_t w, int64_t c, int64_t oh,
                   int64_t ow, int64_t kh, int64_t kw) {
    if (kh == 2 && kw == 2)
        backward(d, place, dx, n, h, w, c, oh, ow, 2, 2);
    else if (kh == 1 && kw == 2)
        backward(d, place, dx, n, h, w, c, oh, ow, 1, 2);
    else
        backward(d, place, dx, n, h, w, c, oh, ow, kh, kw);
}
