// What the recorded pass does with feature maps and rows of features; read after infer.h.
namespace smope {

// Depthwise convolution, bias and ReLU6 of maps that are stored channels last. A thread makes 8 channels of 4 pixels in
// a row; the threads of a block make 4 such groups of channels of 32 x 8 pixels, so that what they read is mostly in the
// first cache. weight [K * K, C] and bias [C] are float. BEFORE and AFTER: ReLU6 of what is read and of what is written.
template <class T, int C, int H, int W, int OH, int OW, int K, int STRIDE, int TOP, int LEFT, bool BEFORE, bool AFTER>
DEVICE void depthwise(const typename T::Stored* __restrict__ x, const float* __restrict__ weight,
                      const float* __restrict__ bias, typename T::Stored* __restrict__ y) {
    constexpr int PIXELS = 4, GROUPS = C / 8, ACROSS = (OW + 31) / 32, DOWN = (OH + 7) / 8, SETS = (GROUPS + 3) / 4;
    const long long block = THREAD / 256;
    const int thread = (int)(THREAD % 256);
    const int group = (int)(block % SETS) * 4 + thread % 4;
    long long left = block / SETS;
    const int first = (int)(left % ACROSS) * 32 + thread / 4 % 8 * PIXELS;
    left /= ACROSS;
    const int row = (int)(left % DOWN) * 8 + thread / 32;
    const long long image = left / DOWN;
    if (group >= GROUPS || first >= OW || row >= OH) return;
    const int channel = group * 8;

    float sum[PIXELS][8];
    float b[8];
    load<F32, 8>(bias + channel, b);
#pragma unroll
    for (int p = 0; p < PIXELS; ++p)
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[p][c] = b[c];
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int at_y = row * STRIDE - TOP + i;
        if (at_y < 0 || at_y >= H) continue;
        const typename T::Stored* line = x + ((image * H + at_y) * W) * C + channel;
        float w[K][8];
#pragma unroll
        for (int j = 0; j < K; ++j) load<F32, 8>(weight + (i * K + j) * C + channel, w[j]);
#pragma unroll
        for (int column = 0; column < (PIXELS - 1) * STRIDE + K; ++column) {
            const int at_x = first * STRIDE - LEFT + column;
            if (at_x < 0 || at_x >= W) continue;
            float v[8];
            load<T, 8>(line + (long long)at_x * C, v);
            if (BEFORE) {
#pragma unroll
                for (int c = 0; c < 8; ++c) v[c] = within(v[c], 0.f, 6.f);
            }
#pragma unroll
            for (int p = 0; p < PIXELS; ++p) {
                const int j = column - p * STRIDE;
                if (j < 0 || j >= K) continue;
#pragma unroll
                for (int c = 0; c < 8; ++c) sum[p][c] += v[c] * w[j][c];
            }
        }
    }
#pragma unroll
    for (int p = 0; p < PIXELS; ++p) {
        if (first + p >= OW) break;
        if (AFTER) {
#pragma unroll
            for (int c = 0; c < 8; ++c) sum[p][c] = within(sum[p][c], 0.f, 6.f);
        }
        store<T, 8>(y + ((image * OH + row) * OW + first + p) * C + channel, sum[p]);
    }
}

// LayerNorm of rows of C numbers, a warp a row: of x, or of x + other; optionally ReLU after it, and the same rounded to
// another type.
template <class X, class O, class Y, class Z, int C, bool SUM, bool RELU, bool TWICE>
DEVICE void layer_norm(const typename X::Stored* __restrict__ x, const typename O::Stored* __restrict__ other,
                       const float* __restrict__ weight, const float* __restrict__ bias,
                       typename Y::Stored* __restrict__ y, typename Z::Stored* __restrict__ z, long long rows,
                       float eps) {
    constexpr int EACH = C / WARP, N = EACH % 8 == 0 ? 8 : (EACH % 4 == 0 ? 4 : (EACH % 2 == 0 ? 2 : 1));
    const long long row = THREAD / WARP;
    const int lane = (int)(THREAD % WARP);
    if (row >= rows) return;
    float v[EACH / N][N];
    float total = 0.f;
#pragma unroll
    for (int i = 0; i < EACH / N; ++i) {
        const long long at = row * C + (i * WARP + lane) * N;
        load<X, N>(x + at, v[i]);
        if (SUM) {
            float o[N];
            load<O, N>(other + at, o);
#pragma unroll
            for (int j = 0; j < N; ++j) v[i][j] += o[j];
        }
#pragma unroll
        for (int j = 0; j < N; ++j) total += v[i][j];
    }
    const float mean = warp_sum(total) / C;
    float spread = 0.f;
#pragma unroll
    for (int i = 0; i < EACH / N; ++i)
#pragma unroll
        for (int j = 0; j < N; ++j) spread += (v[i][j] - mean) * (v[i][j] - mean);
    const float scale = 1.f / sqrtf(warp_sum(spread) / C + eps);
#pragma unroll
    for (int i = 0; i < EACH / N; ++i) {
        float w[N], b[N];
        const int at = (i * WARP + lane) * N;
        load<F32, N>(weight + at, w);
        load<F32, N>(bias + at, b);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const float normed = (v[i][j] - mean) * scale * w[j] + b[j];
            v[i][j] = RELU && normed < 0.f ? 0.f : normed;
        }
        store<Y, N>(y + row * C + at, v[i]);
        if (TWICE) store<Z, N>(z + row * C + at, v[i]);
    }
}

// A map [H, W, C] of one image, stored channels last, at x, y in 0..1: bilinear, zero outside. A warp reads one point.
template <class T, class Y, int C, int H, int W>
DEVICE void read_map(const typename T::Stored* __restrict__ map, float x, float y, typename Y::Stored* __restrict__ to) {
    constexpr int EACH = C / WARP, N = EACH % 8 == 0 ? 8 : (EACH % 4 == 0 ? 4 : (EACH % 2 == 0 ? 2 : 1));
    const int lane = (int)(THREAD % WARP);
    const float px = within(x * W - 0.5f, -2.f, W + 1.f), py = within(y * H - 0.5f, -2.f, H + 1.f);
    const float left = floorf(px), top = floorf(py);
#pragma unroll
    for (int i = 0; i < EACH / N; ++i) {
        const int channel = (i * WARP + lane) * N;
        float sum[N];
#pragma unroll
        for (int j = 0; j < N; ++j) sum[j] = 0.f;
#pragma unroll
        for (int corner = 0; corner < 4; ++corner) {
            const int right = corner & 1, below = corner >> 1, column = (int)left + right, row = (int)top + below;
            if (column < 0 || column >= W || row < 0 || row >= H) continue;
            const float share = (right ? px - left : 1.f - (px - left)) * (below ? py - top : 1.f - (py - top));
            float v[N];
            load<T, N>(map + ((long long)row * W + column) * C + channel, v);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += share * v[j];
        }
        store<Y, N>(to + channel, sum);
    }
}

}  // namespace smope
