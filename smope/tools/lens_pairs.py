"""The same rendered scenes seen through several lenses: does the depth follow the focal length?

Only the table scenes of `smope.scenes` are drawn: their camera and objects stand in the world before the lens
is chosen, so that one seed gives the same poses through every lens. Scenes, photos behind them and their seed
are those that training holds out.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from smope.data.items import Batch
from smope.scenes import SceneAssets, SceneConfig
from smope.tools.renders import held_out_renders

if TYPE_CHECKING:
    from smope.model import SMOPE
    from smope.poses import Poses

log = logging.getLogger(__name__)

FOCAL_SCALES = (0.7, 1.0, 1.4)
DISTANCE = (0.35, 1.6)  # metres: where LM-O's camera stands; training may look from further away
MIN_VISIBILITY = 0.3  # through every one of the lenses
_RESAMPLES = 1000  # of the scenes, for the interval of a ratio

FloatArray = NDArray[np.float64]
Target = tuple[int, str]  # scene, object


@dataclass(frozen=True)
class Seen:
    """One target through one lens."""

    visibility: float
    error: float  # signed, over the true depth of the object's centre; infinite where it was not found
    depth: float  # metres, true


def lens_pairs(
    model: SMOPE, assets: SceneAssets, scenes: int, config: SceneConfig | None = None
) -> dict[str, Any]:
    """Median relative depth error of the same targets through each lens, and its ratio to the original's."""
    by_scale = {scale: targets_seen(model, assets, scenes, scale, config) for scale in FOCAL_SCALES}
    return {"scenes": scenes, "renders": scenes * len(FOCAL_SCALES), **compare_lenses(by_scale)}


def compare_lenses(by_scale: Mapping[float, Mapping[Target, Seen]]) -> dict[str, Any]:
    """Scores of the targets that are visible enough through every lens."""
    common = [
        target
        for target in by_scale[1.0]
        if all(target in seen and seen[target].visibility >= MIN_VISIBILITY for seen in by_scale.values())
    ]
    if not common:
        raise ValueError(f"no target is {MIN_VISIBILITY} visible through every lens; render more scenes")
    for target in common:
        depths = [seen[target].depth for seen in by_scale.values()]
        if np.ptp(depths) > 1e-4:
            raise ValueError(f"scene {target[0]}, {target[1]}: depths {depths} differ between the lenses")
    errors = {scale: np.array([seen[t].error for t in common]) for scale, seen in by_scale.items()}
    medians = {scale: float(np.median(np.abs(e))) for scale, e in errors.items()}
    lenses = {
        f"{scale:g}": {
            "depth_error_median": medians[scale],
            "signed_depth_error_median": float(np.median(e)),
            "found": float(np.isfinite(e).mean()),
            "ratio": medians[scale] / medians[1.0],
            "ratio_90_percent": _interval(np.abs(e), np.abs(errors[1.0]), [scene for scene, _ in common]),
        }
        for scale, e in errors.items()
    }
    return {"targets": len(common), "min_visibility": MIN_VISIBILITY, "focal_scales": lenses}


def _interval(errors: FloatArray, original: FloatArray, scenes: Sequence[int]) -> list[float]:
    """Bounds of the middle 90 % of the ratio of medians, the scenes drawn anew (Efron's bootstrap).

    Scenes and not targets are drawn, as those of one scene share its light, its background and its camera.
    """
    of_scene = [np.flatnonzero(np.array(scenes) == scene) for scene in sorted(set(scenes))]
    draws = np.random.default_rng(0)
    ratios = []
    for _ in range(_RESAMPLES):
        rows = np.concatenate([of_scene[k] for k in draws.integers(len(of_scene), size=len(of_scene))])
        ratios.append(np.median(errors[rows]) / np.median(original[rows]))
    return [float(bound) for bound in np.percentile(ratios, [5, 95], method="nearest")]


def targets_seen(
    model: SMOPE, assets: SceneAssets, scenes: int, scale: float, config: SceneConfig | None = None
) -> dict[Target, Seen]:
    """Every target of the scenes through the lens of `scale` times the focal length."""
    seen: dict[Target, Seen] = {}
    first = 0
    for batch in _renders(model, assets, scenes, scale, config or SceneConfig()):
        images = [image.float().cpu() for image in batch.images]
        found = model.predict(images, K=list(batch.K), threshold=0.0, top_k=64)
        for row, poses in enumerate(found):
            seen |= {(first + row, name): one for name, one in _compare(model, batch, row, poses)}
        first += len(batch)
    return {target: one for target, one in seen.items() if target[0] < scenes}


def _renders(
    model: SMOPE, assets: SceneAssets, scenes: int, scale: float, config: SceneConfig
) -> Sequence[Batch]:
    lens = replace(
        config,
        fx=config.fx * scale,
        fy=config.fy * scale,
        focal_jitter_probability=0.0,
        distance=DISTANCE,
        table_probability=1.0,
        repeat_probability=0.0,  # which detection is meant for which instance is a question of its own
    )
    log.info("rendering %d scenes at %g of the focal length", scenes, scale)
    return held_out_renders(model, assets, scenes, lens)


def _compare(model: SMOPE, batch: Batch, row: int, poses: Poses) -> Iterator[tuple[str, Seen]]:
    """Each target of one image with the best detection of its name."""
    names = list(model.objects)
    best: dict[str, int] = {}
    for index in poses.scores.argsort(descending=True).tolist():
        best.setdefault(poses.names[index], index)
    for slot in batch.present[row].nonzero()[:, 0].tolist():
        name = names[int(batch.labels[row, slot])]
        centre = model.objects[name].centre.double().numpy()
        depth = _depth(batch.T_CO[row, slot].double().numpy(), centre)
        error = float("inf")
        if name in best:
            error = _depth(poses.T_CO[best[name]].double().numpy(), centre) / depth - 1
        yield name, Seen(float(batch.visibility[row, slot]), error, depth)


def _depth(T_CO: FloatArray, centre: FloatArray) -> float:
    return float(T_CO[2, :3] @ centre + T_CO[2, 3])
