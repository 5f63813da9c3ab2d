// The only file that knows torch: checks tensors, allocates results, and calls the kernels compiled for their shapes.
// The operators' schemas are defined in smope/ops/library.py.
#include <ATen/ATen.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#include "autograd.h"

namespace {

using at::Tensor;

using Forward = int (*)(int, int, int, const int*, const void*, const float*, const void*, const void*, void*, void*);
using Backward = int (*)(int, int, int, const int*, const void*, const float*, const void*, const void*, const void*,
                         void*, void*, void*, int, const float*, void*, int, void*);
using Scratch = long long (*)(int, int, const int*, int);
struct Kernels {
    Forward forward;
    Backward backward;
    Scratch scratch;
};
using Key = std::array<int, 6>;  // heads, head size, levels, points, types of value and of offsets

std::mutex mutex;
std::map<Key, Kernels>& table() {
    static std::map<Key, Kernels> kernels;
    return kernels;
}

struct Call {  // one problem as the kernels take it
    int batch, queries, heads, boxes;
    std::vector<int> shapes;
    Tensor value, reference, offsets, logits;
    Kernels kernels;
};

// The kernels read 16 bytes at a time.
Tensor ready(const Tensor& tensor) {
    Tensor dense = tensor.contiguous();
    return reinterpret_cast<uintptr_t>(dense.data_ptr()) % 16 == 0 ? dense : dense.clone();
}

Call prepare(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference, const Tensor& offsets,
             const Tensor& logits) {
    Call call;
    call.batch = static_cast<int>(value.size(0));
    call.queries = static_cast<int>(logits.size(1));
    call.heads = static_cast<int>(value.size(2));
    call.boxes = reference.size(3) == 4;
    call.shapes.assign(shapes.begin(), shapes.end());
    TORCH_CHECK(offsets.scalar_type() == logits.scalar_type() && reference.scalar_type() == at::kFloat,
                "ms_deform_attn: offsets and logits must have one type and reference float32; got ",
                offsets.scalar_type(), ", ", logits.scalar_type(), ", ", reference.scalar_type());
    const Key key{call.heads, static_cast<int>(value.size(3)), static_cast<int>(logits.size(3)), static_cast<int>(logits.size(4)),
                  static_cast<int>(value.scalar_type()), static_cast<int>(offsets.scalar_type())};
    {
        std::lock_guard<std::mutex> guard(mutex);
        const auto found = table().find(key);
        TORCH_CHECK(found != table().end(), "ms_deform_attn: no kernel is compiled for ", call.heads, " heads x ",
                    value.size(3), ", ", logits.size(3), " levels, ", logits.size(4), " points, ",
                    value.scalar_type(), " values and ", offsets.scalar_type(), " offsets; call smope.ops.ms_deform_attn, which compiles it");
        call.kernels = found->second;
    }
    call.value = ready(value);
    call.reference = ready(reference);
    call.offsets = ready(offsets);
    call.logits = ready(logits);
    return call;
}

void check(int error) {
    TORCH_CHECK(error == 0, "ms_deform_attn: the CUDA kernel could not be launched: ",
                cudaGetErrorString(static_cast<cudaError_t>(error)));
}

Tensor forward(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference, const Tensor& offsets,
               const Tensor& logits) {
    const c10::cuda::CUDAGuard device(value.device());
    const Call call = prepare(value, shapes, reference, offsets, logits);
    Tensor output = at::empty({call.batch, call.queries, call.heads * value.size(3)}, call.value.options());
    if (output.numel() == 0) return output;
    check(call.kernels.forward(call.batch, call.queries, call.boxes, call.shapes.data(),
                               call.value.data_ptr(), call.reference.data_ptr<float>(), call.offsets.data_ptr(),
                               call.logits.data_ptr(), output.data_ptr(), c10::cuda::getCurrentCUDAStream().stream()));
    return output;
}

// Gradients of value, of offsets (in_cells: float32, of the locations in cells of their level) and of logits.
std::tuple<Tensor, Tensor, Tensor> backward(const Tensor& grad_output, const Tensor& value, at::IntArrayRef shapes,
                                            const Tensor& reference, const Tensor& offsets, const Tensor& logits,
                                            bool in_cells) {
    const c10::cuda::CUDAGuard device(value.device());
    const Call call = prepare(value, shapes, reference, offsets, logits);
    const Tensor given = ready(grad_output.to(call.value.scalar_type()));
    Tensor grad_value = at::empty_like(call.value);
    Tensor grad_offsets = at::empty(call.offsets.sizes(), call.offsets.options().dtype(
                                                              in_cells ? at::kFloat : call.offsets.scalar_type()));
    Tensor grad_logits = at::empty_like(call.logits);
    if (given.numel() == 0) return {grad_value.zero_(), grad_offsets.zero_(), grad_logits.zero_()};

    const bool deterministic = at::globalContext().deterministicAlgorithms();
    Tensor largest, scratch;
    if (deterministic) largest = given.abs().max().to(at::kFloat);
    int images = call.batch;
    if (const int64_t bytes = call.kernels.scratch(call.batch, call.queries, call.shapes.data(), deterministic)) {
        images = static_cast<int>(std::clamp<int64_t>((int64_t{64} << 20) / bytes, 1, call.batch));  // at most 64 MiB
        scratch = at::empty({images * bytes}, call.value.options().dtype(at::kByte));
    }
    check(call.kernels.backward(
        call.batch, call.queries, call.boxes, call.shapes.data(), call.value.data_ptr(),
        call.reference.data_ptr<float>(), call.offsets.data_ptr(), call.logits.data_ptr(), given.data_ptr(),
        grad_value.data_ptr(), grad_offsets.data_ptr(), grad_logits.data_ptr(), in_cells,
        deterministic ? largest.data_ptr<float>() : nullptr, scratch.defined() ? scratch.data_ptr() : nullptr,
        images, c10::cuda::getCurrentCUDAStream().stream()));
    return {grad_value, grad_offsets, grad_logits};
}

}  // namespace

// Called by smope/ops/build.py for every kernel library that it loads.
extern "C" void smope_register(int heads, int head, int levels, int points, int value, int offset,
                               void* forward_kernel, void* backward_kernel, void* scratch) {
    std::lock_guard<std::mutex> guard(mutex);
    table()[Key{heads, head, levels, points, value, offset}] = {reinterpret_cast<Forward>(forward_kernel),
                                                                reinterpret_cast<Backward>(backward_kernel),
                                                                reinterpret_cast<Scratch>(scratch)};
}

TORCH_LIBRARY_IMPL(smope, CUDA, m) {
    m.impl("ms_deform_attn", forward);
    m.impl("ms_deform_attn_backward", backward);
}

TORCH_LIBRARY_IMPL(smope, AutogradCUDA, m) { m.impl("ms_deform_attn", smope::attend); }
