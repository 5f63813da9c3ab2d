"""The draws of a scene as numbers: what a worker hands over where the pictures are drawn elsewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from smope.scenes.config import SceneConfig
from smope.scenes.layout import Scene

# Words of a draw, all float32; smope/_ext/raster.h reads them.
DRAW_WORDS = 32
_TO_CAMERA, _COLOUR = slice(0, 12), slice(12, 24)  # [3, 4] each
_REST = slice(24, 32)  # gamma, grain (3), material id, mesh, marks (2)


def table_shape(config: SceneConfig) -> tuple[int, int]:
    """(D, DRAW_WORDS): an image holds fewer draws than material ids, as each has its own."""
    return (config.materials, DRAW_WORDS)


def pack_draws(scene: Scene, out: NDArray[np.float32]) -> None:
    """Write the draws of a scene into `out` [D, DRAW_WORDS]; material id 0 marks the places left over."""
    out[...] = 0
    count = len(scene.draws)
    if count == 0:
        return
    if count > len(out):
        raise ValueError(f"a scene of {count} draws, where SceneConfig.materials allows {len(out)}; raise it")
    out[:count, _TO_CAMERA] = np.stack([draw.T_CM for draw in scene.draws]).reshape(count, 12)
    out[:count, _COLOUR] = np.stack([draw.colour for draw in scene.draws]).reshape(count, 12)
    rest: list[tuple[Any, ...]] = [(d.gamma, *d.grain, d.material, d.mesh, *d.marks) for d in scene.draws]
    out[:count, _REST] = rest
