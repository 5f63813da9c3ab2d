"""Procedural plane textures: marker boards, checkers, noise, wood-like grain, flat colours."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # [3, h, w]


def procedural_texture(rng: np.random.Generator, height: int, width: int) -> Image:
    """One random texture, sRGB."""
    kind = rng.choice(["flat", "noise", "grain", "checker", "print"], p=[0.06, 0.12, 0.22, 0.06, 0.54])
    if kind == "flat":
        picture = np.broadcast_to(_colour(rng)[:, None, None], (3, height, width)).copy()
    elif kind == "noise":
        low, high = _colour(rng), _colour(rng)
        blend = _noise(rng, height, width, octaves=8, slope=rng.uniform(0.2, 0.9))
        picture = low[:, None, None] + (high - low)[:, None, None] * blend
    elif kind == "grain":
        low = _colour(rng)
        high = low * rng.uniform(0.35, 0.9)
        waves = _noise(rng, height, max(width // 16, 8), octaves=8, slope=rng.uniform(0.1, 0.7))
        blend = np.repeat(waves, width // waves.shape[1] + 1, axis=1)[:, :width]
        picture = low[:, None, None] + (high - low)[:, None, None] * blend
    elif kind == "checker":
        cells = int(rng.integers(4, 24))
        y, x = np.mgrid[:height, :width]
        blend = ((y * cells // height + x * cells // width) % 2).astype(np.float64)
        low, high = _colour(rng), _colour(rng)
        picture = low[:, None, None] + (high - low)[:, None, None] * blend
    else:
        picture = _print(rng, height, width)
    picture = picture + rng.normal(0, rng.uniform(0, 0.03), (1, height, width))
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def marker_board(rng: np.random.Generator, height: int, width: int, middle: Image | None) -> Image:
    """A white board with a frame of black square markers and, inside, a picture or a colour."""
    white, black = rng.uniform(0.8, 1.0), rng.uniform(0.02, 0.15)
    picture = np.full((3, height, width), white)
    if middle is None:
        picture[:] = _colour(rng)[:, None, None]
    else:
        picture[:] = middle[:, :height, :width] / 255.0
    across, down = int(rng.integers(5, 13)), int(rng.integers(4, 11))
    cell_w, cell_h = width // across, height // down
    margin = rng.uniform(0.06, 0.16)
    everywhere = rng.random() < 0.35
    for row in range(down):
        for column in range(across):
            border = row in (0, down - 1) or column in (0, across - 1)
            if not (border or everywhere):
                continue
            top, left = row * cell_h, column * cell_w
            picture[:, top : top + cell_h, left : left + cell_w] = white
            y0, y1 = top + int(margin * cell_h), top + int((1 - margin) * cell_h)
            x0, x1 = left + int(margin * cell_w), left + int((1 - margin) * cell_w)
            picture[:, y0:y1, x0:x1] = black
            code = rng.random((5, 5)) < 0.5
            code[0] = code[-1] = code[:, 0] = code[:, -1] = False
            ys = np.linspace(y0, y1, 6).astype(int)
            xs = np.linspace(x0, x1, 6).astype(int)
            for i, j in np.argwhere(code):
                picture[:, ys[i] : ys[i + 1], xs[j] : xs[j + 1]] = white
    return (np.clip(picture, 0, 1) * 255).astype(np.uint8)


def _print(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float64]:
    """Something like a printed page: blocks of colour and lines of text-like dashes."""
    picture = np.broadcast_to(_colour(rng, bright=True)[:, None, None], (3, height, width)).copy()
    for _ in range(int(rng.integers(3, 9))):
        y0, x0 = int(rng.integers(0, height)), int(rng.integers(0, width))
        y1, x1 = y0 + rng.integers(height // 10, height // 2), x0 + rng.integers(width // 10, width // 2)
        picture[:, y0:y1, x0:x1] = _colour(rng)[:, None, None]
    for _ in range(int(rng.integers(2, 9))):
        size = int(rng.integers(3, 12))  # pixels of a letter
        y0, x0 = int(rng.integers(0, height * 3 // 4)), int(rng.integers(0, width * 3 // 4))
        rows, columns = int(rng.integers(2, 30)), int(rng.integers(6, 80))
        block = picture[:, y0 : y0 + 2 * size * rows, x0 : x0 + size * columns]
        inked = _letters(rng, block.shape[1], block.shape[2], size)
        if rng.random() < 0.15:  # a table
            y, x = np.indices(inked.shape)
            inked |= (y % (2 * size) == 0) | (x % (size * int(rng.integers(4, 12))) == 0)
        ink = _colour(rng) * 0.3 if rng.random() < 0.8 else _colour(rng, bright=True)
        block[:, inked] = ink[:, None]
    return picture


def _letters(rng: np.random.Generator, height: int, width: int, size: int) -> NDArray[np.bool_]:
    """Lines of text as it looks from afar: words of letters, each a few strokes on a 3 x 3 grid."""
    rows, columns = -(-height // (2 * size)), -(-width // size)
    strokes = rng.random((rows, 6, columns, 4)) < 0.62
    strokes[:, 3:] = strokes[..., 3] = False  # between lines, between letters
    words = rng.random((rows, 1, columns, 1)) < 0.83
    fine = (strokes & words).reshape(rows * 6, columns * 4)
    y, x = np.arange(height) * 6 // (2 * size), np.arange(width) * 4 // size
    return np.asarray(fine[y][:, x])


def _colour(rng: np.random.Generator, bright: bool = False) -> NDArray[np.float64]:
    level = rng.uniform(0.6, 1.0) if bright else rng.uniform(0.05, 0.95)
    spread = rng.choice([0.03, 0.12, 0.4], p=[0.4, 0.35, 0.25])
    return np.clip(level + rng.uniform(-spread, spread, 3), 0.02, 1.0)


def _noise(
    rng: np.random.Generator, height: int, width: int, octaves: int, slope: float
) -> NDArray[np.float64]:
    """Sum of bilinear value-noise octaves, scaled to 0..1."""
    total = np.zeros((height, width))
    for octave in range(octaves):
        cells = 2 ** (octave + 1)
        grid = rng.random((cells + 1, cells + 1))
        y, x = np.linspace(0, cells - 1e-6, height), np.linspace(0, cells - 1e-6, width)
        i, j = y.astype(int), x.astype(int)
        a, b = (y - i)[:, None], (x - j)[None, :]
        top = grid[i][:, j] * (1 - b) + grid[i][:, j + 1] * b
        bottom = grid[i + 1][:, j] * (1 - b) + grid[i + 1][:, j + 1] * b
        total += (top * (1 - a) + bottom * a) * 2.0 ** (-slope * octave)
    low, high = total.min(), total.max()
    return (total - low) / max(float(high - low), 1e-9)
