// Kernels of the recorded pass (smope/inference/kernels.py). It writes after this one line for each kernel, with all
// sizes as template arguments, and compiles the whole by NVRTC: hence no header. A plain C++ compiler takes it too, with
// one thread where a GPU has a warp (WARP = 1), which is how tests run it on a CPU.
#ifdef __CUDACC_RTC__
#define WARP 32
#define DEVICE __device__ __forceinline__
#define THREAD ((long long)blockIdx.x * blockDim.x + threadIdx.x)
DEVICE float warp_sum(float v) {
    for (int other = 16; other > 0; other >>= 1) v += __shfl_xor_sync(0xffffffffu, v, other);
    return v;
}
#else
#include <cmath>
#include <cstring>
#define WARP 1
#define DEVICE inline
#define __global__
#define __launch_bounds__(n)
#define __restrict__
static thread_local long long thread_on_host;
#define THREAD thread_on_host
static float warp_sum(float v) { return v; }
#endif

namespace smope {

// 16-bit numbers as their bits, turned into float and back, to the nearest with ties to even.
struct F32 {
    typedef float Stored;
    static DEVICE float wide(float v) { return v; }
    static DEVICE float narrow(float v) { return v; }
};
struct BF16 {
    typedef unsigned short Stored;
#ifdef __CUDACC_RTC__
    static DEVICE float wide(unsigned short v) { return __uint_as_float((unsigned)v << 16); }
    static DEVICE unsigned short narrow(float v) {
        const unsigned bits = __float_as_uint(v);
        if (v != v) return 0x7fff;
        return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
#else
    static float wide(unsigned short v) {
        const unsigned bits = (unsigned)v << 16;
        float f;
        std::memcpy(&f, &bits, 4);
        return f;
    }
    static unsigned short narrow(float v) {
        unsigned bits;
        std::memcpy(&bits, &v, 4);
        if (v != v) return 0x7fff;
        return (unsigned short)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
    }
#endif
};
struct F16 {
    typedef unsigned short Stored;
#ifdef __CUDACC_RTC__
    static DEVICE float wide(unsigned short v) {
        float f;
        asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
        return f;
    }
    static DEVICE unsigned short narrow(float v) {
        unsigned short h;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
        return h;
    }
#else
    static float wide(unsigned short v) {
        _Float16 h;
        std::memcpy(&h, &v, 2);
        return (float)h;
    }
    static unsigned short narrow(float v) {
        const _Float16 h = (_Float16)v;
        unsigned short bits;
        std::memcpy(&bits, &h, 2);
        return bits;
    }
#endif
};

template <class T, int N>  // N numbers that lie together, in as few loads as may be; aligned to their size
struct alignas(sizeof(typename T::Stored) * N < 16 ? sizeof(typename T::Stored) * N : 16) Pack {
    typename T::Stored at[N];
};
template <class T, int N>
DEVICE void load(const typename T::Stored* from, float (&to)[N]) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = T::wide(pack.at[i]);
}
template <class T, int N>
DEVICE void store(typename T::Stored* to, const float (&from)[N]) {
    Pack<T, N> pack;
#pragma unroll
    for (int i = 0; i < N; ++i) pack.at[i] = T::narrow(from[i]);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

DEVICE float within(float v, float low, float high) { return v < low ? low : (v > high ? high : v); }

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

// One pose a warp from A points: smope/networks/gauss_newton.py says what is computed, in the same names. Rows of
// points, targets, weights and priors are as far apart as the last template arguments say.
template <int P, int A, int STEPS, bool RELATIVE, int POINT, int TARGET, int WEIGHT, int PRIOR, int STIFF>
DEVICE void fit_pose(const float* __restrict__ rotation, const float* __restrict__ translation,
                     const float* __restrict__ points, const float* __restrict__ targets,
                     const float* __restrict__ weights, const float* __restrict__ prior_step,
                     const float* __restrict__ prior_weight, const float* __restrict__ diameters,
                     const float* __restrict__ cameras, float* __restrict__ out, long long pairs) {
    const long long pair = THREAD / WARP;
    const int lane = (int)(THREAD % WARP);
    if (pair >= pairs) return;
    const float* k = cameras + pair / P * 9;
    const float fx = k[0], fy = k[4], focal = sqrtf(fx * fy), diameter = diameters[pair];
    float r[9], t[3], moved[6];
#pragma unroll
    for (int i = 0; i < 9; ++i) r[i] = rotation[pair * 9 + i];
#pragma unroll
    for (int i = 0; i < 3; ++i) t[i] = translation[pair * 3 + i];
#pragma unroll
    for (int i = 0; i < 6; ++i) moved[i] = 0.f;
    for (int turn = 0; turn < STEPS; ++turn) {
        const float depth = fmaxf(t[2], 1e-2f), apparent = focal * diameter / depth;
        float normal[6][6], right[6];
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            right[i] = 0.f;
#pragma unroll
            for (int j = 0; j < 6; ++j) normal[i][j] = 0.f;
        }
        for (int a = lane; a < A; a += WARP) {
            const long long at = pair * A + a;
            const float px = points[at * POINT], py = points[at * POINT + 1], pz = points[at * POINT + 2];
            const float qx = r[0] * px + r[1] * py + r[2] * pz, qy = r[3] * px + r[4] * py + r[5] * pz,
                        qz = r[6] * px + r[7] * py + r[8] * pz;
            const float X = diameter * qx + t[0], Y = diameter * qy + t[1], Z = diameter * qz + t[2];
            const float z = fmaxf(Z, 1e-2f), ax = X / z, ay = Y / z;
            float ox = targets[at * TARGET], oy = targets[at * TARGET + 1];
            if (!RELATIVE) {
                ox = (ox - (k[0] * ax + k[1] * ay + k[2] * (Z / z))) / apparent;
                oy = (oy - (k[3] * ax + k[4] * ay + k[5] * (Z / z))) / apparent;
            }
            const float gx = fx / z * (depth / focal), gy = fy / z * (depth / focal);
            const float tx = t[0] / diameter, ty = t[1] / diameter, tz = t[2] / diameter;
            const float mz[6] = {qy, -qx, 0.f, 0.f, 0.f, tz};
            const float mx[6] = {0.f, qz, -qy, 1.f, 0.f, tx}, my[6] = {-qz, 0.f, qx, 0.f, 1.f, ty};
            const float w = weights[at * WEIGHT] / A;
            float jx[6], jy[6];
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                jx[i] = gx * (mx[i] - ax * mz[i]);
                jy[i] = gy * (my[i] - ay * mz[i]);
            }
#pragma unroll
            for (int i = 0; i < 6; ++i) {
                right[i] += w * (jx[i] * ox + jy[i] * oy);
#pragma unroll
                for (int j = 0; j <= i; ++j) normal[i][j] += w * (jx[i] * jx[j] + jy[i] * jy[j]);
            }
        }
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            const float stiff = prior_weight[pair * STIFF + i];
            right[i] = warp_sum(right[i]) + stiff * (prior_step[pair * PRIOR + i] - moved[i]);
#pragma unroll
            for (int j = 0; j <= i; ++j) normal[i][j] = warp_sum(normal[i][j]);
            normal[i][i] += stiff;
        }
        // Cholesky, then both triangles.
#pragma unroll
        for (int i = 0; i < 6; ++i) {
#pragma unroll
            for (int j = 0; j <= i; ++j) {
                float sum = normal[i][j];
#pragma unroll
                for (int m = 0; m < j; ++m) sum -= normal[i][m] * normal[j][m];
                normal[i][j] = i == j ? sqrtf(sum) : sum / normal[j][j];
            }
        }
#pragma unroll
        for (int i = 0; i < 6; ++i) {
#pragma unroll
            for (int m = 0; m < i; ++m) right[i] -= normal[i][m] * right[m];
            right[i] /= normal[i][i];
        }
#pragma unroll
        for (int i = 5; i >= 0; --i) {
#pragma unroll
            for (int m = i + 1; m < 6; ++m) right[i] -= normal[m][i] * right[m];
            right[i] /= normal[i][i];
        }
        float most = 0.f;
#pragma unroll
        for (int i = 0; i < 6; ++i) most = fmaxf(most, fabsf(right[i]));
        const float too_long = fmaxf(most / LARGEST_STEP, 1.f);
#pragma unroll
        for (int i = 0; i < 6; ++i) {
            right[i] /= too_long;
            moved[i] += right[i];
        }
        // Rodrigues' formula; below a millionth of a radian its first order.
        const float angle = sqrtf(right[0] * right[0] + right[1] * right[1] + right[2] * right[2]);
        const bool small = angle < 1e-6f;
        const float s = small ? 1.f : sinf(angle) / angle, c = small ? 0.f : (1.f - cosf(angle)) / (angle * angle);
        const float x = right[0], y = right[1], v = right[2];
        const float turn_by[9] = {1.f - c * (y * y + v * v), c * x * y - s * v, c * x * v + s * y,
                                  c * x * y + s * v, 1.f - c * (x * x + v * v), c * y * v - s * x,
                                  c * x * v - s * y, c * y * v + s * x, 1.f - c * (x * x + y * y)};
        float turned[9];
#pragma unroll
        for (int i = 0; i < 3; ++i)
#pragma unroll
            for (int j = 0; j < 3; ++j)
                turned[3 * i + j] =
                    turn_by[3 * i] * r[j] + turn_by[3 * i + 1] * r[3 + j] + turn_by[3 * i + 2] * r[6 + j];
#pragma unroll
        for (int i = 0; i < 9; ++i) r[i] = turned[i];
        const float further = expf(right[5]);
        t[0] = t[0] * further + right[3] * diameter;
        t[1] = t[1] * further + right[4] * diameter;
        t[2] = t[2] * further;
    }
    if (lane != 0) return;
#pragma unroll
    for (int i = 0; i < 9; ++i) out[pair * 12 + i] = r[i];
#pragma unroll
    for (int i = 0; i < 3; ++i) out[pair * 12 + 9 + i] = t[i];
}

}  // namespace smope
