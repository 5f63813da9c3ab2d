"""Put what the training of a recipe reads into one small archive, for a machine that has no data.

    SMOPE_DATA=... python tools/pack_training.py recipes/lmo.toml lmo.tar.xz [--no-backbone]

There:

    mkdir -p data runs && tar -xf lmo.tar.xz -C data && mv data/*_layouts.npz runs/
    SMOPE_DATA=data smope fit recipes/lmo.toml --assets data/assets.npz --out runs/lmo

(layouts are streets' alone; `--no-backbone` is for a run that begins with `--init`). In it: the meshes and
their symmetries, the scene assets, the backbone's weights and, where the recipe learns from photos too, the
training frames (JPEG, coded anew at quality 85) with their labels and cameras, and the layouts of streets.
It is third-party data and stays out of the repository.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from pathlib import Path

import trimesh
from PIL import Image

from smope.scenes.assets import build_assets
from smope.train.fit import objects_of
from smope.train.recipe import DataConfig, Recipe, expand, load_recipe
from smope.train.streets import street_assets

QUALITY = 85


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--no-backbone", action="store_true", help="leave the backbone's weights out")
    options = parser.parse_args()
    plan, out = load_recipe(options.recipe), options.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(out, "w:xz" if out.suffix == ".xz" else "w") as archive:
        add(archive, "assets.npz", assets_of(plan))
        if plan.data.dataset is not None:
            pack_frames(archive, plan)
        for mesh in plan.data.meshes.values():
            path = expand(mesh)
            add(archive, inside(mesh), compact(path) if plan.street else path.read_bytes())
        files = [symmetries_of(plan.data), None if options.no_backbone else plan.data.backbone]
        for file in filter(None, files):
            add(archive, inside(file), expand(file).read_bytes())
        if plan.data.layouts is not None:
            add(archive, Path(plan.data.layouts).name, expand(plan.data.layouts).read_bytes())
    print(f"{out}: {out.stat().st_size / 2**20:.1f} MiB")


def assets_of(plan: Recipe) -> bytes:
    objects = objects_of(None, None, None, plan.data)
    if plan.street:
        assets = street_assets(objects, plan.data)
    else:
        clutter = sorted(expand(plan.data.clutter).rglob("*.ply")) if plan.data.clutter else []
        backgrounds = expand(plan.data.backgrounds) if plan.data.backgrounds else None
        assets = build_assets(objects, clutter, backgrounds)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "assets.npz"
        assets.save(file)
        return file.read_bytes()


def symmetries_of(data: DataConfig) -> str | None:
    return data.symmetries if data.symmetries != "auto" else None


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
    main()
