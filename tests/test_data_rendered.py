"""Rendered scenes written as a training split of BOP and as a LineMod sequence, and read back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
import yaml
from PIL import Image
from scipy.spatial import ConvexHull

from smope.data.bop import BopDataset, write_bop_scene
from smope.data.items import Batch
from smope.data.linemod import LinemodSequence, write_linemod
from smope.data.records import Annotation, Record, to_batch
from smope.objects import ObjectModel
from smope.scenes import SceneConfig
from smope.scenes.assets import build_assets
from smope.scenes.stream import SceneStream

pytestmark = pytest.mark.usefixtures("few_textures")

NAMES = {1: "ape", 5: "can"}  # LineMod's numbers; the meshes are not LineMod's
SCENES = SceneConfig(
    width=160,
    height=120,
    fx=143.0,
    fy=143.0,
    cx=79.5,
    cy=59.5,
    clutter=(0, 0),
    far_clutter=(0, 0),
    targets=(2, 2),
)


def meshes() -> dict[str, trimesh.Trimesh]:
    """Metres."""
    return {"ape": trimesh.creation.box((0.12, 0.07, 0.05)), "can": trimesh.creation.cylinder(0.04, 0.11)}


@pytest.fixture(scope="module")
def rendered() -> Batch:
    objects = [ObjectModel.from_mesh(name, mesh, "m") for name, mesh in meshes().items()]
    assets = build_assets(objects, [], None)
    with SceneStream(
        objects, assets=assets, config=SCENES, seed=3, workers=0, device="cpu", batch_size=3
    ) as stream:
        return next(iter(stream))


def convert(batch: Batch, folder: Path) -> list[Record]:
    """Images, depth in tenths of a millimetre and masks of what is seen, as BOP names them; the records."""
    assert batch.instance is not None
    assert batch.depth is not None
    for kind in ("rgb", "depth", "mask_visib"):
        (folder / kind).mkdir(parents=True)
    ids, records = list(NAMES), []
    for i in range(len(batch)):
        stem = f"{i:06d}"
        pixels = (batch.images[i] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"rgb/{stem}.png")
        depth = (batch.depth[i].double() * 10_000).round().numpy().astype(np.uint16)
        Image.fromarray(depth).save(folder / f"depth/{stem}.png")
        annotations = []
        for slot in torch.nonzero(batch.present[i])[:, 0].tolist():
            seen = (batch.instance[i] == slot + 1).numpy()
            Image.fromarray(seen.astype(np.uint8) * 255).save(
                folder / f"mask_visib/{stem}_{len(annotations):06d}.png"
            )
            obj_id = ids[int(batch.labels[i, slot])]
            annotations.append(
                Annotation(
                    NAMES[obj_id],
                    batch.T_CO[i, slot].double().numpy(),
                    batch.boxes_xyxy[i, slot].double().numpy(),
                    float(batch.visibility[i, slot]),
                    object_id=obj_id,
                )
            )
        K = batch.K[i].double().numpy()
        image = folder / f"rgb/{stem}.png"
        records.append(Record(stem, image, K, tuple(annotations), depth_scale=0.1, image_id=i))
    return records


def write_models(folder: Path, name: str) -> None:
    folder.mkdir(parents=True)
    info = {}
    for obj_id, mesh in zip(NAMES, meshes().values(), strict=True):
        mesh.apply_scale(1000).export(folder / name.format(obj_id))
        info[obj_id] = {"diameter": float(np.linalg.norm(mesh.extents))}
    (folder / "models_info.json").write_text(json.dumps(info))
    (folder / "models_info.yml").write_text(yaml.safe_dump(info))


def agrees(read: Batch, batch: Batch) -> None:
    """All that was rendered has come back, slot by slot."""
    assert read.instance is not None
    assert read.depth is not None
    assert batch.instance is not None
    assert batch.depth is not None
    slots = torch.argsort((~batch.present).int(), dim=1, stable=True)[:, : read.labels.shape[1]]
    rows = torch.arange(len(batch))[:, None]
    assert torch.equal(read.labels, batch.labels[rows, slots])
    present = read.present
    for name, tolerance in (("T_CO", 1e-5), ("boxes_xyxy", 1e-3)):
        expected = getattr(batch, name)[rows, slots]
        torch.testing.assert_close(getattr(read, name)[present], expected[present], atol=tolerance, rtol=0)
    torch.testing.assert_close(read.K, batch.K)
    torch.testing.assert_close(read.images, batch.images, atol=0.5 / 255 + 1e-6, rtol=0)
    torch.testing.assert_close(read.depth, batch.depth, atol=6e-5, rtol=0)


def meshes_lie_on_their_masks(read: Batch) -> None:
    """What is seen of an object lies within the convex outline of its mesh, projected by the read pose."""
    assert read.instance is not None
    solids = list(meshes().values())
    counted = 0
    for i, slot in torch.nonzero(read.present).tolist():
        rows, columns = np.nonzero((read.instance[i] == slot + 1).numpy())
        if not len(rows):
            continue
        points = solids[int(read.labels[i, slot])].vertices @ read.T_CO[i, slot, :3, :3].double().numpy().T
        pixels = (points + read.T_CO[i, slot, :3, 3].double().numpy()) @ read.K[i].double().numpy().T
        outline = ConvexHull(pixels[:, :2] / pixels[:, 2:])
        beyond = np.stack([columns, rows], 1) @ outline.equations[:, :2].T + outline.equations[:, 2]  # pixels
        assert beyond.max() < 1
        assert len(rows) < 1.1 * outline.volume  # in the plane the area
        counted += 1
    assert counted >= 4


def test_a_training_split_of_bop(rendered: Batch, tmp_path: Path) -> None:
    scene = tmp_path / "train_pbr/000007"
    write_bop_scene(scene, convert(rendered, scene))
    write_models(tmp_path / "models", "obj_{:06d}.ply")
    dataset = BopDataset(tmp_path, split="train_pbr", names=NAMES)
    read = dataset.scene(7).batch([0, 1, 2], list(NAMES.values()), masks=True)
    agrees(read, rendered)
    meshes_lie_on_their_masks(read)


def test_a_linemod_sequence(rendered: Batch, tmp_path: Path) -> None:
    folder = tmp_path / "data/02"
    records = convert(rendered, folder)
    for kind in ("rgb", "depth"):
        for i in range(len(rendered)):
            (folder / kind / f"{i:06d}.png").rename(folder / kind / f"{i:04d}.png")
    write_models(tmp_path / "models", "obj_{:02d}.ply")
    write_linemod(folder, records, {"train": [0, 2], "test": [1]})
    read = LinemodSequence(folder, "train")
    assert list(read.records) == [0, 2]
    for record in read:
        for a, b in zip(record.annotations, records[record.image_id].annotations, strict=True):
            assert (a.name, a.object_id) == (b.name, b.object_id)
            np.testing.assert_allclose(a.T_CO, b.T_CO, atol=1e-12)
            np.testing.assert_allclose(a.box_xyxy, b.box_xyxy, atol=1e-9)
        depth = record.depth()
        assert depth is not None
        assert rendered.depth is not None
        np.testing.assert_allclose(depth, rendered.depth[record.image_id], atol=6e-5)
    assert to_batch(list(read), ["ape", "can"]).present.sum() > 0
