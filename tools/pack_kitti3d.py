"""Put what the training of kitti3d reads into one small archive, for a machine that has no data.

    SMOPE_DATA=... python tools/pack_kitti3d.py .carry/kitti3d.tar

There:

    mkdir -p data runs && tar -xf .carry/kitti3d.tar -C data && mv data/kitti3d_layouts.npz runs/
    SMOPE_DATA=data smope fit recipes/kitti3d.toml --assets data/assets.npz --out runs/kitti3d

In it: the training frames (JPEG, coded anew at quality 85), their labels and cameras, the class meshes, the
scene assets, the layouts of streets, and the backbone's weights. It is third-party data and stays out of the
repository.
"""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import trimesh
from PIL import Image

from smope.train.fit import objects_of
from smope.train.recipe import Recipe, expand, load_recipe
from smope.train.streets import street_assets

QUALITY = 85
RECIPE = Path(__file__).parent.parent / "recipes" / "kitti3d.toml"


def main(out: Path) -> None:
    plan = load_recipe(RECIPE)
    out.parent.mkdir(parents=True, exist_ok=True)
    assets = out.with_name("assets.npz")
    if not assets.exists():
        street_assets(objects_of(None, None, None, plan.data), plan.data).save(assets)
    with tarfile.open(out, "w") as archive:
        pack_frames(archive, plan)
        for mesh in plan.data.meshes.values():
            add(archive, inside(mesh), compact(expand(mesh)))
        add(archive, "assets.npz", assets.read_bytes())
        assert plan.data.layouts is not None
        add(archive, Path(plan.data.layouts).name, expand(plan.data.layouts).read_bytes())
        assert plan.data.backbone is not None
        add(archive, inside(plan.data.backbone), expand(plan.data.backbone).read_bytes())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def pack_frames(archive: tarfile.TarFile, plan: Recipe) -> None:
    assert plan.data.dataset is not None
    root = expand(plan.data.dataset)
    listed = root / "ImageSets" / f"{plan.data.split}.txt"
    add(archive, f"kitti/ImageSets/{listed.name}", listed.read_bytes())
    for name in listed.read_text().split():
        for folder in ("label_2", "calib"):
            part = f"training/{folder}/{name}.txt"
            add(archive, f"kitti/{part}", (root / part).read_bytes())
        (picture,) = (root / "training/image_2").glob(f"{name}.*")
        with Image.open(picture) as image:
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
        add(archive, f"kitti/training/image_2/{name}.jpg", buffer.getvalue())


def compact(mesh: Path) -> bytes:
    """The mesh's shape alone, as OBJ with tenths of millimetres: colours of streets are the scenes' own."""
    loaded = trimesh.load_mesh(mesh, process=True)
    lines = [f"v {x:.4f} {y:.4f} {z:.4f}" for x, y, z in loaded.vertices]
    lines += [f"f {a} {b} {c}" for a, b, c in (loaded.faces + 1)]
    return ("\n".join(lines) + "\n").encode()


def inside(path: str) -> str:
    return path.removeprefix("$SMOPE_DATA/")


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    archive.addfile(entry, io.BytesIO(content))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
