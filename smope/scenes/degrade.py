"""From linear light to the picture a cheap camera writes: lens, exposure, sensor, tone, sharpening, JPEG."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smope.scenes.config import SceneConfig
from smope.scenes.jpeg import jpeg

REACH = 5  # pixels each way of the blur kernel


@dataclass(frozen=True, eq=False)
class CameraDraw:
    """One camera an image, all [B] unless said."""

    brightness: Tensor  # mean of the sRGB picture aimed at
    white: Tensor  # [B, 3] gains
    vignette: Tensor  # share of light lost in the corners
    blur: Tensor  # [B, 1, 11, 11] kernel of focus, motion and the pixel's own extent
    read_noise: Tensor  # standard deviations, share of full scale
    shot_noise: Tensor
    chroma_noise: Tensor  # share of the noise that differs between the colours
    gamma: Tensor
    spread: Tensor  # standard deviation of the sRGB picture aimed at
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
        length = np.where(moving, rng.uniform(*config.motion_length, batch), 0.0)
        warmth = rng.normal(0, 0.08, (batch, 1)) * np.array([1.0, 0.0, -1.0]) + rng.normal(
            0, 0.03, (batch, 3)
        )
        erase = np.zeros((batch, 5))
        for k in np.nonzero(rng.random(batch) < config.erase_probability)[0]:
            x0, y0 = rng.uniform(-0.1, 0.9, 2)
            thin, long = rng.uniform(0.02, 0.12), rng.uniform(0.1, 1.0)
            w, h = (thin, long) if rng.random() < 0.5 else (long, thin)
            erase[k] = [x0, y0, x0 + w, y0 + h, rng.random()]
        values = {
            "brightness": np.clip(rng.normal(0.34, 0.08, batch), *config.exposure),
            "white": np.exp(warmth),
            "vignette": rng.uniform(0, 0.35, batch),
            "blur": blur_kernels(sigma, length, rng.uniform(0, np.pi, batch)),
            "read_noise": log_uniform(*config.noise),
            "shot_noise": log_uniform(*config.shot_noise),
            "chroma_noise": rng.uniform(0.2, 1.0, batch),
            "gamma": rng.uniform(1.9, 2.6, batch),
            "spread": np.clip(rng.normal(0.225, 0.045, batch), *config.spread),
            "black": rng.uniform(0, 0.04, batch),
            "saturation": rng.uniform(0.8, 1.45, batch),
            "sharpen": rng.uniform(*config.sharpen, batch),
            "sharpen_sigma": rng.uniform(0.7, 1.6, batch),
            "quality": np.where(
                rng.random(batch) < config.jpeg_probability, rng.uniform(*config.jpeg_quality, batch), 0.0
            ),
            "erase": erase,
        }
        tensors = {name: torch.as_tensor(value, dtype=torch.float32) for name, value in values.items()}
        return cls(**{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})


def blur_kernels(sigma: np.ndarray, length: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """[B, 1, 11, 11] Gaussians of `sigma` pixels drawn along lines of `length` pixels; they sum to 1."""
    taps = np.arange(-REACH, REACH + 1)
    y, x = np.meshgrid(taps, taps, indexing="ij")
    along = np.linspace(-0.5, 0.5, 9)[None, :] * length[:, None]  # [B, 9]
    dx = x[None, None] - (along * np.cos(angle[:, None]))[..., None, None]
    dy = y[None, None] - (along * np.sin(angle[:, None]))[..., None, None]
    kernel = np.exp(-0.5 * (dx**2 + dy**2) / np.maximum(sigma, 0.2)[:, None, None, None] ** 2).sum(axis=1)
    return (kernel / kernel.sum(axis=(1, 2), keepdims=True))[:, None]


def photograph(radiance: Tensor, camera: CameraDraw, generator: torch.Generator) -> Tensor:
    """Linear radiance [B, 3, H, W] to pictures in 0..1, sRGB, in steps of 1/255."""
    height, width = radiance.shape[-2:]
    x = expose(radiance, camera.brightness)
    x = x * (camera.white[:, :, None, None] * vignetting(camera.vignette, height, width))
    # Highlights spread before they clip, but not without bound.
    x = blur(x.clamp(max=4.0), camera.blur)
    x = x.clamp(max=1.0) + sensor_noise(x, camera, generator)
    x = tone(x.clamp(0, 1), camera)
    x = sharpen(x, camera.sharpen, camera.sharpen_sigma).clamp(0, 1)
    coded = camera.quality > 0
    x = torch.where(coded[:, None, None, None], jpeg(x, camera.quality.clamp(min=30.0)), x)
    x = cut_out(x, camera.erase)
    return (x * 255).round_() / 255


def expose(radiance: Tensor, brightness: Tensor) -> Tensor:
    """Scale so that the gamma-coded picture's mean comes to `brightness`, as automatic exposure does."""
    small = F.avg_pool2d(radiance, 8).mean(dim=1)
    coded = small.clamp(1e-6, 20.0).pow(1 / 2.2)
    gain = (brightness / coded.mean(dim=(1, 2)).clamp(min=1e-3)).pow(2.2)
    # The second look sees what clips.
    coded = (small * gain[:, None, None]).clamp(1e-6, 1.0).pow(1 / 2.2)
    gain = gain * (brightness / coded.mean(dim=(1, 2)).clamp(min=1e-3)).clamp(0.5, 2.0).pow(2.2)
    return radiance * gain[:, None, None, None]


def vignetting(loss: Tensor, height: int, width: int) -> Tensor:
    """[B, 1, H, W] gain that falls with the square of the distance from the middle."""
    y = torch.linspace(-1, 1, height, device=loss.device)
    x = torch.linspace(-1, 1, width, device=loss.device)
    radius = (y[:, None].square() + x[None].square()) / 2
    return 1 - loss[:, None, None, None] * radius


def blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Convolve each picture of [B, 3, H, W] with its kernel [B, 1, k, k]."""
    batch, channels, height, width = x.shape
    flat = F.pad(x, (REACH,) * 4, mode="replicate").flatten(0, 1)[None]
    weight = kernel.repeat_interleave(channels, dim=0)
    return F.conv2d(flat, weight, groups=batch * channels).reshape(batch, channels, height, width)


def sensor_noise(x: Tensor, camera: CameraDraw, generator: torch.Generator) -> Tensor:
    """Shot and read noise, correlated over neighbours as demosaicing leaves it."""
    batch, _, height, width = x.shape
    white = torch.randn((batch, 4, height, width), generator=generator, device=x.device, dtype=torch.float32)
    # Colour is interpolated from every other pixel: its noise is twice as coarse as that of the luminance.
    colour = F.avg_pool2d(white[:, 1:], 3, stride=1, padding=1) * 3
    share = camera.chroma_noise[:, None, None, None]
    grain = white[:, :1] * (1 - share.square()).clamp(min=0).sqrt() + colour * (0.6 * share)
    level = (
        camera.read_noise[:, None, None, None].square()
        + camera.shot_noise[:, None, None, None].square() * x.clamp(0, 1)
    ).sqrt()
    return grain * level


def tone(x: Tensor, camera: CameraDraw) -> Tensor:
    """Gamma, contrast towards the spread and brightness aimed at, saturation, black level."""
    y = x.clamp(min=1e-6).pow(1 / camera.gamma[:, None, None, None])
    small = F.avg_pool2d(y, 8).mean(dim=1)
    middle, spread = small.mean(dim=(1, 2)), small.std(dim=(1, 2))
    contrast = (camera.spread / spread.clamp(min=1e-3)).clamp(0.7, 1.8)
    y = (
        camera.brightness[:, None, None, None]
        + (y - middle[:, None, None, None]) * contrast[:, None, None, None]
    )
    grey = (y * torch.tensor([0.299, 0.587, 0.114], device=y.device).view(1, 3, 1, 1)).sum(
        dim=1, keepdim=True
    )
    y = grey + (y - grey) * camera.saturation[:, None, None, None]
    black = camera.black[:, None, None, None]
    return (black + y.clamp(0, 1) * (1 - black)).clamp(0, 1)


def sharpen(x: Tensor, amount: Tensor, sigma: Tensor) -> Tensor:
    """Unsharp masking; the overshoot at edges is what such cameras show."""
    taps = torch.arange(-2, 3, device=x.device, dtype=x.dtype)
    kernel = torch.exp(-0.5 * (taps / sigma[:, None]).square())
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    batch, channels, height, width = x.shape
    weight = (kernel[:, :, None] * kernel[:, None, :]).repeat_interleave(channels, dim=0)[:, None]
    flat = F.pad(x, (2,) * 4, mode="replicate").flatten(0, 1)[None]
    soft = F.conv2d(flat, weight, groups=batch * channels).reshape(batch, channels, height, width)
    return x + amount[:, None, None, None] * (x - soft)


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
