"""KITTI object data: labels, calibration, result files, and what they mean as poses of class meshes.

    ROOT/training/{image_2/000025.png, label_2/000025.txt, calib/000025.txt}, ROOT/ImageSets/train.txt ...

A label gives a box's size, the middle of its bottom in the rectified frame of camera 0, and a turn about
the vertical. The images are camera 2's, which stands K^-1 P2[:, 3] beside camera 0. Class meshes: metres, z
up, origin at the bottom's middle, front along -y, so width, length, height are the extents along x, y, z.
Geiger et al., "Are we ready for Autonomous Driving? The KITTI Vision Benchmark Suite", CVPR 2012, and its
development kit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smope.atomic import atomic_path
from smope.data import reading
from smope.data.reading import DataError, FloatArray, Problems
from smope.data.records import Annotation, Record

TYPES = (
    "Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "Tram", "Misc", "DontCare",
)  # fmt: skip
CLASS_IDS = {"Tram": 1, "Car": 2, "Truck": 3, "Van": 4, "Pedestrian": 5}  # KITTI-3D's numbers
_MESH_TO_BOX = np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]])  # mesh axes to the box's: forward, down, left
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# KITTI grades occlusion only coarsely: fully visible, partly, largely occluded, unknown.
_VISIBLE_SHARE = {-1: 1.0, 0: 1.0, 1: 0.75, 2: 0.25, 3: 0.5}


@dataclass(frozen=True)
class KittiLabel:
    """A line of a label or result file, in its own units and frame (metres, radians, pixels)."""

    type: str
    truncated: float
    occluded: int
    alpha: float
    bbox: tuple[float, float, float, float]  # x0, y0, x1, y1
    dimensions: tuple[float, float, float]  # height, width, length
    location: tuple[float, float, float]  # middle of the bottom, rectified camera 0
    rotation_y: float
    score: float | None = None


class KittiDataset:
    """The images of one list (`ImageSets/<split>.txt`), or all labelled ones, as records.

    `extents` are each class mesh's size along x, y, z in metres: `Annotation.scale` then says how the mesh
    is to be stretched to a label's box. A class without a mesh is an error. By default objects are chosen
    and named as in KITTI-3D (`importer_name`); with `everything` all but DontCare are kept under their own
    names. The boxes of what is left out are the record's ignored areas.
    """

    def __init__(
        self,
        root: str | Path,
        split: str | None = None,
        extents: Mapping[str, Sequence[float]] | None = None,
        everything: bool = False,
        strict: bool = True,
    ) -> None:
        self.root = Path(root)
        self.folder = self.root / "training"
        if not self.folder.is_dir():
            raise DataError(self.folder, None, "folder is missing")
        self.extents = extents
        self.everything = everything
        self.problems = Problems(strict)
        self.labels: dict[str, list[KittiLabel]] = {}  # by the image's name, as in the files
        self.P2: dict[str, FloatArray] = {}
        self.records: dict[str, Record] = {}
        for number, name in enumerate(self._names(split)):
            with self.problems.skip():
                self.records[name] = self._record(name, number)
        self.problems.report(f"KITTI {split or 'training'}")

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self.records.values())

    def _names(self, split: str | None) -> list[str]:
        if split is None:
            return sorted(file.stem for file in (self.folder / "label_2").glob("*.txt"))
        return reading.read_text(self.root / "ImageSets" / f"{split}.txt").split()

    def _record(self, name: str, number: int) -> Record:
        P2 = read_calibration(self.folder / "calib" / f"{name}.txt")
        file = self.folder / "label_2" / f"{name}.txt"
        labels = read_labels(file, self.problems)
        annotations: list[Annotation] = []
        for line, label in labels:
            with self.problems.skip():
                annotations.extend(self._annotation(label, P2, file, line))
        image_path = reading.find_image([self.folder / "image_2"], name, _IMAGE_SUFFIXES)
        self.labels[name] = [label for _, label in labels]
        self.P2[name] = P2
        return Record(
            key=name,
            image_path=image_path,
            K=P2[:, :3],
            annotations=tuple(annotations),
            image_id=int(name) if name.isdigit() else number,
            ignored=tuple(label.bbox for _, label in labels if self._name(label) is None),
        )

    def _name(self, label: KittiLabel) -> str | None:
        """What the object is called, None where it is left out, and its area ignored."""
        if self.everything:
            return None if label.type == "DontCare" else label.type
        return importer_name(label)

    def _annotation(self, label: KittiLabel, P2: FloatArray, file: Path, line: int) -> Iterator[Annotation]:
        name = self._name(label)
        if name is None:
            return
        height, width, length = label.dimensions
        scale = np.ones(3)
        if self.extents is not None:
            if name not in self.extents:
                raise DataError(file, line, f"no mesh of class {name}; there are {sorted(self.extents)}")
            scale = np.array([width, length, height]) / np.asarray(self.extents[name], np.float64)
        T_CO = pose_of_label(label, P2)
        # A label's own box, tighter than the corners' for people, unless the image's edge has cut it.
        corners = projected_box(T_CO, (width, length, height), P2[:, :3]) if label.truncated > 0 else None
        yield Annotation(
            name=name,
            T_CO=T_CO,
            box_xyxy=np.array(label.bbox) if corners is None else corners,
            visibility=_VISIBLE_SHARE[label.occluded] * (1 - max(label.truncated, 0)),
            scale=scale,
            object_id=CLASS_IDS.get(name),
            extra={"label": label},
        )


def type_of(name: str) -> str:
    """KITTI's own word for an object that is named after it or after its mesh file, such as "car_001"; other
    names as they are."""
    known = {type.lower(): type for type in TYPES}
    return known.get(re.sub(r"(_\d+)?(\.\w+)?$", "", name.lower()), name)


def importer_name(label: KittiLabel) -> str | None:
    """The class under which LabelImg3D's importer takes a label, None where it drops it."""
    dropped = label.type in ("DontCare", "Misc", "Person_sitting")
    if dropped or label.occluded >= 2 or label.truncated > 0.7:
        return None
    return "Pedestrian" if label.type == "Cyclist" else label.type


def pose_of_label(label: KittiLabel, P2: FloatArray) -> FloatArray:
    """[4, 4] class mesh to camera 2."""
    T_CO = np.eye(4)
    T_CO[:3, :3] = _about_y(label.rotation_y) @ _MESH_TO_BOX
    T_CO[:3, 3] = label.location + camera_offset(P2)
    return T_CO


def label_of_pose(
    annotation: Annotation, extents: Sequence[float], P2: FloatArray, size: tuple[int, int]
) -> KittiLabel:
    """The result line of a pose: its turn about the vertical, which is all that the form can hold.

    `extents` are the mesh's along x, y, z; the 2D box is the annotation's, else that of the projected
    corners, clipped to the image of `size`.
    """
    turn = annotation.T_CO[:3, :3] @ _MESH_TO_BOX.T
    rotation_y = float(np.arctan2(turn[0, 2] - turn[2, 0], turn[0, 0] + turn[2, 2]))
    x, y, z = (annotation.T_CO[:3, 3] - camera_offset(P2)).tolist()
    width, length, height = (float(e * s) for e, s in zip(extents, annotation.scale, strict=True))
    box = annotation.box_xyxy
    if box is None:
        box = projected_box(annotation.T_CO, (width, length, height), P2[:, :3])
    if box is None:
        box = np.zeros(4)
    right, bottom = size[0] - 1, size[1] - 1
    x0, y0, x1, y1 = np.clip(box, 0, [right, bottom, right, bottom]).tolist()
    return KittiLabel(
        type=annotation.name,
        truncated=-1.0,
        occluded=-1,
        alpha=_wrapped(rotation_y - np.arctan2(x, z)),
        bbox=(x0, y0, x1, y1),
        dimensions=(height, width, length),
        location=(x, y, z),
        rotation_y=rotation_y,
        score=annotation.score,
    )


def camera_offset(P2: FloatArray) -> FloatArray:
    """[3] from the rectified camera 0 to camera 2, metres."""
    return np.asarray(np.linalg.solve(P2[:, :3], P2[:, 3]), np.float64)


def projected_box(T_CO: FloatArray, size: Sequence[float], K: FloatArray) -> FloatArray | None:
    """[4] extent of the projected corners of a box that stands on its origin; None where one is behind."""
    width, length, height = size
    ends = [(-width / 2, width / 2), (-length / 2, length / 2), (0.0, height)]
    corners = np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(8, 3) @ T_CO[:3, :3].T + T_CO[:3, 3]
    if corners[:, 2].min() <= 0:
        return None
    pixels = corners @ K.T
    pixels = pixels[:, :2] / pixels[:, 2:]
    return np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])


def read_labels(file: Path, problems: Problems | None = None) -> list[tuple[int, KittiLabel]]:
    """(line, label) of a label file (15 columns) or a result file (16, with the score)."""
    problems = problems or Problems()
    labels = []
    for line, text in enumerate(reading.read_text(file).splitlines(), start=1):
        if text.strip():
            with problems.skip():
                labels.append((line, _parse(text.split(), file, line)))
    return labels


def write_labels(file: str | Path, labels: Sequence[KittiLabel]) -> None:
    """A label file, or a result file where the labels have scores."""
    with atomic_path(file) as temporary:
        temporary.write_text("".join(f"{_format(label)}\n" for label in labels), encoding="utf-8")


def read_calibration(file: Path) -> FloatArray:
    """P2 [3, 4], the projection into the left colour camera's image."""
    for line, text in enumerate(reading.read_text(file).splitlines(), start=1):
        if text.startswith("P2:"):
            P2 = reading.floats(text[3:], (3, 4), file, line)
            reading.check_intrinsics(P2[:, :3], file, line)
            return P2
    raise DataError(file, None, "no line starts with P2:")


def _parse(words: Sequence[str], file: Path, line: int) -> KittiLabel:
    if len(words) not in (15, 16):
        raise DataError(file, line, f"15 columns expected, 16 in a result file; {len(words)} given")
    if words[0] not in TYPES:
        raise DataError(file, line, f"class {words[0]!r} is unknown; known: {', '.join(TYPES)}")
    v = reading.floats(words[1:], (len(words) - 1,), file, line).tolist()
    occluded = reading.integer(v[1], file, line)
    if occluded not in _VISIBLE_SHARE:
        raise DataError(file, line, f"occluded: -1 to 3 expected, {occluded} given")
    return KittiLabel(
        type=words[0],
        truncated=v[0],
        occluded=occluded,
        alpha=v[2],
        bbox=(v[3], v[4], v[5], v[6]),
        dimensions=(v[7], v[8], v[9]),
        location=(v[10], v[11], v[12]),
        rotation_y=v[13],
        score=v[14] if len(v) == 15 else None,
    )


def _format(label: KittiLabel) -> str:
    numbers = (label.alpha, *label.bbox, *label.dimensions, *label.location, label.rotation_y)
    words = [label.type, f"{label.truncated:.2f}", str(label.occluded), *(f"{x:.6f}" for x in numbers)]
    return " ".join(words if label.score is None else [*words, f"{label.score:.6f}"])


def _about_y(angle: float) -> FloatArray:
    c, s = np.cos(angle), np.sin(angle)
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def _wrapped(angle: float) -> float:
    """In -pi to pi."""
    return float((angle + np.pi) % (2 * np.pi) - np.pi)
