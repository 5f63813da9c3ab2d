"""Render smope/assets/demo.png and demo.json, and the overlay docs/images/demo.png.

    SMOPE_DATA=FOLDER python tools/make_demo_picture.py [--seed N | --candidates N --sheet FILE]

The picture is a demonstration, not a measurement: its seed was chosen by eye among fifteen candidates for a
pleasant view of all eight objects on which the bundled weights find the poses. How good the weights are is
told by the scores in the model's card, on photos that nobody chose. Objects keep the colours of their scans
here, which the scenes of training vary.

Meshes: LM-O, CC BY-SA 4.0 (Brachmann et al. 2014, of LINEMOD, Hinterstoisser et al. 2012), so the picture is
CC BY-SA 4.0 too. Light and background: an environment map under CC0. The wooden table is drawn by this
script. No photo is in it.
"""

from __future__ import annotations

import argparse
import io
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from smope import SMOPE, Camera, ObjectModel, Poses
from smope.data.items import Batch
from smope.scenes import SceneAssets, SceneConfig, SceneStream, build_assets
from smope.scenes.compose import BOARDS, SHEETS
from smope.scenes.layout import Scene
from smope.scenes.sample import SceneSampler

ROOT = Path(__file__).resolve().parent.parent
SEED = 7
LMO = {"ape": 1, "can": 5, "cat": 6, "driller": 8, "duck": 9, "eggbox": 10, "glue": 11, "holepuncher": 12}
CALM = SceneConfig(  # all eight upright on a table, apart, in good light, through a good lens
    focal_jitter_probability=0,
    targets=(8, 8),
    full_set_probability=1,
    repeat_probability=0,
    table_probability=1,
    upright_probability=1,
    tilt_probability=0,
    stack_probability=0,
    heap_radius=(0.13, 0.16),
    overlap=(0, 0),
    distance=(0.85, 1.05),
    elevation=(30, 50),
    look_at_jitter=0.03,
    roll=2,
    any_roll_probability=0,
    exposure=(0.42, 0.50),
    spread=(0.18, 0.22),
    blur_sigma=(0.4, 0.5),
    defocus_probability=0,
    motion_probability=0,
    noise=(0.0002, 0.0004),
    shot_noise=(0.001, 0.002),
    sharpen=(0.2, 0.5),
    jpeg_probability=0,
    erase_probability=0,
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--candidates", type=int, default=0, help="write a sheet of so many seeds only")
    parser.add_argument("--sheet", type=Path, default=Path("candidates.png"))
    options = parser.parse_args()
    data = Path(os.environ["SMOPE_DATA"])
    with open_stream(data) as stream:
        if options.candidates:
            seeds = range(options.seed, options.seed + options.candidates)
            write_sheet([stream.batch(seed) for seed in seeds], seeds, options.sheet)
            return
        batch = stream.batch(options.seed)
        truth = truth_of(batch, stream.names)
    assets, images = ROOT / "smope" / "assets", ROOT / "docs" / "images"
    assets.mkdir(exist_ok=True)
    picture = picture_of(batch)
    picture.save(assets / "demo.png", optimize=True)
    truth.save(assets / "demo.json")
    found = SMOPE.from_pretrained("lmo", device="cpu").predict(picture, K=truth.camera.K)
    found.draw(picture).save(images / "demo.png", optimize=True)
    print(report(truth, found))


class CalmSampler(SceneSampler):
    """Scenes on a bare wooden table, in the room of the environment map that lights them."""

    def __call__(self, seed: tuple[int, ...]) -> Scene:
        scene = super().__call__(seed)
        plain = np.eye(3, 4, dtype=np.float32)
        draws = tuple(replace(d, colour=plain, gamma=1.0, grain=(0.0, 1.0, 0.0)) for d in scene.draws)
        fields = {name: array.copy() for name, array in scene.fields.items()}
        fields["background"][3] = 1
        fields["layer_texture"][0] = 0  # the wood, the only picture of the assets
        fields["layer_gain"][0] = 1
        fields["layer_uv"][0] = [[1 / 0.55, 0, 0], [0, 1 / 0.41, 0]]  # metres to -1..1
        fields["layer_texels"][0] = 256 / 0.55
        fields["layer_extent"][0, :, :2] *= 0.75 / np.abs(fields["layer_extent"][0, :, :2]).max()
        fields["layer_extent"][1:] = [[0, 0, 9], [0, 0, 9]]  # no sheets: nowhere inside
        fields["materials"][-1] = [0.45, 0, 0.35]  # varnish
        return Scene(draws, fields)


class CalmStream(SceneStream):
    def __init__(self, assets: SceneAssets) -> None:
        super().__init__((), assets=assets, config=CALM, batch_size=1)
        self._sampler = CalmSampler(
            assets.targets, (), CALM, len(assets.backgrounds), SHEETS, BOARDS, len(assets.environments)
        )


def open_stream(data: Path) -> SceneStream:
    """Scenes of LM-O's meshes, with CC0 environment maps and no photos."""
    models = data / "lmo" / "models"
    objects = [ObjectModel.from_mesh(name, models / f"obj_{k:06d}.ply", "mm") for name, k in LMO.items()]
    assets = build_assets(objects, (), None, target_faces=30000)
    rooms = []
    for path in sorted((data / "backgrounds" / "hdri").glob("*.npz")):
        with np.load(path) as room:
            rooms.append(np.asarray(room["rgb"], dtype=np.float16))
    return CalmStream(replace(assets, backgrounds=(wood(),), environments=np.stack(rooms)))


def wood(planks: int = 5, height: int = 384, width: int = 512) -> bytes:
    """A JPEG of planks: grain is noise drawn out along them."""
    rng = np.random.default_rng(5)
    rows = []
    for _ in range(planks):
        high = height // planks + 1
        grain = np.zeros((high, width))
        for along, across, strength in ((64, 6, 0.5), (32, 2, 0.35), (12, 1, 0.2)):
            coarse = rng.normal(size=(high // across + 2, width // along + 2)).astype(np.float32)
            smooth = Image.fromarray(coarse).resize((width, high), Image.Resampling.BICUBIC)
            grain += strength * np.asarray(smooth)
        grain[:2] -= 2.0  # the gap
        tone = np.array([0.66, 0.50, 0.35]) * rng.uniform(0.9, 1.06)
        rows.append(tone * (1 + 0.09 * grain[..., None]))
    picture = np.concatenate(rows)[:height]
    buffer = io.BytesIO()
    Image.fromarray((picture.clip(0, 1) * 255).astype(np.uint8)).save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def picture_of(batch: Batch) -> Image.Image:
    pixels = (batch.images[0] * 255).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy())


def truth_of(batch: Batch, names: tuple[str, ...]) -> Poses:
    """What the picture was rendered with, as `Poses` of score 1 and no expected error."""
    present = batch.present[0]
    labels, count = batch.labels[0, present], int(present.sum())
    height, width = batch.images.shape[-2:]
    return Poses(
        names=tuple(names[k] for k in labels),
        labels=labels,
        scores=torch.ones(count),
        boxes_xyxy=batch.boxes_xyxy[0, present],
        T_CO=batch.T_CO[0, present],
        scale=torch.ones(count, 3),
        visibility=batch.visibility[0, present],
        sigma=torch.zeros(count, 2),
        camera=Camera(batch.K[0], (width, height)),
    )


def report(truth: Poses, found: Poses) -> str:
    """Errors of the surest pose of every object; half a turn is right for eggbox and glue, by symmetry."""
    lines = []
    for name, visible, true in zip(truth.names, truth.visibility, truth.T_CO, strict=True):
        line = f"{name:<12} visible {float(visible):4.2f}  "
        if name in found.names:
            pose = found.T_CO[found.names.index(name)]
            pixels = truth.camera.project(torch.stack([pose[:3, 3], true[:3, 3]]))
            cosine = ((pose[:3, :3] * true[:3, :3]).sum() - 1) / 2
            line += f"score {float(found.scores[found.names.index(name)]):4.2f}  "
            line += f"centre off by {float((pixels[0] - pixels[1]).norm()):5.1f} px, "
            line += f"depth by {float(pose[2, 3] / true[2, 3] - 1):+6.1%}, "
            line += f"rotation by {float(cosine.clamp(-1, 1).acos().rad2deg()):5.1f} degrees"
        lines.append(line if name in found.names else line + "not found")
    return "\n".join(lines)


def write_sheet(batches: list[Batch], seeds: range, path: Path) -> None:
    """Candidates three in a row, and how the bundled weights do on each."""
    model = SMOPE.from_pretrained("lmo", device="cpu")
    sheet = Image.new("RGB", (3 * 640, -(-len(batches) // 3) * 480))
    for k, (batch, seed) in enumerate(zip(batches, seeds, strict=True)):
        sheet.paste(picture_of(batch), (k % 3 * 640, k // 3 * 480))
        truth = truth_of(batch, tuple(LMO))
        found = model.predict(picture_of(batch), K=truth.camera.K)
        print(f"seed {seed}: {len(found)} found\n{report(truth, found)}", flush=True)
    sheet.save(path)


if __name__ == "__main__":
    main()
