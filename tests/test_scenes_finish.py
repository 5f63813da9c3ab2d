"""Restructured light and camera against plain formulas: scipy's filters, numpy loops, torch's samplers."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from scipy.fft import dctn, idctn
from torch import Tensor

from smope.scenes import compose as composing
from smope.scenes import degrade
from smope.scenes.compose import TextureBank, bilinear, compose, find_surface, visibility
from smope.scenes.config import SceneConfig
from smope.scenes.degrade import CameraDraw, blur, blur_kernels, photograph
from smope.scenes.filters import gaussian, pad, separable, summed
from smope.scenes.fuse import Fused
from smope.scenes.jpeg import coding_tables, recode
from smope.scenes.layout import MAPS, scene_fields
from smope.scenes.light import Environments, screen_occlusion, shade, surroundings

CPU = torch.device("cpu")
CONFIG = SceneConfig(width=48, height=32, fx=40.0, fy=41.0, cx=23.3, cy=15.8, shadow_size=32)


def random(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def made_scene(batch: int, config: SceneConfig = CONFIG, seed: int = 0) -> dict[str, Tensor]:
    """Scenes over a table that is seen from above, all numbers at random but the geometry sensible."""
    rng = np.random.default_rng(seed)
    scene = {
        name: torch.from_numpy(rng.uniform(0.2, 0.8, (batch, *shape)).astype(np.float32))
        for name, shape in scene_fields(config).items()
    }
    scene["K"] = torch.tensor([[40.0, 0.1, 23.3], [0, 41, 15.8], [0, 0, 1]]).repeat(batch, 1, 1)
    scene["table"] = torch.ones(batch)
    normal = torch.tensor([0.1, -0.75, -0.6])
    normal /= normal.norm()
    scene["plane"] = torch.cat([normal, torch.tensor([-0.6])]).repeat(batch, 1)
    side = torch.linalg.cross(normal, torch.tensor([0.0, 0.0, 1.0]))
    side /= side.norm()
    scene["P_C"][:] = torch.cat([torch.stack([side, torch.linalg.cross(normal, side)]), torch.zeros(2, 1)], 1)
    scene["P_C"][:, 1, 3] = 0.6
    for k in range(config.layers):
        angle, half = rng.uniform(0, 6), rng.uniform(0.1, 0.7)
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]]) / half
        place = np.column_stack([turn, rng.normal(0, 0.4, 2)]).astype(np.float32)
        scene["layer_extent"][:, k] = scene["layer_uv"][:, k] = torch.from_numpy(place)
    scene["layer_texture"] = torch.from_numpy(rng.integers(0, 4, (batch, config.layers))).float()
    scene["background"][:, 0] = 2.0
    scene["background"][:, 3] = torch.tensor([0.0, 1.0]).repeat(batch)[:batch]
    scene["environment"][:, 0] = 0.0
    scene["R_EC"] = torch.linalg.qr(torch.randn(batch, 3, 3, generator=random(1)))[0]
    scene["light_direction"] = F.normalize(scene["light_direction"] - 0.5, dim=-1)
    return scene


def made_buffers(batch: int, config: SceneConfig = CONFIG) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Albedo, normal, depth and light views of a few rectangles of colour."""
    height, width, size = config.height, config.width, config.shadow_size
    albedo = torch.randint(0, 256, (batch, height, width, 4), generator=random(2)).byte()
    albedo[..., 3] = 0
    albedo[:, 4:20, 6:20, 3], albedo[:, 10:30, 25:40, 3] = 3, 12
    depth = torch.where(albedo[..., 3] > 0, 0.9, 0.0)
    normal = torch.randint(0, 256, (batch, height, width, 4), generator=random(3)).byte()
    return albedo, normal, depth, torch.rand(batch, MAPS, size, size, generator=random(4))


def made_bank(flat: bool = False) -> TextureBank:
    """Four textures, at random or each of one colour."""
    parts = [torch.randint(0, 256, (4, 3, *size), generator=random(5)) for size in ((48, 64), (6, 8))]
    if flat:
        parts = [parts[0][:, :, :1, :1].expand_as(part) for part in parts]
    packed = [part[:, 0] + 256 * part[:, 1] + 65536 * part[:, 2] for part in parts]
    environments = Environments.build(np.ones((1, 16, 32, 3), dtype=np.float16), CPU)
    return TextureBank(packed[0].int(), packed[1].int(), environments)


def unpacked(pictures: Tensor) -> Tensor:
    """[T, 3, h, w] in 0..255."""
    return torch.stack([pictures // 256**k % 256 for k in range(3)], dim=1).float()


def sampled(pictures: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)


def test_separable_filters_are_scipys() -> None:
    images = torch.rand(3, 2, 14, 19, generator=random(0))
    sigma = torch.tensor([0.4, 1.1, 2.0])
    given = pad(images, 5), gaussian(sigma, 5)
    got, on_cuda = separable(*given), summed(*given)
    for k in range(3):
        for c in range(2):
            expected = ndimage.gaussian_filter(
                images[k, c].numpy(), sigma[k].item(), radius=5, mode="nearest"
            )
            np.testing.assert_allclose(got[k, c].numpy(), expected, atol=1e-6)
            np.testing.assert_allclose(on_cuda[k, c].numpy(), expected, atol=1e-6)


def test_each_picture_is_blurred_by_its_own_motion() -> None:
    config = SceneConfig(motion_probability=0.5, defocus_probability=0.5)
    camera = CameraDraw.sample((3, 1), 8, config, CPU)
    moving = camera.moving.tolist()
    assert 0 < len(moving) < 8
    images = torch.rand(8, 3, 20, 24, generator=random(1))
    got = blur(pad(images, 5), camera).numpy()
    for k in range(8):
        for c in range(3):
            picture = images[k, c].numpy()
            if k in moving:
                kernel = camera.motion[moving.index(k)].numpy()
                expected = ndimage.correlate(picture, kernel, mode="nearest")
            else:
                sigma = max(camera.blur_sigma[k].item(), 0.2)
                expected = ndimage.gaussian_filter(picture, sigma, radius=5, mode="nearest")
            np.testing.assert_allclose(got[k, c], expected, atol=2e-6)


def test_without_motion_a_kernel_is_the_gaussian_of_the_rest() -> None:
    sigma = np.array([0.35, 1.05, 2.0])
    whole = blur_kernels(sigma, np.zeros(3), np.ones(3))
    taps = gaussian(torch.from_numpy(sigma), 5).numpy()
    np.testing.assert_allclose(whole, taps[:, :, None] * taps[:, None, :], atol=1e-12)


def test_a_batch_in_which_nothing_moved() -> None:
    camera = CameraDraw.sample((1,), 2, SceneConfig(motion_probability=0.0), CPU)
    radiance = torch.rand(2, 3, 32, 40, generator=random(0))
    assert torch.isfinite(photograph(radiance, camera, random(1))).all()


def test_look_ups_are_grid_samples() -> None:
    bank = made_bank()
    x, y = (torch.rand(2, 2, 9, 11, generator=random(6)) * 7 - 3.5).unbind(dim=0)
    which = torch.randint(0, 4, (2, 9, 11), generator=random(7)).int()
    got = torch.stack(bilinear(bank.pictures, which, x, y), dim=1)
    grid = torch.stack([x, y], dim=-1)
    every = [sampled(picture.expand(2, -1, -1, -1), grid) for picture in unpacked(bank.pictures)]
    expected = torch.stack(every).gather(0, which.long()[None, :, None].expand(1, 2, 3, 9, 11))[0]
    torch.testing.assert_close(got, expected, atol=2e-2, rtol=0)  # of 255; places of a few hundred texels


def topmost(scene: dict[str, Tensor], drawn: np.ndarray, depth: np.ndarray) -> tuple[np.ndarray, ...]:
    """Layer (-1: none) and its depth at each pixel of the first image, one pixel after another."""
    numbers = {name: value[0].double().numpy() for name, value in scene.items()}
    inverse = np.linalg.inv(numbers["K"])
    layer, found = np.full(drawn.shape, -1), np.zeros(drawn.shape)
    margin = np.full(drawn.shape, np.inf)  # to the nearest edge: rounding may decide there
    for v, u in np.ndindex(*drawn.shape):
        ray = inverse @ [u, v, 1.0]
        away = numbers["plane"][3] / (numbers["plane"][:3] @ ray)
        if not 0.05 < away < 12 or (drawn[v, u] and depth[v, u] <= away):
            continue
        place = np.append(numbers["P_C"][:, :3] @ (ray * away) + numbers["P_C"][:, 3], 1.0)
        for k in range(len(numbers["layer_extent"])):
            reach = np.abs(numbers["layer_extent"][k] @ place).max()
            margin[v, u] = min(margin[v, u], abs(reach - 1))
            if reach <= 1:
                layer[v, u], found[v, u] = k, away
    return layer, found, margin


def test_the_topmost_layer_is_seen() -> None:
    scene = made_scene(1)
    albedo, _, depth, _ = made_buffers(1)
    found, kind, material = find_surface(
        albedo.view(torch.int32)[..., 0], depth, scene, CONFIG.plane_material
    )
    drawn = albedo[0, ..., 3].numpy()
    layer, away, margin = topmost(scene, drawn, depth[0].numpy())
    clear = margin > 1e-4
    assert clear.mean() > 0.99
    assert len(np.unique(layer)) > 3
    assert ((layer >= 0) & (drawn > 0)).any()
    expected = np.where(layer >= 0, layer + 2, drawn > 0)
    np.testing.assert_array_equal(kind[0].numpy()[clear], expected[clear])
    on_plane = np.where(layer >= 0, CONFIG.plane_material, drawn)
    np.testing.assert_array_equal(material[0].numpy()[clear], on_plane[clear])
    metres = np.where(layer >= 0, away, depth[0].numpy())
    np.testing.assert_allclose(found[0].numpy()[clear], metres[clear], rtol=1e-4)


def test_sheets_and_background_have_their_colours() -> None:
    """Under an even sky, without lights, shadow or gloss, a sheet sends its albedo; behind lies the photo."""
    scene = made_scene(2, seed=3)
    scene["table"][1] = 0
    scene["light_colour"].zero_()
    scene["light_strength"].zero_()
    scene["occlusion"][:, 0] = 0
    scene["materials"][..., 1:] = 0
    scene["environment"][:, 1] = 1
    scene["background"][:, 3] = 0
    bank, buffers = made_bank(flat=True), made_buffers(2)
    radiance = compose(*buffers, scene, bank, CONFIG).radiance.numpy()
    colours = unpacked(bank.pictures)[:, :, 0, 0].double().numpy() / 255
    albedo, _, depth, _ = (buffer.numpy() for buffer in buffers)
    layer, _, margin = topmost(scene, albedo[0, ..., 3], depth[0])
    seen = 0
    for v, u in zip(*np.nonzero((layer >= 0) & (margin > 1e-4)), strict=True):
        texture = int(scene["layer_texture"][0, layer[v, u]])
        gain = scene["layer_gain"][0, layer[v, u]].numpy()
        expected = np.minimum(colours[texture] ** 2.2 * gain, 0.95)
        np.testing.assert_allclose(radiance[0, :, v, u], expected, atol=6e-3)
        seen += 1
    assert seen > 100
    behind = albedo[1, ..., 3] == 0
    expected = np.broadcast_to(
        (colours[2] ** 2.2 * scene["background"][1, 1].item())[:, None], (3, behind.sum())
    )
    np.testing.assert_allclose(radiance[1][:, behind], expected, atol=1e-4)


def test_the_background_is_placed_as_affine_grid_places_it() -> None:
    scene, bank = made_scene(2, seed=4), made_bank()
    scene["table"].zero_()
    scene["background"][:, 3] = 0
    scene["background_uv"] = torch.tensor(
        [[[-0.7, 0.2, 0.3], [0.1, 0.6, -0.4]], [[0.9, 0, 0.5], [0, 0.5, 0]]]
    )
    albedo, normal, depth, light = made_buffers(2)
    albedo[..., 3] = 0
    got = compose(albedo, normal, torch.zeros_like(depth), light, scene, bank, CONFIG).radiance
    grid = F.affine_grid(scene["background_uv"], [2, 3, CONFIG.height, CONFIG.width], align_corners=False)
    sharp, soft = (
        sampled(unpacked(pictures)[2].expand(2, -1, -1, -1) / 255, grid)
        for pictures in (bank.pictures, bank.small)
    )
    mixed = torch.lerp(sharp, soft, scene["background"][:, 2, None, None, None])
    torch.testing.assert_close(
        got, mixed**2.2 * scene["background"][:, 1, None, None, None], atol=1e-4, rtol=0
    )


def test_gloss_is_that_of_the_half_vector() -> None:
    """GGX, Smith-Schlick, Schlick of one light, written with the half vector itself."""
    rng = np.random.default_rng(5)
    normal, view, light = rng.normal(size=(3, 3, 200))
    normal, view, light = (x / np.linalg.norm(x, axis=0) for x in (normal, view, light[:, :1]))
    rough, metal, level = rng.uniform(0.2, 1, 200), rng.uniform(0, 1, 200), rng.uniform(0, 1.2, 200)
    albedo = rng.uniform(0, 1, (3, 200))

    def planes(x: np.ndarray) -> Any:
        return tuple(torch.from_numpy(row).float().view(1, 1, -1) for row in x)

    scene = {
        "environment": torch.tensor([[0.0, 1.0]]),
        "light_direction": torch.from_numpy(light.T).float()[None],
        "light_colour": torch.tensor([[[1.0, 0.8, 0.5]]]),
    }
    dark, one = planes(np.zeros((3, 200))), torch.ones(1, 1, 200)
    material = planes(np.stack([rough, metal, level]))
    out = shade(planes(albedo), planes(normal), planes(view), material, dark, dark, scene, one, one)

    half = view + light
    half /= np.linalg.norm(half, axis=0)
    n_l, n_v = np.maximum((normal * light).sum(0), 0), np.maximum((normal * view).sum(0), 1e-3)
    n_h, v_h = np.maximum((normal * half).sum(0), 0), np.clip((view * half).sum(0), 0, 1)
    alpha = np.maximum(rough**2, 0.02)
    distribution = alpha**2 / ((n_h**2) * (alpha**2 - 1) + 1) ** 2
    k = alpha / 2
    visible = 0.25 / ((n_l * (1 - k) + k) * (n_v * (1 - k) + k))
    f0 = 0.04 * level * (1 - metal) + albedo * metal
    fresnel = f0 + np.maximum(np.minimum(level, 1) - f0, 0) * (1 - v_h) ** 5
    gloss = np.minimum(fresnel * distribution * visible, 8)
    expected = (albedo * (1 - metal) + gloss) * n_l * np.array([1.0, 0.8, 0.5])[:, None]
    np.testing.assert_allclose(torch.stack(out)[:, 0, 0].numpy(), expected, rtol=2e-3, atol=2e-4)


def test_occlusion_is_depth_against_its_mean() -> None:
    depth = torch.rand(1, 32, 48, generator=random(8)) * 0.1 + 0.5
    depth[:, 10:20, 12:30] = 0.0
    scene = {"occlusion": torch.tensor([[0.4, 0.05]])}
    got = screen_occlusion(depth, surroundings(depth), scene)[0].numpy()
    deep = np.where(depth[0] > 0, depth[0], 4.0).astype(np.float64)
    small = deep.reshape(8, 4, 12, 4).mean(axis=(1, 3))
    v, u = np.mgrid[:32, :48]
    dark = np.zeros_like(deep)
    for size in (5, 15):
        share = ndimage.uniform_filter(np.ones_like(small), size, mode="constant")
        mean = ndimage.uniform_filter(small, size, mode="constant") / share
        around = ndimage.map_coordinates(
            mean, [(v + 0.5) / 4 - 0.5, (u + 0.5) / 4 - 0.5], order=1, mode="nearest"
        )
        dark += 0.5 * np.clip((deep - around) / 0.05, 0, 1)
    np.testing.assert_allclose(got, 1 - 0.4 * dark, atol=2e-4)


def test_jpeg_blocks_are_scipys_cosine_transform() -> None:
    """A grey picture has no chroma: its luma blocks are rounded in the DCT domain, and that is all."""
    grey = torch.rand(1, 1, 32, 32, generator=random(9)).expand(1, 3, -1, -1)
    luma, chroma, transform = coding_tables(torch.tensor([50.0]))
    assert luma[0, :3].tolist() == [16, 11, 10]  # T.81, table K.1, as it stands at quality 50
    got = recode(grey, luma, chroma, transform)[0, 0].double().numpy()
    steps = luma[0].view(8, 8).double().numpy()
    picture = grey[0, 0].double().numpy() * 255 - 128
    for i, j in np.ndindex(4, 4):
        block = picture[i * 8 : i * 8 + 8, j * 8 : j * 8 + 8]
        coded = np.round(dctn(block, norm="ortho") / steps) * steps
        expected = np.clip((idctn(coded, norm="ortho") + 128) / 255, 0, 1)
        np.testing.assert_allclose(got[i * 8 : i * 8 + 8, j * 8 : j * 8 + 8], expected, atol=1e-4)


def finish(batch: int) -> tuple[Tensor, ...]:
    scene = made_scene(batch)
    composed = compose(*made_buffers(batch), scene, made_bank(), CONFIG)
    camera = CameraDraw.sample((2, 3), batch, CONFIG, CPU)
    image = photograph(composed.radiance, camera, random(10))
    tiles = torch.ones(batch, CONFIG.max_targets, 64, 64, dtype=torch.bool)
    share = visibility(composed.material, tiles, torch.tensor([0.0, 0, 20, 20]).expand(batch, 8, 4))
    return composed.radiance, composed.depth, composed.material, image, share


@torch.no_grad()
def test_every_fused_function_is_one_graph_with_the_same_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, ran = finish(2), []

    def traced(function: Callable[..., Any]) -> Callable[..., Any]:
        whole = torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

        def call(*args: Any) -> Any:
            ran.append(function.__name__)
            return whole(*args)

        return call

    for module in (composing, degrade):
        for name, value in list(vars(module).items()):
            if isinstance(value, Fused):
                monkeypatch.setattr(module, name, traced(value.eager))
    for given, expected in zip(finish(2), eager, strict=True):
        torch.testing.assert_close(given, expected, atol=1e-6, rtol=1e-5)
    assert sorted(ran) == [
        "count_pixels", "expose", "find_surface", "paint", "read_out", "tone", "write_out"
    ]  # fmt: skip


class OnCuda(Tensor):
    """Says that it is on CUDA."""

    is_cuda = True


def test_what_does_not_compile_runs_eagerly_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(function: object, **_: object) -> Callable[..., None]:
        def fail(*_: object) -> None:
            raise RuntimeError("no C compiler found")

        return fail

    monkeypatch.setattr(torch, "compile", no_compiler)
    double = Fused(lambda x: x * 2)
    monkeypatch.setattr(double, "_given_up", False)
    numbers = torch.ones(3).as_subclass(OnCuda)
    with caplog.at_level(logging.WARNING):
        assert double(numbers).tolist() == [2, 2, 2]
        assert double(numbers).tolist() == [2, 2, 2]
    assert [record.getMessage().count("no C compiler found") for record in caplog.records] == [1]
