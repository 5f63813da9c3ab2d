"""Light, shadow, camera and JPEG against numeric integration, physics and PIL's encoder."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from smope.scenes.assets import build_assets
from smope.scenes.config import SceneConfig
from smope.scenes.degrade import CameraDraw, blur_kernels, cut_out, photograph
from smope.scenes.dress import light_view
from smope.scenes.filters import convolve, pad
from smope.scenes.jpeg import jpeg
from smope.scenes.light import (
    Environments,
    ambient_light,
    mirror,
    sample_environment,
    sh_basis,
    shade,
    shadow_moments,
    shadows,
)

CPU = torch.device("cpu")


def lit_by(lights: int = 1) -> dict[str, torch.Tensor]:
    return {
        "environment": torch.tensor([[0.0, 1.0]]),
        "R_EC": torch.eye(3)[None],
        "light_direction": F.normalize(torch.tensor([[[0.0, 0.0, -1.0]] * lights]), dim=-1),
        "light_colour": torch.zeros(1, lights, 3),
    }


def planes(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, y, z = vectors.unbind(dim=1)
    return x, y, z


def shaded(
    albedo: torch.Tensor,
    normal: torch.Tensor,
    view: torch.Tensor,
    scene: dict[str, torch.Tensor],
    environments: Environments,
    shadow: torch.Tensor,
) -> torch.Tensor:
    """[B, 3, H, W] of a rough dielectric without specular reflection."""
    one, zero = torch.ones_like(shadow), torch.zeros_like(shadow)
    facing, towards = planes(normal), planes(view)
    ambient = ambient_light(facing, environments.irradiance, scene)
    mirrored = mirror(facing, towards, one, environments.reflection, scene)
    material = (one, zero, zero)
    out = shade(planes(albedo), facing, towards, material, ambient, mirrored, scene, shadow, one)
    return torch.stack(out, dim=1)


def test_a_sun_brighter_than_16_bits_hold_leaves_the_map_finite_and_white(tmp_path: Path) -> None:
    sky = np.full((16, 32, 3), 0.5, np.float32)
    sky[4, 8] = 3e5
    (tmp_path / "hdri").mkdir()
    np.savez(tmp_path / "hdri" / "noon.npz", rgb=sky)
    read = build_assets([], [], tmp_path).environments
    made = Environments.build(read, CPU)
    assert np.isfinite(read).all()
    assert made.irradiance.isfinite().all()
    assert made.reflection.isfinite().all()
    colours = made.reflection[0].unflatten(0, (-1, 3))
    torch.testing.assert_close(colours, colours[:, :1].expand_as(colours))
    assert colours[0].max() > 2 * colours[0].median()  # and there is a sun


def sky(height: int = 32, width: int = 64) -> np.ndarray:
    """A smooth map, brighter and bluer above, warm on the +x side."""
    theta = (np.arange(height) + 0.5) / height * np.pi
    phi = (np.arange(width) + 0.5) / width * 2 * np.pi
    x = np.sin(theta)[:, None] * np.cos(phi)
    z = np.cos(theta)[:, None] * np.ones(width)
    return np.stack([1 + 0.6 * x, 1 + 0.3 * z, 1 + 0.7 * z], axis=-1).astype(np.float16)


def test_irradiance_agrees_with_numeric_integration() -> None:
    environments = Environments.build(sky()[None], CPU)
    n = F.normalize(torch.randn(1, 3, 50, generator=torch.Generator().manual_seed(0)), dim=1)
    got = (environments.irradiance.transpose(1, 2) @ sh_basis(n))[0].T.numpy()
    rng = np.random.default_rng(0)
    d = rng.normal(size=(200_000, 3))
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    radiance = np.stack([1 + 0.6 * d[:, 0], 1 + 0.3 * d[:, 2], 1 + 0.7 * d[:, 2]], axis=1)
    cosine = np.maximum(d @ n[0].numpy(), 0)  # [S, 50]
    expected = cosine.T @ radiance * (4 * np.pi / len(d)) / np.pi
    np.testing.assert_allclose(got, expected, atol=0.015)
    by_pixel = ambient_light(planes(n[..., None]), environments.irradiance, lit_by())
    np.testing.assert_allclose(torch.stack(by_pixel, dim=-1)[0, :, 0].numpy(), expected, atol=0.015)


def test_environment_is_read_where_it_was_written() -> None:
    maps = torch.zeros(1, 1, 16, 32)
    maps[0, 0, 2, 5] = 1  # theta = 2.5/16 pi, phi = 5.5/32 * 2 pi
    theta, phi = 2.5 / 16 * np.pi, 5.5 / 32 * 2 * np.pi
    there = torch.tensor([np.sin(theta) * np.cos(phi), np.sin(theta) * np.sin(phi), np.cos(theta)]).float()
    there = there.view(1, 3, 1, 1)
    assert sample_environment(maps, planes(there)).item() == pytest.approx(1, abs=1e-4)
    assert sample_environment(maps, planes(-there)).item() == pytest.approx(0, abs=1e-4)


def test_white_furnace() -> None:
    """A white diffuse surface under uniform light of 1 sends back 1, whichever way it faces."""
    environments = Environments.build(np.ones((1, 16, 32, 3), dtype=np.float16), CPU)
    normal = F.normalize(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(1)), dim=1)
    normal[:, 2] = -normal[:, 2].abs()
    view = torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    out = shaded(torch.ones(1, 3, 8, 8), normal, view, lit_by(), environments, torch.ones(1, 8, 8))
    np.testing.assert_allclose(out.numpy(), 1.0, atol=0.06)  # the specular fit's own error at level 0


def test_directional_light_follows_lambert_and_shadow() -> None:
    environments = Environments.build(np.ones((1, 16, 32, 3), dtype=np.float16), CPU)
    scene = lit_by()
    scene["environment"] = torch.tensor([[0.0, 0.0]])
    scene["light_colour"] = torch.full((1, 1, 3), 2.0)
    angles = torch.tensor([0.0, 0.5, 1.0, 1.4])
    normal = torch.stack([angles.sin(), torch.zeros(4), -angles.cos()])[None, :, None]
    view = torch.tensor([0.0, 0, -1]).view(1, 3, 1, 1).expand(1, 3, 1, 4)
    one, zero = torch.ones(1, 1, 4), torch.zeros(1, 1, 4)
    albedo = torch.full((1, 3, 1, 4), 0.5)
    out = shaded(albedo, normal, view, scene, environments, one)
    np.testing.assert_allclose(out[0, 0, 0].numpy(), np.cos(angles.numpy()), atol=2e-3)
    assert shaded(albedo, normal, view, scene, environments, zero).abs().max() == 0


def test_shadow_falls_away_from_the_light() -> None:
    """A ball at the middle, light from the left above: the plane is dark right of it, bright left of it."""
    light = torch.tensor([-1.0, -1.0, 0.0]) / 2**0.5  # camera frame, y down: up is -y
    view = light_view(light.double().numpy(), np.array([0.0, 0.0, 1.0]), 0.4)
    size = 128
    depth = np.ones((1, 1, size, size), dtype=np.float32)
    # The ball of 5 cm floats 12 cm over the plane y = 0.12.
    cells = (np.arange(size) + 0.5) * 2 / size - 1
    across, down = np.meshgrid(cells, cells)
    inside = across**2 + down**2 < (0.05 / 0.4) ** 2
    depth[0, 0][inside] = 0.5
    scene = {
        "light_view": torch.from_numpy(view).float()[None, None],
        "light_softness": torch.tensor([[1.0]]),
        "light_strength": torch.tensor([[1.0]]),
        "plane": torch.tensor([[0.0, -1.0, 0.0, -0.12]]),
        "table": torch.ones(1),
    }
    x = torch.tensor([0.12, -0.12, 0.30])  # straight along the light, the other side, beyond the shadow
    points = torch.stack([x, torch.full((3,), 0.12), torch.ones(3)])[None, :, None]
    lit = shadows(shadow_moments(torch.from_numpy(depth), scene), planes(points), scene)[0][0, 0]
    assert lit[0] < 0.2
    assert lit[1] > 0.95
    assert lit[2] > 0.95


def picture(seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    smooth = F.interpolate(torch.from_numpy(rng.random((1, 3, 12, 16))).float(), (96, 128), mode="bicubic")
    smooth[:, :, 30:60, 40:90] = torch.tensor([0.9, 0.2, 0.1]).view(1, 3, 1, 1)
    return (smooth.clamp(0, 1) * 255).round() / 255


@pytest.mark.parametrize("quality", [30, 60, 75, 90])
def test_jpeg_loses_what_pil_loses(quality: int) -> None:
    image = picture()
    array = (image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "JPEG", quality=quality, subsampling=2)
    reference = np.asarray(Image.open(buffer)).astype(np.float64)
    ours = jpeg(image, torch.tensor([float(quality)]))[0].permute(1, 2, 0).numpy() * 255

    def psnr(x: np.ndarray, y: np.ndarray) -> float:
        return float(10 * np.log10(255**2 / ((x - y) ** 2).mean()))

    assert psnr(ours, array) == pytest.approx(psnr(reference, array), abs=1.0)
    assert psnr(ours, reference) > psnr(
        reference, array
    )  # nearer to PIL's result than that is to the original


def test_jpeg_keeps_odd_sizes() -> None:
    image = torch.rand(2, 3, 37, 53, generator=torch.Generator().manual_seed(0))
    assert jpeg(image, torch.tensor([95.0, 60.0])).shape == image.shape


def test_blur_kernels_have_the_variance_asked_for() -> None:
    kernels = blur_kernels(np.array([1.2, 0.6]), np.array([0.0, 6.0]), np.array([0.0, np.pi / 2]))
    taps = np.arange(-5, 6)
    for kernel, (vx, vy) in zip(kernels, [(1.44, 1.44), (0.36, 0.36 + 6**2 / 12 * 1.25)], strict=True):
        assert kernel.sum() == pytest.approx(1)
        assert (kernel.sum(axis=0) * taps**2).sum() == pytest.approx(vx, rel=0.05)
        assert (kernel.sum(axis=1) * taps**2).sum() == pytest.approx(vy, rel=0.05)
    flat = torch.full((2, 3, 20, 20), 0.4)
    torch.testing.assert_close(convolve(pad(flat, 5), torch.from_numpy(kernels).float()), flat)


def test_photograph_is_repeatable_and_hits_its_exposure() -> None:
    config = SceneConfig(erase_probability=0.0)
    camera = CameraDraw.sample((1, 2), 4, config, CPU)
    radiance = torch.rand(4, 3, 64, 96, generator=torch.Generator().manual_seed(0)) ** 2 * 3
    first = photograph(radiance, camera, torch.Generator().manual_seed(5))
    again = photograph(radiance, camera, torch.Generator().manual_seed(5))
    torch.testing.assert_close(first, again, rtol=0, atol=0)
    assert first.min() >= 0
    assert first.max() <= 1
    np.testing.assert_allclose((first * 255).numpy(), (first * 255).round().numpy(), atol=1e-4)
    np.testing.assert_allclose(first.mean(dim=(1, 2, 3)).numpy(), camera.brightness.numpy(), atol=0.07)


def test_cut_out_covers_only_its_rectangle() -> None:
    image = torch.zeros(1, 3, 10, 20)
    covered = cut_out(image, torch.tensor([[0.25, 0.2, 0.5, 0.6, 0.7]]))
    expected = torch.zeros(10, 20)
    expected[2:6, 5:10] = 0.7
    torch.testing.assert_close(covered[0, 0], expected)
