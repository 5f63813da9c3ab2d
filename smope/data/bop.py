"""BOP data sets: the reader of their folders and the BOP'19 form of results.

https://github.com/thodan/bop_toolkit/blob/master/docs/bop_datasets_format.md. Files hold millimetres and
row-wise rotations; everything that leaves this module is in metres, model-to-camera, OpenCV frame.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from smope.atomic import atomic_path
from smope.data import reading
from smope.data.items import Batch
from smope.data.reading import DataError, FloatArray, Problems
from smope.data.records import Annotation, Record, to_batch

log = logging.getLogger(__name__)

IntArray = NDArray[np.int64]

CSV_HEADER = ("scene_id", "im_id", "obj_id", "score", "R", "t", "time")
_IMAGE_SUFFIXES = (".jpg", ".png", ".jpeg", ".tif")

# The names that the LineMod objects go by; BOP numbers them.
LINEMOD_NAMES: dict[int, str] = {
    1: "ape", 2: "benchvise", 3: "bowl", 4: "cam", 5: "can", 6: "cat", 7: "cup", 8: "driller",
    9: "duck", 10: "eggbox", 11: "glue", 12: "holepuncher", 13: "iron", 14: "lamp", 15: "phone",
}  # fmt: skip
_LINEMOD_FOLDERS = ("lm", "lmo", "linemod", "linemod_occluded")


@dataclass(frozen=True)
class Target:
    """How many instances of an object are to be found in an image."""

    scene_id: int
    im_id: int
    obj_id: int
    inst_count: int


@dataclass(frozen=True, eq=False)
class Estimate:
    """One row of a result file, and what a model knows beyond that form."""

    scene_id: int
    im_id: int
    obj_id: int
    score: float
    T_CO: FloatArray  # [4, 4] metres
    scale: FloatArray = field(default_factory=lambda: np.ones(3))  # [3] along the mesh's axes
    time: float = -1.0  # seconds for the whole image, -1 where not measured
    box_xyxy: FloatArray | None = None  # [4] pixels
    visibility: float | None = None
    sigma: tuple[float, float] | None = None  # expected rotation (degrees) and translation error (metres)


class BopScene:
    """One scene folder of a BOP data set (`test/000002`, `train_pbr/000000`): images and annotations."""

    def __init__(self, folder: str | Path, names: dict[int, str] | None = None, strict: bool = True) -> None:
        self.folder = Path(folder)
        self.names = names
        self.problems = Problems(strict)
        if not self.folder.name.isdigit():
            raise DataError(self.folder, None, "a scene folder has a number for its name, such as 000002")
        self.scene_id = int(self.folder.name)
        cameras = reading.read_json(self.folder / "scene_camera.json")
        truths = self._optional("scene_gt.json")
        infos = self._optional("scene_gt_info.json")
        self.records: dict[int, Record] = {}  # by image id
        for key in sorted(cameras, key=str):
            with self.problems.skip():
                image_id = reading.integer(key, self.folder / "scene_camera.json", (key,))
                self.records[image_id] = self._record(image_id, key, cameras[key], truths, infos)
        self.records = dict(sorted(self.records.items()))
        self.problems.report(f"BOP scene {self.folder.name}")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def batch(self, image_ids: Sequence[int], names: Sequence[str], masks: bool = False) -> Batch:
        """These images as a `Batch` with labels into `names`; see `records.to_batch`."""
        return to_batch([self.records[image_id] for image_id in image_ids], names, masks)

    def _optional(self, name: str) -> dict[str, Any] | None:
        """A test split may come without annotations."""
        path = self.folder / name
        return reading.read_json(path) if path.exists() else None

    def _record(
        self,
        image_id: int,
        key: str,
        camera: Any,
        truths: dict[str, Any] | None,
        infos: dict[str, Any] | None,
    ) -> Record:
        file = self.folder / "scene_camera.json"
        K = reading.floats(reading.get(camera, "cam_K", file, (key,)), (3, 3), file, (key, "cam_K"))
        stem = f"{image_id:06d}"
        image_path = reading.find_image([self.folder / "rgb", self.folder / "gray"], stem, _IMAGE_SUFFIXES)
        depth_path = self.folder / "depth" / f"{stem}.png"
        return Record(
            key=f"{self.folder.name}/{stem}",
            image_path=image_path,
            K=reading.check_intrinsics(K, file, (key, "cam_K")),
            annotations=() if truths is None else tuple(self._annotations(key, stem, truths, infos)),
            depth_path=depth_path if depth_path.exists() else None,
            depth_scale=reading.number(camera.get("depth_scale", 1.0), file, (key, "depth_scale")),
            scene_id=self.scene_id,
            image_id=image_id,
        )

    def _annotations(
        self, key: str, stem: str, truths: dict[str, Any], infos: dict[str, Any] | None
    ) -> Iterator[Annotation]:
        file, info_file = self.folder / "scene_gt.json", self.folder / "scene_gt_info.json"
        instances = reading.listed(reading.get(truths, key, file, None), file, (key,))
        details: list[Any] | None = None
        if infos is not None:
            details = reading.listed(reading.get(infos, key, info_file, None), info_file, (key,))
        if details is not None and len(details) != len(instances):
            raise DataError(info_file, (key,), f"{len(instances)} entries expected, {len(details)} given")
        for n, instance in enumerate(instances):
            place = (key, n)
            with self.problems.skip():
                obj_id = reading.integer(
                    reading.get(instance, "obj_id", file, place), file, (*place, "obj_id")
                )
                if self.names is not None and obj_id not in self.names:
                    message = f"object {obj_id} is unknown; there are meshes of {sorted(self.names)}"
                    raise DataError(file, (*place, "obj_id"), message)
                T_CO = reading.pose(
                    reading.get(instance, "cam_R_m2c", file, place),
                    reading.get(instance, "cam_t_m2c", file, place),
                    file,
                    place,
                )
                T_CO[:3, 3] /= 1000
                box, visibility = None, 1.0
                if details is not None:
                    box, visibility = _gt_info(details[n], info_file, place)
                masks = {
                    kind: path
                    for kind in ("mask", "mask_visib")
                    if (path := self.folder / kind / f"{stem}_{n:06d}.png").exists()
                }
                yield Annotation(
                    name=(self.names or {}).get(obj_id, f"obj_{obj_id:06d}"),
                    T_CO=T_CO,
                    box_xyxy=box,
                    visibility=visibility,
                    object_id=obj_id,
                    mask_path=masks.get("mask"),
                    mask_visible_path=masks.get("mask_visib"),
                    extra={} if details is None else dict(details[n]),
                )


@dataclass
class BopDataset:
    """A BOP data set's root: meshes, targets and scenes. `names` (object id to name) may be given.

    An annotation of an object without a mesh is an error, unless there are no meshes at all.
    """

    root: Path
    split: str = "test"
    strict: bool = True
    names: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.root = Path(self.root)
        if not self.root.is_dir():
            raise DataError(self.root, None, "folder is missing")
        self.problems = Problems(self.strict)  # of the scenes read so far
        self.names = {**self._found_names(), **self.names}

    @cached_property
    def models_folder(self) -> Path:
        """`models_eval` where there is one (BOP scores with it), else `models`."""
        folders = [self.root / "models_eval", self.root / "models"]
        return next((folder for folder in folders if folder.is_dir()), folders[-1])

    @cached_property
    def models_info(self) -> dict[int, dict[str, Any]]:
        """models_info.json by object id, as the file has it (millimetres)."""
        file = self.models_folder / "models_info.json"
        info = reading.read_json(file)
        for key, entry in info.items():
            reading.number(reading.get(entry, "diameter", file, (key,)), file, (key, "diameter"))
        return {reading.integer(key, file, (key,)): entry for key, entry in info.items()}

    @property
    def targets_file(self) -> Path:
        return self.root / "test_targets_bop19.json"

    @cached_property
    def targets(self) -> list[Target]:
        """What is to be found in the images of the test split."""
        file, found = self.targets_file, []
        for n, entry in enumerate(reading.read_json(file, list)):
            keys = ("scene_id", "im_id", "obj_id", "inst_count")
            values = (reading.integer(reading.get(entry, k, file, (n,)), file, (n, k)) for k in keys)
            found.append(Target(*values))
        return found

    def mesh(self, obj_id: int) -> tuple[FloatArray, IntArray]:
        """[V, 3] the vertices by which BOP measures, metres, and the faces [F, 3]."""
        file = self.models_folder / f"obj_{obj_id:06d}.ply"
        if not file.exists():
            raise DataError(file, None, f"the mesh of object {obj_id} is missing")
        try:
            mesh = trimesh.load_mesh(file, process=False)  # merging vertices would change the mean in ADD
        except Exception as error:  # trimesh raises whatever its parser meets
            raise DataError(file, None, f"not a readable mesh ({error})") from error
        return np.asarray(mesh.vertices, np.float64) / 1000, np.asarray(mesh.faces, np.int64)

    def scene(self, scene_id: int) -> BopScene:
        folder = self.root / self.split / f"{scene_id:06d}"
        if not folder.is_dir():
            raise DataError(folder, None, "scene folder is missing")
        return self._read(folder)

    def scenes(self) -> Iterator[BopScene]:
        """All scenes of the split, by number; where not strict, those that can be read at all."""
        folders = sorted(f for f in (self.root / self.split).glob("*") if f.is_dir() and f.name.isdigit())
        if not folders:
            raise DataError(self.root / self.split, None, "no scene folder (000001, 000002, ...) in it")
        for folder in folders:
            with self.problems.skip():
                yield self._read(folder)
        self.problems.report(f"BOP {self.root.name}, {self.split}")

    def _read(self, folder: Path) -> BopScene:
        known = {obj_id: name for obj_id, name in self.names.items() if obj_id in self._mesh_ids}
        scene = BopScene(folder, known or None, self.strict)
        self.problems.errors.extend(scene.problems.errors)
        return scene

    @cached_property
    def _mesh_ids(self) -> list[int]:
        """Objects that there are meshes of."""
        stems = (file.stem[4:] for file in self.models_folder.glob("obj_*.ply"))
        return sorted(int(stem) for stem in stems if stem.isdigit())

    def _found_names(self) -> dict[int, str]:
        """From names.json beside the meshes ({"1": "ape"}); else LineMod's where folder and ids say so."""
        ids = self._mesh_ids
        file = self.models_folder / "names.json"
        if file.exists():
            entries = reading.read_json(file).items()
            return {reading.integer(key, file, (key,)): str(name) for key, name in entries}
        if ids and set(ids) <= set(LINEMOD_NAMES) and self.root.resolve().name.lower() in _LINEMOD_FOLDERS:
            return {obj_id: LINEMOD_NAMES[obj_id] for obj_id in ids}
        return {obj_id: f"obj_{obj_id:06d}" for obj_id in ids}


def read_bop_csv(path: str | Path, strict: bool = True) -> list[Estimate]:
    """The rows of a BOP'19 result file."""
    file = Path(path)
    problems = Problems(strict)
    rows = csv.reader(reading.read_text(file).splitlines())
    estimates: list[Estimate] = []
    for line, row in enumerate(rows, start=1):
        if line == 1 and [cell.strip() for cell in row] == list(CSV_HEADER):
            continue
        if not row:
            continue
        with problems.skip():
            if len(row) != len(CSV_HEADER):
                raise DataError(file, line, f"7 columns expected, {','.join(CSV_HEADER)}; {len(row)} given")
            scene_id, im_id, obj_id = (reading.integer(cell, file, line) for cell in row[:3])
            T_CO = np.eye(4)
            # As estimated: scored as it stands, not made orthonormal.
            T_CO[:3, :3] = reading.floats(row[4], (3, 3), file, line)
            T_CO[:3, 3] = reading.floats(row[5], (3,), file, line) / 1000
            score, time = (reading.number(cell, file, line) for cell in (row[3], row[6]))
            estimates.append(Estimate(scene_id, im_id, obj_id, score, T_CO, time=time))
    problems.report(str(file))
    if not estimates:
        log.warning("%s: no result in it, so nothing counts as found", file)
    return estimates


def write_bop_csv(path: str | Path, estimates: Iterable[Estimate]) -> None:
    """A BOP'19 result file: millimetres, R row by row, seconds an image; no digit is lost."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_HEADER)
        for e in estimates:
            rotation = " ".join(repr(float(x)) for x in e.T_CO[:3, :3].reshape(-1))
            translation = " ".join(repr(float(x) * 1000) for x in e.T_CO[:3, 3])
            writer.writerow(
                [
                    e.scene_id,
                    e.im_id,
                    e.obj_id,
                    repr(float(e.score)),
                    rotation,
                    translation,
                    repr(float(e.time)),
                ]
            )


def write_bop_scene(folder: str | Path, records: Sequence[Record]) -> None:
    """scene_camera.json, scene_gt.json and scene_gt_info.json of a scene; the images stay where they are."""
    cameras: dict[str, Any] = {}
    truths: dict[str, Any] = {}
    infos: dict[str, Any] = {}
    for record in records:
        key = str(record.image_id)
        cameras[key] = {"cam_K": record.K.reshape(-1).tolist(), "depth_scale": record.depth_scale}
        truths[key], infos[key] = [], []
        for a in record.annotations:
            if a.object_id is None:
                raise ValueError(f"{record.key}, {a.name}: BOP's form needs an object id")
            rotation, translation = a.T_CO[:3, :3].reshape(-1), a.T_CO[:3, 3] * 1000
            pose = {"cam_R_m2c": rotation.tolist(), "cam_t_m2c": translation.tolist(), "obj_id": a.object_id}
            truths[key].append(pose)
            infos[key].append({"bbox_obj": _bbox_obj(a.box_xyxy), "visib_fract": a.visibility})
    for name, content in (("camera", cameras), ("gt", truths), ("gt_info", infos)):
        with atomic_path(Path(folder) / f"scene_{name}.json") as temporary:
            rows = (f'  "{key}": {json.dumps(value, allow_nan=False)}' for key, value in content.items())
            temporary.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")  # a line an image


def _bbox_obj(box: FloatArray | None) -> list[float]:
    """The stored form of a box: see `_gt_info`."""
    if box is None:
        return [-1, -1, -1, -1]
    x, y, right, bottom = box.tolist()
    return [x, y, right - x - 1, bottom - y - 1]


def _gt_info(info: Any, file: Path, place: tuple[str | int, ...]) -> tuple[FloatArray | None, float]:
    """The silhouette's box (None where stored as -1s: wholly outside the image) and the visible share."""
    box = reading.get(info, "bbox_obj", file, place)
    x, y, w, h = reading.floats(box, (4,), file, (*place, "bbox_obj"))
    share = reading.get(info, "visib_fract", file, place)
    visibility = reading.number(share, file, (*place, "visib_fract"))
    if w < 0 or h < 0:
        return None, visibility
    # Stored from the first to the last pixel, in a raster whose pixel x spans x to x + 1 of what K projects
    # to: against projected meshes of LM-O the edges x and x + w + 1 are right on average, to 0.05 px.
    return np.array([x, y, x + w + 1, y + h + 1]), visibility
