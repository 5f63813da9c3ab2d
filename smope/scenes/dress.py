"""How a scene looks: colours and materials of its objects, sheets on the table, background, lights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from smope.scenes.config import SceneConfig
from smope.scenes.layout import MAPS

Floats = NDArray[np.float64]
Fields = dict[str, Floats]
_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


@dataclass(frozen=True, eq=False)
class Paint:
    """What becomes of a mesh's own colours."""

    matrix: NDArray[np.float32]  # [3, 4] affine map of the sRGB colour
    gamma: float
    grain: tuple[float, float, float]  # amplitude, waves a metre, phase of a low-frequency albedo noise
    marks: tuple[float, float] = (0.0, 0.0)  # strength (dark; light where negative), waves a metre

    def of(self, colour: Floats) -> Floats:
        """The sRGB colour [3] in 0..1 that `colour` comes to, grain and marks aside."""
        return (self.matrix[:, :3] @ colour + self.matrix[:, 3]).clip(0, 1) ** self.gamma


def draw_colour(
    rng: np.random.Generator, known: bool, mean: Floats, config: SceneConfig, aim: Floats | None = None
) -> Paint:
    """Affine map of an object's sRGB colours, a gamma, and low-frequency noise on its albedo.

    Known objects keep their hue nearly; their scans carry the light of the scanner, so saturation, contrast
    and brightness vary widely about their `mean` colour. Clutter is often painted anew; with an `aim` its
    mean is moved near that (both sRGB [3] in 0..1), and what is printed on it stays to be seen.
    """
    level = 1.0
    if known:
        hue, saturation = rng.normal(0, config.known_hue), rng.uniform(0.65, 1.55)
        contrast = float(np.exp(rng.uniform(*np.log(config.known_contrast))))
        brightness = rng.uniform(0.0, 0.10)
        level = rng.uniform(0.65, 1.2)
        cast = rng.normal(1, 0.04, 3)
        gamma = float(np.exp(rng.normal(0, 0.22)))
    elif aim is not None:
        # A look-alike is mostly of one colour, as a mug or a carton is, with some contrast of its own.
        hue, saturation = rng.normal(0, 15.0), rng.uniform(0.0, 1.0)
        contrast, brightness = rng.uniform(0.2, 1.1), 0.0
        cast = rng.normal(1, 0.05, 3)
        gamma = float(np.exp(rng.normal(0, 0.2)))
    else:
        repaint = rng.random() < 0.4
        hue = rng.uniform(-180, 180) if repaint else rng.normal(0, 15)
        saturation = rng.uniform(0.0, 1.5) if repaint else rng.uniform(0.6, 1.5)
        contrast, brightness = rng.uniform(0.6, 1.4), rng.uniform(-0.3, 0.25)
        cast = rng.normal(1, 0.10, 3)
        gamma = float(np.exp(rng.normal(0, 0.35)))
    matrix = np.diag(cast) @ _hue_saturation(hue, saturation) * (contrast * level)
    if known:
        # Contrast turns about the own colour, and light scales: what is seen on dark things stays.
        offset = matrix @ mean * (1 / contrast - 1) + brightness
    elif aim is None:
        offset = np.full(3, 0.5 - 0.5 * contrast + brightness)
    else:
        wanted = (aim * rng.normal(1, 0.1) + rng.normal(0, 0.03, 3)).clip(0.01, 0.99)
        offset = wanted ** (1 / gamma) - matrix @ mean
    grain = (
        float(rng.uniform(0, 0.10)),
        float(np.exp(rng.uniform(np.log(15), np.log(150)))),
        float(rng.uniform(0, 6)),
    )
    marked = known and config.mark_probability > 0 and rng.random() < config.mark_probability
    marks = _marks(rng) if marked else (0.0, 0.0)
    return Paint(np.column_stack([matrix, offset]).astype(np.float32), gamma, grain, marks)


def _marks(rng: np.random.Generator) -> tuple[float, float]:
    """Patches over about a seventh of the surface, some millimetres to centimetres wide, more often dark."""
    strength = rng.uniform(0.2, 0.9) * (1.0 if rng.random() < 0.7 else -1.0)
    return float(strength), float(np.exp(rng.uniform(np.log(40), np.log(300))))


def _hue_saturation(degrees: float, saturation: float) -> Floats:
    """[3, 3] turn of the colour circle about grey in YIQ, and a scale of the distance from grey."""
    angle = np.deg2rad(degrees)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]) * saturation
    middle = np.eye(3)
    middle[1:, 1:] = turn
    return _FROM_YIQ @ middle @ _TO_YIQ


def sample_materials(rng: np.random.Generator, config: SceneConfig) -> Floats:
    """[materials, 3] roughness, metalness, specular level; the last is the plane's."""
    count = config.materials
    rough = np.where(rng.random(count) < 0.5, rng.uniform(0.2, 0.5, count), rng.uniform(0.4, 1.0, count))
    metal = np.where(rng.random(count) < 0.12, rng.uniform(0.2, 0.8, count), 0.0)
    specular = np.where(rng.random(count) < 0.25, 0.0, rng.uniform(0.2, 1.2, count))
    specular[: config.max_targets + 1] *= rng.uniform(0.3, 1.0)  # a sheen, rims that shine seldom
    metal[: config.max_targets + 1] *= rng.random() < 0.25  # few known objects are bare metal
    glossy = rng.random(count) < config.gloss_probability
    rough = np.where(glossy, rng.uniform(0.1, 0.25, count), rough)
    specular = np.where(glossy, rng.uniform(0.8, 1.2, count), specular)
    metal = np.where(glossy, 0.0, metal)
    rough[-1], metal[-1] = rng.uniform(0.3, 1.0), 0.0
    specular[-1] = rng.uniform(0.0, 0.8)
    return np.stack([rough, metal, specular], axis=1)


def _placement(angle: float, centre: Floats, half: Floats) -> Floats:
    """[2, 3] plane x, y, 1 to -1..1 over a turned rectangle with half sizes `half` about `centre`."""
    cosine, sine = np.cos(angle), np.sin(angle)
    turn = np.array([[cosine, sine], [-sine, cosine]]) / half[:, None]
    return np.column_stack([turn, -turn @ centre])


def sample_layers(
    rng: np.random.Generator, config: SceneConfig, photos: int, sheets: int, boards: int
) -> Fields:
    """The table top, perhaps a board on it, perhaps sheets (magazines, papers) on that."""
    layers = config.layers
    texture = np.zeros(layers)
    uv, extent = np.zeros((layers, 2, 3)), np.zeros((layers, 2, 3))
    gain, texels = np.ones((layers, 3)), np.ones(layers)
    base_angle, crowd = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.4)
    for k in range(layers):
        if k == 0:
            photo = rng.random() < 0.5 and photos > 0
            texture[k] = rng.integers(photos) if photo else photos + rng.integers(sheets)
            tile = np.exp(rng.uniform(np.log(0.12), np.log(0.7)))
            uv[k] = _placement(
                rng.uniform(0, 2 * np.pi), rng.normal(0, 0.3, 2), np.array([tile, tile * 0.75])
            )
            vast = rng.random() < 0.35
            half = rng.uniform(3, 6, 2) if vast else rng.uniform(0.25, 1.0, 2)
            extent[k] = _placement(base_angle, rng.normal(0, 0.12, 2), half)
            texels[k] = 256 / tile
        else:
            present = rng.random() < 0.7 * crowd
            board = rng.random() < (0.75 if k == 1 else 0.12)
            if board:
                texture[k] = photos + sheets + rng.integers(boards)
                half = rng.uniform(0.18, 0.45) * np.array([1.0, rng.uniform(0.65, 0.95)])
                centre = rng.normal(0, 0.05 if k == 1 else 0.3, 2)
                angle = base_angle + rng.normal(0, 0.2)
            else:
                photo = rng.random() < 0.6 and photos > 0
                texture[k] = rng.integers(photos) if photo else photos + rng.integers(sheets)
                half = rng.uniform(0.08, 0.25) * np.array([1.0, rng.uniform(0.6, 0.9)])
                centre = rng.normal(0, (0.08, 0.22, 0.35)[int(rng.integers(3))], 2)
                angle = rng.uniform(0, 2 * np.pi)
            uv[k] = extent[k] = _placement(angle, centre, half)
            texels[k] = 256 / half[0]
            if not present:
                extent[k] = [[0, 0, 9.0], [0, 0, 9.0]]  # nowhere inside
        gain[k] = np.exp(rng.normal(-0.05, 0.3)) * np.exp(rng.normal(0, 0.06, 3))
    return {
        "layer_texture": texture,
        "layer_uv": uv,
        "layer_extent": extent,
        "layer_gain": gain,
        "layer_texels": texels,
    }


def sample_background(rng: np.random.Generator, photos: int, sheets: int) -> Fields:
    """What is seen beyond objects and table."""
    index = rng.integers(photos) if photos else rng.integers(sheets)
    zoom = rng.uniform(0.7, 2.0) * rng.uniform(0.85, 1.15, 2) * np.array([rng.choice([-1.0, 1.0]), 1.0])
    angle = rng.normal(0, 0.2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) * zoom[:, None]
    shift = rng.uniform(-1, 1, 2) * np.abs(1 - np.abs(zoom))  # beyond its edges a photo goes on mirrored
    environment = float(rng.random() < 0.08)
    gain = np.exp(rng.normal(0.0, 0.5))
    return {
        "background": np.array([index, gain, max(0.0, rng.uniform(-1.4, 0.7)), environment]),
        "background_uv": np.column_stack([turn, shift]),
    }


def _temperature(rng: np.random.Generator) -> Floats:
    """A light's colour between warm and cool, of luminance 1."""
    warmth = rng.normal(0, 0.18)
    colour = np.exp(np.array([warmth, 0.0, -warmth]) + rng.normal(0, 0.03, 3))
    return colour / (colour @ _LUMA)


def sample_lights(
    rng: np.random.Generator,
    config: SceneConfig,
    R_CW: Floats,
    centres: Floats,
    environments: int,
    table: bool,
) -> Fields:
    """Environment map, lights from above, light views around objects at `centres` [k, 3] (camera frame)."""
    directions = rng.normal(0, 1, (config.lights, 3))
    # Rooms are lit from the ceiling: more often than not light comes from high above.
    directions[:, 2] = np.abs(directions[:, 2]) * 1.2 + (0.35 if rng.random() < 0.4 else 1.2)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    strength = np.array(
        [np.exp(rng.uniform(np.log(0.2), np.log(1.8))), *(rng.uniform(0, 0.9, config.lights - 1))]
    )
    strength[1:] *= rng.random(config.lights - 1) < 0.6
    if rng.random() < 0.12:
        strength[:] *= 0.05  # only ambient light
    if rng.random() < config.frontal_light_probability:
        # Rows of R_CW are the camera's axes in the world; light from behind it leaves rims darker.
        directions[-1] = -R_CW[2] + rng.normal(0, 0.35, 3)
        directions[-1] /= np.linalg.norm(directions[-1])
        strength[-1] = rng.uniform(0.3, 1.4)
    colours = np.stack([_temperature(rng) for _ in range(config.lights)]) * strength[:, None]
    in_camera = directions @ R_CW.T
    middle = np.median(centres, axis=0) if len(centres) else np.array([0.0, 0.0, 1.0])
    reach = (
        float(np.clip(np.linalg.norm(centres - middle, axis=1).max() + 0.2, 0.3, 1.0))
        if len(centres)
        else 0.5
    )
    yaw = rng.uniform(0, 2 * np.pi)
    R_EW = np.array([[np.cos(yaw), -np.sin(yaw), 0], [np.sin(yaw), np.cos(yaw), 0], [0, 0, 1.0]])
    softness = np.array([np.exp(rng.uniform(np.log(0.003), np.log(0.03))), rng.uniform(0.02, 0.05)])
    texel = 2 * reach / config.shadow_size
    views = [light_view(d, middle, reach) for d in (in_camera[0], R_CW[:, 2])]
    assert len(views) == MAPS
    return {
        "environment": np.array([rng.integers(environments), rng.uniform(0.35, 1.2)]),
        "R_EC": R_EW @ R_CW.T,
        "light_direction": in_camera,
        "light_colour": colours,
        "light_view": np.stack(views),
        "light_softness": softness / texel,
        "light_strength": np.array([rng.uniform(0.6, 1.0), rng.uniform(0.4, 1.0)]),
        "occlusion": np.array([rng.uniform(*config.occlusion), rng.uniform(0.02, 0.08)]),
    }


def light_view(direction: Floats, middle: Floats, reach: float) -> Floats:
    """[3, 4] parallel projection along a light: camera point to x, y, depth in -1..1 around `middle`.

    Depth grows away from the light and spans four times the reach, so that far objects still cast shadows.
    """
    side = np.cross(direction, [1.0, 0.0, 0.0] if abs(direction[0]) < 0.8 else [0.0, 1.0, 0.0])
    side /= np.linalg.norm(side)
    axes = np.stack([side, np.cross(direction, side), -direction / 2.0]) / reach
    return np.column_stack([axes, -axes @ middle])
