"""Everything a stream of scenes is built from, in one compact file: meshes, pictures, environment maps."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import trimesh
from numpy.typing import NDArray
from PIL import Image

from smope.atomic import atomic_path
from smope.scenes.meshes import PreparedMesh, prepare_mesh

if TYPE_CHECKING:
    from smope.objects import ObjectModel

log = logging.getLogger(__name__)
PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png"}
TEXTURE_SIZE = (384, 512)  # rows, columns of a decoded background
_ARRAYS = [f.name for f in fields(PreparedMesh) if f.name not in ("name", "scale_known")]


class AssetError(ValueError):
    """The file or folder of scene assets cannot be used."""


@dataclass(frozen=True, eq=False)
class SceneAssets:
    """Prepared meshes, encoded background pictures and environment maps."""

    targets: tuple[PreparedMesh, ...]
    clutter: tuple[PreparedMesh, ...]
    backgrounds: tuple[bytes, ...]  # JPEG files
    environments: NDArray[np.float16]  # [E, h, w, 3] linear, equirectangular, row 0 is up

    def textures(self) -> NDArray[np.uint8]:
        """[T, 3, 384, 512] the backgrounds, decoded and resized."""
        height, width = TEXTURE_SIZE
        out = np.empty((len(self.backgrounds), 3, height, width), dtype=np.uint8)
        for k, data in enumerate(self.backgrounds):
            with Image.open(io.BytesIO(data)) as image:
                turned = image.convert("RGB")
                if turned.height > turned.width:
                    turned = turned.transpose(Image.Transpose.ROTATE_90)
                out[k] = np.asarray(turned.resize((width, height), Image.Resampling.BILINEAR)).transpose(
                    2, 0, 1
                )
        return out

    def save(self, path: Path | str) -> None:
        """Write one .npz: positions as float16, normals as int8, indices as narrow as fits."""
        path = Path(path)
        arrays: dict[str, Any] = {"environments": self.environments}
        meta = []
        for k, mesh in enumerate((*self.targets, *self.clutter)):
            meta.append({"name": mesh.name, "scale_known": mesh.scale_known})
            for name in _ARRAYS:
                arrays[f"m{k}_{name}"] = _shrink(name, getattr(mesh, name))
        arrays["backgrounds"] = np.frombuffer(b"".join(self.backgrounds), dtype=np.uint8)
        arrays["background_sizes"] = np.array([len(b) for b in self.backgrounds], dtype=np.int64)
        header = json.dumps({"version": 1, "targets": len(self.targets), "meshes": meta})
        arrays["header"] = np.frombuffer(header.encode(), dtype=np.uint8)
        with atomic_path(path) as temporary, temporary.open("wb") as handle:
            np.savez_compressed(handle, **arrays)
        log.info(
            "%s: %d meshes, %d backgrounds, %.1f MiB", path, len(meta), len(self.backgrounds), _mib(path)
        )

    @classmethod
    def load(cls, path: Path | str) -> SceneAssets:
        """Read what `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as data:
                header = json.loads(bytes(data["header"]).decode())
                meshes = [_grow(data, k, entry) for k, entry in enumerate(header["meshes"])]
                blob, sizes = bytes(data["backgrounds"]), data["background_sizes"]
                environments = data["environments"]
        except (KeyError, ValueError, OSError, EOFError) as error:
            raise AssetError(
                f"{path}: no file of scene assets ({error}); make one with prepare_assets"
            ) from error
        ends = np.cumsum(sizes)
        pictures = tuple(blob[end - size : end] for size, end in zip(sizes, ends, strict=True))
        count = header["targets"]
        return cls(tuple(meshes[:count]), tuple(meshes[count:]), pictures, environments)


def build_assets(
    objects: Sequence[ObjectModel],
    clutter: Sequence[Path],
    backgrounds: Path | None,
    *,
    max_clutter: int = 200,
    max_backgrounds: int = 400,
    picture_size: int = 480,
    target_faces: int = 8000,
    clutter_faces: int = 2500,
    seed: int = 0,
) -> SceneAssets:
    """Prepare meshes and pictures in memory.

    `clutter` are mesh files in metres; an `index.json` beside or above them (with `file` and `scale_known`)
    tells which sizes are real, and those are preferred. `backgrounds` is a folder of pictures with an
    optional `hdri/*.npz` (`rgb` [h, w, 3], linear, equirectangular).
    """
    rng = np.random.default_rng(seed)
    targets = []
    for model in objects:
        if model.mesh is None:
            raise AssetError(
                f"object '{model.name}' has no mesh: it came from a checkpoint; register its mesh file"
            )
        targets.append(prepare_mesh(model.name, model.mesh, faces=target_faces, coarse_faces=800))
    known = _known_scales(clutter)
    real = [p for p in clutter if known.get(p.name, True)]
    invented = [p for p in clutter if not known.get(p.name, True)]
    picked = _pick(rng, real, max_clutter)
    picked += _pick(rng, invented, min(max_clutter - len(picked), max(max_clutter // 6, 1)))
    others = []
    for path in picked:
        mesh = trimesh.load_mesh(path, process=False)
        others.append(
            prepare_mesh(path.stem, mesh, faces=clutter_faces, scale_known=known.get(path.name, True))
        )
    pictures, environments = _pictures(rng, backgrounds, max_backgrounds, picture_size)
    return SceneAssets(tuple(targets), tuple(others), pictures, environments)


def prepare_assets(
    objects: Sequence[ObjectModel],
    clutter: Sequence[Path],
    backgrounds: Path | None,
    out: Path | str,
    **options: int,
) -> SceneAssets:
    """`build_assets` and write them to one file, from which a SceneStream can be built elsewhere."""
    assets = build_assets(objects, clutter, backgrounds, **options)
    assets.save(out)
    return assets


def _pick(rng: np.random.Generator, paths: Sequence[Path], count: int) -> list[Path]:
    chosen = rng.permutation(len(paths))[: max(count, 0)]
    return [sorted(paths)[k] for k in sorted(chosen)]


def _known_scales(paths: Sequence[Path]) -> dict[str, bool]:
    """File name -> whether its size is real, from index.json files near the meshes."""
    found: dict[str, bool] = {}
    for folder in {p.parent for p in paths} | {p.parent.parent for p in paths}:
        index = folder / "index.json"
        if index.is_file():
            entries = json.loads(index.read_text())
            found |= {Path(e["file"]).name: bool(e.get("scale_known", True)) for e in entries}
    return found


def _pictures(
    rng: np.random.Generator, folder: Path | None, count: int, size: int
) -> tuple[tuple[bytes, ...], NDArray[np.float16]]:
    """Pictures of a folder tree, evenly over its folders, at most `size` px wide; environment maps."""
    if folder is None:
        return (), np.ones((1, 16, 32, 3), dtype=np.float16)
    folder = Path(folder)
    if not folder.is_dir():
        raise AssetError(f"backgrounds: '{folder}' is no folder; give one with JPEG or PNG files, or None")
    groups: dict[Path, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in PICTURE_SUFFIXES:
            groups.setdefault(path.parent, []).append(path)
    queues = [[paths[k] for k in rng.permutation(len(paths))] for paths in groups.values()]
    chosen: list[Path] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue]
    pictures = []
    for path in chosen[:count]:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((size, size), Image.Resampling.BILINEAR)
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=88)
            pictures.append(buffer.getvalue())
    maps = []
    for path in sorted((folder / "hdri").glob("*.npz")):
        with np.load(path, allow_pickle=False) as data:
            # A sun may be brighter than 16 bits hold, and infinity would spoil the map's mean.
            maps.append(np.minimum(data["rgb"], np.finfo(np.float16).max).astype(np.float16))
    environments = np.stack(maps) if maps else np.ones((1, 16, 32, 3), dtype=np.float16)
    return tuple(pictures), environments


def _shrink(name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
    if "faces" in name:
        return array.astype(np.uint16 if array.size == 0 or array.max() < 65536 else np.uint32)
    if name == "normals":
        return np.round(array.astype(np.float32) * 127).astype(np.int8)
    if name in ("vertices", "coarse_vertices"):
        return array.astype(np.float16)  # 2^-11 of at most half the size: below 0.1 mm on a hand-held object
    return array


def _grow(data: np.lib.npyio.NpzFile, k: int, entry: dict[str, object]) -> PreparedMesh:
    arrays = {name: data[f"m{k}_{name}"] for name in _ARRAYS}
    for name, array in arrays.items():
        if "faces" in name:
            arrays[name] = array.astype(np.int32)
        elif name == "normals":
            arrays[name] = array.astype(np.float32) / 127
        elif name != "colors":
            arrays[name] = array.astype(np.float32)
    return PreparedMesh(name=str(entry["name"]), scale_known=bool(entry["scale_known"]), **arrays)


def _mib(path: Path) -> float:
    return path.stat().st_size / 2**20
