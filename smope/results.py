"""From the network's output to `Poses`: one table on the device, one copy of it, and the rest on the CPU.

A table holds all pairs of a batch, a row each; reading it is the only time that `predict` waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smope.architectures import Network, Tokens, find
from smope.camera import Camera
from smope.geometry.boxes import cxcywh_to_xyxy
from smope.networks.outputs import take
from smope.networks.pose_head import unit_to_pixels
from smope.networks.recorded import recorded_whole
from smope.networks.rivals import best_first
from smope.objects import ObjectModel
from smope.poses import Poses

Floats = NDArray[np.float32]

OVERLAP_OF_ONE = 0.7  # two boxes of one mesh that overlap by this IoU are the same object
OVERLAP_OF_TWO_NAMES = 0.9  # and two boxes of different meshes by this one: an object is of one kind


def find_table(
    network: Network, images: Tensor, K: Tensor, tokens: Tokens, top_k: int, lowest: float = 0.0
) -> Tensor:
    """images [B, 3, H, W], uint8 or 0..1, K [B, 3, 3] pixels -> [B, P, 24] float32, best pairs first; those
    that score below `lowest` may be missing

    A row: score, label, box (xyxy, pixels of this image), rotation, centre, visibility's logit, log sigma,
    scale.
    """
    if images.dtype == torch.uint8:
        images = images.float() / 255.0
    found, frame = find(network, images, K, tokens, top_k, lowest)
    pose = found.pairs.poses[-1]
    make = make_table_whole if recorded_whole() else make_table
    table = make(
        found.scores,
        found.labels.float(),
        found.boxes.float(),
        pose.rotation,
        pose.translation,
        found.pairs.visibility_logit,
        found.pairs.log_sigma,
        torch.ones_like(pose.translation) if pose.scale is None else pose.scale,
        *frame,
    )
    return table if found.pairs.score_shift is None else take(table, best_first(found.scores))


def make_table(
    scores: Tensor,
    labels: Tensor,
    boxes: Tensor,
    rotation: Tensor,
    translation: Tensor,
    visibility: Tensor,
    log_sigma: Tensor,
    scale: Tensor,
    width: int,
    height: int,
) -> Tensor:
    """scores, labels and visibility [B, P], boxes [B, P, 4] cxcywh in 0..1 of so many pixels, rotation
    [B, P, 3, 3], translation [B, P, 3], log_sigma [B, P, 2], scale [B, P, 3] -> [B, P, 24] float32"""
    corners = unit_to_pixels(cxcywh_to_xyxy(boxes).unflatten(-1, (2, 2)), (width, height)).flatten(-2)
    columns = [scores[..., None], labels[..., None], corners, rotation.flatten(-2), translation]
    columns += [visibility[..., None], log_sigma, scale]
    return torch.cat([column.float() for column in columns], -1)


make_table_whole = torch.library.custom_op("smope::make_table", make_table, mutates_args=())


@make_table_whole.register_fake
def _(scores: Tensor, *rest: object) -> Tensor:
    return scores.new_empty(*scores.shape, 24, dtype=torch.float32)


def read_table(
    table: Tensor,
    scaled: Sequence[Camera],
    cameras: Sequence[Camera],
    objects: Mapping[str, ObjectModel],
    threshold: float,
) -> list[Poses]:
    """`find_table`'s result on the CPU -> `Poses` of each image, in the photo's pixels and the meshes' own
    frames. `scaled` are the cameras of the images that the network saw, `cameras` those of the photos."""
    # In NumPy: for a few rows an operator of PyTorch takes several times as long to start.
    every = table.numpy()
    keep = _distinct(every[..., 2:6], every[..., 1], every[..., 0] >= threshold)  # [B, P]
    rows = every[keep]  # [N, 24]
    labels = rows[:, 1].astype(np.int64)
    which, names, models = labels.tolist(), tuple(objects), tuple(objects.values())
    geometry = np.zeros((len(models), 4), np.float32)  # centre and diameter of those that were found
    for i in set(which):
        geometry[i] = (*models[i].centre.tolist(), models[i].diameter)
    middle, diameters = geometry[labels, :3], geometry[labels, 3]
    rotation, centre, log_sigma = rows[:, 6:15].reshape(-1, 3, 3), rows[:, 15:18], rows[:, 19:21]
    scale = rows[:, 21:24].copy()
    # The size of the stretched mesh: smope/geometry/stretch.py.
    middle, diameters = middle * scale, diameters * np.cbrt(scale.prod(-1))
    T_CO = np.zeros((len(rows), 4, 4), np.float32)
    T_CO[:, :3, :3], T_CO[:, 3, 3] = rotation, 1.0
    T_CO[:, :3, 3] = centre - (rotation @ middle[..., None])[..., 0]
    sigma = np.exp(np.clip(log_sigma, -6.0, 3.0))
    sigma[:, 0] = np.rad2deg(sigma[:, 0])
    sigma[:, 1] *= diameters
    columns = {
        "labels": labels,
        "scores": rows[:, 0].copy(),
        "boxes_xyxy": rows[:, 2:6].copy(),
        "T_CO": T_CO,
        "scale": scale,
        "visibility": rows[:, 18].copy(),
        "sigma": sigma,
    }
    tensors = {name: torch.from_numpy(column) for name, column in columns.items()}
    tensors["visibility"] = tensors["visibility"].sigmoid()
    counts = keep.sum(1).tolist()
    parts = {name: tensor.split_with_sizes(counts) for name, tensor in tensors.items()}
    found, called = [], iter([names[i] for i in which])
    for i, (count, seen, camera) in enumerate(zip(counts, scaled, cameras, strict=True)):
        own = {name: part[i] for name, part in parts.items()}
        own["boxes_xyxy"] = to_photo(own["boxes_xyxy"], seen, camera)
        found.append(Poses.unchecked(tuple(islice(called, count)), camera, objects, own))
    return found


def _distinct(boxes: Floats, labels: Floats, wanted: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """[B, N]: those of `wanted` that no better one (they come best first) covers."""
    keep = wanted.copy()
    count = int(np.flatnonzero(wanted.any(0)).max(initial=-1)) + 1  # those behind it are not wanted anywhere
    boxes, labels = boxes[:, :count], labels[:, :count]
    alike = labels[:, :, None] == labels[:, None]
    most = np.where(alike, OVERLAP_OF_ONE, OVERLAP_OF_TWO_NAMES)
    later = np.arange(count)[:, None] < np.arange(count)
    covered = (_overlaps(boxes) > most) & later & wanted[:, None, :count]
    pairs = np.unravel_index(np.flatnonzero(covered), covered.shape)  # several times as quick as np.nonzero
    kept = keep.data  # in which single items are quick to read and to write
    for i, better, worse in zip(*(of.tolist() for of in pairs), strict=True):
        if kept[i, better]:
            kept[i, worse] = False
    return keep


def _overlaps(boxes: Floats) -> Floats:
    """[B, N, 4] xyxy -> [B, N, N] IoU of each with each"""
    edges = np.ascontiguousarray(boxes.transpose(2, 0, 1))
    low, high = edges[:2], edges[2:]
    sides = np.minimum(high[..., None], high[..., None, :]) - np.maximum(low[..., None], low[..., None, :])
    np.maximum(sides, 0, out=sides)
    common = sides[0] * sides[1]
    areas = common.diagonal(axis1=1, axis2=2)
    overlaps: Floats = common / np.maximum(areas[:, :, None] + areas[:, None] - common, 1e-9)
    return overlaps


def to_photo(boxes: Tensor, scaled: Camera, camera: Camera) -> Tensor:
    """[N, 4] pixels of the network's pinhole image -> pixels of the photo, through its lens if it has one"""
    if camera.dist is None and scaled.size == camera.size:
        return boxes
    corners = boxes.unflatten(-1, (2, 2))
    ratio = corners.new_tensor([camera.size[0] / scaled.size[0], camera.size[1] / scaled.size[1]])
    corners = (corners + 0.5) * ratio - 0.5
    if camera.dist is None or not len(boxes):
        return corners.flatten(-2)
    # A straight box becomes a bent one; its hull is taken at eight points.
    low, high = corners[:, 0], corners[:, 1]
    steps = low.new_tensor([(x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0) if (x, y) != (0.5, 0.5)])
    bent = camera.distort_points(low[:, None] + steps * (high - low)[:, None])
    return torch.cat([bent.amin(1), bent.amax(1)], -1)
