"""Image features at several strides, from convolutional networks with ImageNet weights at hand.

EfficientNet-Lite2: Tan and Le 2019, in the Lite form (ReLU6, no squeeze-and-excitation, TensorFlow "same"
padding). ResNet-50 v2: He et al. 2016, "Identity Mappings in Deep Residual Networks" (pre-activation),
stages 1 to 3. BatchNorm runs on its stored statistics in training too: the images are rendered, the photos
are not, and statistics of renders would widen that gap.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from smope.networks import shifted
from smope.networks.recorded import recorded_whole
from smope.ops.cpu_forms import convolution, takes_onednn

BackboneName = Literal["efficientnet_lite2", "resnet50v2"]


class FixedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm with trainable scale and shift on stored statistics, in training and in evaluation alike."""

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, training=False, eps=self.eps
        )


class ConvNorm(nn.Module):
    """Convolution, BatchNorm on stored statistics, optionally ReLU6; the norm is folded into the weights.

    Folding happens in every pass, on the small weights, so that scale and shift stay trainable at no cost in
    the size of the image. Padding is TensorFlow's "same": what is odd goes to the right and to the bottom.
    """

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, relu: bool = True
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outputs, eps=1e-3)
        self.relu = relu
        self.small = kernel == 3 and groups == inputs == outputs and groups > 1
        self.thins = self.small and stride == 2

    def forward(self, x: Tensor) -> Tensor:  # [B, C, H, W]
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.conv.weight * scale[:, None, None, None]
        bias = self.norm.bias - self.norm.running_mean * scale
        if takes_onednn(x):
            return convolution(x, weight, bias, self.conv.stride, self._ends(x), self.conv.groups, self.relu)
        if self._sums_shifts(x):
            x = shifted.depthwise(x, weight, bias, self.conv.stride[0], self._ends(x))
        elif self.thins and x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and not recorded_whole():
            x = self.thinned(x, weight, bias)
        else:
            x, padding = self._padded(x)
            x = F.conv2d(x, weight, bias, self.conv.stride, padding, 1, self.conv.groups)
        return F.relu6(x, inplace=True) if self.relu else x  # the largest maps: one pass less over memory

    def _sums_shifts(self, x: Tensor) -> bool:
        """Without gradients: with them the convolution's own are the faster, and want its own form."""
        return self.small and x.is_cuda and torch.compiler.is_compiling() and not torch.is_grad_enabled()

    def thinned(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """The strided convolution as every other result of the one without stride.

        cuDNN has fast kernels for most 16-bit depthwise convolutions, channels last, but not for 3x3 with
        stride 2 and no padding of its own. (smope/inference has a kernel of its own.)
        """
        (top, _), (left, _) = self._ends(x)
        pad, stride = self.conv.kernel_size[0] // 2, self.conv.stride[0]
        dense = F.conv2d(x, weight, None, 1, pad, 1, self.conv.groups)
        kept = dense[:, :, pad - top :: stride, pad - left :: stride]
        return kept + bias.to(kept.dtype)[:, None, None]

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The image, and how much the convolution itself is to pad at both ends of (height, width)"""
        (top, bottom), (left, right) = self._ends(x)
        if top == bottom and left == right:
            return x, (top, left)
        return F.pad(x, (left, right, top, bottom)), (0, 0)

    def _ends(self, x: Tensor) -> tuple[tuple[int, int], tuple[int, int]]:
        """Padding before and after, of the height and of the width"""
        ends = []
        for size, kernel, stride in zip(x.shape[-2:], self.conv.kernel_size, self.conv.stride, strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            ends.append((total // 2, total - total // 2))
        return ends[0], ends[1]


class InvertedResidual(nn.Module):
    """Expand, depthwise convolution, project; with a shortcut where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.expand = ConvNorm(inputs, hidden) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(hidden, hidden, kernel, stride, groups=hidden)
        self.project = ConvNorm(hidden, outputs, relu=False)
        self.shortcut = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.shortcut else y


class EfficientNetLite2(nn.Module):
    """[B, 3, H, W] in 0..1 -> features at strides 4, 8, 16, 32 with 24, 48, 120, 352 channels."""

    channels = (24, 48, 120, 352)
    strides = (4, 8, 16, 32)
    # kernel, stride, expansion, output channels, repeats (width 1.1, depth 1.2 of the base network)
    stages = (
        (3, 1, 1, 16, 1),
        (3, 2, 6, 24, 3),
        (5, 2, 6, 48, 3),
        (3, 2, 6, 88, 4),
        (5, 1, 6, 120, 4),
        (5, 2, 6, 208, 5),
        (3, 1, 6, 352, 1),
    )
    taps = (1, 2, 4, 6)  # the stages whose outputs are handed on
    fixed = 2  # the stages that are never trained; they end at the first tap

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 32, 3, 2)
        self.blocks = nn.ModuleList()
        inputs = 32
        for kernel, stride, expansion, outputs, repeats in self.stages:
            stage = nn.Sequential()
            for i in range(repeats):
                stage.append(InvertedResidual(inputs, outputs, kernel, stride if i == 0 else 1, expansion))
                inputs = outputs
            self.blocks.append(stage)
        for part in (self.stem, *self.blocks[: self.fixed]):
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> list[Tensor]:
        # The first stages stay as ImageNet made them: their edges and colours hold for photos, which renders
        # may not improve, and their maps are the largest: without them the backward pass costs half.
        with torch.no_grad():
            x = self.stem((images * 255.0 - 127.0) / 128.0)
            for stage in self.blocks[: self.fixed]:
                x = stage(x)
        features = [x]
        for i, stage in enumerate(self.blocks[self.fixed :], start=self.fixed):
            x = stage(x)
            if i in self.taps:
                features.append(x)
        return features


class PreActivationBottleneck(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        width = outputs // 4
        self.bn1 = FixedBatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn2 = FixedBatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn3 = FixedBatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        changes = stride != 1 or inputs != outputs
        self.downsample = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(x))
        shortcut = x if self.downsample is None else self.downsample(y)
        y = self.conv1(y)
        y = self.conv2(F.relu(self.bn2(y)))
        return shortcut + self.conv3(F.relu(self.bn3(y)))


class ResNet50V2(nn.Module):
    """[B, 3, H, W] in 0..1 -> features at strides 4, 8, 16, 32 with 256, 512, 1024, 512 channels.

    The network ends at stride 16; one strided convolution, trained from scratch, adds stride 32.
    """

    channels = (256, 512, 1024, 512)
    strides = (4, 8, 16, 32)
    mean: Tensor
    std: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.bn_data = FixedBatchNorm2d(3)
        self.conv0 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn0 = FixedBatchNorm2d(64)
        self.layer1 = self._stage(64, 256, 3, 1)
        self.layer2 = self._stage(256, 512, 4, 2)
        self.layer3 = self._stage(512, 1024, 6, 2)
        self.bn_next = FixedBatchNorm2d(1024)
        self.down = nn.Sequential(
            nn.Conv2d(1024, 256, 1), nn.ReLU(), nn.Conv2d(256, 512, 3, 2, 1, groups=4), nn.ReLU()
        )
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)

    @staticmethod
    def _stage(inputs: int, outputs: int, repeats: int, stride: int) -> nn.Sequential:
        first = PreActivationBottleneck(inputs, outputs, stride)
        return nn.Sequential(
            first, *(PreActivationBottleneck(outputs, outputs, 1) for _ in range(repeats - 1))
        )

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.bn_data((images - self.mean) / self.std)
        x = F.max_pool2d(F.relu(self.bn0(self.conv0(x))), 3, 2, 1)
        stride4 = self.layer1(x)
        stride8 = self.layer2(stride4)
        stride16 = F.relu(self.bn_next(self.layer3(stride8)))
        return [stride4, stride8, stride16, self.down(stride16)]


Backbone = EfficientNetLite2 | ResNet50V2


def build_backbone(name: BackboneName) -> Backbone:
    return EfficientNetLite2() if name == "efficientnet_lite2" else ResNet50V2()


def load_imagenet_weights(backbone: Backbone, path: Path) -> None:
    """Read an ImageNet checkpoint in its publisher's key names into `backbone`; every backbone key must be
    met."""
    tensors = {key: tensor.float() for key, tensor in load_file(path).items()}
    if isinstance(backbone, EfficientNetLite2):
        tensors = dict(_rename_efficientnet(tensors, [s[4] for s in EfficientNetLite2.stages]))
    missing, unexpected = backbone.load_state_dict(tensors, strict=False)
    missing = [key for key in missing if "num_batches_tracked" not in key and not key.startswith("down.")]
    if missing or unexpected:
        raise ValueError(
            f"{path}: not the ImageNet weights of {type(backbone).__name__}; missing {missing[:4]}, "
            f"unexpected {unexpected[:4]}"
        )


def _rename_efficientnet(tensors: dict[str, Tensor], repeats: list[int]) -> Iterator[tuple[str, Tensor]]:
    """Key names of the package `efficientnet-lite-pytorch` -> ours; the classifier is left out."""
    places = [(stage, i) for stage, count in enumerate(repeats) for i in range(count)]
    parts = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    stem = {"_conv_stem": "stem.conv", "_bn0": "stem.norm"}
    for key, tensor in tensors.items():
        if key.startswith("_blocks."):
            _, number, part, leaf = key.split(".")
            stage, i = places[int(number)]
            yield f"blocks.{stage}.{i}.{parts[part]}.{leaf}", tensor
        elif (part := key.split(".")[0]) in stem:
            yield f"{stem[part]}.{key.split('.')[1]}", tensor
