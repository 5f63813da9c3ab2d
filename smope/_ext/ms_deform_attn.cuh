// Multi-scale deformable attention (Zhu et al., Deformable DETR, ICLR 2021, eq. 3), softmax and location arithmetic
// inside. No torch header here: nvcc alone compiles it, and the tests run it on the CPU through a small CUDA stand-in.
//
// One group of kLanes neighbouring lanes serves one (query, head); a lane owns 16 bytes of the head's channels.
// Every lane prepares its share of the points once (location, weight, cells) and hands them to its group by shuffles.
#pragma once

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace smope {

// ---------------------------------------------------------------------------------------------- element types
struct F16 {
    unsigned short bits;
};
struct BF16 {
    unsigned short bits;
};

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) { return __half2float(__ushort_as_half(bits)); }
__device__ inline unsigned short float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
#endif

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(F16 x) { return half_to_float(x.bits); }
__device__ inline float to_float(BF16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ inline void assign(float& to, float x) { to = x; }
__device__ inline void assign(F16& to, float x) { to.bits = float_to_half(x); }
__device__ inline void assign(BF16& to, float x) {  // round to nearest, ties to even; a NaN stays a NaN
    unsigned bits = __float_as_uint(x);
    to.bits = x != x ? 0x7fff : static_cast<unsigned short>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
struct Vec16 {  // 16 bytes of T as floats
    static constexpr int kCount = 16 / sizeof(T);
};
__device__ inline void unpack(const uint4& raw, float (&x)[4], float) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
}
__device__ inline void unpack(const uint4& raw, float (&x)[8], BF16) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = __uint_as_float(words[i] << 16);
        x[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ inline void unpack(const uint4& raw, float (&x)[8], F16) {
    const unsigned words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        x[2 * i] = half_to_float(static_cast<unsigned short>(words[i] & 0xffffu));
        x[2 * i + 1] = half_to_float(static_cast<unsigned short>(words[i] >> 16));
    }
}
template <class T, int N>
__device__ inline void store16(T* to, const float (&x)[N]) {  // `to` lies on a 16-byte border
    union {
        uint4 raw;
        T items[N];
    } pack;
#pragma unroll
    for (int i = 0; i < N; ++i) assign(pack.items[i], x[i]);
    *reinterpret_cast<uint4*>(to) = pack.raw;
}
template <class T>
__device__ inline float2 load_pair(const T* from) {
    struct alignas(2 * sizeof(T)) Pair {
        T x, y;
    };
    const Pair pair = *reinterpret_cast<const Pair*>(from);
    return make_float2(to_float(pair.x), to_float(pair.y));
}
template <class T>
__device__ inline void store_pair(T* to, float x, float y) {
    struct alignas(2 * sizeof(T)) Pair {
        T x, y;
    };
    Pair pair;
    assign(pair.x, x), assign(pair.y, y);
    *reinterpret_cast<Pair*>(to) = pair;
}

// ---------------------------------------------------------------------------------------------- the problem
template <int kLevels>
struct Problem {
    int batch, queries, heads;
    int boxes;                                            // 1: reference is [B, Q, L, 4], else [B, Q, L, 2]
    int height[kLevels], width[kLevels], start[kLevels];  // start: the level's first cell
    long long cells;                                      // of all levels
    const void* value;                                    // [B, S, H, D]
    const float* reference;                               // [B, Q, L, 2 | 4]
    const void* offsets;                                  // [B, Q, H, L, P, 2]
    const void* logits;                                   // [B, Q, H, L, P]
};

constexpr int power_of_two_from(int n) { return n <= 1 ? 1 : 2 * power_of_two_from((n + 1) / 2); }
constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

template <class Value, int kHead, int kLevels, int kPoints>
struct Layout {
    static constexpr int kVec = Vec16<Value>::kCount;              // channels a lane
    static constexpr int kUsed = kHead / kVec;                     // lanes that own channels
    static constexpr int kLanes = power_of_two_from(kUsed);        // lanes of a (query, head)
    static constexpr int kSamples = kLevels * kPoints;             // points of a (query, head)
    static constexpr int kShare = ceil_div(kSamples, kLanes);      // points that a lane prepares
    static constexpr int kUnrolled = kShare <= 8 ? kShare : 1;     // beyond this, loop rather than blow up the code
    static_assert(kHead % 8 == 0 && kHead <= 128, "head size: a multiple of 8 up to 128");
};

constexpr unsigned kAllLanes = 0xffffffffu;

template <int kLanes>
__device__ inline float group_sum(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
    return x;
}
template <int kLanes>
__device__ inline float group_max(float x) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, step));
    return x;
}

// Softmax over the group's points. weight[i] is that of point i*kLanes + lane (zero past the last one).
template <class Offset, int kLanes, int kSamples, int kShare, int kUnrolled>
__device__ inline void softmax(const Offset* logits, int lane, float (&weight)[kShare]) {
    float top = -__int_as_float(0x7f800000);
#pragma unroll kUnrolled
    for (int i = 0; i < kShare; ++i) {
        const int sample = i * kLanes + lane;
        weight[i] = sample < kSamples ? to_float(logits[sample]) : -__int_as_float(0x7f800000);
        top = fmaxf(top, weight[i]);
    }
    top = group_max<kLanes>(top);
    float sum = 0.f;
#pragma unroll kUnrolled
    for (int i = 0; i < kShare; ++i) {
        weight[i] = i * kLanes + lane < kSamples ? __expf(weight[i] - top) : 0.f;
        sum += weight[i];
    }
    const float scale = 1.f / group_sum<kLanes>(sum);
#pragma unroll kUnrolled
    for (int i = 0; i < kShare; ++i) weight[i] *= scale;
}

// Where a sample lies: in cells of its level, (0, 0) the centre of the first one.
struct Spot {
    float lx, ly;             // within the cell square, 0..1
    int cell;                 // of the corner (x0, y0), counted over all levels; may lie outside
    unsigned corners;         // bit 0: (x0, y0) is in the level, 1: (x1, y0), 2: (x0, y1), 3: (x1, y1)
    float scale_x, scale_y;   // cells a unit of offset
};

template <int kLevels, int kPoints, class Offset>
__device__ inline Spot locate(const Problem<kLevels>& p, long long query, const Offset* offsets, int sample) {
    const int level = sample / kPoints;
    const int w = p.width[level], h = p.height[level];
    const float2 offset = load_pair(offsets + 2 * sample);
    Spot spot;
    float x, y;
    if (p.boxes) {
        const float* box = p.reference + (query * kLevels + level) * 4;
        spot.scale_x = box[2] * (0.5f / kPoints) * w;
        spot.scale_y = box[3] * (0.5f / kPoints) * h;
        x = fmaf(box[0], w, offset.x * spot.scale_x - 0.5f);
        y = fmaf(box[1], h, offset.y * spot.scale_y - 0.5f);
    } else {
        const float* point = p.reference + (query * kLevels + level) * 2;
        spot.scale_x = spot.scale_y = 1.f;
        x = fmaf(point[0], w, offset.x - 0.5f);  // rounded once at the size of x
        y = fmaf(point[1], h, offset.y - 0.5f);
    }
    spot.corners = 0;
    spot.lx = spot.ly = 0.f;
    spot.cell = 0;
    if (x > -1.f && x < w && y > -1.f && y < h) {  // false for NaN, too
        const float x0 = floorf(x), y0 = floorf(y);
        const int column = static_cast<int>(x0), row = static_cast<int>(y0);
        spot.lx = x - x0;
        spot.ly = y - y0;
        spot.cell = p.start[level] + row * w + column;
        const unsigned columns = (column >= 0 ? 5u : 0u) | (column + 1 < w ? 10u : 0u);
        const unsigned rows = (row >= 0 ? 3u : 0u) | (row + 1 < h ? 12u : 0u);
        spot.corners = columns & rows;
    }
    return spot;
}

// ---------------------------------------------------------------------------------------------- forward
template <class Value, class Offset, int kHead, int kLevels, int kPoints>
__global__ void __launch_bounds__(256) forward_kernel(const __grid_constant__ Problem<kLevels> p, Value* __restrict__ output) {
    using L = Layout<Value, kHead, kLevels, kPoints>;
    const int lane = threadIdx.x % L::kLanes;
    const int place = blockIdx.x * (blockDim.x / L::kLanes) + threadIdx.x / L::kLanes;
    const bool owns = L::kUsed == L::kLanes || lane < L::kUsed;
    const int query = min(place, p.queries - 1);  // groups past the end repeat the last query and store nothing
    const int head = blockIdx.y;
    const long long stride = static_cast<long long>(p.heads) * kHead;  // between neighbouring cells

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long row = static_cast<long long>(batch) * p.queries + query;
        const long long pair = row * p.heads + head;
        const Offset* offsets = static_cast<const Offset*>(p.offsets) + pair * L::kSamples * 2;
        const Offset* logits = static_cast<const Offset*>(p.logits) + pair * L::kSamples;
        const Value* value = static_cast<const Value*>(p.value) + batch * p.cells * stride + head * kHead +
                             (owns ? lane * L::kVec : 0);
        float weight[L::kShare];
        softmax<Offset, L::kLanes, L::kSamples, L::kShare, L::kUnrolled>(logits, lane, weight);

        float sum[L::kVec] = {};
        uint4 raw[4] = {};  // corners left out keep the bits of an earlier one, and count with weight zero
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = i * L::kLanes + lane;
            float corner[4] = {};
            int cell = 0;
            if (mine < L::kSamples) {
                const Spot spot = locate<kLevels, kPoints>(p, row, offsets, mine);
                const float down = weight[i] * spot.ly, up = weight[i] - down;
                cell = spot.cell;
                corner[0] = spot.corners & 1 ? up - up * spot.lx : 0.f;
                corner[1] = spot.corners & 2 ? up * spot.lx : 0.f;
                corner[2] = spot.corners & 4 ? down - down * spot.lx : 0.f;
                corner[3] = spot.corners & 8 ? down * spot.lx : 0.f;
            }
#pragma unroll
            for (int j = 0; j < L::kLanes; ++j) {
                const int sample = i * L::kLanes + j;
                if (sample >= L::kSamples) break;
                float w[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) w[c] = __shfl_sync(kAllLanes, corner[c], j, L::kLanes);
                const Value* at = value + __shfl_sync(kAllLanes, cell, j, L::kLanes) * stride;
                const Value* below = at + p.width[sample / kPoints] * stride;
                if (w[0] != 0.f) raw[0] = *reinterpret_cast<const uint4*>(at);
                if (w[1] != 0.f) raw[1] = *reinterpret_cast<const uint4*>(at + stride);
                if (w[2] != 0.f) raw[2] = *reinterpret_cast<const uint4*>(below);
                if (w[3] != 0.f) raw[3] = *reinterpret_cast<const uint4*>(below + stride);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float x[L::kVec];
                    unpack(raw[c], x, Value{});
#pragma unroll
                    for (int k = 0; k < L::kVec; ++k) sum[k] += w[c] * x[k];
                }
            }
        }
        if (owns && place < p.queries) store16(output + pair * kHead + lane * L::kVec, sum);
    }
}

// ---------------------------------------------------------------------------------------------- backward
// The gradient of value is a sum whose order the hardware chooses. Deterministic runs add whole numbers instead
// (64 bits, scaled so that no sum can overflow), which come out the same in any order.
__device__ inline float fixed_point_scale(const float* largest, int queries) {
    // A cell's gradient is at most `queries` times the largest one, since a query's weights sum to 1.
    const float bound = *largest * queries;
    int exponent = 0;
    frexpf(bound, &exponent);
    return bound > 0.f ? ldexpf(1.f, min(61 - exponent, 126)) : 1.f;
}

template <int N>
__device__ inline void add_to(float* to, const float (&x)[N], float weight, float) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(SMOPE_PORTABLE)
        asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to + k), "f"(weight * x[k]),
                     "f"(weight * x[k + 1]), "f"(weight * x[k + 2]), "f"(weight * x[k + 3])
                     : "memory");
#else
#pragma unroll
        for (int i = 0; i < 4; ++i) atomicAdd(to + k + i, weight * x[k + i]);
#endif
    }
}
template <int N>
__device__ inline void add_to(long long* to, const float (&x)[N], float weight, float scale) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const long long whole = __float2ll_rn(weight * x[k] * scale);
        atomicAdd(reinterpret_cast<unsigned long long*>(to + k), static_cast<unsigned long long>(whole));
    }
}

// Sums x[n][c] over the group's lanes; lane j ends with the sums of n = j % kCount in x[0].
template <int kLanes, int kHalf, int kCount>
__device__ inline void reduce_transposed(float (&x)[kCount][4], int lane) {
    if constexpr (kHalf > 0) {
        const bool upper = lane & kHalf;
#pragma unroll
        for (int n = 0; n < kHalf; ++n) {
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const float given = upper ? x[n][c] : x[n + kHalf][c];
                const float kept = upper ? x[n + kHalf][c] : x[n][c];
                x[n][c] = kept + __shfl_xor_sync(kAllLanes, given, kHalf);
            }
        }
        reduce_transposed<kLanes, kHalf / 2>(x, lane);
    } else {
#pragma unroll
        for (int step = kCount; step < kLanes; step *= 2) {
#pragma unroll
            for (int c = 0; c < 4; ++c) x[0][c] += __shfl_xor_sync(kAllLanes, x[0][c], step);
        }
    }
}

template <class Value>
struct Gradients {
    const Value* output;   // given: [B, Q, H, D]
    void* offsets;         // [B, Q, H, L, P, 2], of Offset; in_cells: floats, of the location in cells
    void* logits;          // [B, Q, H, L, P], of Offset
    void* value;           // [B, S, H, D] of Sum, cleared
    const float* largest;  // of |output|'s elements; for Sum = long long
    int in_cells;
};

template <class Value, class Offset, class Sum, int kHead, int kLevels, int kPoints>
__global__ void __launch_bounds__(128) backward_kernel(const __grid_constant__ Problem<kLevels> p, const __grid_constant__ Gradients<Value> grad) {
    using L = Layout<Value, kHead, kLevels, kPoints>;
    constexpr int kTogether = L::kLanes < 8 ? L::kLanes : 8;  // points whose dot products are reduced together
    const int lane = threadIdx.x % L::kLanes;
    const int place = blockIdx.x * (blockDim.x / L::kLanes) + threadIdx.x / L::kLanes;
    const bool owns = L::kUsed == L::kLanes || lane < L::kUsed;
    const bool exists = place < p.queries;
    const int query = min(place, p.queries - 1);
    const int head = blockIdx.y;
    const long long stride = static_cast<long long>(p.heads) * kHead;
    const float scale = sizeof(Sum) == 8 ? fixed_point_scale(grad.largest, p.queries) : 1.f;

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long row = static_cast<long long>(batch) * p.queries + query;
        const long long pair = row * p.heads + head;
        const Offset* offsets = static_cast<const Offset*>(p.offsets) + pair * L::kSamples * 2;
        const Offset* logits = static_cast<const Offset*>(p.logits) + pair * L::kSamples;
        const long long first = batch * p.cells * stride + head * kHead + (owns ? lane * L::kVec : 0);
        const Value* value = static_cast<const Value*>(p.value) + first;
        Sum* grad_value = static_cast<Sum*>(grad.value) + first;

        float given[L::kVec] = {};
        if (owns) unpack(*reinterpret_cast<const uint4*>(grad.output + pair * kHead + lane * L::kVec), given, Value{});
        float weight[L::kShare];
        softmax<Offset, L::kLanes, L::kSamples, L::kShare, L::kUnrolled>(logits, lane, weight);

        float slope[L::kShare];  // d loss / d weight of the lane's own points
        float along = 0.f;       // sum of weight * slope over them
        uint4 raw[4] = {};
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = i * L::kLanes + lane;
            Spot spot = {};
            if (mine < L::kSamples && exists) spot = locate<kLevels, kPoints>(p, row, offsets, mine);
            float total[4] = {};  // of the lane's own point: <given, value> at its four corners
#pragma unroll
            for (int part = 0; part < L::kLanes; part += kTogether) {
                if (i * L::kLanes + part >= L::kSamples) break;
                float dot[kTogether][4] = {};
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                    const int j = part + n;
                    const int sample = i * L::kLanes + j;
                    if (sample >= L::kSamples) break;
                    const float a = __shfl_sync(kAllLanes, weight[i], j, L::kLanes);
                    const float lx = __shfl_sync(kAllLanes, spot.lx, j, L::kLanes);
                    const float ly = __shfl_sync(kAllLanes, spot.ly, j, L::kLanes);
                    const int cell = __shfl_sync(kAllLanes, spot.cell, j, L::kLanes);
                    const unsigned corners = __shfl_sync(kAllLanes, spot.corners, j, L::kLanes);
                    const float down = a * ly, up = a - down;
                    const float w[4] = {up - up * lx, up * lx, down - down * lx, down * lx};
                    const long long below = p.width[sample / kPoints] * stride;
                    const long long at[4] = {cell * stride, (cell + 1) * stride, cell * stride + below,
                                             (cell + 1) * stride + below};
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (owns && (corners >> c & 1)) raw[c] = *reinterpret_cast<const uint4*>(value + at[c]);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        if (owns && (corners >> c & 1)) add_to(grad_value + at[c], given, w[c], scale);
                        float x[L::kVec];
                        unpack(raw[c], x, Value{});
#pragma unroll
                        for (int k = 0; k < L::kVec; ++k) dot[n][c] += given[k] * x[k];
                    }
                }
                reduce_transposed<L::kLanes, kTogether / 2>(dot, lane);
                if (lane / kTogether == part / kTogether) {
#pragma unroll
                    for (int c = 0; c < 4; ++c) total[c] = spot.corners >> c & 1 ? dot[0][c] : 0.f;
                }
            }
            const float above = total[0] + spot.lx * (total[1] - total[0]);
            const float under = total[2] + spot.lx * (total[3] - total[2]);
            slope[i] = above + spot.ly * (under - above);
            along += weight[i] * slope[i];
            if (mine < L::kSamples && exists) {
                const float left = total[1] - total[0], right = total[3] - total[2];
                const float dx = weight[i] * (left + spot.ly * (right - left));
                const float dy = weight[i] * (under - above);
                if (grad.in_cells)
                    store_pair(static_cast<float*>(grad.offsets) + (pair * L::kSamples + mine) * 2, dx, dy);
                else
                    store_pair(static_cast<Offset*>(grad.offsets) + (pair * L::kSamples + mine) * 2,
                               dx * spot.scale_x, dy * spot.scale_y);
            }
        }
        along = group_sum<L::kLanes>(along);
        Offset* grad_logits = static_cast<Offset*>(grad.logits) + pair * L::kSamples;
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = i * L::kLanes + lane;
            if (mine < L::kSamples && exists) assign(grad_logits[mine], weight[i] * (slope[i] - along));
        }
    }
}

__device__ inline float settle(float x, float) { return x; }
__device__ inline float settle(long long x, float scale) { return static_cast<float>(x) / scale; }

// The sums of one pass, rounded to the value's type.
template <class Value, class Sum>
__global__ void round_kernel(const Sum* sums, Value* to, long long count, const float* largest, int queries) {
    float scale = 1.f;
    if (sizeof(Sum) == 8) {
        scale = fixed_point_scale(largest, queries);
        if (!(*largest < __int_as_float(0x7f800000))) scale = __int_as_float(0x7fc00000);  // inf and NaN stay visible
    }
    constexpr int kVec = Vec16<Value>::kCount;
    const long long step = static_cast<long long>(gridDim.x) * blockDim.x * kVec;
    for (long long i = (static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x) * kVec; i < count; i += step) {
        float x[kVec];
#pragma unroll
        for (int k = 0; k < kVec; ++k) x[k] = settle(sums[i + k], scale);
        store16(to + i, x);
    }
}

}  // namespace smope
