"""Data sets as the scoring of poses needs them: images, targets, objects, results in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import trimesh

from smope.data.bop import LINEMOD_NAMES, BopDataset, Estimate, Target, read_bop_csv, write_bop_csv
from smope.data.labelimg3d import LabelImg3DScene, make_document, write_document
from smope.data.linemod import LinemodSequence
from smope.data.reading import DataError
from smope.data.records import Annotation, Record
from smope.evaluate.bop import ObjectGeometry, Pairing, pair_targets
from smope.evaluate.pose_errors import symmetry_transforms

Writer = Callable[[Path, str, list[Estimate]], None]  # folder, model's name, estimates


@dataclass(frozen=True, eq=False)
class PoseSet:
    """A data set with known meshes."""

    root: Path
    records: dict[tuple[int, int], Record]  # by scene and image id, those with targets
    targets: list[Target]
    names: dict[int, str]  # by object id
    geometry: Callable[[int], ObjectGeometry]
    read_results: Callable[[Path], list[Estimate]]
    write_results: Writer
    mesh_files: Mapping[int, str] = field(default_factory=dict)  # by object id; a model may call them so

    @property
    def ids(self) -> dict[str, int]:
        """Object ids by every name that a model may give them."""
        ids = {f"obj_{obj_id:06d}": obj_id for obj_id in self.names}
        ids |= {PureWindowsPath(file).stem: obj_id for obj_id, file in self.mesh_files.items()}
        if set(self.names) <= set(LINEMOD_NAMES):
            ids |= {LINEMOD_NAMES[obj_id]: obj_id for obj_id in self.names}
        # Of two objects of one name (KITTI-3D's pedestrians) the first.
        return ids | {name: obj_id for obj_id, name in sorted(self.names.items(), reverse=True)}

    def pairings(self, estimates: Iterable[Estimate]) -> list[Pairing]:
        """Each target with what was found of it and its errors."""
        geometry = {obj_id: self.geometry(obj_id) for obj_id in {t.obj_id for t in self.targets}}
        return pair_targets(self.targets, estimates, self.records, geometry)

    def first(self, count: int | None) -> PoseSet:
        """With the first images only."""
        keys = list(self.records)[:count]
        targets = [t for t in self.targets if (t.scene_id, t.im_id) in set(keys)]
        return replace(self, records={key: self.records[key] for key in keys}, targets=targets)


def load_pose_set(root: Path, format: str, split: str | None = None) -> PoseSet:
    """`format` "bop", "linemod" or "labelimg3d"; `split` in the format's own words, the test part if None."""
    return _LOADERS[format](root, split)


def _bop(root: Path, split: str | None) -> PoseSet:
    dataset = BopDataset(root, split or "test")
    if dataset.split.startswith("test") and dataset.targets_file.is_file():
        targets = dataset.targets
        scenes = {scene_id: dataset.scene(scene_id) for scene_id in sorted({t.scene_id for t in targets})}
    else:  # BOP's own lists hold what is visible to a tenth
        scenes = {scene.scene_id: scene for scene in dataset.scenes()}
        everything = {(r.scene_id, r.image_id): r for scene in scenes.values() for r in scene}
        targets = _all_annotated(everything, visibility=0.1)
    records = {}
    for target in targets:
        scene = scenes[target.scene_id]
        if target.im_id not in scene.records:
            message = f"image {target.im_id}, which is a target, is missing"
            raise DataError(scene.folder / "scene_camera.json", None, message)
        records[target.scene_id, target.im_id] = scene.records[target.im_id]

    @cache
    def geometry(obj_id: int) -> ObjectGeometry:
        if obj_id not in dataset.models_info:
            raise DataError(dataset.models_folder / "models_info.json", None, f"object {obj_id} is missing")
        info = dataset.models_info[obj_id]
        points, faces = dataset.mesh(obj_id)
        symmetries = symmetry_transforms(info, unit=0.001)
        return ObjectGeometry(points, faces, float(info["diameter"]) / 1000, symmetries)

    return PoseSet(root, records, targets, dataset.names, geometry, read_bop_csv, _write_csv)


def _linemod(root: Path, split: str | None) -> PoseSet:
    """`root` is a data folder (`data/02`)."""
    sequence = LinemodSequence(root, split or "test")
    records = {(sequence.scene_id, frame): record for frame, record in sequence.records.items()}

    @cache
    def geometry(obj_id: int) -> ObjectGeometry:
        info = sequence.models_info[obj_id]
        mesh = _load(sequence.mesh_path(obj_id))
        points = np.asarray(mesh.vertices, np.float64) / 1000
        diameter = info.get("diameter", 0) / 1000 or _diameter(points)
        if "symmetries_discrete" not in info and sequence.names[obj_id] in ("eggbox", "glue"):
            info = {**info, "symmetries_discrete": [_half_turn(points * 1000)]}
        symmetries = symmetry_transforms(info, unit=0.001)
        return ObjectGeometry(points, np.asarray(mesh.faces, np.int64), diameter, symmetries)

    targets = _all_annotated(records)
    return PoseSet(root, records, targets, sequence.names, geometry, read_bop_csv, _write_csv)


def _labelimg3d(root: Path, split: str | None) -> PoseSet:
    scene = LabelImg3DScene(root, split)
    records = {(0, image_id): record for image_id, record in scene.records.items()}
    files = {a.object_id: a.extra["model_file"] for r in scene for a in r.annotations if a.object_id}
    names = {a.object_id: a.name for r in scene for a in r.annotations if a.object_id}
    for mesh_name, entry in scene.classes.items():
        files.setdefault(entry["class_index"], mesh_name)
        names.setdefault(entry["class_index"], entry["class_name"])

    @cache
    def mesh(obj_id: int) -> trimesh.Trimesh:
        return _load(scene.mesh_path(files[obj_id]))

    @cache
    def geometry(obj_id: int) -> ObjectGeometry:
        points = np.asarray(mesh(obj_id).vertices, np.float64)
        faces = np.asarray(mesh(obj_id).faces, np.int64)
        return ObjectGeometry(points, faces, _diameter(points), np.eye(4)[None])

    def read(path: Path) -> list[Estimate]:
        """A CSV in BOP's form, or a scene's folder whose annotations are the predictions."""
        if path.is_file():
            return read_bop_csv(path)
        image_ids = {record.key: image_id for image_id, record in scene.records.items()}
        found = LabelImg3DScene(path, models=scene.models_folder, images=scene.folder)
        return [
            Estimate(
                0, image_ids[record.key], a.object_id, a.score, a.T_CO, scale=a.scale, box_xyxy=a.box_xyxy
            )
            for record in found
            if record.key in image_ids
            for a in record.annotations
            if a.object_id is not None
        ]

    def write(out: Path, model: str, estimates: list[Estimate]) -> None:
        """The CSV, and annotations that open in the tool."""
        _write_csv(out, model, estimates)
        for (_, image_id), record in records.items():
            found = [e for e in estimates if e.im_id == image_id]
            annotations = [Annotation(names[e.obj_id], e.T_CO, scale=e.scale, score=e.score) for e in found]
            models = {names[e.obj_id]: (files[e.obj_id], e.obj_id) for e in found}
            meshes = {names[e.obj_id]: mesh(e.obj_id) for e in found}
            image_file = record.image_path.relative_to(scene.folder).as_posix()
            document = make_document(image_file, record.size, annotations, models, meshes)
            write_document(out / "annotations" / f"{record.key}.json", document)

    return PoseSet(root, records, _all_annotated(records), names, geometry, read, write, files)


def _write_csv(out: Path, model: str, estimates: Iterable[Estimate]) -> None:
    write_bop_csv(out / f"smope_{model}-test.csv", estimates)


def _all_annotated(records: Mapping[tuple[int, int], Record], visibility: float = 0.0) -> list[Target]:
    """Every annotated object that is so visible is to be found."""
    targets = []
    for (scene_id, im_id), record in records.items():
        seen = (a for a in record.annotations if a.visibility >= visibility)
        ids = [a.object_id for a in seen if a.object_id is not None]
        targets += [Target(scene_id, im_id, obj_id, ids.count(obj_id)) for obj_id in sorted(set(ids))]
    return targets


def _load(path: Path) -> trimesh.Trimesh:
    try:
        return trimesh.load_mesh(path, process=False)
    except Exception as error:  # trimesh raises whatever its parser meets
        raise DataError(path, None, f"not a readable mesh ({error})") from error


def _diameter(points: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Largest distance of two vertices, which are corners of the convex hull."""
    corners = trimesh.convex.convex_hull(points).vertices
    return float(max(np.linalg.norm(corners - corner, axis=1).max() for corner in corners))


def _half_turn(points: np.ndarray[Any, np.dtype[np.float64]]) -> list[float]:
    """About the vertical through the middle of the bounding box, as BOP has it for eggbox and glue."""
    middle = (points.min(axis=0) + points.max(axis=0)) / 2
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    turn[:2, 3] = 2 * middle[:2]
    return turn.reshape(-1).tolist()


_LOADERS: dict[str, Callable[[Path, str | None], PoseSet]] = {
    "bop": _bop,
    "linemod": _linemod,
    "labelimg3d": _labelimg3d,
}
