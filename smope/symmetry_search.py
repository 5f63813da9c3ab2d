"""The rotational symmetries of a mesh, found from its geometry; colours are not looked at.

A rotation that maps a surface onto itself keeps its centre of mass, so every axis passes through that.
Directions all around are tried coarsely against a distance field, the promising ones are aligned (point to
plane) and tested against the surface. A motion counts as a symmetry where all but a few points land on it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import trimesh
from torch import Tensor
from torch.nn import functional as F

from smope.objects import Symmetries
from smope.surface import farthest_points, pierce_surface

TOLERANCE = 0.015  # of the diameter
OUTLIERS = 0.02  # the share of the surface that may miss it: a seam, a slot, a scanner's hole
ORDERS = (11, 7, 5, 3, 2)  # every finite rotation group up to 12-fold has an axis of one of these
HIGHEST_ORDER = 36  # above it, steps are below the tolerance of most bodies
GENERIC_TURNS = (17.0, 41.0, 67.0, 101.0, 139.0)  # degrees: alike after all of these means alike after any
DIRECTIONS = 1500  # over half a sphere: about 4 degrees apart
TRIED = 16  # of the coarse search's best directions an order
GRID = 40  # cells of the distance field along each side
LARGEST_GROUP = 120


@dataclass(frozen=True)
class SymmetryAxis:
    """Turns by 360 / order degrees about a line leave the object alike; order 0 means any angle."""

    axis: Tensor  # [3] float64, unit length
    point: Tensor  # [3] float64, on the axis, metres
    order: int

    def turn(self, degrees: float) -> Tensor:
        """[4, 4] float64."""
        return _motion(_turns(self.axis[None], degrees)[0], self.point)

    def __str__(self) -> str:
        direction = ", ".join(f"{round(value, 2) + 0.0:.2f}" for value in self.axis.tolist())  # no -0.00
        return f"{'any turn' if self.order == 0 else f'{self.order}-fold'} about ({direction})"


def find_symmetries(
    mesh: trimesh.Trimesh, diameter: float, tolerance: float = TOLERANCE
) -> list[SymmetryAxis]:
    """The axes of the mesh's rotational symmetries, those of any angle first, then by order."""
    surface = _Surface(mesh, diameter, tolerance)
    directions = _hemisphere(DIRECTIONS)
    axes: list[SymmetryAxis] = []
    for order in ORDERS:
        for direction in surface.promising(directions, order):
            if any(_same_line(direction, known.axis, 8.0) for known in axes):
                continue
            axis = surface.refined(direction, order)
            if axis is None or any(_same_line(axis.axis, known.axis, 5.0) for known in axes):
                continue
            if axis.order == 0:
                # Then only a ball turns about other lines, or a body that may be flipped end for end.
                flip = surface.refined(_perpendicular(axis.axis), 2)
                return [axis] if flip is None else [axis, flip]
            axes.append(axis)
    return sorted(axes, key=lambda axis: -axis.order)


def symmetries_of(axes: list[SymmetryAxis]) -> Symmetries:
    """All motions that the axes make together, as an object holds them."""
    endless = tuple((axis.axis.float(), axis.point.float()) for axis in axes if axis.order == 0)
    if len(endless) > 1:
        return Symmetries(torch.zeros(0, 4, 4), endless)
    makers = [axis.turn(360 / axis.order) for axis in axes if axis.order]
    group = [torch.eye(4, dtype=torch.float64)]
    for element in group:  # grows while it is walked: each element times each maker, until nothing new comes
        for maker in makers:
            product = maker @ element
            if len(group) < LARGEST_GROUP and all(_apart(product, known) > 4.0 for known in group):
                group.append(product)
    discrete = torch.stack(group[1:]).float() if len(group) > 1 else torch.zeros(0, 4, 4)
    return Symmetries(discrete, endless)


class _Surface:
    """The mesh in units of its diameter about its centre of mass, to be asked what motion keeps it."""

    def __init__(self, mesh: trimesh.Trimesh, diameter: float, tolerance: float) -> None:
        hits = pierce_surface(mesh, diameter, 12288)
        self.diameter, self.tolerance = diameter, tolerance
        self.centre = torch.from_numpy(hits.points.mean(axis=0))
        points = (torch.from_numpy(hits.points) - self.centre) / diameter
        self.points, self.normals = points.float(), torch.from_numpy(hits.normals).float()
        self.spacing = math.sqrt(mesh.area / len(points)) / diameter
        self.probes = self.points[torch.from_numpy(farthest_points(points.numpy(), 512))]
        self.sparse_points, self.sparse_normals = self.points[:4096], self.normals[:4096]
        self.reach = float(self.points.norm(dim=1).max())
        ticks = torch.linspace(-self.reach, self.reach, GRID, dtype=torch.float32)
        nodes = torch.cartesian_prod(ticks, ticks, ticks)
        self.field = torch.cat(
            [torch.cdist(part, self.sparse_points).amin(dim=1) for part in nodes.split(512)]
        )
        self.field = self.field.reshape(1, 1, GRID, GRID, GRID)

    def promising(self, directions: Tensor, order: int) -> Tensor:
        """[D, 3] -> the few whose turn by 360 / order keeps the surface nearest, best first, no two alike."""
        rotations = _turns(directions, 360 / order).float()
        moved = torch.einsum("dij,pj->dpi", rotations, self.probes[:128])
        lookup = (moved / self.reach).flip(-1)  # grid_sample wants the last axis of the field first
        distances = F.grid_sample(self.field, lookup[None, :, :, None], align_corners=True)
        costs = distances[0, 0, :, :, 0].mean(dim=1)
        picked: list[int] = []
        for index in costs.argsort().tolist():
            if len(picked) == TRIED or costs[index] > 2.5 * self.tolerance:
                break
            if not any(_same_line(directions[index], directions[other], 10.0) for other in picked):
                picked.append(index)
        return directions[picked]

    def refined(self, direction: Tensor, order: int) -> SymmetryAxis | None:
        """The axis near `direction` with the highest order there is about it, None if it is no axis."""
        rotation, shift = _turns(direction[None], 360 / order)[0], torch.zeros(3, dtype=torch.float64)
        for _ in range(6):
            rotation, shift = self._aligned(rotation, shift)
        axis = _axis_of(rotation, direction)
        exact = _turns(axis[None], 360 / order)[0]
        across = shift - axis * (axis @ shift)
        point = torch.linalg.lstsq(torch.eye(3, dtype=torch.float64) - exact, across[:, None], driver="gelsd")
        line = SymmetryAxis(axis, self.centre + point.solution[:, 0] * self.diameter, order)
        if not self._keeps(line, 360 / order):
            return None
        if all(self._keeps(line, degrees) for degrees in GENERIC_TURNS):
            return SymmetryAxis(line.axis, line.point, 0)
        multiples = range(HIGHEST_ORDER // order, 0, -1)
        highest = next(order * k for k in multiples if self._keeps(line, 360 / (order * k)))
        return SymmetryAxis(line.axis, line.point, highest)

    def _keeps(self, line: SymmetryAxis, degrees: float) -> bool:
        motion = line.turn(degrees)
        rotation = motion[:3, :3]
        shift = (rotation @ self.centre + motion[:3, 3] - self.centre) / self.diameter
        misses = 0
        for probes in self.probes.split([16, 112, 384]):  # most motions that fail do so in the first part
            moved = probes @ rotation.T.float() + shift.float()
            nearest = torch.cdist(moved, self.points).argmin(dim=1)
            offsets = moved - self.points[nearest]
            away = (self.normals[nearest] * offsets).sum(dim=1).abs()
            # Along the surface a point is allowed the gap between the samples it is compared with.
            misses += int(
                (torch.maximum(away, offsets.norm(dim=1) - 1.5 * self.spacing) > self.tolerance).sum()
            )
            if misses > OUTLIERS * len(self.probes):
                return False
        return True

    def _aligned(self, rotation: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        """One step of point-to-plane alignment (Chen and Medioni 1992) of the moved surface."""
        moved = self.probes[:192] @ rotation.T.float() + shift.float()
        nearest = torch.cdist(moved, self.sparse_points).argmin(dim=1)
        normals, offsets = self.sparse_normals[nearest], moved - self.sparse_points[nearest]
        away = (normals * offsets).sum(dim=1)
        trust = (offsets.norm(dim=1) < 0.1).double()[:, None]
        rows = torch.cat([torch.linalg.cross(moved, normals), normals], dim=1).double() * trust
        squares = rows.T @ rows
        damping = (
            1e-4 * squares.diagonal().mean() * torch.eye(6, dtype=torch.float64)
        )  # sliding is free on balls
        step = torch.linalg.solve(squares + damping, -(rows.T @ (away.double()[:, None] * trust)))[:, 0]
        angle = step[:3].norm().clamp(min=1e-12)
        small = _turns((step[:3] / angle)[None], math.degrees(float(angle)))[0]
        return small @ rotation, small @ shift + step[3:]


def _turns(axes: Tensor, degrees: float) -> Tensor:
    """Rodrigues' formula: unit axes [D, 3] -> [D, 3, 3] float64."""
    x, y, z = axes.double().unbind(-1)
    zero = torch.zeros_like(x)
    skew = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], dim=-1).unflatten(-1, (3, 3))
    angle = math.radians(degrees)
    eye = torch.eye(3, dtype=torch.float64)
    return eye + math.sin(angle) * skew + (1 - math.cos(angle)) * (skew @ skew)


def _motion(rotation: Tensor, point: Tensor) -> Tensor:
    motion = torch.eye(4, dtype=torch.float64)
    motion[:3, :3] = rotation
    motion[:3, 3] = point - rotation @ point
    return motion


def _axis_of(rotation: Tensor, near: Tensor) -> Tensor:
    """The unit axis of a rotation, on the side of `near`: R + R^T has it for its largest eigenvalue."""
    axis = torch.linalg.eigh(rotation + rotation.T).eigenvectors[:, -1]
    return axis if axis @ near.double() >= 0 else -axis


def _perpendicular(axis: Tensor) -> Tensor:
    """A unit vector square to `axis`."""
    other = torch.eye(3, dtype=axis.dtype)[int(axis.abs().argmin())]
    return F.normalize(torch.linalg.cross(axis, other), dim=0)


def _hemisphere(count: int) -> Tensor:
    """[count, 3] float64 directions evenly over half a sphere (Fibonacci lattice), x, y and z first."""
    index = torch.arange(count, dtype=torch.float64) + 0.5
    z = 1 - index / count
    turn = index * math.pi * (3 - math.sqrt(5))
    radius = (1 - z * z).sqrt()
    spiral = torch.stack([radius * turn.cos(), radius * turn.sin(), z], dim=-1)
    return torch.cat([torch.eye(3, dtype=torch.float64), spiral])


def _same_line(a: Tensor, b: Tensor, degrees: float) -> bool:
    return abs(float(a.double() @ b.double())) > math.cos(math.radians(degrees))


def _apart(a: Tensor, b: Tensor) -> float:
    """Degrees between the rotations of two motions."""
    cosine = (float((a[:3, :3] * b[:3, :3]).sum()) - 1) / 2
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))
