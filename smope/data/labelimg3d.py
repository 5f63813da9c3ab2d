"""LabelImg3D scenes, in which the authors of SMOPE-Net publish KITTI-3D: reader, writer, split.

    ROOT/images/**/000025.png, ROOT/annotations/**/000025.json, ROOT/models/{models.json, car_001.obj, ...}

The tool draws in VTK's world: x right, y up, the camera at (0, 0, d) looking along -z, the image plane of
width 1 at z = 0, so the focal length is d times the image's width. `matrix` is row-major, X_world = M
X_object. The stored `fov` and `T_matrix_c2o` disagree with that (by 0.2 degrees and 0.01 m) and are not
used for reading. `2d_bbox` is the extent of the projected corners of the mesh's box, not clipped. Meshes:
metres, z up, front along -y.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import trimesh

from smope.atomic import atomic_path
from smope.data import reading
from smope.data.reading import DataError, FloatArray, Problems
from smope.data.records import Annotation, Record, image_size

CAMERA_DISTANCE = 0.52
_FLIP = np.diag([1.0, -1.0, -1.0])  # VTK's camera axes to OpenCV's
_STORED_DISTANCE = 0.51  # what the tool puts into T_matrix_c2o in place of 0.52
_STORED_FOV = 88.8
_SCALE_NOISE = 0.01  # column norms of `matrix` are rounded; further from 1 they are meant as a scale
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


class LabelImg3DScene:
    """A scene's annotated images. `split` picks `ROOT/train`, `val` or `test` of a tree that has been split;
    of one that has not, the share that `split_by_ratio` gives it by its defaults.

    `models` and `images` say where those lie if not in the scene, as for a folder of predictions.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        models: str | Path | None = None,
        images: str | Path | None = None,
        strict: bool = True,
    ) -> None:
        self.root = Path(root)
        share = split if split in ("train", "val", "test") and not (self.root / split).exists() else None
        self.folder = self.root / split if split and not share else self.root
        if not self.folder.is_dir():
            raise DataError(self.folder, None, "folder is missing")
        self.models_folder = Path(models) if models else self._found_models()
        self.images_root = Path(images) if images else self.folder
        self.problems = Problems(strict)
        self.records: dict[int, Record] = {}  # by the image's number, or counted where names are no numbers
        files = sorted((self.folder / "annotations").rglob("*.json"))
        if not files:
            raise DataError(self.folder / "annotations", None, "no annotation (*.json) in it")
        stems = [file.stem for file in files]
        numbered = all(stem.isdigit() for stem in stems) and len(set(stems)) == len(stems)
        keys = [file.relative_to(self.folder / "annotations").with_suffix("").as_posix() for file in files]
        wanted = set(split_by_ratio(keys)[share] if share else keys)
        for n, (file, key) in enumerate(zip(files, keys, strict=True)):
            if key not in wanted:
                continue
            with self.problems.skip():
                image_id = int(file.stem) if numbered else n
                self.records[image_id] = self._record(file, key, image_id)
        self.problems.report(f"LabelImg3D scene {self.root.name}")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    @cached_property
    def classes(self) -> dict[str, dict[str, Any]]:
        """models.json by mesh file name: `class_name`, `class_index`, `size`; empty where there is none."""
        file = self.models_folder / "models.json"
        classes: dict[str, dict[str, Any]] = reading.read_json(file) if file.exists() else {}
        for name, entry in classes.items():
            reading.get(entry, "class_name", file, (name,))
            index = reading.get(entry, "class_index", file, (name,))
            reading.integer(index, file, (name, "class_index"))
        return classes

    def mesh_path(self, model_file: str) -> Path:
        return self.models_folder / PureWindowsPath(model_file).name

    def _found_models(self) -> Path:
        candidates = [self.root / "models", self.root / f"model_{self.root.resolve().name}"]
        return next((c for c in candidates if c.is_dir()), candidates[0])

    def _record(self, file: Path, key: str, image_id: int) -> Record:
        document = read_document(file)
        named = PureWindowsPath(str(reading.get(document, "image_file", file, None))).as_posix()
        image_path = self.images_root / named
        if not image_path.is_file():  # split trees keep the old name in the file
            moved = self.images_root / "images" / key
            image_path = reading.find_image([moved.parent], moved.name, _IMAGE_SUFFIXES)
        distance = self._distance(document, file)
        return Record(
            key=key,
            image_path=image_path,
            K=intrinsics(image_size(image_path), distance),
            annotations=tuple(self._annotations(document, file, distance)),
            image_id=image_id,
        )

    def _distance(self, document: dict[str, Any], file: Path) -> float:
        camera = reading.get(document, "camera", file, None)
        distance = reading.number(
            reading.get(camera, "distance", file, ("camera",)), file, ("camera", "distance")
        )
        if distance <= 0:
            raise DataError(file, ("camera", "distance"), f"a positive distance expected, {distance} given")
        return distance

    def _annotations(self, document: dict[str, Any], file: Path, distance: float) -> Iterator[Annotation]:
        models = reading.get(document, "model", file, None)
        count = reading.integer(reading.get(models, "num", file, ("model",)), file, ("model", "num"))
        for n in range(count):
            place = ("model", n)
            with self.problems.skip():
                item = reading.get(models, str(n), file, ("model",))
                mesh = self.mesh_path(str(reading.get(item, "model_file", file, place)))
                if not mesh.is_file():
                    raise DataError(file, (*place, "model_file"), f"the mesh {mesh} is missing")
                if self.classes and mesh.name not in self.classes:
                    raise DataError(file, (*place, "model_file"), f"{mesh.name} is not in models.json")
                matrix = reading.floats(
                    reading.get(item, "matrix", file, place), (4, 4), file, (*place, "matrix")
                )
                affine = opencv_from_vtk(matrix, distance)
                scale = np.linalg.norm(affine[:3, :3], axis=0)
                if np.abs(scale - 1).max() <= _SCALE_NOISE:
                    scale = np.ones(3)
                pose = reading.pose(affine[:3, :3] / scale, affine[:3, 3], file, (*place, "matrix"))
                pose[:3, :3] = reading.nearest_rotation(pose[:3, :3])
                box = reading.get(item, "2d_bbox", file, place)
                yield Annotation(
                    name=str(reading.get(item, "class_name", file, place)),
                    T_CO=pose,
                    box_xyxy=reading.floats(box, (4,), file, (*place, "2d_bbox")),
                    scale=scale,
                    object_id=reading.integer(
                        reading.get(item, "class", file, place), file, (*place, "class")
                    ),
                    score=reading.number(item.get("score", 1.0), file, (*place, "score")),
                    extra=item,
                )


def intrinsics(size: tuple[int, int], distance: float = CAMERA_DISTANCE) -> FloatArray:
    """K [3, 3] of the tool's camera for an image of `size` (width, height)."""
    width, height = size
    return np.array([[distance * width, 0, width / 2], [0, distance * width, height / 2], [0, 0, 1]])


def opencv_from_vtk(matrix: FloatArray, distance: float = CAMERA_DISTANCE) -> FloatArray:
    """[4, 4] object to OpenCV camera, of the stored object to world, as rounded as that is."""
    out = np.eye(4)
    out[:3, :3] = _FLIP @ matrix[:3, :3]
    out[:3, 3] = _FLIP @ (matrix[:3, 3] - [0, 0, distance])
    return out


def vtk_from_opencv(T: FloatArray, distance: float = CAMERA_DISTANCE) -> FloatArray:
    """The inverse of `opencv_from_vtk`."""
    out = np.eye(4)
    out[:3, :3] = _FLIP @ T[:3, :3]
    out[:3, 3] = _FLIP @ T[:3, 3] + [0, 0, distance]
    return out


def split_by_ratio(
    keys: Sequence[str], ratio: tuple[float, float, float] = (3, 1, 1), seed: int = 0
) -> dict[str, list[str]]:
    """Images shared out to train, val and test at random; the first two rounded down, test is the rest."""
    shuffled = sorted(keys)
    random.Random(seed).shuffle(shuffled)
    train, val = (int(part / sum(ratio) * len(shuffled)) for part in ratio[:2])
    return {
        "train": shuffled[:train],
        "val": shuffled[train : train + val],
        "test": shuffled[train + val :],
    }


def read_document(file: Path) -> dict[str, Any]:
    """An annotation file as it is: keys in order, whole numbers whole."""
    document: dict[str, Any] = reading.read_json(file)
    return document


def write_document(file: str | Path, document: Mapping[str, Any]) -> None:
    """In the tool's layout; what was read and written reads the same again."""
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(document, indent=4, allow_nan=False), encoding="utf-8")


def make_document(
    image_file: str,
    size: tuple[int, int],
    annotations: Sequence[Annotation],
    models: Mapping[str, tuple[str, int]],
    meshes: Mapping[str, trimesh.Trimesh],
) -> dict[str, Any]:
    """Poses as an annotation that opens in the tool.

    `models` names each object's mesh file within the scene and its class number, `meshes` are those meshes in
    metres. The poses are taken as in the tool's own camera (`intrinsics`); `scale` goes into `matrix`.
    """
    K = intrinsics(size)
    entries: dict[str, Any] = {"num": len(annotations)}
    for n, annotation in enumerate(annotations):
        model_file, index = models[annotation.name]
        low, high = np.asarray(meshes[annotation.name].bounds, np.float64)
        affine = annotation.T_CO.copy()
        affine[:3, :3] *= annotation.scale  # scales the mesh's axes, which are the columns
        matrix = vtk_from_opencv(affine)
        corners = _corners(low, high)
        camera_corners = corners @ affine[:3, :3].T + affine[:3, 3]
        pixels = camera_corners @ K.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        entries[str(n)] = {
            "model_file": model_file,
            "matrix": matrix.reshape(-1).tolist(),
            "actor_id": n,
            "R_matrix_c2o": annotation.T_CO[:3, :3].reshape(-1).tolist(),
            "T_matrix_c2o": [
                *annotation.T_CO[:2, 3].tolist(),
                float(annotation.T_CO[2, 3] - CAMERA_DISTANCE + _STORED_DISTANCE),
            ],
            "class": index,
            "class_name": annotation.name,
            "size": ((high - low) * annotation.scale).tolist(),
            "2d_bbox": [*pixels.min(axis=0).tolist(), *pixels.max(axis=0).tolist()],
            "3d_bbox": pixels.astype(int).tolist(),
            "3d_bbox_w": (corners @ matrix[:3, :3].T + matrix[:3, 3]).tolist(),
            "score": annotation.score,
        }
    camera_to_world = np.eye(4)
    camera_to_world[2, 3] = CAMERA_DISTANCE
    return {
        "image_file": image_file,
        "model": entries,
        "camera": {
            "matrix": camera_to_world.reshape(-1).tolist(),
            "position": [0.0, 0.0, CAMERA_DISTANCE],
            "focalPoint": [0.0, 0.0, 0.0],
            "fov": _STORED_FOV,
            "viewup": [0.0, 1.0, 0.0],
            "distance": CAMERA_DISTANCE,
        },
    }


def _corners(low: FloatArray, high: FloatArray) -> FloatArray:
    """[8, 3] in the tool's order: y changes fastest, then x, then z."""
    ends = np.stack([low, high])
    return np.array([[ends[x, 0], ends[y, 1], ends[z, 2]] for z in (0, 1) for x in (0, 1) for y in (0, 1)])
