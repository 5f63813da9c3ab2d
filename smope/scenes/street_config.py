"""What street scenes may look like: KITTI's camera, distances and light."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from smope.scenes.config import Range, SceneConfig

AREAS = 40  # ignored areas an image: those of the frame behind, and of what could not be told


@dataclass(frozen=True)
class StreetConfig(SceneConfig):
    """Ranges of `smope.scenes.street.StreetSampler`. Metres, pixels, degrees; probabilities in 0..1."""

    width: int = 1242
    height: int = 376
    fx: float = 721.5377
    fy: float = 721.5377
    cx: float = 609.5593
    cy: float = 172.854
    near: float = 0.5
    far: float = 140.0
    box: Literal["silhouette", "corners"] = "corners"
    max_targets: int = 16
    targets: tuple[int, int] = (1, 16)
    materials: int = 100
    shadow_size: int = 256
    layers: int = 6  # ground, carriageway, lane marks
    plane_far: float = 120.0
    deep: float = 60.0
    min_visibility: float = 0.2  # below it an instance is neither to be found nor wrong

    frame_probability: float = 0.75  # share of images over a real frame, where there are frames
    zoom: Range = (1.0, 1.5)  # of a frame, by which its K grows
    mirror_probability: float = 0.5
    camera_height: Range = (1.5, 1.8)  # above the ground
    pitch: float = 0.7  # standard deviation of the camera's, degrees
    distance: Range = (3.0, 80.0)
    swap_probability: float = 0.25  # a car in a street's layout becomes a van, truck, tram or person
    crowd_probability: float = (
        0.75  # share of images with objects of several streets' layouts, up to all slots
    )
    things: int = 5  # most posts, boxes and bushes
    sky_probability: float = 0.25  # of scenes without a frame: before the environment map, not a photo
    least_height: float = 12.0  # of a box in pixels; lower ones are ignored
    least_shown: float = 0.3  # share of a box within the image; of KITTI's objects at most 0.7 is cut off
    behind: float = 0.15  # of a box may lie over a nearer object of the frame

    exposure: Range = (0.26, 0.5)
    spread: Range = (0.2, 0.34)
    warmth: float = 0.0  # the defaults of this and the next five were measured on photos of rooms
    warmth_spread: float = 0.08
    glare: Range = (0.0, 0.0)
    toe: Range = (0.0, 0.0)
    shoulder: Range = (0.0, 0.0)
    saturation: Range = (0.8, 1.45)
    blur_power: Range = (1.0, 1.0)
    blur_sigma: Range = (0.35, 0.9)
    defocus_probability: float = 0.04
    motion_probability: float = 0.06
    motion_length: Range = (1.5, 4.0)
    noise: Range = (0.0002, 0.002)
    shot_noise: Range = (0.001, 0.01)
    sharpen: Range = (0.0, 1.2)
    erase_probability: float = 0.0

    def extra_fields(self) -> dict[str, tuple[int, ...]]:
        return {
            "scale": (self.max_targets, 3),  # of the class mesh along its own axes
            "slots": (self.materials,),  # the slot + 1 that a material belongs to, 0 for none
            "areas": (AREAS, 4),  # xyxy pixels of ignored areas, zeros for none
            "frame": (4,),  # index of the frame behind or -1; width and height of what it fills, pixels; gain
            "frame_uv": (2, 3),  # pixel u, v, 1 to the frame's pixel
            "ground": (2,),  # how far the shadow of the sun and of the sky darken the frame's ground
        }
