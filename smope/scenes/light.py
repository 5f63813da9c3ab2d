"""Light on the G-buffer, batched: environment, directional lights, shadows, occlusion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from smope.scenes.filters import gaussian, pad, separable

Planes = tuple[
    Tensor, Tensor, Tensor
]  # x, y, z or red, green, blue, each [B, H, W]: planes fuse, stacks don't
REFLECTION_ROUGHNESS = (0.12, 0.3, 0.6)  # of the blurred environment levels
SHADOW_REACH = 12  # texels each way of the blur of a light view


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
    return torch.stack([torch.full_like(x, _SH_0), *_harmonics(x, y, z)], dim=1)


_SH_0 = 0.282095


def _harmonics(x: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """The eight harmonics of orders 1 and 2."""
    return (
        0.488603 * y,
        0.488603 * z,
        0.488603 * x,
        1.092548 * x * y,
        1.092548 * y * z,
        0.315392 * (3 * z * z - 1),
        1.092548 * x * z,
        0.546274 * (x * x - y * y),
    )


def _sphere_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Directions [3, h, w] and solid angles [h, w] of an equirectangular picture's pixels."""
    theta = (torch.arange(height, device=device) + 0.5) * (torch.pi / height)
    phi = (torch.arange(width, device=device) + 0.5) * (2 * torch.pi / width)
    sine = theta.sin()[:, None]
    directions = torch.stack([sine * phi.cos(), sine * phi.sin(), theta.cos()[:, None].expand(height, width)])
    solid = (sine * (torch.pi / height) * (2 * torch.pi / width)).expand(height, width)
    return directions, solid


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


def spread_out(vectors: Tensor) -> Planes:
    """One vector an image, [B, 3], as planes [B, 1, 1]."""
    return vectors[:, 0, None, None], vectors[:, 1, None, None], vectors[:, 2, None, None]


def rotate(matrix: Tensor, vectors: Planes) -> Planes:
    """Turn every vector of an image by that image's matrix [B, 3, 3]."""
    x, y, z = (dot(spread_out(matrix[:, row]), vectors) for row in range(3))
    return x, y, z


def sample_environment(maps: Tensor, directions: Planes) -> Tensor:
    """Equirectangular maps [B, C, h, w] in unit directions of their frame -> [B, C, H, W]."""
    x, y, z = directions
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


def mirror(
    normal: Planes, view: Planes, roughness: Tensor, reflection: Tensor, scene: dict[str, Tensor]
) -> Planes:
    """Radiance that a surface of that roughness mirrors towards `view`; without a normal (0), what is behind.

    reflection [E, L * 3, h, w] as in Environments.
    """
    twice = 2 * dot(normal, view).clamp(min=1e-3)
    x, y, z = (twice * n - v for n, v in zip(normal, view, strict=True))
    maps = reflection[scene["environment"][:, 0].long()]
    levels = sample_environment(maps, rotate(scene["R_EC"], (x, y, z)))
    low, mid, high = REFLECTION_ROUGHNESS
    first = ((roughness - low) / (mid - low)).clamp(0, 1)
    second = ((roughness - mid) / (high - mid)).clamp(0, 1)
    red, green, blue = (
        torch.lerp(torch.lerp(levels[:, c], levels[:, c + 3], first), levels[:, c + 6], second)
        for c in range(3)
    )
    return red, green, blue


def ambient_light(normal: Planes, irradiance: Tensor, scene: dict[str, Tensor]) -> Planes:
    """Irradiance over pi that the environment sends onto the surface; irradiance [E, 9, 3]."""
    moments = irradiance[scene["environment"][:, 0].long()][..., None, None]  # [B, 9, 3, 1, 1]
    basis = _harmonics(*rotate(scene["R_EC"], normal))
    colours = []
    for c in range(3):
        total = moments[:, 0, c] * _SH_0
        for k, harmonic in enumerate(basis):
            total = total + moments[:, k + 1, c] * harmonic
        colours.append(total.clamp(min=0))
    return colours[0], colours[1], colours[2]


def shade(
    albedo: Planes,
    normal: Planes,
    view: Planes,
    material: Planes,
    ambient: Planes,
    mirrored: Planes,
    scene: dict[str, Tensor],
    shadow: Tensor,
    ambient_shadow: Tensor,
) -> Planes:
    """Radiance that the surface sends to the camera, linear.

    albedo: linear; normal, view: unit, camera frame, view towards the camera; material: roughness,
    metalness, specular level; ambient, mirrored: from `ambient_light` and `mirror`; shadow of the main light
    and of the sky [B, H, W], 1 where lit.
    """
    roughness, metalness, specular = material
    sky = scene["environment"][:, 1, None, None] * ambient_shadow
    towards = dot(normal, view)
    facing = towards.clamp(min=1e-3)
    # Split-sum environment BRDF, analytic fit (Karis 2014, "Physically based shading on mobile").
    r0 = 1 - roughness
    grow = torch.minimum(r0 * r0, torch.exp2(-9.28 * facing)) * r0 + 0.0425 - 0.0275 * roughness
    scale = (-1.04 * grow + 1.04 - 0.572 * roughness).clamp(min=0)
    edge = specular.clamp(max=1)  # reflectance at grazing angles
    bias = ((1.04 * grow - 0.04 + 0.022 * roughness) * edge).clamp(min=0)
    f0 = [torch.lerp(0.04 * specular, a, metalness) for a in albedo]
    diffuse = [a * (1 - metalness) for a in albedo]
    out = [(diffuse[c] * ambient[c] + (f0[c] * scale + bias) * mirrored[c]) * sky for c in range(3)]
    alpha = (roughness * roughness).clamp(min=0.02)
    alpha2 = alpha * alpha
    geometry = alpha * 0.5  # Schlick's k for analytic lights
    masked_view = facing * (1 - geometry) + geometry
    for k in range(scene["light_direction"].shape[1]):
        direction = spread_out(scene["light_direction"][:, k])
        colour = spread_out(scene["light_colour"][:, k])
        cosine, apart = dot(normal, direction), dot(view, direction)
        lambert = cosine.clamp(min=0)
        # The half vector h = (v + l) / |v + l|, where |v + l|^2 = 2 + 2 v . l for unit vectors.
        shrink = (2 + 2 * apart).clamp(min=1e-6).rsqrt()
        n_half = ((towards + cosine) * shrink).clamp(min=0)
        v_half = ((1 + apart) * shrink).clamp(0, 1)
        # GGX distribution, Smith-Schlick visibility, Schlick Fresnel (Walter et al. 2007; Karis 2013).
        lobe = n_half * n_half * (alpha2 - 1) + 1
        peak = 0.25 * alpha2 / (lobe * lobe * (lambert * (1 - geometry) + geometry) * masked_view)
        miss = 1 - v_half
        fifth = (miss * miss) * (miss * miss) * miss
        strength = lambert * shadow if k == 0 else lambert * ambient_shadow
        for c in range(3):
            fresnel = f0[c] + (edge - f0[c]).clamp(min=0) * fifth
            out[c] = out[c] + (diffuse[c] + (fresnel * peak).clamp(max=8.0)) * (strength * colour[c])
    return out[0], out[1], out[2]


def shadow_moments(light: Tensor, scene: dict[str, Tensor]) -> Tensor:
    """[B, MAPS, 2, S, S] blurred depth and squared depth of the light views [B, MAPS, S, S], depth 0..1."""
    depth = _fill_with_plane(light * 2 - 1, scene)
    moments = torch.stack([depth, depth.square()], dim=2)
    taps = gaussian(scene["light_softness"].flatten().clamp(0.3, SHADOW_REACH / 2), SHADOW_REACH)
    blurred = separable(pad(moments.flatten(0, 1), SHADOW_REACH), taps)
    return blurred.unflatten(0, light.shape[:2])


def shadows(moments: Tensor, points: Planes, scene: dict[str, Tensor]) -> list[Tensor]:
    """Share of each light view that reaches camera points, [B, H, W] each.

    Variance shadow maps (Donnelly & Lauritzen 2006): a blurred map of depth and its square bounds the share
    of occluders nearer than the point (Chebyshev), at one look-up a pixel.
    """
    shares = []
    for k in range(moments.shape[1]):
        view = scene["light_view"][:, k, ..., None, None]  # [B, 3, 4, 1, 1]
        x, y, along = (dot(view[:, row].unbind(dim=1), points) + view[:, row, 3] for row in range(3))
        looked = F.grid_sample(
            moments[:, k],
            torch.stack([x, y], dim=-1),
            mode="bilinear",
            padding_mode="border",
            align_corners=False,
        )
        mean, square = looked.unbind(dim=1)
        # One texel across is a quarter of that in the depth unit along; the bias follows the blur.
        bias = 0.004 + 0.25 * scene["light_softness"][:, k, None, None] / moments.shape[-1]
        behind = along - mean - bias
        variance = (square - mean * mean).clamp(min=2e-6)
        lit = torch.where(behind > 0, variance / (variance + behind * behind), 1.0)
        lit = ((lit - 0.25) / 0.75).clamp(0, 1)
        # Of what lies beside its map a view knows nothing.
        lit = torch.where((x.abs() < 1) & (y.abs() < 1), lit, 1.0)
        shares.append(1 - (1 - lit) * scene["light_strength"][:, k, None, None])
    return shares


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


def surroundings(depth: Tensor, most: float = 4.0) -> list[Tensor]:
    """Mean depths [B, 1, h, w] around each point at a quarter of the size, over two widths."""
    small = F.avg_pool2d(_deep(depth, most)[:, None], 4)
    return [
        F.avg_pool2d(small, size, stride=1, padding=size // 2, count_include_pad=False) for size in (5, 15)
    ]


def screen_occlusion(
    depth: Tensor, around: Sequence[Tensor], scene: dict[str, Tensor], most: float = 4.0
) -> Tensor:
    """[B, H, W] darkening of points that lie deeper than what is around them, 1 where open.

    The classic depth unsharp mask (Luft et al. 2006), limited to the reach so that far things cast none.
    depth [B, H, W] metres, 0 where there is nothing; around: its `surroundings`.
    """
    strength, reach = scene["occlusion"][:, :, None, None].unbind(dim=1)
    deep, size = _deep(depth, most), depth.shape[-2:]
    dark = torch.zeros_like(deep)
    for mean in around:
        gap = deep - F.interpolate(mean, size, mode="bilinear", align_corners=False)[:, 0]
        dark = dark + 0.5 * (gap / reach).clamp(0, 1)
    return 1 - strength * dark


def _deep(depth: Tensor, most: float) -> Tensor:
    return torch.where(depth > 0, depth.clamp(max=most), most)
