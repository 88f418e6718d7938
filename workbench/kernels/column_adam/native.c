/* Adam in the columns of a cosine transform that fit a matrix; see native.py and __init__.py.
 *
 * Of a row of m entries the FFT leaves h + 1 = m / 2 + 1 complex numbers w_k. With the turns t_k of kernels/dct/cpu.py,
 * y_k = Im w_k t_k for k <= h and y_(m-k) = Re w_k t_k for the others. `waves` has rows of `width` = 2 h + 2 numbers,
 * `turns` a row of each t's real part, twice, and a row of its imaginary part, less and as it is: with the neighbours
 * of w changing places, w turns[0] + w' turns[1] are Re w t, Im w t, ...
 */
#include <float.h>
#include <math.h>

#include "tile.h"

/* The even entries of every row, and behind them the odd ones backwards. */
void spread(long rows, long m, const float *x, float *out)
{
    for (long i = 0; i < rows; i++, x += m, out += m) {
        for (long j = 0; j < (m + 1) / 2; j++) out[j] = x[2 * j];
        for (long j = 0; j < m / 2; j++) out[m - 1 - j] = x[2 * j + 1];
    }
}

/* Sums over rows of |y| or y^2, as they lie in `waves`. */
void norms(long rows, long width, int norm, const float *waves, const float *turns, float *out)
{
    memset(out, 0, 4 * width);
    for (long i = 0; i < rows; i++, waves += width)
        for (long k = 0; k < width; k += 2) {
            float re = waves[k], im = waves[k + 1];
            float a = re * turns[k] + im * turns[width + k], b = im * turns[k] + re * turns[width + k + 1];
            out[k] += norm == 1 ? fabsf(a) : a * a;
            out[k + 1] += norm == 1 ? fabsf(b) : b * b;
        }
}

/* The k-th largest of n numbers, k from 1; they change places. */
static float ranked(long n, long k, float *x)
{
    long low = 0, high = n - 1, at = k - 1;
    while (low < high) {
        float pivot = x[(low + high) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (x[i] > pivot) i++;
            while (x[j] < pivot) j--;
            if (i <= j) {
                float moved = x[i];
                x[i++] = x[j];
                x[j--] = moved;
            }
        }
        if (at <= j) high = j;
        else if (at >= i) low = i;
        else break;
    }
    return x[at];
}

/* What `step` takes: five rows of r numbers. */
enum { COLUMN, SOURCE, AT, BY, BESIDE };

/* Finds the r columns of the largest sum of `parts` rows of sums. They go, ascending, into the row COLUMN of `chosen`;
 * the places in `index` that they had, or -1, into SOURCE, or their own if they are not asked for; which number of a row
 * of waves to take, and what to multiply it and the next one by, into AT, BY and BESIDE. `room` is for 2 m numbers.
 * Returns 0, and has not changed `index`, where a sum is not finite or the largest is not above `safe`. */
int choose(long parts, long m, long r, const float *sums, const float *turns, float safe, int32_t *index, int asked,
           float *room, int32_t *chosen)
{
    long h = m / 2, width = 2 * h + 2;
    float *order = room, *sorted = room + m, largest = 0;
    for (long k = 0; k < m; k++) {
        long at = k <= h ? 2 * k + 1 : 2 * (m - k);
        float sum = 0;
        for (long part = 0; part < parts; part++) sum += sums[part * width + at];
        if (!(sum <= FLT_MAX)) return 0;
        order[k] = sorted[k] = sum;
        if (sum > largest) largest = sum;
    }
    if (!(largest > safe)) return 0;
    float least = ranked(m, r, sorted);
    long ties = r, n = 0;
    for (long k = 0; k < m; k++) ties -= order[k] > least;
    for (long k = 0; k < m; k++)
        if (order[k] > least || (order[k] == least && ties-- > 0)) chosen[n++] = (int32_t)k;
    int32_t *place = (int32_t *)sorted;
    if (asked) {
        memset(place, 0xff, 4 * m);
        for (long j = 0; j < r; j++)
            if (index[j] >= 0 && index[j] < m) place[index[j]] = (int32_t)j;
    }
    float *mix = (float *)chosen;
    for (long j = 0; j < r; j++) {
        long k = chosen[j], at = k <= h ? 2 * k : 2 * (m - k);
        chosen[SOURCE * r + j] = asked ? place[k] : (int32_t)j;
        chosen[AT * r + j] = (int32_t)at;
        mix[BY * r + j] = k <= h ? turns[width + at + 1] : turns[at];
        mix[BESIDE * r + j] = k <= h ? turns[at] : turns[width + at];
    }
    memcpy(index, chosen, 4 * r);
    return 1;
}

/* The step of `rows` rows. Moments that have moved go through `room`, r numbers. */
void step(long rows, long width, long r, const float *restrict waves, const int32_t *restrict chosen, float c1,
          float b2, float c2, float root_by, float plus, float *restrict room, float *restrict m, float *restrict v,
          float *restrict u)
{
    const int32_t *source = chosen + SOURCE * r, *at = chosen + AT * r;
    const float *by = (const float *)chosen + BY * r, *beside = by + r;
    int moved = 0;
    for (long j = 0; j < r; j++) moved |= source[j] != j;
    for (long i = 0; i < rows; i++, waves += width, m += r, v += r, u += r) {
        for (long j = 0; j < r; j++) u[j] = waves[at[j]] * by[j] + waves[at[j] + 1] * beside[j];
        if (moved)
            for (float *moment = m; moment; moment = moment == m ? v : NULL) {
                memcpy(room, moment, 4 * r);
                for (long j = 0; j < r; j++) moment[j] = source[j] < 0 ? 0 : room[source[j]];
            }
        for (long j = 0; j < r; j += LANES) {
            long n = r - j;
            vec g = load(u + j, n), first = load(m + j, n), second = load(v + j, n);
            first += (g - first) * c1;
            second = second * b2 + g * g * c2;
            store(m + j, first, n);
            store(v + j, second, n);
            store(u + j, first / (square_root(second) * root_by + plus), n);
        }
    }
}
