/* Merging by parameter competition, a few hundred parameters of all models at a time; see native.py.
 *
 * Scores are made anew in each of the passes, by one function, and so the same each time: they take less time to make
 * than to bring from memory.
 */
#include "tile.h"

enum { BLOCK = 256, MOST = 64 }; /* parameters at a time, models at most */

/* n models. Of each: low and high, between which magnitudes are clipped, per = 1 / (high - low), and to merge least, the
 * score of the rank that drops, full = 1 / (largest - least), and scale. per and full are 0 where that divides nothing. */
typedef struct {
    long n;
    const float *const *expert;
    const float *base, *low, *high, *per, *least, *full, *scale;
    float *out;
} job;

typedef struct {
    float clipped[MOST][BLOCK], place[MOST][BLOCK], score[MOST][BLOCK];
} block;

INLINE vec all(float x) { return (vec){0} + x; }
INLINE vec magnitude(vec x) { return (vec)((ivec)x & 0x7fffffff); }
INLINE vec signed_as(vec x, vec sign) { return (vec)((ivec)x | ((ivec)sign & INT32_MIN)); }

/* The product, rounded: a compiler that joins it with the sum it goes into leaves the rounding of one of two opposite
 * products in their sum, which is a score of 0, and it is scores near 0 that are stretched. */
INLINE vec rounded(vec x)
{
#if defined(__AVX512F__)
    __asm__("" : "+v"(x));
#elif defined(__SSE__)
    __asm__("" : "+x"(x));
#elif defined(__aarch64__)
    __asm__("" : "+w"(x));
#endif
    return x;
}

/* tanh of -1 to 1: a polynomial in x^2 through the Chebyshev nodes, 5e-9 off at most, and what rounding adds. */
INLINE vec tanh_of(vec x)
{
    vec u = x * x;
    vec p = u * -3.523280939e-04f + 2.278647663e-03f;
    p = p * u + -7.912485055e-03f;
    p = p * u + 2.146141015e-02f;
    p = p * u + -5.386970672e-02f;
    p = p * u + 1.333213931e-01f;
    p = p * u + -3.333327738e-01f;
    p = p * u + 9.999999956e-01f;
    return rounded(p * x);
}

/* The clipped differences of `width` parameters and their scores. */
static __attribute__((noinline)) void scores(const job *k, long at, long width, block *b)
{
    const float steep = 1.44269504f * k->n; /* exp(n (g^2 - 1)) as a power of two */
    for (long v = 0; v < width; v += LANES) {
        long left = width - v;
        vec origin = k->base ? load(k->base + at + v, left) : all(0);
        for (long i = 0; i < k->n; i++) {
            vec tau = load(k->expert[i] + at + v, left) - origin, size = magnitude(tau), low = all(k->low[i]);
            size = where((ivec)(size < low), low, size);
            size = where((ivec)(size > all(k->high[i])), all(k->high[i]), size);
            *(vec *)(b->clipped[i] + v) = where((ivec)(tau == all(0)), all(0), signed_as(size, tau));
            *(vec *)(b->place[i] + v) = signed_as((size - low) * all(k->per[i]), tau);
            *(vec *)(b->score[i] + v) = all(0);
        }
        for (long i = 0; i < k->n; i++) {
            vec g = *(const vec *)(b->place[i] + v), sum = *(const vec *)(b->score[i] + v) + tanh_of(g * g);
            for (long j = i + 1; j < k->n; j++) {
                vec both = tanh_of(g * *(const vec *)(b->place[j] + v));
                sum += both;
                *(vec *)(b->score[j] + v) += both;
            }
            *(vec *)(b->score[i] + v) = sum * power_of_two((g * g - 1.0f) * all(steep));
        }
    }
}

/* Counts the scores of parameters first to end in table (n, 65536), by the upper half of their keys, or with digits
 * those that begin with their model's digit by the lower half. largest (n) grows to the largest score seen. */
void count(const job *k, long first, long end, const int64_t *digits, int64_t *table, float *largest)
{
    block b;
    for (; first < end; first += BLOCK) {
        long width = end - first < BLOCK ? end - first : BLOCK;
        scores(k, first, width, &b);
        for (long i = 0; i < k->n; i++) {
            uint32_t key[BLOCK];
            for (long j = 0; j < width; j++) {
                float score = b.score[i][j] + 0.0f; /* -0 is 0 */
                int32_t bits;
                memcpy(&bits, &score, 4);
                key[j] = (uint32_t)(bits ^ ((bits >> 31) | INT32_MIN)); /* rises with the score */
                largest[i] = score > largest[i] ? score : largest[i];
            }
            tally(width, key, digits ? digits[i] : -1, table + i * 65536);
        }
    }
}

/* The parameters first to end of the merged model. */
void merge(const job *k, long first, long end)
{
    block b;
    for (; first < end; first += BLOCK) {
        long width = end - first < BLOCK ? end - first : BLOCK;
        scores(k, first, width, &b);
        for (long v = 0; v < width; v += LANES) {
            vec sum = all(0), shares = all(0);
            for (long i = 0; i < k->n; i++) {
                vec score = *(const vec *)(b.score[i] + v), least = all(k->least[i]);
                vec share = where((ivec)(score > least), (score - least) * all(k->full[i]), all(0));
                sum += share * all(k->scale[i]) * *(const vec *)(b.clipped[i] + v);
                shares += share;
            }
            vec merged = sum / where((ivec)(shares > all(0)), shares, all(1)); /* 0 where nothing is left */
            if (k->base) merged += load(k->base + first + v, width - v);
            store(k->out + first + v, merged, width - v);
        }
    }
}
