/* Models trimmed, elected and averaged in one pass, and the order statistics of magnitudes; see native.py.
 *
 * Every operation is that of reference.py, in its order: no product is joined with a sum.
 */
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "tile.h"

enum { SPAN = 4 }; /* vectors taken at a time: four cache lines of every model */

/* What is to be done with n models. vote, the factor of each in the election, is NULL where there is none; share, what
 * a survivor adds to the divisor, is NULL where that is the same everywhere. */
typedef struct {
    long n;
    const float *const *expert;
    const float *base, *weight, *threshold, *vote, *share;
    float divisor, scale;
    float *out;
} job;

INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE vec all(float x) { return (vec){0} + x; }

/* The numbers from at, of which there are `left` in the last of the vectors. */
INLINE void part(const job *k, long at, long left, const int vecs, const int based, const int elects, const int shares,
                 const int trims)
{
    vec origin[SPAN], sum[SPAN], divisor[SPAN];
    ivec negative[SPAN];
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        origin[v] = based ? load(k->base + at + v * LANES, left) : all(0);
        sum[v] = divisor[v] = all(0);
    }
#define EACH                                                                                                           \
    _Pragma("GCC unroll 4") for (int v = 0; v < vecs; v++)                                                            \
    {                                                                                                                  \
        vec x = load(k->expert[i] + at + v * LANES, left), tau = based ? x - origin[v] : x;                            \
        ivec kept = trims ? ~(ivec)(magnitude(tau) < all(k->threshold[i])) : (ivec){0} - 1; /* NaN stays */
    if (elects) {
        for (long i = 0; i < k->n; i++) EACH
            sum[v] += where(kept, tau * all(k->vote[i]), all(0));
        }
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) {
            negative[v] = (ivec)(sum[v] < all(0));
            sum[v] = all(0);
        }
    }
    for (long i = 0; i < k->n; i++) EACH
        if (elects) kept &= (ivec)(tau != all(0)) & ~((negative[v] & (ivec)(tau > all(0))) | (~negative[v] & (ivec)(tau < all(0))));
        sum[v] += where(kept, all(k->weight[i]) * tau, all(0));
        if (shares) divisor[v] += where(kept, all(k->share[i]), all(0));
    }
#undef EACH
#pragma GCC unroll 4
    for (int v = 0; v < vecs; v++) {
        vec by = shares ? where((ivec)(divisor[v] == all(0)), all(1), divisor[v]) : all(k->divisor);
        vec merged = all(k->scale) * (sum[v] / by);
        store(k->out + at + v * LANES, based ? origin[v] + merged : merged, left);
    }
}

INLINE void span(const job *k, long first, long end, const int based, const int elects, const int shares, const int trims)
{
    for (; first + SPAN * LANES <= end; first += SPAN * LANES) part(k, first, LANES, SPAN, based, elects, shares, trims);
    for (; first < end; first += LANES) part(k, first, end - first, 1, based, elects, shares, trims);
}

/* The numbers first to end of the merge. */
void merge(const job *k, long first, long end)
{
    switch ((k->base != NULL) + 2 * (k->vote != NULL) + 4 * (k->share != NULL) + 8 * (k->threshold != NULL)) {
#define CASE(mode)                                                                                                     \
    case mode: span(k, first, end, (mode) & 1, (mode) >> 1 & 1, (mode) >> 2 & 1, (mode) >> 3); break;
        CASE(0) CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
        CASE(8) CASE(9) CASE(10) CASE(11) CASE(12) CASE(13) CASE(14) CASE(15)
#undef CASE
    }
}

/* Counts magnitudes |x - base| in table by their first 15 bits, or where digit is not -1 those that begin with it by
 * the other 16. Returns the bits of the largest, beyond infinity's if one is NaN. */
long count(long n, const float *x, const float *base, long digit, int64_t *table)
{
    int32_t key[KEYS] __attribute__((aligned(64))), most = 0;
    for (long i = 0; i < n; i += KEYS) {
        long left = n - i < KEYS ? n - i : KEYS;
        for (long j = 0; j < left; j += LANES) {
            vec d = load(x + i + j, left - j);
            if (base) d -= load(base + i + j, left - j);
            *(ivec *)(key + j) = (ivec)magnitude(d);
        }
        tally(left, (const uint32_t *)key, digit, table);
        if (digit < 0)
            for (long j = 0; j < left; j++) most = key[j] > most ? key[j] : most;
    }
    return most;
}
