"""Every reader and every fault: one error with file and line; not strict, skipped, counted, reported."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from made_up_forms import EXTENTS, write_all

from smope.data.bop import BopDataset
from smope.data.kitti import KittiDataset
from smope.data.labelimg3d import LabelImg3DScene
from smope.data.linemod import LinemodSequence
from smope.data.reading import DataError
from smope.data.records import Record

SCENE = "bop/test/000005"
LINEMOD = "Linemod_preprocessed"
INFO, CLASSES = f"{LINEMOD}/models/models_info.yml", "streets/models/models.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    write_all(root)
    for file in (root / SCENE).glob("*.json"):  # a line a value, so that a line says something
        file.write_text(json.dumps(json.loads(file.read_text()), indent=1))
    (root / "bop/models_eval/names.json").write_text('{"1": "brick", "4": "post"}')
    classes = {f"{name.lower()}_001.obj": {"class_name": name, "class_index": 1} for name in EXTENTS}
    (root / CLASSES).write_text(json.dumps(classes))
    return root


@pytest.fixture
def root(whole: Path, tmp_path: Path) -> Path:
    """A copy for each test to damage."""
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def read(form: str, root: Path, strict: bool) -> tuple[list[Record], list[DataError]]:
    """The records, and what was left out."""
    if form == "bop":
        dataset = BopDataset(root / "bop", strict=strict)
        return [record for scene in dataset.scenes() for record in scene], dataset.problems.errors
    reader: LinemodSequence | LabelImg3DScene | KittiDataset
    if form == "linemod":
        reader = LinemodSequence(root / LINEMOD / "data/02", strict=strict)
    elif form == "labelimg3d":
        reader = LabelImg3DScene(root / "streets", strict=strict)
    else:
        (root / "extents.json").touch()
        known = (root / "extents.json").read_text().split() or list(EXTENTS)
        reader = KittiDataset(root / "kitti", extents={name: EXTENTS[name] for name in known}, strict=strict)
    return list(reader), reader.problems.errors


def removed(file: str) -> Callable[[Path], None]:
    return lambda root: (root / file).unlink()


def written(file: str, text: str) -> Callable[[Path], None]:
    return lambda root: (root / file).write_text(text) and None


def edited(file: str, old: str, new: str) -> Callable[[Path], None]:
    """The first match of a regular expression replaced."""

    def edit(root: Path) -> None:
        text, count = re.subn(old, new, (root / file).read_text(), count=1)
        assert count == 1
        (root / file).write_text(text)

    return edit


IMAGE, LINE, CLASS, MESH, NAN = "missing image", "malformed line", "unknown class", "no mesh", "NaN"
GT, ANNOTATION, LABEL = f"{SCENE}/scene_gt.json", "streets/annotations/s1/000003.json", "000003.txt"
GT_YML, LABELS = f"{LINEMOD}/data/02/gt.yml", "kitti/training/label_2/000003.txt"
# Form, fault, how it comes about, the file named, whether with a line, errors, images and annotations lost.
FAULTS = [
    ("bop", IMAGE, removed(f"{SCENE}/rgb/000007.png"), "000007.*", False, 1, 1, 3),
    ("bop", LINE, edited(GT, r'"obj_id": 4,', '"obj_id": 4'), "scene_gt.json", True, 1, 3, 6),
    ("bop", CLASS, edited(GT, r'"obj_id": 4', '"obj_id": 9'), "scene_gt.json", True, 1, 0, 1),
    ("bop", MESH, removed("bop/models_eval/obj_000004.ply"), "scene_gt.json", True, 3, 0, 3),
    ("bop", NAN, edited(GT, r'(_t_m2c": \[\s*)[-\d.]+', r"\1NaN"), "scene_gt.json", True, 1, 0, 1),
    ("linemod", IMAGE, removed(f"{LINEMOD}/data/02/rgb/0000.png"), "0000.*", False, 1, 1, 2),
    ("linemod", LINE, written(f"{LINEMOD}/data/02/test.txt", "last\n0002\n"), "test.txt", True, 1, 1, 2),
    ("linemod", CLASS, edited(GT_YML, "obj_id: 1", "obj_id: 3"), "gt.yml", True, 1, 0, 1),
    ("linemod", MESH, removed(f"{LINEMOD}/models/obj_04.ply"), "gt.yml", True, 2, 0, 2),
    ("linemod", NAN, edited(GT_YML, r"cam_t_m2c: \[[-\d.]+", "cam_t_m2c: [.nan"), "gt.yml", True, 1, 0, 1),
    ("labelimg3d", IMAGE, removed("streets/images/s1/000008.png"), "000008.*", False, 1, 1, 1),
    ("labelimg3d", LINE, edited(ANNOTATION, r'"num": 2,', '"num": 2'), "000003.json", True, 1, 1, 2),
    ("labelimg3d", CLASS, edited(CLASSES, "van", "bus"), "000003.json", True, 2, 0, 2),
    ("labelimg3d", MESH, removed("streets/models/van_001.obj"), "000003.json", True, 2, 0, 2),
    ("labelimg3d", NAN, edited(ANNOTATION, r'(x": \[\s*)[-\d.e]+', r"\1NaN"), "000003.json", True, 1, 0, 1),
    ("kitti", IMAGE, removed("kitti/training/image_2/000008.png"), "000008.*", False, 1, 1, 1),
    ("kitti", LINE, edited(LABELS, r" \S+\n", "\n"), LABEL, True, 1, 0, 1),
    ("kitti", CLASS, edited(LABELS, "Car", "Horse"), LABEL, True, 1, 0, 1),
    ("kitti", MESH, written("extents.json", "Car"), LABEL, True, 2, 0, 2),
    ("kitti", NAN, edited(LABELS, r"Car 0\.00", "Car nan"), LABEL, True, 1, 0, 1),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault[0]}: {fault[1]}")
def test_a_fault_is_named_or_skipped(
    root: Path,
    fault: tuple[str, str, Callable[[Path], None], str, bool, int, int, int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    form, _, spoil, file, has_line, errors, images, annotations = fault
    before, nothing = read(form, root, strict=True)
    assert nothing == []
    spoil(root)
    with pytest.raises(DataError) as caught:
        read(form, root, strict=True)
    assert caught.value.file.name == file
    assert (caught.value.line is not None) == has_line
    assert str(caught.value).startswith(str(caught.value.file))
    with caplog.at_level(logging.WARNING, logger="smope"):
        after, skipped = read(form, root, strict=False)
    assert len(skipped) == errors
    assert str(skipped[0]) == str(caught.value)
    assert len(before) - len(after) == images
    assert count(before) - count(after) == annotations
    assert any(f"{errors} item(s) skipped, the first: {skipped[0]}" in r.getMessage() for r in caplog.records)


def count(records: Iterable[Record]) -> int:
    return sum(len(record.annotations) for record in records)


@pytest.mark.parametrize(
    ("form", "folder"),
    [("bop", "bop/test"), ("linemod", LINEMOD), ("labelimg3d", "streets"), ("kitti", "kitti/training")],
)
def test_a_missing_folder_is_named_even_where_not_strict(root: Path, form: str, folder: str) -> None:
    shutil.rmtree(root / folder)
    for strict in (True, False):
        with pytest.raises(DataError, match=rf"{Path(folder).name}.*: (folder is missing|no scene folder)"):
            read(form, root, strict)


@pytest.mark.parametrize(
    ("form", "spoil", "message"),
    [
        ("linemod", written(INFO, "1: {diameter: .nan}\n4: {}\n"), "line 1, at 1 / diameter: a finite"),
        ("linemod", written(INFO, "1: {}\n4: 90\n"), "line 2, at 4: a mapping expected"),
        ("labelimg3d", written(CLASSES, '{"car_001.obj": 3}'), "line 1, at car_001.obj: an object with key"),
        ("labelimg3d", edited(CLASSES, '_index": 1', '_index": null'), "class_index: a whole number"),
    ],
)
def test_a_list_of_meshes_that_says_nothing_is_named(
    root: Path, form: str, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(root)
    with pytest.raises(DataError, match=rf"models(_info\.yml|\.json), .*{message}"):
        read(form, root, strict=True)
