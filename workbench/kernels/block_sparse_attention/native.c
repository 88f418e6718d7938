/* Block-sparse attention and its gate, one head at a time; see native.py.
 *
 * Letters: N tokens, d head width, M blocks of B tokens. A column is a block with the queries that chose it, `rows`
 * ascending, so that the block's own queries are the first. Scores are to base 2. A head's queries lie together, and a
 * block's keys and values stay in the cache while its queries pass in tiles of ROWS.
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

/* Whether the blocks cut the tokens into pieces of at most `size`, empty ones last, and offs rises from 0. */
int fit(columns c, long heads, long n_choices)
{
    long end = 0;
    for (long j = 0; j < c.n_blocks; j++) {
        if (c.starts[j] != end || c.lengths[j] < 0 || c.lengths[j] > c.size) return 0;
        if (!c.lengths[j] && end < c.n_tokens) return 0;
        end += c.lengths[j];
    }
    if (end != c.n_tokens || c.offs[0] != 0 || c.offs[heads * c.n_blocks] > n_choices) return 0;
    for (long j = 0; j < heads * c.n_blocks; j++)
        if (c.offs[j] > c.offs[j + 1]) return 0;
    for (long i = c.offs[heads * c.n_blocks]; i < n_choices; i++)
        if (c.rows[i] != -1) return 0;
    return 1;
}

/* Whether the columns of a head hold the queries that chose them, and the choices are ascending, the own block the
 * last, -1 behind it: `blocks` and `pair` (N, K), their rows `blocks_row` apart. With that and `fit` nothing is read or
 * written that is not there. Returns -1 where there is no memory. */
int fits(columns c, long top_k, const int32_t *blocks, const int32_t *pair, long blocks_row)
{
    int64_t *next = malloc(8 * (c.n_blocks + 1));
    if (!next) return -1;
    memcpy(next, c.offs, 8 * (c.n_blocks + 1));
    long own = 0, good = 1;
    for (long t = 0; t < c.n_tokens && good; t++, blocks += blocks_row, pair += blocks_row) {
        long last = -1, j = 0;
        own += t == c.starts[own] + c.lengths[own];
        for (; j < top_k && last < own; j++) {
            long block = blocks[j], at;
            good = block > last && block <= own && (at = next[block]++) < c.offs[block + 1] && c.rows[at] == t &&
                   pair[j] == at;
            if (!good) break;
            last = block;
        }
        good = good && last == own;
        for (; j < top_k && good; j++) good = blocks[j] == -1 && pair[j] == -1;
    }
    for (long j = 0; j < c.n_blocks && good; j++) good = next[j] == c.offs[j + 1];
    free(next);
    return good;
}

/* Whole vectors, and whole cache lines of 16. */
static long padded(long n) { return (n + 15) / 16 * 16; }

/* Whole panels, on any processor. */
static long paneled(long n) { return (n + 63) / 64 * 64; }

/* The next n numbers of scratch memory. */
static float *piece(float **scratch, long n)
{
    float *at = *scratch;
    *scratch += padded(n);
    return at;
}

/* to (rows, pitch) = factor * x, with zeros behind each row. */
static void pack(matrix x, long first, long rows, long width, float factor, float *to, long pitch)
{
    for (long i = 0; i < rows; i++) {
        const float *row = x.at + (first + i) * x.row;
        float *packed = to + i * pitch;
        if (x.step == 1)
            for (long j = 0; j < width; j++) packed[j] = factor * row[j];
        else
            for (long j = 0; j < width; j++) packed[j] = factor * row[j * x.step];
        for (long j = width; j < pitch; j++) packed[j] = 0;
    }
}

/* x (+)= factor * from (rows, pitch). */
static void unpack(const float *from, long pitch, float factor, matrix x, long first, long rows, long width, int add)
{
    for (long i = 0; i < rows; i++, from += pitch) {
        float *row = x.at + (first + i) * x.row;
        if (x.step == 1 && !add)
            for (long j = 0; j < width; j++) row[j] = factor * from[j];
        else
            for (long j = 0; j < width; j++) row[j * x.step] = (add ? row[j * x.step] : 0) + factor * from[j];
    }
}

/* to = x transposed, in panels (width, WIDE), which a product reads from one end to the other. */
static void pack_transposed(matrix x, long first, long rows, long width, float *to)
{
    for (long i = 0; i < rows; i++) {
        float *column = to + i / WIDE * WIDE * width + i % WIDE;
        for (long j = 0; j < width; j++) column[j * WIDE] = x.at[(first + i) * x.row + j * x.step];
    }
}

/* p (ROWS, pitch) = a times the first n columns of such panels, and what else is in the last vector. */
static void times_panels(long n, long width, const float *const *a, long step, const float *panels, float *p, long pitch)
{
    float *to[ROWS];
    for (long j = 0; j < n; j += WIDE) {
        for (long i = 0; i < ROWS; i++) to[i] = p + i * pitch + j;
        long left = padded(n - j);
        tile(left < WIDE ? left : WIDE, width, a, step, panels + j * width, WIDE, to, 0);
    }
}

/* ROWS queries of a column: their tokens, and how many of the block's keys each sees. Beyond the column's end, n, the
 * last query stands again. */
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

/* ds[j] = p[j] (dp[j] - delta) in the place of dp, for as many. */
static void softmax_gradient(const float *p, float *dp, long seen, float delta)
{
    for (long j = 0; j < seen; j += LANES) {
        vec x = (*(vec *)(dp + j) - delta) * *(const vec *)(p + j);
        for (long i = seen - j; i < LANES; i++) x[i] = 0;
        *(vec *)(dp + j) = x;
    }
}

/* 0 from the vector behind `seen` to n. */
static void clear(float *p, long seen, long n)
{
    for (long j = (seen + LANES - 1) / LANES * LANES; j < n; j++) p[j] = 0;
}

/* The largest of n numbers; those from there to a whole vector are overwritten. */
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
    long pitch = paneled(c.size), width = padded(d);
    float *memory = aligned_alloc(64, 4 * ((2 * c.n_tokens + c.size + 1) * width + (width + ROWS) * pitch +
                                           2 * padded(c.n_tokens)));
    if (!memory) return 1;
    float *scratch = memory, *all = piece(&scratch, c.n_tokens * width), *parts = piece(&scratch, c.n_tokens * width);
    float *keys = piece(&scratch, width * pitch), *values = piece(&scratch, c.size * width);
    float *p = piece(&scratch, ROWS * pitch), *spare = piece(&scratch, width);
    float *sum = piece(&scratch, c.n_tokens), *top = piece(&scratch, c.n_tokens);
    const float *q_rows[ROWS], *p_rows[ROWS];
    float *part_rows[ROWS];
    for (long i = 0; i < ROWS; i++) p_rows[i] = p + i * pitch;
    pack(q, 0, c.n_tokens, d, scale * (float)M_LOG2E, all, width);
    memset(parts, 0, 4 * c.n_tokens * width);
    for (long t = 0; t < c.n_tokens; t++) {
        sum[t] = 0;
        top[t] = -INFINITY;
    }
    for (long block = 0; block < c.n_blocks; block++) {
        long at = c.offs[block], end = c.offs[block + 1];
        if (at == end) continue;
        pack_transposed(k, c.starts[block], c.lengths[block], d, keys);
        pack(v, c.starts[block], c.lengths[block], d, 1, values, width);
        for (; at < end; at += ROWS) {
            queries mine = next_queries(c, block, at, end);
            for (long i = 0; i < ROWS; i++) {
                q_rows[i] = all + mine.token[i] * width;
                part_rows[i] = i < mine.n ? parts + mine.token[i] * width : spare;
            }
            times_panels(mine.most, d, q_rows, 1, keys, p, pitch);
            for (long i = 0; i < mine.n; i++) {
                long t = mine.token[i];
                float *row = p + i * pitch, higher = largest(row, mine.seen[i]);
                if (higher > top[t]) {
                    float factor = exp2f(top[t] - higher);
                    for (long j = 0; j < width; j++) part_rows[i][j] *= factor;
                    sum[t] *= factor;
                    top[t] = higher;
                }
                sum[t] += powers(row, mine.seen[i], top[t]);
                clear(row, mine.seen[i], mine.most);
            }
            tile(width, mine.most, p_rows, 1, values, width, part_rows, 1);
        }
    }
    for (long t = 0; t < c.n_tokens; t++) {
        unpack(parts + t * width, width, 1 / sum[t], out, t, 1, d, 0);
        lse.at[t * lse.row] = (log2f(sum[t]) + top[t]) * (float)M_LN2;
    }
    free(memory);
    return 0;
}

/* sum (keys, width) += p' x, over the n queries of a strip. */
static void add_products(long keys, long n, const float *p, long pitch, const float *x, long width, float *sum,
                         float *spare)
{
    const float *column[ROWS];
    float *to[ROWS];
    for (long j = 0; j < keys; j += ROWS) {
        for (long i = 0; i < ROWS; i++) {
            column[i] = p + (j + i < keys ? j + i : j);
            to[i] = j + i < keys ? sum + (j + i) * width : spare;
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
    long pitch = paneled(c.size), width = padded(d);
    float *memory = aligned_alloc(64, 4 * ((3 * c.n_tokens + 3 * c.size + 2 * STRIP + 1) * width +
                                           2 * (width + STRIP) * pitch + padded(c.n_tokens)));
    if (!memory) return 1;
    float *scratch = memory, *all = piece(&scratch, c.n_tokens * width), *grads = piece(&scratch, c.n_tokens * width);
    float *d_queries = piece(&scratch, c.n_tokens * width), *delta = piece(&scratch, c.n_tokens);
    float *keys_t = piece(&scratch, width * pitch), *values_t = piece(&scratch, width * pitch);
    float *keys = piece(&scratch, c.size * width), *d_keys = piece(&scratch, c.size * width);
    float *d_values = piece(&scratch, c.size * width), *p = piece(&scratch, STRIP * pitch);
    float *ds = piece(&scratch, STRIP * pitch), *q_strip = piece(&scratch, STRIP * width);
    float *grad_strip = piece(&scratch, STRIP * width), *spare = piece(&scratch, width);
    const float *q_rows[ROWS], *grad_rows[ROWS], *ds_rows[ROWS];
    float *dq_rows[ROWS];
    pack(q, 0, c.n_tokens, d, scale * (float)M_LOG2E, all, width);
    pack(grad, 0, c.n_tokens, d, 1, grads, width);
    memset(d_queries, 0, 4 * c.n_tokens * width);
    for (long t = 0; t < c.n_tokens; t++) {
        delta[t] = 0;
        for (long j = 0; j < d; j++) delta[t] += out.at[t * out.row + j * out.step] * grads[t * width + j];
    }
    for (long block = 0; block < c.n_blocks; block++) {
        long at = c.offs[block], end = c.offs[block + 1], start = c.starts[block], length = c.lengths[block];
        if (at == end) continue;
        pack_transposed(k, start, length, d, keys_t);
        pack_transposed(v, start, length, d, values_t);
        pack(k, start, length, d, 1, keys, width);
        memset(d_keys, 0, 4 * length * width);
        memset(d_values, 0, 4 * length * width);
        for (; at < end; at += STRIP) {
            long rows = 0, most = 0;
            for (; rows < STRIP && at + rows < end; rows += ROWS) {
                queries mine = next_queries(c, block, at + rows, end);
                most = mine.most > most ? mine.most : most;
                for (long i = 0; i < ROWS; i++) {
                    long t = mine.token[i], r = rows + i;
                    q_rows[i] = memcpy(q_strip + r * width, all + t * width, 4 * width);
                    grad_rows[i] = memcpy(grad_strip + r * width, grads + t * width, 4 * width);
                    ds_rows[i] = ds + r * pitch;
                    dq_rows[i] = i < mine.n ? d_queries + t * width : spare;
                }
                times_panels(mine.most, d, q_rows, 1, keys_t, p + rows * pitch, pitch);
                times_panels(mine.most, d, grad_rows, 1, values_t, ds + rows * pitch, pitch);
                for (long i = 0; i < ROWS; i++) {
                    long t = mine.token[i], seen = i < mine.n ? mine.seen[i] : 0;
                    float *p_row = p + (rows + i) * pitch, *ds_row = ds + (rows + i) * pitch;
                    powers(p_row, seen, lse.at[t * lse.row] * (float)M_LOG2E);
                    softmax_gradient(p_row, ds_row, seen, delta[t]);
                    clear(p_row, seen, length);
                    clear(ds_row, seen, length);
                }
                tile(width, mine.most, ds_rows, 1, keys, width, dq_rows, 1);
            }
            add_products(most, rows, p, pitch, grad_strip, width, d_values, spare);
            add_products(most, rows, ds, pitch, q_strip, width, d_keys, spare);
        }
        unpack(d_keys, width, 1 / (float)M_LOG2E, dk, start, length, d, 1); /* it is in the scale of the queries */
        unpack(d_values, width, 1, dv, start, length, d, 1);
    }
    unpack(d_queries, width, scale, dq, 0, c.n_tokens, d, 0);
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
    long pitch = paneled(n_blocks) + 16; /* so that the last vector of a row's last scores is its own */
    float *memory = aligned_alloc(64, 4 * ((d + ROWS) * pitch + padded(d) + padded(top_k) + 3 * padded(n_blocks + 1)));
    if (!memory) return 1;
    float *scratch = memory, *means = piece(&scratch, d * pitch), *score = piece(&scratch, ROWS * pitch);
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
        times_panels(own[at + n - 1] - low, d, q_rows, q.step, means + low * d, score, pitch);
        for (long i = 0; i < n; i++) {
            long t = at + i, from = first[t], earlier = own[t] - from, count = earlier < top_k ? earlier : top_k - 1;
            int32_t *mine = blocks + t * blocks_row;
            int all = earlier == count || count == 0;
            if (!all) choose(score + i * pitch + from - low, earlier, count, best, place);
            for (long j = 0; j < count; j++) counts[mine[j] = from + (all ? j : place[j])]++;
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
