// Gradient of value where queries are few beside the cells (a decoder), without additions to memory: a block takes one
// head of one image and a range of a level's cells, lists the corners that fall into each cell (sorted by counting in
// shared memory), and writes every cell's sum, rounded once. The other gradients come from backward_kernel.
#pragma once

#include "backward.cuh"

namespace smope {

struct Entry {  // of a cell's list
    float weight;
    int query;
};

template <class L>
struct Gather {
    static constexpr int kThreads = 256, kWarps = kThreads / 32;
    static constexpr int kMostCells = 8192;  // of a range: counters in shared memory
};

// Calls use(query, spot, point) for the level's points of the image's head, `begin` before those of a query.
template <class L, class Use>
__device__ inline void each_point(const Problem<L::kLevels>& p, int batch, int head, int level, const Use& use) {
    using Offset = typename L::Offset;
    for (int query = threadIdx.x; query < p.queries; query += blockDim.x) {
        const long long row = static_cast<long long>(batch) * p.queries + query;
        const long long sample = (row * L::kHeads + head) * L::kSamples + level * L::kPoints;
        float moved[2 * L::kPoints];
        load_run(static_cast<const Offset*>(p.offsets) + 2 * sample, moved);
        use.begin(row);
#pragma unroll
        for (int k = 0; k < L::kPoints; ++k)
            use(query, locate<L>(p, row, level, make_float2(moved[2 * k], moved[2 * k + 1])), k);
    }
}

template <class L>
struct CountCorners {
    unsigned* counts;
    int low, high, width;
    unsigned& before;  // corners in lower cells of the level
    __device__ void begin(long long) const {}
    __device__ void operator()(int, const Spot& spot, int) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int cell = spot.cell + c % 2 + c / 2 * width;
            if (!(spot.corners >> c & 1) || cell >= high) continue;
            if (cell < low)
                ++before;
            else
                atomicAdd(counts + (cell - low), 1u);
        }
    }
};

template <class L>
struct ListCorners {
    unsigned* counts;  // of each cell, where the next corner goes
    int low, high, width;
    Entry* list;
    const Problem<L::kLevels>& p;
    int head, level;
    float (&weight)[L::kPoints];
    __device__ void begin(long long row) const {  // the softmax
        using Offset = typename L::Offset;
        const Offset* logits = static_cast<const Offset*>(p.logits) + (row * L::kHeads + head) * L::kSamples;
        float top = -__int_as_float(0x7f800000), sum = 0.f;
        load_run(logits + level * L::kPoints, weight);
#pragma unroll
        for (int l = 0; l < L::kLevels; ++l) {
            float x[L::kPoints];
            load_run(logits + l * L::kPoints, x);
            const float known = top;
#pragma unroll
            for (int k = 0; k < L::kPoints; ++k) top = fmaxf(top, x[k]);
            sum *= __expf(known - top);
#pragma unroll
            for (int k = 0; k < L::kPoints; ++k) sum += __expf(x[k] - top);
        }
#pragma unroll
        for (int k = 0; k < L::kPoints; ++k) weight[k] = __expf(weight[k] - top) / sum;
    }
    __device__ void operator()(int query, const Spot& spot, int k) const {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            const int cell = spot.cell + c % 2 + c / 2 * width;
            if (!(spot.corners >> c & 1) || cell < low || cell >= high) continue;
            const float x = c % 2 ? spot.lx : 1.f - spot.lx, y = c / 2 ? spot.ly : 1.f - spot.ly;
            list[atomicAdd(counts + (cell - low), 1u)] = Entry{weight[k] * x * y, query};
        }
    }
};

// grad.value: of Value, all of it written. entries: of each image and head, queries * kSamples * 4.
template <class L>
__global__ void __launch_bounds__(Gather<L>::kThreads, 4)
    gather_kernel(const __grid_constant__ Problem<L::kLevels> p,
                  const __grid_constant__ Gradients<typename L::Value> grad, Entry* entries) {
    using Value = typename L::Value;
    using G = Gather<L>;
    SMOPE_DYNAMIC_SHARED(memory);
    const int level = blockIdx.x % L::kLevels, part = blockIdx.x / L::kLevels, parts = gridDim.x / L::kLevels;
    const int width = p.width[level], whole = p.height[level] * width, range = (whole + parts - 1) / parts;
    const int low = p.start[level] + min(part * range, whole), high = min(low + range, p.start[level] + whole);
    const int cells = high - low;
    unsigned* counts = reinterpret_cast<unsigned*>(memory);  // [range], then [2][kWarps]
    unsigned* totals = counts + range;
    const int head = blockIdx.y, warp = threadIdx.x / 32;

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        for (int i = threadIdx.x; i < cells; i += G::kThreads) counts[i] = 0;
        __syncthreads();
        unsigned lower = 0;
        each_point<L>(p, batch, head, level, CountCorners<L>{counts, low, high, width, lower});
        __syncthreads();

        // From counts to where each cell's corners begin.
        const int share = ceil_div(cells, G::kThreads) | 1;  // odd: no two threads of a warp meet in a bank
        const int begin_cell = min(static_cast<int>(threadIdx.x) * share, cells);
        const int end_cell = min(begin_cell + share, cells);
        unsigned own = 0;
        for (int i = begin_cell; i < end_cell; ++i) own += counts[i];
        unsigned before = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(kAllLanes, before, step);
            if (static_cast<int>(threadIdx.x % 32) >= step) before += other;
            lower += __shfl_xor_sync(kAllLanes, lower, step);
        }
        if (threadIdx.x % 32 == 31) totals[warp] = before, totals[G::kWarps + warp] = lower;
        __syncthreads();
        before -= own;
        lower = 0;
        for (int i = 0; i < G::kWarps; ++i) {
            if (i < warp) before += totals[i];
            lower += totals[G::kWarps + i];
        }
        for (int i = begin_cell; i < end_cell; ++i) {
            const unsigned count = counts[i];
            counts[i] = before;
            before += count;
        }
        __syncthreads();
        const long long pair = static_cast<long long>(batch) * L::kHeads + head;
        Entry* list = entries + (pair * L::kLevels + level) * p.queries * L::kPoints * 4 + lower;
        float weight[L::kPoints];
        each_point<L>(p, batch, head, level, ListCorners<L>{counts, low, high, width, list, p, head, level, weight});
        __syncthreads();  // now counts[i] is where cell i ends

        const int lane = threadIdx.x % L::kLanes;
        const bool owns = L::kUsed == L::kLanes || lane < L::kUsed;
        const int channel = head * L::kHead + lane * L::kVec;
        const Value* given = grad.output + static_cast<long long>(batch) * p.queries * L::kStride + channel;
        Value* to = static_cast<Value*>(grad.value) + (batch * p.cells + low) * L::kStride + channel;
        constexpr int kTogether = 4;  // rows in flight
        for (int cell = threadIdx.x / L::kLanes; cell < cells; cell += G::kThreads / L::kLanes) {
            const int end = static_cast<int>(counts[cell]);
            float sum[L::kVec] = {};
            for (int i = cell > 0 ? static_cast<int>(counts[cell - 1]) : 0; i < end; i += kTogether) {
                Entry entry[kTogether];
                uint4 raw[kTogether];
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                    entry[n] = list[min(i + n, end - 1)];
                    if (i + n >= end) entry[n].weight = 0.f;
                }
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                    const long long from = static_cast<long long>(entry[n].query) * L::kStride;
                    raw[n] = owns ? *reinterpret_cast<const uint4*>(given + from) : make_uint4(0, 0, 0, 0);
                }
#pragma unroll
                for (int n = 0; n < kTogether; ++n) {
                    float x[L::kVec];
                    unpack(raw[n], x, Value{});
#pragma unroll
                    for (int k = 0; k < L::kVec; ++k) sum[k] += entry[n].weight * x[k];
                }
            }
            if (owns) store16(to + static_cast<long long>(cell) * L::kStride, sum);
        }
        __syncthreads();  // the next image reuses the memory
    }
}

}  // namespace smope
