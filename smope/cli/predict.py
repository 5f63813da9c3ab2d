"""`smope demo`, `smope predict`: poses of the objects in photos."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from smope.cli import common
from smope.cli.common import Units, UsageError
from smope.cli.many import predict_into_file
from smope.defaults import LOWEST_SCORE, TOP_K

if TYPE_CHECKING:
    from smope.model import SMOPE


@dataclass(frozen=True)
class Demo:
    """Find the objects in the bundled picture, print their poses and draw them over it."""

    out: Path = Path("demo.png")
    """Where the picture goes."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one."""

    def run(self) -> None:
        from smope.poses import Poses

        common.check_picture(self.out)
        start = time.perf_counter()
        model = common.load_model("lmo", self.device)
        loaded = time.perf_counter()
        picture = common.bundled("demo.png")
        camera = Poses.load(common.bundled("demo.json")).camera
        poses = model.predict(picture, K=camera.K)
        predicted = time.perf_counter()
        print(common.pose_table(poses))
        common.save_picture(poses, picture, self.out)
        print(
            f"\n{len(poses)} objects in {predicted - loaded:.2f} s on {model.device} "
            f"(after {loaded - start:.2f} s of loading); drawn to {self.out}"
        )


@dataclass(frozen=True)
class Predict:
    """Find objects in photos: for each, NAME_poses.json and a picture NAME_poses.png; or, for many, one file.

    That file (--out results.jsonl) has a line an image, and the same command goes on where it was stopped.
    """

    images: Positional[tuple[str, ...]]
    """Photos of one camera: files, folders, patterns in quotes, lists (a .txt of paths, or - for stdin)."""
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
    threshold: float = LOWEST_SCORE
    """Lowest score that is reported."""
    top_k: int = TOP_K
    """At most so many objects in a photo."""
    out: Path = Path("poses")
    """Folder of the results, or a file NAME.jsonl for a line an image."""
    device: str | None = None
    """cpu, cuda, cuda:1, ...; a GPU where there is one. Into a .jsonl also cuda:0,cuda:1 or all."""
    batch: int | None = None
    """Into a .jsonl: images predicted at a time."""
    workers: int | None = None
    """Into a .jsonl: threads that decode, for each device."""
    strict: bool = False
    """Into a .jsonl: exit with 2 if an image could not be read. Those are named and left out either way."""

    def run(self) -> None:
        from smope.many_images import image_files

        if not self.images:
            raise UsageError("no image given: smope predict IMAGE ...")
        if self.K is not None and self.fov is not None:
            raise UsageError("--K and --fov given; pass one of them")
        images = image_files(self.images)  # before any work is done
        if self.out.suffix.lower() == ".jsonl":
            predict_into_file(self, images)
        else:
            self._into_folder(images)

    def open_model(self, device: str | None) -> SMOPE:
        """With the meshes that are to be looked for."""
        return common.open_model(self.model, device, self.objects, self.meshes, self.units, self.symmetries)

    def options(self) -> dict[str, Any]:
        """Those of `SMOPE.predict`."""
        return {
            "K": None if self.K is None else common.intrinsics(*self.K),
            "fov": self.fov,
            "dist": self.dist,
            "threshold": self.threshold,
            "top_k": self.top_k,
        }

    def _into_folder(self, images: list[str]) -> None:
        if self.batch or self.workers or self.strict or (self.device and "," in self.device):
            raise UsageError(
                "--batch, --workers, --strict and several devices are for a file: --out results.jsonl"
            )
        common.check_folder(self.out)
        results = [self.out / f"{Path(image).stem}_poses.json" for image in images]
        if len(set(results)) < len(results):
            raise UsageError(
                "two of the images have the same name; predict them into folders of their own "
                "(--out FOLDER), or all into a file (--out results.jsonl)"
            )
        model = self.open_model(self.device)
        for count, (image, result) in enumerate(zip(images, results, strict=True), start=1):
            start = time.perf_counter()
            poses = model.predict(Path(image), **self.options())
            seconds = time.perf_counter() - start
            print(f"[{count}/{len(images)}] {image}: {len(poses)} objects in {seconds:.2f} s -> {result}")
            print(common.pose_table(poses))
            poses.save(result)
            common.save_picture(poses, image, result.with_suffix(".png"))
