"""From G-buffers to pictures of linear light: the table and its sheets, shading, background."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.assets import TEXTURE_SIZE, SceneAssets
from smope.scenes.config import SceneConfig
from smope.scenes.light import Environments, sample_environment, screen_occlusion, shade, shadows
from smope.scenes.textures import marker_board, procedural_texture

SHEETS, BOARDS = 48, 24  # procedural textures in the bank


@dataclass(frozen=True, eq=False)
class TextureBank:
    """Photos, then procedural sheets, then marker boards; sRGB, uint8, with a small copy against aliasing."""

    pictures: Tensor  # [T, 3, 384, 512] uint8
    small: Tensor  # [T, 3, 48, 64] uint8
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
        pictures = torch.from_numpy(np.concatenate([photos, np.stack(made)])).to(device)
        small = torch.cat([F.avg_pool2d(part.float(), 8).round().byte() for part in pictures.split(32)])
        return cls(pictures, small, Environments.build(assets.environments, device))


@dataclass(frozen=True, eq=False)
class Composed:
    radiance: Tensor  # [B, 3, H, W] linear
    depth: Tensor  # [B, H, W] metres, 0 where there is neither object nor plane
    material: Tensor  # [B, H, W] uint8, 0 for nothing


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
    height, width = depth.shape[1:]
    rays = pixel_rays(scene["K"], height, width)  # [B, 3, H, W], z = 1
    drawn = albedo[..., 3]
    plane_depth, inside, plane_albedo = _table_top(rays, scene, bank)
    on_object = (drawn > 0)[:, None]
    on_plane = inside & (~on_object | (plane_depth < depth[:, None]))
    on_object = on_object & ~on_plane
    surface = on_object | on_plane
    material = torch.where(on_plane[:, 0], torch.full_like(drawn, config.plane_material), drawn)

    point_depth = torch.where(on_plane, plane_depth, depth[:, None])
    points = rays * point_depth
    object_albedo = srgb_to_linear(albedo[..., :3].permute(0, 3, 1, 2).float() / 255)
    surface_albedo = torch.where(on_plane, plane_albedo, object_albedo)
    object_normal = normal[..., :3].permute(0, 3, 1, 2).float() * (2 / 255) - 1
    plane_normal = scene["plane"][:, :3, None, None]
    surface_normal = F.normalize(torch.where(on_plane, plane_normal, object_normal), dim=1)
    view = -rays / rays.norm(dim=1, keepdim=True)
    rows = (torch.arange(len(drawn), device=drawn.device) * config.materials)[:, None, None]
    flat = scene["materials"].flatten(0, 1)
    index = rows + material.long()
    looked = tuple(flat[:, k][index][:, None] for k in range(3))
    lit = shadows(light, points, scene)
    far = torch.where(surface, point_depth, torch.full_like(point_depth, 4.0))
    open_sky = lit[:, 1:] * screen_occlusion(far[:, 0], scene)
    radiance = shade(
        surface_albedo,
        surface_normal,
        view,
        (looked[0], looked[1], looked[2]),
        scene,
        bank.environments,
        lit[:, :1],
        open_sky,
    )
    radiance = torch.where(surface, radiance, _background(view, scene, bank))
    return Composed(
        radiance, torch.where(surface, point_depth, torch.zeros_like(point_depth))[:, 0], material
    )


def pixel_rays(K: Tensor, height: int, width: int) -> Tensor:
    """[B, 3, H, W] directions through pixel centres (whole numbers), z = 1."""
    u = torch.arange(width, device=K.device, dtype=torch.float32)
    v = torch.arange(height, device=K.device, dtype=torch.float32)
    y = (v[None] - K[:, 1, 2, None]) / K[:, 1, 1, None]  # [B, H]
    x = (u[None] - K[:, 0, 2, None])[:, None] - K[:, 0, 1, None, None] * y[..., None]  # [B, H, W]
    x = x / K[:, 0, 0, None, None]
    return torch.stack([x, y[..., None].expand_as(x), torch.ones_like(x)], dim=1)


def srgb_to_linear(x: Tensor) -> Tensor:
    """IEC 61966-2-1, with its toe replaced by the power that fits both ends."""
    return x.clamp(0, 1).pow(2.2)


def _table_top(rays: Tensor, scene: dict[str, Tensor], bank: TextureBank) -> tuple[Tensor, Tensor, Tensor]:
    """Depth [B, 1, H, W] of the plane, where it is table or sheet, and its linear albedo [B, 3, H, W]."""
    normal, offset = scene["plane"][:, :3], scene["plane"][:, 3, None, None]
    slope = torch.einsum("bc,bchw->bhw", normal, rays)
    depth = offset / torch.where(slope.abs() < 1e-5, torch.full_like(slope, -1e-5), slope)
    hit = (scene["table"][:, None, None] > 0) & (depth > 0.05) & (depth < 12.0)
    depth = torch.where(hit, depth, torch.full_like(depth, 12.0))
    P_C = scene["P_C"]
    place = P_C[:, :, :3] @ (rays * depth[:, None]).flatten(2) + P_C[:, :, 3:]
    place = torch.cat([place, torch.ones_like(place[:, :1])], dim=1)  # [B, 3, HW]
    # Metres that a pixel spans on the plane, the geometric mean of both directions.
    span = depth / scene["K"][:, 0, 0, None, None] / (slope.abs() / rays.norm(dim=1)).clamp(min=0.02).sqrt()
    albedo, inside = torch.zeros_like(rays), torch.zeros_like(hit)
    for k in range(scene["layer_uv"].shape[1]):
        extent = (scene["layer_extent"][:, k] @ place).abs().amax(dim=1).unflatten(1, hit.shape[1:])
        here = hit & (extent <= 1)
        grid = (scene["layer_uv"][:, k] @ place).unflatten(2, hit.shape[1:]).permute(0, 2, 3, 1)
        index = scene["layer_texture"][:, k].long()
        texels = span * scene["layer_texels"][:, k, None, None]
        coarse = (torch.log2(texels.clamp(min=1e-3)) / 3).clamp(0, 1)[:, None]
        sharp = _sample(bank.pictures[index], grid, "reflection")
        colour = torch.lerp(sharp, _sample(bank.small[index], grid, "reflection"), coarse)
        colour = srgb_to_linear(colour) * scene["layer_gain"][:, k, :, None, None]
        albedo = torch.where(here[:, None], colour.clamp(max=0.95), albedo)
        inside = inside | here
    return depth[:, None], inside[:, None], albedo


def _sample(pictures: Tensor, grid: Tensor, padding: str) -> Tensor:
    return F.grid_sample(
        pictures.float() / 255, grid, mode="bilinear", padding_mode=padding, align_corners=False
    )


def _background(view: Tensor, scene: dict[str, Tensor], bank: TextureBank) -> Tensor:
    """[B, 3, H, W] linear: a photo, or the environment itself."""
    height, width = view.shape[-2:]
    index, gain, blur, surround = scene["background"].unbind(dim=1)
    grid = F.affine_grid(scene["background_uv"], [len(view), 3, height, width], align_corners=False)
    photo = _sample(bank.pictures[index.long()], grid, "reflection")
    photo = torch.lerp(
        photo, _sample(bank.small[index.long()], grid, "reflection"), blur[:, None, None, None]
    )
    photo = srgb_to_linear(photo)
    which = scene["environment"][:, 0].long()
    away = (scene["R_EC"] @ -view.flatten(2)).unflatten(2, (height, width))
    around = sample_environment(bank.environments.reflection[which, :3], away)
    return torch.where(surround[:, None, None, None] > 0, around, photo) * gain[:, None, None, None]


def visibility(material: Tensor, tiles: Tensor, boxes: Tensor) -> Tensor:
    """[B, N] visible pixels over the pixels of the whole silhouette, inside and outside the image.

    tiles [B, N, 64, 64] bool: silhouettes resampled into boxes [B, N, 4]; material [B, H, W] holds slot + 1.
    """
    slots = torch.arange(1, tiles.shape[1] + 1, device=tiles.device, dtype=material.dtype)
    seen = torch.stack([(material == slot).sum(dim=(1, 2)) for slot in slots], dim=1).float()
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    whole = tiles.float().mean(dim=(2, 3)) * area
    return (seen / whole.clamp(min=1.0)).clamp(0, 1)
