"""Forms of some steps for results alone on a CPU: faster there than the plain ones, the same up to rounding.

`SMOPE.predict` asks for them; training, recording and exporting keep the plain forms.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_wanted: ContextVar[bool] = ContextVar("smope_cpu_forms", default=False)
_ROWS = 1000  # from so many on a product's bias is worth a kernel that adds it


@contextmanager
def cpu_forms(wanted: bool = True) -> Iterator[None]:
    """Within it, and without gradients, float32 on a CPU takes these forms."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def takes_cpu_form(x: Tensor) -> bool:
    # A compiler fuses steps itself, and a ContextVar would end its graph.
    if torch.compiler.is_dynamo_compiling() or not _wanted.get():
        return False
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def takes_onednn(x: Tensor) -> bool:
    """Whether oneDNN's operators, which builds of PyTorch for some processors lack, are to be used."""
    return takes_cpu_form(x) and torch.backends.mkldnn.is_available()


def linear(layer: nn.Linear, x: Tensor, relu: bool = False) -> Tensor:
    """`layer`, and ReLU: of many rows in one operator, where PyTorch's own first write the bias, then add to
    it, then clamp."""
    if takes_onednn(x) and x.shape[:-1].numel() >= _ROWS:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(
            x, layer.weight, layer.bias, "relu" if relu else "none", [], ""
        )
        return y
    y = layer(x)
    return F.relu(y, inplace=True) if relu else y


def convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    stride: tuple[int, ...],
    ends: tuple[tuple[int, int], tuple[int, int]],
    groups: int,
    relu6: bool,
) -> Tensor:
    """Convolution of [B, C, H, W], and ReLU6, in one operator of oneDNN.

    `ends` is the padding (before, after) of the height and of the width, no less after than before. Where
    they differ, the kernel gets zeros before it instead of the map after it: the map is the larger.
    """
    (top, bottom), (left, right) = ends
    if top != bottom or left != right:
        weight = F.pad(weight, (right - left, 0, bottom - top, 0))
    after = ("hardtanh", [0.0, 6.0], "") if relu6 else ("none", [], "")
    y: Tensor = torch.ops.mkldnn._convolution_pointwise(
        x, weight, bias, (bottom, right), stride, (1, 1), groups, *after
    )
    return y
