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
from smope.networks.pose_head import ImageSize
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
        pixels, points, share = square_cells(boxes, grid, size)
        seen = read_maps(maps, points.flatten(2, 3))  # [B, P, n n, S]
        x = self._cells(seen, grid.flatten(0, 1))
        gain, shift = self._of_pairs(pairs, share)[..., None, :].chunk(2, -1)
        x = torch.addcmul(x + shift, x, gain)
        x = x.flatten(0, 1).unflatten(1, (n, n))  # [B P, n, n, hidden]
        for block in self.blocks:
            x = block(x)
        x = F.relu(self.norm(x)).flatten(1, 2).unflatten(0, pairs.shape[:2])  # [B, P, n n, hidden]

        # Both layers as one product: there are few outputs and many cells.
        weight = torch.cat([self.surface.weight, self.trust.weight])
        bias = torch.cat([self.surface.bias, self.trust.bias])
        said = F.linear(x, weight, bias).float()  # [B, P, n n, 5]
        surface = said[..., :4]
        weights = said[..., 3].sigmoid() * (2 * said[..., 4].sigmoid())
        pairs = pairs + self.summary(weighed_and_plain_mean(x, weights).flatten(-2))
        prior = prior_of(self.prior(pairs).float())
        with without_autocast(pairs):
            places, cells = surface[..., :3], pixels.flatten(2, 3)
            if direct.scale is not None:
                scale = direct.scale.detach()
                places, diameters = stretched_points(places, scale), diameters * size_factor(scale)
            pose = fit_pose(direct, places, cells, weights, *prior, diameters, K, self.steps)
            pose = replace(pose, scale=direct.scale)
        return pose, pairs, Regions(pixels, surface.unflatten(2, (n, n)))

    def _cells(self, seen: Tensor, places: Tensor) -> Tensor:
        """`read` of what each cell saw [B, P, n n, S] and its place [n n, 2] -> [B, P, n n, hidden]

        A product each, as places are the same in every square: joining them would copy all that was seen,
        into rows that are no multiple of 16 bytes.
        """
        of_seen, of_places = self.read.weight.split([seen.shape[-1], 2], 1)
        return F.linear(seen, of_seen) + F.linear(places.to(seen.dtype), of_places, self.read.bias)

    def _of_pairs(self, pairs: Tensor, share: tuple[Tensor, Tensor]) -> Tensor:
        """`pair` of features [B, P, C] and box sides over the square's [B, P, 1] -> [B, P, 2 hidden]"""
        of_pairs, of_width, of_height = self.pair.weight.split([pairs.shape[-1], 1, 1], 1)
        y = F.linear(pairs, of_pairs, self.pair.bias)
        wide = y.to(share[0].dtype)  # float32, as the weights are
        wide = torch.addcmul(wide, share[0], of_width[:, 0])
        return torch.addcmul(wide, share[1], of_height[:, 0]).to(y.dtype)


def weighed_and_plain_mean(x: Tensor, weights: Tensor) -> Tensor:
    """x [B, P, A, C], weights [B, P, A] -> [B, P, 2, C] in x's type: means over A of weights * x and of x"""
    share = 1 / x.shape[-2]
    plain = torch.full_like(weights, share, dtype=x.dtype)
    return torch.stack([(weights * share).to(x.dtype), plain], -2) @ x


def cell_grid(cells: int, device: torch.device) -> Tensor:
    """[n, n, 2] x, y of the middles of n x n cells over -1..1"""
    steps = (torch.arange(cells, device=device, dtype=torch.float32) + 0.5) * (2 / cells) - 1
    return torch.stack([steps.expand(cells, cells), steps[:, None].expand(cells, cells)], -1)


def square_cells(
    boxes: Tensor, grid: Tensor, size: ImageSize
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """boxes [B, P, 4] cxcywh in 0..1 -> pixels [B, P, n, n, 2] of the cells, the same in 0..1 of the image,
    and the box's width and height over the square's side [B, P, 1]"""
    width, height = ((boxes[..., i : i + 1] * size[i - 2]).clamp(min=1.0) for i in (2, 3))  # pixels
    # The longer one, of steps that a recorded pass joins with those around them.
    square = (MARGIN * (width + F.relu(height - width))).clamp(min=16.0)
    sides = torch.cat([boxes.new_full((1,), side) for side in size])  # not copied from the host
    points = grid * (square / 2)[..., None, None] / sides + boxes[..., None, None, :2]
    return points * sides - 0.5, points, (width / square, height / square)
