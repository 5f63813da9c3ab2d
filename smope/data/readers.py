"""One call for every form of data that has poses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from smope.data.bop import BopDataset
from smope.data.kitti import KittiDataset
from smope.data.labelimg3d import LabelImg3DScene
from smope.data.linemod import LinemodSequence
from smope.data.records import Record


def read_records(
    root: str | Path,
    format: str,
    split: str | None = None,
    strict: bool = True,
    extents: Mapping[str, Sequence[float]] | None = None,
) -> list[Record]:
    """The images of a data set of `format` "bop", "linemod" (a data folder), "labelimg3d" or "kitti".

    `split` is a part of it in its own words: "test" or "train_pbr" (BOP), "test" or "train" (LineMod),
    "train", "val" or "test" (LabelImg3D: a folder of that name, else shared out 3:1:1), a list in ImageSets
    (KITTI). `extents` of the meshes by name, metres along x, y, z, turn the sizes of KITTI's labels into the
    annotations' scale; without them it is 1.
    """
    if format != "kitti" and format not in _READERS:
        raise ValueError(f"format {format!r} given; known: {', '.join(_READERS)}, kitti")
    if format == "kitti":
        return list(KittiDataset(root, split, extents, strict=strict))
    return list(_READERS[format](Path(root), split, strict))


def _bop(root: Path, split: str | None, strict: bool) -> Iterable[Record]:
    dataset = BopDataset(root, split or "test", strict=strict)
    return (record for scene in dataset.scenes() for record in scene)


_READERS: dict[str, Callable[[Path, str | None, bool], Iterable[Record]]] = {
    "bop": _bop,
    "linemod": lambda root, split, strict: LinemodSequence(root, split or "test", strict=strict),
    "labelimg3d": lambda root, split, strict: LabelImg3DScene(root, split, strict=strict),
}
