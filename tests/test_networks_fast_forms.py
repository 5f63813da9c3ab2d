"""The fast forms of layers against PyTorch's plain ones, in float32, and under autocast against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from smope.networks import shifted
from smope.networks.backbone import ConvNorm
from smope.networks.deformable import CellProjection, DeformableAttention, EncoderLayer, NarrowLayerNorm
from smope.networks.position import cell_centres, pyramid_positions
from smope.ops.cpu_forms import cpu_forms, linear


def gradients(layer: nn.Module, x: Tensor, along: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The output, and the gradients of its product with `along`: of the input, then of the parameters"""
    x = x.clone().requires_grad_()
    y = layer(x)
    wanted = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return y.detach(), list(torch.autograd.grad((y * along).sum(), wanted))


@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 12), (8, 13), (7, 9)])
def test_thinned_convolution_is_the_strided_one(height: int, width: int) -> None:
    """Against PyTorch's own strided convolution of the padded image: output and all gradients."""
    torch.manual_seed(0)
    layer = ConvNorm(6, 6, 3, 2, groups=6, relu=False)
    assert layer.thins
    x = torch.randn(2, 6, height, width)
    weight = (layer.conv.weight.detach() + 0.1).requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    thick = x.clone().requires_grad_()
    found = layer.thinned(thick, weight, bias)
    along = torch.randn_like(found)
    mine = torch.autograd.grad((found * along).sum(), (thick, weight, bias))

    plain = x.clone().requires_grad_()
    padding = []  # TensorFlow's "same": what is odd goes to the end
    for size in (width, height):
        total = (-(-size // 2) - 1) * 2 + 3 - size
        padding += [total // 2, total - total // 2]
    expected = nn.functional.conv2d(nn.functional.pad(plain, padding), weight, bias, 2, groups=6)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    theirs = torch.autograd.grad((expected * along).sum(), (plain, weight, bias))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_only_strided_3x3_depthwise_convolutions_are_thinned() -> None:
    kinds = [(6, 6, 5, 2, 6), (6, 6, 3, 2, 6), (6, 6, 3, 1, 6), (6, 6, 3, 2, 1)]
    assert [ConvNorm(*kind).thins for kind in kinds] == [False, True, False, False]


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 2)])
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 7)])
def test_summed_shifts_are_the_depthwise_convolution(
    kernel: int, stride: int, height: int, width: int
) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 6, height, width), torch.randn(6, 1, kernel, kernel), torch.randn(6)
    found = shifted.depthwise(x, weight, bias, stride, ((0, kernel - 1), (1, kernel - 2)))
    padded = nn.functional.pad(x, (1, kernel - 2, 0, kernel - 1))
    torch.testing.assert_close(found, nn.functional.conv2d(padded, weight, bias, stride, groups=6))


def test_shifts_are_summed_in_float32_and_rounded_once() -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(1, 4, 9, 9).bfloat16(), torch.randn(4, 1, 3, 3), torch.randn(4)
    found = shifted.depthwise(x, weight, bias, 1, ((1, 1), (1, 1)))
    exact = nn.functional.conv2d(x.double(), weight.double(), bias.double(), padding=1, groups=4)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), [(1, 3), (2, 1), (5, 6)])
def test_doubled_maps_have_pytorchs_gradients(height: int, width: int) -> None:
    x = torch.randn(2, 3, height, width, dtype=torch.float64, requires_grad=True)
    along = torch.randn(2, 3, 2 * height, 2 * width, dtype=torch.float64)
    found = shifted.Twice.apply(x)
    expected = nn.functional.interpolate(x, along.shape[-2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(found, expected)
    mine, theirs = (torch.autograd.grad(y, x, along)[0] for y in (found, expected))
    torch.testing.assert_close(mine, theirs)


def test_projected_cells_are_a_convolution_and_a_group_norm() -> None:
    torch.manual_seed(0)
    mine = CellProjection(12, 16, groups=4)
    nn.init.normal_(mine[1].weight)
    nn.init.normal_(mine[1].bias)
    plain = nn.Sequential(nn.Conv2d(12, 16, 1), nn.GroupNorm(4, 16))
    plain.load_state_dict(mine.state_dict())
    plain.append(nn.Flatten(2))
    x = torch.randn(2, 12, 5, 7).to(memory_format=torch.channels_last)
    along = torch.randn(2, 16, 35)
    found, my_gradients = gradients(mine, x, along.mT)
    expected, gradients_of_torch = gradients(plain, x, along)
    torch.testing.assert_close(found.mT, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(my_gradients, gradients_of_torch, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_narrow_layer_norm_is_layer_norm_without_autocast_and_rounds_once_under_it() -> None:
    torch.manual_seed(0)
    mine, plain = NarrowLayerNorm(64), nn.LayerNorm(64)
    nn.init.normal_(mine.weight)
    nn.init.normal_(mine.bias)
    plain.load_state_dict(mine.state_dict())
    x = 3 + 5 * torch.randn(10, 64)
    assert torch.equal(mine(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = mine(x)
        assert plain(x).dtype == torch.float32
    assert narrow.dtype == torch.bfloat16
    exact = copy.deepcopy(plain).bfloat16().double()(x.bfloat16().double())
    # Weight and bias are rounded to 8 bits, and so is the sum: at most half a unit of its largest term each.
    scale = exact.abs() + mine.bias.abs()
    assert ((narrow.double() - exact).abs() / scale).max() < 2**-7


def test_encoder_layer_keeps_autocasts_type_and_stays_near_float32() -> None:
    torch.manual_seed(0)
    layer = EncoderLayer(32, 4, 2, 2, 64)
    shapes = ((4, 6), (2, 3))
    memory = torch.randn(2, 30, 32)
    reference = cell_centres(shapes, memory.device)[None, :, None].expand(2, -1, 2, -1)
    arguments = (pyramid_positions(shapes, 32, memory.device)[None], reference, shapes)
    exact = layer(memory, *arguments)
    with torch.autocast("cpu", torch.bfloat16):
        narrow = layer(memory, *arguments)
    assert exact.dtype == torch.float32
    assert narrow.dtype == torch.bfloat16
    error = (narrow.double() - exact).norm() / exact.norm()
    assert error < 0.02  # a few roundings to 8 bits of values of size 1


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "stride", "grouped"), [(3, 1, True), (3, 2, True), (5, 2, True), (3, 2, False), (1, 1, False)]
)
@pytest.mark.parametrize(("height", "width"), [(8, 12), (9, 12), (7, 9)])
def test_convolution_of_a_cpu_is_the_padded_one(
    kernel: int, stride: int, grouped: bool, height: int, width: int
) -> None:
    """Against float64, in which the form for CPUs is never taken."""
    torch.manual_seed(0)
    layer = ConvNorm(8, 8, kernel, stride, groups=8 if grouped else 1)
    layer.norm.running_mean = torch.randn(8)
    layer.norm.weight.copy_(torch.rand(8) * 9)  # ReLU6 is to bite on both sides
    x = torch.randn(2, 8, height, width)
    exact = copy.deepcopy(layer).double()(x.double())
    assert exact.min() == 0
    assert exact.max() == 6
    for kind in (torch.contiguous_format, torch.channels_last):
        with cpu_forms():
            found = layer(x.contiguous(memory_format=kind))
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("rows", [3, 1200])
@pytest.mark.parametrize("relu", [False, True])
def test_product_of_a_cpu_is_the_layers(rows: int, relu: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 16), torch.randn(2, rows, 24)
    with cpu_forms():
        found = linear(layer, x, relu)
    exact = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    torch.testing.assert_close(found.double(), exact.relu() if relu else exact, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("sides", [2, 4])
def test_few_queries_may_read_before_they_project(sides: int) -> None:
    """Against float64. Many samples lie outside, where neither memory nor the projection's bias is read."""
    torch.manual_seed(0)
    shapes = ((8, 12), (4, 6))
    layer = DeformableAttention(32, 4, len(shapes), 3)
    nn.init.normal_(layer.value_proj.bias)
    nn.init.normal_(layer.sampling_offsets.weight)
    cells = sum(h * w for h, w in shapes)
    queries, memory = torch.randn(2, 7, 32), torch.randn(2, cells, 32)
    reference = torch.rand(2, 7, len(shapes), sides)
    exact = copy.deepcopy(layer).double()(queries.double(), reference.double(), memory.double(), shapes)
    projected = []
    layer.value_proj.register_forward_hook(lambda *_: projected.append(1))
    with cpu_forms():
        found = layer(queries, reference, memory, shapes)
    assert not projected
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-5)
