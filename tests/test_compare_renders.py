"""tools/compare_renders.py on pictures whose measures are known by hand."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

TOOL = runpy.run_path(str(Path(__file__).resolve().parent.parent / "tools" / "compare_renders.py"))


def grey(levels: np.ndarray) -> np.ndarray:
    return np.repeat(levels[None].astype(np.uint8), 3, axis=0)


def test_a_ramp_has_its_slope_and_no_laplacian() -> None:
    found = TOOL["measures"](grey(np.tile(np.arange(0, 120, 3), (30, 1))))
    assert found["gradient"] == pytest.approx(1.5)  # 3 across, 0 down
    assert found["Laplacian"] == pytest.approx(0, abs=1e-9)
    assert found["step ratio"] == pytest.approx(4)
    assert found["mean grey"] == pytest.approx(58.5)
    assert found["standard deviation"] == pytest.approx(3 * np.sqrt((40**2 - 1) / 12))
    assert found["saturation"] == 0


def test_a_checker_has_edges_at_every_pixel() -> None:
    found = TOOL["measures"](grey(np.indices((20, 20)).sum(axis=0) % 2 * 10 + 20))
    assert found["gradient"] == pytest.approx(10)
    assert found["Laplacian"] == pytest.approx(40)
    assert found["step ratio"] == pytest.approx(0)
    assert found["dark share, %"] == pytest.approx(50)


def test_white_noise_has_a_step_ratio_of_one() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (200, 200))
    assert TOOL["measures"](grey(noise))["step ratio"] == pytest.approx(1, abs=0.03)


def test_saturation_is_of_each_pixel() -> None:
    picture = np.zeros((3, 4, 4), dtype=np.uint8)
    picture[0, :2], picture[2, 2:] = 200, 100  # red above, blue below
    assert TOOL["measures"](picture)["saturation"] == pytest.approx(150)


def test_the_table_has_a_column_a_set(tmp_path: Path) -> None:
    for level in (10, 20, 30):
        Image.new("RGB", (8, 8), (level,) * 3).save(tmp_path / f"{level}.png")
    rows = TOOL["table"]({"photos": TOOL["photos"](tmp_path), "renders": [grey(np.full((8, 8), 99))]})
    assert rows.splitlines()[0] == "| median, 10-90 % | photos (3) | renders (1) |"
    assert rows.splitlines()[2] == "| mean grey | 20.0, 12.0-28.0 | 99.0, 99.0-99.0 |"
    with pytest.raises(SystemExit, match="no pictures"):
        TOOL["table"]({"photos": TOOL["photos"](tmp_path / "none")})
