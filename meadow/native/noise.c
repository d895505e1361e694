/* Normal numbers from AES-128 in counter mode, bit-identical to those of `meadow/privacy/noise.py`, which documents them.

   Every operation is exactly defined by IEEE 754 and none is contracted (-ffp-contract=off), so vectors of any width give the
   same bits. The processor's AES instructions take the same time for every key. */

#include <immintrin.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifndef __AES__
#error "this processor has no instructions for AES"
#endif

#define PAIRS 128 /* a group takes PAIRS radii, then PAIRS angles */

#if defined(__VAES__) && defined(__AVX512F__) && defined(__AVX512BW__)
typedef __m512i Blocks;
#define SPREAD(x) _mm512_broadcast_i32x4(x)
#define XOR(x, y) _mm512_xor_si512(x, y)
#define ROUND(x, key) _mm512_aesenc_epi128(x, key)
#define LAST(x, key) _mm512_aesenclast_epi128(x, key)
#else
typedef __m128i Blocks;
#define SPREAD(x) (x)
#define XOR(x, y) _mm_xor_si128(x, y)
#define ROUND(x, key) _mm_aesenc_si128(x, key)
#define LAST(x, key) _mm_aesenclast_si128(x, key)
#endif

typedef struct {
    uint8_t keys[11][16]; /* of the cipher's rounds */
    uint64_t high, low;   /* the 128-bit counter */
} Stream;

/* Round keys (FIPS 197, 5.2). */
#define EXPAND(i, constant)                                                                                            \
    do {                                                                                                               \
        __m128i more = _mm_shuffle_epi32(_mm_aeskeygenassist_si128(key, constant), 0xff);                              \
        for (int j = 0; j < 3; j++) key = _mm_xor_si128(key, _mm_slli_si128(key, 4));                                  \
        key = _mm_xor_si128(key, more);                                                                                \
        _mm_storeu_si128((__m128i *)s->keys[i], key);                                                                  \
    } while (0)

int64_t noise_size(void) { return sizeof(Stream); }
int64_t noise_pairs(void) { return PAIRS; }

/* Start with a key (16 bytes) and a counter (16 bytes, big-endian). */
void noise_open(Stream *s, const uint8_t *given, const uint8_t *counter) {
    __m128i key = _mm_loadu_si128((const __m128i *)given);
    _mm_storeu_si128((__m128i *)s->keys[0], key);
    EXPAND(1, 0x01);
    EXPAND(2, 0x02);
    EXPAND(3, 0x04);
    EXPAND(4, 0x08);
    EXPAND(5, 0x10);
    EXPAND(6, 0x20);
    EXPAND(7, 0x40);
    EXPAND(8, 0x80);
    EXPAND(9, 0x1b);
    EXPAND(10, 0x36);
    memcpy(&s->high, counter, 8);
    memcpy(&s->low, counter + 8, 8);
    s->high = __builtin_bswap64(s->high);
    s->low = __builtin_bswap64(s->low);
}

static void advance(Stream *s, uint64_t blocks) {
    s->low += blocks;
    s->high += s->low < blocks;
}

/* The next words of a group. */
static void words(Stream *s, uint32_t *out) {
    enum { ALL = 2 * PAIRS / (sizeof(Blocks) / 4), ONCE = 8, COUNT = 2 * PAIRS / 4 };
    uint64_t counters[2 * COUNT];
    for (uint64_t i = 0; i < COUNT; i++) {
        uint64_t low = s->low + i;
        counters[2 * i] = __builtin_bswap64(s->high + (low < i));
        counters[2 * i + 1] = __builtin_bswap64(low);
    }
    advance(s, COUNT);
    for (int begin = 0; begin < ALL; begin += ONCE) {
        Blocks x[ONCE];
        memcpy(x, (const Blocks *)counters + begin, sizeof x);
        for (int round = 0; round <= 10; round++) {
            Blocks key = SPREAD(_mm_loadu_si128((const __m128i *)s->keys[round]));
#pragma GCC unroll 8
            for (int i = 0; i < ONCE; i++)
                x[i] = round == 0 ? XOR(x[i], key) : round < 10 ? ROUND(x[i], key) : LAST(x[i], key);
        }
        memcpy((uint8_t *)out + begin * sizeof(Blocks), x, sizeof x);
    }
}

/* The next numbers in [0, 1), each of 53 bits of two words. */
void noise_uniform(Stream *s, double *out, int64_t count) {
    uint64_t group[PAIRS];
    for (int64_t i = 0; i < count; i++) {
        if (i % PAIRS == 0) words(s, (uint32_t *)group);
        out[i] = (double)(group[i % PAIRS] >> 11) * 0x1p-53;
    }
}

static inline float real(int32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

static inline int32_t bits(float x) {
    int32_t i;
    memcpy(&i, &x, 4);
    return i;
}

/* Turn a group of words into a group of normal numbers times the deviation. */
static void normals(const uint32_t *radii, float *restrict one, float deviation) {
    const uint32_t *angles = radii + PAIRS;
    float *other = one + PAIRS;
    for (int i = 0; i < PAIRS; i++) {
        /* u in (0, 1] is 2^e m, m near 1; ln m by a polynomial (Cephes, logf) */
        float u = (float)radii[i] * 0x1p-32f + 0x1p-33f;
        int32_t above = bits(u) - 0x3f3504f3;
        float e = (float)(above >> 23);
        float x = real((above & 0x7fffff) + 0x3f3504f3) - 1.0f;
        float z = x * x;
        float y = x * 7.0376836292E-2f + -1.1514610310E-1f;
        y = y * x + 1.1676998740E-1f;
        y = y * x + -1.2420140846E-1f;
        y = y * x + 1.4249322787E-1f;
        y = y * x + -1.6668057665E-1f;
        y = y * x + 2.0000714765E-1f;
        y = y * x + -2.4999993993E-1f;
        y = y * x + 3.3333331174E-1f;
        y = y * x * z;
        y = e * -2.12194440E-4f + y;
        y = y - z * 0.5f;
        y = y + x;
        y = e * 0.693359375f + y;
        float radius = sqrtf(y * -2.0f);

        /* an angle in (-pi/4, pi/4) (Cephes, sinf and cosf); two more bits choose the quadrant */
        int32_t word = (int32_t)angles[i];
        float t = (float)((int32_t)(angles[i] << 2) | 2) * (float)(0x1p-33 * 3.14159265358979323846);
        float q = t * t;
        float c = q * 2.443315711809948E-5f + -1.388731625493765E-3f;
        c = c * q + 4.166664568298827E-2f;
        c = c * q + -0.5f;
        c = c * q + 1.0f;
        float s = q * -1.9515295891E-4f + 8.3321608736E-3f;
        s = s * q + -1.6666654611E-1f;
        s = s * q * t + t;
        c = real(bits(c) ^ (word & INT32_MIN));
        int swap = word & 1 << 30;
        one[i] = radius * (swap ? s : c) * deviation;
        other[i] = radius * (swap ? c : s) * deviation;
    }
}

/* The next groups of normal numbers, times the deviation. */
void noise_normals(Stream *s, float *out, int64_t groups, float deviation) {
    uint32_t group[2 * PAIRS];
    for (; groups > 0; groups--, out += 2 * PAIRS) {
        words(s, group);
        normals(group, out, deviation);
    }
}
