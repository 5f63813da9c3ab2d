"""Puts kernels of our own in a recorded graph: depthwise convolutions, norms, poses, reading and enlarging of
maps, the images as they come, and runs of small steps.

cuDNN takes ten times a depthwise convolution's bytes for some of them, and a run of elementwise steps costs a
pass over memory, and at one image a start of two microseconds, for each. Results are those of PyTorch up to
rounding: between the steps of one kernel numbers stay in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import fx

from smope.inference.casts import hoist_casts
from smope.inference.fuse_maps import (
    cell_norms,
    depthwise_convolutions,
    enlargements,
    layer_norms,
    loose_biases,
    map_reads,
)
from smope.inference.fuse_pictures import pictures
from smope.inference.fuse_poses import pose_kernels
from smope.inference.kernels import Kernel, compile_kernels
from smope.inference.pointwise import fuse_pointwise
from smope.inference.simplify import simplify


def fuse(
    module: fx.GraphModule,
    cudnn: bool = True,
    compile_with: Callable[[Sequence[Kernel]], None] = compile_kernels,
) -> list[Kernel]:
    """`simplify`, and kernels of our own wherever they fit, which it gives back."""
    kernels: list[Kernel] = []

    def before(module: fx.GraphModule) -> None:
        kernels.extend(depthwise_convolutions(module))

    def after(module: fx.GraphModule) -> None:
        hoist_casts(module)
        loose_biases(module)
        for step in (
            *(layer_norms, pose_kernels, map_reads, cell_norms, enlargements, pictures),
            fuse_pointwise,  # what is left
        ):
            kernels.extend(step(module))

    simplify(module, cudnn, before, after)
    compile_with(kernels)
    return kernels
