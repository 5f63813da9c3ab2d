// The weighted sums.
#pragma once

#include "common.cuh"

namespace smope {

#ifndef SMOPE_FORWARD_BLOCKS  // of a multiprocessor, at least
#define SMOPE_FORWARD_BLOCKS (sizeof(typename L::Value) == 4 ? 5 : L::kLevels > 3 ? 3 : 4)
#endif

template <class L>
__global__ void __launch_bounds__(256, SMOPE_FORWARD_BLOCKS)
    forward_kernel(const __grid_constant__ Problem<L::kLevels> p, typename L::Value* __restrict__ output) {
    using Value = typename L::Value;
    using Offset = typename L::Offset;
    const int lane = threadIdx.x % L::kLanes, split = threadIdx.x / L::kLanes % L::kSplit;
    const int place = blockIdx.x * (blockDim.x / L::kTeam) + threadIdx.x / L::kTeam;
    const bool owns = L::kUsed == L::kLanes || lane < L::kUsed;
    const int query = min(place, p.queries - 1);  // teams past the end repeat the last query and store nothing
    const int head = blockIdx.y;

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long row = static_cast<long long>(batch) * p.queries + query;
        const long long pair = row * L::kHeads + head;
        const Offset* offsets = static_cast<const Offset*>(p.offsets) + pair * L::kSamples * 2;
        const Offset* logits = static_cast<const Offset*>(p.logits) + pair * L::kSamples;
        const Value* value = static_cast<const Value*>(p.value) + batch * p.cells * L::kStride + head * L::kHead +
                             (owns ? lane * L::kVec : 0);
        float weight[L::kShare];
        softmax<L>(logits, split, lane, weight);

        float sum[L::kVec] = {};
        uint4 raw[4] = {};  // corners left out keep the bits of an earlier one, and count with weight zero
#pragma unroll L::kUnrolled
        for (int i = 0; i < L::kShare; ++i) {
            const int mine = own_sample<L>(split, i, lane);
            float corner[4] = {};
            int cell = 0;
            if (mine < L::kSamples) {
                const Spot spot = locate<L>(p, row, mine / L::kPoints, load_pair(offsets + 2 * mine));
                const float down = weight[i] * spot.ly, up = weight[i] - down;
                cell = spot.cell;
                corner[0] = spot.corners & 1 ? up - up * spot.lx : 0.f;
                corner[1] = spot.corners & 2 ? up * spot.lx : 0.f;
                corner[2] = spot.corners & 4 ? down - down * spot.lx : 0.f;
                corner[3] = spot.corners & 8 ? down * spot.lx : 0.f;
            }
#pragma unroll
            for (int j = 0; j < L::kLanes; ++j) {
                if (i * L::kLanes + j >= L::kEach) break;
                const int sample = min(split * L::kEach + i * L::kLanes + j, L::kSamples - 1);
                float w[4];
#pragma unroll
                for (int c = 0; c < 4; ++c) w[c] = __shfl_sync(kAllLanes, corner[c], j, L::kLanes);
                const Value* at =
                    value + static_cast<long long>(__shfl_sync(kAllLanes, cell, j, L::kLanes)) * L::kStride;
                const Value* below = at + static_cast<long long>(p.width[sample / L::kPoints]) * L::kStride;
                if (w[0] != 0.f) raw[0] = *reinterpret_cast<const uint4*>(at);
                if (w[1] != 0.f) raw[1] = *reinterpret_cast<const uint4*>(at + L::kStride);
                if (w[2] != 0.f) raw[2] = *reinterpret_cast<const uint4*>(below);
                if (w[3] != 0.f) raw[3] = *reinterpret_cast<const uint4*>(below + L::kStride);
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    float x[L::kVec];
                    unpack(raw[c], x, Value{});
#pragma unroll
                    for (int k = 0; k < L::kVec; ++k) sum[k] += w[c] * x[k];
                }
            }
        }
#pragma unroll
        for (int step = L::kLanes; step < L::kTeam; step *= 2) {
#pragma unroll
            for (int k = 0; k < L::kVec; ++k) sum[k] += __shfl_xor_sync(kAllLanes, sum[k], step);
        }
        if (owns && split == 0 && place < p.queries) store16(output + pair * L::kHead + lane * L::kVec, sum);
    }
}

}  // namespace smope
