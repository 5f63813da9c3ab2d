// Launches the kernels for the one head size, pair of types, level and point count that the compiler was told of:
// SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS (numbers), SMOPE_VALUE and SMOPE_OFFSET (float, F16 or BF16).
#include "ms_deform_attn.cuh"

#ifdef __CUDACC__
#define SMOPE_LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace {

using smope::BF16;
using smope::F16;
using Value = SMOPE_VALUE;
using Offset = SMOPE_OFFSET;
using Problem = smope::Problem<SMOPE_LEVELS>;
using Layout = smope::Layout<Value, SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS>;

dim3 grid_of(const Problem& p, int threads) {
    const int groups = threads / Layout::kLanes;
    return dim3((p.queries + groups - 1) / groups, p.heads, p.batch < 65535 ? p.batch : 65535);
}

// Few queries are spread over all multiprocessors by small blocks.
int threads_for(const Problem& p, int most) {
    const long long lanes = static_cast<long long>(p.batch) * p.queries * p.heads * Layout::kLanes;
    return lanes < (1 << 17) ? 64 : most;
}

Problem problem_of(int batch, int queries, int heads, int boxes, const int* shapes, const void* value,
                   const float* reference, const void* offsets, const void* logits) {
    Problem p = {};
    p.batch = batch, p.queries = queries, p.heads = heads, p.boxes = boxes;
    p.value = value, p.reference = reference, p.offsets = offsets, p.logits = logits;
    for (int level = 0; level < SMOPE_LEVELS; ++level) {
        p.height[level] = shapes[2 * level];
        p.width[level] = shapes[2 * level + 1];
        p.start[level] = static_cast<int>(p.cells);
        p.cells += static_cast<long long>(p.height[level]) * p.width[level];
    }
    return p;
}

template <class Sum>
void sweep(Problem p, smope::Gradients<Value> grad, void* grad_value, void* sums, int images, cudaStream_t stream) {
    // `images` of the batch at a time: their sums are small enough to stay in the L2 cache until they are rounded.
    const long long row = static_cast<long long>(p.queries) * p.heads;
    const long long cells = p.cells * p.heads * SMOPE_HEAD;
    const int batch = p.batch;
    const bool direct = sums == nullptr;
    const int threads = threads_for(p, 128);
    for (int first = 0; first < batch; first += images) {
        Problem part = p;
        smope::Gradients<Value> out = grad;
        part.batch = first + images < batch ? images : batch - first;
        part.value = static_cast<const Value*>(p.value) + first * cells;
        part.reference = p.reference + first * static_cast<long long>(p.queries) * SMOPE_LEVELS * (p.boxes ? 4 : 2);
        part.offsets = static_cast<const Offset*>(p.offsets) + first * row * Layout::kSamples * 2;
        part.logits = static_cast<const Offset*>(p.logits) + first * row * Layout::kSamples;
        out.output = grad.output + first * row * SMOPE_HEAD;
        out.offsets = grad.in_cells
                          ? static_cast<void*>(static_cast<float*>(grad.offsets) + first * row * Layout::kSamples * 2)
                          : static_cast<void*>(static_cast<Offset*>(grad.offsets) + first * row * Layout::kSamples * 2);
        out.logits = static_cast<Offset*>(grad.logits) + first * row * Layout::kSamples;
        Value* rounded = static_cast<Value*>(grad_value) + first * cells;
        out.value = direct ? static_cast<void*>(rounded) : sums;
        const long long count = part.batch * cells;
        cudaMemsetAsync(out.value, 0, count * sizeof(Sum), stream);
        auto kernel = smope::backward_kernel<Value, Offset, Sum, SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS>;
        SMOPE_LAUNCH(kernel, grid_of(part, threads), threads, stream, part, out);
        if (!direct) {
            auto round = smope::round_kernel<Value, Sum>;
            const long long blocks = (count / Layout::kVec + 255) / 256;
            SMOPE_LAUNCH(round, static_cast<int>(blocks < 4096 ? blocks : 4096), 256, stream,
                         static_cast<const Sum*>(sums), rounded, count, grad.largest, p.queries);
        }
    }
}

}  // namespace

extern "C" {

// All return a CUDA error code. Tensors are contiguous and begin on 16-byte borders; shapes holds (h, w) pairs.
int smope_msda_forward(int batch, int queries, int heads, int boxes, const int* shapes, const void* value,
                       const float* reference, const void* offsets, const void* logits, void* output, void* stream) {
    const Problem p = problem_of(batch, queries, heads, boxes, shapes, value, reference, offsets, logits);
    const int threads = threads_for(p, 256);
    auto kernel = smope::forward_kernel<Value, Offset, SMOPE_HEAD, SMOPE_LEVELS, SMOPE_POINTS>;
    SMOPE_LAUNCH(kernel, grid_of(p, threads), threads, static_cast<cudaStream_t>(stream), p,
                 static_cast<Value*>(output));
    return cudaGetLastError();
}

// `sums` holds `images` images' sums: null to add straight into grad_value (fp32 only), floats where `largest` is
// null, and 64-bit whole numbers where it points to the largest |grad_output| (deterministic).
int smope_msda_backward(int batch, int queries, int heads, int boxes, const int* shapes, const void* value,
                        const float* reference, const void* offsets, const void* logits, const void* grad_output,
                        void* grad_value, void* grad_offsets, void* grad_logits, int in_cells, const float* largest,
                        void* sums, int images, void* stream) {
    const Problem p = problem_of(batch, queries, heads, boxes, shapes, value, reference, offsets, logits);
    smope::Gradients<Value> grad = {};
    grad.output = static_cast<const Value*>(grad_output);
    grad.offsets = grad_offsets, grad.logits = grad_logits, grad.in_cells = in_cells, grad.largest = largest;
    if (largest != nullptr)
        sweep<long long>(p, grad, grad_value, sums, images, static_cast<cudaStream_t>(stream));
    else
        sweep<float>(p, grad, grad_value, sums, images, static_cast<cudaStream_t>(stream));
    return cudaGetLastError();
}

}  // extern "C"
