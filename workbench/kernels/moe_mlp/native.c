/* The expert layer, some rows of one expert at a time; see native.py.
 *
 * Letters: T tokens, H width of a token, I hidden width, n rows. An expert's rows are read where they are, by their
 * tokens. One routine makes all products: a panel of WIDE columns of the right side is copied to where it stays in the
 * second level of cache, and the rows of the left side pass by in tiles.
 */
#include "tile.h"
#include <math.h>

enum { DEPTH = 512 }; /* of a panel */

typedef struct {
    long dim, hidden, up; /* H, I and 2I, or I twice */
    const float *w1, *w2, *b1, *b2, *score;
    const int32_t *order, *tok;
} layer;

/* Of a product: number k of row i is at[index[i] * row + k * step], or with i for index[i] where there is none. */
typedef struct {
    const float *at;
    long row, step;
    const int32_t *index;
} left;

/* Number j of row k is at[index[k] * row + j]; if transposed, at[j * row + k]. */
typedef struct {
    const float *at;
    long row;
    const int32_t *index;
    int transposed;
} right;

static long least(long a, long b) { return a < b ? a : b; }

/* For native.py. */
long pitch(long n) { return pitched(n); }

/* Whether offs, of n + 1 numbers, rises from 0 to the end. */
static int rises(const int32_t *offs, long n, long end)
{
    if (offs[0] != 0 || offs[n] != end) return 0;
    for (long i = 0; i < n; i++)
        if (offs[i] > offs[i + 1]) return 0;
    return 1;
}

/* Whether a plan is one that RoutePlan.build makes: with that, no row is read or written that is not there. top_k is 0
 * where tok_offs tells the pairs of a token. */
int fits(long n_tokens, long n_experts, long n_pairs, long top_k, const int32_t *order, const int32_t *inv,
         const int32_t *tok, const int32_t *offs, const int32_t *tok_offs)
{
    if (!rises(offs, n_experts, n_pairs) || (tok_offs && !rises(tok_offs, n_tokens, n_pairs))) return 0;
    for (long e = 0; e < n_experts; e++) {
        long last = -1;
        for (long row = offs[e]; row < offs[e + 1]; row++) {
            long pair = order[row], token = tok[row];
            if (pair <= last || pair >= n_pairs || inv[pair] != row || token < 0 || token >= n_tokens) return 0;
            long first = tok_offs ? tok_offs[token] : token * top_k;
            if (pair < first || pair >= (tok_offs ? tok_offs[token + 1] : first + top_k)) return 0;
            last = pair;
        }
    }
    return 1;
}

/* panel (depth, WIDE) = n columns of b from row k and column j on; zeros behind them. */
static void pack(right b, long k, long depth, long j, long n, float *panel)
{
    if (!b.transposed) {
        for (long i = 0; i < depth; i++, panel += WIDE) {
            const float *from = b.at + (b.index ? b.index[k + i] : k + i) * b.row + j;
            if (n == WIDE) memcpy(panel, from, 4 * WIDE);
            else
                for (long c = 0; c < WIDE; c++) panel[c] = c < n ? from[c] : 0;
        }
        return;
    }
    const float *from = b.at + j * b.row + k;
    long columns = n / 4 * 4, rows = depth / 4 * 4;
    for (long first = 0; first < columns; first += 16) /* what a cache line of the panel holds */
        for (long i = 0; i < rows; i += 4)
            for (long c = first; c < least(first + 16, columns); c += 4)
                transpose4(from + c * b.row + i, b.row, panel + i * WIDE + c, WIDE);
    for (long i = 0; i < depth; i++)
        for (long c = i < rows ? columns : 0; c < WIDE; c++) panel[i * WIDE + c] = c < n ? from[c * b.row + i] : 0;
}

/* c (m, n) (+)= a b, rows of c `row` apart. The sums over k are taken in the same order for any m and n. */
static void multiply(long m, long n, long depth, left a, right b, float *c, long row, int add, float *panel)
{
    float outside[ROWS][WIDE]; /* where a tile is larger than what is left of c */
    long k = 0;
    do {
        long deep = least(depth - k, DEPTH);
        for (long j = 0; j < n; j += WIDE) {
            long wide = least(n - j, WIDE), whole = (wide + LANES - 1) / LANES * LANES;
            pack(b, k, deep, j, wide, panel);
            for (long at = 0; at < m; at += ROWS) {
                const float *from[ROWS];
                float *to[ROWS];
                for (long i = 0; i < ROWS; i++) {
                    long r = least(at + i, m - 1);
                    from[i] = a.at + (a.index ? a.index[r] : r) * a.row + k * a.step;
                    to[i] = whole == wide && at + i < m ? c + r * row + j : outside[i];
                }
                tile(whole, deep, from, a.step, panel, WIDE, to, whole == wide && add);
                for (long r = at; whole > wide && r < least(at + ROWS, m); r++)
                    for (long l = 0; l < wide; l++)
                        c[r * row + j + l] = (add ? c[r * row + j + l] : 0) + outside[r - at][l];
            }
        }
        add = 1;
    } while ((k += DEPTH) < depth);
}

/* The bias in each of m rows, for a product to be added; 0 where there is none. */
static int begin(const float *bias, long m, long n, float *c, long row)
{
    for (long i = 0; bias && i < m; i++) memcpy(c + i * row, bias, 4 * n);
    return bias != NULL;
}

INLINE vec sigmoid(vec x) { return 1 / (1 + power_of_two(x * -(float)M_LOG2E)); }

/* A = silu(gate) * linear, or relu(gate) where there is no linear. */
static void activate(long n, const float *gate, const float *linear, float *act)
{
    for (long j = 0; j < n; j += LANES) {
        vec g = load(gate + j, n - j);
        store(act + j, linear ? g * sigmoid(g) * load(linear + j, n - j) : larger((vec){0}, g), n - j);
    }
}

/* From gate, linear, u and s: s A and dZ; returns <u, A>. */
static float derive(long n, const float *gate, const float *linear, const float *u, float s, float *act, float *d_gate,
                    float *d_linear)
{
    vec sum = {0};
    for (long j = 0; j < n; j += LANES) {
        vec g = load(gate + j, n - j), there = load(u + j, n - j), da = s * there, a;
        if (linear) {
            vec l = load(linear + j, n - j), sig = sigmoid(g), silu = g * sig;
            a = silu * l;
            store(d_gate + j, da * l * (sig + silu * (1 - sig)), n - j);
            store(d_linear + j, da * silu, n - j);
        } else {
            a = larger((vec){0}, g);
            store(d_gate + j, where(g > 0, da, (vec){0}), n - j);
        }
        store(act + j, s * a, n - j);
        sum += there * a;
    }
    return total(sum);
}

/* Rows first to end of y, and of z where it is kept, all of expert e. x has rows x_row apart. Scratch: a panel,
 * (n, pitched(I)) and (n, 2 WIDE). */
void forward(layer m, long e, long first, long end, const float *x, long x_row, float *z, float *y, float *scratch)
{
    long n = end - first, apart = pitched(m.hidden), row = z ? m.up : 2 * WIDE;
    float *panel = scratch, *act = panel + DEPTH * WIDE, *some = act + n * apart;
    const float *w1 = m.w1 + e * m.up * m.dim, *b1 = m.b1 ? m.b1 + e * m.up : NULL;
    left rows = {x, x_row, 1, m.tok + first};
    for (long j = 0; j < m.hidden; j += WIDE) {
        long wide = least(WIDE, m.hidden - j);
        float *gate = z ? z + first * m.up + j : some, *linear = NULL;
        int add = begin(b1 ? b1 + j : NULL, n, wide, gate, row);
        multiply(n, wide, m.dim, rows, (right){w1 + j * m.dim, m.dim, NULL, 1}, gate, row, add, panel);
        if (m.up > m.hidden) {
            long up = m.hidden + j;
            linear = z ? gate + m.hidden : some + WIDE;
            add = begin(b1 ? b1 + up : NULL, n, wide, linear, row);
            multiply(n, wide, m.dim, rows, (right){w1 + up * m.dim, m.dim, NULL, 1}, linear, row, add, panel);
        }
        for (long i = 0; i < n; i++)
            activate(wide, gate + i * row, linear ? linear + i * row : NULL, act + i * apart + j);
    }
    int add = begin(m.b2 ? m.b2 + e * m.dim : NULL, n, m.dim, y += first * m.dim, m.dim);
    right w2 = {m.w2 + e * m.dim * m.hidden, m.hidden, NULL, 1};
    multiply(n, m.dim, m.hidden, (left){act, apart, 1, NULL}, w2, y, m.dim, add, panel);
}

/* What the gradients of an expert's weights are made of: dZ (n, pitched(2I or I)), score * A (n, pitched(I)) and the
 * gathered rows of the gradient (n, pitched(H)), one after the other. */
typedef struct {
    float *dz, *act, *grad;
} kept;

static kept parts(layer m, long n, float *at)
{
    return (kept){at, at + n * pitched(m.up), at + n * (pitched(m.up) + pitched(m.hidden))};
}

/* Rows first to end of dX and of what is kept, and their dscore. `all` is kept of the n rows of expert e from `start`.
 * Scratch: a panel and (end - first, WIDE). */
void backward(layer m, long e, long start, long n, long first, long end, const float *grad, const float *z, float *dx,
              float *dscore, float *all, float *scratch)
{
    long up_apart = pitched(m.up), apart = pitched(m.hidden), grad_apart = pitched(m.dim);
    float *panel = scratch, *u = panel + DEPTH * WIDE;
    kept to = parts(m, n, all);
    to.dz += (first - start) * up_apart;
    to.act += (first - start) * apart;
    to.grad += (first - start) * grad_apart;
    n = end - first;
    for (long i = 0; i < n; i++) {
        float *row = memcpy(to.grad + i * grad_apart, grad + m.tok[first + i] * m.dim, 4 * m.dim), sum = 0;
        for (long j = 0; m.b2 && j < m.dim; j++) sum += row[j] * m.b2[e * m.dim + j];
        dscore[m.order[first + i]] = sum;
    }
    for (long j = 0; j < m.hidden; j += WIDE) {
        long wide = least(WIDE, m.hidden - j);
        right w2 = {m.w2 + e * m.dim * m.hidden + j, m.hidden, NULL, 0};
        multiply(n, wide, m.dim, (left){to.grad, grad_apart, 1, NULL}, w2, u, WIDE, 0, panel);
        for (long i = 0; i < n; i++) {
            const float *gate = z + (first + i) * m.up + j;
            float *d_gate = to.dz + i * up_apart + j;
            int32_t pair = m.order[first + i];
            dscore[pair] += derive(wide, gate, m.up > m.hidden ? gate + m.hidden : NULL, u + i * WIDE, m.score[pair],
                                   to.act + i * apart + j, d_gate, d_gate + m.hidden);
        }
    }
    right w1 = {m.w1 + e * m.up * m.dim, m.dim, NULL, 0};
    multiply(n, m.dim, m.up, (left){to.dz, up_apart, 1, NULL}, w1, dx + first * m.dim, m.dim, 0, panel);
}

/* The gradients of weights and biases of expert e, n rows from `start`: part p of q of the rows of each. Scratch: a
 * panel. */
void weights(layer m, long e, long start, long n, long p, long q, const float *x, long x_row, float *all, float *dw1,
             float *dw2, float *db1, float *db2, float *scratch)
{
    kept from = parts(m, n, all);
    long up_apart = pitched(m.up), apart = pitched(m.hidden), grad_apart = pitched(m.dim);
    long at = m.dim * p / q, end = m.dim * (p + 1) / q, up_at = m.up * p / q, up_end = m.up * (p + 1) / q;
    multiply(end - at, m.hidden, n, (left){from.grad + at, 1, grad_apart, NULL}, (right){from.act, apart, NULL, 0},
             dw2 + (e * m.dim + at) * m.hidden, m.hidden, 0, scratch);
    multiply(up_end - up_at, m.dim, n, (left){from.dz + up_at, 1, up_apart, NULL}, (right){x, x_row, m.tok + start, 0},
             dw1 + (e * m.up + up_at) * m.dim, m.dim, 0, scratch);
    for (long i = 0; db1 && i < n; i++)
        for (long j = up_at; j < up_end; j++) db1[e * m.up + j] += from.dz[i * up_apart + j];
    for (long i = 0; db2 && i < n; i++)
        for (long j = at; j < end; j++)
            db2[e * m.dim + j] += m.score[m.order[start + i]] * from.grad[i * grad_apart + j];
}
