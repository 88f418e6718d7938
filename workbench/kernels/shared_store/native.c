/* Weights out of a small array by a seed, and sums of weights back into it; see native.py and __init__.py.
 *
 * Up to 32 weights that share a word of signs lie beside each other in the array, but where a partition or the array
 * ends among them.
 */
#include "tile.h"

typedef uint32_t uvec __attribute__((vector_size(4 * LANES)));

#if defined(__AVX512F__)
#define COUNT {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}
#elif defined(__AVX__)
#define COUNT {0, 1, 2, 3, 4, 5, 6, 7}
#else
#define COUNT {0, 1, 2, 3}
#endif

/* Where a walk over the weights stands. */
typedef struct {
    uint64_t seed, at, part; /* the weight, and its partition */
    long m, within, place;   /* the weight in its partition, and in the array */
    uint32_t word[4];        /* the signs of the 128 weights about it */
} walk;

/* A block of Philox-4x32-10. */
static void block(uint64_t seed, uint64_t counter, uint32_t *word)
{
    uint32_t a = (uint32_t)counter, b = (uint32_t)(counter >> 32), c = 0, d = 0;
    uint32_t k = (uint32_t)seed, l = (uint32_t)(seed >> 32);
    for (int i = 0; i < 10; i++) {
        uint64_t low = (uint64_t)a * 0xD2511F53, high = (uint64_t)c * 0xCD9E8D57;
        a = (uint32_t)(high >> 32) ^ b ^ k;
        b = (uint32_t)high;
        c = (uint32_t)(low >> 32) ^ d ^ l;
        d = (uint32_t)low;
        k += 0x9E3779B9;
        l += 0xBB67AE85;
    }
    word[0] = a, word[1] = b, word[2] = c, word[3] = d;
}

static long shift(uint64_t seed, uint64_t part, long m)
{
    uint32_t word[4];
    block(seed, ((uint64_t)1 << 62) + part, word);
    return (long)(((uint64_t)(word[0] >> 1) << 32 | word[1]) % (uint64_t)m);
}

static walk begin(uint64_t seed, uint64_t at, long m)
{
    walk w = {.seed = seed, .at = at, .part = at / (uint64_t)m, .m = m, .within = (long)(at % (uint64_t)m)};
    long turned = shift(seed, w.part, m);
    w.place = turned < m - w.within ? turned + w.within : turned - (m - w.within);
    block(seed, at >> 7, w.word);
    return w;
}

INLINE long least(long a, long b) { return a < b ? a : b; }

/* How many of the next weights, `left` at most, lie beside each other; their signs from the lowest bit on. */
INLINE long stretch(const walk *w, long left, uint32_t *signs)
{
    long bit = (long)(w->at & 31);
    *signs = w->word[w->at >> 5 & 3] >> bit;
    return least(least(32 - bit, left), least(w->m - w->within, w->m - w->place));
}

INLINE void go(walk *w, long n)
{
    w->at += (uint64_t)n;
    w->within += n;
    w->place += n;
    if (!(w->at & 127)) block(w->seed, w->at >> 7, w->word);
    if (w->place == w->m) w->place = 0;
    if (w->within == w->m) {
        w->within = 0;
        w->place = shift(w->seed, ++w->part, w->m);
    }
}

/* x with the sign of each lane turned where its bit is set. */
INLINE vec turned(vec x, uint32_t signs)
{
    return (vec)((uvec)x ^ (((((uvec){0} + signs) >> (uvec)COUNT)) << 31));
}

/* The weights `at` to at + n. */
void expand(uint64_t seed, const float *memory, long m, float scale, uint64_t at, long n, float *out)
{
    walk w = begin(seed, at, m);
    for (long i = 0, k; i < n; i += k) {
        uint32_t signs;
        k = stretch(&w, n - i, &signs);
        const float *from = memory + w.place;
        for (long j = 0; j < k; j += LANES) store(out + i + j, turned(load(from + j, k - j) * scale, signs >> j), k - j);
        go(&w, k);
    }
}

/* Adds each of the values of the weights `at` to at + n to the number that it is made of. */
void fold(uint64_t seed, const float *values, long m, float scale, uint64_t at, long n, float *out)
{
    walk w = begin(seed, at, m);
    for (long i = 0, k; i < n; i += k) {
        uint32_t signs;
        k = stretch(&w, n - i, &signs);
        float *to = out + w.place;
        for (long j = 0; j < k; j += LANES)
            store(to + j, load(to + j, k - j) + turned(load(values + i + j, k - j) * scale, signs >> j), k - j);
        go(&w, k);
    }
}
