"""Photos beside renders in plain numbers: brightness, contrast, edges, sharpness, colour.

python tools/compare_renders.py PHOTOS ASSETS [--images 80] [--seed 5]

PHOTOS is a folder of pictures (searched through), ASSETS a file of `smope.scenes.prepare_assets`. Renders
are those that training draws with the default SceneConfig. Of each measure the median over images and the
10 to 90 % range are printed as a Markdown table, in grey levels 0..255 where not said otherwise. It serves to
set the renders' ranges; it scores nothing.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from smope.evaluate.report import markdown_table
from smope.images import load_image
from smope.scenes import SceneStream

Pixels = NDArray[np.uint8]  # [3, H, W] sRGB
SUFFIXES = {".jpg", ".jpeg", ".png"}
BATCH = 4


def measures(picture: Pixels) -> dict[str, float]:
    """What the table shows of one picture.

    Gradient: mean absolute difference of neighbours, of both directions. Laplacian: mean of
    |4 x - its four neighbours|. Step ratio: mean squared difference at two pixels over that at one; 4 for a
    ramp, 2 for a step or a checker's sparse edges, 1 for white noise: it falls with sharpness. Saturation:
    mean of a pixel's largest less its smallest colour.
    """
    colour = picture.astype(np.float64)
    grey = np.tensordot([0.299, 0.587, 0.114], colour, axes=1)
    across, down = np.diff(grey, axis=1), np.diff(grey, axis=0)
    two_across, two_down = grey[:, 2:] - grey[:, :-2], grey[2:] - grey[:-2]
    inner = grey[1:-1, 1:-1]
    around = grey[1:-1, 2:] + grey[1:-1, :-2] + grey[2:, 1:-1] + grey[:-2, 1:-1]
    one = np.mean(across**2) + np.mean(down**2)
    return {
        "mean grey": float(grey.mean()),
        "standard deviation": float(grey.std()),
        "gradient": float((np.abs(across).mean() + np.abs(down).mean()) / 2),
        "Laplacian": float(np.abs(4 * inner - around).mean()),
        "step ratio": float((np.mean(two_across**2) + np.mean(two_down**2)) / max(one, 1e-9)),
        "saturation": float((colour.max(axis=0) - colour.min(axis=0)).mean()),
        "dark share, %": float(100 * (grey < 25).mean()),
        "clipped share, %": float(100 * (colour.min(axis=0) > 250).mean()),
    }


def photos(folder: Path) -> Iterator[Pixels]:
    """The pictures under a folder, in order of their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in SUFFIXES:
            yield load_image(path).numpy()


def renders(assets: Path, count: int, seed: int) -> Iterator[Pixels]:
    """The first `count` training images of a seed."""
    with SceneStream.from_assets(assets, seed=seed, batch_size=BATCH) as stream:
        for batch in islice(stream, -(-count // BATCH)):
            yield from (batch.images * 255).round().byte().cpu().numpy()


def table(columns: dict[str, Iterable[Pixels]]) -> str:
    """Markdown: a row a measure, a column a set of pictures."""
    values = {name: [measures(picture) for picture in pictures] for name, pictures in columns.items()}
    for name, found in values.items():
        if not found:
            raise SystemExit(f"{name}: no pictures; give a folder with JPEG or PNG files")
    heads = [f"{name} ({len(found)})" for name, found in values.items()]
    rows = []
    for measure in next(iter(values.values()))[0]:
        cells = []
        for found in values.values():
            low, middle, high = np.quantile([entry[measure] for entry in found], [0.1, 0.5, 0.9])
            cells.append(f"{middle:.1f}, {low:.1f}-{high:.1f}")
        rows.append([measure, *cells])
    return markdown_table(["median, 10-90 %", *heads], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photos", type=Path)
    parser.add_argument("assets", type=Path)
    parser.add_argument("--images", type=int, default=80, help="renders to measure")
    parser.add_argument("--seed", type=int, default=5)
    options = parser.parse_args()
    drawn = renders(options.assets, options.images, options.seed)
    print(table({"photos": photos(options.photos), "renders": islice(drawn, options.images)}))


if __name__ == "__main__":
    main()
