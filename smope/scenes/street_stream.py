"""StreetStream: endless batches of streets, rendered alone or into real frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smope.data.items import UNKNOWN, Batch
from smope.data.records import Record
from smope.scenes.assets import AssetError, SceneAssets, _pictures
from smope.scenes.compose import (
    BACKGROUND,
    SHEETS,
    bilinear,
    compose,
    pixel_rays,
    spread_out,
    srgb_to_linear,
    visibility,
)
from smope.scenes.degrade import CameraDraw, photograph
from smope.scenes.fuse import fused
from smope.scenes.layout import unpack
from smope.scenes.light import dot, shadows
from smope.scenes.meshes import prepare_mesh
from smope.scenes.stream import SceneStream
from smope.scenes.street import StreetSampler
from smope.scenes.street_config import StreetConfig
from smope.scenes.street_frames import Layouts, frame_bank, frames_of
from smope.scenes.street_meshes import street_meshes
from smope.scenes.workers import Sampler

if TYPE_CHECKING:
    from smope.objects import ObjectModel

# Of the environment maps those that show a room, or a night.
ROOMS = ("apartment", "hall", "lab", "lobby", "night", "studio", "warehouse", "workshop")
_GROUND_FAR = 60.0  # metres: shadows on a frame's ground are not seen beyond


def build_street_assets(
    objects: Sequence[ObjectModel],
    vehicles: Path | None,
    backgrounds: Path | None,
    max_backgrounds: int = 40,
    seed: int = 0,
) -> SceneAssets:
    """Class meshes as targets, their painted parts as clutter, some photos, and the environment maps."""
    if bare := [model.name for model in objects if model.mesh is None]:
        raise AssetError(f"object '{bare[0]}' has no mesh: it came from a checkpoint; register its mesh file")
    classes = {model.name: model.mesh for model in objects if model.mesh is not None}
    targets = tuple(prepare_mesh(name, mesh, faces=800, coarse_faces=400) for name, mesh in classes.items())
    parts = street_meshes(classes, vehicles)
    pictures, environments = _pictures(np.random.default_rng(seed), backgrounds, max_backgrounds, 480)
    names = sorted(file.stem for file in (backgrounds / "hdri").glob("*.npz")) if backgrounds else []
    if outdoors := [k for k, name in enumerate(names) if name not in ROOMS]:
        environments = environments[outdoors]
    # Light that falls on streets is paler than what the maps show in places.
    grey = environments.astype(np.float32).mean(axis=-1, keepdims=True)
    pale = (grey + 0.4 * (environments.astype(np.float32) - grey)).astype(np.float16)
    return SceneAssets(targets, parts, pictures, pale)


class StreetStream(SceneStream):
    """As SceneStream; `frames` are the records of real frames to render into, of KITTI's form."""

    config: StreetConfig

    def __init__(
        self,
        objects: Sequence[ObjectModel],
        *,
        assets: SceneAssets,
        layouts: Layouts | Path | str,
        frames: Sequence[Record] = (),
        config: StreetConfig | None = None,
        **options: Any,
    ) -> None:
        self._layouts = layouts if isinstance(layouts, Layouts) else Layouts.load(layouts)
        self._frames = frames_of(frames)
        config = config or StreetConfig()
        super().__init__(objects, assets=assets, config=config, **options)
        self._bank = frame_bank(frames, (config.width, config.height), self.device)

    def _new_sampler(self, assets: SceneAssets) -> Sampler:
        return StreetSampler(
            targets=assets.targets,
            clutter=assets.clutter,
            config=self.config,
            layouts=self._layouts,
            frames=self._frames,
            backgrounds=len(assets.backgrounds),
            sheets=SHEETS,
            environments=len(assets.environments),
        )

    @torch.no_grad()
    def finish(self, number: int, raw: dict[str, Tensor]) -> Batch:
        c = self.config
        scene = unpack(raw["rows"], c)
        composed = compose(raw["albedo"], raw["normal"], raw["depth"], raw["light"], scene, self.bank, c)
        radiance = over_frames(composed.radiance, composed.kind, composed.moments, scene, self._bank)
        camera = CameraDraw.sample((self.seed, number, 1), len(raw["rows"]), c, self.device)
        generator = torch.Generator(self.device).manual_seed(hash((self.seed, number)) & 0x7FFFFFFF)
        images = photograph(radiance, camera, generator)

        rows = torch.arange(len(images), device=self.device)[:, None, None]
        owner = scene["slots"].to(torch.uint8)[
            rows, composed.material.long()
        ]  # slot + 1, glass with its body
        tiles = raw["tiles"] > 127
        visible = visibility(owner, tiles, scene["boxes"])
        labels = scene["labels"].long()
        lost = (labels >= 0) & (visible < c.min_visibility)
        labels = labels.masked_fill(lost, -1)
        present = labels >= 0
        ignored = torch.cat([scene["areas"], torch.where(lost[..., None], scene["boxes"], 0.0)], 1)
        kept = torch.cat([torch.zeros_like(present[:, :1]), present], 1)
        instance = torch.where(kept[rows, owner.long()], owner, 0)
        inside = inside_frame(scene["frame"], *images.shape[-2:])
        unknown = (instance == 0) & in_any(ignored, *images.shape[-2:]) & inside
        return Batch(
            images=images * inside[:, None],
            K=scene["K"].clone(),
            labels=labels,
            T_CO=scene["T_CO"].clone(),
            boxes_xyxy=scene["boxes"].clone(),
            visibility=torch.where(present, visible, 0.0),
            instance=torch.where(unknown, UNKNOWN, instance * inside).to(torch.uint8),
            depth=composed.depth * inside,
            full_masks=tiles & present[:, :, None, None],
            scale=scene["scale"].clone(),
            ignored=ignored,
        )


@fused
def over_frames(
    radiance: Tensor, kind: Tensor, moments: Tensor, scene: dict[str, Tensor], frames: Tensor
) -> Tensor:
    """Radiance [B, 3, H, W] with the real frame where nothing was drawn, and on its ground the shadows of
    what was drawn; frames [F, H, W] packed. A scene whose frame is -1 stays as it is."""
    height, width = kind.shape[1:]
    index, _, _, gain = scene["frame"].unbind(dim=1)
    u = torch.arange(width, device=kind.device, dtype=torch.float32)[None, None]
    v = torch.arange(height, device=kind.device, dtype=torch.float32)[None, :, None]
    uv = scene["frame_uv"][..., None, None]  # [B, 2, 3, 1, 1]
    x, y = (uv[:, k, 0] * u + uv[:, k, 1] * v + uv[:, k, 2] for k in range(2))
    x, y = (x + 0.5) * (2 / frames.shape[2]) - 1, (y + 0.5) * (2 / frames.shape[1]) - 1
    which = index.clamp(min=0).int()[:, None, None].expand_as(kind)
    seen = bilinear(frames, which, x, y)

    rays = pixel_rays(scene["K"], height, width)
    slope = dot(spread_out(scene["plane"]), rays)
    depth = scene["plane"][:, 3, None, None] / torch.where(slope.abs() < 1e-5, -1e-5, slope)
    ground = (depth > 0.5) & (depth < _GROUND_FAR)
    z = torch.where(ground, depth, _GROUND_FAR)
    sun, sky = shadows(moments, (rays[0] * z, rays[1] * z, z), scene)
    strength = scene["ground"][:, :, None, None]
    dark = (1 - strength[:, 0] * (1 - sun)) * (1 - strength[:, 1] * (1 - sky))
    dark = torch.where(ground, dark, 1.0) * gain[:, None, None]
    behind = (kind == BACKGROUND) & (index >= 0)[:, None, None]
    return torch.stack(
        [torch.where(behind, srgb_to_linear(seen[c] / 255) * dark, radiance[:, c]) for c in range(3)], dim=1
    )


def inside_frame(frame: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W] bool: pixels that the picture fills; frame [B, 4] as in `StreetConfig.extra_fields`."""
    across = torch.arange(width, device=frame.device) < frame[:, 1, None]
    down = torch.arange(height, device=frame.device) < frame[:, 2, None]
    return down[:, :, None] & across[:, None]


def in_any(areas: Tensor, height: int, width: int) -> Tensor:
    """[B, H, W] bool: pixels whose middle lies in one of the areas [B, I, 4] xyxy."""
    u = torch.arange(width, device=areas.device)
    v = torch.arange(height, device=areas.device)
    across = (u > areas[..., 0, None]) & (u < areas[..., 2, None])  # [B, I, W]
    down = (v > areas[..., 1, None]) & (v < areas[..., 3, None])
    return down.float().transpose(1, 2) @ across.float() > 0
