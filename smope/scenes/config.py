"""What the synthetic scenes may look like: every range of the sampler, the lights and the camera."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Range = tuple[float, float]


@dataclass(frozen=True)
class SceneConfig:
    """Ranges of the scene sampler. Metres, pixels, degrees; probabilities in 0..1.

    The camera's defaults are LM-O's (Kinect, 640x480).
    """

    width: int = 640  # pixels
    height: int = 480
    fx: float = 572.4114  # pixels
    fy: float = 573.57043
    cx: float = 325.2611
    cy: float = 242.04899
    focal_jitter_probability: float = 0.6  # share of images seen through another lens ...
    focal_scale: Range = (0.7, 1.4)  # ... with this factor on fx and fy
    near: float = 0.08  # clipping planes, metres
    far: float = 12.0

    # What the boxes of instances enclose: the silhouette, or the projected corners of the mesh's box.
    box: Literal["silhouette", "corners"] = "silhouette"
    max_targets: int = 8  # object slots of an image (N)
    targets: tuple[int, int] = (1, 8)  # targets placed in an image, inclusive
    full_set_probability: float = 0.35  # share of images with as many targets as fit, as in crowded photos
    # Share of images that may hold several instances of an object: in half of them one object stands two or
    # three times beside different others, in half each is drawn by chance.
    repeat_probability: float = 0.25
    clutter: tuple[int, int] = (4, 9)  # other objects in the heap, inclusive
    far_clutter: tuple[int, int] = (3, 9)  # other objects standing around it, table scenes only
    far_scale: Range = (1.0, 2.2)  # further factor on their size: furniture, screens, pots
    invented_scale_share: float = 0.15  # most clutter draws from meshes whose scale was invented
    clutter_scale: Range = (0.75, 1.3)
    lookalike_probability: float = 0.3  # clutter painted in about the colour of a known object ...
    lookalike_near_probability: float = 0.5  # ... where it touches or hides a target

    table_probability: float = 0.65  # the rest are free scenes: objects in the air before a photo
    upright_probability: float = 0.6  # targets standing with their model z axis up
    tilt_probability: float = 0.12  # objects leaning instead of resting flat
    stack_probability: float = 0.12  # objects standing on another one
    heap_radius: Range = (0.05, 0.22)  # standard deviation of the positions on the plane, metres
    overlap: Range = (0.0, 0.4)  # allowed overlap of footprint circles, share of the smaller radius
    distance: Range = (0.35, 2.2)  # camera to the object it looks at, metres, even in its logarithm
    usual_distance: Range = (0.38, 0.78)  # part of that logarithm (0 to 1) where the cameras ...
    usual_distance_probability: float = 0.5  # ... of this share of table scenes are
    elevation: Range = (0.0, 90.0)  # of the camera above the plane, degrees
    look_at_jitter: float = 0.10  # standard deviation of the point looked at, metres
    roll: float = 20.0  # standard deviation of the in-plane roll, degrees
    any_roll_probability: float = 0.10

    front_occluder_probability: float = 0.25  # for each target of a free scene
    # For each target on a table: something stands before it ... More than half of LM-O's targets are partly
    # hidden.
    table_occluder_probability: float = 0.25
    held_probability: float = 0.5  # ... or, this share, reaches in from the air as hands and tools do
    min_visibility: float = 0.02  # slots below are left empty

    shadow_size: int = 256  # texels of a light-view depth map
    plane_far: float = 12.0  # metres: no plane is seen beyond
    deep: float = 4.0  # metres: where ambient occlusion ends
    layers: int = 7  # texture layers on the plane: table, board, sheets
    materials: int = 40  # ids an image can hold, 0 (nothing) and the plane included
    lights: int = 3
    frontal_light_probability: float = 0.45  # share of images with a light from about where the camera is

    # Strength of ambient occlusion. With more of it the outlines of dark things on a table move out and those
    # of bright things in, and depth must not hang on that.
    occlusion: Range = (0.0, 0.8)

    # Known objects. LM-O's scans are more magenta than the things, and what is printed on them is smeared, or
    # is the scanner's light and not on the things: the colour circle turns, print fades and deepens.
    known_hue: float = 9.0  # standard deviation of the turn, degrees
    known_contrast: Range = (0.5, 1.9)  # of what is printed, even in its logarithm
    # Of each object: patches that its scan lacks, as holes, hollows, print, stickers and dirt make them.
    mark_probability: float = 0.0
    gloss_probability: float = 0.2  # of each object: glazed or of polished plastic, with sharp highlights

    exposure: Range = (0.18, 0.48)  # mean of the sRGB image that the exposure aims at
    spread: Range = (0.18, 0.32)  # standard deviation of the sRGB image that the tone curve aims at
    warmth: float = 0.08  # logarithm of red over green (and green over blue) that the camera adds, linear ...
    warmth_spread: float = 0.14  # ... and its standard deviation; LM-O's photos have less blue than its scans
    glare: Range = (0.0, 0.03)  # light strewn by the lens over the whole picture, share of its mean
    # Levels (sRGB) below and above which the tone curve bends instead of clipping; 0 clips. On photos hardly
    # an object is black or white over much of it, as a clipped dark one is.
    toe: Range = (0.03, 0.2)
    shoulder: Range = (0.03, 0.2)
    saturation: Range = (0.8, 1.45)
    # Of the light a root blurs, with this exponent: 1 is optics alone, about 2.2 is demosaicing and scaling
    # of coded values. Blurred light makes what is bright larger.
    blur_power: Range = (1.0, 3.0)
    blur_sigma: Range = (0.48, 1.05)  # pixels: anti-aliasing and ordinary focus together
    defocus_probability: float = 0.12
    defocus_sigma: Range = (1.0, 2.0)  # pixels
    motion_probability: float = 0.15
    motion_length: Range = (1.5, 7.0)  # pixels
    noise: Range = (0.0002, 0.003)  # read noise, standard deviation as a share of full scale, linear light
    shot_noise: Range = (0.001, 0.012)  # standard deviation of the shot noise at full scale
    sharpen: Range = (0.3, 2.2)  # amount of unsharp masking
    jpeg_probability: float = 0.6
    jpeg_quality: Range = (60.0, 95.0)
    erase_probability: float = 0.05  # strips or patches cut out of the image

    def __post_init__(self) -> None:
        if self.max_targets + self.clutter[1] + self.far_clutter[1] + self.max_targets + 2 > self.materials:
            raise ValueError(
                f"SceneConfig.materials = {self.materials} is fewer than the ids that max_targets, clutter, "
                "far_clutter and one occluder a target can need; raise it"
            )
        if not 1 <= self.targets[0] <= self.targets[1] <= self.max_targets:
            raise ValueError(
                f"SceneConfig.targets = {self.targets}: 1 <= low <= high <= {self.max_targets} expected"
            )
        if self.materials > 255:
            raise ValueError(f"SceneConfig.materials = {self.materials}: ids travel in 8 bits, 255 at most")

    def extra_fields(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of what kinds of scenes that build on this one send along besides."""
        return {}

    @property
    def plane_material(self) -> int:
        return self.materials - 1
