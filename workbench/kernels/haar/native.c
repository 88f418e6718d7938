/* Planes of a channel each: read once, written once; see native.py.
 *
 * Every number is the same sum of the same numbers as in the reference, so the last bit is the same too.
 */
#include "tile.h"

/* One channel: x (2 height, 2 width), and its part of each sub-band, which lie `apart` numbers from each other. */
static void forward_plane(const float *restrict x, float *restrict out, long apart, long height, long width)
{
    for (long i = 0; i < height; i++) {
        const float *up = x + 4 * i * width, *down = up + 2 * width;
        float *ll = out + i * width, *lh = ll + apart, *hl = lh + apart, *hh = hl + apart;
        for (long j = 0; j < width; j++) {
            float a = up[2 * j], b = up[2 * j + 1], c = down[2 * j], d = down[2 * j + 1];
            ll[j] = ((a + b) + (c + d)) * 0.5f;
            lh[j] = ((a + b) - (c + d)) * 0.5f;
            hl[j] = ((a - b) + (c - d)) * 0.5f;
            hh[j] = ((a - b) - (c - d)) * 0.5f;
        }
    }
}

static void inverse_plane(const float *restrict y, float *restrict out, long apart, long height, long width)
{
    for (long i = 0; i < height; i++) {
        const float *ll = y + i * width, *lh = ll + apart, *hl = lh + apart, *hh = hl + apart;
        float *up = out + 4 * i * width, *down = up + 2 * width;
        for (long j = 0; j < width; j++) {
            float a = ll[j], b = lh[j], c = hl[j], d = hh[j];
            up[2 * j] = ((a + b) + (c + d)) * 0.5f;
            up[2 * j + 1] = ((a + b) - (c + d)) * 0.5f;
            down[2 * j] = ((a - b) + (c - d)) * 0.5f;
            down[2 * j + 1] = ((a - b) - (c - d)) * 0.5f;
        }
    }
}

/* Planes `first` to `stop` of all that there are, `channels` of an image; height and width are those of a sub-band. */
void forward(const float *x, float *out, long first, long stop, long channels, long height, long width)
{
    long size = height * width;
    for (long i = first; i < stop; i++)
        forward_plane(x + 4 * size * i, out + size * (4 * channels * (i / channels) + i % channels), channels * size,
                      height, width);
}

void inverse(const float *y, float *out, long first, long stop, long channels, long height, long width)
{
    long size = height * width;
    for (long i = first; i < stop; i++)
        inverse_plane(y + size * (4 * channels * (i / channels) + i % channels), out + 4 * size * i, channels * size,
                      height, width);
}
