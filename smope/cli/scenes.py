"""`smope scenes preview`, `smope scenes prepare`: synthetic scenes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import subcommand

from smope.atomic import atomic_path
from smope.cli import common
from smope.cli.common import Units, UsageError

if TYPE_CHECKING:
    from PIL.Image import Image


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
    recipe: Path | None = None
    """Streets as this recipe's section [street] has them, in place of meshes, clutter and backgrounds."""
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

        if self.recipe is None and (self.meshes is None) == (self.assets is None):
            raise UsageError("pass --meshes with --units, --assets, or --recipe")
        if self.count < 1:
            raise UsageError(f"--count {self.count} given, at least 1 expected")
        common.check_picture(self.out)
        assets = None if self.assets is None else SceneAssets.load(str(self.assets))
        batch_size = min(self.count, 4)
        device = common.device_or_best(self.device)
        if self.recipe is not None:
            from smope.train.fit import objects_of, read_dataset
            from smope.train.recipe import load_recipe
            from smope.train.streets import street_assets, street_stream_of

            plan = load_recipe(self.recipe)
            if not plan.street:
                raise UsageError(f"{self.recipe} has no section [street]")
            objects = objects_of(None, None, None, plan.data)
            records = read_dataset(plan.data, objects, sized=True) or []
            assets = assets or street_assets(objects, plan.data)
            with street_stream_of(
                plan, plan.data, records, assets, self.seed, batch_size, device=device
            ) as streets:
                self._write(preview_sheet(streets, self.count, columns=1))
            return
        if assets is None:
            assert self.meshes is not None
            assets = build_assets(
                common.load_objects(self.meshes, self.units),
                common.clutter_files(self.clutter),
                self.backgrounds,
            )
        with SceneStream((), assets=assets, seed=self.seed, device=device, batch_size=batch_size) as stream:
            self._write(preview_sheet(stream, self.count, columns=min(self.count, 3)))

    def _write(self, sheet: Image) -> None:
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

        objects = common.load_objects(self.meshes, self.units)
        self.out.parent.mkdir(parents=True, exist_ok=True)
        prepare_assets(
            objects,
            common.clutter_files(self.clutter),
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
