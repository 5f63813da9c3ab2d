"""What `predict` returns: the objects found in one image, as parallel arrays."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smope.atomic import atomic_path
from smope.camera import Camera

if TYPE_CHECKING:
    from PIL.Image import Image

    from smope.objects import ObjectModel

_FORMAT = "smope-poses-1"
_SHAPES: dict[str, tuple[int, ...]] = {  # beyond the first axis, which counts the objects found
    "labels": (),
    "scores": (),
    "boxes_xyxy": (4,),
    "T_CO": (4, 4),
    "scale": (3,),
    "visibility": (),
    "sigma": (2,),
}
_KEYS = {  # array -> key of one entry in the JSON form, which is singular
    "labels": "label",
    "scores": "score",
    "boxes_xyxy": "box_xyxy",
    "T_CO": "T_CO",
    "scale": "scale",
    "visibility": "visibility",
    "sigma": "sigma",
}


class PosesError(ValueError):
    """Arrays or a file that make no `Poses`."""


@dataclass(frozen=True, eq=False, repr=False)
class Poses:
    """N objects found in one image, best score first as `predict` gives them.

    Poses are model-to-camera in the OpenCV frame (x right, y down, z forward), in metres, in each mesh's own
    frame. Where `scale` is not 1 a point x of the mesh is seen at T_CO (scale * x).
    """

    names: tuple[str, ...]  # N
    labels: Tensor  # [N] int64, index into the registered objects
    scores: Tensor  # [N] float32, 0..1
    boxes_xyxy: (
        Tensor  # [N, 4] float32, pixels; the whole object, also where it is hidden or outside the image
    )
    T_CO: Tensor  # [N, 4, 4] float32, metres
    scale: Tensor  # [N, 3] float32, 1 where the weights do not predict it
    visibility: Tensor  # [N] float32, visible share of the silhouette
    sigma: Tensor  # [N, 2] float32, expected error of the rotation (degrees) and of the translation (metres)
    camera: Camera
    objects: Mapping[str, ObjectModel] = field(default_factory=dict)  # what the names mean, for drawing

    def __post_init__(self) -> None:
        if isinstance(self.names, str):
            raise PosesError(
                f"Poses.names: the string {self.names!r} given, a tuple of one name an object expected"
            )
        object.__setattr__(self, "names", tuple(self.names))
        for name, rest in _SHAPES.items():
            tensor, expected = getattr(self, name), (len(self.names), *rest)
            if not isinstance(tensor, Tensor):
                raise PosesError(
                    f"Poses.{name}: {type(tensor).__name__} given, a tensor of shape {expected} expected"
                )
            if tuple(tensor.shape) != expected:
                raise PosesError(
                    f"Poses.{name}: shape {tuple(tensor.shape)} given, {expected} expected "
                    f"for {len(self.names)} names"
                )
            dtype = torch.int64 if name == "labels" else torch.float32
            if tensor.dtype != dtype:
                raise PosesError(f"Poses.{name}: {tensor.dtype} given, {dtype} expected")

    @classmethod
    def unchecked(
        cls,
        names: tuple[str, ...],
        camera: Camera,
        objects: Mapping[str, ObjectModel],
        columns: Mapping[str, Tensor],
    ) -> Poses:
        """Of what is known to fit; a look at each array would take longer than to make it."""
        poses = object.__new__(cls)
        vars(poses).update(columns, names=names, camera=camera, objects=objects)
        return poses

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Poses]:
        """One `Poses` of length 1 an object."""
        return (self[i] for i in range(len(self)))

    def __getitem__(
        self, index: int | slice | Sequence[int] | Sequence[bool] | Tensor | NDArray[Any]
    ) -> Poses:
        """Those of an index, a slice, a list of indices or a mask [N]; a `Poses` for a single index too."""
        rows = _rows(index, len(self))
        kept = {name: getattr(self, name)[torch.tensor(rows, dtype=torch.int64)] for name in _SHAPES}
        return replace(self, names=tuple(self.names[i] for i in rows), **kept)

    def to(self, device: torch.device | str) -> Poses:
        """The same on another device. The objects stay where they are: drawing happens on the CPU."""
        moved = {name: getattr(self, name).to(device) for name in _SHAPES}
        return replace(self, camera=self.camera.to(device), **moved)

    def numpy(self) -> dict[str, NDArray[Any]]:
        """The arrays by name, with `names` as strings and the intrinsics as `K` [3, 3]."""
        arrays = {name: getattr(self, name).detach().cpu().numpy() for name in _SHAPES}
        return {"names": np.array(self.names, dtype=str), **arrays, "K": self.camera.K.cpu().numpy()}

    def draw(
        self,
        image: Any,
        *,
        surfaces: bool = True,
        boxes: bool = True,
        boxes_3d: bool = False,
        axes: bool = True,
        labels: bool = True,
        opacity: float = 0.6,
    ) -> Image:
        """The image that was given to `predict`, in any form it takes, with the poses drawn over it."""
        from smope.draw import draw_poses

        return draw_poses(
            image,
            self,
            surfaces=surfaces,
            boxes=boxes,
            boxes_3d=boxes_3d,
            axes=axes,
            labels=labels,
            opacity=opacity,
        )

    def to_dict(self) -> dict[str, Any]:
        """What stands in the JSON form; `from_dict` gives the same float32 values back."""
        columns = {name: getattr(self, name).detach().cpu() for name in _SHAPES}
        for name, column in columns.items():
            if not torch.isfinite(column).all():
                raise PosesError(
                    f"Poses.{name} holds a value that is not finite, which JSON cannot: {column.tolist()}"
                )
        dist = self.camera.dist
        return {
            "format": _FORMAT,
            "units": "pixels, metres, OpenCV camera frame, model to camera; sigma: degrees, metres",
            "camera": {
                "K": self.camera.K.tolist(),
                "size": list(self.camera.size),
                "dist": None if dist is None else dist.tolist(),
            },
            "poses": [
                {"name": name, **{_KEYS[column]: columns[column][i].tolist() for column in _SHAPES}}
                for i, name in enumerate(self.names)
            ],
        }

    @classmethod
    def from_dict(cls, document: Any, objects: Mapping[str, ObjectModel] | None = None) -> Poses:
        """Of `to_dict`'s form; further keys are left alone."""
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            raise PosesError(f'no key "format": "{_FORMAT}"; what Poses.save wrote is expected')
        try:
            camera, entries = document["camera"], document["poses"]
            columns = {
                name: torch.tensor(
                    [entry[_KEYS[name]] for entry in entries],
                    dtype=torch.int64 if name == "labels" else torch.float32,
                    device="cpu",
                ).reshape(len(entries), *rest)
                for name, rest in _SHAPES.items()
            }
            names = tuple(str(entry["name"]) for entry in entries)
            sensor = Camera(K=camera["K"], size=tuple(camera["size"]), dist=camera["dist"])
        except KeyError as error:
            raise PosesError(f"the key {error} is missing") from error
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise PosesError(f"malformed ({error})") from error
        return cls(names=names, camera=sensor, objects=objects or {}, **columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON that `load` reads back to the same float32 values. The objects are not in it."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        with atomic_path(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str], objects: Mapping[str, ObjectModel] | None = None) -> Poses:
        """Read what `save` wrote; `objects` by name, where the result is to be drawn with their surfaces."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            raise PosesError(f"{path}: not JSON ({error}); Poses.load reads what Poses.save wrote") from error
        try:
            return cls.from_dict(document, objects)
        except PosesError as error:
            raise PosesError(f"{path}: {error}") from error

    def __repr__(self) -> str:
        count = f"{len(self)} object{'' if len(self) == 1 else 's'}"
        lines = [f"Poses({count}, image {self.camera.size[0]} x {self.camera.size[1]})"]
        width = max((len(name) for name in self.names), default=0)
        for i, name in enumerate(self.names):
            x, y, z = (1000 * self.T_CO[i, :3, 3]).tolist()
            degrees, metres = self.sigma[i].tolist()
            lines.append(
                f"  {name:<{width}}  score {float(self.scores[i]):.2f}  t ({x:.1f}, {y:.1f}, {z:.1f}) mm  "
                f"visible {100 * float(self.visibility[i]):.0f} %  "
                f"expected error {degrees:.1f} deg, {1000 * metres:.1f} mm"
            )
        return "\n".join(lines)


def _rows(index: Any, count: int) -> list[int]:
    """Any index that `Poses` takes, as whole numbers in [0, count)."""
    if isinstance(index, slice):
        return list(range(count))[index]
    values = index.detach().cpu().numpy() if isinstance(index, Tensor) else np.asarray(index)
    if values.size == 0 and values.ndim == 1 and values.dtype != bool:
        return []
    if values.dtype == bool:
        if values.shape != (count,):
            raise IndexError(f"mask of shape {values.shape} given, ({count},) expected")
        return np.flatnonzero(values).tolist()
    if not np.issubdtype(values.dtype, np.integer) or values.ndim > 1:
        raise IndexError(
            f"{values.dtype} of shape {values.shape} given; an index, a slice, indices or a mask expected"
        )
    rows = np.atleast_1d(values)
    if ((rows < -count) | (rows >= count)).any():
        raise IndexError(f"index {index} given, there are {count} objects")
    return [int(row) % count for row in rows]
