"""Weights and inputs of a parity fixture, drawn by the rule in its README ("Generation rule").

Everything follows from a salt, a name and a shape, all of which stand in the fixture's spec.json; the table
of gains below is the one part of the rule that is not data there, so the sums in spec.json are checked
against it.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Spec = Mapping[str, Any]
Floats = NDArray[np.float64]
Arrays = dict[str, NDArray[Any]]

# The first pattern found in a key says its gain; it serves tensors of two dimensions and more.
GAINS: tuple[tuple[str, float], ...] = (
    (r"backbone\..*\.conv3\.weight$", 0.6),
    (r"backbone\..*\.downsample\.0\.weight$", 1.0),
    (r"backbone\..*weight$", math.sqrt(2.0)),
    (r"reference_points\.weight$", 1.5),
    (r"decoder\.layers\..*\.self_attn\.out_proj\.weight$", 0.5),
    (r"sampling_offsets\.weight$", 0.3),
    (r"attention_weights\.weight$", 0.6),
    (r"cross_attn\.output_proj\.weight$", 1.4),
    (r"bbox_embed\.\d+\.layers\.2\.weight$", 0.6),
    (r"bbox_embed\.\d+\.layers\.[01]\.weight$", math.sqrt(2.0)),
    (r"class_embed\.\d+\.weight$", 1.5),
    (r"\.linear1\.weight$", math.sqrt(2.0)),
    (r"subnet_vert\.0\.weight$", 4.0),
    (r"subnet_normal\.0\.weight$", 2.5),
    (r"subnet_vert_normal\.[03]\.weight$", math.sqrt(2.0)),
    (r"subnet_decoder_\w+\.0\.weight$", math.sqrt(2.0)),
    (r"bbox_attention\.[qk]_linear\.weight$", 1.5),
    (r"pose_head\.l[24]\.\d+\.weight$", math.sqrt(2.0)),
    (r"pose_head\.l[35]\.weight$", 2.0),
    (r"", 1.0),
)
# These read the output of a ReLU; rows that sum to zero keep its common positive mean from hiding the signal.
ZERO_SUM_ROWS = re.compile(
    r"backbone\.0\.body\.layer.*weight$|input_proj\.\d+\.0\.weight$|\.linear2\.weight$"
    r"|bbox_embed\.\d+\.layers\.[12]\.weight$|subnet_vert_normal\.\d+\.weight$"
    r"|subnet_decoder_\w+\.\d+\.weight$|bbox_attention\.k_linear\.weight$"
    r"|pose_head\.l1\.weight$|pose_head\.l[24]\.[246]\.weight$|pose_head\.l[35]\.weight$"
)
# These read the attention, whose values are small, in their columns from 256 on.
READS_ATTENTION = re.compile(r"pose_head\.l[24]\.0\.weight$")


def draw(salt: str, name: str, shape: tuple[int, ...]) -> Floats:
    """Evenly spread numbers in -1..1, in C order."""
    seed = int.from_bytes(hashlib.sha256(f"{salt}:{name}".encode()).digest()[:8], "big")
    stream = np.random.Generator(np.random.PCG64(seed))
    return (2.0 * stream.random(math.prod(shape)) - 1.0).reshape(shape)


def weight(salt: str, key: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """One entry of a state dict."""
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    u = draw(salt, key, shape)
    one_dimensional: tuple[tuple[str, float, float], ...] = (  # ending, offset, factor
        ("running_mean", 0.0, 0.1),
        ("running_var", 1.0, 0.5),
        ("sampling_offsets.bias", 0.0, 2.0),
        ("pose_head.l5.bias", 0.0, 1.0),
        ("bias", 0.0, 0.1),
        ("query_embed.weight", 0.0, 1.5),
        ("level_embed", 0.0, 0.5),
    )
    for ending, offset, factor in one_dimensional:
        if key.endswith(ending):
            return (offset + factor * u).astype(np.float32)
    if len(shape) == 1:
        return (1.0 + 0.1 * u).astype(np.float32)
    gain = next(gain for pattern, gain in GAINS if re.search(pattern, key))
    if ZERO_SUM_ROWS.search(key):
        u = (u - np.roll(u, 1, axis=1)) / math.sqrt(2.0)
    scaled = (gain * math.sqrt(3.0 / math.prod(shape[1:]))) * u
    if READS_ATTENTION.search(key):
        scaled[:, 256:] *= 30.0
    return np.ascontiguousarray(scaled.astype(np.float32))


def weights(spec: Spec, variant: str) -> Arrays:
    """State dict of a variant under the authors' keys; the third member of an entry names what it shares."""
    salt = spec["salt"] + spec["variants"][variant].get("salt_suffix", "")
    state: Arrays = {}
    for key, shape, *source in spec["variants"][variant]["state"]:
        state[key] = state[source[0]] if source else weight(salt, key, tuple(shape))
    return state


def images(spec: Spec) -> list[NDArray[np.float32]]:
    """[3, H, W] each, already normalised: blocks of 32 and 8 pixels and single pixels."""
    pictures = []
    for index, (channels, height, width) in enumerate(spec["images"]):
        total = np.zeros((channels, height, width))
        for size, factor in ((32, 1.2), (8, 0.8), (1, 0.4)):
            shape = (channels, -(-height // size), -(-width // size))
            blocks = draw(spec["salt"], f"image{index}.b{size}", shape)
            total = total + factor * blocks.repeat(size, axis=1).repeat(size, axis=2)[:, :height, :width]
        pictures.append(total.astype(np.float32))
    return pictures


def mesh_samples(spec: Spec) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Points and unit normals [M, P, 3] of one ellipsoid a mesh, which stand in for sampling."""
    salt, count, size = spec["salt"], spec["meshes"]["count"], spec["meshes"]["points"]
    points, normals = [], []
    for i in range(count):
        direction = _unit(draw(salt, f"mesh{i}.direction", (size, 3)))
        radii = 0.6 + 0.3 * draw(salt, f"mesh{i}.radii", (1, 3))
        shift = 0.1 * draw(salt, f"mesh{i}.shift", (1, 3))
        points.append(radii * direction + shift)
        normals.append(_unit(direction / radii))
    return np.stack(points).astype(np.float32), np.stack(normals).astype(np.float32)


def _unit(vectors: Floats) -> Floats:
    return vectors / np.sqrt((vectors * vectors).sum(1, keepdims=True))


def loss_offsets(spec: Spec, case: str, vertices: int) -> Tensor:
    """[M, V, 3] the `pred_model_points` of a case of losses.npz."""
    u = draw(spec["salt"], f"loss/{case}.pts", (spec["meshes"]["count"], vertices, 3))
    return torch.from_numpy(np.float32(0.25) * u.astype(np.float32))


def loss_sample(
    spec: Spec, case: str, mesh: int, which: str, faces: int, count: int = 300
) -> tuple[Tensor, Tensor]:
    """Faces [S] and barycentric weights [S, 3] of the samples on the "target" or the "pred" mesh."""
    name = f"loss/{case}.sample{mesh}.{which}"
    unit = {part: (draw(spec["salt"], f"{name}.{part}", (count,)) + 1) / 2 for part in ("face", "u", "v")}
    chosen = np.floor(unit["face"] * faces).astype(np.int64)
    u, v = unit["u"].astype(np.float32), unit["v"].astype(np.float32)
    root = np.sqrt(u)
    corners = np.stack([1 - root, root * (1 - v), root * v], axis=1)
    return torch.from_numpy(chosen), torch.from_numpy(corners)


def sum_of(arrays: Mapping[str, NDArray[Any]]) -> str:
    """sha256 over names and bytes, by name."""
    total = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        total.update(name.encode())
        total.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return total.hexdigest()
