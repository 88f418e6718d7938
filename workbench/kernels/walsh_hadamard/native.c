/* The transform of rows, in three sweeps at most over what is larger than the first level of cache; see native.py.
 *
 * Every number is the same sum of the same two numbers as in the reference, so the last bit is the same too.
 */
#include "tile.h"

enum { NEAR = 4096, FAR = 64, COLUMNS = 32 }; /* 16 KiB, and 8 KiB of rows that lie apart */

/* Butterflies of neighbours `apart`, of n numbers. */
INLINE void round_of(float *x, long n, const long apart)
{
    for (long i = 0; i < n; i += 2 * apart)
        for (long j = i; j < i + apart; j++) {
            float a = x[j], b = x[j + apart];
            x[j] = a + b;
            x[j + apart] = a - b;
        }
}

/* Two rounds at once: of `apart` and of 2 `apart`, whole vectors. */
INLINE void two_rounds(float *x, long n, long apart)
{
    for (long i = 0; i < n; i += 4 * apart)
        for (long j = i; j < i + apart; j += LANES) {
            vec *at[4];
            for (int k = 0; k < 4; k++) at[k] = (vec *)(x + j + k * apart);
            vec a = *at[0] + *at[1], b = *at[0] - *at[1], c = *at[2] + *at[3], d = *at[2] - *at[3];
            *at[0] = a + c;
            *at[1] = b + d;
            *at[2] = a - c;
            *at[3] = b - d;
        }
}

/* All rounds of n numbers that are in the first level of cache, from `apart` on. */
static void rounds(float *x, long n, long apart)
{
    if (apart == 1) {
        if (n >= 2 * LANES) {
            round_of(x, n, 1);
            round_of(x, n, 2);
            if (LANES > 4) round_of(x, n, 4);
            if (LANES > 8) round_of(x, n, 8);
            apart = LANES;
        } else
            for (; apart < n; apart *= 2) round_of(x, n, apart);
    }
    for (; 4 * apart <= n; apart *= 4) two_rounds(x, n, apart);
    if (2 * apart <= n) round_of(x, n, apart);
}

/* out = H x of one row, n numbers each, a power of two. */
static void transform_row(const float *x, float *out, long n)
{
    long near = n < NEAR ? n : NEAR;
    for (long i = 0; i < n; i += near) {
        memcpy(out + i, x + i, 4 * near);
        rounds(out + i, near, 1);
    }
    /* The other rounds, a few at a time: blocks of rows that lie `apart`, brought together, as powers of two apart they
     * would fall into few sets of the cache. */
    float block[FAR * COLUMNS];
    for (long apart = near; apart < n;) {
        long rows = n / apart < FAR ? n / apart : FAR;
        for (long i = 0; i < n; i += rows * apart)
            for (long j = i; j < i + apart; j += COLUMNS) {
                for (long k = 0; k < rows; k++) memcpy(block + k * COLUMNS, out + j + k * apart, 4 * COLUMNS);
                rounds(block, rows * COLUMNS, COLUMNS);
                for (long k = 0; k < rows; k++) memcpy(out + j + k * apart, block + k * COLUMNS, 4 * COLUMNS);
            }
        apart *= rows;
    }
}

void transform(const float *x, float *out, long rows, long n)
{
    for (long i = 0; i < rows; i++) transform_row(x + i * n, out + i * n, n);
}
