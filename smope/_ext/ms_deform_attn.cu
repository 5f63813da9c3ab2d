// Launches the kernels for the one problem that the compiler was told of: SMOPE_HEADS, SMOPE_HEAD (channels a head),
// SMOPE_LEVELS, SMOPE_POINTS (numbers), SMOPE_VALUE and SMOPE_OFFSET (float, F16 or BF16).
#ifdef __CUDACC__
#include <cuda_runtime.h>
#define SMOPE_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SMOPE_DYNAMIC_SHARED(name) extern __shared__ float4 name[]
#endif

#include "backward.cuh"
#include "common.cuh"
#include "forward.cuh"
#include "tile.cuh"

namespace {

using smope::BF16;
using smope::F16;
using Value = SMOPE_VALUE;
using Offset = SMOPE_OFFSET;
using Problem = smope::Problem<SMOPE_LEVELS>;
using Layout = smope::Layout<Value, Offset, SMOPE_HEADS, SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS>;
using Tiles = smope::Tiles<SMOPE_LEVELS>;
using Gradients = smope::Gradients<Value>;

int batch_blocks(const Problem& p) { return p.batch < 65535 ? p.batch : 65535; }

dim3 grid_of(const Problem& p, int threads) {
    const int groups = threads / Layout::kLanes;
    return dim3((p.queries + groups - 1) / groups, Layout::kHeads, batch_blocks(p));
}

// Few queries are spread over all multiprocessors by small blocks.
int threads_for(const Problem& p, int most) {
    const long long lanes = static_cast<long long>(p.batch) * p.queries * Layout::kHeads * Layout::kLanes;
    return lanes < (1 << 17) ? 64 : most;
}

Problem problem_of(int batch, int queries, int boxes, const int* shapes, const void* value, const float* reference,
                   const void* offsets, const void* logits) {
    Problem p = {};
    p.batch = batch, p.queries = queries, p.boxes = boxes;
    p.value = value, p.reference = reference, p.offsets = offsets, p.logits = logits;
    for (int level = 0; level < SMOPE_LEVELS; ++level) {
        p.height[level] = shapes[2 * level];
        p.width[level] = shapes[2 * level + 1];
        p.start[level] = static_cast<int>(p.cells);
        p.cells += static_cast<long long>(p.height[level]) * p.width[level];
    }
    return p;
}

// Images first .. first + count of the batch.
Problem slice(Problem p, int first, int count) {
    const long long queries = static_cast<long long>(first) * p.queries;
    const long long samples = queries * Layout::kHeads * Layout::kSamples;
    p.batch = count;
    p.value = static_cast<const Value*>(p.value) + first * p.cells * Layout::kStride;
    p.reference += queries * SMOPE_LEVELS * (p.boxes ? 4 : 2);
    p.offsets = static_cast<const Offset*>(p.offsets) + samples * 2;
    p.logits = static_cast<const Offset*>(p.logits) + samples;
    return p;
}

Gradients slice(const Problem& p, Gradients grad, int first) {
    const long long pairs = static_cast<long long>(first) * p.queries * Layout::kHeads;
    const long long offsets = pairs * Layout::kSamples * 2;
    grad.output += pairs * SMOPE_HEAD;
    if (grad.in_cells)
        grad.offsets = static_cast<float*>(grad.offsets) + offsets;
    else
        grad.offsets = static_cast<Offset*>(grad.offsets) + offsets;
    grad.logits = static_cast<Offset*>(grad.logits) + pairs * Layout::kSamples;
    if (grad.log_sums != nullptr) grad.log_sums += pairs;
    return grad;
}

// Windows as wide as `rows` cells of shared memory allow: the tile's extent in each level and an equal margin. Where
// even no margin fits (queries of coarse levels on fine ones), the widest windows shrink first.
Tiles plan_tiles(const Problem& p, int rows) {
    Tiles tiles = {};
    tiles.rows = rows;
    for (int of = 0; of < SMOPE_LEVELS; ++of) {
        tiles.columns[of] = smope::ceil_div(p.width[of], smope::kTileSide);
        tiles.first[of + 1] =
            tiles.first[of] + tiles.columns[of] * smope::ceil_div(p.height[of], smope::kTileSide);
        for (int margin = 8, cap = 1 << 16;;) {
            int used = 0, widest = 0;
            for (int level = 0; level < SMOPE_LEVELS; ++level) {
                const auto side = [&](int full, int from) {
                    const int extent = smope::ceil_div(smope::kTileSide * full, from) + 1 + 2 * margin;
                    const int side = extent < full ? extent : full;
                    return side < cap ? side : cap;
                };
                const int w = tiles.width[of][level] = side(p.width[level], p.width[of]);
                const int h = tiles.height[of][level] = side(p.height[level], p.height[of]);
                used += w * h;
                widest = w > widest ? w : widest;
                widest = h > widest ? h : widest;
            }
            if (used <= rows) break;
            if (margin > 4 || (margin > 0 && cap <= 12))
                --margin;
            else
                cap = (cap < widest ? cap : widest) - 1;
        }
    }
    return tiles;
}

#if SMOPE_HEAD == 32 && SMOPE_LEVELS <= 8 && SMOPE_POINTS <= 32
// Whether queries are the cells of the levels, row by row, as in an encoder. (If their number agrees by chance, the
// result is right all the same.)
bool tiled(const Problem& p) { return p.queries == p.cells && p.queries >= 1024; }

// Shared memory for two blocks a multiprocessor, or for one where that leaves too little for a window.
int shared_bytes() {
    int device = 0, all = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&all, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    const int half = all / 2 - 1024;
    return half >= 80 * 1024 && half < most ? half : most;
}

void spread(const Problem& p, const Gradients& grad, cudaStream_t stream) {
    const int bytes = shared_bytes();
    const int records = SMOPE_LEVELS * 32 * 4 * static_cast<int>(sizeof(smope::Record));
    const Tiles tiles = plan_tiles(p, (bytes - records) / (SMOPE_HEAD * 4));
    auto kernel = smope::spread_kernel<Layout>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const dim3 grid(tiles.first[SMOPE_LEVELS], Layout::kHeads, batch_blocks(p));
    SMOPE_LAUNCH(kernel, grid, 32 * SMOPE_LEVELS, bytes, stream, p, grad, tiles);
}
#else
bool tiled(const Problem&) { return false; }
void spread(const Problem&, const Gradients&, cudaStream_t) {}
#endif

// `images` of the batch at a time: their sums are small enough to stay in the L2 cache until they are rounded.
template <class Sum>
void sweep(const Problem& p, const Gradients& grad, Value* grad_value, void* sums, int images, cudaStream_t stream) {
    const long long cells = p.cells * Layout::kStride;
    const bool tile = sizeof(Sum) == sizeof(float) && grad.log_sums != nullptr && tiled(p);
    const int threads = threads_for(p, 128);
    for (int first = 0; first < p.batch; first += images) {
        const Problem part = slice(p, first, first + images < p.batch ? images : p.batch - first);
        Gradients out = slice(p, grad, first);
        Value* rounded = grad_value + first * cells;
        out.value = sums == nullptr ? static_cast<void*>(rounded) : sums;
        const long long count = part.batch * cells;
        cudaMemsetAsync(out.value, 0, count * sizeof(Sum), stream);
        auto kernel = smope::backward_kernel<Layout, Sum, true>;
        if (tile) kernel = smope::backward_kernel<Layout, Sum, sizeof(Sum) != sizeof(float)>;  // false for floats
        SMOPE_LAUNCH(kernel, grid_of(part, threads), threads, 0, stream, part, out);
        if (tile) spread(part, out, stream);
        if (sums != nullptr) {
            auto round = smope::round_kernel<Value, Sum>;
            const long long blocks = (count / Layout::kVec + 255) / 256;
            SMOPE_LAUNCH(round, static_cast<int>(blocks < 4096 ? blocks : 4096), 256, 0, stream,
                         static_cast<const Sum*>(sums), rounded, count, grad.largest, p.queries);
        }
    }
}

}  // namespace

extern "C" {

// All return a CUDA error code. Tensors are contiguous and begin on 16-byte borders; shapes holds (h, w) pairs.
int smope_msda_forward(int batch, int queries, int boxes, const int* shapes, const void* value, const float* reference,
                       const void* offsets, const void* logits, void* output, void* stream) {
    const Problem p = problem_of(batch, queries, boxes, shapes, value, reference, offsets, logits);
    const int threads = threads_for(p, 256);
    auto kernel = smope::forward_kernel<Layout>;
    SMOPE_LAUNCH(kernel, grid_of(p, threads), threads, 0, static_cast<cudaStream_t>(stream), p,
                 static_cast<Value*>(output));
    return cudaGetLastError();
}

// `sums` holds `images` images' sums: null to add straight into grad_value (fp32 only), floats where `largest` is
// null, and 64-bit whole numbers where it points to the largest |grad_output| (deterministic). `log_sums`, if given,
// is scratch of a float for each (image, query, head) and lets encoders take the faster way.
int smope_msda_backward(int batch, int queries, int boxes, const int* shapes, const void* value,
                        const float* reference, const void* offsets, const void* logits, const void* grad_output,
                        void* grad_value, void* grad_offsets, void* grad_logits, int in_cells, const float* largest,
                        void* sums, float* log_sums, int images, void* stream) {
    const Problem p = problem_of(batch, queries, boxes, shapes, value, reference, offsets, logits);
    Gradients grad = {};
    grad.output = static_cast<const Value*>(grad_output);
    grad.offsets = grad_offsets, grad.logits = grad_logits, grad.in_cells = in_cells, grad.largest = largest;
    grad.log_sums = log_sums;
    Value* to = static_cast<Value*>(grad_value);
    if (largest != nullptr)
        sweep<long long>(p, grad, to, sums, images, static_cast<cudaStream_t>(stream));
    else
        sweep<float>(p, grad, to, sums, images, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

}  // extern "C"
