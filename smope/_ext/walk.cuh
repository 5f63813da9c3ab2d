// The tiles of the encoders' backward (tile.cuh), and the inner loop over their sorted corners.
#pragma once

#include "backward.cuh"

namespace smope {

template <int kLevels>
struct Tiles {
    int first[kLevels + 1];  // of each level of queries, the first tile; then their number
    int columns[kLevels];    // tiles in a row
};

template <bool kValue>
struct Flag {
    static constexpr bool value = kValue;
};

struct Window {
    int left, top, width, height;  // cells of a level
};

template <class L_>
struct Tile {
    using L = L_;
#ifndef SMOPE_TILE_WIDTH
#define SMOPE_TILE_WIDTH 8
#endif
#ifndef SMOPE_TILE_HEIGHT
#define SMOPE_TILE_HEIGHT 8
#endif
    static constexpr int kWidth = SMOPE_TILE_WIDTH, kHeight = SMOPE_TILE_HEIGHT;
    static constexpr int kQueries = kWidth * kHeight;
    static constexpr int kThreads = kQueries * L::kLevels;
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kCorners = kQueries * L::kSamples * 4;
    static constexpr int kLanes = L::kHead / 8;  // of a group: 8 channels a lane
    static constexpr int kGroups = kThreads / kLanes;
    // Of the settings tried (benchmarks/msda.md), the fastest; fewer levels, so more blocks of less shared memory.
#ifndef SMOPE_TILE_CELLS
#define SMOPE_TILE_CELLS (L::kLevels > 3 ? 3072 : 2048)
#endif
    static constexpr int kCells = SMOPE_TILE_CELLS;  // counters
#ifndef SMOPE_TILE_BLOCKS
#define SMOPE_TILE_BLOCKS (L::kLevels > 3 ? 2 : 4)
#endif
    static constexpr int kBlocks = kThreads <= 384 ? SMOPE_TILE_BLOCKS : 1;  // of a multiprocessor, at least
    static_assert(kQueries % 32 == 0, "a warp's threads have one level");
    static_assert(kCells % 4 == 0, "counters are cleared four at a time");
    static_assert(kQueries < 256, "a query's number in the tile takes 8 bits");

#ifndef SMOPE_TILE_CHUNKS
#define SMOPE_TILE_CHUNKS (L::kLevels > 3 ? kCorners / 16 * 7 : kCorners / 12 * 5)
#endif
    static constexpr int kChunks = SMOPE_TILE_CHUNKS;  // at a time

    struct Shared {
        float4 weights[kChunks];                    // of a chunk's corners; then their products
        unsigned queries[kChunks];                  // of a chunk's corners, 8 bits each
        int cells[kChunks];                         // of a chunk
        alignas(16) float given[(kQueries + 1) * L::kHead];  // the queries' grad_output, and a row of zeros
        alignas(16) unsigned counts[kCells + 4];    // counts[kCells]: corners outside the windows
        float tops[L::kLevels][kQueries], sums[L::kLevels][kQueries];  // of the softmax; sums of weight * slope
        int boxes[kWarps][8];
        Window windows[L::kLevels];
        int middles[L::kLevels][2];
        unsigned totals[kWarps];
    };
};

template <class T>
struct alignas(4 * sizeof(T)) Four {  // neighbouring elements
    unsigned words[sizeof(T)];
};
__device__ inline void unpack(const Four<float>& raw, float (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = __uint_as_float(raw.words[k]);
}
template <class T>
__device__ inline void unpack(const Four<T>& raw, float (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        T item;
        item.bits = static_cast<unsigned short>(raw.words[k / 2] >> 16 * (k % 2));
        x[k] = to_float(item);
    }
}

// A lane's eight channels of a row: four and, `beyond` them, four.
template <class T>
struct Eight {
    Four<T> low, high;
    __device__ void load(const T* at, int beyond) {
        low = *reinterpret_cast<const Four<T>*>(at);
        high = *reinterpret_cast<const Four<T>*>(at + beyond);
    }
    __device__ void get(float (&a)[4], float (&b)[4]) const {
        unpack(low, a);
        unpack(high, b);
    }
};

// Step 3: each group of lanes takes the next stretch of chunks; leaves products in place of the weights.
template <class T>
__device__ inline void walk(const Problem<T::L::kLevels>& p, const Gradients<typename T::L::Value>& grad,
                            typename T::Shared& shared, int batch, int chunks) {
    using L = typename T::L;
    using Value = typename L::Value;
    const int group = threadIdx.x / T::kLanes, lane = threadIdx.x % T::kLanes;
    const int stretch = ceil_div(chunks, T::kGroups) | 1;  // odd: groups of a warp read other banks
    const int begin = group * stretch, end = min(begin + stretch, chunks);
    // A lane's channels: four of each half of the head; every other group begins with the upper half, so that two
    // groups that read together meet in no bank.
    const int channel = 4 * lane + (group % 2) * (L::kHead / 2);
    const int beyond = group % 2 ? -L::kHead / 2 : L::kHead / 2;  // from there to the other four
    const long long first = batch * p.cells * L::kStride + static_cast<int>(blockIdx.y) * L::kHead + channel;
    const Value* value = static_cast<const Value*>(p.value) + first;
    float* grad_value = static_cast<float*>(grad.value) + first;
    const char* grad_output = reinterpret_cast<const char*>(shared.given + channel);
    constexpr int kRow = L::kHead * sizeof(float);  // bytes, a power of two
    Eight<Value> ahead = {};  // of the next chunk's row of value
    const auto prefetch = [&](int cell) { ahead.load(value + static_cast<long long>(cell) * L::kStride, beyond); };
    int cell = 0;
    if (begin < end) prefetch(cell = shared.cells[begin]);
    float sum_low[4] = {}, sum_high[4] = {};  // of the cell
    for (int step = 0; step < stretch; ++step) {
        const int chunk = begin + step;
        float dot[4] = {};
        if (chunk < end) {
            float low[4], high[4];
            ahead.get(low, high);
            const int next = chunk + 1 < end ? shared.cells[chunk + 1] : -1;
            const bool last = next != cell;  // of its cell in this stretch
            if (last && next >= 0) prefetch(next);
            const unsigned queries = shared.queries[chunk];
            const float4 weights = shared.weights[chunk];
            const float part[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const unsigned row = kRow >> 8 * j ? queries * (kRow >> 8 * j) : queries / ((1 << 8 * j) / kRow);
                Eight<float> given;
                given.load(reinterpret_cast<const float*>(grad_output + (row & 255 * kRow)), beyond);
                float x[4], y[4];
                given.get(x, y);
#pragma unroll
                for (int k = 0; k < 4; ++k) {
                    dot[j] = fmaf(low[k], x[k], fmaf(high[k], y[k], dot[j]));
                    sum_low[k] += part[j] * x[k];
                    sum_high[k] += part[j] * y[k];
                }
            }
            float* to = grad_value + static_cast<long long>(cell) * L::kStride;
            add_to(last, to, sum_low, 1.f, 1.f);
            add_to(last, to + beyond, sum_high, 1.f, 1.f);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                sum_low[k] = last ? 0.f : sum_low[k];
                sum_high[k] = last ? 0.f : sum_high[k];
            }
            cell = next;
        }
        // Lane j of every four ends with the product of corner j.
        const bool second = lane & 2, odd = lane & 1;
        float even_sum = second ? dot[2] : dot[0], odd_sum = second ? dot[3] : dot[1];
        even_sum += __shfl_xor_sync(kAllLanes, second ? dot[0] : dot[2], 2);
        odd_sum += __shfl_xor_sync(kAllLanes, second ? dot[1] : dot[3], 2);
        float product = (odd ? odd_sum : even_sum) + __shfl_xor_sync(kAllLanes, odd ? even_sum : odd_sum, 1);
#pragma unroll
        for (int far = 4; far < T::kLanes; far *= 2) product += __shfl_xor_sync(kAllLanes, product, far);
        __syncwarp();  // all lanes have read the weights
        if (chunk < end && lane < 4) reinterpret_cast<float*>(shared.weights + chunk)[lane] = product;
    }
}

}  // namespace smope
