"""The camera's lens and tone curve against integrals and plain sums, and what its draws promise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from scipy.integrate import quad
from scipy.stats import kstest

from smope.scenes import SceneConfig
from smope.scenes.degrade import REACH, SHARPEN_REACH, CameraDraw, bend, blur, expose, read_out, tone

CPU = torch.device("cpu")


def test_the_bend_is_the_integral_of_its_slope() -> None:
    levels = torch.linspace(-0.6, 1.2, 13, dtype=torch.float64)
    for knee in (0.03, 0.25):
        got = bend(levels, torch.tensor(knee, dtype=torch.float64))
        for level, value in zip(levels.tolist(), got.tolist(), strict=True):

            def slope(u: float, knee: float = knee) -> float:
                return float(np.exp(min(u / knee - 1, 0.0)))

            area = quad(slope, -np.inf, min(level, knee))[0] + max(level - knee, 0.0)
            assert value == pytest.approx(area, abs=1e-7)


def test_toe_and_shoulder_keep_levels_apart_and_none_clips() -> None:
    levels = torch.linspace(-0.3, 1.3, 33).expand(2, 3, 1, -1)
    none, one, half = torch.zeros(2), torch.ones(2), torch.full((2,), 0.5)
    knees = torch.tensor([0.0, 0.2])
    inner = slice(SHARPEN_REACH, -SHARPEN_REACH)
    got = tone(levels, half, half, one, one, knees, knees, none)[:, 0, SHARPEN_REACH, inner]
    torch.testing.assert_close(got[0], levels[0, 0, 0].clamp(0, 1), atol=1e-4, rtol=0)
    assert (got[1].diff() > 0).all()
    torch.testing.assert_close(got[1], 1 - got[1].flip(0))
    middle = (levels[0, 0, 0] >= 0.2) & (levels[0, 0, 0] <= 0.8)
    torch.testing.assert_close(got[1, middle], levels[0, 0, 0][middle])


def test_glare_is_light_on_every_pixel() -> None:
    generator = torch.Generator().manual_seed(2)
    radiance, glare = torch.rand(2, 3, 6, 8, generator=generator), torch.tensor([0.0, 0.02])
    got = expose(radiance, torch.full((2, 3), 0.5), torch.zeros(2), glare, torch.ones(2))
    inner = slice(REACH, -REACH)
    torch.testing.assert_close(got[..., inner, inner], radiance * 0.5 + glare[:, None, None, None])


def test_the_root_that_was_asked_for_is_what_blurs() -> None:
    """A bright bar before a dark ground: blurred light widens it, a blurred root of it less so."""
    camera = CameraDraw.sample((2, 1), 3, replace(SceneConfig(), motion_probability=0.0), CPU)
    powers = torch.tensor([1.0, 2.2, 3.0])
    camera = replace(camera, blur_sigma=torch.full((3,), 1.3), blur_power=powers)
    light = torch.full((12, 40), 0.02)
    light[:, 15:25] = 0.9
    still = torch.zeros(3)
    root = blur(expose(light.expand(3, 3, -1, -1), torch.ones(3, 3), still, still, powers), camera)
    got = read_out(root, torch.zeros(3, 4, 12, 40), still, still, still, torch.full((3,), 2.2), powers)
    widths = []
    for picture, power in zip(got[:, 0].double().numpy(), powers.tolist(), strict=True):
        blurred = ndimage.gaussian_filter(
            light.double().numpy() ** (1 / power), 1.3, radius=5, mode="nearest"
        )
        np.testing.assert_allclose(picture, blurred ** (power / 2.2), atol=1e-5)
        row = picture[6]
        widths.append((row > (row.min() + row.max()) / 2).sum() + (row - row.min()).sum() / np.ptp(row))
    assert widths[0] > widths[1] > widths[2]


def test_cameras_are_as_warm_as_asked_and_glare_goes_with_the_pictures_light() -> None:
    config = replace(SceneConfig(), warmth=0.1, warmth_spread=0.2, glare=(0.04, 0.04))
    camera = CameraDraw.sample((4, 1), 2000, config, CPU)
    red, green, blue = camera.white.double().log().unbind(dim=1)
    # Each gain has a deviation of 0.03 of its own besides.
    spread = (0.2**2 + 0.03**2 / 2) ** 0.5
    assert kstest(((red - blue) / 2).numpy(), "norm", (0.1, spread)).pvalue > 0.01
    assert kstest(green.numpy(), "norm", (0.0, 0.03)).pvalue > 0.01
    torch.testing.assert_close(camera.glare, 0.04 * camera.brightness**2.2)
