"""Render smope/assets/street.png and street.json, which examples/street.py reads.

    SMOPE_DATA=FOLDER python tools/make_street_frame.py [--seed N] [--out FILE.png]

A demonstration, not a measurement: the seed was chosen by eye for a pleasant view. Vehicles: Open Source
Robotics Foundation, CC BY 3.0, painted anew. Light and sky: an environment map under CC0. Road and verge are
drawn by this script. No photo is in it, and no mesh whose licence is not known.
"""

from __future__ import annotations

import argparse
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from smope import ObjectModel
from smope.data.items import Batch
from smope.meshes import load_mesh
from smope.scenes.assets import SceneAssets
from smope.scenes.layout import Scene
from smope.scenes.street import StreetSampler
from smope.scenes.street_config import StreetConfig
from smope.scenes.street_frames import Layouts
from smope.scenes.street_meshes import VEHICLES
from smope.scenes.street_stream import StreetStream, build_street_assets
from smope.scenes.workers import Sampler

ROOT = Path(__file__).resolve().parent.parent
SEED = 5
SKY = "park"
CALM = StreetConfig(
    frame_probability=0.0, sky_probability=0.0, things=0, crowd_probability=0.0, swap_probability=0.0,
    zoom=(1.0, 1.0), pitch=0.1, exposure=(0.42, 0.46), spread=(0.2, 0.24), defocus_probability=0.0,
    motion_probability=0.0, noise=(0.0002, 0.0004), shot_noise=(0.001, 0.002), jpeg_probability=0.0,
)  # fmt: skip
# x, z, rotation_y; width, length, height; 0 for a car and 1 for a van.
STREET = [
    (-3.2, 9.5, -1.55, 1.75, 4.2, 1.5, 0), (3.6, 12.5, 1.58, 1.7, 3.9, 1.5, 0),
    (-3.4, 17.0, -1.6, 1.8, 4.4, 1.45, 0), (3.4, 20.0, 1.55, 1.95, 5.4, 2.3, 1),
    (0.6, 27.0, -1.57, 1.8, 4.6, 1.75, 0), (-3.3, 30.0, -1.56, 1.7, 4.0, 1.5, 0),
    (7.5, 24.0, 0.2, 1.75, 4.3, 1.5, 0),
]  # fmt: skip
ASPHALT, VERGE, BEHIND = 0, 1, 2  # of the pictures that this script draws


class Tidy(StreetSampler):
    """A street with a grey road between green verges, white marks, and the sky behind."""

    def __call__(self, seed: tuple[int, ...]) -> Scene:
        scene = super().__call__(seed)
        fields = dict(scene.fields)
        fields["layer_texture"] = np.array([VERGE, *[ASPHALT] * 5], np.float32)
        gains = np.ones((6, 3), np.float32)
        gains[2:] = 4.0
        fields["layer_gain"] = gains
        fields["background"] = np.array([BEHIND, 1.6, 0.0, 0.0], np.float32)
        level = 2 * fields["K"][1, 2] / self.config.height - 1
        # The picture's lower edge is the horizon.
        fields["background_uv"] = np.array([[1, 0, 0], [0, 1.5, 1 - 1.5 * level - 0.02]], np.float32)
        return Scene(scene.draws, fields)


class TidyStream(StreetStream):
    def _new_sampler(self, assets: SceneAssets) -> Sampler:
        made = super()._new_sampler(assets)
        assert isinstance(made, StreetSampler)
        values = {name: getattr(made, name) for name in made.__dataclass_fields__ if not name.startswith("_")}
        return Tidy(**values)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--out", type=Path, default=ROOT / "smope" / "assets" / "street.png")
    given = parser.parse_args()
    data = Path(os.environ["SMOPE_DATA"])
    vehicles = data / "meshes" / "vehicles"
    # Any mesh of the class will do for the labels, which this picture has none of.
    meshes = {
        name: load_mesh(vehicles / f"{stem}.glb", "m")
        for name, stem in (("Car", "prius_hybrid"), ("Van", "ambulance"))
    }
    objects = [ObjectModel.from_mesh(name, mesh, "m") for name, mesh in meshes.items()]
    assets = build_street_assets(objects, vehicles, None)
    ours = tuple(mesh for mesh in assets.clutter if mesh.name.split("/")[1] in VEHICLES)
    with np.load(data / "backgrounds" / "hdri" / f"{SKY}.npz") as stored:
        sky = stored["rgb"].astype(np.float32)
    bright = sky.max(-1, keepdims=True)
    sky = np.where(bright > 30, np.minimum(bright, 100), sky)  # of the sun itself this map has blue alone
    pale = sky.mean(-1, keepdims=True) * 0.5 + sky * 0.5
    assets = SceneAssets(assets.targets, ours, pictures(sky), pale[None].astype(np.float16))
    rows = np.array(STREET)
    starts, kind = np.array([0, len(rows)], np.int32), rows[:, 6].astype(np.uint8)
    layouts = Layouts(("Car", "Van"), starts, kind, rows[:, :2], rows[:, 2], rows[:, 3:6])
    options = {"assets": assets, "layouts": layouts, "config": CALM, "seed": given.seed, "batch_size": 1}
    with TidyStream((), **options) as stream:
        batch = stream.batch(0)
    pixels = (batch.images[0] * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(given.out, optimize=True)
    size = [CALM.width, CALM.height]
    told = {"K": batch.K[0].tolist(), "size": size, "vehicles": vehicles_of(batch, objects)}
    given.out.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(f"{given.out}: {given.out.stat().st_size / 1024:.0f} KiB, {int(batch.present.sum())} vehicles")


def vehicles_of(batch: Batch, objects: Sequence[ObjectModel]) -> list[dict[str, Any]]:
    """Class, middle (metres, camera), rotation about the camera's y (KITTI's rotation_y), width, length and
    height (metres) and visible share of what stands in the first image."""
    told = []
    assert batch.scale is not None
    for i in batch.present[0].nonzero().flatten().tolist():
        mesh = objects[int(batch.labels[0, i])]
        T, scale = batch.T_CO[0, i].double(), batch.scale[0, i].double()
        middle = T[:3, :3] @ (scale * mesh.centre) + T[:3, 3]
        ahead = -T[:3, 1]  # the front of a vehicle is its -y
        told.append(
            {
                "class": mesh.name,
                "middle": [round(x, 4) for x in middle.tolist()],
                "rotation_y": round(float(torch.atan2(-ahead[2], ahead[0])), 4),
                "size": [round(x, 4) for x in (scale * mesh.extents).tolist()],
                "visibility": round(float(batch.visibility[0, i]), 4),
            }
        )
    return told


def pictures(sky: np.ndarray) -> tuple[bytes, ...]:
    """Asphalt, grass, and the upper half of the environment map, as JPEG files."""
    rng = np.random.default_rng(0)
    grain = rng.normal(0, 1, (384, 512, 1))
    coarse = np.asarray(Image.fromarray(rng.random((24, 32)).astype(np.float32)).resize((512, 384)))[
        ..., None
    ]
    asphalt = np.array([104, 104, 108]) + 9 * grain + 20 * (coarse - 0.5)
    grass = np.array([86, 104, 58]) + 14 * grain + 50 * (coarse - 0.5)
    half = sky[: len(sky) // 2]
    toned = 255 * (half / np.percentile(half, 97)).clip(0, 1) ** (1 / 2.2)
    out = []
    for pixels in (asphalt, grass, toned):
        buffer = io.BytesIO()
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        image.resize((512, 384), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=95)
        out.append(buffer.getvalue())
    return tuple(out)


if __name__ == "__main__":
    main()
