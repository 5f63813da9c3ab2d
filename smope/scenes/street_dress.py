"""How a street looks: paints and glass, the ground and what is printed on it, sun and sky."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from smope.scenes.dress import Fields, Paint, _temperature, light_view
from smope.scenes.street_config import StreetConfig

Floats = NDArray[np.float64]
RED = np.array([0.70, 0.04, 0.05])
# Paints of cars as they are sold, sRGB, with how often about.
_PAINTS = (
    (0.20, (0.90, 0.90, 0.90)), (0.20, (0.035, 0.035, 0.04)), (0.17, (0.60, 0.61, 0.63)),
    (0.16, (0.27, 0.28, 0.30)), (0.11, (0.06, 0.12, 0.33)), (0.07, (0.48, 0.04, 0.05)),
    (0.03, (0.10, 0.25, 0.16)), (0.03, (0.45, 0.38, 0.28)), (0.02, (0.80, 0.60, 0.08)),
    (0.01, (0.75, 0.30, 0.05)),
)  # fmt: skip
_SKINS = ((0.80, 0.60, 0.50), (0.62, 0.44, 0.34), (0.36, 0.24, 0.18))


def vehicle_paint(rng: np.random.Generator, kind: str) -> Paint:
    """Columns: the paint, grey, red. Trucks and vans are white more often, trams yellow or red."""
    odds = np.array([share for share, _ in _PAINTS])
    if kind in ("Van", "Truck"):
        odds[0] += 0.45
    if kind == "Tram":
        odds[[8, 5]] += 0.6
    colour = np.array(_PAINTS[rng.choice(len(odds), p=odds / odds.sum())][1])
    colour = (colour * np.exp(rng.normal(0, 0.18)) + rng.normal(0, 0.02, 3)).clip(0.01, 0.95)
    grey = np.full(3, rng.uniform(0.75, 1.0))
    matrix = np.column_stack([colour, grey, RED * rng.uniform(0.7, 1.2), np.zeros(3)])
    return Paint(matrix.astype(np.float32), 1.0, _dirt(rng))


def glass_paint(rng: np.random.Generator) -> Paint:
    """A dark inside, behind glass that shows its surroundings."""
    colour = rng.uniform(0.02, 0.16) * np.array([0.95, 1.0, 1.03])
    matrix = np.column_stack([np.zeros((3, 3)), colour])
    return Paint(matrix.astype(np.float32), 1.0, (0.0, 1.0, 0.0))


def person_paint(rng: np.random.Generator) -> Paint:
    """Columns: shirt, trousers, skin."""
    skin = np.array(_SKINS[rng.choice(3, p=[0.7, 0.2, 0.1])]) * rng.uniform(0.8, 1.15)
    shirt = _cloth(rng, rng.uniform(0.03, 0.9))
    trousers = _cloth(rng, rng.uniform(0.02, 0.45)) if rng.random() < 0.85 else skin * 0.95
    matrix = np.column_stack([shirt, trousers, skin, np.zeros(3)]).clip(0, 0.97)
    return Paint(
        matrix.astype(np.float32), 1.0, (float(rng.uniform(0.02, 0.15)), float(rng.uniform(5, 40)), 0.0)
    )


def thing_paint(rng: np.random.Generator) -> Paint:
    colour = _cloth(rng, rng.uniform(0.05, 0.8))
    matrix = np.column_stack([colour, colour, colour, np.zeros(3)])
    return Paint(matrix.astype(np.float32), 1.0, (float(rng.uniform(0, 0.3)), float(rng.uniform(1, 20)), 0.0))


def _cloth(rng: np.random.Generator, level: float) -> Floats:
    tint = rng.normal(0, 0.25 if rng.random() < 0.5 else 0.06, 3)
    return np.asarray((level * np.exp(tint - tint.mean())).clip(0.01, 0.95))


def _dirt(rng: np.random.Generator) -> tuple[float, float, float]:
    return (float(rng.uniform(0, 0.05)), float(rng.uniform(0.5, 6)), float(rng.uniform(0, 6)))


def material_of(rng: np.random.Generator, part: str) -> Floats:
    """[3] roughness, metalness, specular level of a part "body", "glass", "person" or "thing"."""
    if part == "glass":
        return np.array([rng.uniform(0.03, 0.14), 0.0, rng.uniform(0.3, 1.2)])
    if part == "body":
        return np.array(
            [rng.uniform(0.12, 0.42), rng.uniform(0, 0.35) * (rng.random() < 0.5), rng.uniform(0.5, 1.2)]
        )
    return np.array([rng.uniform(0.6, 1.0), 0.0, rng.uniform(0.0, 0.4)])


def ground_layers(rng: np.random.Generator, config: StreetConfig, photos: int, sheets: int) -> Fields:
    """Verge, carriageway, and marks along it, on the plane's x (right) and y (ahead)."""
    layers = config.layers
    texture, texels = np.zeros(layers), np.ones(layers)
    uv, extent = np.zeros((layers, 2, 3)), np.tile([[0, 0, 9.0], [0, 0, 9.0]], (layers, 1, 1))
    gain = np.ones((layers, 3))
    angle, middle = rng.normal(0, 0.04), rng.normal(0, 2.0)
    along = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])

    def strip(k: int, across: float, half: float, tile: float, level: float, tint: float = 0.04) -> None:
        photo = rng.random() < 0.5 and photos > 0
        texture[k] = rng.integers(photos) if photo else photos + rng.integers(sheets)
        shift = np.array([[-across - middle], [0.0]])
        extent[k] = np.hstack([along, shift]) / np.array([[half], [200.0]])
        uv[k] = np.hstack([along, shift]) / tile
        texels[k] = 256 / tile
        gain[k] = level * np.exp(rng.normal(0, tint, 3))

    wide = rng.uniform(3.0, 8.0)
    strip(0, 0.0, 150.0, rng.uniform(2, 8), rng.uniform(0.2, 0.6), 0.1)
    strip(1, 0.0, wide, rng.uniform(3, 15), rng.uniform(0.25, 0.6))
    for k in range(2, layers):
        if rng.random() < 0.75:
            place = (-wide + 0.3, wide - 0.3, 0.0, rng.uniform(-wide, wide))[k - 2]
            strip(k, place, rng.uniform(0.06, 0.12), 3.0, rng.uniform(0.9, 1.6), 0.02)
    return {
        "layer_texture": texture, "layer_uv": uv, "layer_extent": extent, "layer_gain": gain,
        "layer_texels": texels,
    }  # fmt: skip


def horizon(rng: np.random.Generator, config: StreetConfig, photos: int, sheets: int, level: float) -> Fields:
    """A photo, mirrored on and on along the horizon (at row `level`, pixels), or the sky of the map."""
    index = rng.integers(photos) if photos else sheets and rng.integers(sheets)
    repeats, tall = rng.uniform(1.0, 3.5), rng.uniform(0.8, 1.6)
    down = 2 * level / config.height - 1  # of the horizon on the screen; the photo's lower edge lies there
    uv = np.array([[repeats, 0.0, rng.uniform(-1, 1)], [0.0, tall, 1.0 - tall * down - rng.uniform(0, 0.2)]])
    return {
        "background": np.array(
            [
                index,
                np.exp(rng.normal(0.1, 0.3)),
                rng.uniform(0, 0.5),
                float(rng.random() < config.sky_probability),
            ]
        ),
        "background_uv": uv,
    }


def daylight(
    rng: np.random.Generator, config: StreetConfig, R_CW: Floats, centres: Floats, environments: int
) -> Fields:
    """Sun and sky, and light views around what stands at `centres` [k, 3], camera frame, metres."""
    high, around = np.deg2rad(rng.uniform(18, 75)), rng.uniform(0, 2 * np.pi)
    sun = np.array([np.cos(high) * np.cos(around), np.cos(high) * np.sin(around), np.sin(high)])
    others = rng.normal(0, 1, (config.lights - 1, 3)) + np.array([0, 0, 2.0])
    directions = np.vstack([sun, others])
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    overcast = rng.random() < 0.35
    strength = np.zeros(config.lights)
    strength[0] = rng.uniform(0.0, 0.25) if overcast else np.exp(rng.uniform(np.log(0.6), np.log(2.8)))
    strength[1] = rng.uniform(0.0, 0.3)
    in_camera = directions @ R_CW.T
    near = centres[centres[:, 2] < 45] if len(centres) else centres
    middle = np.median(near, axis=0) if len(near) else np.array([0.0, 1.6, 12.0])
    reach = float(np.clip(np.linalg.norm(near - middle, axis=1).max() + 6, 12, 26)) if len(near) else 12.0
    yaw = rng.uniform(0, 2 * np.pi)
    R_EW = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
    texel = 2 * reach / config.shadow_size
    softness = np.array([rng.uniform(0.04, 0.2) if not overcast else 0.6, rng.uniform(0.2, 0.4)])
    return {
        "environment": np.array([rng.integers(environments), rng.uniform(0.5, 1.1)]),
        "R_EC": R_EW @ R_CW.T,
        "light_direction": in_camera,
        "light_colour": np.stack([_temperature(rng) for _ in range(config.lights)]) * strength[:, None],
        "light_view": np.stack([light_view(d, middle, reach) for d in (in_camera[0], R_CW[:, 2])]),
        "light_softness": softness / texel,
        "light_strength": np.array([rng.uniform(0.8, 1.0), rng.uniform(0.9, 1.0)]),
        "occlusion": np.array([rng.uniform(0.0, 0.3), rng.uniform(0.3, 1.0)]),
        "ground": np.array([rng.uniform(0.35, 0.65) * min(strength[0], 1.0), rng.uniform(0.85, 0.98)]),
    }
