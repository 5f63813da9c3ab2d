"""COCO's JSON, checked key by key."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from smope.data.coco import coco_document, coco_results, write_coco
from smope.data.records import Annotation, Record


def _annotation(name: str, box: list[float] | None, score: float = 1.0) -> Annotation:
    return Annotation(name, np.eye(4), None if box is None else np.array(box), 0.5, score=score)


def test_document(tmp_path: Path) -> None:
    Image.new("RGB", (32, 24)).save(tmp_path / "a.png")
    objects = (
        _annotation("cat", [1, 2, 5, 10]),
        _annotation("dog", [0, 0, 1, 1]),
        _annotation("ape", None),
        _annotation("ape", [2, 2, 4, 4]),
    )
    record = Record("a", tmp_path / "a.png", np.eye(3), objects)
    write_coco(tmp_path / "out.json", coco_document([record, record], ["ape", "cat"]))
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["categories"] == [{"id": 1, "name": "ape"}, {"id": 2, "name": "cat"}]
    assert document["images"][1] == {"id": 2, "file_name": "a.png", "width": 32, "height": 24}
    assert [a["id"] for a in document["annotations"]] == [1, 2, 3, 4]
    first = document["annotations"][0]
    assert first["T_CO"] == np.eye(4).reshape(-1).tolist()
    del first["T_CO"]
    assert first == {
        "id": 1,
        "image_id": 1,
        "category_id": 2,
        "bbox": [1, 2, 4, 8],
        "area": 32,
        "iscrowd": 0,
        "visibility": 0.5,
    }


def test_results() -> None:
    found = {3: [_annotation("cat", [1, 2, 5, 10], 0.25), _annotation("ape", None)], 4: []}
    assert coco_results(found, ["ape", "cat"]) == [
        {"image_id": 3, "category_id": 2, "bbox": [1.0, 2.0, 4.0, 8.0], "score": 0.25}
    ]
