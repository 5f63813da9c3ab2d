"""A sheet of samples to look at: boxes, axes, names, visible shares."""

from __future__ import annotations

from contextlib import closing
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from smope.data.items import Batch
    from smope.scenes.stream import SceneStream

_AXES = ((255, 60, 60), (60, 220, 60), (80, 120, 255))


def preview_sheet(stream: SceneStream, n: int = 12, columns: int = 3, labels: bool = True) -> Image.Image:
    """The stream's first `n` images side by side."""
    tiles: list[Image.Image] = []
    with closing(stream.batches(stream.start)) as batches:
        for batch in islice(batches, -(-n // stream.batch_size)):
            tiles += [draw_item(batch, k, stream.names, labels) for k in range(len(batch))]
    tiles = tiles[:n]
    width, height = tiles[0].size
    rows = -(-len(tiles) // columns)
    sheet = Image.new("RGB", (width * columns, height * rows))
    for k, tile in enumerate(tiles):
        sheet.paste(tile, (k % columns * width, k // columns * height))
    return sheet


def draw_item(batch: Batch, index: int, names: tuple[str, ...], labels: bool = True) -> Image.Image:
    """One image of a batch with its annotations."""
    pixels = (batch.images[index].clamp(0, 1) * 255).round().to(torch.uint8)
    picture = Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).cpu().numpy()))
    if not labels:
        return picture
    pen = ImageDraw.Draw(picture)
    K = batch.K[index].double().cpu().numpy()
    for x0, y0, x1, y1 in [] if batch.ignored is None else batch.ignored[index].tolist():
        if x1 > x0 and y1 > y0:
            pen.rectangle((x0, y0, x1, y1), outline=(150, 150, 150))
    for slot in torch.nonzero(batch.present[index]).flatten().tolist():
        x0, y0, x1, y1 = batch.boxes_xyxy[index, slot].tolist()
        pen.rectangle((x0, y0, x1, y1), outline=(255, 220, 0))
        name = names[int(batch.labels[index, slot])]
        pen.text((x0 + 2, y0 + 1), f"{name} {float(batch.visibility[index, slot]):.2f}", fill=(255, 255, 255))
        pose = batch.T_CO[index, slot].double().cpu().numpy()
        length = max(0.04, 0.05 * pose[2, 3])
        ends = np.concatenate([np.zeros((1, 3)), length * np.eye(3)]) @ pose[:3, :3].T + pose[:3, 3]
        projected = ends @ K.T
        uv = projected[:, :2] / projected[:, 2:]
        for axis, colour in enumerate(_AXES):
            pen.line([tuple(uv[0]), tuple(uv[axis + 1])], fill=colour, width=2)
    return picture
