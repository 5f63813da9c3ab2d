"""Backbones: shapes, padding against a convolution by hand, and ImageNet weights on ImageNet photos."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from smope.networks.backbone import (
    BackboneName,
    ConvNorm,
    FixedBatchNorm2d,
    build_backbone,
    load_imagenet_weights,
)

FILES: dict[BackboneName, str] = {
    "efficientnet_lite2": "efficientnet_lite2_imagenet.safetensors",
    "resnet50v2": "resnet50v2_stages123_imagenet.safetensors",
}


@pytest.mark.parametrize("name", FILES)
def test_features_have_the_promised_channels_and_strides(name: BackboneName) -> None:
    backbone = build_backbone(name).eval()
    features = backbone(torch.rand(1, 3, 64, 96))
    for feature, channels, stride in zip(features, backbone.channels, backbone.strides, strict=True):
        assert feature.shape == (1, channels, 64 // stride, 96 // stride)


@pytest.mark.parametrize(
    ("kernel", "stride", "size"), [(3, 1, 7), (3, 2, 8), (5, 2, 8), (5, 2, 9), (5, 1, 6)]
)
def test_convolution_with_norm_is_tensorflows_same_then_batch_norm(
    kernel: int, stride: int, size: int
) -> None:
    """Output i begins at input i * stride - before, with before = total // 2: TensorFlow's rule."""
    torch.manual_seed(0)
    layer = ConvNorm(1, 1, kernel, stride, relu=False).eval()
    nn.init.uniform_(layer.norm.weight, 0.5, 2.0)
    layer.norm.bias.data.fill_(0.3)
    layer.norm.running_mean.fill_(-0.2)
    layer.norm.running_var.fill_(1.7)
    image = torch.randn(1, 1, size, size)
    with torch.no_grad():
        found = layer(image)[0, 0].numpy()

    outputs = -(-size // stride)
    total = max((outputs - 1) * stride + kernel - size, 0)
    before = total // 2
    padded = np.zeros((size + total + kernel, size + total + kernel))
    padded[before : before + size, before : before + size] = image[0, 0].numpy()
    weight = layer.conv.weight.detach().numpy()[0, 0]
    scale = layer.norm.weight.item() / np.sqrt(1.7 + 1e-3)
    for row in range(outputs):
        for column in range(outputs):
            window = padded[row * stride : row * stride + kernel, column * stride : column * stride + kernel]
            expected = ((window * weight).sum() + 0.2) * scale + 0.3
            assert found[row, column] == pytest.approx(expected, abs=1e-5)


def photos(data_root: Path, count: int = 16) -> Tensor:
    paths = sorted((data_root / "backgrounds" / "imagenet_sample").glob("*.jpg"))[:count]
    pictures = [np.asarray(Image.open(path).convert("RGB").resize((256, 256))) for path in paths]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255.0


@pytest.mark.parametrize("name", FILES)
def test_imagenet_weights_see_the_statistics_they_were_trained_with(
    name: BackboneName, data_root: Path
) -> None:
    """What flows into each norm on ImageNet photos has the variance that the norm has stored.

    It would not with a wrong padding, epsilon, order of layers, channel order or normalisation of the image.
    """
    backbone = build_backbone(name).eval()
    load_imagenet_weights(backbone, data_root / "backbones" / FILES[name])
    ratios: list[float] = []

    def compare(norm: nn.BatchNorm2d, x: Tensor) -> None:
        assert norm.running_var is not None
        alive = norm.running_var > 1e-4
        ratios.append((x.var((0, 2, 3))[alive] / norm.running_var[alive]).median().item())

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if isinstance(module, ConvNorm):
            x, padding = module._padded(inputs[0])
            conv = module.conv
            compare(
                module.norm, nn.functional.conv2d(x, conv.weight, None, conv.stride, padding, 1, conv.groups)
            )
        elif isinstance(module, FixedBatchNorm2d):
            compare(module, inputs[0])

    for module in backbone.modules():
        module.register_forward_pre_hook(before_norm)
    with torch.no_grad():
        backbone(photos(data_root))
    assert len(ratios) > 40
    assert 0.85 < float(np.median(ratios)) < 1.15
    low, high = np.quantile(ratios, [0.05, 0.95])  # a few layers with few live channels scatter more
    assert low > 0.6
    assert high < 1.4


def test_only_the_right_file_of_weights_is_taken(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"_conv_stem.weight": torch.zeros(32, 3, 3, 3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="not the ImageNet weights of EfficientNetLite2"):
        load_imagenet_weights(build_backbone("efficientnet_lite2"), tmp_path / "other.safetensors")
