"""Region reader: looks at the square around each pair's box, cell by cell, and adds what it sees to the pair.

A query is one vector, and the place of an edge hardly fits into it. So a grid of cells over the box is read
from the pose maps, worked on by a few convolutions under the pair's own features, and told in training where
on the mesh each cell looks (dense correspondences, as in Wang et al. 2021, GDR-Net). What is left, 4x4 cells,
becomes one more vector; the pose head then says the pose anew.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.networks.deformable import NarrowLayerNorm
from smope.networks.outputs import Regions
from smope.networks.pose_head import ImageSize, pixels_to_unit, unit_to_pixels
from smope.networks.refine import read_maps

MARGIN = 1.4  # side of the square over the longer side of the box: boxes err, and edges want their outside


class ConvBlock(nn.Module):
    """Pre-activation residual convolution; the norm is over the channels of each cell."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = NarrowLayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:  # [N, n, n, C]
        y = F.relu(self.norm(x)).permute(0, 3, 1, 2)
        return x + self.conv(y).permute(0, 2, 3, 1)


class RegionReader(nn.Module):
    def __init__(self, width: int, sampled: int, cells: int, hidden: int = 128, blocks: int = 2) -> None:
        super().__init__()
        if cells % 4:
            raise ValueError(f"cells = {cells} given; a multiple of 4 expected: the grid is halved twice")
        self.cells = cells
        self.read = nn.Linear(sampled + 2, hidden)
        self.pair = nn.Linear(width + 2, 2 * hidden)
        self.blocks = nn.ModuleList(ConvBlock(hidden) for _ in range(blocks))
        self.norm = NarrowLayerNorm(hidden)
        self.surface = nn.Linear(hidden, 4)
        self.halve = nn.ModuleList(
            nn.Conv2d(inputs, hidden, 3, stride=2, padding=1) for inputs in (hidden + 4, hidden)
        )
        self.narrow = nn.Linear(hidden, hidden // 2)
        self.summary = nn.Linear((cells // 4) ** 2 * (hidden // 2), width)
        nn.init.zeros_(self.summary.weight)  # a trained network begins with the poses it had
        nn.init.zeros_(self.summary.bias)

    def forward(
        self, pairs: Tensor, boxes: Tensor, maps: tuple[Tensor, ...], size: ImageSize
    ) -> tuple[Tensor, Regions]:
        """pairs [B, P, C], boxes [B, P, 4] cxcywh in 0..1 -> the pairs with what was seen added, and that"""
        n = self.cells
        grid = cell_grid(n, boxes.device)  # [n, n, 2] in -1..1
        pixels, share = square_cells(boxes, grid, size)
        seen = read_maps(maps, pixels_to_unit(pixels.flatten(2, 3), size))  # [B, P, n n, S]
        place = grid.flatten(0, 1).expand(*seen.shape[:3], 2)
        x = self.read(torch.cat([seen, place], -1))
        gain, shift = self.pair(torch.cat([pairs, share.to(pairs.dtype)], -1))[..., None, :].chunk(2, -1)
        x = (x * (1 + gain) + shift).flatten(0, 1).unflatten(1, (n, n))  # [B P, n, n, hidden]
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x))
        surface = self.surface(x)
        x = torch.cat([x, surface], -1).permute(0, 3, 1, 2)
        for conv in self.halve:
            x = F.relu(conv(x))
        x = self.narrow(x.permute(0, 2, 3, 1)).flatten(1)  # [B P, n/4 n/4 hidden/2]
        summary = self.summary(F.relu(x)).unflatten(0, pairs.shape[:2])
        return pairs + summary, Regions(pixels, surface.unflatten(0, pairs.shape[:2]).float())


def cell_grid(cells: int, device: torch.device) -> Tensor:
    """[n, n, 2] x, y of the middles of n x n cells over -1..1"""
    steps = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (2 / cells) - 1
    return torch.stack([steps.expand(cells, cells), steps[:, None].expand(cells, cells)], -1)


def square_cells(boxes: Tensor, grid: Tensor, size: ImageSize) -> tuple[Tensor, Tensor]:
    """boxes [B, P, 4] cxcywh in 0..1 -> pixels [B, P, n, n, 2] of the cells, box sides over the square's
    [B, P, 2]"""
    sides = torch.stack([boxes[..., 2] * size[0], boxes[..., 3] * size[1]], -1).clamp(min=1.0)
    square = (MARGIN * sides.amax(-1, keepdim=True)).clamp(min=16.0)  # pixels
    centre = unit_to_pixels(boxes[..., :2], size)
    pixels = centre[..., None, None, :] + grid * (square / 2)[..., None, None, :]
    return pixels, sides / square
