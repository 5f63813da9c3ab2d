"""Write runs/kitti3d_layouts.npz: where objects stand on streets, how they are turned, how large they are.

    SMOPE_DATA=... python tools/make_street_layouts.py [FILE]

Drawn at random from KITTI's labels (CC BY-NC-SA 3.0), without those of the frames that are measured on, and
moved a little, object by object: a stock of plausible streets, not the labels. Frames with rarer classes are
drawn more often.
"""

from __future__ import annotations

import os
import sys
import tarfile
from pathlib import Path

import numpy as np

CLASSES = ("Tram", "Car", "Truck", "Van", "Pedestrian")
FRAMES = 2000
OUT = Path("runs/kitti3d_layouts.npz")


def main(out: Path) -> None:
    root = Path(os.environ["SMOPE_DATA"]) / "kitti"
    kept_out = {
        name
        for part in ("measure", "labelimg3d")
        for name in (root / f"ImageSets/{part}.txt").read_text().split()
    }
    rng = np.random.default_rng(1)
    streets, odds = [], []
    with tarfile.open(root / "labels_all.tar.xz") as archive:
        for member in archive:
            file = Path(member.name)
            if file.parent.name != "label_2" or file.stem in kept_out:
                continue
            content = archive.extractfile(member)
            assert content is not None
            rows = rows_of(content.read().decode())
            if len(rows):
                kinds = {int(kind) for kind in rows[:, 0]}
                streets.append(rows)
                odds.append(1.0 + 2.0 * bool(kinds & {2, 3}) + 4.0 * (0 in kinds) + 1.0 * (4 in kinds))
    chosen = rng.choice(len(streets), FRAMES, replace=False, p=np.array(odds) / np.sum(odds))
    moved = [shaken(streets[k], rng) for k in chosen]
    table = np.concatenate(moved)
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        out,
        classes=np.array(CLASSES),
        starts=np.cumsum([0] + [len(rows) for rows in moved]).astype(np.int32),
        kind=table[:, 0].astype(np.uint8),
        place=table[:, 1:3].astype(np.float16),  # x to the right and z ahead of the camera, metres
        yaw=table[:, 3].astype(np.float16),  # KITTI's rotation_y, radians
        size=table[:, 4:7].astype(np.float16),  # width, length, height, metres
    )
    counts = {name: int((table[:, 0] == k).sum()) for k, name in enumerate(CLASSES)}
    print(f"{out}: {FRAMES} streets, {counts}, {out.stat().st_size / 1024:.0f} KiB")


def rows_of(text: str) -> np.ndarray:
    """[N, 7] class, x, z, yaw, width, length, height of the objects in a label file."""
    rows = []
    for words in (line.split() for line in text.splitlines()):
        if words and words[0] in CLASSES:
            h, w, length, x, _, z, yaw = map(float, words[8:15])
            if 2 < z < 90 and min(h, w, length) > 0.2:
                rows.append([CLASSES.index(words[0]), x, z, yaw, w, length, h])
    return np.array(rows).reshape(-1, 7)


def shaken(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = rows.copy()
    count = len(out)
    out[:, 1] += rng.normal(0, 0.2, count) + rng.normal(0, 0.3)
    out[:, 2] *= rng.normal(1, 0.03, count) * rng.normal(1, 0.05)
    out[:, 3] += np.deg2rad(rng.normal(0, 2.0, count))
    out[:, 4:] *= rng.normal(1, 0.03, (count, 3)) * rng.normal(1, 0.02, (count, 1))
    return out


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
