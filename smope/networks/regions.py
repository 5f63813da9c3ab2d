"""Region reader: looks at the square around each pair's box, cell by cell, and fits the pose to what it sees.

A query is one vector, and the place of an edge hardly fits into it. So a grid of cells over the box is read
from the pose maps, worked on by a few convolutions under the pair's own features, and says where on the mesh
each cell looks and how far that is to be trusted: dense correspondences (Wang et al. 2021, GDR-Net), from
which a few Gauss-Newton steps make the pose, starting at the direct one. Places are learned from the truth,
trust from the pose that comes out (as the weights of Chen et al. 2022, EPro-PnP).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smope.geometry.stretch import size_factor, stretched_points
from smope.networks.deformable import MLP, NarrowLayerNorm, zero_last
from smope.networks.gauss_newton import fit_pose, prior_of
from smope.networks.outputs import PoseEstimate, Regions
from smope.networks.pose_head import ImageSize, pixels_to_unit, unit_to_pixels
from smope.networks.precision import without_autocast
from smope.networks.refine import read_maps

MARGIN = 1.4  # side of the square over the longer side of the box: boxes err, and edges want their outside


class ConvBlock(nn.Module):
    """Pre-activation residual convolution; the norm is over the channels of each cell.

    It begins as nothing, so that a deeper network begins where a trained one is.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = NarrowLayerNorm(width)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:  # [N, n, n, C]
        y = F.relu(self.norm(x)).permute(0, 3, 1, 2)
        return x + self.conv(y).permute(0, 2, 3, 1)


class RegionReader(nn.Module):
    def __init__(
        self,
        width: int,
        sampled: int,
        cells: int,
        blocks: int = 6,
        hidden: int = 128,
        steps: int = 3,
    ) -> None:
        super().__init__()
        self.cells, self.steps = cells, steps
        self.read = nn.Linear(sampled + 2, hidden)
        self.pair = nn.Linear(width + 2, 2 * hidden)
        self.blocks = nn.ModuleList(ConvBlock(hidden) for _ in range(blocks))
        self.norm = NarrowLayerNorm(hidden)
        self.surface = nn.Linear(hidden, 4)
        self.trust = nn.Linear(hidden, 1)
        nn.init.zeros_(self.trust.weight)  # at first a cell is trusted as far as it is on the object
        nn.init.zeros_(self.trust.bias)
        self.summary = zero_last(MLP(2 * hidden, hidden, width, 2))
        self.prior = zero_last(MLP(width, hidden, 12, 2))

    def forward(
        self,
        direct: PoseEstimate,
        pairs: Tensor,
        boxes: Tensor,
        maps: tuple[Tensor, ...],
        diameters: Tensor,
        K: Tensor,
        size: ImageSize,
    ) -> tuple[PoseEstimate, Tensor, Regions]:
        """pairs [B, P, C], boxes [B, P, 4] cxcywh in 0..1, diameters [B, P] metres, K [B, 3, 3]

        -> the pose by what the cells see, the pairs with what was seen added, and that
        """
        n = self.cells
        grid = cell_grid(n, boxes.device)  # [n, n, 2] in -1..1
        pixels, share = square_cells(boxes, grid, size)
        seen = read_maps(maps, pixels_to_unit(pixels.flatten(2, 3), size))  # [B, P, n n, S]
        place = grid.flatten(0, 1).to(seen.dtype).expand(*seen.shape[:3], 2)
        x = self.read(torch.cat([seen, place], -1))
        gain, shift = self.pair(torch.cat([pairs, share.to(pairs.dtype)], -1))[..., None, :].chunk(2, -1)
        x = (x * (1 + gain) + shift).flatten(0, 1).unflatten(1, (n, n))  # [B P, n, n, hidden]
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).flatten(1, 2).unflatten(0, pairs.shape[:2])  # [B, P, n n, hidden]

        surface = self.surface(x).float()
        weights = surface[..., 3].sigmoid() * (2 * self.trust(x)[..., 0].float().sigmoid())
        mean = (weights[..., None] * x).mean(-2)
        pairs = pairs + self.summary(torch.cat([mean, x.mean(-2)], -1))
        prior = prior_of(self.prior(pairs).float())
        with without_autocast(pairs):
            places, cells = surface[..., :3], pixels.flatten(2, 3)
            if direct.scale is not None:
                scale = direct.scale.detach()
                places, diameters = stretched_points(places, scale), diameters * size_factor(scale)
            pose = fit_pose(direct, places, cells, weights, *prior, diameters, K, self.steps)
            pose = replace(pose, scale=direct.scale)
        return pose, pairs, Regions(pixels, surface.unflatten(2, (n, n)))


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
