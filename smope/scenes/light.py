"""Light on the G-buffer, batched: environment, directional lights, shadows, occlusion."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

REFLECTION_ROUGHNESS = (0.12, 0.3, 0.6)  # of the blurred environment levels


@dataclass(frozen=True, eq=False)
class Environments:
    """Environment maps in their own frame: z up, row 0 of the picture is up, column 0 at +x."""

    irradiance: Tensor  # [E, 9, 3] spherical-harmonic irradiance / pi, so that albedo times it is radiance
    reflection: Tensor  # [E, L * 3, 32, 64] radiance blurred for each roughness level

    @classmethod
    def build(cls, maps: NDArray[np.float16], device: torch.device) -> Environments:
        """Scale each map to a mean irradiance of 1, clip the sun, project and blur."""
        radiance = torch.as_tensor(maps.astype(np.float32), device=device).permute(0, 3, 1, 2)  # [E, 3, h, w]
        luma = radiance.mean(dim=1, keepdim=True)
        radiance = torch.minimum(radiance, 25 * luma.mean(dim=(2, 3), keepdim=True))
        directions, solid = _sphere_grid(radiance.shape[-2], radiance.shape[-1], device)
        mean = (radiance * solid).sum(dim=(1, 2, 3), keepdim=True) / (3 * 4 * torch.pi)
        radiance = radiance / mean.clamp(min=1e-6)
        basis = sh_basis(directions.reshape(1, 3, -1))[0]  # [9, hw]
        moments = torch.einsum("ecp,kp->ekc", (radiance * solid).flatten(2), basis)
        irradiance = moments * _COSINE_LOBE.to(device)[:, None]
        small = F.interpolate(radiance, (32, 64), mode="area")
        centres, weight = _sphere_grid(32, 64, device)
        flat = centres.reshape(3, -1)
        cosine = (flat.T @ flat).clamp(-1, 1)  # [2048, 2048]
        levels = []
        for roughness in REFLECTION_ROUGHNESS:
            # A lobe about as wide as GGX of that roughness reflects: exponent 2 / alpha^2 over four.
            lobe = torch.exp((cosine - 1) * (0.5 / roughness**4))
            lobe = lobe * weight.reshape(1, -1)
            lobe = lobe / lobe.sum(dim=1, keepdim=True)
            levels.append((small.flatten(2) @ lobe.T).unflatten(2, (32, 64)))
        return cls(irradiance, torch.cat(levels, dim=1))


# Irradiance over pi of each band: A_l / pi = 1, 2/3, 1/4 (Ramamoorthi & Hanrahan 2001, eq. 8).
_COSINE_LOBE = torch.tensor([1.0] + [2 / 3] * 3 + [0.25] * 5)


def sh_basis(n: Tensor) -> Tensor:
    """[B, 9, P] real spherical harmonics up to order 2 of unit vectors [B, 3, P]."""
    x, y, z = n.unbind(dim=1)
    return torch.stack(
        [
            torch.full_like(x, 0.282095),
            0.488603 * y,
            0.488603 * z,
            0.488603 * x,
            1.092548 * x * y,
            1.092548 * y * z,
            0.315392 * (3 * z * z - 1),
            1.092548 * x * z,
            0.546274 * (x * x - y * y),
        ],
        dim=1,
    )


def _sphere_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Directions [3, h, w] and solid angles [h, w] of an equirectangular picture's pixels."""
    theta = (torch.arange(height, device=device) + 0.5) * (torch.pi / height)
    phi = (torch.arange(width, device=device) + 0.5) * (2 * torch.pi / width)
    sine = theta.sin()[:, None]
    directions = torch.stack([sine * phi.cos(), sine * phi.sin(), theta.cos()[:, None].expand(height, width)])
    solid = (sine * (torch.pi / height) * (2 * torch.pi / width)).expand(height, width)
    return directions, solid


def sample_environment(maps: Tensor, directions: Tensor) -> Tensor:
    """Equirectangular maps [B, C, h, w] in directions [B, 3, H, W] of their frame -> [B, C, H, W]."""
    x, y, z = directions.unbind(dim=1)
    across = torch.atan2(y, x) / torch.pi  # -1..1, seam at -x
    down = torch.acos(z.clamp(-1, 1)) * (2 / torch.pi) - 1
    # Column 0 is at +x: shift by half a turn so that the seam of atan2 is the seam of the rolled map.
    rolled = maps.roll(maps.shape[-1] // 2, dims=-1)
    return F.grid_sample(
        rolled,
        torch.stack([across, down], dim=-1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )


def shade(
    albedo: Tensor,
    normal: Tensor,
    view: Tensor,
    material: tuple[Tensor, Tensor, Tensor],
    scene: dict[str, Tensor],
    environments: Environments,
    shadow: Tensor,
    ambient_shadow: Tensor,
) -> Tensor:
    """Radiance [B, 3, H, W] that the surface sends to the camera, linear.

    albedo [B, 3, H, W] linear; normal, view: unit, camera frame, view towards the camera; material:
    roughness, metalness, specular level [B, 1, H, W]; shadow of the main light and of the sky
    [B, 1, H, W], 1 where lit.
    """
    roughness, metalness, specular = material
    height, width = albedo.shape[-2:]
    which = scene["environment"][:, 0].long()
    gain = scene["environment"][:, 1, None, None, None]
    rotation = scene["R_EC"]  # [B, 3, 3]
    n_env = rotation @ normal.flatten(2)
    ambient = (environments.irradiance[which].transpose(1, 2) @ sh_basis(n_env)).clamp_(min=0)
    ambient = ambient.unflatten(2, (height, width)) * (gain * ambient_shadow)
    facing = (normal * view).sum(dim=1, keepdim=True).clamp(min=1e-3)
    reflected = rotation @ (2 * facing * normal - view).flatten(2)
    levels = sample_environment(environments.reflection[which], reflected.unflatten(2, (height, width)))
    a, b, c = levels.chunk(3, dim=1)
    low, mid, high = REFLECTION_ROUGHNESS
    first = ((roughness - low) / (mid - low)).clamp(0, 1)
    second = ((roughness - mid) / (high - mid)).clamp(0, 1)
    mirrored = torch.lerp(torch.lerp(a, b, first), c, second)
    base = 0.04 * specular
    f0 = torch.lerp(base.expand_as(albedo), albedo, metalness)
    # Split-sum environment BRDF, analytic fit (Karis 2014, "Physically based shading on mobile").
    r0 = 1 - roughness
    grow = torch.minimum(r0.square(), torch.exp2(-9.28 * facing)) * r0 + 0.0425 - 0.0275 * roughness
    scale, bias = -1.04 * grow + 1.04 - 0.572 * roughness, 1.04 * grow - 0.04 + 0.022 * roughness
    glossy = (f0 * scale.clamp(min=0) + (bias * specular.clamp(max=1)).clamp(min=0)) * mirrored
    diffuse_albedo = albedo * (1 - metalness)
    out = diffuse_albedo * ambient + glossy * (gain * ambient_shadow)
    alpha = roughness.square().clamp(min=0.02)
    alpha2 = alpha.square()
    geometry = alpha * 0.5  # Schlick's k for analytic lights
    for k in range(scene["light_direction"].shape[1]):
        direction = scene["light_direction"][:, k, :, None, None]
        colour = scene["light_colour"][:, k, :, None, None]
        lambert = (normal * direction).sum(dim=1, keepdim=True).clamp(min=0)
        half = F.normalize(view + direction, dim=1)
        n_half = (normal * half).sum(dim=1, keepdim=True).clamp(min=0)
        v_half = (view * half).sum(dim=1, keepdim=True).clamp(0, 1)
        # GGX distribution, Smith-Schlick visibility, Schlick Fresnel (Walter et al. 2007; Karis 2013).
        spread = alpha2 / (n_half.square() * (alpha2 - 1) + 1).square()
        masking = 0.25 / ((lambert * (1 - geometry) + geometry) * (facing * (1 - geometry) + geometry))
        fresnel = f0 + (specular.clamp(max=1) - f0).clamp(min=0) * (1 - v_half).pow(5)
        strength = lambert * shadow if k == 0 else lambert * ambient_shadow
        out = out + (diffuse_albedo + (fresnel * (spread * masking)).clamp(max=8.0)) * (strength * colour)
    return out


def shadows(light: Tensor, points: Tensor, scene: dict[str, Tensor]) -> Tensor:
    """[B, MAPS, H, W] share of each light view that reaches camera points [B, 3, H, W].

    Variance shadow maps (Donnelly & Lauritzen 2006): a blurred map of depth and its square bounds the share
    of occluders nearer than the point (Chebyshev), at one look-up a pixel. light [B, MAPS, S, S] depth 0..1.
    """
    batch, maps, size, _ = light.shape
    depth = _fill_with_plane(light * 2 - 1, scene)
    softness = scene["light_softness"]
    moments = torch.stack([depth, depth.square()], dim=2)  # [B, MAPS, 2, S, S]
    moments = _blur_each(moments.flatten(0, 1), softness.flatten())
    view = scene["light_view"].flatten(0, 1)  # [B * MAPS, 3, 4]
    repeated = points.flatten(2).repeat_interleave(maps, dim=0)
    mapped = view[:, :, :3] @ repeated + view[:, :, 3:]
    mapped = mapped.unflatten(2, points.shape[-2:])
    looked = F.grid_sample(
        moments,
        mapped[:, :2].permute(0, 2, 3, 1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    mean, square = looked.unbind(dim=1)
    # One texel across is a quarter of that in the depth unit along; the bias follows the blur.
    bias = 0.004 + 0.25 * softness.flatten()[:, None, None] / size
    behind = mapped[:, 2] - mean - bias
    variance = (square - mean.square()).clamp(min=2e-6)
    lit = torch.where(behind > 0, variance / (variance + behind.square()), torch.ones_like(behind))
    lit = ((lit - 0.25) / 0.75).clamp(0, 1).unflatten(0, (batch, maps))
    return 1 - (1 - lit) * scene["light_strength"][:, :, None, None]


def _fill_with_plane(depth: Tensor, scene: dict[str, Tensor]) -> Tensor:
    """Where a light view sees no object it sees the plane: blurred edges then fade to the plane's depth."""
    size = depth.shape[-1]
    cells = (torch.arange(size, device=depth.device) + 0.5) * (2 / size) - 1
    view = scene["light_view"]  # [B, MAPS, 3, 4]
    # Plane n . x = d in the view's coordinates y = A x + b: m . y = d + m . b with m = A^-T n. The rows of A
    # are orthogonal, so that A^-T is A with each row divided by its squared length.
    axes = view[..., :3]
    normal = (axes @ scene["plane"][:, None, :3, None])[..., 0] / axes.square().sum(dim=-1)
    offset = scene["plane"][:, None, 3] + (normal * view[..., 3]).sum(dim=-1)
    slope = normal[..., 2].abs().clamp(min=1e-3) * normal[..., 2].sign()
    x, y = cells[None, None, None, :], cells[None, None, :, None]
    along = normal[..., 0, None, None] * x + normal[..., 1, None, None] * y
    plane = (offset[..., None, None] - along) / slope[..., None, None]
    table = scene["table"][:, None, None, None] > 0
    plane = torch.where(table, plane.clamp(-3, 3), torch.full_like(plane, 1.0))
    return torch.where(depth < 0.9999, depth, plane)


def _blur_each(images: Tensor, sigma: Tensor) -> Tensor:
    """Separable Gaussian blur of [K, C, H, W] with a sigma [K] (texels) each."""
    reach = 12
    taps = torch.arange(-reach, reach + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None].clamp(0.3, reach / 2)).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    count, channels, height, width = images.shape
    kernel = kernel.repeat_interleave(channels, dim=0)
    flat = images.reshape(1, count * channels, height, width)
    flat = F.pad(flat, (reach, reach, reach, reach), mode="replicate")
    flat = F.conv2d(flat, kernel[:, None, None, :], groups=count * channels)
    flat = F.conv2d(flat, kernel[:, None, :, None], groups=count * channels)
    return flat.reshape(count, channels, height, width)


def screen_occlusion(depth: Tensor, scene: dict[str, Tensor]) -> Tensor:
    """[B, 1, H, W] darkening of points that lie deeper than what is around them, 1 where open.

    The classic depth unsharp mask (Luft et al. 2006), limited to the reach so that far things cast none.
    """
    strength = scene["occlusion"][:, 0, None, None, None]
    reach = scene["occlusion"][:, 1, None, None, None]
    deep = depth[:, None].clamp(max=4.0)
    small = F.avg_pool2d(deep, 4)
    dark = torch.zeros_like(deep)
    for size in (5, 15):
        around = F.avg_pool2d(small, size, stride=1, padding=size // 2, count_include_pad=False)
        gap = deep - F.interpolate(around, deep.shape[-2:], mode="bilinear", align_corners=False)
        dark = dark + 0.5 * (gap / reach).clamp(0, 1)
    return 1 - strength * dark
