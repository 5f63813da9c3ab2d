"""Street scenes for a run: what a recipe's section [street] and its data come to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from smope.config import ConfigError, from_json
from smope.data.records import Record
from smope.scenes.assets import SceneAssets
from smope.scenes.stream import SceneStream
from smope.scenes.street_config import StreetConfig
from smope.scenes.street_stream import StreetStream, build_street_assets
from smope.train.recipe import DataConfig, Recipe, expand

if TYPE_CHECKING:
    from smope.objects import ObjectModel


def street_stream(data: DataConfig, records: Sequence[Record]) -> Callable[..., SceneStream]:
    """The stream of streets, called as SceneStream; it renders into the records that are not held out."""
    if data.layouts is None:
        raise ConfigError("[street] needs data.layouts: the file that tools/make_street_layouts.py writes")
    layouts = expand(data.layouts)
    if not layouts.is_file():
        raise ConfigError(f"data.layouts: {layouts} does not exist; tools/make_street_layouts.py writes it")
    frames = [record for record in records if not record.key.startswith(data.held_out)]
    return partial(StreetStream, layouts=layouts, frames=frames)


def street_stream_of(
    plan: Recipe,
    data: DataConfig,
    records: Sequence[Record],
    assets: SceneAssets,
    seed: int,
    batch_size: int,
    **options: Any,
) -> SceneStream:
    """Streets as a run of the recipe renders them, apart from the run: to look at, or to score on."""
    config = from_json(StreetConfig, plan.street, "street")
    make = street_stream(data, records)
    return make((), assets=assets, config=config, seed=seed, batch_size=batch_size, **options)


def street_assets(objects: Sequence[ObjectModel], data: DataConfig) -> SceneAssets:
    """The parts of every vehicle and person, photos and skies."""
    vehicles, backgrounds = (
        expand(folder) if folder else None for folder in (data.vehicles, data.backgrounds)
    )
    return build_street_assets(objects, vehicles, backgrounds)
