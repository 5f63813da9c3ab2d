// Gradients of offsets and logits, and of value by atomic additions: a row of every corner of every point.
#pragma once

#include "common.cuh"

namespace smope {

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
__device__ inline void add_to(bool wanted, float* to, const float (&x)[N], float weight, float) {
#pragma unroll
    for (int k = 0; k < N; k += 4) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900 && !defined(SMOPE_PORTABLE)
        asm volatile(
            "{\n .reg .pred wanted;\n setp.ne.s32 wanted, %5, 0;\n"
            " @wanted red.global.add.v4.f32 [%0], {%1, %2, %3, %4};\n}" ::"l"(to + k),
            "f"(weight * x[k]), "f"(weight * x[k + 1]), "f"(weight * x[k + 2]), "f"(weight * x[k + 3]),
            "r"(static_cast<int>(wanted))
            : "memory");
#else
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (wanted) atomicAdd(to + k + i, weight * x[k + i]);
#endif
    }
}
template <int N>
__device__ inline void add_to(bool wanted, long long* to, const float (&x)[N], float weight, float scale) {
#pragma unroll
    for (int k = 0; k < N; ++k) {
        const long long whole = __float2ll_rn(weight * x[k] * scale);
        if (wanted) atomicAdd(reinterpret_cast<unsigned long long*>(to + k), static_cast<unsigned long long>(whole));
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

struct Nothing {};  // for Sum: the gradient of value is not wanted

template <class Value>
struct Gradients {
    const Value* output;   // given: [B, Q, H, D]
    void* offsets;         // [B, Q, H, L, P, 2], of Offset; in_cells: floats, of the location in cells
    void* logits;          // [B, Q, H, L, P], of Offset
    void* value;           // [B, S, H, D] of Sum, cleared
    const float* largest;  // of |output|'s elements; for Sum = long long
    int in_cells;
};

template <class L, class Sum>
__global__ void __launch_bounds__(128)
    backward_kernel(const __grid_constant__ Problem<L::kLevels> p,
                    const __grid_constant__ Gradients<typename L::Value> grad) {
    using Value = typename L::Value;
    using Offset = typename L::Offset;
    constexpr int kTogether = L::kLanes < 8 ? L::kLanes : 8;  // points whose dot products are reduced together
    const int lane = threadIdx.x % L::kLanes, split = threadIdx.x / L::kLanes % L::kSplit;
    const int place = blockIdx.x * (blockDim.x / L::kTeam) + threadIdx.x / L::kTeam;
    const bool owns = L::kUsed == L::kLanes || lane < L::kUsed;
    const bool exists = place < p.queries;
    const int query = min(place, p.queries - 1);
    const int head = blockIdx.y;
    const float scale = sizeof(Sum) == 8 ? fixed_point_scale(grad.largest, p.queries) : 1.f;

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long row = static_cast<long long>(batch) * p.queries + query;
        const long long pair = row * L::kHeads + head;
        const Offset* offsets = static_cast<const Offset*>(p.offsets) + pair * L::kSamples * 2;
        const Offset* logits = static_cast<const Offset*>(p.logits) + pair * L::kSamples;
        const long long first = batch * p.cells * L::kStride + head * L::kHead + (owns ? lane * L::kVec : 0);
        const Value* value = static_cast<const Value*>(p.value) + first;
        Sum* grad_value = static_cast<Sum*>(grad.value) + first;  // not touched if Sum is Nothing

        float given[L::kVec] = {};
        if (owns) unpack(*reinterpret_cast<const uint4*>(grad.output + pair * L::kHead + lane * L::kVec), given, Value{});
        float weight[L::kShare];
        softmax<L>(logits, split, lane, weight);

        float slope[L::kShare];  // d loss / d weight of the lane's own points
        float along = 0.f;       // sum of weight * slope over them
        uint4 raw[4] = {};
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = own_sample<L>(split, i, lane);
            Spot spot = {};
            if (mine < L::kSamples && exists) {
                spot = locate<L>(p, row, mine / L::kPoints, load_pair(offsets + 2 * mine));
            }
            float total[4] = {};  // of the lane's own point: <given, value> at its four corners
#pragma unroll
            for (int part = 0; part < L::kLanes; part += kTogether) {
                if (i * L::kLanes + part >= L::kEach) break;
                float dot[kTogether][4] = {};
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                    const int j = part + n;
                    if (i * L::kLanes + j >= L::kEach) break;
                    const int sample = min(split * L::kEach + i * L::kLanes + j, L::kSamples - 1);
                    const float a = __shfl_sync(kAllLanes, weight[i], j, L::kLanes);
                    const float lx = __shfl_sync(kAllLanes, spot.lx, j, L::kLanes);
                    const float ly = __shfl_sync(kAllLanes, spot.ly, j, L::kLanes);
                    const int cell = __shfl_sync(kAllLanes, spot.cell, j, L::kLanes);
                    const unsigned corners = __shfl_sync(kAllLanes, spot.corners, j, L::kLanes);
                    const float down = a * ly, up = a - down;
                    const float w[4] = {up - up * lx, up * lx, down - down * lx, down * lx};
                    const long long top = static_cast<long long>(cell) * L::kStride;
                    const long long below = top + static_cast<long long>(p.width[sample / L::kPoints]) * L::kStride;
                    const long long at[4] = {top, top + L::kStride, below, below + L::kStride};
#pragma unroll
                    for (int c = 0; c < 4; ++c)
                        if (owns && (corners >> c & 1)) raw[c] = *reinterpret_cast<const uint4*>(value + at[c]);
#pragma unroll
                    for (int c = 0; c < 4; ++c) {
                        if constexpr (sizeof(Sum) >= sizeof(float))
                            add_to(owns && (corners >> c & 1), grad_value + at[c], given, w[c], scale);
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
        along = group_sum<L::kTeam>(along);
        Offset* grad_logits = static_cast<Offset*>(grad.logits) + pair * L::kSamples;
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = own_sample<L>(split, i, lane);
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
