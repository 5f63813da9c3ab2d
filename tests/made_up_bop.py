"""A small BOP data set in a folder: two boxes, three pictures with masks and depth, all from known poses."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from PIL import Image
from scipy.spatial.transform import Rotation

K = np.array([[120.0, 0, 47.5], [0, 118.0, 31.5], [0, 0, 1]])
SIZE = (96, 64)
EXTENTS = {1: (60.0, 40.0, 20.0), 4: (30.0, 30.0, 90.0)}  # mm; object 4 has a symmetry, half a turn about z
HALF_TURN = np.diag([-1.0, -1, 1, 1])


def poses(seed: int = 0) -> dict[int, list[tuple[int, np.ndarray]]]:
    """{image id: [(object id, 4x4 in millimetres)]}; image 7 has object 1 twice."""
    rng = np.random.default_rng(seed)

    def at(x: float, y: float, z: float) -> np.ndarray:
        T = np.eye(4)
        T[:3, :3] = Rotation.random(rng=rng).as_matrix()
        T[:3, 3] = x, y, z
        return T

    return {
        2: [(1, at(-60, 0, 400)), (4, at(50, 10, 450))],
        7: [(1, at(-70, 20, 420)), (4, at(0, -20, 380)), (1, at(80, 0, 500))],
        31: [(4, at(10, 10, 300))],
    }


def mesh(obj_id: int) -> trimesh.Trimesh:
    return trimesh.creation.box(EXTENTS[obj_id])


def ray_depth(shape: trimesh.Trimesh, T: np.ndarray) -> np.ndarray:
    """[H, W] depth of one object by casting a ray through each pixel's centre, 0 beside it."""
    v, u = np.mgrid[: SIZE[1], : SIZE[0]]
    rays = np.stack([u, v, np.ones_like(u)], -1).reshape(-1, 3) @ np.linalg.inv(K).T
    moved = shape.copy()
    moved.apply_transform(T)
    points, index, _ = moved.ray.intersects_location(np.zeros_like(rays), rays, multiple_hits=True)
    depth = np.full(len(rays), np.inf)
    np.minimum.at(depth, index, points[:, 2])
    return np.where(np.isfinite(depth), depth, 0).reshape(SIZE[1], SIZE[0])


@cache
def depths(im_id: int) -> list[np.ndarray]:
    """[H, W] millimetres of each object of an image as if it were alone."""
    return [ray_depth(mesh(obj_id), T) for obj_id, T in poses()[im_id]]


def write(root: Path, with_depth: bool = True) -> Path:
    """The data set `root`, with scene 5 in its test split; depth in tenths of a millimetre."""
    scene = root / "test" / "000005"
    for folder in ("models_eval", "test/000005/rgb", "test/000005/mask", "test/000005/mask_visib"):
        (root / folder).mkdir(parents=True)
    info: dict[str, Any] = {}
    for obj_id, extents in EXTENTS.items():
        mesh(obj_id).export(root / "models_eval" / f"obj_{obj_id:06d}.ply")
        info[str(obj_id)] = {"diameter": float(np.linalg.norm(extents))}
    info["4"]["symmetries_discrete"] = [HALF_TURN.reshape(-1).tolist()]
    (root / "models_eval" / "models_info.json").write_text(json.dumps(info))

    truths, infos, cameras, targets = {}, {}, {}, []
    for im_id, objects in poses().items():
        nearest = np.min([np.where(d > 0, d, np.inf) for d in depths(im_id)], axis=0)
        truths[str(im_id)] = [
            {"obj_id": obj_id, "cam_R_m2c": T[:3, :3].reshape(-1).tolist(), "cam_t_m2c": T[:3, 3].tolist()}
            for obj_id, T in objects
        ]
        infos[str(im_id)] = []
        for n, depth in enumerate(depths(im_id)):
            visible = (depth > 0) & (depth == nearest)
            rows, columns = np.nonzero(depth)
            x, y, right, bottom = (int(f()) for f in (columns.min, rows.min, columns.max, rows.max))
            share = float(visible.sum() / (depth > 0).sum())
            infos[str(im_id)].append({"bbox_obj": [x, y, right - x, bottom - y], "visib_fract": share})
            for kind, mask in (("mask", depth > 0), ("mask_visib", visible)):
                Image.fromarray(mask.astype(np.uint8) * 255).save(scene / kind / f"{im_id:06d}_{n:06d}.png")
        cameras[str(im_id)] = {"cam_K": K.reshape(-1).tolist(), "depth_scale": 0.1}
        picture = np.full((SIZE[1], SIZE[0], 3), im_id, np.uint8)
        Image.fromarray(picture).save(scene / "rgb" / f"{im_id:06d}.png")
        if with_depth:
            (scene / "depth").mkdir(exist_ok=True)
            stored = np.where(np.isfinite(nearest), np.rint(nearest * 10), 0).astype(np.uint16)
            Image.fromarray(stored).save(scene / "depth" / f"{im_id:06d}.png")
        ids = [obj_id for obj_id, _ in objects]
        targets += [
            {"scene_id": 5, "im_id": im_id, "obj_id": i, "inst_count": ids.count(i)} for i in sorted(set(ids))
        ]
    for name, content in (("gt", truths), ("gt_info", infos), ("camera", cameras)):
        (scene / f"scene_{name}.json").write_text(json.dumps(content))
    (root / "test_targets_bop19.json").write_text(json.dumps(targets))
    return root
