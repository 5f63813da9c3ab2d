"""One known object: its surface points, size and symmetries, in the user's own mesh frame and in metres."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import trimesh
from torch import Tensor

from smope.meshes import METRES_PER_UNIT, MeshError, diameter, load_mesh
from smope.surface import sample_surface

__all__ = ["MeshError", "ObjectModel", "Symmetries", "SymmetryError", "load_mesh"]

log = logging.getLogger(__name__)

SPHERE_TRANSFORMS = 1024  # at most so many rotations stand for a body that is alike from every side
SAME_BOX = 0.03  # of the diameter: two meshes of one object differ by less
SYMMETRY_TOLERANCE = 0.15  # of the diameter: a stated symmetry may move the surface by this much, no more

_BOP_FORM = 'an entry of BOP\'s models_info.json, with "symmetries_discrete" or "symmetries_continuous",'
_BOP_KEYS = {
    "symmetries_discrete", "symmetries_continuous", "diameter",
    "min_x", "min_y", "min_z", "size_x", "size_y", "size_z",
}  # fmt: skip


class SymmetryError(ValueError):
    """Symmetries that are not in the expected form, or that this mesh cannot have."""


@dataclass(frozen=True, eq=False)
class Symmetries:
    """The rigid motions that leave an object alike, in its own frame, metres."""

    discrete: Tensor  # [S, 4, 4] float32, without the identity; may be empty
    continuous: tuple[tuple[Tensor, Tensor], ...] = ()  # (axis [3], offset [3]: a point on the axis) each

    def __post_init__(self) -> None:
        if self.discrete.ndim != 3 or self.discrete.shape[1:] != (4, 4):
            raise SymmetryError(f"discrete symmetries {tuple(self.discrete.shape)} given, [S, 4, 4] expected")

    @staticmethod
    def none() -> Symmetries:
        return Symmetries(torch.zeros(0, 4, 4))

    @staticmethod
    def from_bop(info: Mapping[str, Any], units: str = "mm") -> Symmetries:
        """From an entry of BOP's models_info.json, whose lengths are in `units`.

        Its further keys are skipped, but not a misspelt one, by which a symmetry would be lost in silence.
        """
        if not isinstance(info, Mapping):
            raise SymmetryError(f"{_shown(info)} given, {_BOP_FORM} expected")
        misspelt = [key for key in info if key not in _BOP_KEYS and _resembles(key)]
        if misspelt or (info and not info.keys() & _BOP_KEYS):
            raise SymmetryError(f"the key {(misspelt or list(info))[0]!r} given, {_BOP_FORM} expected")
        if units not in METRES_PER_UNIT:
            raise SymmetryError(
                f"units={units!r} given, one of {', '.join(map(repr, METRES_PER_UNIT))} expected"
            )
        metres = METRES_PER_UNIT[units]
        discrete = [_bop_transform(entry, metres) for entry in _listed(info, "symmetries_discrete")]
        continuous = [_bop_axis(entry, metres) for entry in _listed(info, "symmetries_continuous")]
        stacked = torch.stack(discrete) if discrete else torch.zeros(0, 4, 4)
        return Symmetries(stacked, tuple(continuous))

    def to_bop(self) -> dict[str, Any]:
        """The same as models_info.json has it: row-major 4x4 lists and axes with offsets, millimetres."""
        entry: dict[str, Any] = {}
        if len(self.discrete):
            in_mm = self.discrete.double().clone()
            in_mm[:, :3, 3] *= 1000
            entry["symmetries_discrete"] = in_mm.flatten(1).tolist()
        if self.continuous:
            entry["symmetries_continuous"] = [
                {"axis": axis.double().tolist(), "offset": (offset.double() * 1000).tolist()}
                for axis, offset in self.continuous
            ]
        return entry

    def transforms(self, step_deg: float = 5.0) -> Tensor:
        """[T, 4, 4] float32, identity first: every turn about a continuous axis after every discrete motion.

        Axes are cut into ceil(360 / step_deg) turns. Two axes that are not parallel mean a ball: then at most
        1024 rotations, spread evenly over all of them, stand for the group.
        """
        identity = torch.eye(4, dtype=torch.float64)
        discrete = torch.cat([identity[None], self.discrete.double().cpu()])
        steps = max(1, math.ceil(360 / step_deg - 1e-6))
        turns = identity[None]
        if self.continuous:
            axis, offset = (part.double().cpu() for part in self.continuous[0])
            others = [other.double().cpu() for other, _ in self.continuous[1:]]
            if any(float(torch.linalg.cross(axis, other).norm()) > 1e-3 for other in others):
                return _about(_even_rotations(min(SPHERE_TRANSFORMS, steps**3 // 2)), offset).float()
            angles = torch.arange(steps, dtype=torch.float64) * (2 * math.pi / steps)
            turns = _about(_rotations_about(axis, angles), offset)
        return torch.einsum("sij,tjk->tsik", turns, discrete).flatten(0, 1).float()

    def __repr__(self) -> str:
        return f"Symmetries({len(self.discrete)} discrete, {len(self.continuous)} continuous)"


@dataclass(frozen=True, eq=False)
class ObjectModel:
    """One known object in the user's own mesh frame, metres.

    `points` cover the surface evenly and depend on the surface only, not on its triangles. They stand in
    farthest-point order, so `points[:k]` is a good coarse set for every k.
    """

    name: str
    points: Tensor  # [2048, 3] float32
    normals: Tensor  # [2048, 3] float32, unit length
    colors: Tensor | None  # [2048, 3] float32 sRGB in 0..1, None where the mesh has none
    centre: Tensor  # [3] float32, of the bounding box
    extents: Tensor  # [3] float32, of the bounding box
    diameter: float  # largest distance between two vertices
    symmetries: Symmetries
    mesh: trimesh.Trimesh | None = None  # own frame, metres; None where the object came from a checkpoint
    trained: bool = False  # the weights at hand have seen it

    @classmethod
    def from_mesh(
        cls,
        name: str,
        source: Any,
        units: str,
        symmetries: Symmetries | Mapping[str, Any] | str | None = None,
        force: bool = False,
    ) -> ObjectModel:
        """See `load_mesh` for `source`, `units` and `force`.

        `symmetries` is None, "auto" (found from the geometry alone, whatever the colours), `Symmetries`, or
        an entry of models_info.json, whose lengths are then in the mesh's own `units`.
        """
        mesh = load_mesh(source, units, force=force, name=name)
        vertices = np.asarray(mesh.vertices)
        low, high = vertices.min(axis=0), vertices.max(axis=0)
        size = diameter(vertices)
        surface = sample_surface(mesh, size)
        return cls(
            name=name,
            points=_float(surface.points),
            normals=_float(surface.normals),
            colors=None if surface.colors is None else _float(surface.colors),
            centre=_float((low + high) / 2),
            extents=_float(high - low),
            diameter=size,
            symmetries=_resolve_symmetries(name, symmetries, units, mesh, _float(surface.points), size),
            mesh=mesh,
        )

    def fills_the_box_of(self, other: ObjectModel) -> bool:
        """Whether this mesh stands where the other one stood, so that what is said of its frame holds."""
        gaps = torch.cat([self.centre - other.centre, (self.extents - other.extents) / 2])
        return float(gaps.abs().max()) < SAME_BOX * other.diameter

    def to_tensors(self) -> dict[str, Tensor]:
        """All but the name, the mesh and `trained`, for a safetensors file."""
        tensors = {
            "points": self.points,
            "normals": self.normals,
            "centre": self.centre,
            "extents": self.extents,
            "diameter": torch.tensor(self.diameter, dtype=torch.float64),
            "symmetries_discrete": self.symmetries.discrete,
            "symmetries_continuous": torch.stack([torch.stack(pair) for pair in self.symmetries.continuous])
            if self.symmetries.continuous
            else torch.zeros(0, 2, 3),
        }
        if self.colors is not None:
            tensors["colors"] = self.colors
        return tensors

    @classmethod
    def from_tensors(cls, name: str, tensors: Mapping[str, Tensor], trained: bool = True) -> ObjectModel:
        """What `to_tensors` gave, in whatever float type the file kept it."""
        axes = tensors["symmetries_continuous"].float()
        colours = tensors.get("colors")
        return cls(
            name=name,
            points=tensors["points"].float(),
            normals=tensors["normals"].float(),
            colors=None if colours is None else colours.float(),
            centre=tensors["centre"].float(),
            extents=tensors["extents"].float(),
            diameter=float(tensors["diameter"]),
            symmetries=Symmetries(
                tensors["symmetries_discrete"].float(), tuple((pair[0], pair[1]) for pair in axes)
            ),
            trained=trained,
        )

    def __repr__(self) -> str:
        size = " x ".join(f"{extent * 1000:.0f}" for extent in self.extents.tolist())
        return f"ObjectModel({self.name!r}, {size} mm, {self.symmetries}, trained={self.trained})"


def _resolve_symmetries(
    name: str,
    given: Symmetries | Mapping[str, Any] | str | None,
    units: str,
    mesh: trimesh.Trimesh,
    points: Tensor,
    size: float,
) -> Symmetries:
    if given is None:
        return Symmetries.none()
    if isinstance(given, str):
        if given != "auto":
            raise SymmetryError(f'{name}: symmetries={given!r} given; None, "auto" or the BOP form expected')
        from smope.symmetry_search import find_symmetries, symmetries_of

        axes = find_symmetries(mesh, size)
        log.info("%s: symmetries found: %s", name, "; ".join(map(str, axes)) or "none")
        return symmetries_of(axes)
    try:
        symmetries = given if isinstance(given, Symmetries) else Symmetries.from_bop(given, units)
    except SymmetryError as error:
        raise SymmetryError(f"{name}: {error}") from None
    for index, transform in enumerate(symmetries.transforms(step_deg=45.0)):
        moved = points @ transform[:3, :3].T + transform[:3, 3]
        overshoot = torch.maximum(moved.amax(0) - points.amax(0), points.amin(0) - moved.amin(0)).max().item()
        if overshoot > SYMMETRY_TOLERANCE * size:
            raise SymmetryError(
                f"{name}: symmetry {index} moves the object {overshoot:.4g} m out of its own box of diameter "
                f"{size:.4g} m; are its lengths in the mesh's units ({units}), and is it this mesh's?"
            )
    return symmetries


def _shown(value: Any) -> str:
    return " ".join(repr(value).split())


def _resembles(key: Any) -> bool:
    return bool(difflib.get_close_matches(str(key), ("symmetries_discrete", "symmetries_continuous"), n=1))


def _listed(info: Mapping[str, Any], key: str) -> list[Any]:
    """The entries: those of a list, or the rows of an array."""
    entries = info.get(key, ())
    rows = isinstance(entries, (np.ndarray, Tensor)) and entries.ndim > 0
    if not rows and (isinstance(entries, (str, bytes)) or not isinstance(entries, Sequence)):
        raise SymmetryError(f"{key}: {_shown(entries)} given, a list expected")
    return list(entries)


def _numbers(value: Any) -> Tensor:
    """float64; empty where these are no numbers."""
    try:
        return torch.tensor(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError):
        return torch.zeros(0, dtype=torch.float64)


def _bop_transform(entry: Sequence[float], metres: float) -> Tensor:
    matrix = _numbers(entry).flatten()
    if len(matrix) != 16 or not torch.isfinite(matrix).all():
        raise SymmetryError(
            f"symmetries_discrete: {len(matrix)} values given, 16 finite ones (4x4 by rows) expected"
        )
    matrix = matrix.reshape(4, 4)
    rotation = matrix[:3, :3]
    error = (rotation @ rotation.T - torch.eye(3, dtype=torch.float64)).abs().max()
    if error > 1e-3 or torch.linalg.det(rotation) < 0 or matrix[3].tolist() != [0, 0, 0, 1]:
        raise SymmetryError(f"symmetries_discrete: a rigid motion expected, {matrix.tolist()} given")
    matrix[:3, 3] *= metres
    return matrix.float()


def _bop_axis(entry: Mapping[str, Sequence[float]], metres: float) -> tuple[Tensor, Tensor]:
    if not isinstance(entry, Mapping) or not entry.keys() <= {"axis", "offset"}:
        raise SymmetryError(f'symmetries_continuous: {{"axis": ..., "offset": ...}} expected, {entry} given')
    axis, offset = _numbers(entry.get("axis", ())), _numbers(entry.get("offset", (0, 0, 0)))
    length = axis.norm()
    if (
        axis.shape != (3,)
        or offset.shape != (3,)
        or not torch.isfinite(torch.cat([axis, offset])).all()
        or length == 0
    ):
        raise SymmetryError(
            f"symmetries_continuous: an axis and an offset of 3 values each expected, {entry} given"
        )
    return (axis / length).float(), (offset * metres).float()


def _rotations_about(axis: Tensor, angles: Tensor) -> Tensor:
    """Rodrigues' formula: unit axis [3] and angles [T] -> [T, 3, 3]."""
    x, y, z = axis.tolist()
    skew = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=axis.dtype)
    sine, cosine = angles.sin()[:, None, None], angles.cos()[:, None, None]
    return torch.eye(3, dtype=axis.dtype) + sine * skew + (1 - cosine) * (skew @ skew)


def _about(rotations: Tensor, point: Tensor) -> Tensor:
    """[T, 3, 3] rotations about `point` [3] as rigid motions [T, 4, 4]."""
    motions = torch.eye(4, dtype=rotations.dtype).repeat(len(rotations), 1, 1)
    motions[:, :3, :3] = rotations
    motions[:, :3, 3] = point - rotations @ point
    return motions


def _even_rotations(count: int) -> Tensor:
    """[count, 3, 3] evenly over all rotations, identity first: super-Fibonacci spirals (Alexa 2022)."""
    phi, psi = math.sqrt(2.0), 1.533751168755204288118041
    s = torch.arange(count, dtype=torch.float64) + 0.5
    t = s / count
    alpha, beta = 2 * math.pi * s / phi, 2 * math.pi * s / psi
    inner, outer = t.sqrt(), (1 - t).sqrt()
    x, y, z, w = inner * alpha.sin(), inner * alpha.cos(), outer * beta.sin(), outer * beta.cos()
    rows = [
        torch.stack([1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)], dim=-1),
        torch.stack([2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)], dim=-1),
        torch.stack([2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)], dim=-1),
    ]
    rotations = torch.stack(rows, dim=-2)
    return rotations[0].T @ rotations


def _float(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.float32).copy())
