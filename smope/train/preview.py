"""The first batch as a picture: whoever trains should see what is learned from, with its truth drawn in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image

from smope.camera import Camera
from smope.data.items import Batch
from smope.draw import draw_poses
from smope.objects import ObjectModel
from smope.poses import Poses


def truth_of(batch: Batch, index: int, objects: Sequence[ObjectModel]) -> Poses:
    """The annotations of one image as if they had been predicted; the visible share stands for the score."""
    present = batch.present[index].cpu()
    labels = batch.labels[index].cpu()[present]
    visibility = batch.visibility[index].cpu()[present]
    scale = torch.ones(len(labels), 3) if batch.scale is None else batch.scale[index].cpu()[present]
    height, width = batch.images.shape[-2:]
    return Poses(
        names=tuple(objects[label].name for label in labels.tolist()),
        labels=labels,
        scores=visibility,
        boxes_xyxy=batch.boxes_xyxy[index].cpu()[present],
        T_CO=batch.T_CO[index].cpu()[present],
        scale=scale,
        visibility=visibility,
        sigma=torch.zeros(len(labels), 2),
        camera=Camera(batch.K[index].cpu(), (width, height)),
        objects={model.name: model for model in objects},
    )


def draw_truth(batch: Batch, objects: Sequence[ObjectModel], most: int = 12, columns: int = 4) -> Image.Image:
    """A sheet of the first images with boxes, axes, names and visible shares."""
    pictures = []
    for index in range(min(most, len(batch))):
        # Through bytes, as a user's photo comes: what is drawn is what a prediction would be drawn on.
        pixels = (batch.images[index].float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        pictures.append(draw_poses(pixels, truth_of(batch, index, objects), surfaces=False, boxes_3d=True))
    width, height = pictures[0].size
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (width * min(columns, len(pictures)), height * rows))
    for index, picture in enumerate(pictures):
        sheet.paste(picture, (index % columns * width, index // columns * height))
    return sheet
