"""The numbers that describe one sampled scene, and how they travel from a worker to the device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.config import SceneConfig

MAPS = 2  # light views: the main light, and the sky seen along the plane's normal


def scene_fields(config: SceneConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of each float32 field of a scene. Frames: C camera, P plane, E environment map."""
    n, layers = config.max_targets, config.layers
    return {
        "K": (3, 3),
        "labels": (n,),  # -1 for an empty slot
        "T_CO": (n, 4, 4),  # own frame to camera, metres
        "boxes": (n, 4),  # xyxy of the projected hull, pixels
        "table": (),  # 1 where there is a plane, 2 where only shadows fall on one
        "plane": (4,),  # n . x = d in C, n towards the upper side
        "P_C": (2, 4),  # point in C to the plane's own x, y, metres
        "layer_texture": (layers,),  # index into the texture bank
        "layer_uv": (layers, 2, 3),  # plane x, y, 1 to texture -1..1
        "layer_extent": (layers, 2, 3),  # plane x, y, 1 to -1..1 inside the layer
        "layer_gain": (layers, 3),
        "layer_texels": (layers,),  # texels a metre
        "background": (4,),  # texture index, gain, share of blur 0..1, 1 for the environment map instead
        "background_uv": (2, 3),  # screen -1..1 to texture -1..1
        "environment": (2,),  # map index, gain
        "R_EC": (3, 3),
        "light_direction": (config.lights, 3),  # in C, towards the light
        "light_colour": (config.lights, 3),
        "light_view": (MAPS, 3, 4),  # point in C to map x, y, depth, each -1..1
        "light_softness": (MAPS,),  # texels
        "light_strength": (MAPS,),  # 1: full shadow
        "occlusion": (2,),  # screen-space ambient occlusion: strength, reach in metres
        "materials": (config.materials, 3),  # roughness, metalness, specular level
        **config.extra_fields(),
    }


def scene_size(config: SceneConfig) -> int:
    return sum(prod(shape) for shape in scene_fields(config).values())


def pack(scene: dict[str, NDArray[np.float32]], config: SceneConfig, out: NDArray[np.float32]) -> None:
    """Write the fields of one scene into a flat row."""
    start = 0
    for name, shape in scene_fields(config).items():
        size = prod(shape)
        out[start : start + size] = np.asarray(scene[name], dtype=np.float32).reshape(size)
        start += size


def unpack(rows: Tensor, config: SceneConfig) -> dict[str, Tensor]:
    """Views into rows [B, scene_size] under the fields' names, each [B, *shape]."""
    fields, start = {}, 0
    for name, shape in scene_fields(config).items():
        size = prod(shape)
        fields[name] = rows[:, start : start + size].reshape(len(rows), *shape)
        start += size
    return fields


@dataclass(frozen=True, eq=False)
class Draw:
    """One mesh to rasterise."""

    mesh: int  # index into targets followed by clutter
    T_CM: NDArray[np.float64]  # [3, 4] centred mesh frame to camera, scale included
    material: int  # 1..max_targets for the slots, above for the rest
    colour: NDArray[np.float32]  # [3, 4] affine map of the sRGB colour
    gamma: float
    grain: tuple[float, float, float]  # amplitude, waves a metre, phase of a low-frequency albedo noise
    marks: tuple[float, float] = (0.0, 0.0)  # strength (dark; light where negative), waves a metre


@dataclass(frozen=True, eq=False)
class Scene:
    """What the sampler decided for one image."""

    draws: tuple[Draw, ...]
    fields: dict[str, NDArray[np.float32]]
