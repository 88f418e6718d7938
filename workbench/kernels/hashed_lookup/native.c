/* Rows of tables by hashes, their sums side by side, and what goes back to them; see native.py and __init__.py.
 *
 * Some rows of ids at a time: their places are found, then their numbers are fetched, which are asked for a row ahead.
 */
#include "tile.h"

enum { TABLE, OFFSET, COUNT, SALT, FIELD, SLOT, NUMBERS };
enum { BATCH = 32 };

typedef struct {
    int64_t at[NUMBERS];
} one; /* a lookup */

/* The upper half of a product of 64 bits. */
INLINE uint64_t upper(uint64_t a, uint64_t b) { return (uint64_t)(((unsigned __int128)a * b) >> 64); }

/* x mod count for x < 2^63, with `inverse` the whole part of (2^64 - 1) / count: the quotient is one too small at most. */
INLINE uint64_t rest(uint64_t x, uint64_t count, uint64_t inverse)
{
    uint64_t left = x - upper(x, inverse) * count;
    return left >= count ? left - count : left;
}

INLINE uint64_t mixed(uint64_t x)
{
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9;
    x = (x ^ x >> 27) * 0x94D049BB133111EB;
    return x ^ x >> 31;
}

/* Places of `n` rows of ids, (n, count); -1, or the lookup of which an id is no row. */
static long places(long n, long fields, long count, const one *lookups, const int64_t *ids, int64_t *rows)
{
    for (long p = 0; p < count; p++) {
        const int64_t *at = lookups[p].at, *id = ids + at[FIELD];
        int64_t *to = rows + p;
        if (at[SALT] < 0) {
            int bad = 0;
            for (long i = 0; i < n; i++) {
                bad |= (uint64_t)id[i * fields] >= (uint64_t)at[COUNT];
                to[i * count] = (int64_t)((uint64_t)at[OFFSET] + (uint64_t)id[i * fields]);
            }
            if (bad) return p;
            continue;
        }
        uint64_t salt = 0x9E3779B97F4A7C15 * ((uint64_t)at[SALT] + 1), size = (uint64_t)at[COUNT];
        uint64_t inverse = UINT64_MAX / size;
        for (long i = 0; i < n; i++)
            to[i * count] = at[OFFSET] + (int64_t)rest(mixed((uint64_t)id[i * fields] + salt) >> 1, size, inverse);
    }
    return -1;
}

/* The lookup of which one of n rows of places is none of its own, or -1. */
static long strangers(long n, long count, const one *lookups, const int64_t *rows)
{
    for (long i = 0; i < n; i++, rows += count)
        for (long p = 0; p < count; p++)
            if ((uint64_t)rows[p] - (uint64_t)lookups[p].at[OFFSET] >= (uint64_t)lookups[p].at[COUNT]) return p;
    return -1;
}

/* out (n, slots dim) of rows of ids, and their places; of places alone where there are no ids. -1, or as `places`. */
long gather(long n, long fields, long count, long slots, long dim, int mean, const one *lookups, const int64_t *offs,
            float *const *tables, const int64_t *ids, int64_t *rows, float *out)
{
    for (long first = 0; first < n; first += BATCH) {
        long m = n - first < BATCH ? n - first : BATCH;
        int64_t *own = rows + first * count;
        long wrong = ids ? places(m, fields, count, lookups, ids + first * fields, own)
                         : strangers(m, count, lookups, own);
        if (wrong >= 0) return wrong;
        for (long i = 0; i < m; i++, own += count) {
            if (i + 1 < m)
                for (long p = 0; p < count; p++)
                    __builtin_prefetch(tables[lookups[p].at[TABLE]] + own[count + p] * dim);
            for (long slot = 0; slot < slots; slot++, out += dim) {
                long p = offs[slot], end = offs[slot + 1];
                float by = mean ? (float)(end - p) : 1;
                const float *from = tables[lookups[p].at[TABLE]] + own[p] * dim;
                if (end == p + 1) {
                    for (long j = 0; j < dim; j += LANES) store(out + j, load(from + j, dim - j), dim - j);
                    continue;
                }
                for (long j = 0; j < dim; j += LANES) {
                    vec sum = load(from + j, dim - j);
                    for (long q = p + 1; q < end; q++)
                        sum += load(tables[lookups[q].at[TABLE]] + own[q] * dim + j, dim - j);
                    store(out + j, mean ? sum / by : sum, dim - j);
                }
            }
        }
    }
    return -1;
}

/* Adds scale times the gradients (n, slots dim) to the rows that they are of. A thread of several takes every so many
 * sixteenth rows, so that each row has its own in their order. -1, or as `strangers`. */
long scatter(long thread, long threads, long n, long count, long slots, long dim, int mean, float scale,
             const one *lookups, const int64_t *offs, float *const *tables, const int64_t *rows, const float *grad)
{
    long wrong = strangers(n, count, lookups, rows);
    if (wrong >= 0) return wrong;
    for (long i = 0; i < n; i++, rows += count) {
        if (i + 1 < n)
            for (long p = 0; p < count; p++)
                __builtin_prefetch(tables[lookups[p].at[TABLE]] + rows[count + p] * dim, 1);
        for (long slot = 0; slot < slots; slot++, grad += dim) {
            float by = mean ? (float)(offs[slot + 1] - offs[slot]) : 1;
            for (long p = offs[slot]; p < offs[slot + 1]; p++) {
                if (threads > 1 && (rows[p] >> 4) % threads != thread) continue;
                float *to = tables[lookups[p].at[TABLE]] + rows[p] * dim;
                for (long j = 0; j < dim; j += LANES) {
                    vec own = load(grad + j, dim - j);
                    if (by != 1) own /= by;
                    store(to + j, load(to + j, dim - j) + own * scale, dim - j);
                }
            }
        }
    }
    return -1;
}
