"""A pytest plugin: from its start on, the C++ autograd of CUDA tensors takes those of the CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils import cpp_extension

import smope.ops.library  # noqa: F401  # the operators that it serves

with tempfile.TemporaryDirectory() as folder:
    cpp_extension.load(
        "smope_autograd_on_host",
        [str(Path(__file__).with_suffix(".cpp"))],
        extra_cflags=["-O0"],
        build_directory=folder,
        is_python_module=False,
    )
_value = torch.zeros(1, 1, 1, 8, requires_grad=True)
_rest = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1, 2), torch.zeros(1, 1, 1, 1, 1)
_node = torch.ops.smope.ms_deform_attn(_value, [1, 1], *_rest).grad_fn
assert _node is not None
assert "smope::Attention" in _node.name(), _node.name()
