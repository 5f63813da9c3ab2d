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
#include "gather.cuh"
#include "tile.cuh"

namespace {

using smope::BF16;
using smope::F16;
using Value = SMOPE_VALUE;
using Offset = SMOPE_OFFSET;
using Problem = smope::Problem<SMOPE_LEVELS>;
template <int kSplit>
using Split = smope::Layout<Value, Offset, SMOPE_HEADS, SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS, kSplit>;
using Layout = Split<1>;
// Where there are few queries: several groups of lanes share the points of one, so that more loads are in flight.
#ifndef SMOPE_SPLIT
#define SMOPE_SPLIT 4
#endif
#ifndef SMOPE_SCARCE
#define SMOPE_SCARCE (sizeof(Value) == 4 ? 1 << 18 : 1 << 16)
#endif
constexpr int kMostSplit = Layout::kLanes * SMOPE_SPLIT <= 32 ? SMOPE_SPLIT : 32 / Layout::kLanes;
using Tiles = smope::Tiles<SMOPE_LEVELS>;
using Gradients = smope::Gradients<Value>;

int batch_blocks(const Problem& p) { return p.batch < 65535 ? p.batch : 65535; }

dim3 grid_of(const Problem& p, int threads, int team) {
    const int teams = threads / team;
    return dim3((p.queries + teams - 1) / teams, Layout::kHeads, batch_blocks(p));
}

// Few queries are spread over all multiprocessors, by shared work and small blocks.
bool scarce(const Problem& p) {
    return static_cast<long long>(p.batch) * p.queries * Layout::kHeads * Layout::kLanes < SMOPE_SCARCE;
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
    return grad;
}

#if SMOPE_HEAD >= 32 && (SMOPE_HEAD & (SMOPE_HEAD - 1)) == 0 && SMOPE_LEVELS <= 8 && SMOPE_POINTS <= 8
using Tile = smope::Tile<Layout>;

// Whether queries are the cells of the levels, row by row, as in an encoder. (If their number agrees by chance, the
// result is right all the same.)
bool tiled(const Problem& p) {
    int device = 0, most = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    return p.queries == p.cells && p.queries >= 1024 && static_cast<int>(sizeof(Tile::Shared)) <= most;
}

void launch_tiles(const Problem& p, const Gradients& grad, cudaStream_t stream) {
    Tiles tiles = {};
    for (int of = 0; of < SMOPE_LEVELS; ++of) {
        tiles.columns[of] = smope::ceil_div(p.width[of], Tile::kWidth);
        tiles.first[of + 1] = tiles.first[of] + tiles.columns[of] * smope::ceil_div(p.height[of], Tile::kHeight);
    }
    auto kernel = smope::tile_kernel<Tile>;
    const int bytes = sizeof(Tile::Shared);
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    const dim3 grid(tiles.first[SMOPE_LEVELS], Layout::kHeads, batch_blocks(p));
    SMOPE_LAUNCH(kernel, grid, Tile::kThreads, bytes, stream, p, grad, tiles);
}
#else
bool tiled(const Problem&) { return false; }
void launch_tiles(const Problem&, const Gradients&, cudaStream_t) {}
#endif

template <class Sum, int kSplit>
void launch_backward(const Problem& p, const Gradients& grad, int threads, cudaStream_t stream) {
    auto kernel = smope::backward_kernel<Split<kSplit>, Sum>;
    SMOPE_LAUNCH(kernel, grid_of(p, threads, Split<kSplit>::kTeam), threads, 0, stream, p, grad);
}

template <int kSplit>
void launch_forward(const Problem& p, int threads, Value* output, cudaStream_t stream) {
    auto kernel = smope::forward_kernel<Split<kSplit>>;
    SMOPE_LAUNCH(kernel, grid_of(p, threads, Split<kSplit>::kTeam), threads, 0, stream, p, output);
}

// `images` of the batch at a time: their sums are small enough to stay in the L2 cache until they are rounded. Without
// `sums` (null: fp32) they are added up in grad_value.
template <class Sum>
void sweep(const Problem& p, const Gradients& grad, Value* grad_value, void* sums, int images, cudaStream_t stream) {
    const long long cells = p.cells * Layout::kStride;
    const bool tile = sizeof(Sum) == sizeof(float) && tiled(p);
    for (int first = 0; first < p.batch; first += images) {
        const Problem part = slice(p, first, first + images < p.batch ? images : p.batch - first);
        Gradients out = slice(p, grad, first);
        Value* rounded = grad_value + first * cells;
        out.value = sums == nullptr ? static_cast<void*>(rounded) : sums;
        const long long count = part.batch * cells;
        cudaMemsetAsync(out.value, 0, count * sizeof(Sum), stream);
        if (tile)
            launch_tiles(part, out, stream);
        else
            launch_backward<Sum, 1>(part, out, 128, stream);
        if (sums != nullptr) {
            auto round = smope::round_kernel<Value, Sum>;
            const long long blocks = (count / Layout::kVec + 255) / 256;
            SMOPE_LAUNCH(round, static_cast<int>(blocks < 4096 ? blocks : 4096), 256, 0, stream,
                         static_cast<const Sum*>(sums), rounded, count, grad.largest, p.queries);
        }
    }
}

#if SMOPE_LEVELS <= 8 && SMOPE_POINTS <= 8
// Whether cells look for their corners rather than corners add to their cells. Additions are in float32, so in 16 bit
// they cost a pass to clear and one to round; a single image has too few blocks to gather.
#ifndef SMOPE_GATHER_BATCH
#define SMOPE_GATHER_BATCH (sizeof(Value) == 4 ? 1 << 30 : 4)
#endif
bool gathers(const Problem& p) {
    return p.batch >= SMOPE_GATHER_BATCH && p.queries <= 2048 && p.queries * 8ll <= p.cells;
}

void launch_gather(const Problem& p, const Gradients& grad, void* entries, cudaStream_t stream) {
    using Gather = smope::Gather<Layout>;
    int device = 0, processors = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
#ifndef SMOPE_GATHER_BLOCKS
#define SMOPE_GATHER_BLOCKS 8
#endif
    // About as many blocks as run at a time; each level has its share, because each has as many corners.
    const long long pairs = static_cast<long long>(p.batch) * Layout::kHeads * SMOPE_LEVELS;
    int most = 0;  // cells of a level
    for (int level = 0; level < SMOPE_LEVELS; ++level)
        most = p.height[level] * p.width[level] > most ? p.height[level] * p.width[level] : most;
    const int wanted = static_cast<int>(SMOPE_GATHER_BLOCKS * processors / pairs);
    const int least = smope::ceil_div(most, Gather::kMostCells);
    const int ranges = wanted > least ? wanted : least;
    const dim3 grid(ranges * SMOPE_LEVELS, Layout::kHeads, batch_blocks(p));
    const int bytes = (smope::ceil_div(most, ranges) + 2 * Gather::kWarps) * sizeof(unsigned) + sizeof(float4);
    auto kernel = smope::gather_kernel<Layout>;
    SMOPE_LAUNCH(kernel, grid, Gather::kThreads, bytes, stream, p, grad, static_cast<smope::Entry*>(entries));
}
#else
bool gathers(const Problem&) { return false; }
void launch_gather(const Problem&, const Gradients&, void*, cudaStream_t) {}
#endif

// `images` of the batch at a time.
void gather(const Problem& p, const Gradients& grad, Value* grad_value, void* entries, int images, cudaStream_t stream) {
    for (int first = 0; first < p.batch; first += images) {
        const Problem part = slice(p, first, first + images < p.batch ? images : p.batch - first);
        Gradients out = slice(p, grad, first);
        out.value = grad_value + first * p.cells * Layout::kStride;
        launch_gather(part, out, entries, stream);
        if (scarce(part))
            launch_backward<smope::Nothing, kMostSplit>(part, out, 64, stream);
        else
            launch_backward<smope::Nothing, 1>(part, out, 128, stream);
    }
}

}  // namespace

extern "C" {

// All return a CUDA error code. Tensors are contiguous and begin on 16-byte borders; shapes holds (h, w) pairs.
int smope_msda_forward(int batch, int queries, int boxes, const int* shapes, const void* value, const float* reference,
                       const void* offsets, const void* logits, void* output, void* stream) {
    const Problem p = problem_of(batch, queries, boxes, shapes, value, reference, offsets, logits);
    if (scarce(p))
        launch_forward<kMostSplit>(p, 64, static_cast<Value*>(output), static_cast<cudaStream_t>(stream));
    else
        launch_forward<1>(p, 256, static_cast<Value*>(output), static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

// Bytes that the backward needs of `scratch` for each image that it takes at a time.
long long smope_msda_scratch(int batch, int queries, const int* shapes, int deterministic) {
    const Problem p = problem_of(batch, queries, 0, shapes, nullptr, nullptr, nullptr, nullptr);
    const long long values = p.cells * Layout::kStride;
    if (deterministic) return values * sizeof(long long);
    if (gathers(p)) return 4ll * Layout::kHeads * queries * Layout::kSamples * sizeof(smope::Entry);
    return sizeof(Value) == sizeof(float) ? 0 : values * sizeof(float);
}

// `largest` points to the largest |grad_output| in deterministic runs, and is null in others. `scratch` is for `images`
// images at a time.
int smope_msda_backward(int batch, int queries, int boxes, const int* shapes, const void* value,
                        const float* reference, const void* offsets, const void* logits, const void* grad_output,
                        void* grad_value, void* grad_offsets, void* grad_logits, int in_cells, const float* largest,
                        void* scratch, int images, void* stream) {
    const Problem p = problem_of(batch, queries, boxes, shapes, value, reference, offsets, logits);
    Gradients grad = {};
    grad.output = static_cast<const Value*>(grad_output);
    grad.offsets = grad_offsets, grad.logits = grad_logits, grad.in_cells = in_cells, grad.largest = largest;
    Value* to = static_cast<Value*>(grad_value);
    const auto queue = static_cast<cudaStream_t>(stream);
    if (largest != nullptr)
        sweep<long long>(p, grad, to, scratch, images, queue);
    else if (gathers(p))
        gather(p, grad, to, scratch, images, queue);
    else
        sweep<float>(p, grad, to, scratch, images, queue);
    return cudaGetLastError();
}

}  // extern "C"
