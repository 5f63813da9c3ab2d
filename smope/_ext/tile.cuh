// The gradient of value where every cell has a query (an encoder): a tile of neighbouring queries hits the same cells
// many times, so a block sums a tile's rows in shared memory first and adds each row to memory once. Adding every row
// to memory at once (backward_kernel) is bound by the rate at which the L2 cache can add: six times as many rows.
//
// A block serves one head of an 8 x 8 tile of queries, a warp one level of it. The warp's 32 lanes are 4 corners x 8
// lanes of 4 channels; since a point's four corners are different cells and other warps have other levels, the sums
// need no atomics. A level's sums cover a window around the tile; corners outside it are added to memory directly.
#pragma once

#include "backward.cuh"

namespace smope {

constexpr int kTileSide = 8;
constexpr int kTileQueries = kTileSide * kTileSide;

template <int kLevels>
struct Tiles {
    int first[kLevels + 1];                             // of each level of queries, the first tile; then their number
    int columns[kLevels];                               // tiles in a row
    int width[kLevels][kLevels], height[kLevels][kLevels];  // [level of queries][level sampled]: window, cells
    int rows;                                           // cells in the shared memory of a block
};

struct alignas(8) Record {  // of one corner of one point
    float weight;
    int row;  // in the warp's window, or -1
};

template <class Value>
__device__ inline void load4(const Value* from, float (&x)[4]) {
    const float2 low = load_pair(from), high = load_pair(from + 2);
    x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
}

// grad.value: floats, [B, S, H, D], cleared. grad.log_sums as left by backward_kernel.
template <class L>
__global__ void __launch_bounds__(32 * L::kLevels)
    spread_kernel(const __grid_constant__ Problem<L::kLevels> p,
                  const __grid_constant__ Gradients<typename L::Value> grad,
                  const __grid_constant__ Tiles<L::kLevels> tiles) {
    static_assert(L::kHead == 32 && L::kPoints <= 32, "a warp is 4 corners of 8 lanes x 4 channels");
    constexpr int kQuads = L::kHead / 4;
    constexpr int kTogether = 32 / L::kPoints;  // queries whose points a warp prepares at once
    SMOPE_DYNAMIC_SHARED(shared);  // sums[rows][kQuads], then Record[kLevels][32][4]
    const int level = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int corner = lane / kQuads, quad = lane % kQuads;
    const int head = blockIdx.y;

    int of = 0;  // the level that this tile's queries belong to
    while (of + 1 < L::kLevels && static_cast<int>(blockIdx.x) >= tiles.first[of + 1]) ++of;
    const int tile = blockIdx.x - tiles.first[of];
    const int tile_x = tile % tiles.columns[of] * kTileSide, tile_y = tile / tiles.columns[of] * kTileSide;
    const int last_x = min(tile_x + kTileSide, p.width[of]) - 1, last_y = min(tile_y + kTileSide, p.height[of]) - 1;
    const auto query_at = [&](int x, int y) { return p.start[of] + y * p.width[of] + x; };

    const int window_w = tiles.width[of][level], window_h = tiles.height[of][level];
    int sums_first = 0;  // rows of the warps before this one
    for (int other = 0; other < level; ++other) sums_first += tiles.width[of][other] * tiles.height[of][other];
    float4* sums = shared + sums_first * kQuads;
    Record* records = reinterpret_cast<Record*>(shared + tiles.rows * kQuads) + level * 32 * 4;
    const int w = p.width[level], h = p.height[level];

    for (int batch = blockIdx.z; batch < p.batch; batch += gridDim.z) {
        const long long batch_row = static_cast<long long>(batch) * p.queries;
        const int values = p.boxes ? 4 : 2;
        const float* one = p.reference + ((batch_row + query_at(tile_x, tile_y)) * L::kLevels + level) * values;
        const float* two = p.reference + ((batch_row + query_at(last_x, last_y)) * L::kLevels + level) * values;
        // Centred on the tile and inside the level. A reference that is not a number leaves the window at the border.
        const float middle_x = 0.5f * (one[0] + two[0]) * w - 0.5f * window_w;
        const float middle_y = 0.5f * (one[1] + two[1]) * h - 0.5f * window_h;
        const int left = static_cast<int>(fminf(fmaxf(rintf(middle_x), 0.f), w - window_w));
        const int top = static_cast<int>(fminf(fmaxf(rintf(middle_y), 0.f), h - window_h));

        const int rows = window_w * window_h;
        for (int i = lane; i < rows * kQuads; i += 32) sums[i] = make_float4(0.f, 0.f, 0.f, 0.f);
        float* grad_value = static_cast<float*>(grad.value) + batch * p.cells * L::kStride + head * L::kHead + quad * 4;
        __syncwarp();

        const auto load_given = [&](int n, float(&x)[4]) {  // of the tile's query n; past the border, of the last one
            const int query_x = min(tile_x + n % kTileSide, last_x);
            const int query_y = min(tile_y + min(n, kTileQueries - 1) / kTileSide, last_y);
            const long long pair = (batch_row + query_at(query_x, query_y)) * L::kHeads + head;
            load4(grad.output + pair * L::kHead + quad * 4, x);
        };
        float next[4];
        load_given(0, next);
        for (int pass = 0; pass < kTileQueries; pass += kTogether) {
            // Each lane prepares one point of this level.
            const int n = pass + lane / L::kPoints;  // query of the tile
            const int x = tile_x + n % kTileSide, y = tile_y + n / kTileSide;
            float weight[4] = {};
            int row[4] = {-1, -1, -1, -1};
            int cell = 0;
            unsigned outside = 0;  // corners of the level beyond the window
            if (lane < kTogether * L::kPoints && n < kTileQueries && x <= last_x && y <= last_y) {
                const long long query = batch_row + query_at(x, y);
                const long long pair = query * L::kHeads + head;
                const int sample = level * L::kPoints + lane % L::kPoints;
                const auto* offsets = static_cast<const typename L::Offset*>(p.offsets) + pair * L::kSamples * 2;
                const auto* logits = static_cast<const typename L::Offset*>(p.logits) + pair * L::kSamples;
                const Spot spot = locate<L>(p, query, offsets, sample);
                const float a = __expf(to_float(logits[sample]) - grad.log_sums[pair]);
                const float down = a * spot.ly, up = a - down;
                weight[0] = up - up * spot.lx, weight[1] = up * spot.lx;
                weight[2] = down - down * spot.lx, weight[3] = down * spot.lx;
                cell = spot.cell;
#pragma unroll
                for (int c = 0; c < 4; ++c) {
                    const int column = spot.column + c % 2 - left, line = spot.row + c / 2 - top;
                    const bool inside = column >= 0 && column < window_w && line >= 0 && line < window_h;
                    const bool exists = spot.corners >> c & 1;
                    if (exists && inside) row[c] = line * window_w + column;
                    if (exists && !inside) outside |= 1u << c;
                }
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) records[lane * 4 + c] = Record{weight[c], row[c]};
            __syncwarp();

            // All lanes add the points, one after another: own corner, own four channels.
            for (int g = 0; g < kTogether; ++g) {
                float given[4];
#pragma unroll
                for (int i = 0; i < 4; ++i) given[i] = next[i];
                load_given(pass + g + 1, next);
                Record record[L::kPoints];
#pragma unroll
                for (int k = 0; k < L::kPoints; ++k) record[k] = records[(g * L::kPoints + k) * 4 + corner];
#pragma unroll
                for (int k = 0; k < L::kPoints; ++k) {
                    if (record[k].row >= 0) {
                        float4* sum = sums + record[k].row * kQuads + quad;
                        float4 now = *sum;
                        now.x += record[k].weight * given[0], now.y += record[k].weight * given[1];
                        now.z += record[k].weight * given[2], now.w += record[k].weight * given[3];
                        *sum = now;
                    }
                }
            }
            for (unsigned strays = __ballot_sync(kAllLanes, outside != 0); strays != 0; strays &= strays - 1) {
                const int j = __ffs(strays) - 1;
                const unsigned corners = __shfl_sync(kAllLanes, outside, j);
                const long long at = __shfl_sync(kAllLanes, cell, j) + corner % 2 + corner / 2 * w;
                float given[4];
                load_given(pass + j / L::kPoints, given);
                const float share = records[j * 4 + corner].weight;
                add_to(corners >> corner & 1, grad_value + at * L::kStride, given, share, 1.f);
            }
            __syncwarp();
        }

        for (int i = lane / kQuads; i < rows; i += 32 / kQuads) {  // rows that nobody hit are exactly zero
            const float4 sum = sums[i * kQuads + quad];
            const float all[4] = {sum.x, sum.y, sum.z, sum.w};
            const bool hit = all[0] != 0.f || all[1] != 0.f || all[2] != 0.f || all[3] != 0.f;
            const long long at = p.start[level] + static_cast<long long>(top + i / window_w) * w + left + i % window_w;
            add_to(hit, grad_value + at * L::kStride, all, 1.f, 1.f);
        }
        __syncwarp();  // the next image clears the sums
    }
}

}  // namespace smope
