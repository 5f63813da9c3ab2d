"""From objects and images to the tensors that the networks take."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from smope.camera import Camera
from smope.networks.mesh_encoder import MeshInputs
from smope.objects import ObjectModel


def surface_table(model: ObjectModel) -> Tensor:
    """[P, 10] point centred on the bounding box and over the diameter, normal, colour, colour known"""
    points = (model.points - model.centre) / model.diameter
    known = torch.full((len(points), 1), 0.0 if model.colors is None else 1.0)
    colours = torch.zeros_like(points) if model.colors is None else model.colors
    return torch.cat([points, model.normals, colours, known], -1).float()


def mesh_inputs(objects: Sequence[ObjectModel], surface_points: int, anchors: int) -> MeshInputs:
    """The same objects give the same tensors; points stand in farthest-point order, so the first ones cover
    all."""
    tables = torch.stack([surface_table(model) for model in objects])
    diameters = torch.tensor([model.diameter for model in objects], dtype=torch.float32)
    return MeshInputs(tables[:, :surface_points], diameters, tables[:, :anchors, :9])


def pad_to_multiple(images: Tensor, multiple: int = 32) -> Tensor:
    """[B, C, H, W] -> zeros at the right and at the bottom until both sides are multiples; K stays as it
    is."""
    height, width = images.shape[-2:]
    return F.pad(images, (0, -width % multiple, 0, -height % multiple))


def image_input(
    picture: Tensor, camera: Camera, trained: tuple[int, int], slack: float, device: torch.device
) -> tuple[Tensor, Camera]:
    """uint8 [3, H, W] -> what its pinhole camera saw, near the trained size (width, height), and that camera.

    A picture that has both already stays uint8; others come out as float32 in 0..1. Resized is where the
    areas' ratio is beyond `slack` squared.
    """
    image = picture.to(device, non_blocking=True)
    if camera.dist is not None:
        image = camera.to(device).undistort_image(image.float() / 255.0)
    width, height = camera.size
    ratio = (trained[0] * trained[1] / (width * height)) ** 0.5
    pinhole = camera.pinhole
    if 1 / slack <= ratio <= slack:
        return image, pinhole
    size = (max(1, round(width * ratio)), max(1, round(height * ratio)))
    image = image if image.is_floating_point() else image.float() / 255.0
    image = F.interpolate(
        image[None], size=(size[1], size[0]), mode="bilinear", align_corners=False, antialias=True
    )[0]
    return image.clamp(0, 1), pinhole.resize(size)
