/* A bank of low-rank updates, the pairs in expert order; see native.py.
 *
 * Letters: N tokens, I and O widths of x and of the output, E experts, r rank, P pairs; A (E, r, I), B (E, O, r). Rows
 * of x and of the gradient are read where they are. Codes, which are r wide, are products of rows with rows: of x with
 * those of A, of the gradient with those of B'. Work is divided by tokens, or for the gradients of A and B by columns:
 * whatever the division, every number is added up in the same order.
 */
#include "tile.h"

enum { X_ROWS = 4, W_ROWS = ROWS == 7 ? 4 : 2 }; /* of a tile of codes */
enum { RANKS = ROWS == 7 ? 8 : 4, ACROSS = ROWS == 7 ? 3 : 2 }; /* of a tile of a gradient of A or B: rows, vectors */
enum { BLOCK = 8 }; /* vectors of a row that is made by itself */
enum { STRIP = 4 * ROWS }; /* rows whose codes are made before they are used */

enum { BATCH = 128, FEW = 32 }; /* tokens taken at a time; more, where an expert would have fewer pairs than this */

/* What is to be done; index is what order() makes. Results that are NULL are not wanted. */
typedef struct {
    long n_tokens, n_pairs, n_experts, top_k, rank, d_in, d_out;
    const int32_t *index;
    const float *x, *a, *b, *score, *grad;
    float *out, *dx, *d_a, *d_b, *d_score;
    long threads;
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel: calls a function in all threads */
} job;

static const int32_t *pair_of(const job *k) { return k->index; }
static const int32_t *token_of(const job *k) { return k->index + 2 * k->n_pairs; }
static const int32_t *first_of(const job *k) { return k->index + 3 * k->n_pairs; }

/* A step of it: `part` is called for all of `size`, in pieces that the threads take in turn. */
typedef struct step {
    const job *k;
    float *b_t, *a_p; /* B' (E, r, O) and A (E, r, I), their rows `pitched`; or those of one expert at a time */
    float *du, *su;   /* (P, r) score * dV and score * U */
    int one;          /* the latter: all tokens are one batch, so each expert is needed once */
    int (*part)(const struct step *, long first, long end);
    long size, piece, next;
    int failed;
} step;

static void take(void *at)
{
    step *s = at;
    for (;;) {
        long first = __atomic_fetch_add(&s->next, s->piece, __ATOMIC_RELAXED);
        if (first >= s->size) return;
        if (s->part(s, first, first + s->piece < s->size ? first + s->piece : s->size)) s->failed = 1;
    }
}

static void each(step *s, int (*part)(const step *, long, long), long size, long piece)
{
    s->part = part, s->size = size, s->piece = piece, s->next = 0;
    if (s->k->threads > 1 && size > piece) s->k->parallel(take, s, s->k->threads, 0);
    else take(s);
}

static float *scratch(long n) { return aligned_alloc(64, 4 * pitched(n)); }

/* order, inv and tok (P) and offs (E + 1), one after the other: the pairs sorted by expert, see RoutePlan. `first`
 * (N + 1) has the first pair of each token, NULL where every token has top_k. Returns 1 where it or an expert is out of
 * range. */
int order(long n_tokens, long n_pairs, long n_experts, long top_k, const int64_t *expert, const int64_t *first,
          int32_t *index)
{
    int32_t *pair = index, *inv = index + n_pairs, *tok = index + 2 * n_pairs, *offs = index + 3 * n_pairs;
    memset(offs, 0, 4 * (n_experts + 1));
    for (long p = 0; p < n_pairs; p++) {
        if (expert[p] < 0 || expert[p] >= n_experts) return 1;
        offs[expert[p] + 1]++;
    }
    for (long e = 0; e < n_experts; e++) offs[e + 1] += offs[e];
    if (first && (first[0] != 0 || first[n_tokens] != n_pairs)) return 1;
    for (long t = 0; t < n_tokens; t++) {
        long at = first ? first[t] : t * top_k, end = first ? first[t + 1] : at + top_k;
        if (at > end || end > n_pairs) return 1;
        for (; at < end; at++) {
            long row = offs[expert[at]]++; /* now the row of the expert's next pair */
            pair[row] = at;
            inv[at] = row;
            tok[row] = t;
        }
    }
    for (long e = n_experts; e > 0; e--) offs[e] = offs[e - 1];
    offs[0] = 0;
    return 0;
}

/* Of the rows from at to end, of one expert and so with ascending tokens, the first whose token is not below this. */
static long row_of(const int32_t *tok, long at, long end, long token)
{
    while (at < end) {
        long middle = (at + end) / 2;
        if (tok[middle] < token) at = middle + 1;
        else end = middle;
    }
    return at;
}

/* to (columns, pitch) = x (rows, stride) transposed. */
static void transpose(long rows, long columns, const float *x, long stride, float *to, long pitch)
{
    long i, j;
    for (j = 0; j + 4 <= columns; j += 4) {
        for (i = 0; i + 4 <= rows; i += 4) transpose4(x + i * stride + j, stride, to + j * pitch + i, pitch);
        for (; i < rows; i++)
            for (long l = 0; l < 4; l++) to[(j + l) * pitch + i] = x[i * stride + j + l];
    }
    for (; j < columns; j++)
        for (i = 0; i < rows; i++) to[j * pitch + i] = x[i * stride + j];
}

/* A vector into a register. It is volatile because gcc would read it from memory again for each of its products. */
INLINE vec once(const float *at) { return *(const volatile vec *)at; }

/* c[i][j] = <x[i], w[j]>, n numbers long; the same sum for every i and j. */
static void tile_of_codes(long n, const float *const *x, const float *const *w, float (*c)[W_ROWS])
{
    enum { SUMS = X_ROWS * W_ROWS };
    vec sum[SUMS];
    long k = 0;
#pragma GCC unroll 16
    for (int i = 0; i < SUMS; i++) sum[i] = (vec){0};
    for (; k + LANES <= n; k += LANES) {
        vec there[W_ROWS];
#pragma GCC unroll 4
        for (int j = 0; j < W_ROWS; j++) there[j] = once(w[j] + k);
#pragma GCC unroll 4
        for (int i = 0; i < X_ROWS; i++) {
            vec here = once(x[i] + k);
#pragma GCC unroll 4
            for (int j = 0; j < W_ROWS; j++) sum[i * W_ROWS + j] += here * there[j];
        }
    }
    if (k < n)
#pragma GCC unroll 16
        for (int i = 0; i < SUMS; i++)
            sum[i] += beginning(x[i / W_ROWS] + k, n - k) * beginning(w[i % W_ROWS] + k, n - k);
#pragma GCC unroll 4
    for (int left = SUMS / 2; left > SUMS / 2 / LANES; left /= 2)
#pragma GCC unroll 8
        for (int i = 0; i < left; i++) sum[i] = pairs(sum[2 * i], sum[2 * i + 1]);
    memcpy(c, sum, 4 * SUMS);
}

/* codes (rows, r) of rows of x with the r rows of w, which are `pitch` apart. */
static void make_codes(long rows, long rank, long n, const float *const *x, const float *w, long pitch, float *codes)
{
    const float *x_rows[X_ROWS], *w_rows[W_ROWS];
    float c[X_ROWS][W_ROWS];
    for (long first = 0; first < rows; first += X_ROWS)
        for (long r = 0; r < rank; r += W_ROWS) {
            for (long i = 0; i < X_ROWS; i++) x_rows[i] = x[first + i < rows ? first + i : first];
            for (long j = 0; j < W_ROWS; j++) w_rows[j] = w + (r + j < rank ? r + j : r) * pitch;
            tile_of_codes(n, x_rows, w_rows, c);
            for (long i = 0; i < X_ROWS && first + i < rows; i++)
                for (long j = 0; j < W_ROWS && r + j < rank; j++) codes[(first + i) * rank + r + j] = c[i][j];
        }
}

/* n_vecs vectors of to (+)= the r codes times the rows of w. */
INLINE void spread_vectors(const int n_vecs, long rank, const float *code, const float *w, long pitch, float *to,
                           int add)
{
    vec sum[BLOCK];
#pragma GCC unroll 8
    for (int l = 0; l < n_vecs; l++) sum[l] = (vec){0};
    for (long j = 0; j < rank; j++)
#pragma GCC unroll 8
        for (int l = 0; l < n_vecs; l++) sum[l] += code[j] * *(const vec *)(w + j * pitch + l * LANES);
#pragma GCC unroll 8
    for (int l = 0; l < n_vecs; l++) {
        vec *at = (vec *)(to + l * LANES);
        *at = add ? *at + sum[l] : sum[l];
    }
}

/* The same for n columns; of the last vector of w whatever lies behind column n is read, and left. */
static void spread_row(long rank, long n, const float *code, const float *w, long pitch, float *to, int add)
{
    long c = 0;
    for (; c + BLOCK * LANES <= n; c += BLOCK * LANES) spread_vectors(BLOCK, rank, code, w + c, pitch, to + c, add);
    for (; c + LANES <= n; c += LANES) spread_vectors(1, rank, code, w + c, pitch, to + c, add);
    if (c == n) return;
    float end[LANES] = {0};
    memcpy(end, to + c, 4 * (n - c));
    spread_vectors(1, rank, code, w + c, pitch, end, add);
    memcpy(to + c, end, 4 * (n - c));
}

/* Rows (+)= codes (rows, r) times the r rows of w, which are n wide: by tiles, and what fills none row by row. Every
 * number is the same sum either way. */
static void spread(long rows, long rank, long n, const float *codes, const float *w, long pitch, float *const *to,
                   int add)
{
    const float *code[ROWS];
    long first = 0, whole = n / LANES * LANES;
    for (; first + ROWS <= rows; first += ROWS) {
        for (long i = 0; i < ROWS; i++) code[i] = codes + (first + i) * rank;
        tile(whole, rank, code, 1, w, pitch, to + first, add);
        for (long i = 0; i < ROWS && whole < n; i++)
            spread_row(rank, n - whole, code[i], w + whole, pitch, to[first + i] + whole, add);
    }
    for (; first < rows; first++) spread_row(rank, n, codes + first * rank, w, pitch, to[first], add);
}

static float *panel(const step *s, float *panels, long e, long pitch)
{
    return s->one ? panels : panels + e * s->k->rank * pitch;
}

/* B' of these experts, and A for dX, where they have pairs. */
static int panels(const step *s, long first, long end)
{
    const job *k = s->k;
    const int32_t *offs = first_of(k);
    long r = k->rank, o_pitch = pitched(k->d_out), i_pitch = pitched(k->d_in);
    for (long e = first; e < end; e++) {
        if (offs[e] == offs[e + 1]) continue;
        transpose(k->d_out, r, k->b + e * r * k->d_out, r, panel(s, s->b_t, e, o_pitch), o_pitch);
        for (long j = 0; s->a_p && j < r; j++)
            memcpy(panel(s, s->a_p, e, i_pitch) + j * i_pitch, k->a + (e * r + j) * k->d_in, 4 * k->d_in);
    }
    return 0;
}

/* The output of these tokens. */
static int outputs(const step *s, long first, long end)
{
    const job *k = s->k;
    const int32_t *pair = pair_of(k), *tok = token_of(k), *offs = first_of(k);
    long r = k->rank, pitch = pitched(k->d_out);
    float *codes = scratch(STRIP * r), *out_row[STRIP];
    const float *x_row[STRIP];
    if (!codes) return 1;
    if (k->top_k != 1) memset(k->out + first * k->d_out, 0, 4 * (end - first) * k->d_out);
    for (long e = 0; e < k->n_experts; e++) {
        long at = row_of(tok, offs[e], offs[e + 1], first), stop = row_of(tok, at, offs[e + 1], end);
        if (s->one) panels(s, e, e + 1);
        for (; at < stop; at += STRIP) {
            long rows = stop - at < STRIP ? stop - at : STRIP;
            for (long i = 0; i < rows; i++) {
                x_row[i] = k->x + tok[at + i] * k->d_in;
                out_row[i] = k->out + tok[at + i] * k->d_out;
            }
            make_codes(rows, r, k->d_in, x_row, k->a + e * r * k->d_in, k->d_in, codes);
            for (long i = 0; i < rows; i++)
                for (long j = 0; j < r; j++) codes[i * r + j] *= k->score[pair[at + i]];
            spread(rows, r, k->d_out, codes, panel(s, s->b_t, e, pitch), pitch, out_row, k->top_k != 1);
        }
    }
    free(codes);
    return 0;
}

/* Of these tokens dX and the gradients of the scores; and the codes for the gradients of A and B. */
static int token_gradients(const step *s, long first, long end)
{
    const job *k = s->k;
    const int32_t *pair = pair_of(k), *tok = token_of(k), *offs = first_of(k);
    long r = k->rank, o_pitch = pitched(k->d_out), i_pitch = pitched(k->d_in);
    float *u = scratch(2 * STRIP * r), *dv = u + STRIP * r, *dx_row[STRIP];
    const float *x_row[STRIP], *grad_row[STRIP];
    if (!u) return 1;
    if (k->dx && k->top_k != 1) memset(k->dx + first * k->d_in, 0, 4 * (end - first) * k->d_in);
    for (long e = 0; e < k->n_experts; e++) {
        long at = row_of(tok, offs[e], offs[e + 1], first), stop = row_of(tok, at, offs[e + 1], end);
        if (s->one) panels(s, e, e + 1);
        for (; at < stop; at += STRIP) {
            long rows = stop - at < STRIP ? stop - at : STRIP;
            for (long i = 0; i < rows; i++) {
                x_row[i] = k->x + tok[at + i] * k->d_in;
                grad_row[i] = k->grad + tok[at + i] * k->d_out;
                dx_row[i] = k->dx ? k->dx + tok[at + i] * k->d_in : NULL;
            }
            if (k->d_b || k->d_score) make_codes(rows, r, k->d_in, x_row, k->a + e * r * k->d_in, k->d_in, u);
            make_codes(rows, r, k->d_out, grad_row, panel(s, s->b_t, e, o_pitch), o_pitch, dv);
            for (long i = 0; i < rows; i++) {
                float score = k->score[pair[at + i]], sum = 0;
                for (long j = 0; k->d_score && j < r; j++) sum += u[i * r + j] * dv[i * r + j];
                for (long j = 0; k->d_b && j < r; j++) s->su[(at + i) * r + j] = score * u[i * r + j];
                for (long j = 0; j < r; j++) s->du[(at + i) * r + j] = score * dv[i * r + j];
                if (k->d_score) k->d_score[pair[at + i]] = sum;
            }
            if (k->dx)
                spread(rows, r, k->d_in, s->du + at * r, panel(s, s->a_p, e, i_pitch), i_pitch, dx_row, k->top_k != 1);
        }
    }
    free(u);
    return 0;
}

/* to[j] (+)= sum over the rows i of codes[i r + j] x[i], for RANKS numbers j and n_vecs vectors of columns. */
INLINE void sum_of_rows(const int n_vecs, long rows, const float *codes, long rank, const float *const *x, long column,
                        float *const *to, int add)
{
    vec sum[RANKS][ACROSS];
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; j++)
#pragma GCC unroll 4
        for (int l = 0; l < n_vecs; l++) sum[j][l] = (vec){0};
    for (long i = 0; i < rows; i++, codes += rank) {
        vec here[ACROSS];
#pragma GCC unroll 4
        for (int l = 0; l < n_vecs; l++) here[l] = *(const vec *)(x[i] + column + l * LANES);
#pragma GCC unroll 8
        for (int j = 0; j < RANKS; j++)
#pragma GCC unroll 4
            for (int l = 0; l < n_vecs; l++) sum[j][l] += codes[j] * here[l];
    }
#pragma GCC unroll 8
    for (int j = 0; j < RANKS; j++)
#pragma GCC unroll 4
        for (int l = 0; l < n_vecs; l++) {
            vec *at = (vec *)(to[j] + column + l * LANES);
            *at = add ? *at + sum[j][l] : sum[j][l];
        }
}

/* The columns from first to end of d_w = the sum over an expert's pairs of codes (P, r) times x[tok] (N, width). It is
 * (E, r, width), or (E, width, r) where `transposed`. Returns 1 where there is no memory. */
static int weight_gradient(const job *k, const float *codes, const float *x, float *d_w, long width, long first,
                           long end, int transposed)
{
    const int32_t *tok = token_of(k), *offs = first_of(k);
    long r = k->rank, whole = (r + RANKS - 1) / RANKS * RANKS, pitch = pitched(width);
    float *memory = scratch(whole * pitch + STRIP * whole);
    if (!memory) return 1;
    float *sum = memory, *strip = sum + whole * pitch, *to[RANKS];
    const float *row[STRIP];
    memset(strip, 0, 4 * STRIP * whole);
    for (long e = 0; e < k->n_experts; e++) {
        if (offs[e] == offs[e + 1]) memset(sum, 0, 4 * whole * pitch);
        for (long at = offs[e]; at < offs[e + 1]; at += STRIP) {
            long rows = offs[e + 1] - at < STRIP ? offs[e + 1] - at : STRIP, add = at > offs[e];
            for (long i = 0; i < rows; i++) {
                row[i] = x + tok[at + i] * width;
                memcpy(strip + i * whole, codes + (at + i) * r, 4 * r);
            }
            for (long j = 0; j < whole; j += RANKS) {
                long c = first;
                for (long i = 0; i < RANKS; i++) to[i] = sum + (j + i) * pitch;
                for (; c + ACROSS * LANES <= end; c += ACROSS * LANES)
                    sum_of_rows(ACROSS, rows, strip + j, whole, row, c, to, add);
                for (; c + LANES <= end; c += LANES) sum_of_rows(1, rows, strip + j, whole, row, c, to, add);
                for (; c < end; c++)
                    for (long i = 0; i < RANKS; i++) {
                        float one = 0;
                        for (long l = 0; l < rows; l++) one += strip[l * whole + j + i] * row[l][c];
                        to[i][c] = add ? to[i][c] + one : one;
                    }
            }
        }
        float *d_e = d_w + e * r * width;
        if (transposed)
            transpose(r, end - first, sum + first, pitch, d_e + first * r, r);
        else
            for (long j = 0; j < r; j++) memcpy(d_e + j * width + first, sum + j * pitch + first, 4 * (end - first));
    }
    free(memory);
    return 0;
}

static int gradient_of_a(const step *s, long first, long end)
{
    return weight_gradient(s->k, s->du, s->k->x, s->k->d_a, s->k->d_in, first, end, 0);
}

static int gradient_of_b(const step *s, long first, long end)
{
    return weight_gradient(s->k, s->su, s->k->grad, s->k->d_b, s->k->d_out, first, end, 1);
}

/* Tokens taken at a time: so few that their rows are in the cache for the next of their experts, and that there is
 * work for every thread, but no fewer than an expert's weights are worth reading for. */
static long batch(const job *k)
{
    long fair = k->n_tokens / k->threads + 1, worth = FEW * k->n_experts * k->n_tokens / (k->n_pairs + 1);
    long n = worth > BATCH ? worth : BATCH;
    return n < fair ? n : fair;
}

/* Columns taken at a time. */
static long columns(const job *k, long width)
{
    long unit = ACROSS * LANES;
    return (width / k->threads / unit + 1) * unit;
}

/* The output. Returns 1 where there is no memory. */
int forward(const job *k)
{
    long piece = batch(k), one = piece >= k->n_tokens;
    step s = {.k = k, .one = one, .b_t = scratch((one ? 1 : k->n_experts) * k->rank * pitched(k->d_out))};
    if (!s.b_t) return 1;
    if (!one) each(&s, panels, k->n_experts, 1);
    each(&s, outputs, k->n_tokens, piece);
    free(s.b_t);
    return s.failed;
}

/* The gradients. Returns 1 where there is no memory. */
int backward(const job *k)
{
    long piece = batch(k), one = piece >= k->n_tokens, rows = (one ? 1 : k->n_experts) * k->rank;
    long o = rows * pitched(k->d_out), i = rows * pitched(k->d_in), codes = k->n_pairs * k->rank;
    float *memory = scratch(o + i + 2 * codes);
    if (!memory) return 1;
    step s = {.k = k, .one = one, .b_t = memory, .du = memory + o + i, .su = memory + o + i + codes};
    if (k->dx) s.a_p = memory + o;
    if (!one) each(&s, panels, k->n_experts, 1);
    each(&s, token_gradients, k->n_tokens, piece);
    if (k->d_a) each(&s, gradient_of_a, k->d_in, columns(k, k->d_in));
    if (k->d_b) each(&s, gradient_of_b, k->d_out, columns(k, k->d_out));
    free(memory);
    return s.failed;
}
