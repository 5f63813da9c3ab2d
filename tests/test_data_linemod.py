"""`Linemod_preprocessed`, written from the made-up BOP set (and from the LM-O photos) and read back."""

from __future__ import annotations

import shutil
from pathlib import Path

import made_up_bop
import numpy as np
import pytest
import yaml

from smope.data.bop import BopDataset
from smope.data.linemod import LINEMOD_K, LinemodSequence, write_linemod
from smope.data.reading import DataError
from smope.data.records import to_batch


def write_tree(root: Path) -> Path:
    """DenseFusion's layout with data folder 02; the frames are numbered anew, frame 1 is for training."""
    bop = BopDataset(made_up_bop.write(root / "bop"))
    folder = root / "Linemod_preprocessed/data/02"
    (folder / "rgb").mkdir(parents=True)
    models = root / "Linemod_preprocessed/models"
    models.mkdir()
    for obj_id in made_up_bop.EXTENTS:
        made_up_bop.mesh(obj_id).export(models / f"obj_{obj_id:02d}.ply")
    info = {i: {"diameter": float(np.linalg.norm(e))} for i, e in made_up_bop.EXTENTS.items()}
    (models / "models_info.yml").write_text(yaml.safe_dump(info))
    records = list(bop.scene(5))
    for frame, record in enumerate(records):
        shutil.copy(record.image_path, folder / "rgb" / f"{frame:04d}.png")
        assert record.depth_path is not None
        (folder / "depth").mkdir(exist_ok=True)
        shutil.copy(record.depth_path, folder / "depth" / f"{frame:04d}.png")
        object.__setattr__(record, "image_id", frame)
    write_linemod(folder, records, {"train": [1], "test": [0, 2]})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tree(tmp_path)


def test_what_was_written_comes_back(folder: Path) -> None:
    sequence = LinemodSequence(folder, split=None)
    assert sequence.scene_id == 2
    assert sequence.names == {1: "ape", 4: "cam"}
    source = list(BopDataset(folder.parents[2] / "bop").scene(5))
    for record, expected in zip(sequence, source, strict=True):
        np.testing.assert_array_equal(record.K, made_up_bop.K)
        for a, b in zip(record.annotations, expected.annotations, strict=True):
            assert a.object_id == b.object_id
            np.testing.assert_allclose(a.T_CO, b.T_CO, atol=1e-15)
            np.testing.assert_allclose(a.box_xyxy, b.box_xyxy)
        depth, true = record.depth(), expected.depth()
        assert depth is not None
        assert true is not None
        np.testing.assert_array_equal(depth, true)
    assert to_batch(list(sequence), ["ape"]).labels.tolist() == [[0, -1], [0, 0], [-1, -1]]


def test_splits_are_the_lists(folder: Path) -> None:
    assert list(LinemodSequence(folder).records) == [0, 2]
    assert list(LinemodSequence(folder, "train").records) == [1]


def test_it_is_the_published_form(folder: Path) -> None:
    truth = yaml.safe_load((folder / "gt.yml").read_text())
    (item,) = truth[2]
    obj_id, T = made_up_bop.poses()[31][0]
    assert item["obj_id"] == obj_id
    assert item["cam_t_m2c"] == pytest.approx(T[:3, 3].tolist())
    assert item["cam_R_m2c"] == pytest.approx(T[:3, :3].reshape(-1).tolist())
    assert len(item["obj_bb"]) == 4
    assert (folder / "test.txt").read_text() == "0000\n0002\n"
    camera = yaml.safe_load((folder / "info.yml").read_text())[0]
    assert camera == {"cam_K": made_up_bop.K.reshape(-1).tolist(), "depth_scale": pytest.approx(0.1)}


def test_the_authors_layout(folder: Path) -> None:
    """Models inside the data folder, OBJ, keyed by name, and no info.yml."""
    models = folder.parents[1] / "models"
    info = yaml.safe_load((models / "models_info.yml").read_text())
    (folder / "models").mkdir()
    for obj_id, name in ((1, "ape"), (4, "cam")):
        made_up_bop.mesh(obj_id).export(folder / "models" / f"{name}.obj")
    named = {"ape": info[1], "cam": info[4]}
    (folder / "models/models_info.yml").write_text(yaml.safe_dump(named))
    shutil.rmtree(models)
    (folder / "info.yml").unlink()
    sequence = LinemodSequence(folder)
    np.testing.assert_array_equal(sequence.records[0].K, LINEMOD_K)
    assert sequence.mesh_path(4).name == "cam.obj"
    assert sequence.models_info[1] == info[1]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("obj_id: 4", "obj_id: 3", r"gt\.yml, line \d+, at 0 / 1 / obj_id: object 3 is not in models_info"),
        ("obj_bb:", "box:", r"gt\.yml, line \d+, at 0 / 0: key 'obj_bb' is missing"),
        ("cam_t_m2c: [", "cam_t_m2c: [.nan, ", r"gt\.yml, line \d+, at 0 / 0: 3 numbers expected, 4 given"),
        ("cam_R_m2c: [", "cam_R_m2c: [2.0, ", r"gt\.yml, line \d+, at 0 / 0: 9 numbers expected, 10 given"),
        ("obj_id: 1", "obj_id: one", r"gt\.yml, line \d+, at 0 / 0 / obj_id: a whole number expected, 'one'"),
        ("cam_R_m2c: [", "cam_R_m2c: [[", r"gt\.yml, line \d+: not valid YAML"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, old: str, new: str, message: str) -> None:
    text = (folder / "gt.yml").read_text()
    (folder / "gt.yml").write_text(text.replace(old, new, 1))
    with pytest.raises(DataError, match=message) as caught:
        LinemodSequence(folder)
    if "not valid" not in message:
        assert caught.value.line is not None
        changed = (folder / "gt.yml").read_text().splitlines()
        # The line named is that of the object, or of the key in it, which was spoilt.
        nearby = "\n".join(changed[caught.value.line - 1 : caught.value.line + 4])
        assert new.split("[")[0] in nearby
        lenient = LinemodSequence(folder, strict=False)
        assert len(lenient.problems.errors) == 1
        assert len(lenient) == 2


def test_lists_and_files_that_do_not_fit_are_named(folder: Path) -> None:
    (folder / "test.txt").write_text("0000\nlast\n")
    with pytest.raises(DataError, match=r"test\.txt, line 2: a whole number expected, 'last'"):
        LinemodSequence(folder)
    (folder / "test.txt").write_text("0000\n0009\n")
    with pytest.raises(DataError, match=r"test\.txt, line 2: frame 9 is not in gt\.yml"):
        LinemodSequence(folder)
    (folder / "test.txt").unlink()
    with pytest.raises(DataError, match=r"test\.txt: file is missing"):
        LinemodSequence(folder)
    (folder.parents[1] / "models/obj_04.ply").unlink()
    with pytest.raises(
        DataError, match=r"gt\.yml, line \d+, at 0 / 1 / obj_id: the mesh of object 4 is missing"
    ):
        LinemodSequence(folder, None)
    (folder / "rgb/0000.png").unlink()
    with pytest.raises(DataError, match=r"0000\.\*: no such image"):
        LinemodSequence(folder, None)


def test_lmo_photos_as_linemod(data_root: Path, tmp_path: Path) -> None:
    """The converter on real annotations: 60 frames there and back, every pose the same."""
    scene = BopDataset(data_root / "lmo").scene(2)
    folder = tmp_path / "data/02"
    (folder / "models").mkdir(parents=True)
    shutil.copytree(data_root / "lmo/models_eval", folder / "models", dirs_exist_ok=True)
    info = BopDataset(data_root / "lmo").models_info
    (folder / "models/models_info.yml").write_text(yaml.safe_dump(info))
    (folder / "rgb").mkdir()
    kept = []
    for record in scene:
        shutil.copy(record.image_path, folder / "rgb" / f"{record.image_id:04d}.jpg")
        boxed = tuple(a for a in record.annotations if a.box_xyxy is not None)
        object.__setattr__(record, "annotations", boxed)
        kept.append(record)
    write_linemod(folder, kept, {"test": [r.image_id for r in kept]})
    sequence = LinemodSequence(folder)
    assert len(sequence) == 60
    for record, expected in zip(sequence, kept, strict=True):
        for a, b in zip(record.annotations, expected.annotations, strict=True):
            assert a.name == b.name
            np.testing.assert_allclose(a.T_CO, b.T_CO, atol=1e-14)
