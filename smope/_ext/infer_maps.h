// What the recorded pass does with feature maps and rows of features; read after infer.h.
namespace smope {

// Depthwise convolution, bias and ReLU6 of maps that are stored channels last. A thread makes 8 channels of 4 pixels in
// a row; the threads of a block make 4 such groups of channels of 32 x 8 pixels, so that what they read is mostly in the
// first cache. weight [K * K, C] and the biases [C] are float. ADD, BEFORE and AFTER: a bias and ReLU6 of what is read,
// ReLU6 of what is written.
template <class T, int C, int H, int W, int OH, int OW, int K, int STRIDE, int TOP, int LEFT, bool ADD, bool BEFORE,
          bool AFTER>
DEVICE void depthwise(const typename T::Stored* __restrict__ x, const float* __restrict__ weight,
                      const float* __restrict__ bias, const float* __restrict__ added,
                      typename T::Stored* __restrict__ y) {
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

    float sum[PIXELS][8], b[8], extra[8];
    load<F32, 8>(bias + channel, b);
    if (ADD) load<F32, 8>(added + channel, extra);
#pragma unroll
    for (int p = 0; p < PIXELS; ++p)
#pragma unroll
        for (int c = 0; c < 8; ++c) sum[p][c] = b[c];
#pragma unroll
    for (int i = 0; i < K; ++i) {
        const int at_y = row * STRIDE - TOP + i;
        if (at_y < 0 || at_y >= H) continue;
        const typename T::Stored* line = x + ((image * H + at_y) * W) * C + channel;
        constexpr int COLUMNS = (PIXELS - 1) * STRIDE + K;
        // All at once and without branches, so that the loads wait for memory together.
        Pack<T, 8> packs[COLUMNS];
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            const int at_x = first * STRIDE - LEFT + column;
            packs[column] = Pack<T, 8>{};
            if (at_x >= 0 && at_x < W) packs[column] = *reinterpret_cast<const Pack<T, 8>*>(line + at_x * C);
        }
        float w[K][8];
#pragma unroll
        for (int j = 0; j < K; ++j) load<F32, 8>(weight + (i * K + j) * C + channel, w[j]);
#pragma unroll
        for (int column = 0; column < COLUMNS; ++column) {
            if (BEFORE && !ADD) relu6(packs[column]);
            float v[8];
#pragma unroll
            for (int c = 0; c < 8; ++c) v[c] = T::wide(packs[column].at[c]);
            if (ADD) {
                const int at_x = first * STRIDE - LEFT + column;
                const bool inside = at_x >= 0 && at_x < W;  // what lies outside is 0 after the bias, too
#pragma unroll
                for (int c = 0; c < 8; ++c) {
                    const float moved = BEFORE ? within(v[c] + extra[c], 0.f, 6.f) : v[c] + extra[c];
                    v[c] = inside ? moved : 0.f;
                }
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

// A map [B, H, W, C] twice as large each way, bilinear between the middles of cells. A thread makes 8 channels of a pixel.
template <class T, int C, int H, int W>
DEVICE void enlarge(const typename T::Stored* __restrict__ x, typename T::Stored* __restrict__ y, long long count) {
    if (THREAD >= count) return;
    const int channel = (int)(THREAD % (C / 8)) * 8;
    long long left = THREAD / (C / 8);
    const int column = (int)(left % (2 * W));
    left /= 2 * W;
    const int row = (int)(left % (2 * H));
    const typename T::Stored* image = x + left / (2 * H) * (H * W * (long long)C) + channel;
    const float at_y = fmaxf(row * 0.5f - 0.25f, 0.f), at_x = fmaxf(column * 0.5f - 0.25f, 0.f);
    const int top = (int)at_y, first = (int)at_x, bottom = top + (top < H - 1), last = first + (first < W - 1);
    const float down = at_y - top, across = at_x - first;
    float a[8], b[8], c[8], d[8];
    load<T, 8>(image + (top * W + first) * C, a);
    load<T, 8>(image + (top * W + last) * C, b);
    load<T, 8>(image + (bottom * W + first) * C, c);
    load<T, 8>(image + (bottom * W + last) * C, d);
#pragma unroll
    for (int i = 0; i < 8; ++i)
        a[i] = (1.f - down) * ((1.f - across) * a[i] + across * b[i]) + down * ((1.f - across) * c[i] + across * d[i]);
    store<T, 8>(y + THREAD * 8, a);
}

// GroupNorm of cells [B, S, C] in two kernels, a warp for each piece of CELLS cells and a lane for each of G groups.
// First mean and squared deviations of each piece, [B, pieces, G, 2] ...
template <class T, int C, int G, int S, int CELLS>
DEVICE void measure_cells(const typename T::Stored* __restrict__ x, float* __restrict__ measured, long long count) {
    constexpr int EACH = C / G, N = EACH < 8 ? EACH : 8, PIECES = (S + CELLS - 1) / CELLS;
    const long long piece = THREAD / WARP;
    if (piece >= count) return;
    const int begin = (int)(piece % PIECES) * CELLS, end = begin + CELLS < S ? begin + CELLS : S;
    const typename T::Stored* image = x + piece / PIECES * (S * (long long)C);
#pragma unroll
    for (int group = (int)(THREAD % WARP); group < G; group += WARP) {
        const typename T::Stored* from = image + group * EACH;
        const float offset = T::wide(from[begin * (long long)C]);  // near the mean, so that squares stay small
        float sum = 0.f, squares = 0.f;
#pragma unroll 4
        for (int cell = begin; cell < end; ++cell)
#pragma unroll
            for (int i = 0; i < EACH; i += N) {
                float v[N];
                load<T, N>(from + cell * (long long)C + i, v);
#pragma unroll
                for (int j = 0; j < N; ++j) {
                    sum += v[j] - offset;
                    squares += (v[j] - offset) * (v[j] - offset);
                }
            }
        const float n = (float)((end - begin) * EACH);
        measured[(piece * G + group) * 2] = offset + sum / n;
        measured[(piece * G + group) * 2 + 1] = squares - sum * sum / n;
    }
}

// ... then those of all pieces of an image together (Chan et al. 1979), and the cells normed by them.
template <class T, int C, int G, int S, int CELLS>
DEVICE void norm_cells(const typename T::Stored* __restrict__ x, const float* __restrict__ measured,
                       const float* __restrict__ weight, const float* __restrict__ bias,
                       typename T::Stored* __restrict__ y, float eps, long long count) {
    constexpr int EACH = C / G, N = EACH < 8 ? EACH : 8, PIECES = (S + CELLS - 1) / CELLS;
    const long long piece = THREAD / WARP;
    if (piece >= count) return;
    const long long image = piece / PIECES;
    const int begin = (int)(piece % PIECES) * CELLS, end = begin + CELLS < S ? begin + CELLS : S;
#pragma unroll
    for (int group = (int)(THREAD % WARP); group < G; group += WARP) {
        const float* all = measured + (image * PIECES * G + group) * 2;
        const float offset = all[0];  // near the mean
        float sum = 0.f, deviations = 0.f;
#pragma unroll 8
        for (int p = 0; p < PIECES; ++p) {
            const float n = (float)((p + 1) * CELLS <= S ? CELLS : S - p * CELLS), off = all[p * G * 2] - offset;
            sum += n * off;
            deviations += all[p * G * 2 + 1] + n * EACH * off * off;
        }
        const float mean = offset + sum / S;
        deviations -= sum * sum / S * EACH;
        const float scale = 1.f / sqrtf(deviations / ((float)S * EACH) + eps);
#pragma unroll
        for (int i = 0; i < EACH; i += N) {
            const int channel = group * EACH + i;
            float w[N], b[N];
            load<F32, N>(weight + channel, w);
            load<F32, N>(bias + channel, b);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                w[j] *= scale;
                b[j] -= mean * w[j];
            }
#pragma unroll 4
            for (int cell = begin; cell < end; ++cell) {
                const long long at = (image * S + cell) * C + channel;
                float v[N];
                load<T, N>(x + at, v);
#pragma unroll
                for (int j = 0; j < N; ++j) v[j] = v[j] * w[j] + b[j];
                store<T, N>(y + at, v);
            }
        }
    }
}

}  // namespace smope
