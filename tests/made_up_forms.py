"""One made-up street in LabelImg3D's and KITTI's forms, and one made-up table in BOP's and LineMod's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import made_up_bop
import numpy as np
import trimesh
from PIL import Image
from test_data_linemod import write_tree

from smope.data import labelimg3d
from smope.data.kitti import KittiLabel, label_of_pose, pose_of_label, write_labels
from smope.data.records import Annotation

SIZE = (320, 120)
K = labelimg3d.intrinsics(SIZE)
EXTENTS = {"Car": (2.0, 4.0, 1.5), "Van": (2.0, 5.0, 2.0)}  # width, length, height in metres
NUMBERS = {"Car": 2, "Van": 4}  # KITTI-3D's
Street = Mapping[int, Sequence[Annotation]]  # by the image's number


def vehicle(name: str) -> trimesh.Trimesh:
    """A box with its origin at the bottom's middle."""
    up = trimesh.transformations.translation_matrix([0, 0, EXTENTS[name][2] / 2])
    return trimesh.creation.box(EXTENTS[name], transform=up)


def label(x: float, z: float, turn: float, name: str = "Car") -> KittiLabel:
    """On a road 1.5 m below the camera."""
    width, length, height = EXTENTS[name]
    alpha = turn - np.arctan2(x, z)
    return KittiLabel(name, 0.0, 0, alpha, (0, 0, 1, 1), (height, width, length), (x, 1.5, z), turn)


def pose(x: float, z: float, turn: float, P2: np.ndarray | None = None) -> np.ndarray:
    """[4, 4] of the class mesh, seen by the tool's camera or by one with `P2`."""
    return pose_of_label(label(x, z, turn), np.hstack([K, np.zeros((3, 1))]) if P2 is None else P2)


def street() -> Street:
    """Three images with cars and vans."""
    return {
        3: [Annotation("Car", pose(-2.0, 12.0, 0.3)), Annotation("Van", pose(3.0, 9.0, -1.2))],
        8: [Annotation("Car", pose(0.0, 8.0, 1.5))],
        9: [Annotation("Van", pose(1.0, 11.0, 0.8)), Annotation("Car", pose(-3.0, 14.0, 2.0))],
    }


def write_labelimg3d(root: Path, objects: Street) -> Path:
    for folder in ("images/s1", "models"):
        (root / folder).mkdir(parents=True)
    for name in EXTENTS:
        vehicle(name).export(root / f"models/{name.lower()}_001.obj")
    for number, found in objects.items():
        Image.new("RGB", SIZE, (number, 90, 120)).save(root / f"images/s1/{number:06d}.png")
        write_annotations(root, number, found)
    return root


def write_annotations(root: Path, number: int, annotations: Sequence[Annotation]) -> None:
    """One image's; `root` may hold nothing else, as a folder of predictions does."""
    models = {name: (f"models\\{name.lower()}_001.obj", index) for name, index in NUMBERS.items()}
    meshes = {name: vehicle(name) for name in EXTENTS}
    document = labelimg3d.make_document(f"images\\s1\\{number:06d}.png", SIZE, annotations, models, meshes)
    labelimg3d.write_document(root / f"annotations/s1/{number:06d}.json", document)


# The camera stands 6 cm beside the one that KITTI's labels count from.
P2 = np.hstack([K, (K @ [0.06, 0, 0.003])[:, None]])


def write_kitti(root: Path, objects: Street) -> Path:
    for folder in ("training/image_2", "training/label_2", "training/calib"):
        (root / folder).mkdir(parents=True)
    for number, found in objects.items():
        name = f"{number:06d}"
        Image.new("RGB", SIZE, (number, 90, 120)).save(root / f"training/image_2/{name}.png")
        (root / f"training/calib/{name}.txt").write_text("P2: " + " ".join(map(str, P2.reshape(-1))))
        labels = [label_of_pose(a, EXTENTS[a.name], P2, SIZE) for a in found]
        labels = [replace(one, truncated=0.0, occluded=0, score=None) for one in labels]
        write_labels(root / f"training/label_2/{name}.txt", labels)
    return root


def write_all(root: Path) -> dict[str, Path]:
    """Each form by its name, with the folder that readers take."""
    linemod = write_tree(root)
    return {
        "bop": root / "bop",
        "linemod": linemod,
        "labelimg3d": write_labelimg3d(root / "streets", street()),
        "kitti": write_kitti(root / "kitti", street()),
    }


def meshes_of(form: str) -> tuple[dict[str, trimesh.Trimesh], str]:
    """{name: mesh} of the objects that the form's annotations name, and their units."""
    if form in ("labelimg3d", "kitti"):
        return {name: vehicle(name) for name in EXTENTS}, "m"
    names = {"bop": {1: "obj_000001", 4: "obj_000004"}, "linemod": {1: "ape", 4: "cam"}}[form]
    return {name: made_up_bop.mesh(obj_id) for obj_id, name in names.items()}, "mm"
