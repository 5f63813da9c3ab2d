"""Draw docs/images/format_*.png: a small made-up scene written in each data form, read back, drawn as read.

    python tools/make_format_pictures.py [FOLDER]

What stands on the pictures has been through the writer and the reader of its form, so a frame or a unit
that is wrong shows. Meshes and pictures are made here; nothing is taken from a data set.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import trimesh
import yaml  # type: ignore[import-untyped]
from PIL import Image
from scipy.spatial.transform import Rotation

from smope.camera import Camera
from smope.data import labelimg3d
from smope.data.bop import BopScene, write_bop_scene
from smope.data.kitti import KittiDataset, label_of_pose, write_labels
from smope.data.labelimg3d import LabelImg3DScene
from smope.data.linemod import LINEMOD_K, LinemodSequence, write_linemod
from smope.data.records import Annotation, Record
from smope.draw import draw_poses
from smope.objects import ObjectModel
from smope.poses import Poses

TABLE_SIZE, STREET_SIZE = (640, 400), (960, 300)
NAMES = {1: "ape", 5: "can", 9: "duck"}  # LineMod's numbers; the meshes are not LineMod's
COLOURS = {"ape": (150, 95, 60), "can": (190, 60, 55), "duck": (235, 190, 40)}


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pictures: dict[str, Callable[[Path], Image.Image]] = {
        "bop": _bop,
        "linemod": _linemod,
        "labelimg3d": _labelimg3d,
        "kitti": _kitti,
    }
    for name, make in pictures.items():
        with tempfile.TemporaryDirectory() as temporary:
            make(Path(temporary)).save(folder / f"format_{name}.png", optimize=True)


def _bop(root: Path) -> Image.Image:
    scene = root / "000001"
    image = _backdrop(TABLE_SIZE, (178, 160, 138), (206, 212, 216), horizon=0.15)
    records = [_table_record(_saved(image, scene / "rgb/000001.png"))]
    write_bop_scene(scene, records)
    (record,) = BopScene(scene, NAMES)
    return _drawn(record, _table_meshes(), boxes_3d=False)


def _linemod(root: Path) -> Image.Image:
    folder = root / "data/01"
    image = _backdrop(TABLE_SIZE, (150, 165, 150), (205, 205, 210), horizon=0.15)
    record = _table_record(_saved(image, folder / "rgb/0001.png"))
    models = root / "models"
    models.mkdir()
    for obj_id, name in NAMES.items():
        _table_meshes()[name].export(models / f"obj_{obj_id:02d}.ply")
    info = {obj_id: {"diameter": 100.0} for obj_id in NAMES}
    (models / "models_info.yml").write_text(yaml.safe_dump(info), encoding="utf-8")
    write_linemod(folder, [record], {"test": [1]})
    (read,) = LinemodSequence(folder)
    return _drawn(read, _table_meshes(), boxes_3d=True)


def _labelimg3d(root: Path) -> Image.Image:
    _saved(_street(), root / "images/000001.png")
    mesh = _car()
    (root / "models").mkdir()
    mesh.export(root / "models/car_001.obj")
    annotations = [Annotation("Car", T) for T in _street_poses()]
    models = {"Car": ("models\\car_001.obj", 2)}
    document = labelimg3d.make_document("images\\000001.png", STREET_SIZE, annotations, models, {"Car": mesh})
    labelimg3d.write_document(root / "annotations/000001.json", document)
    (record,) = LabelImg3DScene(root)
    return _drawn(record, {"Car": mesh}, boxes_3d=True)


def _kitti(root: Path) -> Image.Image:
    _saved(_street(), root / "training/image_2/000001.png")
    mesh = _car()
    K = labelimg3d.intrinsics(STREET_SIZE)
    P2 = np.hstack([K, (K @ [0.06, 0.0, 0.003])[:, None]])
    calibration = root / "training/calib/000001.txt"
    calibration.parent.mkdir(parents=True)
    calibration.write_text("P2: " + " ".join(map(str, P2.reshape(-1))), encoding="utf-8")
    extents = tuple(mesh.extents.tolist())
    # The second car is a tenth longer and lower than the mesh, which only this form can say.
    scales = (np.ones(3), np.array([1.0, 1.1, 0.9]))
    found = [Annotation("Car", T, scale=s) for T, s in zip(_street_poses(), scales, strict=True)]
    labels = [label_of_pose(a, extents, P2, STREET_SIZE) for a in found]
    write_labels(root / "training/label_2/000001.txt", labels)
    (record,) = KittiDataset(root, extents={"Car": extents})
    return _drawn(record, {"Car": mesh}, boxes_3d=True)


def _table_record(image_path: Path) -> Record:
    """Three objects on a table, 0.7 to 0.9 m away, seen from 40 degrees above it."""
    down = Rotation.from_euler("x", 130, degrees=True).as_matrix()  # table's z up to the camera's frame
    places = {1: (-0.15, -0.02, 20), 5: (0.02, 0.07, 0), 9: (0.18, -0.03, 140)}
    annotations = []
    for obj_id, (x, y, turn) in places.items():
        T = np.eye(4)
        T[:3, :3] = down @ Rotation.from_euler("z", turn, degrees=True).as_matrix()
        T[:3, 3] = down @ [x, y, 0] + [0, 0.03, 0.75]
        points = _table_meshes()[NAMES[obj_id]].vertices / 1000 @ T[:3, :3].T + T[:3, 3]
        pixels = points @ LINEMOD_K.T
        pixels = pixels[:, :2] / pixels[:, 2:]
        box = np.concatenate([pixels.min(axis=0), pixels.max(axis=0)])
        annotations.append(Annotation(NAMES[obj_id], T, box, object_id=obj_id))
    return Record("1", image_path, LINEMOD_K, tuple(annotations), scene_id=1, image_id=1)


def _table_meshes() -> dict[str, trimesh.Trimesh]:
    """Millimetres, origin at the bottom."""
    head = trimesh.creation.icosphere(3, 24)
    body = trimesh.creation.icosphere(3, 34)
    body.apply_translation([0, 0, 34])
    head.apply_translation([0, -16, 82])
    can = trimesh.creation.cylinder(32, 110, sections=48)
    can.apply_translation([0, 0, 55])
    beak = trimesh.creation.cone(9, 22, sections=24)
    beak.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [1, 0, 0]))
    beak.apply_translation([0, -38, 80])
    duck = _joined([body.copy(), head.copy(), beak])
    ape = _joined([body, head, *_ears()])
    return {n: _painted(m, COLOURS[n]) for n, m in (("ape", ape), ("can", can), ("duck", duck))}


def _ears() -> list[trimesh.Trimesh]:
    ears = []
    for x in (-24, 24):
        ear = trimesh.creation.icosphere(2, 9)
        ear.apply_translation([x, -14, 90])
        ears.append(ear)
    return ears


def _car() -> trimesh.Trimesh:
    """Metres, z up, origin at the bottom's middle, front along -y."""
    body = trimesh.creation.box([1.8, 4.4, 0.65])
    body.apply_translation([0, 0, 0.6])
    cabin = trimesh.creation.box([1.6, 2.2, 0.65])
    cabin.vertices[cabin.vertices[:, 2] > 0] *= [0.85, 0.75, 1]
    cabin.apply_translation([0, 0.3, 1.2])
    wheels = []
    for x, y in ((-0.8, -1.4), (0.8, -1.4), (-0.8, 1.4), (0.8, 1.4)):
        wheel = trimesh.creation.cylinder(0.32, 0.2, sections=24)
        wheel.apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, [0, 1, 0]))
        wheel.apply_translation([x, y, 0.32])
        wheels.append(_painted(wheel, (40, 40, 45)))
    lamps = []
    for x in (-0.65, 0.65):
        lamp = trimesh.creation.box([0.35, 0.06, 0.18])
        lamp.apply_translation([x, -2.2, 0.7])
        lamps.append(_painted(lamp, (250, 245, 200)))
    parts = [_painted(body, (60, 110, 170)), _painted(cabin, (150, 175, 195)), *wheels, *lamps]
    return _joined(parts)


def _joined(parts: list[trimesh.Trimesh]) -> trimesh.Trimesh:
    mesh = trimesh.util.concatenate(parts)
    assert isinstance(mesh, trimesh.Trimesh)
    return mesh


def _painted(mesh: trimesh.Trimesh, colour: tuple[int, int, int]) -> trimesh.Trimesh:
    mesh.visual = trimesh.visual.ColorVisuals(
        mesh, vertex_colors=np.tile([*colour, 255], (len(mesh.vertices), 1))
    )
    return mesh


def _street_poses() -> list[np.ndarray]:
    """Two cars on a road 1.6 m below the camera: one comes, one stands across."""
    upright = np.array(
        [[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]
    )  # mesh's z to up, its front, -y, towards the camera
    poses = []
    for x, z, turn in ((-2.4, 9.5, 12), (3.2, 14.0, -65)):
        T = np.eye(4)
        T[:3, :3] = Rotation.from_euler("y", turn, degrees=True).as_matrix() @ upright
        T[:3, 3] = x, 1.6, z
        poses.append(T)
    return poses


def _street() -> np.ndarray:
    return _backdrop(STREET_SIZE, (105, 105, 108), (190, 210, 230), horizon=0.5)


def _backdrop(
    size: tuple[int, int], ground: tuple[int, int, int], sky: tuple[int, int, int], horizon: float
) -> np.ndarray:
    """[H, W, 3] uint8, lighter towards the horizon."""
    width, height = size
    v = np.linspace(0, 1, height)[:, None, None]
    below = np.array(ground) * (1.15 - 0.3 * v)
    above = np.array(sky) * (0.9 + 0.2 * v)
    rows = np.where(v < horizon, above, below)
    return np.broadcast_to(rows, (height, width, 3)).clip(0, 255).astype(np.uint8)


def _saved(pixels: np.ndarray, path: Path) -> Path:
    path.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(path)
    return path


def _drawn(record: Record, meshes: dict[str, trimesh.Trimesh], boxes_3d: bool) -> Image.Image:
    """The record's objects where the record says they are."""
    units = "m" if "Car" in meshes else "mm"
    objects = {name: ObjectModel.from_mesh(name, mesh, units=units) for name, mesh in meshes.items()}
    names = list(meshes)
    found = record.annotations
    n = len(found)
    poses = Poses(
        names=tuple(a.name for a in found),
        labels=torch.tensor([names.index(a.name) for a in found], dtype=torch.int64),
        scores=torch.ones(n),
        boxes_xyxy=torch.tensor(np.array([a.box_xyxy for a in found]), dtype=torch.float32),
        T_CO=torch.tensor(np.array([a.T_CO for a in found]), dtype=torch.float32),
        scale=torch.tensor(np.array([a.scale for a in found]), dtype=torch.float32),
        visibility=torch.ones(n),
        sigma=torch.zeros(n, 2),
        camera=Camera(torch.tensor(record.K, dtype=torch.float32), record.size),
        objects=objects,
    )
    return draw_poses(record.image_path, poses, boxes_3d=boxes_3d, opacity=1.0)


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "docs" / "images"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
