// All gradients where every cell has a query (an encoder). Neighbouring queries hit the same cells many times, and
// adding every corner's row to memory (backward_kernel) is bound by the rate at which the L2 cache can add. So a block
// takes one head of a tile of queries and
//   1. prepares the points, a thread for each (query, level),
//   2. sorts their corners by cell, by counting in shared memory,
//   3. walks the sorted corners, a stretch for each group of lanes: a cell's row of value is read once, and its gradient
//      added to memory once,
//   4. hands each corner's product <grad_output, value> back to its thread, for the gradients of offsets and logits.
// Counters cover a window of cells in each level, around the tile's own corners; a corner beyond is a row of its own.
#pragma once

#include "backward.cuh"

namespace smope {

template <int kLevels>
struct Tiles {
    int first[kLevels + 1];  // of each level of queries, the first tile; then their number
    int columns[kLevels];    // tiles in a row
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
#ifndef SMOPE_TILE_CELLS
#define SMOPE_TILE_CELLS 3072
#endif
    static constexpr int kCells = SMOPE_TILE_CELLS;  // counters
#ifndef SMOPE_TILE_BLOCKS
#define SMOPE_TILE_BLOCKS 3
#endif
    static constexpr int kBlocks = kThreads <= 256 ? SMOPE_TILE_BLOCKS : 1;  // of a multiprocessor, at least
    static_assert(kQueries % 32 == 0, "a warp's threads have one level");

    struct Shared {
        float weights[kCorners + 4];                // of the sorted corners; then their products
        unsigned keys[kCorners + 4];                // of the sorted corners: row << 16 | query
        int rows[kCorners];                         // their cells
        float given[(kQueries + 1) * L::kHead];     // the queries' grad_output, and a row of zeros
        unsigned counts[kCells + 1];                // last: corners outside the windows
        float tops[L::kLevels][kQueries], sums[L::kLevels][kQueries];  // of the softmax; sums of weight * slope
        int boxes[kWarps][8];
        Window windows[L::kLevels];
        int middles[L::kLevels][2];
        unsigned totals[kWarps];
    };
};

// Minimum of x[0 .. 3] and sum of x[4 .. 7] over the warp.
__device__ inline void warp_min_and_sum(int (&x)[8]) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int other = __shfl_xor_sync(kAllLanes, x[k], step);
            x[k] = k < 4 ? min(x[k], other) : x[k] + other;
        }
    }
}

// grad.value: floats, [B, S, H, D], cleared.
template <class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks)
    tile_kernel(const __grid_constant__ Problem<T::L::kLevels> p,
                const __grid_constant__ Gradients<typename T::L::Value> grad,
                const __grid_constant__ Tiles<T::L::kLevels> tiles) {
    using L = typename T::L;
    using Value = typename L::Value;
    using Offset = typename L::Offset;
    constexpr int kPoints = L::kPoints;
    SMOPE_DYNAMIC_SHARED(memory);
    auto& shared = *reinterpret_cast<typename T::Shared*>(memory);
    const int place = threadIdx.x % T::kQueries, level = threadIdx.x / T::kQueries;
    const int warp = threadIdx.x / 32;
    const int head = blockIdx.y;

    int of = 0;  // the level that this tile's queries belong to
    while (of + 1 < L::kLevels && static_cast<int>(blockIdx.x) >= tiles.first[of + 1]) ++of;
    const int tile = blockIdx.x - tiles.first[of];
    const int tile_x = tile % tiles.columns[of] * T::kWidth, tile_y = tile / tiles.columns[of] * T::kHeight;
    const auto query_at = [&](int n) {  // the tile's n-th query, or -1 beyond the level
        const int x = tile_x + n % T::kWidth, y = tile_y + n / T::kWidth;
        return x < p.width[of] && y < p.height[of] ? p.start[of] + y * p.width[of] + x : -1;
    };
    const int w = p.width[level], h = p.height[level];

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long batch_row = static_cast<long long>(batch) * p.queries;

        // ---- 1. The queries' gradients, and each thread's points.
        for (int i = threadIdx.x; i < (T::kQueries + 1) * L::kHead / 4; i += T::kThreads) {
            const int n = i / (L::kHead / 4), channel = i % (L::kHead / 4) * 4;
            const int query = n < T::kQueries ? query_at(n) : -1;
            float x[4] = {};
            if (query >= 0) load_run(grad.output + ((batch_row + query) * L::kHeads + head) * L::kHead + channel, x);
            store16(shared.given + i * 4, x);
        }
        for (int i = threadIdx.x; i <= T::kCells; i += T::kThreads) shared.counts[i] = 0;

        const bool exists = query_at(place) >= 0;
        const long long query = batch_row + (exists ? query_at(place) : p.start[of]);
        const long long first_sample = (query * L::kHeads + head) * L::kSamples + level * kPoints;
        float weight[kPoints];
        load_run(static_cast<const Offset*>(p.logits) + first_sample, weight);
        float top = weight[0], sum = 0.f;
#pragma unroll
        for (int k = 1; k < kPoints; ++k) top = fmaxf(top, weight[k]);
#pragma unroll
        for (int k = 0; k < kPoints; ++k) sum += weight[k] = __expf(weight[k] - top);
        shared.tops[level][place] = top, shared.sums[level][place] = sum;

        float moved[2 * kPoints];
        load_run(static_cast<const Offset*>(p.offsets) + 2 * first_sample, moved);
        float lx[kPoints], ly[kPoints], scale_x = 0.f, scale_y = 0.f;
        int column[kPoints], line[kPoints];
        unsigned corners = 0;  // Spot::corners, four bits a point
        constexpr int kFar = 1 << 28;
        int box[8] = {kFar, kFar, kFar, kFar, 0, 0, 0, 0};  // least x, y, -x, -y; sum of x, y; points
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
            const Spot spot = locate<L>(p, query, level, make_float2(moved[2 * k], moved[2 * k + 1]));
            lx[k] = spot.lx, ly[k] = spot.ly, column[k] = spot.column, line[k] = spot.row;
            scale_x = spot.scale_x, scale_y = spot.scale_y;
            if (exists && spot.corners != 0) {
                corners |= spot.corners << 4 * k;
                box[0] = min(box[0], max(column[k], 0)), box[1] = min(box[1], max(line[k], 0));
                box[2] = min(box[2], -min(column[k] + 1, w - 1)), box[3] = min(box[3], -min(line[k] + 1, h - 1));
                box[4] += column[k], box[5] += line[k], ++box[6];
            }
        }
        warp_min_and_sum(box);
        if (threadIdx.x % 32 == 0) {
#pragma unroll
            for (int k = 0; k < 8; ++k) shared.boxes[warp][k] = box[k];
        }
        __syncthreads();

        float scale = 0.f;  // from the level's softmax to that of all
        top = -__int_as_float(0x7f800000), sum = 0.f;
#pragma unroll
        for (int l = 0; l < L::kLevels; ++l) top = fmaxf(top, shared.tops[l][place]);
#pragma unroll
        for (int l = 0; l < L::kLevels; ++l) {
            const float share = __expf(shared.tops[l][place] - top);
            sum += share * shared.sums[l][place];
            if (l == level) scale = share;
        }
        scale /= sum;
#pragma unroll
        for (int k = 0; k < kPoints; ++k) weight[k] *= scale;
        if (place == 0) {  // the level's window: the box of its corners
            for (int other = 1; other < T::kQueries / 32; ++other) {
                for (int k = 0; k < 4; ++k) box[k] = min(box[k], shared.boxes[warp + other][k]);
                for (int k = 4; k < 7; ++k) box[k] += shared.boxes[warp + other][k];
            }
            const bool empty = box[6] == 0;
            shared.windows[level] = empty ? Window{0, 0, 0, 0}
                                          : Window{box[0], box[1], 1 - box[2] - box[0], 1 - box[3] - box[1]};
            shared.middles[level][0] = empty ? 0 : box[4] / box[6];
            shared.middles[level][1] = empty ? 0 : box[5] / box[6];
        }
        __syncthreads();

        // ---- 2. The windows, no wider than there are counters; then count, add up and place.
        int limit = T::kCells, cells = 0;  // longest side of a window; counters used
        for (;; limit = limit > 64 ? 64 : limit - 3) {
            cells = 0;
            for (int l = 0; l < L::kLevels; ++l)
                cells += min(shared.windows[l].width, limit) * min(shared.windows[l].height, limit);
            if (cells <= T::kCells) break;
        }
        int first = 0;
        for (int l = 0; l < level; ++l)
            first += min(shared.windows[l].width, limit) * min(shared.windows[l].height, limit);
        Window window = shared.windows[level];
        if (window.width > limit) {
            window.left = max(window.left, min(shared.middles[level][0] - limit / 2,
                                               window.left + window.width - limit));
            window.width = limit;
        }
        if (window.height > limit) {
            window.top = max(window.top, min(shared.middles[level][1] - limit / 2,
                                             window.top + window.height - limit));
            window.height = limit;
        }
        const auto counter_of = [&](int k, int c) {
            const int x = column[k] + c % 2 - window.left, y = line[k] + c / 2 - window.top;
            const bool inside = x >= 0 && x < window.width && y >= 0 && y < window.height;
            return inside ? first + y * window.width + x : T::kCells;
        };
        unsigned rank[kPoints][4];  // among the corners of its cell
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
#pragma unroll
            for (int c = 0; c < 4; ++c)
                if (corners >> (4 * k + c) & 1) rank[k][c] = atomicAdd(&shared.counts[counter_of(k, c)], 1u);
        }
        __syncthreads();

        // From counts to where each cell's corners begin: row << 16 | place.
        const int share = ceil_div(cells, T::kThreads) | 1;  // odd: no two threads of a warp meet in a bank
        const int begin_cell = min(static_cast<int>(threadIdx.x) * share, cells), end_cell = min(begin_cell + share, cells);
        unsigned own = 0;
        for (int i = begin_cell; i < end_cell; ++i) own += shared.counts[i] | (shared.counts[i] != 0 ? 1u << 16 : 0u);
        unsigned before = own;
#pragma unroll
        for (int step = 1; step < 32; step *= 2) {
            const unsigned other = __shfl_up_sync(kAllLanes, before, step);
            if (static_cast<int>(threadIdx.x % 32) >= step) before += other;
        }
        if (threadIdx.x % 32 == 31) shared.totals[warp] = before;
        __syncthreads();
        before -= own;
        unsigned inside = 0;
        for (int i = 0; i < T::kWarps; ++i) {
            if (i < warp) before += shared.totals[i];
            inside += shared.totals[i];
        }
        for (int i = begin_cell; i < end_cell; ++i) {
            const unsigned count = shared.counts[i];
            shared.counts[i] = before;
            before += count | (count != 0 ? 1u << 16 : 0u);
        }
        const int strays = static_cast<int>(shared.counts[T::kCells]);
        const int all = static_cast<int>(inside & 0xffff) + strays, all_rows = static_cast<int>(inside >> 16) + strays;
        __syncthreads();
        unsigned ats[kPoints][2] = {};  // the corners' places in the sorted list, 16 bits each
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
            const float down = weight[k] * ly[k], up = weight[k] - down;
            const float part[4] = {up - up * lx[k], up * lx[k], down - down * lx[k], down * lx[k]};
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                if (!(corners >> (4 * k + c) & 1)) continue;
                const int counter = counter_of(k, c);
                const bool stray = counter == T::kCells;
                const unsigned start = stray ? inside : shared.counts[counter];
                const unsigned row = (start >> 16) + (stray ? rank[k][c] : 0);
                if (stray || rank[k][c] == 0)
                    shared.rows[row] = p.start[level] + (line[k] + c / 2) * w + column[k] + c % 2;
                const unsigned at = (start & 0xffff) + rank[k][c];
                shared.weights[at] = part[c];
                shared.keys[at] = row << 16 | place;
                ats[k][c / 2] |= at << 16 * (c % 2);
            }
        }
        if (threadIdx.x < 4) {  // fills the last four corners up
            shared.weights[all + threadIdx.x] = 0.f;
            shared.keys[all + threadIdx.x] = static_cast<unsigned>(all_rows - 1) << 16 | T::kQueries;
        }
        __syncthreads();

        // ---- 3. Each group of lanes takes the next `stretch` corners of the list, four at a time.
        {
            const int group = threadIdx.x / T::kLanes, lane = threadIdx.x % T::kLanes;
            const int stretch = (ceil_div(all, 4 * T::kGroups) | 1) * 4;
            const int begin = group * stretch, end = min(begin + stretch, all);
            // A lane's channels: four of each half of the head; every other group begins with the upper half, so that
            // two groups that read together meet in no bank.
            const int channel = 4 * lane + (group % 2) * (L::kHead / 2), other = channel ^ (L::kHead / 2);
            const long long image = batch * p.cells * L::kStride + head * L::kHead;
            const Value* value = static_cast<const Value*>(p.value) + image;
            float* grad_value = static_cast<float*>(grad.value) + image;
            struct alignas(4 * sizeof(Value)) Four {
                Value items[4];
            };
            Four next_low = {}, next_high = {};
            const auto prefetch = [&](int row) {
                const Value* at = value + static_cast<long long>(shared.rows[min(row, all_rows - 1)]) * L::kStride;
                next_low = *reinterpret_cast<const Four*>(at + channel);
                next_high = *reinterpret_cast<const Four*>(at + other);
            };
            float low[4] = {}, high[4] = {};  // of the row at hand
            const auto take_next = [&] {
#pragma unroll
                for (int k = 0; k < 4; ++k) low[k] = to_float(next_low.items[k]), high[k] = to_float(next_high.items[k]);
            };
            float sum_low[4] = {}, sum_high[4] = {};
            int row = 0;
            if (begin < end) {
                row = static_cast<int>(shared.keys[begin] >> 16);
                prefetch(row);
                take_next();
                prefetch(row + 1);
            }
            const auto add_row = [&] {
                float* at = grad_value + static_cast<long long>(shared.rows[row]) * L::kStride;
                add_to(true, at + channel, sum_low, 1.f, 1.f);
                add_to(true, at + other, sum_high, 1.f, 1.f);
            };
            for (int step = 0; step < stretch; step += 4) {
                const bool active = begin + step < end;
                float dot[4] = {};
                if (active) {
                    const uint4 keys = *reinterpret_cast<const uint4*>(shared.keys + begin + step);
                    const float4 weights = *reinterpret_cast<const float4*>(shared.weights + begin + step);
                    const unsigned key[4] = {keys.x, keys.y, keys.z, keys.w};
                    const float part[4] = {weights.x, weights.y, weights.z, weights.w};
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        if (static_cast<int>(key[j] >> 16) != row) {  // the next one
                            add_row();
                            ++row;
                            take_next();
                            prefetch(row + 1);
#pragma unroll
                            for (int k = 0; k < 4; ++k) sum_low[k] = sum_high[k] = 0.f;
                        }
                        const float* given = shared.given + (key[j] & 0xffff) * L::kHead;
                        const float4 a = *reinterpret_cast<const float4*>(given + channel);
                        const float4 b = *reinterpret_cast<const float4*>(given + other);
                        const float x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            dot[j] += low[k] * x[k] + high[k] * y[k];
                            sum_low[k] += part[j] * x[k];
                            sum_high[k] += part[j] * y[k];
                        }
                    }
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
                if (active && lane < 4) shared.weights[begin + step + lane] = product;
            }
            if (begin < end) add_row();
        }
        __syncthreads();

        // ---- 4. Back to a thread for each (query, level).
        float slope[kPoints], along = 0.f;
        float gradient[2 * kPoints];
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
            float total[4];
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                const unsigned at = ats[k][c / 2] >> 16 * (c % 2) & 0xffff;
                total[c] = corners >> (4 * k + c) & 1 ? shared.weights[at] : 0.f;
            }
            const float left = total[1] - total[0], right = total[3] - total[2];
            const float above = total[0] + lx[k] * left, under = total[2] + lx[k] * right;
            slope[k] = above + ly[k] * (under - above);
            along += weight[k] * slope[k];
            gradient[2 * k] = weight[k] * (left + ly[k] * (right - left)) * (grad.in_cells ? 1.f : scale_x);
            gradient[2 * k + 1] = weight[k] * (under - above) * (grad.in_cells ? 1.f : scale_y);
        }
        if (exists) {
            if (grad.in_cells)
                store_run(static_cast<float*>(grad.offsets) + 2 * first_sample, gradient);
            else
                store_run(static_cast<Offset*>(grad.offsets) + 2 * first_sample, gradient);
        }
        shared.sums[level][place] = along;
        __syncthreads();
        along = 0.f;
#pragma unroll
        for (int l = 0; l < L::kLevels; ++l) along += shared.sums[l][place];
#pragma unroll
        for (int k = 0; k < kPoints; ++k) slope[k] = weight[k] * (slope[k] - along);
        if (exists) store_run(static_cast<Offset*>(grad.logits) + first_sample, slope);
        __syncthreads();  // the next image reuses the memory
    }
}

}  // namespace smope
