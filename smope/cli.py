"""The `smope` command: thin over the library.

Each subcommand is a dataclass whose fields are its options. What is heavy is imported when a command runs, so
that `--help` is quick.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from tyro.conf import Positional, subcommand

import smope
from smope.atomic import atomic_path

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.objects import ObjectModel
    from smope.poses import Poses

Units = Literal["m", "cm", "mm", "in"]
_MESH_SUFFIXES = {".ply", ".obj", ".stl", ".glb", ".gltf"}
_USER_ERROR, _INTERRUPTED = 2, 130


class UsageError(ValueError):
    """Options that do not go together."""


@dataclass(frozen=True)
class Demo:
    """Find the objects in the bundled picture, print their poses and draw them over it."""

    out: Path = Path("demo.png")
    """Where the picture goes."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.poses import Poses

        start = time.perf_counter()
        model = _load_model("lmo", self.device)
        loaded = time.perf_counter()
        picture = _bundled("demo.png")
        camera = Poses.load(_bundled("demo.json")).camera
        poses = model.predict(picture, K=camera.K)
        predicted = time.perf_counter()
        print(pose_table(poses))
        _save_picture(poses, picture, self.out)
        print(
            f"\n{len(poses)} objects in {predicted - loaded:.2f} s on {model.device} "
            f"(after {loaded - start:.2f} s of loading); drawn to {self.out}"
        )


@dataclass(frozen=True)
class Predict:
    """Find objects in photos: for each, NAME_poses.json and a picture NAME_poses.png."""

    images: Positional[tuple[Path, ...]]
    """Photos, all of one camera."""
    model: str = "lmo"
    """A bundled name, a folder, or a Hugging Face id."""
    K: tuple[float, float, float, float] | None = None
    """fx fy cx cy in pixels."""
    fov: float | None = None
    """Horizontal field of view in degrees, in place of K."""
    dist: tuple[float, ...] | None = None
    """OpenCV's distortion coefficients: k1 k2 p1 p2 [k3 [k4 k5 k6]]."""
    objects: tuple[str, ...] | None = None
    """Look for these trained objects only."""
    meshes: tuple[Path, ...] | None = None
    """Look for these meshes: files, or folders of them. A file's name is the object's."""
    units: Units | None = None
    """Of the meshes; required with them."""
    symmetries: Literal["auto"] | None = None
    """auto: find those of the meshes from their geometry."""
    threshold: float = 0.3
    """Lowest score that is reported."""
    top_k: int = 32
    """At most so many objects in a photo."""
    out: Path = Path("poses")
    """Folder of the results."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        if not self.images:
            raise UsageError("no image given: smope predict IMAGE ...")
        for image in self.images:  # before any work is done
            if not image.is_file():
                raise FileNotFoundError(f"{image}: no such image")
        results = [self.out / f"{image.stem}_poses.json" for image in self.images]
        if len(set(results)) < len(results):
            raise UsageError(
                "two of the images have the same name; predict them into folders of their own (--out)"
            )
        if self.K is not None and self.fov is not None:
            raise UsageError("--K and --fov given; pass one of them")
        model = _load_model(self.model, self.device)
        if self.meshes is not None:
            model.register_meshes(
                mesh_files(self.meshes),
                units=self.units,
                symmetries=self.symmetries,
                add=self.objects is not None,
            )
        elif self.objects is not None:
            model.register_meshes(list(self.objects))
        for count, (image, result) in enumerate(zip(self.images, results, strict=True), start=1):
            start = time.perf_counter()
            poses = model.predict(
                image,
                K=None if self.K is None else _matrix(*self.K),
                fov=self.fov,
                dist=self.dist,
                threshold=self.threshold,
                top_k=self.top_k,
            )
            seconds = time.perf_counter() - start
            print(
                f"[{count}/{len(self.images)}] {image}: {len(poses)} objects in {seconds:.2f} s -> {result}"
            )
            print(pose_table(poses))
            poses.save(result)
            _save_picture(poses, image, result.with_suffix(".png"))


@dataclass(frozen=True)
class Evaluate:
    """Score a model, or a CSV of results, on a data set."""

    dataset_dir: Positional[Path]
    """Folder of the data set."""
    format: str = "bop"
    """Form of the data set."""
    model: str | None = None
    """A bundled name, a folder, or a Hugging Face id."""
    csv: Path | None = None
    """Results in BOP's form, in place of a model."""
    out: Path | None = None
    """Folder for the CSV of predictions and scores.json."""
    limit: int | None = None
    """The first so many images only."""
    batch: int = 1
    """Images predicted at a time."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.evaluate.run import evaluate_dataset

        scores = evaluate_dataset(
            self.dataset_dir,
            format=self.format,
            model=self.model,
            csv=self.csv,
            out=self.out,
            limit=self.limit,
            device=self.device,
            batch=self.batch,
        )
        print(scores["table"])


@dataclass(frozen=True)
class Fit:
    """Train from a recipe. Ctrl-C saves, and --resume goes on; under torchrun: torchrun -m smope fit ..."""

    recipe: Positional[Path]
    """A TOML file, such as recipes/lmo.toml."""
    out: Path = Path("runs/fit")
    """Folder of the run: checkpoints, curves, the model."""
    resume: bool = False
    """Go on from the newest checkpoint in the folder of the run."""
    init: str | None = None
    """Start from these weights: a bundled name, a folder, or a checkpoint."""
    continue_schedule: bool = False
    """With --init of a small checkpoint: the run stands where that one stood."""
    assets: Path | None = None
    """What `smope scenes prepare` wrote, in place of the recipe's."""
    backbone: Path | None = None
    """ImageNet weights of the backbone, in place of the recipe's."""
    max_minutes: float | None = None
    """Length of the whole run, over all its pieces, in place of the recipe's."""
    piece_minutes: float | None = None
    """Stop after so long, for a later --resume."""
    batch_size: int | None = None
    """Images a step and process, in place of the recipe's."""
    workers: int | None = None
    """Rendering processes, in place of the recipe's."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.train.fit import fit

        options = {field.name: getattr(self, field.name) for field in fields(self)}
        print(f"the model is in {fit(**options)}")


@dataclass(frozen=True)
class Preview:
    """A sheet of synthetic scenes with boxes and axes."""

    meshes: tuple[Path, ...] | None = None
    """Mesh files, or folders of them."""
    units: Units | None = None
    """Of the meshes; required with them."""
    clutter: Path | None = None
    """Folder of other meshes, in metres."""
    backgrounds: Path | None = None
    """Folder of photos, with environment maps in hdri/ if there are any."""
    assets: Path | None = None
    """What `smope scenes prepare` wrote, in place of meshes, clutter and backgrounds."""
    count: int = 12
    """Scenes on the sheet."""
    seed: int = 0
    """Other seeds give other scenes."""
    out: Path = Path("scenes.png")
    """Where the sheet goes."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.scenes.assets import SceneAssets, build_assets
        from smope.scenes.preview import preview_sheet
        from smope.scenes.stream import SceneStream

        if (self.meshes is None) == (self.assets is None):
            raise UsageError("pass --meshes with --units, or --assets")
        if self.meshes is None:
            assets = SceneAssets.load(str(self.assets))
        else:
            assets = build_assets(
                load_objects(self.meshes, self.units), clutter_files(self.clutter), self.backgrounds
            )
        batch_size = min(self.count, 4)
        with SceneStream(
            (), assets=assets, seed=self.seed, device=_device(self.device), batch_size=batch_size
        ) as stream:
            sheet = preview_sheet(stream, self.count, columns=min(self.count, 3))
        with atomic_path(self.out) as temporary:
            sheet.save(temporary)
        print(f"{self.count} scenes drawn to {self.out}")


@dataclass(frozen=True)
class Prepare:
    """Put all that scenes are made of into one compact file, for training elsewhere."""

    meshes: tuple[Path, ...]
    """Mesh files, or folders of them."""
    units: Units
    """Of the meshes."""
    clutter: Path | None = None
    """Folder of other meshes, in metres."""
    backgrounds: Path | None = None
    """Folder of photos, with environment maps in hdri/ if there are any."""
    max_clutter: int = 200
    """At most so many of the other meshes."""
    max_backgrounds: int = 400
    """At most so many of the photos."""
    out: Path = Path("assets.npz")
    """Where the file goes."""

    def run(self) -> None:
        from smope.scenes.assets import prepare_assets

        objects = load_objects(self.meshes, self.units)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        prepare_assets(
            objects,
            clutter_files(self.clutter),
            self.backgrounds,
            self.out,
            max_clutter=self.max_clutter,
            max_backgrounds=self.max_backgrounds,
        )
        print(f"{self.out}: {self.out.stat().st_size / 2**20:.1f} MiB")


@dataclass(frozen=True)
class Scenes:
    """Synthetic scenes from CAD meshes."""

    command: Annotated[Preview, subcommand("preview")] | Annotated[Prepare, subcommand("prepare")]

    def run(self) -> None:
        self.command.run()


@dataclass(frozen=True)
class Convert:
    """Turn a checkpoint of the authors' trainer into a model folder; nothing in the file is run."""

    checkpoint: Positional[Path]
    """A file such as checkpoint0123.pth."""
    out: Positional[Path]
    """Folder of the model."""
    meshes: tuple[Path, ...] | None = None
    """The meshes it was trained on: files, or folders of them, named as the checkpoint names them."""
    units: Units | None = None
    """Of the meshes; required with them."""
    device: str | None = "cpu"
    """cpu, cuda, cuda:1, ..."""

    def run(self) -> None:
        from smope.model import SMOPE

        if self.checkpoint.suffix != ".pth":
            raise UsageError(f"{self.checkpoint}: a .pth file of the authors' trainer expected")
        meshes = None if self.meshes is None else mesh_files(self.meshes)
        model = SMOPE.from_pretrained(self.checkpoint, device=self.device, meshes=meshes, units=self.units)
        model.save_pretrained(self.out)
        print(f"{', '.join(model.objects)}: the model is in {self.out}")


@dataclass(frozen=True)
class Info:
    """Versions, devices, compilers, the state of the kernel, and where the caches are."""

    def run(self) -> None:
        from smope.installation import describe_installation

        facts = describe_installation()
        width = max(map(len, facts))
        for name, value in facts.items():
            print(f"{name:<{width}}  {value}")


Command = (
    Annotated[Demo, subcommand("demo")]
    | Annotated[Predict, subcommand("predict")]
    | Annotated[Evaluate, subcommand("evaluate")]
    | Annotated[Fit, subcommand("fit")]
    | Annotated[Scenes, subcommand("scenes")]
    | Annotated[Convert, subcommand("convert")]
    | Annotated[Info, subcommand("info")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 2 for what the user can put right, 130 for Ctrl-C."""
    command = tyro.cli(
        Command,  # type: ignore[arg-type]
        prog="smope",
        description=smope.__doc__,
        args=argv,
        config=(tyro.conf.OmitSubcommandPrefixes, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone),
    )
    logging.basicConfig(format="smope: %(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("smope").setLevel(logging.INFO)
    try:
        command.run()
    except KeyboardInterrupt:
        print("smope: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        print(f"smope: {message}", file=sys.stderr)
        return _USER_ERROR
    return 0


def user_message(error: Exception) -> str | None:
    """One line, if the error is one that the user can put right; None for a fault in the program.

    Those are the library's own errors, a `ValueError` that the library raised itself, files that are not
    there or not to be opened, and packages of an extra that is not installed.
    """
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("smope"):
        return f"this command needs the package {error.name!r}: pip install 'smope[all]'"
    own = type(error).__module__.split(".")[0] == "smope"
    files = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    if own or isinstance(error, files) or (isinstance(error, ValueError) and _raised_here(error)):
        return " ".join(str(error).split())
    return None


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


def _load_model(name: str, device: str | None) -> SMOPE:
    from smope.model import SMOPE

    return SMOPE.from_pretrained(name, device=device)


def _device(name: str | None) -> str:
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def _matrix(fx: float, fy: float, cx: float, cy: float) -> list[list[float]]:
    return [[fx, 0.0, cx], [0.0, fy, cy], [0.0, 0.0, 1.0]]


def _bundled(name: str) -> Path:
    path = Path(__file__).parent / "assets" / name
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; the package is not installed whole, install it again")
    return path


def _save_picture(poses: Poses, image: Any, path: Path) -> None:
    picture = poses.draw(image)
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _raised_here(error: Exception) -> bool:
    """Whether the line that raised is one of this package's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "smope"
