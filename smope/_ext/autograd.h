// The operator's autograd for CUDA tensors in C++: torch.library's in Python (smope/ops/library.py) costs a small call
// more time than its kernels. It calls the operators through the dispatcher, so that fake tensors and torch.compile work.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/custom_function.h>

#include <tuple>

namespace smope {

using at::Tensor;

using Attend = Tensor(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&, const Tensor&);
using AttendBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, at::IntArrayRef, const Tensor&,
                                                          const Tensor&, const Tensor&, bool);
using FromCells = std::tuple<Tensor, Tensor>(const Tensor&, at::IntArrayRef, const Tensor&, const Tensor&);

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
    return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline Tensor attend_below(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference, const Tensor& offsets,
                           const Tensor& logits) {
    static const auto attend = find<Attend>("smope::ms_deform_attn");
    const at::AutoDispatchBelowADInplaceOrView below;
    return attend.call(value, shapes, reference, offsets, logits);
}

struct Attention : torch::autograd::Function<Attention> {
    static Tensor forward(torch::autograd::AutogradContext* context, const Tensor& value, at::IntArrayRef shapes,
                          const Tensor& reference, const Tensor& offsets, const Tensor& logits) {
        context->save_for_backward({value, reference, offsets, logits});
        context->saved_data["shapes"] = shapes.vec();
        return attend_below(value, shapes, reference, offsets, logits);
    }

    static torch::autograd::variable_list backward(torch::autograd::AutogradContext* context,
                                                   const torch::autograd::variable_list& grad_output) {
        static const auto attend_backward = find<AttendBackward>("smope::ms_deform_attn_backward");
        static const auto from_cells = find<FromCells>("smope::ms_deform_attn_from_cells");
        const auto saved = context->get_saved_variables();
        const auto &value = saved[0], &reference = saved[1], &offsets = saved[2], &logits = saved[3];
        const auto shapes = context->saved_data["shapes"].toIntVector();
        const bool of_reference = context->needs_input_grad(1);  // of the tensors, the second
        auto [grad_value, grad_offsets, grad_logits] =
            attend_backward.call(grad_output[0], value, shapes, reference, offsets, logits, of_reference);
        Tensor grad_reference;
        if (of_reference)
            std::tie(grad_offsets, grad_reference) = from_cells.call(grad_offsets, shapes, reference, offsets);
        return {grad_value, Tensor(), grad_reference, grad_offsets, grad_logits};
    }
};

inline Tensor attend(const Tensor& value, at::IntArrayRef shapes, const Tensor& reference, const Tensor& offsets,
                     const Tensor& logits) {
    const bool wanted = at::GradMode::is_enabled() && (value.requires_grad() || reference.requires_grad() ||
                                                       offsets.requires_grad() || logits.requires_grad());
    return wanted ? Attention::apply(value, shapes, reference, offsets, logits)
                  : attend_below(value, shapes, reference, offsets, logits);
}

}  // namespace smope
