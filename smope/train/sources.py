"""Where batches come from: scenes rendered from CAD or an annotated data set, and what is held out of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from smope.data.items import Batch
from smope.data.records import Record, to_batch
from smope.network_inputs import pad_to_multiple
from smope.objects import ObjectModel
from smope.scenes.assets import SceneAssets
from smope.scenes.config import SceneConfig
from smope.scenes.meshes import PreparedMesh
from smope.scenes.stream import SceneStream
from smope.train.augment import AugmentConfig, augmented, concatenated
from smope.train.loop import Stream, opened
from smope.train.recipe import RunConfig

HELD_OUT_SEED = 7_654_321  # far from any seed of a training process
_RANK_SEED = 1_000_003
_HELD_OUT_BACKGROUNDS = 8  # every so many-th photo and environment map is never trained on
_HELD_OUT_RECORDS = 10
_KEPT_DECODED = 150


@dataclass(frozen=True, eq=False)
class Source:
    """A training stream, the images held out from it, and the camera that stands for both."""

    stream: Stream
    held_out: tuple[Batch, ...]  # on the device, without instances, depth and masks
    image_size: tuple[int, int]  # (width, height)
    K: Tensor  # [3, 3]
    clutter: tuple[PreparedMesh, ...] = ()  # other objects that stand in the scenes


def scene_source(
    objects: Sequence[ObjectModel],
    assets: SceneAssets,
    config: SceneConfig,
    run: RunConfig,
    device: torch.device,
    rank: int,
    make: Callable[..., SceneStream] = SceneStream,
) -> Source:
    """Rendered scenes; each process renders its own, and the held-out ones have backgrounds of their own.

    `make` is the stream of the kind of scenes wanted, called with SceneStream's arguments.
    """
    own = _every(assets, _HELD_OUT_BACKGROUNDS, kept_out=False)

    def stream(start: int) -> Iterator[Batch]:
        scenes = make(
            objects,
            assets=own,
            config=config,
            seed=run.seed + _RANK_SEED * rank,
            workers=run.workers,
            device=device,
            batch_size=run.batch_size,
            start=start,
        )
        return _padded_scenes(scenes)

    held_out: tuple[Batch, ...] = ()
    if rank == 0:
        other = _every(assets, _HELD_OUT_BACKGROUNDS, kept_out=True)
        batches = make(
            objects,
            assets=other,
            config=config,
            seed=HELD_OUT_SEED,
            workers=min(run.workers, 8),
            device=device,
            batch_size=run.batch_size,
        )
        count = -(-run.eval_images // run.batch_size)
        with opened(_padded_scenes(batches)) as iterator:
            held_out = tuple(_light(next(iterator)) for _ in range(count))
    K = torch.tensor([[config.fx, 0.0, config.cx], [0.0, config.fy, config.cy], [0.0, 0.0, 1.0]])
    return Source(stream, held_out, (config.width, config.height), K, own.clutter)


def record_source(
    objects: Sequence[ObjectModel],
    records: Sequence[Record],
    run: RunConfig,
    device: torch.device,
    rank: int,
    held_out_names: Sequence[str] = (),
    augment: AugmentConfig | None = None,
    frame: tuple[int, int] | None = None,
) -> Source:
    """Annotated images in an order that the seed fixes for ever. Those smaller than the largest, as some
    frames of KITTI are, are filled up to its size.

    Held out is every tenth, or those whose key starts with one of `held_out_names`: neighbours in a drive
    show the same. With `augment` training images are changed, and shown in a `frame` (width, height).
    """
    names = [model.name for model in objects]
    useful = [record for record in records if any(a.name in names for a in record.annotations)]
    if len(useful) < 2:
        raise ValueError(
            f"the data set has {len(useful)} images of {', '.join(names)}; at least 2 are needed, "
            "one to train on and one held out"
        )
    order = torch.randperm(len(useful), generator=torch.Generator().manual_seed(run.seed)).tolist()
    kept_out = {order[i] for i in range(max(1, len(order) // _HELD_OUT_RECORDS))}
    if held_out_names:
        kept_out = {i for i, r in enumerate(useful) if r.key.startswith(tuple(held_out_names))}
    if not 0 < len(kept_out) < len(useful):
        raise ValueError(
            f"held_out = {list(held_out_names)} given; it must begin some images' names, but not all"
        )
    training = [record for i, record in enumerate(useful) if i not in kept_out]
    testing = [record for i, record in enumerate(useful) if i in kept_out][: run.eval_images]
    slots = max(sum(a.name in names for a in record.annotations) for record in useful)
    sizes = [record.size for record in useful]
    canvas = (max(width for width, _ in sizes), max(height for _, height in sizes))

    def read(chosen: Sequence[Record], masks: bool) -> Batch:
        return padded(to_batch(chosen, names, masks, canvas), slots).to(device)

    seed = run.seed + _RANK_SEED * rank

    decoded: dict[str, Batch] = {}

    def photo(record: Record) -> Batch:
        """Decoded once, as long as all fit into some hundreds of MiB."""
        item = decoded.get(record.key) or to_batch([record], names)
        if len(training) <= _KEPT_DECODED:
            decoded[record.key] = item
        return item

    def drawn(index: int) -> Batch:
        chosen = _drawn(training, index, run.batch_size, seed)
        if augment is None:
            return read(chosen, True)
        size = frame or canvas
        # One at a time: photos of several sizes end at different places.
        photos = [
            augmented(photo(record), size, augment, (seed, index, i)) for i, record in enumerate(chosen)
        ]
        return padded(concatenated(photos), slots).to(device)

    def stream(start: int) -> Iterator[Batch]:
        with ThreadPoolExecutor(max(1, min(run.workers, 8))) as pool:
            ahead = 2 * max(1, run.workers)
            jobs = [pool.submit(drawn, start + i) for i in range(ahead)]
            index = start + ahead
            while True:
                yield jobs.pop(0).result()
                jobs.append(pool.submit(drawn, index))
                index += 1

    size = run.batch_size
    held_out: list[Batch] = []
    if rank == 0:
        held_out = [_light(read(testing[i : i + size], False)) for i in range(0, len(testing), size)]
    typical = max(training, key=lambda record: sizes.count(record.size))
    return Source(stream, tuple(held_out), typical.size, torch.from_numpy(typical.K).float())


def mixed_source(scenes: Source, photos: Source) -> Source:
    """Batches whose first images are rendered and whose last ones are photos; both must come in one size."""

    def stream(start: int) -> Iterator[Batch]:
        with opened(scenes.stream(start)) as rendered, opened(photos.stream(start)) as taken:
            for one, other in zip(rendered, taken, strict=True):
                yield concatenated([one, other])

    return Source(stream, scenes.held_out + photos.held_out, scenes.image_size, scenes.K)


def padded(batch: Batch, slots: int) -> Batch:
    """The batch with sides that are multiples of 32 pixels, and with `slots` object slots."""
    height, width = batch.images.shape[-2:]
    if slots != batch.labels.shape[1]:
        batch = batch.filled(slots, 0 if batch.ignored is None else batch.ignored.shape[1])
    if not (height % 32 or width % 32):
        return batch
    changes: dict[str, Any] = {"images": pad_to_multiple(batch.images)}
    for name in ("instance", "depth"):
        plane = getattr(batch, name)
        if plane is not None:
            changes[name] = pad_to_multiple(plane[:, None])[:, 0]
    return replace(batch, **changes)


def _padded_scenes(scenes: SceneStream) -> Iterator[Batch]:
    with opened(scenes) as batches:
        for batch in batches:
            yield padded(batch, batch.labels.shape[1])


def _drawn(records: Sequence[Record], index: int, size: int, seed: int) -> list[Record]:
    """Batch `index` of an endless row of shuffled epochs, found without drawing those before it."""
    orders: dict[int, list[int]] = {}
    chosen = []
    for position in range(index * size, (index + 1) * size):
        epoch, place = divmod(position, len(records))
        if epoch not in orders:
            generator = torch.Generator().manual_seed(seed + 7919 * epoch)
            orders[epoch] = torch.randperm(len(records), generator=generator).tolist()
        chosen.append(records[orders[epoch][place]])
    return chosen


def _every(assets: SceneAssets, step: int, kept_out: bool) -> SceneAssets:
    """The backgrounds and environment maps for training, or those kept out of it; a few alone are shared."""

    def part(count: int) -> list[int]:
        if count < step:
            return list(range(count))
        return [i for i in range(count) if (i % step == 0) == kept_out]

    return replace(
        assets,
        backgrounds=tuple(assets.backgrounds[i] for i in part(len(assets.backgrounds))),
        environments=assets.environments[part(len(assets.environments))],
    )


def _light(batch: Batch) -> Batch:
    # Half precision holds the 8 bits of a photo; some hundred images then fit beside the training.
    return replace(batch, images=batch.images.half(), instance=None, depth=None, full_masks=None)
