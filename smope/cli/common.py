"""What several commands need: models, meshes and pictures named on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import smope
from smope.atomic import atomic_path

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.objects import ObjectModel
    from smope.poses import Poses

Units = Literal["m", "cm", "mm", "in"]
_MESH_SUFFIXES = {".ply", ".obj", ".stl", ".glb", ".gltf"}


class UsageError(ValueError):
    """Options that do not go together."""


def pose_table(poses: Poses) -> str:
    """One line an object: name, score, position, rotation, visibility."""
    import roma

    rotation = roma.rotmat_to_rotvec(poses.T_CO[:, :3, :3].cpu().double()).rad2deg()  # [N, 3]
    position = 1000 * poses.T_CO[:, :3, 3].cpu()
    width = max([4, *map(len, poses.names)])
    lines = [f"{'name':<{width}}  score  {'x, y, z [mm]':>25}  {'axis * angle [deg]':>22}  visible"]
    for i, name in enumerate(poses.names):
        x, y, z = position[i].tolist()
        a, b, c = rotation[i].tolist()
        lines.append(
            f"{name:<{width}}  {float(poses.scores[i]):5.2f}  {x:8.1f} {y:7.1f} {z:8.1f}  "
            f"{a:7.1f} {b:6.1f} {c:7.1f}  {100 * float(poses.visibility[i]):5.0f} %"
        )
    return "\n".join(lines)


def mesh_files(paths: Sequence[Path]) -> dict[str, Path]:
    """Files, and the meshes in folders -> {name: file}; a file's stem is the name."""
    found: dict[str, Path] = {}
    for path in paths:
        if not path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder of meshes")
        files = (
            sorted(p for p in path.iterdir() if p.suffix.lower() in _MESH_SUFFIXES)
            if path.is_dir()
            else [path]
        )
        if not files:
            raise UsageError(f"{path}: no mesh in this folder ({', '.join(sorted(_MESH_SUFFIXES))})")
        for file in files:
            if file.stem in found:
                raise UsageError(
                    f"{file} and {found[file.stem]} have the same name; rename one, names tell objects apart"
                )
            found[file.stem] = file
    return found


def load_objects(paths: Sequence[Path], units: Units | None) -> list[ObjectModel]:
    """The meshes of files and folders."""
    from smope.objects import ObjectModel

    if units is None:
        raise UsageError("--units of the meshes is missing: m, cm, mm or in")
    return [ObjectModel.from_mesh(name, path, units) for name, path in mesh_files(paths).items()]


def clutter_files(folder: Path | None) -> list[Path]:
    """Every mesh below a folder."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder of clutter meshes")
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in _MESH_SUFFIXES)


def load_model(name: str, device: str | None) -> SMOPE:
    from smope.model import SMOPE

    return SMOPE.from_pretrained(name, device=device)


def open_model(
    name: str,
    device: str | None,
    objects: Sequence[str] | None,
    meshes: Sequence[Path] | None,
    units: Units | None,
    symmetries: Literal["auto"] | None,
) -> SMOPE:
    """With the meshes that are to be looked for."""
    if meshes is None and (units is not None or symmetries is not None):
        raise UsageError("--units and --symmetries are of --meshes, which is missing; name their files")
    model = load_model(name, device)
    if meshes is not None:
        model.register_meshes(mesh_files(meshes), units=units, symmetries=symmetries, add=objects is not None)
    elif objects is not None:
        model.register_meshes(list(objects))
    return model


def device_or_best(name: str | None) -> str:
    from smope.devices import device_from

    return str(device_from(name))


def intrinsics(fx: float, fy: float, cx: float, cy: float) -> list[list[float]]:
    return [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]


def bundled(name: str) -> Path:
    path = Path(smope.__file__).parent / "assets" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the package is not installed whole, install it again")
    return path


def check_picture(path: Path) -> None:
    """Before any work: whether `path` names a picture that can be written."""
    from PIL import Image

    known = Image.registered_extensions()
    if path.is_dir() or known.get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"--out {path} given, the name of a picture expected, such as {path.stem}.png")


def check_folder(path: Path) -> None:
    """Before any work: whether results can go into `path`."""
    if path.exists() and not path.is_dir():
        raise UsageError(f"--out {path} is a file, a folder expected")


def save_picture(poses: Poses, image: Any, path: Path) -> None:
    picture = poses.draw(image)
    with atomic_path(path) as temporary:
        picture.save(temporary)
