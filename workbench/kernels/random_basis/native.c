/* Sums over a basis that a seed makes, and products with it; see native.py.
 *
 * Philox-4x32-10 for as many counters at a time as there are 64-bit lanes: the product of two words is one of them.
 */
#include "tile.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

enum { COUNTERS = LANES / 2, DRAWN = 4 * COUNTERS, BLOCK = 1024, STEP = 4 * LANES };

typedef uint64_t wide __attribute__((vector_size(4 * LANES)));
typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

#if defined(__clang__) || __GNUC__ >= 12
#define PICK(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PICK(a, b, ...) __builtin_shuffle(a, b, (wide){__VA_ARGS__})
#endif
#if defined(__AVX512F__)
#define COUNT {0, 1, 2, 3, 4, 5, 6, 7}
#define FIRST 0, 8, 1, 9, 2, 10, 3, 11
#define SECOND 4, 12, 5, 13, 6, 14, 7, 15
#elif defined(__AVX__)
#define COUNT {0, 1, 2, 3}
#define FIRST 0, 4, 1, 5
#define SECOND 2, 6, 3, 7
#else
#define COUNT {0, 1}
#define FIRST 0, 2
#define SECOND 1, 3
#endif

/* The product of the lower word of every lane with y, and of nothing else in it. */
INLINE wide times(wide x, uint32_t y)
{
#if defined(__AVX512F__)
    return (wide)_mm512_mul_epu32((__m512i)x, (__m512i)((wide){0} + y));
#elif defined(__AVX2__)
    return (wide)_mm256_mul_epu32((__m256i)x, (__m256i)((wide){0} + y));
#elif defined(__SSE2__) && !defined(__AVX__)
    return (wide)_mm_mul_epu32((__m128i)x, (__m128i)((wide){0} + y));
#else
    return (x & UINT32_MAX) * y;
#endif
}

/* Words to [-1, 1), by their upper 24 bits. */
INLINE vec number(wide words) { return __builtin_convertvector((ivec)((uvec)words >> 8), vec) * 0x1p-23f - 1.0f; }

/* The numbers 4 counter to 4 counter + DRAWN of a seed. */
INLINE void draw(uint64_t seed, uint64_t counter, float *to)
{
    wide a = (wide)COUNT + counter, b = a >> 32, c = {0}, d = {0}; /* words; what is above them in a lane is not used */
    uint32_t k = (uint32_t)seed, l = (uint32_t)(seed >> 32);
#pragma GCC unroll 10
    for (int i = 0; i < 10; i++) {
        wide low = times(a, 0xD2511F53), high = times(c, 0xCD9E8D57);
        a = (high >> 32) ^ b ^ ((wide){0} + k);
        c = (low >> 32) ^ d ^ ((wide){0} + l);
        b = high;
        d = low;
        k += 0x9E3779B9;
        l += 0xBB67AE85;
    }
    wide ab = (a & UINT32_MAX) | b << 32, cd = (c & UINT32_MAX) | d << 32;
    *(vec *)to = number(PICK(ab, cd, FIRST));
    *(vec *)(to + LANES) = number(PICK(ab, cd, SECOND));
}

/* n numbers of a seed from `at` on, the first at what is returned. `to` has room for DRAWN + 3 more. */
INLINE const float *numbers(uint64_t seed, uint64_t at, long n, float *to)
{
    long skip = (long)(at & 3);
    for (long i = 0; i < skip + n; i += DRAWN) draw(seed, at / 4 + (uint64_t)i / 4, to + i);
    return to + skip;
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* The elements first to end of sum over j < k of c[j] G_j, tensor j being the numbers start + j numel on. */
void mix(uint64_t seed, uint64_t start, long numel, long k, const float *c, long first, long end, float *out)
{
    float drawn[BLOCK + DRAWN + 4] __attribute__((aligned(64)));
    for (; first < end; first += BLOCK) {
        vec sum[BLOCK / LANES] = {{0}};
        const long width = least(BLOCK, end - first), vecs = (width + LANES - 1) / LANES;
        for (long j = 0; j < k; j++) {
            uint64_t at = start + (uint64_t)j * (uint64_t)numel + (uint64_t)first;
            const float *u = numbers(seed, at, vecs * LANES, drawn);
            vec by = (vec){0} + c[j];
            for (long v = 0; v < vecs; v++) sum[v] += by * *(const vec *)(u + v * LANES);
        }
        memcpy(out + first, sum, 4 * (size_t)width);
    }
}

/* Adds to out[j] the product of x with tensor j, for first <= j < end. */
void products(uint64_t seed, uint64_t start, long numel, const float *x, long first, long end, double *out)
{
    float drawn[BLOCK + DRAWN + 4] __attribute__((aligned(64))), given[BLOCK] __attribute__((aligned(64)));
    for (long i = 0; i < numel; i += BLOCK) {
        const long width = least(BLOCK, numel - i), whole = (width + STEP - 1) / STEP * STEP;
        memcpy(given, x + i, 4 * (size_t)width);
        memset(given + width, 0, 4 * (size_t)(whole - width));
        for (long j = first; j < end; j++) {
            uint64_t at = start + (uint64_t)j * (uint64_t)numel + (uint64_t)i;
            const float *u = numbers(seed, at, whole, drawn);
            vec sum[4] = {{0}};
            for (long v = 0; v < whole; v += STEP)
#pragma GCC unroll 4
                for (int w = 0; w < 4; w++)
                    sum[w] += *(const vec *)(given + v + w * LANES) * *(const vec *)(u + v + w * LANES);
            out[j] += (double)total((sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
    }
}
