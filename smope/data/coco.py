"""COCO's JSON for boxes: annotations, and predictions as COCO's evaluator takes them.

https://cocodataset.org/#format-data
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from smope.atomic import atomic_path
from smope.data.records import Annotation, Record


def coco_document(records: Sequence[Record], names: Sequence[str]) -> dict[str, Any]:
    """Images, categories (ids from 1, in the order of `names`) and annotations, of objects that have a box.

    Beside COCO's own keys an annotation has `T_CO` (16 numbers row by row, metres) and `visibility`.
    """
    ids = {name: n for n, name in enumerate(names, start=1)}
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, record in enumerate(records, start=1):
        width, height = record.size
        images.append({"id": image_id, "file_name": record.image_path.name, "width": width, "height": height})
        for a in record.annotations:
            if a.box_xyxy is None or a.name not in ids:
                continue
            box = _xywh(a)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": ids[a.name],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                    "T_CO": a.T_CO.reshape(-1).tolist(),
                    "visibility": a.visibility,
                }
            )
    categories = [{"id": n, "name": name} for name, n in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def coco_results(found: Mapping[int, Sequence[Annotation]], names: Sequence[str]) -> list[dict[str, Any]]:
    """COCO's result list of predictions by image id (those of `coco_document` count from 1)."""
    ids = {name: n for n, name in enumerate(names, start=1)}
    return [
        {"image_id": image_id, "category_id": ids[a.name], "bbox": _xywh(a), "score": a.score}
        for image_id, annotations in found.items()
        for a in annotations
        if a.box_xyxy is not None
    ]


def write_coco(file: str | Path, content: Mapping[str, Any] | Sequence[Any]) -> None:
    with atomic_path(file) as temporary:
        temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def _xywh(annotation: Annotation) -> list[float]:
    assert annotation.box_xyxy is not None
    x0, y0, x1, y1 = annotation.box_xyxy.tolist()
    return [x0, y0, x1 - x0, y1 - y0]
