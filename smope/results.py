"""From the network's output to `Poses`: one table on the device, one copy of it, and the rest on the CPU.

A table holds all pairs of a batch, a row each; reading it is the only time that `predict` waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from smope.architectures import Network, Tokens, find
from smope.camera import Camera
from smope.geometry.boxes import cxcywh_to_xyxy, paired_iou
from smope.networks.pose_head import unit_to_pixels
from smope.objects import ObjectModel
from smope.poses import Poses

OVERLAP_OF_ONE = 0.7  # two boxes of one mesh that overlap by this IoU are the same object
# score, label, box (xyxy, pixels of the network's image), rotation, centre, visibility and log sigma
_WIDTHS = (1, 1, 4, 9, 3, 1, 2)


def find_table(network: Network, images: Tensor, K: Tensor, tokens: Tokens, top_k: int) -> Tensor:
    """images [B, 3, H, W], uint8 or 0..1, K [B, 3, 3] pixels -> [B, P, 21] float32, best pairs first"""
    if images.dtype == torch.uint8:
        images = images.float() / 255.0
    found, frame = find(network, images, K, tokens, top_k)
    pose = found.pairs.poses[-1]
    corners = unit_to_pixels(cxcywh_to_xyxy(found.boxes.float()).unflatten(-1, (2, 2)), frame).flatten(-2)
    columns = [
        found.scores[..., None],
        found.labels[..., None],
        corners,
        pose.rotation.flatten(-2),
        pose.translation,
        found.pairs.visibility_logit[..., None],
        found.pairs.log_sigma,
    ]
    return torch.cat([column.float() for column in columns], -1)


def read_table(
    table: Tensor,
    scaled: Sequence[Camera],
    cameras: Sequence[Camera],
    objects: Mapping[str, ObjectModel],
    threshold: float,
) -> list[Poses]:
    """`find_table`'s result on the CPU -> `Poses` of each image, in the photo's pixels and the meshes' own
    frames. `scaled` are the cameras of the images that the network saw, `cameras` those of the photos."""
    names, models = tuple(objects), tuple(objects.values())
    keep = _distinct(table[..., 2:6], table[..., 1], table[..., 0] >= threshold)  # [B, P]
    counts = keep.sum(1).tolist()
    scores, numbers, boxes, rotation, centre, visibility, log_sigma = table[keep].split(_WIDTHS, -1)
    labels = numbers[:, 0].long()
    rotation = rotation.unflatten(-1, (3, 3))
    middle = torch.stack([model.centre for model in models]).float()[labels]
    T_CO = torch.eye(4).repeat(len(labels), 1, 1)
    T_CO[:, :3, :3] = rotation
    T_CO[:, :3, 3] = centre - (rotation @ middle[..., None])[..., 0]
    expected = log_sigma.clamp(-6, 3).exp()
    diameters = torch.tensor([model.diameter for model in models])[labels]
    sigma = torch.stack([torch.rad2deg(expected[:, 0]), expected[:, 1] * diameters], -1)
    columns = (labels, scores[:, 0], boxes, T_CO, torch.ones_like(centre), visibility[:, 0].sigmoid(), sigma)
    images = zip(*(column.split(counts) for column in columns), strict=True)
    return [
        Poses(
            names=tuple(names[i] for i in labels.tolist()),
            labels=labels,
            scores=scores,
            boxes_xyxy=to_photo(boxes, seen, camera),
            T_CO=T_CO,
            scale=scale,
            visibility=visibility,
            sigma=sigma,
            camera=camera,
            objects=objects,
        )
        for (labels, scores, boxes, T_CO, scale, visibility, sigma), seen, camera in zip(
            images, scaled, cameras, strict=True
        )
    ]


def _distinct(boxes: Tensor, labels: Tensor, wanted: Tensor) -> Tensor:
    """[B, N] bool: those of `wanted` that no better one (they come best first) of the same mesh covers."""
    overlap = paired_iou(boxes[:, :, None], boxes[:, None])[0] > OVERLAP_OF_ONE  # [B, N, N]
    same = overlap & (labels[:, :, None] == labels[:, None]) & wanted[:, :, None] & wanted[:, None]
    keep = wanted.tolist()
    for image, better, worse in same.triu(1).nonzero().tolist():
        if keep[image][better]:
            keep[image][worse] = False
    return torch.tensor(keep, dtype=torch.bool).view(wanted.shape)


def to_photo(boxes: Tensor, scaled: Camera, camera: Camera) -> Tensor:
    """[N, 4] pixels of the network's pinhole image -> pixels of the photo, through its lens if it has one"""
    if camera.dist is None and scaled.size == camera.size:
        return boxes
    corners = boxes.unflatten(-1, (2, 2))
    ratio = torch.tensor([camera.size[0] / scaled.size[0], camera.size[1] / scaled.size[1]])
    corners = (corners + 0.5) * ratio - 0.5
    if camera.dist is None or not len(boxes):
        return corners.flatten(-2)
    # A straight box becomes a bent one; its hull is taken at eight points.
    low, high = corners[:, 0], corners[:, 1]
    steps = torch.tensor([(x, y) for x in (0.0, 0.5, 1.0) for y in (0.0, 0.5, 1.0) if (x, y) != (0.5, 0.5)])
    bent = camera.distort_points(low[:, None] + steps * (high - low)[:, None])
    return torch.cat([bent.amin(1), bent.amax(1)], -1)
