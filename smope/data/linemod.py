"""`Linemod_preprocessed`: LineMod as DenseFusion and the authors of SMOPE-Net pass it on.

    ROOT/models/models_info.yml, obj_01.ply ...    (or the models inside a data folder: OBJ, keyed by name)
    ROOT/data/02/{rgb,depth,mask}/0000.png, gt.yml, info.yml, train.txt, test.txt

gt.yml holds, per frame, a list of objects with `cam_R_m2c`, `cam_t_m2c` (millimetres), `obj_bb` (left, top,
width, height) and `obj_id`; info.yml the camera. Everything that leaves this module is in metres.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smope.atomic import atomic_path
from smope.data import reading
from smope.data.bop import LINEMOD_NAMES
from smope.data.reading import DataError, FloatArray, Place, Problems
from smope.data.records import Annotation, Record

# The camera of all LineMod sequences, for trees without info.yml.
LINEMOD_K = np.array([[572.4114, 0, 325.2611], [0, 573.57043, 242.04899], [0, 0, 1]])
FilePlace = tuple[Path, Place]
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
_MESH_SUFFIXES = (".ply", ".obj", ".stl", ".glb")


class LinemodSequence:
    """One data folder (`ROOT/data/02`): the frames that `train.txt` or `test.txt` lists, or all (None)."""

    def __init__(self, folder: str | Path, split: str | None = "test", strict: bool = True) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(self.folder, None, "folder is missing")
        self.problems = Problems(strict)
        digits = re.search(r"\d+$", self.folder.name)
        self.scene_id = int(digits.group()) if digits else 0
        truths = reading.read_yaml(self.folder / "gt.yml")
        cameras = self._cameras()
        self.records: dict[int, Record] = {}  # by frame number
        for frame, (file, place) in self._frames(split, truths):
            with self.problems.skip():
                if frame not in truths:
                    raise DataError(file, place, f"frame {frame} is not in gt.yml")
                self.records[frame] = self._record(frame, truths, cameras)
        self.problems.report(f"LineMod sequence {self.folder.name}")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    @cached_property
    def models_folder(self) -> Path:
        """Beside the frames, as in the authors' tree, or two folders up, as in DenseFusion's."""
        for folder in (self.folder / "models", self.folder.parent.parent / "models"):
            if (folder / "models_info.yml").is_file():
                return folder
        raise DataError(self.folder / "models" / "models_info.yml", None, "file is missing")

    @cached_property
    def models_info(self) -> dict[int, dict[str, Any]]:
        """models_info.yml by object id (millimetres); keys may be ids, `obj_01`, or LineMod's names."""
        file = self.models_folder / "models_info.yml"
        info = {_object_id(key, file): (key, entry) for key, entry in reading.read_yaml(file).items()}
        for key, entry in info.values():
            if not isinstance(entry, dict):
                raise DataError(file, (key,), f"a mapping expected, {entry!r:.60} given")
            if "diameter" in entry:
                reading.number(entry["diameter"], file, (key, "diameter"))
        return {obj_id: entry for obj_id, (_, entry) in info.items()}

    @cached_property
    def names(self) -> dict[int, str]:
        return {i: LINEMOD_NAMES.get(i, f"obj_{i:06d}") for i in sorted(self.models_info)}

    def mesh_path(self, obj_id: int) -> Path:
        """The mesh file of an object, whatever its name and form."""
        found = self._found_mesh(obj_id)
        if found is None:
            sought = self.models_folder / f"obj_{obj_id:02d}.*"
            raise DataError(sought, None, f"the mesh of object {obj_id} is missing")
        return found

    def _found_mesh(self, obj_id: int) -> Path | None:
        stems = (f"obj_{obj_id:02d}", f"obj_{obj_id:06d}", f"{obj_id:02d}", self.names.get(obj_id, ""))
        files = (
            self.models_folder / f"{stem}{suffix}" for stem in stems if stem for suffix in _MESH_SUFFIXES
        )
        return next((file for file in files if file.is_file()), None)

    def _cameras(self) -> dict[int, Any] | None:
        file = self.folder / "info.yml"
        return reading.read_yaml(file) if file.exists() else None

    def _frames(self, split: str | None, truths: Mapping[Any, Any]) -> Iterator[tuple[int, FilePlace]]:
        """Frame numbers, each with the file that names it and where."""
        if split is None:
            file = self.folder / "gt.yml"
            for key in truths:
                with self.problems.skip():
                    yield reading.integer(key, file, (key,)), (file, (key,))
            return
        file = self.folder / f"{split}.txt"
        for line, text in enumerate(reading.read_text(file).splitlines(), start=1):
            if text.strip():
                with self.problems.skip():
                    yield reading.integer(Path(text.strip()).stem, file, line), (file, line)

    def _record(self, frame: int, truths: Mapping[Any, Any], cameras: Mapping[Any, Any] | None) -> Record:
        K, depth_scale = LINEMOD_K, 1.0
        if cameras is not None:
            file = self.folder / "info.yml"
            camera = reading.get(cameras, frame, file, None)
            K = reading.floats(reading.get(camera, "cam_K", file, (frame,)), (3, 3), file, (frame, "cam_K"))
            K = reading.check_intrinsics(K, file, (frame, "cam_K"))
            depth_scale = reading.number(camera.get("depth_scale", 1.0), file, (frame, "depth_scale"))
        depth = self.folder / "depth" / f"{frame:04d}.png"
        return Record(
            key=f"{self.folder.name}/{frame:04d}",
            image_path=reading.find_image([self.folder / "rgb"], f"{frame:04d}", _IMAGE_SUFFIXES),
            K=K,
            annotations=tuple(self._annotations(frame, truths[frame])),
            depth_path=depth if depth.exists() else None,
            depth_scale=depth_scale,
            scene_id=self.scene_id,
            image_id=frame,
        )

    def _annotations(self, frame: int, objects: Any) -> Iterator[Annotation]:
        file = self.folder / "gt.yml"
        for n, item in enumerate(reading.listed(objects, file, (frame,))):
            place = (frame, n)
            with self.problems.skip():
                obj_id = reading.integer(reading.get(item, "obj_id", file, place), file, (*place, "obj_id"))
                if obj_id not in self.models_info:
                    message = (
                        f"object {obj_id} is not in models_info.yml, which has {sorted(self.models_info)}"
                    )
                    raise DataError(file, (*place, "obj_id"), message)
                if self._found_mesh(obj_id) is None:
                    message = f"the mesh of object {obj_id} is missing in {self.models_folder}"
                    raise DataError(file, (*place, "obj_id"), message)
                T_CO = reading.pose(
                    reading.get(item, "cam_R_m2c", file, place),
                    reading.get(item, "cam_t_m2c", file, place),
                    file,
                    place,
                )
                T_CO[:3, 3] /= 1000
                bb = reading.get(item, "obj_bb", file, place)
                left, top, width, height = reading.floats(bb, (4,), file, (*place, "obj_bb"))
                yield Annotation(
                    name=self.names[obj_id],
                    T_CO=T_CO,
                    box_xyxy=np.array([left, top, left + width, top + height]),
                    object_id=obj_id,
                )


def write_linemod(folder: str | Path, records: Sequence[Record], splits: Mapping[str, Sequence[int]]) -> None:
    """gt.yml, info.yml and the lists of frames of one data folder; the images stay where they are.

    `splits` are {"train": frame numbers, "test": ...}; frames are the records' `image_id`.
    """
    root = Path(folder)
    truths = {r.image_id: [_entry(a, r.key) for a in r.annotations] for r in records}
    cameras = {r.image_id: {"cam_K": r.K.reshape(-1).tolist(), "depth_scale": r.depth_scale} for r in records}
    for name, content in (("gt.yml", truths), ("info.yml", cameras)):
        with atomic_path(root / name) as temporary, temporary.open("w", encoding="utf-8") as file:
            yaml.safe_dump(content, file, default_flow_style=None, width=1000)
    for split, frames in splits.items():
        with atomic_path(root / f"{split}.txt") as temporary:
            temporary.write_text("".join(f"{frame:04d}\n" for frame in frames), encoding="utf-8")


def _entry(annotation: Annotation, key: str) -> dict[str, Any]:
    if annotation.object_id is None or annotation.box_xyxy is None:
        raise ValueError(f"{key}, {annotation.name}: LineMod's form needs an object id and a box")
    x0, y0, x1, y1 = annotation.box_xyxy.tolist()
    return {
        "cam_R_m2c": annotation.T_CO[:3, :3].reshape(-1).tolist(),
        "cam_t_m2c": _millimetres(annotation.T_CO[:3, 3]),
        "obj_bb": [x0, y0, x1 - x0, y1 - y0],
        "obj_id": annotation.object_id,
    }


def _millimetres(metres: FloatArray) -> list[float]:
    return (metres * 1000).tolist()


def _object_id(key: Any, file: Path) -> int:
    if isinstance(key, str):
        by_name = {name: i for i, name in LINEMOD_NAMES.items()} | {"camera": 4}
        stem = Path(key).stem
        digits = re.search(r"\d+$", stem)
        found = by_name.get(stem, int(digits.group()) if digits else None)
    else:
        found = key if isinstance(key, int) else None
    if found is None:
        raise DataError(file, (key,), f"an object id, obj_NN or a name of LineMod expected, {key!r} given")
    return found
