"""The example for Ray on this machine: every image once, also when a worker is killed in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from small_model import noise, small_model

from smope import Poses

EXAMPLES = Path(__file__).parent.parent / "examples"

# The first batch kills its actor. Threshold 0, as a random network finds little.
DYING = """
import functools, os, signal, sys
from pathlib import Path
import ray_batch

class Dying(ray_batch.FindObjects):
    def __init__(self, *given):
        super().__init__(*given)
        self.model.stream = functools.partial(self.model.stream, threshold=0.0, top_k=3)

    def __call__(self, batch):
        record = Path(os.environ["DEATHS"])
        if record.stat().st_size < 1:
            with record.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(batch)

ray_batch.FindObjects = Dying
ray_batch.main(*sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_a_killed_worker_loses_no_image(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path / "weights")
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(6):
        Image.fromarray(noise(i).permute(1, 2, 0).numpy()).save(photos / f"{i}.png")
    (photos / "bad.png").write_bytes(b"no picture")
    (tmp_path / "deaths").touch()
    environment = {
        **os.environ,
        "DEATHS": str(tmp_path / "deaths"),
        "PYTHONPATH": os.pathsep.join([str(EXAMPLES), *sys.path]),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    arguments = [str(photos), str(tmp_path / "out"), "1", str(tmp_path / "weights")]
    done = subprocess.run(
        [sys.executable, "-c", DYING, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=380,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "deaths").read_text() == "x"
    lines = [line for file in (tmp_path / "out").glob("*.json") for line in file.read_text().splitlines()]
    rows = {row["path"]: row for row in map(json.loads, lines)}
    assert len(lines) == len(rows) == 7
    assert "cannot be read as an image" in rows[str(photos / "bad.png")]["error"]
    poses = Poses.from_dict(json.loads(rows[str(photos / "3.png")]["poses"]))
    expected = model.predict(photos / "3.png", threshold=0.0, top_k=3)
    assert len(expected) > 0
    assert poses.names == expected.names
    torch.testing.assert_close(poses.T_CO, expected.T_CO, rtol=1e-4, atol=1e-5)
