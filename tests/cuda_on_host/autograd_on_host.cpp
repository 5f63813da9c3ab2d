// The C++ autograd of CUDA tensors, registered for those of the CPU instead.
#include <torch/library.h>

#include "../../smope/_ext/autograd.h"

TORCH_LIBRARY_IMPL(smope, AutogradCPU, m) { m.impl("ms_deform_attn", smope::attend); }
