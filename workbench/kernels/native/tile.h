/* What the native paths share: a product of a few rows with a wide matrix that is kept in registers, 2^x, and counts.
 *
 * Written in the vector extensions of gcc and clang, which any processor runs; the sizes below are what fits the
 * registers of the instruction set it is compiled for. A tile is ROWS rows by VECS vectors of LANES numbers. With
 * AVX-512 a product whose operands are in the first two levels of cache takes 0.87 to 0.99 of the processor's
 * multiply-adds.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
enum { LANES = 16, VECS = 4, ROWS = 7 }; /* 32 registers of 16 */
#elif defined(__AVX__)
enum { LANES = 8, VECS = 2, ROWS = 6 }; /* 16 registers of 8 */
#elif defined(__aarch64__)
enum { LANES = 4, VECS = 4, ROWS = 7 }; /* 32 registers of 4 */
#else
enum { LANES = 4, VECS = 2, ROWS = 6 };
#endif
enum { WIDE = VECS * LANES }; /* columns of a tile */

typedef float vec __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES), aligned(4)));

#define INLINE static inline __attribute__((always_inline))

/* c[i][j] (+)= sum over k < depth of a[i][k step] b[k ldb + j], for ROWS rows i and n_vecs vectors of columns j. */
INLINE void product(const int n_vecs, long depth, const float *const *a, long step, const float *b, long ldb,
                    float *const *c, int add)
{
    vec sum[ROWS][VECS];
    const float *row[ROWS];
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++) {
        row[i] = a[i];
#pragma GCC unroll 4
        for (int j = 0; j < n_vecs; j++) sum[i][j] = (vec){0};
    }
    for (long k = 0; k < depth; k++, b += ldb) {
        vec x[VECS];
#pragma GCC unroll 4
        for (int j = 0; j < n_vecs; j++) x[j] = *(const vec *)(b + j * LANES);
#pragma GCC unroll 8
        for (int i = 0; i < ROWS; i++) {
            vec y = (vec){0} + row[i][k * step];
#pragma GCC unroll 4
            for (int j = 0; j < n_vecs; j++) sum[i][j] += x[j] * y;
        }
    }
#pragma GCC unroll 8
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int j = 0; j < n_vecs; j++) {
            vec *to = (vec *)(c[i] + j * LANES);
            *to = add ? *to + sum[i][j] : sum[i][j];
        }
}

/* The same for n columns, whole vectors. */
static __attribute__((unused)) void tile(long n, long depth, const float *const *a, long step, const float *b, long ldb,
                                         float *const *c, int add)
{
    float *at[ROWS];
    memcpy(at, c, sizeof at);
#define TAKE(n_vecs)                                                                                                   \
    {                                                                                                                  \
        product(n_vecs, depth, a, step, b, ldb, at, add);                                                              \
        for (int i = 0; i < ROWS; i++) at[i] += (n_vecs) * LANES;                                                      \
        b += (n_vecs) * LANES;                                                                                         \
        n -= (n_vecs) * LANES;                                                                                         \
    }
    while (n >= WIDE) TAKE(VECS)
#if defined(__AVX512F__) || defined(__aarch64__)
    if (n >= 3 * LANES) TAKE(3)
    if (n >= 2 * LANES) TAKE(2)
#endif
    if (n >= LANES) TAKE(1)
#undef TAKE
}

/* The first n < LANES numbers of a vector, 0 behind them. */
INLINE vec beginning(const float *from, long n)
{
    vec x = {0};
    memcpy(&x, from, 4 * n);
    return x;
}

/* A vector, or the n numbers that are left. */
INLINE vec load(const float *from, long n) { return n >= LANES ? *(const vec *)from : beginning(from, n); }

INLINE void store(float *to, vec x, long n)
{
    if (n >= LANES) *(vec *)to = x;
    else memcpy(to, &x, 4 * n);
}

typedef float quad __attribute__((vector_size(16), aligned(4)));
#if defined(__clang__) || __GNUC__ >= 12
#define MIX(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MIX(a, b, i, j, k, l) __builtin_shuffle(a, b, (__typeof__((quad){0} > 0)){i, j, k, l})
#endif

/* Four rows of four numbers, `row` apart, to four columns, whose rows are `to_row` apart. */
INLINE void transpose4(const float *from, long row, float *to, long to_row)
{
    quad a = *(const quad *)from, b = *(const quad *)(from + row);
    quad c = *(const quad *)(from + 2 * row), d = *(const quad *)(from + 3 * row);
    quad ab = MIX(a, b, 0, 4, 1, 5), cd = MIX(c, d, 0, 4, 1, 5), ef = MIX(a, b, 2, 6, 3, 7), gh = MIX(c, d, 2, 6, 3, 7);
    *(quad *)to = MIX(ab, cd, 0, 1, 4, 5);
    *(quad *)(to + to_row) = MIX(ab, cd, 2, 3, 6, 7);
    *(quad *)(to + 2 * to_row) = MIX(ef, gh, 0, 1, 4, 5);
    *(quad *)(to + 3 * to_row) = MIX(ef, gh, 2, 3, 6, 7);
}

/* a[0] + a[1], a[2] + a[3], ..., b[0] + b[1], ... */
INLINE vec pairs(vec a, vec b)
{
#if defined(__clang__)
    vec sum;
    for (int i = 0; i < LANES / 2; i++) {
        sum[i] = a[2 * i] + a[2 * i + 1];
        sum[LANES / 2 + i] = b[2 * i] + b[2 * i + 1];
    }
    return sum;
#else
    ivec even, odd;
    for (int i = 0; i < LANES; i++) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
    }
    return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
#endif
}

/* How far apart the rows of a buffer are: an odd number of cache lines, so that a column does not fall into few sets of
 * the cache. */
INLINE long pitched(long n) { return ((n + 15) / 16 | 1) * 16; }

/* a where the mask is -1, b where it is 0. */
INLINE vec where(ivec mask, vec a, vec b) { return (vec)(((ivec)a & mask) | ((ivec)b & ~mask)); }

/* The larger of two; b where one of them is NaN. */
INLINE vec larger(vec a, vec b)
{
#if defined(__AVX512F__)
    return (vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
    return where(a > b, a, b);
#endif
}

INLINE vec square_root(vec x)
{
#if defined(__AVX512F__)
    return (vec)_mm512_sqrt_ps((__m512)x);
#elif defined(__AVX__)
    return (vec)_mm256_sqrt_ps((__m256)x);
#else
    for (int i = 0; i < LANES; i++) x[i] = __builtin_sqrtf(x[i]);
    return x;
#endif
}

/* 2^x, to the last bits of float32; 2^-126 for anything below. NaN stays NaN. A polynomial through the Chebyshev nodes
 * of [-0.5, 0.5], 3e-9 off at most. */
INLINE vec power_of_two(vec x)
{
    const vec low = (vec){0} - 126.0f, high = (vec){0} + 127.9f, magic = (vec){0} + 12582912.0f; /* 1.5 * 2^23 */
    x = larger(low, x);
    x = where(x > high, high, x);
    vec rounded = x + magic; /* the integer is in the last bits of the mantissa */
    ivec whole = (ivec)rounded << 23;
    vec f = x - (rounded - magic); /* -0.5 to 0.5 */
    vec p = f * 1.546144472e-04f + 1.340042818e-03f;
    p = p * f + 9.618056678e-03f;
    p = p * f + 5.550327227e-02f;
    p = p * f + 2.402265092e-01f;
    p = p * f + 6.931472067e-01f;
    p = p * f + 1.0f;
    return (vec)((ivec)p + whole);
}

/* The sum of the lanes. */
INLINE float total(vec x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_add_ps((__m512)x);
#else
    quad parts[LANES / 4], sum;
    memcpy(parts, &x, sizeof x);
    sum = parts[0];
    for (int i = 1; i < LANES / 4; i++) sum += parts[i];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
#endif
}

/* The largest lane. */
INLINE float largest_lane(vec x)
{
#if defined(__AVX512F__)
    return _mm512_reduce_max_ps((__m512)x);
#else
    float found = x[0];
    for (int i = 1; i < LANES; i++) found = found < x[i] ? x[i] : found;
    return found;
#endif
}

enum { KEYS = 1024 }; /* at most, of a tally */

/* Counts keys by their upper half; where digit is not -1, those whose upper half it is by the lower half. Two passes so
 * find the key of any rank. n at most KEYS. */
static __attribute__((unused)) void tally(long n, const uint32_t *key, long digit, int64_t *table)
{
    enum { STEP = 32 };
    if (digit < 0) {
        for (long i = 0; i < n; i++) table[key[i] >> 16]++;
        return;
    }
    for (long i = 0; i < n; i += STEP) {
        long end = i + STEP < n ? i + STEP : n;
        int found = 0;
        for (long j = i; j < end; j++) found |= key[j] >> 16 == (uint32_t)digit;
        if (found)
            for (long j = i; j < end; j++)
                if (key[j] >> 16 == (uint32_t)digit) table[key[j] & 0xffff]++;
    }
}
