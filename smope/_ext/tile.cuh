// All gradients where every cell has a query (an encoder). Neighbouring queries hit the same cells many times, and
// adding every corner's row to memory (backward_kernel) is bound by the rate at which the L2 cache can add. So a block
// takes one head of a tile of queries and
//   1. prepares the points, a thread for each (query, level),
//   2. sorts their corners by cell, by counting in shared memory, into chunks of four corners of one cell,
//   3. walks the chunks, a stretch for each group of lanes: a cell's row of value is read once, and its gradient added
//      to memory once,
//   4. hands each corner's product <grad_output, value> back to its thread, for the gradients of offsets and logits.
// Counters cover a window of cells in each level, around the tile's own corners; a corner beyond is a chunk of its own.
// Steps 3 and 4 are repeated where there are more chunks than shared memory holds.
#pragma once

#include "walk.cuh"

namespace smope {

// Minimum of x[0 .. 3] and sum of x[4 .. 7] over the warp.
__device__ inline void warp_min_and_sum(int (&x)[8]) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(SMOPE_PORTABLE)
#pragma unroll
    for (int k = 0; k < 8; ++k) x[k] = k < 4 ? __reduce_min_sync(kAllLanes, x[k]) : __reduce_add_sync(kAllLanes, x[k]);
#else
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const int other = __shfl_xor_sync(kAllLanes, x[k], step);
            x[k] = k < 4 ? min(x[k], other) : x[k] + other;
        }
    }
#endif
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
        constexpr int kPiece = Vec16<float>::kCount;
        for (int i = threadIdx.x; i < (T::kQueries + 1) * L::kHead / kPiece; i += T::kThreads) {
            const int n = i / (L::kHead / kPiece), channel = i % (L::kHead / kPiece) * kPiece;
            const int query = n < T::kQueries ? query_at(n) : -1;
            float x[kPiece] = {};
            if (query >= 0) load_run(grad.output + ((batch_row + query) * L::kHeads + head) * L::kHead + channel, x);
            store16(shared.given + i * kPiece, x);
        }
        for (int i = threadIdx.x; i <= T::kCells / 4; i += T::kThreads)
            reinterpret_cast<uint4*>(shared.counts)[i] = make_uint4(0, 0, 0, 0);

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
        const bool clipped = window.width < shared.windows[level].width || window.height < shared.windows[level].height;
        int where[kPoints], counter[kPoints];  // cell and counter of a point's upper left corner
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
            where[k] = p.start[level] + line[k] * w + column[k];
            counter[k] = first + (line[k] - window.top) * window.width + column[k] - window.left;
        }
        const auto counter_of = [&](int k, int c, auto may_stray) {  // kCells for a stray
            if (may_stray.value) {
                const int x = column[k] + c % 2 - window.left, y = line[k] + c / 2 - window.top;
                if (x < 0 || x >= window.width || y < 0 || y >= window.height) return T::kCells;
            }
            return counter[k] + c % 2 + c / 2 * window.width;
        };
        unsigned ats[kPoints][2] = {};  // of each corner, 16 bits: first its rank in its cell, then its place in the list
        const auto count = [&](auto may_stray) {
#pragma unroll
            for (int k = 0; k < kPoints; ++k) {
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (corners >> (4 * k + c) & 1)
                        ats[k][c / 2] |= atomicAdd(&shared.counts[counter_of(k, c, may_stray)], 1u) << 16 * (c % 2);
            }
        };
        if (clipped)
            count(Flag<true>());
        else
            count(Flag<false>());
        __syncthreads();

        // From counts to each cell's first chunk.
        const int share = ceil_div(cells, T::kThreads) | 1;  // odd: no two threads of a warp meet in a bank
        const int begin_cell = min(static_cast<int>(threadIdx.x) * share, cells), end_cell = min(begin_cell + share, cells);
        unsigned own = 0;
        for (int i = begin_cell; i < end_cell; ++i) own += (shared.counts[i] + 3) / 4;
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
            before += (count + 3) / 4;
        }
        const int all = static_cast<int>(inside + shared.counts[T::kCells]);
        const auto clear = [&](int chunks) {  // corners of no weight, of the query of zeros
            for (int i = threadIdx.x; i < min(chunks, T::kChunks); i += T::kThreads) {
                shared.weights[i] = make_float4(0.f, 0.f, 0.f, 0.f);
                shared.queries[i] = 0x01010101u * T::kQueries;
            }
        };
        clear(all);
        __syncthreads();
        const auto find = [&](auto may_stray) {
#pragma unroll
            for (int k = 0; k < kPoints; ++k) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    if (!(corners >> (4 * k + c) & 1)) continue;
                    const int mine = counter_of(k, c, may_stray), shift = 16 * (c % 2);
                    if (may_stray.value && mine == T::kCells)  // 4 * (inside + rank)
                        ats[k][c / 2] += (4 * inside + 3 * (ats[k][c / 2] >> shift & 0xffff)) << shift;
                    else
                        ats[k][c / 2] += 4 * shared.counts[mine] << shift;
                }
            }
        };
        if (clipped)
            find(Flag<true>());
        else
            find(Flag<false>());

        float total[kPoints][4] = {};  // of each corner: <grad_output, value>
        for (int done = 0; done < all; done += T::kChunks) {
            const int chunks = min(all - done, T::kChunks);
            // The place of a corner in this part of the list, or at least 4 * kChunks.
            const auto place_of = [&](int k, int c) {
                return corners >> (4 * k + c) & 1 ? (ats[k][c / 2] >> 16 * (c % 2) & 0xffff) - 4u * done : ~0u;
            };
            if (done > 0) {
                __syncthreads();
                clear(chunks);
                __syncthreads();
            }
#pragma unroll
            for (int k = 0; k < kPoints; ++k) {
                const float down = weight[k] * ly[k], up = weight[k] - down;
                const float part[4] = {up - up * lx[k], up * lx[k], down - down * lx[k], down * lx[k]};
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const unsigned at = place_of(k, c);
                    if (at >= 4u * T::kChunks) continue;
                    reinterpret_cast<float*>(shared.weights)[at] = part[c];
                    reinterpret_cast<unsigned char*>(shared.queries)[at] = static_cast<unsigned char>(place);
                    if (at % 4 == 0) shared.cells[at / 4] = where[k] + c % 2 + c / 2 * w;
                }
            }
            __syncthreads();
            walk<T>(p, grad, shared, batch, chunks);
            __syncthreads();
#pragma unroll
            for (int k = 0; k < kPoints; ++k) {
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const unsigned at = place_of(k, c);
                    if (at < 4u * T::kChunks) total[k][c] = reinterpret_cast<const float*>(shared.weights)[at];
                }
            }
        }

        // ---- 4. Back to a thread for each (query, level).
        float slope[kPoints], along = 0.f;
        float gradient[2 * kPoints];
#pragma unroll
        for (int k = 0; k < kPoints; ++k) {
            const float left = total[k][1] - total[k][0], right = total[k][3] - total[k][2];
            const float above = total[k][0] + lx[k] * left, under = total[k][2] + lx[k] * right;
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
