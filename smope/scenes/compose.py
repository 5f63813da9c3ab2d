"""From G-buffers to pictures of linear light: the table and its sheets, shading, background."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.assets import TEXTURE_SIZE, SceneAssets
from smope.scenes.config import SceneConfig
from smope.scenes.fuse import fused
from smope.scenes.light import (
    Environments,
    Planes,
    ambient_light,
    dot,
    mirror,
    screen_occlusion,
    shade,
    shadow_moments,
    shadows,
    spread_out,
    surroundings,
)
from smope.scenes.textures import marker_board, procedural_texture

SHEETS, BOARDS = 48, 24  # procedural textures in the bank
SMALLER = 8  # how many times the small copies are smaller
BACKGROUND, OBJECT, LAYER = 0, 1, 2  # what a pixel shows; LAYER + k for layer k of the table


@dataclass(frozen=True, eq=False)
class TextureBank:
    """Photos, then procedural sheets, then marker boards; sRGB, with a small copy against aliasing.

    A texel is red + 256 green + 65536 blue, so that one look-up brings all three.
    """

    pictures: Tensor  # [T, 384, 512] int32
    small: Tensor  # [T, 48, 64] int32
    environments: Environments

    @classmethod
    def build(cls, assets: SceneAssets, device: torch.device, seed: int = 0) -> TextureBank:
        rng = np.random.default_rng([seed, 77])
        height, width = TEXTURE_SIZE
        photos = assets.textures()
        made: list[NDArray[np.uint8]] = [procedural_texture(rng, height, width) for _ in range(SHEETS)]
        for _ in range(BOARDS):
            middle = photos[rng.integers(len(photos))] if len(photos) and rng.random() < 0.7 else None
            made.append(marker_board(rng, height, width, middle))
        parts = torch.from_numpy(np.concatenate([photos, np.stack(made)])).split(32)
        pictures, small = [], []
        for part in parts:
            there = part.to(device)
            pictures.append(_pack(there))
            small.append(_pack(F.avg_pool2d(there.float(), SMALLER).round()))
        return cls(torch.cat(pictures), torch.cat(small), Environments.build(assets.environments, device))


def _pack(pictures: Tensor) -> Tensor:
    red, green, blue = pictures.int().unbind(dim=1)
    return red | green << 8 | blue << 16


@dataclass(frozen=True, eq=False)
class Composed:
    radiance: Tensor  # [B, 3, H, W] linear
    depth: Tensor  # [B, H, W] metres, 0 where there is neither object nor plane
    material: Tensor  # [B, H, W] uint8, 0 for nothing
    kind: Tensor  # [B, H, W] uint8: BACKGROUND, OBJECT, LAYER + k
    moments: Tensor  # [B, MAPS, 2, S, S] of the light views


def compose(
    albedo: Tensor,
    normal: Tensor,
    depth: Tensor,
    light: Tensor,
    scene: dict[str, Tensor],
    bank: TextureBank,
    config: SceneConfig,
) -> Composed:
    """Light a batch of G-buffers (rasterise.GBuffer with a batch dimension; `scene` from layout.unpack)."""
    # Four bytes a pixel, read at once: red, green, blue and the material; the normal.
    packed, bent = (buffer.contiguous().view(torch.int32)[..., 0] for buffer in (albedo, normal))
    depth, kind, material = find_surface(packed, depth, scene, config.plane_material, config.plane_far)
    moments = shadow_moments(light, scene)
    radiance = paint(
        packed,
        bent,
        depth,
        kind,
        material,
        surroundings(depth, config.deep),
        moments,
        scene,
        kinds(scene),
        (bank.pictures, bank.small),
        (bank.environments.irradiance, bank.environments.reflection),
        config.deep,
    )
    return Composed(radiance, depth, material, kind, moments)


def pixel_rays(K: Tensor, height: int, width: int) -> Planes:
    """Directions [B, H, W] through pixel centres (whole numbers), z = 1."""
    u = torch.arange(width, device=K.device, dtype=torch.float32)
    v = torch.arange(height, device=K.device, dtype=torch.float32)
    y = ((v[None] - K[:, 1, 2, None]) / K[:, 1, 1, None])[..., None]  # [B, H, 1]
    x = (u[None] - K[:, 0, 2, None])[:, None] - K[:, 0, 1, None, None] * y  # [B, H, W]
    x = x / K[:, 0, 0, None, None]
    return x, y.expand_as(x), torch.ones_like(x)


def srgb_to_linear(x: Tensor) -> Tensor:
    """IEC 61966-2-1, with its toe replaced by the power that fits both ends."""
    return x.clamp(0, 1).pow(2.2)


def channels(packed: Tensor) -> Planes:
    """The lowest three bytes of each int32, as floats in 0..255."""
    return (packed & 255).float(), (packed >> 8 & 255).float(), (packed >> 16 & 255).float()


@fused
def find_surface(
    albedo: Tensor, depth: Tensor, scene: dict[str, Tensor], plane_material: int, plane_far: float = 12.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each pixel of a packed albedo [B, H, W] the depth, 0 where nothing is; the kind; the material id."""
    rays = pixel_rays(scene["K"], *depth.shape[1:])
    drawn = albedo >> 24 & 255
    slope = dot(spread_out(scene["plane"]), rays)
    steep = torch.where(slope.abs() < 1e-5, -1e-5, slope)
    plane_depth = scene["plane"][:, 3, None, None] / steep
    hit = (scene["table"][:, None, None] == 1) & (plane_depth > 0.05) & (plane_depth < plane_far)
    plane_depth = torch.where(hit, plane_depth, plane_far)
    in_front = hit & ((drawn == 0) | (plane_depth < depth))
    place = plane_place(rays, plane_depth, scene)
    kind = (drawn > 0).to(torch.uint8)
    for k in range(scene["layer_extent"].shape[1]):
        rows = scene["layer_extent"][:, k, ..., None, None]  # [B, 2, 3, 1, 1]
        across, along = (
            (rows[:, i, 0] * place[0] + rows[:, i, 1] * place[1] + rows[:, i, 2]).abs() for i in range(2)
        )
        kind = torch.where(in_front & (across <= 1) & (along <= 1), LAYER + k, kind)
    on_plane = kind >= LAYER
    found = torch.where(on_plane, plane_depth, torch.where(drawn > 0, depth, 0.0))
    return found, kind.to(torch.uint8), torch.where(on_plane, plane_material, drawn).to(torch.uint8)


def plane_place(rays: Planes, depth: Tensor, scene: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The plane's own x and y of points, metres."""
    P_C = scene["P_C"][..., None, None]
    x, y = (dot(P_C[:, row].unbind(dim=1), rays) * depth + P_C[:, row, 3] for row in range(2))
    return x, y


def kinds(scene: dict[str, Tensor]) -> Tensor:
    """[11, B * kinds] of each image and kind: texture, texels a metre, gains, place to texture (2 x 3)."""
    index, gain, _, _ = scene["background"].unbind(dim=1)
    zero, one = torch.zeros_like(index), torch.ones_like(index)
    columns = [index, zero, gain, gain, gain, *scene["background_uv"].flatten(1).unbind(dim=1)]
    rows = [torch.stack(columns, dim=1), torch.stack([zero, zero, one, one, one] + [zero] * 6, dim=1)]
    for k in range(scene["layer_texture"].shape[1]):
        which, texels = scene["layer_texture"][:, k, None], scene["layer_texels"][:, k, None]
        rows.append(
            torch.cat([which, texels, scene["layer_gain"][:, k], scene["layer_uv"][:, k].flatten(1)], 1)
        )
    return torch.stack(rows, dim=1).flatten(0, 1).T.contiguous()


@fused
def paint(
    albedo: Tensor,
    normal: Tensor,
    depth: Tensor,
    kind: Tensor,
    material: Tensor,
    around: Sequence[Tensor],
    moments: Tensor,
    scene: dict[str, Tensor],
    table: Tensor,
    textures: tuple[Tensor, Tensor],
    environments: tuple[Tensor, Tensor],
    deep: float = 4.0,
) -> Tensor:
    """Radiance [B, 3, H, W] of what `find_surface` found: one texture and one environment look-up a pixel."""
    batch, height, width = depth.shape
    rays = pixel_rays(scene["K"], height, width)
    shrink = (rays[0] * rays[0] + rays[1] * rays[1] + 1).rsqrt()
    view: Planes = (-rays[0] * shrink, -rays[1] * shrink, -shrink.expand_as(depth))
    on_object, on_plane, nothing = kind == OBJECT, kind >= LAYER, kind == BACKGROUND
    images = torch.arange(batch, device=depth.device)[:, None, None]

    row = images * (table.shape[1] // batch) + kind
    texture, texels, red, green, blue, *uv = (column[row] for column in table)
    place = plane_place(rays, depth, scene)
    # The background lies on the screen, whose sides are at -1 and 1.
    u = (torch.arange(width, device=depth.device) * 2 + 1) / width - 1
    v = ((torch.arange(height, device=depth.device) * 2 + 1) / height - 1)[:, None]
    x, y = torch.where(on_plane, place[0], u), torch.where(on_plane, place[1], v)
    # Metres that a pixel spans on the plane, the geometric mean of both directions.
    tilt = (dot(spread_out(scene["plane"]), rays).abs() * shrink).clamp(min=0.02)
    span = depth / scene["K"][:, 0, 0, None, None] * tilt.rsqrt()
    coarse = (torch.log2((span * texels).clamp(min=1e-3)) / 3).clamp(0, 1)
    coarse = torch.where(on_plane, coarse, scene["background"][:, 2, None, None])
    grid = (uv[0] * x + uv[1] * y + uv[2], uv[3] * x + uv[4] * y + uv[5])
    which = texture.int()
    printed = [
        torch.lerp(sharp, blurred, coarse)
        for sharp, blurred in zip(*(bilinear(bank, which, *grid) for bank in textures), strict=True)
    ]
    gains, own = (red, green, blue), channels(albedo)
    colours = [srgb_to_linear(torch.where(on_object, own[c], printed[c]) / 255) * gains[c] for c in range(3)]

    looked = scene["materials"].flatten(0, 1)  # [B * materials, 3]
    row = images * scene["materials"].shape[1] + material
    roughness, metalness, specular = (looked[:, k].contiguous()[row] for k in range(3))
    flat = spread_out(scene["plane"])
    bent = [torch.where(on_plane, f, n * (2 / 255) - 1) for f, n in zip(flat, channels(normal), strict=True)]
    # No normal where nothing is: such a pixel mirrors what lies behind it.
    unit = torch.where(nothing, 0.0, dot(bent, bent).clamp(min=1e-12).rsqrt())
    facing: Planes = (bent[0] * unit, bent[1] * unit, bent[2] * unit)
    irradiance, reflection = environments
    mirrored = mirror(facing, view, torch.where(nothing, 0.0, roughness), reflection, scene)
    # Where nothing is, the light views are asked about a far point, whose answer is not used.
    far = torch.where(nothing, deep, depth)
    lit = shadows(moments, (rays[0] * far, rays[1] * far, far), scene)
    radiance = shade(
        (
            torch.where(on_plane, colours[0].clamp(max=0.95), colours[0]),
            torch.where(on_plane, colours[1].clamp(max=0.95), colours[1]),
            torch.where(on_plane, colours[2].clamp(max=0.95), colours[2]),
        ),
        facing,
        view,
        (roughness, metalness, specular),
        ambient_light(facing, irradiance, scene),
        mirrored,
        scene,
        lit[0],
        lit[1] * screen_occlusion(depth, around, scene, deep),
    )
    surround = scene["background"][:, 3, None, None] > 0
    behind = [torch.where(surround, mirrored[c] * gains[c], colours[c]) for c in range(3)]
    return torch.stack([torch.where(nothing, behind[c], radiance[c]) for c in range(3)], dim=1)


def bilinear(pictures: Tensor, which: Tensor, x: Tensor, y: Tensor) -> Planes:
    """Packed pictures [T, h, w] at places in -1..1, mirrored beyond them; picture `which`, x, y [B, H, W].

    As grid_sample with padding "reflection" and align_corners=False, in 0..255; but each pixel has its own
    picture.
    """
    height, width = pictures.shape[1:]
    texels = pictures.flatten()
    x0, x1, right = _neighbours(x, width)
    y0, y1, low = _neighbours(y, height)
    upper, lower = (which * height + y0) * width, (which * height + y1) * width
    top, bottom = (
        [
            torch.lerp(a, b, right)
            for a, b in zip(channels(texels[line + x0]), channels(texels[line + x1]), strict=True)
        ]
        for line in (upper, lower)
    )
    red, green, blue = (torch.lerp(a, b, low) for a, b in zip(top, bottom, strict=True))
    return red, green, blue


def _neighbours(place: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """The texels before and after a place in -1..1 along a mirrored line of them, and the second's share."""
    at = (place + 1) * (size / 2)
    at = at - torch.floor(at / (2 * size)) * (2 * size)
    at = (size - 0.5 - (at - size).abs()).clamp(0, size - 1)
    first = at.int()
    return first, (first + 1).clamp(max=size - 1), at - first


def visibility(material: Tensor, tiles: Tensor, boxes: Tensor) -> Tensor:
    """[B, N] visible pixels over the pixels of the whole silhouette, inside and outside the image.

    tiles [B, N, 64, 64] bool: silhouettes resampled into boxes [B, N, 4]; material [B, H, W] holds slot + 1.
    """
    seen = count_pixels(material, tiles.shape[1]).float()
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    whole = tiles.float().mean(dim=(2, 3)) * area
    return (seen / whole.clamp(min=1.0)).clamp(0, 1)


@fused
def count_pixels(material: Tensor, slots: int) -> Tensor:
    """[B, slots] pixels of each id from 1 on."""
    return torch.stack([(material == slot).sum(dim=(1, 2)) for slot in range(1, slots + 1)], dim=1)
