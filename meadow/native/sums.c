/* Weighted sum of trained models, bit-identical to the NumPy code in `sums.py`: each product and each sum is rounded
   separately (-ffp-contract=off), in the clients' order. */

#include <float.h>
#include <math.h>
#include <stdint.h>

enum { AT_ONCE = 2048 }; /* values of the sum that stay in the L1 cache while all clients are added */

int add_up(double *restrict total, const float *const *works, const double *weights, int64_t clients, int64_t begin,
           int64_t end, int first) {
    int wrong = 0;
    for (int64_t at = begin; at < end; at += AT_ONCE) {
        int64_t count = end - at < AT_ONCE ? end - at : AT_ONCE;
        double *restrict to = total + at;
        for (int64_t k = 0; k < clients; k++) {
            const float *restrict what = works[k] + at;
            double weight = weights[k];
            if (first && k == 0)
                for (int64_t i = 0; i < count; i++) {
                    wrong |= !(fabsf(what[i]) <= FLT_MAX);
                    to[i] = weight * (double)what[i];
                }
            else
                for (int64_t i = 0; i < count; i++) {
                    wrong |= !(fabsf(what[i]) <= FLT_MAX);
                    to[i] += weight * (double)what[i];
                }
        }
    }
    return !wrong;
}
