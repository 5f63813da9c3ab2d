"""`smope demo`, `smope predict`: poses of the objects in photos."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from smope.cli import common
from smope.cli.common import Units, UsageError


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
        model = common.load_model(self.model, self.device)
        if self.meshes is not None:
            model.register_meshes(
                common.mesh_files(self.meshes),
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
                K=None if self.K is None else common.intrinsics(*self.K),
                fov=self.fov,
                dist=self.dist,
                threshold=self.threshold,
                top_k=self.top_k,
            )
            seconds = time.perf_counter() - start
            print(
                f"[{count}/{len(self.images)}] {image}: {len(poses)} objects in {seconds:.2f} s -> {result}"
            )
            print(common.pose_table(poses))
            poses.save(result)
            common.save_picture(poses, image, result.with_suffix(".png"))
