"""Streets with what a model finds on them: of KITTI's form, of LabelImg3D's, and rendered."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smope.data.items import Batch
from smope.data.kitti import KittiDataset, KittiLabel, label_of_pose, type_of
from smope.data.reading import FloatArray
from smope.data.records import Annotation, Record, from_poses
from smope.evaluate.kitti import Frame
from smope.evaluate.street import StreetFrame

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.objects import ObjectModel
    from smope.poses import Poses

_FAINT = 0.02  # score: what is below says nothing
_TOP_K = 64
# KITTI's words for a visible share: fully visible, partly and largely occluded.
_SHARES = (0.8, 0.4)


def kitti_streets(model: SMOPE, dataset: KittiDataset, names: Sequence[str]) -> list[StreetFrame]:
    """Frames of KITTI with their own labels."""
    records = [dataset.records[name] for name in names]
    found = _predicted(model, [r.image_path for r in records], [r.K for r in records])
    streets = []
    for name, record, poses in zip(names, records, found, strict=True):
        P2 = dataset.P2[name]
        frame = Frame(dataset.labels[name], labels_found(poses, P2, record.size))
        streets.append(StreetFrame(name, frame, P2))
    return streets


def record_streets(model: SMOPE, records: Sequence[Record]) -> list[StreetFrame]:
    """Records of any form, each object as large as its mesh times its scale."""
    found = _predicted(model, [r.image_path for r in records], [r.K for r in records])
    streets = []
    for record, poses in zip(records, found, strict=True):
        P2 = _camera(record.K)
        known = [a for a in record.annotations if a.name in model.trained]
        truth = [label_of(a, model.trained[a.name], P2, record.size) for a in known]
        streets.append(StreetFrame(record.key, Frame(truth, labels_found(poses, P2, record.size)), P2))
    return streets


def rendered_streets(model: SMOPE, batches: Iterable[Batch], names: Sequence[str]) -> list[StreetFrame]:
    """Batches of a StreetStream; its ignored areas are KITTI's DontCare."""
    streets: list[StreetFrame] = []
    for batch in batches:
        size = (batch.images.shape[-1], batch.images.shape[-2])
        found = _predicted(model, list(batch.images.float()), list(batch.K.double().cpu().numpy()))
        for row, poses in enumerate(found):
            P2 = _camera(batch.K[row].double().cpu().numpy())
            truth = [label_of(a, model.trained[a.name], P2, size) for a in _annotations(batch, row, names)]
            truth += [_dont_care(area) for area in _areas(batch, row)]
            streets.append(
                StreetFrame(f"render{len(streets)}", Frame(truth, labels_found(poses, P2, size)), P2)
            )
    return streets


def label_of(a: Annotation, model: ObjectModel, P2: FloatArray, size: tuple[int, int]) -> KittiLabel:
    """An annotation as KITTI's label: box cut at the image's edge, occlusion in three steps."""
    label = label_of_pose(replace(a, name=type_of(a.name)), model.extents.tolist(), P2, size)
    assert a.box_xyxy is not None
    whole = float(np.prod(a.box_xyxy[2:] - a.box_xyxy[:2]))
    shown = (label.bbox[2] - label.bbox[0]) * (label.bbox[3] - label.bbox[1])
    truncated = float(np.clip(1 - shown / max(whole, 1e-6), 0, 1))
    visible = a.visibility / max(1 - truncated, 1e-6)  # of what lies within the image
    occluded = int(sum(visible < share for share in _SHARES))
    return replace(label, truncated=truncated if truncated > 0.01 else 0.0, occluded=occluded, score=None)


def labels_found(poses: Poses, P2: FloatArray, size: tuple[int, int]) -> list[KittiLabel]:
    """Predictions as result lines."""
    labels = []
    for a in from_poses(poses):
        extents = poses.objects[a.name].extents.tolist()
        labels.append(label_of_pose(replace(a, name=type_of(a.name)), extents, P2, size))
    return labels


def _predicted(model: SMOPE, images: Sequence[Any], cameras: Sequence[FloatArray]) -> list[Poses]:
    out: list[Poses] = []
    for image, K in zip(images, cameras, strict=True):
        out.append(
            model.predict(image, K=torch.from_numpy(K).float(), threshold=_FAINT, top_k=_TOP_K).to("cpu")
        )
    return out


def _camera(K: FloatArray) -> FloatArray:
    return np.column_stack([K, np.zeros(3)])


def _annotations(batch: Batch, row: int, names: Sequence[str]) -> list[Annotation]:
    scale = torch.ones_like(batch.T_CO[..., :3, 3]) if batch.scale is None else batch.scale
    return [
        Annotation(
            name=names[int(batch.labels[row, slot])],
            T_CO=batch.T_CO[row, slot].double().cpu().numpy(),
            box_xyxy=batch.boxes_xyxy[row, slot].double().cpu().numpy(),
            visibility=float(batch.visibility[row, slot]),
            scale=scale[row, slot].double().cpu().numpy(),
        )
        for slot in batch.present[row].nonzero().flatten().tolist()
    ]


def _areas(batch: Batch, row: int) -> list[list[float]]:
    areas = [] if batch.ignored is None else batch.ignored[row].tolist()
    return [area for area in areas if area[2] > area[0] and area[3] > area[1]]


def _dont_care(area: Sequence[float]) -> KittiLabel:
    far = (-1000.0, -1000.0, -1000.0)
    x0, y0, x1, y1 = area
    return KittiLabel("DontCare", -1, -1, -10, (x0, y0, x1, y1), (-1, -1, -1), far, -10)
