"""From linear light to the picture a cheap camera writes: lens, exposure, sensor, tone, sharpening, JPEG."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smope.scenes.config import SceneConfig
from smope.scenes.filters import convolve, gaussian, pad, separable
from smope.scenes.fuse import fused
from smope.scenes.jpeg import coding_tables, recode

REACH = 5  # pixels each way of the blur kernel
SHARPEN_REACH = 2


@dataclass(frozen=True, eq=False)
class CameraDraw:
    """One camera an image, all [B] unless said."""

    brightness: Tensor  # mean of the sRGB picture aimed at
    white: Tensor  # [B, 3] gains
    glare: Tensor  # light added everywhere, share of full scale
    vignette: Tensor  # share of light lost in the corners
    blur_sigma: Tensor  # pixels: focus and the pixel's own extent
    blur_power: Tensor  # whose root of the light is what blurs
    moving: Tensor  # [M] int64, the pictures that moved while exposed
    motion: Tensor  # [M, 11, 11] kernels of theirs, focus included
    read_noise: Tensor  # standard deviations, share of full scale
    shot_noise: Tensor
    chroma_noise: Tensor  # share of the noise that differs between the colours
    gamma: Tensor
    spread: Tensor  # standard deviation of the sRGB picture aimed at
    toe: Tensor  # levels below and above which the tone curve bends
    shoulder: Tensor
    black: Tensor  # added black level
    saturation: Tensor
    sharpen: Tensor  # amount of unsharp masking
    sharpen_sigma: Tensor  # pixels
    quality: Tensor  # JPEG, 0 for none
    erase: Tensor  # [B, 5] x0, y0, x1, y1 as shares of the image, and the grey put there; x1 < x0 for none

    @classmethod
    def sample(
        cls, seed: tuple[int, ...], batch: int, config: SceneConfig, device: torch.device
    ) -> CameraDraw:
        rng = np.random.default_rng(seed)

        def log_uniform(low: float, high: float) -> np.ndarray:
            return np.exp(rng.uniform(np.log(low), np.log(high), batch))

        sigma = rng.uniform(*config.blur_sigma, batch)
        out_of_focus = rng.random(batch) < config.defocus_probability
        sigma = np.where(out_of_focus, rng.uniform(*config.defocus_sigma, batch), sigma)
        moving = rng.random(batch) < config.motion_probability
        length = rng.uniform(*config.motion_length, batch)
        warmth = rng.normal(config.warmth, config.warmth_spread, (batch, 1)) * np.array([1.0, 0.0, -1.0])
        warmth = warmth + rng.normal(0, 0.03, (batch, 3))
        brightness = np.clip(rng.normal(0.34, 0.08, batch), *config.exposure)
        erase = np.zeros((batch, 5))
        for k in np.nonzero(rng.random(batch) < config.erase_probability)[0]:
            x0, y0 = rng.uniform(-0.1, 0.9, 2)
            thin, long = rng.uniform(0.02, 0.12), rng.uniform(0.1, 1.0)
            w, h = (thin, long) if rng.random() < 0.5 else (long, thin)
            erase[k] = [x0, y0, x0 + w, y0 + h, rng.random()]
        values = {
            "brightness": brightness,
            "white": np.exp(warmth),
            "glare": rng.uniform(*config.glare, batch) * brightness**2.2,
            "vignette": rng.uniform(0, 0.35, batch),
            "blur_sigma": sigma,
            "blur_power": rng.uniform(*config.blur_power, batch),
            "motion": blur_kernels(sigma, length, rng.uniform(0, np.pi, batch))[moving],
            "read_noise": log_uniform(*config.noise),
            "shot_noise": log_uniform(*config.shot_noise),
            "chroma_noise": rng.uniform(0.2, 1.0, batch),
            "gamma": rng.uniform(1.9, 2.6, batch),
            "spread": np.clip(rng.normal(0.225, 0.045, batch), *config.spread),
            "toe": rng.uniform(*config.toe, batch),
            "shoulder": rng.uniform(*config.shoulder, batch),
            "black": rng.uniform(0, 0.04, batch),
            "saturation": rng.uniform(*config.saturation, batch),
            "sharpen": rng.uniform(*config.sharpen, batch),
            "sharpen_sigma": rng.uniform(0.7, 1.6, batch),
            "quality": np.where(
                rng.random(batch) < config.jpeg_probability, rng.uniform(*config.jpeg_quality, batch), 0.0
            ),
            "erase": erase,
        }
        tensors = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
        tensors["moving"] = torch.from_numpy(np.nonzero(moving)[0])
        return cls(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def blur_kernels(sigma: np.ndarray, length: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[B, 11, 11] Gaussians of `sigma` pixels drawn along lines of `length` pixels; they sum to 1."""
    taps = np.arange(-REACH, REACH + 1)
    y, x = np.meshgrid(taps, taps, indexing="ij")
    along = np.linspace(-0.5, 0.5, 9)[None, :] * length[:, None]  # [B, 9]
    dx = x[None, None] - (along * np.cos(angle[:, None]))[..., None, None]
    dy = y[None, None] - (along * np.sin(angle[:, None]))[..., None, None]
    kernel = np.exp(-0.5 * (dx**2 + dy**2) / np.maximum(sigma, 0.2)[:, None, None, None] ** 2).sum(axis=1)
    return kernel / kernel.sum(axis=(1, 2), keepdims=True)


def photograph(radiance: Tensor, camera: CameraDraw, generator: torch.Generator) -> Tensor:
    """Linear radiance [B, 3, H, W] to pictures in 0..1, sRGB, in steps of 1/255.

    What is done pixel by pixel is fused; means over a picture are not, since the order in which a compiler
    sums may change from run to run.
    """
    batch, _, height, width = radiance.shape
    white = torch.randn(
        (batch, 4, height, width), generator=generator, device=radiance.device, dtype=torch.float32
    )
    gain = exposure_gain(radiance, camera.brightness)[:, None] * camera.white
    power = camera.blur_power
    x = blur(expose(radiance, gain, camera.vignette, camera.glare, power), camera)
    x = read_out(x, white, camera.read_noise, camera.shot_noise, camera.chroma_noise, camera.gamma, power)
    middle, contrast = tone_statistics(x, camera.spread)
    look = (camera.brightness, middle, contrast, camera.saturation, camera.toe, camera.shoulder, camera.black)
    x = tone(x, *look)
    soft = separable(x, gaussian(camera.sharpen_sigma, SHARPEN_REACH))
    tables = coding_tables(camera.quality.clamp(min=30.0))
    return write_out(x, soft, camera.sharpen, camera.quality, tables, camera.erase)


def exposure_gain(radiance: Tensor, brightness: Tensor) -> Tensor:
    """[B] gains that bring the gamma-coded picture's mean to `brightness`, as automatic exposure does."""
    small = F.avg_pool2d(radiance, 8).mean(dim=1)
    coded = small.clamp(1e-6, 20.0).pow(1 / 2.2)
    gain = (brightness / coded.mean(dim=(1, 2)).clamp(min=1e-3)).pow(2.2)
    # The second look sees what clips.
    coded = (small * gain[:, None, None]).clamp(1e-6, 1.0).pow(1 / 2.2)
    return gain * (brightness / coded.mean(dim=(1, 2)).clamp(min=1e-3)).clamp(0.5, 2.0).pow(2.2)


@fused
def expose(radiance: Tensor, gain: Tensor, vignette: Tensor, glare: Tensor, power: Tensor) -> Tensor:
    """The `power`th root of the light on the sensor, padded by the blur's reach.

    gain [B, 3], vignette [B] the corners' loss, glare [B] what comes to every pixel, power [B].
    """
    light = radiance * (gain[:, :, None, None] * vignetting(vignette, *radiance.shape[-2:]))
    # Highlights spread before they clip, but not without bound.
    light = light.clamp(max=4.0) + glare[:, None, None, None]
    return pad(light.pow(1 / power[:, None, None, None]), REACH)


def vignetting(loss: Tensor, height: int, width: int) -> Tensor:
    """[B, 1, H, W] gain that falls with the square of the distance from the middle."""
    y = torch.linspace(-1, 1, height, device=loss.device)
    x = torch.linspace(-1, 1, width, device=loss.device)
    radius = (y[:, None].square() + x[None].square()) / 2
    return 1 - loss[:, None, None, None] * radius


def blur(padded: Tensor, camera: CameraDraw) -> Tensor:
    """Focus all of [B, 3, H + 10, W + 10]; those that moved are few, and their kernels not separable."""
    sharp = separable(padded, gaussian(camera.blur_sigma.clamp(min=0.2), REACH))
    if len(camera.moving):
        sharp.index_copy_(0, camera.moving, convolve(padded[camera.moving], camera.motion))
    return sharp


@fused
def read_out(
    x: Tensor, white: Tensor, read: Tensor, shot: Tensor, chroma: Tensor, gamma: Tensor, power: Tensor
) -> Tensor:
    """Shot and read noise, correlated over neighbours as demosaicing leaves it; then the gamma.

    x: the `power`th root of the light; white [B, 4, H, W]: standard normal numbers; the rest [B] as in
    CameraDraw.
    """
    # Colour is interpolated from every other pixel: its noise is twice as coarse as that of the luminance.
    colour = F.avg_pool2d(white[:, 1:], 3, stride=1, padding=1) * 3
    share = chroma[:, None, None, None]
    grain = white[:, :1] * (1 - share.square()).clamp(min=0).sqrt() + colour * (0.6 * share)
    x = x.clamp(0, 1).pow(power[:, None, None, None])
    level = read[:, None, None, None].square() + shot[:, None, None, None].square() * x.clamp(min=0)
    return (x + grain * level.sqrt()).clamp(1e-6, 1).pow(1 / gamma[:, None, None, None])


def tone_statistics(coded: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """[B] mean of gamma-coded pictures, and the contrast that brings their spread to `spread`."""
    small = F.avg_pool2d(coded, 8).mean(dim=1)
    contrast = (spread / small.std(dim=(1, 2)).clamp(min=1e-3)).clamp(0.7, 1.8)
    return small.mean(dim=(1, 2)), contrast


@fused
def tone(
    coded: Tensor,
    brightness: Tensor,
    middle: Tensor,
    contrast: Tensor,
    saturation: Tensor,
    toe: Tensor,
    shoulder: Tensor,
    black: Tensor,
) -> Tensor:
    """Contrast about the brightness aimed at, toe and shoulder, saturation, black level; padded by the
    sharpening's reach."""
    centred = (coded - middle[:, None, None, None]) * contrast[:, None, None, None]
    y = brightness[:, None, None, None] + centred
    y = 1 - bend(1 - bend(y, toe[:, None, None, None]), shoulder[:, None, None, None])
    grey = 0.299 * y[:, :1] + 0.587 * y[:, 1:2] + 0.114 * y[:, 2:]
    y = grey + (y - grey) * saturation[:, None, None, None]
    black = black[:, None, None, None]
    return pad((black + y.clamp(0, 1) * (1 - black)).clamp(0, 1), SHARPEN_REACH)


def bend(x: Tensor, knee: Tensor) -> Tensor:
    """x above the knee; below, a curve of slope exp(x / knee - 1) that goes to 0 and never reaches it."""
    knee = knee.clamp(min=1e-4)
    return x.clamp(min=knee) - knee + knee * torch.exp(torch.minimum(x, knee) / knee - 1)


@fused
def write_out(
    padded: Tensor,
    soft: Tensor,
    amount: Tensor,
    quality: Tensor,
    tables: tuple[Tensor, Tensor, Tensor],
    erase: Tensor,
) -> Tensor:
    """Unsharp masking, whose overshoot at edges is what such cameras show; JPEG; what is cut out; 8 bits."""
    inner = slice(SHARPEN_REACH, -SHARPEN_REACH)
    x = padded[..., inner, inner]
    x = (x + amount[:, None, None, None] * (x - soft)).clamp(0, 1)
    x = torch.where(quality[:, None, None, None] > 0, recode(x, *tables), x)
    return (cut_out(x, erase) * 255).round() / 255


def cut_out(x: Tensor, boxes: Tensor) -> Tensor:
    """Cover a rectangle of each picture with grey."""
    height, width = x.shape[-2:]
    v = (torch.arange(height, device=x.device) + 0.5) / height
    u = (torch.arange(width, device=x.device) + 0.5) / width
    x0, y0, x1, y1, grey = boxes.unbind(dim=1)
    across = (u >= x0[:, None]) & (u < x1[:, None])
    down = (v >= y0[:, None]) & (v < y1[:, None])
    inside = (down[:, :, None] & across[:, None, :])[:, None]
    return torch.where(inside, grey[:, None, None, None], x)
