/* Block-sparse attention and its gate, one head at a time; see native.py.
 *
 * Letters: N tokens, d head width, M blocks of B tokens. A column is a block with the queries that chose it, `rows`
 * ascending, so that the block's own queries are the first. Scores are to base 2. A block's keys and values are packed
 * once and stay in the second level of cache while its queries pass in tiles of ROWS.
 */
#include "tile.h"
#include <math.h>

enum { STRIP = 8 * ROWS }; /* queries whose probabilities are kept for the gradients of keys and values */

/* (tokens, width) numbers of one head in a tensor: how far apart its rows and the numbers of a row are. */
typedef struct {
    float *at;
    long row, step;
} matrix;

/* Which queries attend to which block: of one head, but for the tokens of each block. */
typedef struct {
    long n_tokens, n_blocks, size;
    const int32_t *starts, *lengths, *rows;
    const int64_t *offs;
} columns;

/* Scratch memory in pieces that begin on cache lines. */
static float *piece(float **scratch, long n)
{
    float *at = *scratch;
    *scratch += (n + 15) / 16 * 16;
    return at;
}

/* Rounded up so far that every panel is whole, and every piece ends where the next may begin. */
static long pitched(long n) { return (n + 63) / 64 * 64; }

/* to (rows, pitch) = factor * x. */
static void pack(matrix x, long first, long rows, long width, float factor, float *to, long pitch)
{
    for (long i = 0; i < rows; i++) {
        const float *row = x.at + (first + i) * x.row;
        if (x.step == 1)
            for (long j = 0; j < width; j++) to[i * pitch + j] = factor * row[j];
        else
            for (long j = 0; j < width; j++) to[i * pitch + j] = factor * row[j * x.step];
    }
}

/* to = factor * x transposed, in panels (width, WIDE), which a product reads from one end to the other. */
static void pack_transposed(matrix x, long first, long rows, long width, float factor, float *to)
{
    for (long i = 0; i < rows; i++) {
        float *column = to + i / WIDE * WIDE * width + i % WIDE;
        for (long j = 0; j < width; j++) column[j * WIDE] = factor * x.at[(first + i) * x.row + j * x.step];
    }
}

/* p (ROWS, pitch) = a times the first n columns of such panels, and what else is in the last vector. */
static void times_panels(long n, long width, const float *const *a, long step, const float *panels, float *p, long pitch)
{
    float *to[ROWS];
    for (long j = 0; j < n; j += WIDE) {
        for (long i = 0; i < ROWS; i++) to[i] = p + i * pitch + j;
        long left = (n - j + LANES - 1) / LANES * LANES;
        tile(left < WIDE ? left : WIDE, width, a, step, panels + j * width, WIDE, to, 0);
    }
}

/* ROWS queries of a column: their tokens, and how many of the block's keys each sees. Beyond the column's end the last
 * query stands again, with n < ROWS. */
typedef struct {
    long n, most, token[ROWS], seen[ROWS];
} queries;

static queries next_queries(columns c, long block, long at, long end)
{
    queries found = {.n = end - at < ROWS ? end - at : ROWS};
    long start = c.starts[block], length = c.lengths[block];
    for (long i = 0; i < ROWS; i++) {
        long token = c.rows[at + (i < found.n ? i : found.n - 1)];
        found.token[i] = token;
        found.seen[i] = token < start + length ? token - start + 1 : length;
        found.most = found.seen[i] > found.most ? found.seen[i] : found.most;
    }
    return found;
}

/* p[j] = 2^(p[j] - minus) for j < seen, 0 from there to a whole vector; their sum. */
static float powers(float *p, long seen, float minus)
{
    vec sum = {0};
    for (long j = 0; j < seen; j += LANES) {
        vec x = power_of_two(*(vec *)(p + j) - minus);
        for (long i = seen - j; i < LANES; i++) x[i] = 0;
        *(vec *)(p + j) = x;
        sum += x;
    }
    return total(sum);
}

/* 0 from `seen`, or the whole vector behind it, to n. */
static void clear(float *p, long seen, long n)
{
    for (long j = (seen + LANES - 1) / LANES * LANES; j < n; j++) p[j] = 0;
}

/* The rows that the next tile reads are on their way while this one is computed: they lie all over the matrix. */
static void prefetch(columns c, long at, long end, matrix x, long width)
{
    for (long i = at; i < at + ROWS && i < end; i++)
        for (long j = 0; j < width; j += 16) __builtin_prefetch(x.at + c.rows[i] * x.row + j * x.step);
}

/* The largest of n numbers; those from there to whole vectors are overwritten. */
static float largest(float *p, long n)
{
    for (long j = n; j % LANES; j++) p[j] = -INFINITY;
    vec most = *(vec *)p;
    for (long j = LANES; j < n; j += LANES) most = larger(most, *(vec *)(p + j));
    return largest_lane(most);
}

/* Output and L of one head. Returns 1 where there is no memory. */
int forward(columns c, long d, float scale, matrix q, matrix k, matrix v, matrix out, matrix lse)
{
    long pitch = pitched(c.size), width = pitched(d);
    float *memory = aligned_alloc(64, 4 * (d * pitch + c.size * width + ROWS * pitch + width + 2 * pitched(c.n_tokens)));
    if (!memory) return 1;
    float *scratch = memory, *keys = piece(&scratch, d * pitch), *values = piece(&scratch, c.size * width);
    float *p = piece(&scratch, ROWS * pitch), *spare = piece(&scratch, width);
    float *sum = piece(&scratch, c.n_tokens), *top = piece(&scratch, c.n_tokens);
    const float *q_rows[ROWS], *p_rows[ROWS];
    float *out_rows[ROWS];
    for (long i = 0; i < ROWS; i++) p_rows[i] = p + i * pitch;
    for (long t = 0; t < c.n_tokens; t++) {
        memset(out.at + t * out.row, 0, 4 * d);
        sum[t] = 0;
        top[t] = -INFINITY;
    }
    for (long block = 0; block < c.n_blocks; block++) {
        long at = c.offs[block], end = c.offs[block + 1];
        if (at == end) continue;
        pack_transposed(k, c.starts[block], c.lengths[block], d, scale * (float)M_LOG2E, keys);
        pack(v, c.starts[block], c.lengths[block], d, 1, values, width);
        for (; at < end; at += ROWS) {
            queries mine = next_queries(c, block, at, end);
            prefetch(c, at + ROWS, end, q, d);
            prefetch(c, at + ROWS, end, out, d);
            for (long i = 0; i < ROWS; i++) {
                q_rows[i] = q.at + mine.token[i] * q.row;
                out_rows[i] = i < mine.n ? out.at + mine.token[i] * out.row : spare;
            }
            times_panels(mine.most, d, q_rows, q.step, keys, p, pitch);
            for (long i = 0; i < mine.n; i++) {
                long t = mine.token[i];
                float *row = p + i * pitch, higher = largest(row, mine.seen[i]);
                if (higher > top[t]) {
                    float factor = exp2f(top[t] - higher);
                    for (long j = 0; j < d; j++) out_rows[i][j] *= factor;
                    sum[t] *= factor;
                    top[t] = higher;
                }
                sum[t] += powers(row, mine.seen[i], top[t]);
                clear(row, mine.seen[i], mine.most);
            }
            tile(d, mine.most, p_rows, 1, values, width, out_rows, 1);
        }
    }
    for (long t = 0; t < c.n_tokens; t++) {
        for (long j = 0; j < d; j++) out.at[t * out.row + j] /= sum[t];
        lse.at[t * lse.row] = (log2f(sum[t]) + top[t]) * (float)M_LN2;
    }
    free(memory);
    return 0;
}

/* (size, width) gradients of a block, added up over its queries: sum (+)= p' x for the queries of a strip. */
static void add_products(long size, long n, const float *p, long pitch, const float *x, long width, float *sum,
                         float *spare)
{
    const float *column[ROWS];
    float *to[ROWS];
    for (long j = 0; j < size; j += ROWS) {
        for (long i = 0; i < ROWS; i++) {
            column[i] = p + (j + i < size ? j + i : j);
            to[i] = j + i < size ? sum + (j + i) * width : spare;
        }
        tile(width, n, column, pitch, x, width, to, 1);
    }
}

/* Gradients of one head: with P = 2^(S - L), dV = P' dO, dS = P (dO V' - delta), dK = dS' Q and dQ = dS K, where delta
 * is the product of the output and its gradient. Those of keys and values are added to what is there: other query heads
 * may have had the same ones. Returns 1 where there is no memory. */
int backward(columns c, long d, float scale, matrix q, matrix k, matrix v, matrix out, matrix lse, matrix grad,
             matrix dq, matrix dk, matrix dv)
{
    long pitch = pitched(c.size), width = pitched(d);
    float *memory = aligned_alloc(64, 4 * (2 * d * pitch + 3 * c.size * width + 2 * STRIP * (pitch + width) + width +
                                           pitched(c.n_tokens)));
    if (!memory) return 1;
    float *scratch = memory, *keys_t = piece(&scratch, d * pitch), *values_t = piece(&scratch, d * pitch);
    float *keys = piece(&scratch, c.size * width), *d_keys = piece(&scratch, c.size * width);
    float *d_values = piece(&scratch, c.size * width), *p = piece(&scratch, STRIP * pitch);
    float *ds = piece(&scratch, STRIP * pitch), *q_strip = piece(&scratch, STRIP * width);
    float *grad_strip = piece(&scratch, STRIP * width), *spare = piece(&scratch, width);
    float *delta = piece(&scratch, c.n_tokens);
    for (long t = 0; t < c.n_tokens; t++) {
        memset(dq.at + t * dq.row, 0, 4 * d);
        delta[t] = 0;
        for (long j = 0; j < d; j++) delta[t] += out.at[t * out.row + j * out.step] * grad.at[t * grad.row + j * grad.step];
    }
    memset(q_strip, 0, 4 * STRIP * width);
    memset(grad_strip, 0, 4 * STRIP * width);
    for (long block = 0; block < c.n_blocks; block++) {
        long at = c.offs[block], end = c.offs[block + 1], start = c.starts[block], length = c.lengths[block];
        if (at == end) continue;
        pack_transposed(k, start, length, d, scale * (float)M_LOG2E, keys_t);
        pack_transposed(v, start, length, d, 1, values_t);
        pack(k, start, length, d, scale, keys, width);
        memset(d_keys, 0, 4 * c.size * width);
        memset(d_values, 0, 4 * c.size * width);
        for (; at < end; at += STRIP) {
            long rows = 0, most = 0;
            for (; rows < STRIP && at + rows < end; rows += ROWS) {
                queries mine = next_queries(c, block, at + rows, end);
                prefetch(c, at + rows + ROWS, end, q, d);
                prefetch(c, at + rows + ROWS, end, grad, d);
                prefetch(c, at + rows + ROWS, end, dq, d);
                const float *q_rows[ROWS], *grad_rows[ROWS], *ds_rows[ROWS];
                float *dq_rows[ROWS];
                for (long i = 0; i < ROWS; i++) {
                    long r = rows + i;
                    pack(q, mine.token[i], 1, d, 1, q_strip + r * width, width);
                    pack(grad, mine.token[i], 1, d, 1, grad_strip + r * width, width);
                    q_rows[i] = q_strip + r * width;
                    grad_rows[i] = grad_strip + r * width;
                    ds_rows[i] = ds + r * pitch;
                    dq_rows[i] = i < mine.n ? dq.at + mine.token[i] * dq.row : spare;
                }
                times_panels(mine.most, d, q_rows, 1, keys_t, p + rows * pitch, pitch);
                times_panels(mine.most, d, grad_rows, 1, values_t, ds + rows * pitch, pitch);
                for (long i = 0; i < ROWS; i++) {
                    long t = mine.token[i], seen = i < mine.n ? mine.seen[i] : 0;
                    float *p_row = p + (rows + i) * pitch, *ds_row = ds + (rows + i) * pitch;
                    powers(p_row, seen, lse.at[t * lse.row] * (float)M_LOG2E);
                    for (long j = 0; j < seen; j += LANES) {
                        vec x = (*(vec *)(ds_row + j) - delta[t]) * *(vec *)(p_row + j);
                        for (long l = seen - j; l < LANES; l++) x[l] = 0;
                        *(vec *)(ds_row + j) = x;
                    }
                    clear(p_row, seen, length);
                    clear(ds_row, seen, length);
                }
                tile(d, mine.most, ds_rows, 1, keys, width, dq_rows, 1);
                most = mine.most > most ? mine.most : most;
            }
            add_products(most, rows, p, pitch, grad_strip, width, d_values, spare);
            add_products(most, rows, ds, pitch, q_strip, width, d_keys, spare);
        }
        for (long i = 0; i < length; i++)
            for (long j = 0; j < d; j++) {
                dk.at[(start + i) * dk.row + j * dk.step] += scale * d_keys[i * width + j];
                dv.at[(start + i) * dv.row + j * dv.step] += d_values[i * width + j];
            }
    }
    free(memory);
    return 0;
}

/* Whether a score comes before another: NaN first, as in a sort of torch; equal ones stay in their order. */
INLINE int before(float a, float b) { return a > b || (a != a && b == b); }

/* The places of the `count` largest of n scores by insertion, ascending; of equal ones the first. */
static void insert(const float *score, long n, long count, float *best, int32_t *place)
{
    for (long j = 0; j < n; j++) {
        if (j >= count && !before(score[j], best[count - 1])) continue;
        long i = j < count ? j : count - 1;
        for (; i > 0 && before(score[j], best[i - 1]); i--) {
            best[i] = best[i - 1];
            place[i] = place[i - 1];
        }
        best[i] = score[j];
        place[i] = j;
    }
    for (long j = 1; j < count; j++) {
        int32_t moved = place[j];
        long i = j;
        for (; i > 0 && place[i - 1] > moved; i--) place[i] = place[i - 1];
        place[i] = moved;
    }
}

/* The same: the next smaller score is found `count` times, without a branch that depends on it. Where equal scores,
 * infinite ones or NaN make the last not the right edge, by insertion. Overwrites what is behind the scores up to a
 * vector; `place` has room for n and one more. */
static void choose(float *score, long n, long count, float *best, int32_t *place)
{
    const vec least = (vec){0} - INFINITY;
    float edge = INFINITY;
    for (long j = n; j % LANES; j++) score[j] = -INFINITY;
    for (long i = 0; i < count; i++) {
        vec next = least;
        for (long j = 0; j < n; j += LANES) {
            vec x = *(vec *)(score + j);
            next = larger(next, where(x < edge, x, least));
        }
        edge = largest_lane(next);
    }
    long found = 0;
    for (long j = 0; j < n; j++) {
        place[found] = j;
        found += score[j] >= edge;
    }
    if (found != count) insert(score, n, count, best, place);
}

/* The blocks of one head, (N, K) each `blocks_row` apart: the query's own and the K - 1 of `first` to its own whose mean
 * key has the largest product with it. Then the choices by block: `counts` of each, the query of each choice, ascending
 * within a block, and in `pair` where it is, counted from `base`; -1 for no choice. Returns 1 where there is no memory. */
int gate(long n_tokens, long d, long n_blocks, long top_k, matrix q, matrix k, const int32_t *starts,
         const int32_t *lengths, const int32_t *own, const int32_t *first, int32_t base, int32_t *blocks,
         int32_t *pair, long blocks_row, int32_t *rows, int64_t *counts)
{
    long pitch = pitched(n_blocks);
    float *memory = aligned_alloc(64, 4 * (d * pitch + ROWS * (pitch + 64) + pitched(d) + pitched(top_k) + 4 * pitched(n_blocks + 1)));
    if (!memory) return 1;
    float *scratch = memory, *means = piece(&scratch, d * pitch), *score = piece(&scratch, ROWS * (pitch + 64));
    float *mean = piece(&scratch, d), *best = piece(&scratch, top_k);
    int64_t *next = (int64_t *)piece(&scratch, 2 * n_blocks);
    int32_t *place = (int32_t *)piece(&scratch, n_blocks + 1);
    for (long block = 0; block < n_blocks; block++) {
        memset(mean, 0, 4 * d);
        for (long i = 0; i < lengths[block]; i++)
            for (long j = 0; j < d; j++) mean[j] += k.at[(starts[block] + i) * k.row + j * k.step];
        for (long j = 0; j < d; j++) means[(block / WIDE * d + j) * WIDE + block % WIDE] = mean[j] / lengths[block];
        counts[block] = 0;
    }
    for (long at = 0; at < n_tokens; at += ROWS) {
        const float *q_rows[ROWS];
        long n = n_tokens - at < ROWS ? n_tokens - at : ROWS, low = first[at] / WIDE * WIDE;
        for (long i = 0; i < ROWS; i++) q_rows[i] = q.at + (at + (i < n ? i : 0)) * q.row;
        times_panels(own[at + n - 1] - low, d, q_rows, q.step, means + low * d, score, pitch + 64);
        for (long i = 0; i < n; i++) {
            long t = at + i, from = first[t], earlier = own[t] - from, count = earlier < top_k ? earlier : top_k - 1;
            int32_t *mine = blocks + t * blocks_row;
            if (earlier > count) choose(score + i * (pitch + 64) + from - low, earlier, count, best, place);
            for (long j = 0; j < count; j++) counts[mine[j] = from + (earlier > count ? place[j] : j)]++;
            counts[mine[count] = own[t]]++;
            for (long j = count + 1; j < top_k; j++) mine[j] = -1;
        }
    }
    for (long block = 0, before_it = 0; block < n_blocks; block++) {
        next[block] = before_it;
        before_it += counts[block];
    }
    for (long t = 0; t < n_tokens; t++)
        for (long j = 0; j < top_k; j++) {
            int32_t block = blocks[t * blocks_row + j];
            pair[t * blocks_row + j] = block < 0 ? -1 : base + next[block];
            if (block >= 0) rows[next[block]++] = t;
        }
    free(memory);
    return 0;
}
