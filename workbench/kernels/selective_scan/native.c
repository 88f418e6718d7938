/* The scan of LANES channels at a time, in the first levels of cache; see native.py.
 *
 * Letters: B batch, I channels, N states of a channel, L steps; T steps of a chunk. A block of channels goes through its
 * chunks in turn. The numbers of a chunk lie (T, LANES), so that every step is one vector, and each of the N states goes
 * through the chunk by itself, forward WIDTH of them together: to go back, T vectors of one state have to be there.
 * Whatever threads there are, every number is added up in the same order.
 */
#include "tile.h"

enum { CHUNK = 64, WIDTH = 4 }; /* T, as in reference.py; states that go forward together */

/* (B, I, L) numbers, which are so far apart. */
typedef struct {
    float *at;
    long batch, channel, step;
} cube;

/* What is to be done: see forward() and backward() for what is used. `a` is (I, N), the other matrices are contiguous
 * and end in steps, or in channels. */
typedef struct {
    long batch, channels, states, steps, span, groups;
    cube x, delta, z, y, grad, dx, d_delta, dz;
    const float *a, *b, *c, *d, *first; /* (I, N), (B, N, L), (B, N, L), (I), (B, N, I) */
    float *last, *kept;                 /* (B, N, I), (B, chunks, N, I) or NULL */
    float *da, *db, *dc, *dd, *d_first; /* (B, N, I), (groups, B, N, L) twice, (B, I), (B, N, I) */
} job;

typedef vec chunk[CHUNK] __attribute__((aligned(64)));

static const float LOG2E = 1.44269504f, LN2 = 0.693147181f;

/* 2^x as `power_of_two`, with 0 and infinity at the ends where the processor has them for nothing. */
INLINE vec two_to(vec x)
{
#if defined(__AVX512F__)
    vec whole = (vec)_mm512_roundscale_ps((__m512)x, 8), f = x - whole; /* to the nearest, without exceptions */
    vec p = f * 1.546144472e-04f + 1.340042818e-03f;
    p = p * f + 9.618056678e-03f;
    p = p * f + 5.550327227e-02f;
    p = p * f + 2.402265092e-01f;
    p = p * f + 6.931472067e-01f;
    p = p * f + 1.0f;
    return (vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
    return power_of_two(x);
#endif
}

INLINE vec ones(void) { return (vec){0} + 1.0f; }

INLINE vec exponential(vec x) { return two_to(x * LOG2E); }

INLINE vec sigmoid(vec x) { return ones() / (ones() + exponential(-x)); }

/* log(1 + exp(x)) = max(x, 0) + log1p(u), u = exp(-|x|), and log1p(u) = 2 artanh(u / (2 + u)) by its series. */
INLINE vec softplus(vec x)
{
    vec u = exponential(where(x > 0, -x, x)), s = u / (u + 2.0f), q = s * s;
    vec p = q * (2 / 15.0f) + 2 / 13.0f;
    p = p * q + 2 / 11.0f;
    p = p * q + 2 / 9.0f;
    p = p * q + 2 / 7.0f;
    p = p * q + 2 / 5.0f;
    p = p * q + 2 / 3.0f;
    p = p * q + 2.0f;
    return where(x > 0, x, (vec){0}) + where(x == x, p * s, x);
}

/* Steps [t, t + n) of `rows` channels from the given one on to a chunk. */
static void take(const cube *from, long b, long i, long rows, long t, long n, float *to)
{
    const float *at = from->at + b * from->batch + i * from->channel + t * from->step;
    long j = 0, k = 0;
    if (from->channel == 1) {
        for (; k < n; k++) memcpy(to + k * LANES, at + k * from->step, 4 * rows);
        return;
    }
    if (from->step == 1)
        for (; j + 4 <= rows; j += 4) {
            for (k = 0; k + 4 <= n; k += 4)
                transpose4(at + j * from->channel + k, from->channel, to + k * LANES + j, LANES);
            for (; k < n; k++)
                for (long l = j; l < j + 4; l++) to[k * LANES + l] = at[l * from->channel + k];
        }
    for (; j < rows; j++)
        for (k = 0; k < n; k++) to[k * LANES + j] = at[j * from->channel + k * from->step];
}

/* The way back. */
static void give(const cube *to, long b, long i, long rows, long t, long n, const float *from)
{
    float *at = to->at + b * to->batch + i * to->channel + t * to->step;
    long j = 0, k = 0;
    if (to->channel == 1) {
        for (; k < n; k++) memcpy(at + k * to->step, from + k * LANES, 4 * rows);
        return;
    }
    if (to->step == 1)
        for (; j + 4 <= rows; j += 4) {
            for (k = 0; k + 4 <= n; k += 4)
                transpose4(from + k * LANES + j, LANES, at + j * to->channel + k, to->channel);
            for (; k < n; k++)
                for (long l = j; l < j + 4; l++) at[l * to->channel + k] = from[k * LANES + l];
        }
    for (; j < rows; j++)
        for (k = 0; k < n; k++) at[j * to->channel + k * to->step] = from[k * LANES + j];
}

/* The n states of some channels in (N, I), to vectors and back. */
static void take_states(const float *from, long n, long channels, long rows, vec *to)
{
    for (long j = 0; j < n; j++) to[j] = load(from + j * channels, rows);
}

static void give_states(float *to, long n, long channels, long rows, const vec *from)
{
    for (long j = 0; j < n; j++) store(to + j * channels, from[j], rows);
}

/* (N) vectors of log2(e) a: 2 to the power of their product with a step is what is left. */
static void take_rates(const job *k, long i, long rows, vec *a)
{
    for (long n = 0; n < k->states; n++) {
        float row[LANES] = {0};
        for (long j = 0; j < rows; j++) row[j] = LOG2E * k->a[(i + j) * k->states + n];
        memcpy(a + n, row, sizeof row);
    }
}

/* `width` states through t steps: y += their share of the output. */
INLINE void advance(const int width, long t, const vec *a, vec *h, const float *const *b, const float *const *c,
                    const vec *step, const vec *step_x, vec *y)
{
    vec state[WIDTH], rate[WIDTH];
#pragma GCC unroll 4
    for (int j = 0; j < width; j++) state[j] = h[j], rate[j] = a[j];
    for (long k = 0; k < t; k++) {
        vec sum = y[k];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) {
            state[j] = two_to(step[k] * rate[j]) * state[j] + step_x[k] * b[j][k];
            sum += state[j] * c[j][k];
        }
        y[k] = sum;
    }
#pragma GCC unroll 4
    for (int j = 0; j < width; j++) h[j] = state[j];
}

static void scan_block(const job *k, long b, long i, vec *h, vec *a)
{
    long rows = k->channels - i < LANES ? k->channels - i : LANES, n_states = k->states;
    long chunks = (k->steps + CHUNK - 1) / CHUNK, apart = n_states * k->channels;
    chunk x = {{0}}, delta = {{0}}, z = {{0}}, y;
    vec d = load(k->d + i, rows);
    take_rates(k, i, rows, a);
    take_states(k->first + b * apart + i, n_states, k->channels, rows, h);
    for (long at = 0, q = 0; at < k->steps; at += CHUNK, q++) {
        long t = k->steps - at < CHUNK ? k->steps - at : CHUNK;
        if (k->kept) give_states(k->kept + (b * chunks + q) * apart + i, n_states, k->channels, rows, h);
        take(&k->x, b, i, rows, at, t, (float *)x);
        take(&k->delta, b, i, rows, at, t, (float *)delta);
        take(&k->z, b, i, rows, at, t, (float *)z);
        for (long j = 0; j < t; j++) {
            y[j] = d * x[j];
            delta[j] = softplus(delta[j]);
            x[j] *= delta[j];
        }
        const float *bs[WIDTH], *cs[WIDTH];
        long n = 0;
#define GO(width)                                                                                                      \
    {                                                                                                                  \
        for (long j = 0; j < (width); j++) {                                                                           \
            bs[j] = k->b + (b * n_states + n + j) * k->steps + at;                                                     \
            cs[j] = k->c + (b * n_states + n + j) * k->steps + at;                                                     \
        }                                                                                                              \
        advance(width, t, a + n, h + n, bs, cs, delta, x, y);                                                          \
        n += (width);                                                                                                  \
    }
        while (n + WIDTH <= n_states) GO(WIDTH)
        while (n < n_states) GO(1)
#undef GO
        for (long j = 0; j < t; j++) y[j] *= z[j] * sigmoid(z[j]);
        give(&k->y, b, i, rows, at, t, (float *)y);
    }
    give_states(k->last + b * apart + i, n_states, k->channels, rows, h);
}

/* to[t] (+)= the sum of the lanes of v[t], for a whole chunk. */
static void sum_lanes(const vec *v, long t, float *to, int add)
{
    float sums[CHUNK];
    for (long k = 0; k < t; k += LANES) {
        vec sum[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; j++) sum[j] = v[k + j];
#pragma GCC unroll 4
        for (int left = LANES / 2; left; left /= 2)
#pragma GCC unroll 8
            for (int j = 0; j < left; j++) sum[j] = pairs(sum[2 * j], sum[2 * j + 1]);
        *(vec *)(sums + k) = sum[0];
    }
    for (long k = 0; k < t; k++) to[k] = add ? to[k] + sums[k] : sums[k];
}

/* What a chunk of a block is given, and what is added up over its states. */
typedef struct {
    chunk x, step, step_x, dy;  /* dy: of the output before the gate */
    chunk y, d_rate, d_step_x;  /* d_rate: of step times the rates, times them, log2(e) too large */
    chunk decay, before, of_bc; /* of the state that is at it: what is left, its value, its share in db or dc */
} room;

/* One state forward through t steps, and back: from `state` before them and its gradient `dh` after them, which becomes
 * that before them. */
static void turn(room *r, long t, vec state, vec rate, const float *b, const float *c, vec *dh, vec *da, float *db,
                 float *dc, int add)
{
    vec dstate = *dh, sum_a = *da;
    for (long k = 0; k < t; k++) {
        r->decay[k] = two_to(r->step[k] * rate);
        r->before[k] = state;
        state = r->decay[k] * state + r->step_x[k] * b[k];
        r->y[k] += state * c[k];
        r->of_bc[k] = r->dy[k] * state;
    }
    sum_lanes(r->of_bc, t, dc, add);
    for (long k = t - 1; k >= 0; k--) {
        vec g = dstate + r->dy[k] * c[k];
        dstate = g * r->decay[k];
        vec of_rate = dstate * r->before[k];
        r->of_bc[k] = g * r->step_x[k];
        r->d_step_x[k] += g * b[k];
        r->d_rate[k] += of_rate * rate;
        sum_a += of_rate * r->step[k];
    }
    sum_lanes(r->of_bc, t, db, add);
    *dh = dstate;
    *da = sum_a;
}

/* One block of group g: `fresh` where nothing has been added to the group's db and dc. */
static void back_block(const job *k, long b, long i, long g, int fresh, vec *a, vec *h, vec *dh, vec *da, room *r)
{
    long rows = k->channels - i < LANES ? k->channels - i : LANES, n_states = k->states;
    long chunks = (k->steps + CHUNK - 1) / CHUNK, apart = n_states * k->channels, wide = n_states * k->steps;
    float *db = k->db + (g * k->batch + b) * wide, *dc = k->dc + (g * k->batch + b) * wide;
    chunk delta = {{0}}, z = {{0}}, grad = {{0}};
    vec d = load(k->d + i, rows), dd = {0};
    memset(r, 0, sizeof *r);
    take_rates(k, i, rows, a);
    take_states(k->last + b * apart + i, n_states, k->channels, rows, dh);
    memset(da, 0, n_states * sizeof *da);
    for (long q = chunks - 1; q >= 0; q--) {
        long at = q * CHUNK, t = k->steps - at < CHUNK ? k->steps - at : CHUNK;
        take_states(k->kept + (b * chunks + q) * apart + i, n_states, k->channels, rows, h);
        take(&k->x, b, i, rows, at, t, (float *)r->x);
        take(&k->delta, b, i, rows, at, t, (float *)delta);
        take(&k->z, b, i, rows, at, t, (float *)z);
        take(&k->grad, b, i, rows, at, t, (float *)grad);
        for (long j = 0; j < t; j++) {
            vec opened = sigmoid(z[j]);
            r->step[j] = softplus(delta[j]);
            r->step_x[j] = r->step[j] * r->x[j];
            r->dy[j] = grad[j] * z[j] * opened;
            r->y[j] = d * r->x[j];
            r->d_rate[j] = r->d_step_x[j] = (vec){0};
            dd += r->dy[j] * r->x[j];
            z[j] = grad[j] * opened * (ones() + z[j] * (ones() - opened)); /* times y: its gradient */
        }
        for (long n = 0; n < n_states; n++) {
            long to = n * k->steps + at, from = b * wide + to;
            turn(r, t, h[n], a[n], k->b + from, k->c + from, dh + n, da + n, db + to, dc + to, !fresh);
        }
        for (long j = 0; j < t; j++) {
            z[j] *= r->y[j];
            delta[j] = (r->d_rate[j] * LN2 + r->d_step_x[j] * r->x[j]) * sigmoid(delta[j]);
            r->x[j] = r->d_step_x[j] * r->step[j] + r->dy[j] * d;
        }
        give(&k->dx, b, i, rows, at, t, (float *)r->x);
        give(&k->d_delta, b, i, rows, at, t, (float *)delta);
        give(&k->dz, b, i, rows, at, t, (float *)z);
    }
    give_states(k->d_first + b * apart + i, n_states, k->channels, rows, dh);
    give_states(k->da + b * apart + i, n_states, k->channels, rows, da);
    store(k->dd + b * k->channels + i, dd, rows);
}

long lanes(void) { return LANES; }

/* Items [first, end) of B times the blocks: y and the last states, and the kept ones. 1 where there is no memory. */
int forward(const job *k, long first, long end)
{
    long blocks = (k->channels + LANES - 1) / LANES;
    vec *memory = aligned_alloc(64, 2 * (k->states + 1) * 64);
    if (!memory) return 1;
    for (long item = first; item < end; item++)
        scan_block(k, item / blocks, item % blocks * LANES, memory, memory + k->states);
    free(memory);
    return 0;
}

/* Items [first, end) of B times the groups, of `span` channels each: all gradients, those of b and c by group; `last`
 * is the gradient of the last states. 1 where there is no memory. */
int backward(const job *k, long first, long end)
{
    vec *memory = aligned_alloc(64, 4 * (k->states + 1) * 64);
    room *r = aligned_alloc(64, (sizeof *r + 63) / 64 * 64);
    long n = k->states;
    for (long item = first; memory && r && item < end; item++) {
        long g = item % k->groups, from = g * k->span, to = from + k->span < k->channels ? from + k->span : k->channels;
        for (long i = from; i < to; i += LANES)
            back_block(k, item / k->groups, i, g, i == from, memory, memory + n, memory + 2 * n, memory + 3 * n, r);
    }
    free(memory);
    free(r);
    return !memory || !r;
}
