"""One random street from a seed: who stands where, on which ground, before which camera.

Objects stand as on a street of KITTI (`Layouts`), are of its sizes, and are drawn either over a real frame,
whose own objects are then areas to ignore, or on a made-up ground before a photo or a sky. World (W): x to
the right, y ahead, z up, on the ground below the camera.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smope.data.corners import corner_box
from smope.scenes.dress import Paint
from smope.scenes.layout import Draw, Scene
from smope.scenes.meshes import PreparedMesh
from smope.scenes.street_config import AREAS, StreetConfig
from smope.scenes.street_dress import (
    daylight,
    glass_paint,
    ground_layers,
    horizon,
    material_of,
    person_paint,
    thing_paint,
    vehicle_paint,
)
from smope.scenes.street_frames import Frame, Layouts
from smope.scenes.street_meshes import THING
from smope.scenes.turns import about_vector, about_z

Floats = NDArray[np.float64]
_LEVEL = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])  # W to the axes of a level camera
_MOST_STREETS = 6
_SWAPPED = {"Van": 0.5, "Truck": 0.2, "Tram": 0.1, "Pedestrian": 0.2}  # for what, and how often


@dataclass(frozen=True, eq=False)
class Variant:
    """A way in which a class may look: its parts, and how large they are."""

    parts: tuple[tuple[int, str], ...]  # index of the mesh, "body" or "glass"
    extents: Floats  # [3] metres; across, what a label measures: without mirrors


@dataclass
class Stander:
    """One object on the ground."""

    kind: str  # class, or THING
    place: Floats  # [2] W
    R_WO: Floats  # [3, 3]
    size: Floats  # [3] width, length, height, metres
    radius: float = 0.0

    def __post_init__(self) -> None:
        self.radius = float(np.hypot(*self.size[:2]) / 2)


@dataclass
class StreetSampler:
    """Draws streets; the same `seed` always gives the same one, whoever asks."""

    targets: tuple[PreparedMesh, ...]  # the class meshes, in the order of the labels; they are not drawn
    clutter: tuple[PreparedMesh, ...]  # the parts of `street_meshes`
    config: StreetConfig
    layouts: Layouts
    frames: tuple[Frame, ...]
    backgrounds: int
    sheets: int
    environments: int
    _variants: dict[str, list[Variant]] = field(init=False)
    _sizes: dict[str, Floats] = field(init=False)

    def __post_init__(self) -> None:
        groups: dict[str, list[tuple[int, str]]] = {}
        for index, mesh in enumerate(self.clutter):
            variant, part = mesh.name.rsplit("/", 1)
            groups.setdefault(variant, []).append((len(self.targets) + index, part))
        self._variants = {}
        for name, parts in groups.items():
            body = self.clutter[parts[0][0] - len(self.targets)]
            self._variants.setdefault(name.split("/")[0], []).append(Variant(tuple(parts), _measured(body)))
        self._sizes = {
            name: self.layouts.size[self.layouts.kind == k] for k, name in enumerate(self.layouts.classes)
        }
        if missing := [m.name for m in self.targets if m.name not in self._variants]:
            raise ValueError(
                f"streets know {', '.join(self.layouts.classes)}; there is nothing to draw for {missing[0]!r}"
            )

    def __call__(self, seed: tuple[int, ...]) -> Scene:
        rng = np.random.default_rng(seed)
        c = self.config
        behind = None
        if self.frames and rng.random() < c.frame_probability:
            behind = int(rng.integers(len(self.frames)))
        view = self._view(rng, None if behind is None else self.frames[behind])
        standers = self._placed(rng, view)
        fields = self._empty_fields(view)
        draws, centres = self._drawn(rng, standers, view, fields)
        fields |= daylight(rng, c, view.R_CW, centres, self.environments)
        fields |= ground_layers(rng, c, self.backgrounds, self.sheets)
        level = view.K[1, 2] + view.K[1, 1] * view.R_CW[1, 1] / max(view.R_CW[2, 1], 1e-3)
        fields |= horizon(rng, c, self.backgrounds, self.sheets, level)
        if behind is not None:
            fields["table"] = np.array(2.0)
            # As bright as a grey ground in the same light would be.
            light = (
                fields["environment"][1] + fields["light_colour"][0].mean() * -fields["light_direction"][0, 1]
            )
            gain = light * np.exp(rng.normal(0.2, 0.25))
            fields["frame"] = np.array([behind, *view.shown, gain])
            fields["frame_uv"] = view.uv
        return Scene(tuple(draws), {k: np.asarray(v, dtype=np.float32) for k, v in fields.items()})

    # -- camera and ground ----------------------------------------------------------------------------------

    def _view(self, rng: np.random.Generator, frame: Frame | None) -> View:
        c = self.config
        if frame is None:
            K = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1.0]])
            zoom = np.exp(rng.uniform(*np.log(c.zoom))) if rng.random() < 0.5 else 1.0
            K[:2, :2] *= zoom
            K[:2, 2] += rng.normal(0, 6, 2)
            height, slope = rng.uniform(*c.camera_height), np.deg2rad(rng.normal(0, c.pitch))
            R_CW = _turned(slope) @ _LEVEL
            none = np.zeros((0, 4))
            return View(K, R_CW, R_CW @ np.array([0, 0, -height]), (c.width, c.height), none, none, none)
        zoom = np.exp(rng.uniform(*np.log(c.zoom))) if rng.random() < 0.6 else 1.0
        width, height = frame.size
        shown = (min(c.width, width), min(c.height, height))
        x0, y0 = (
            rng.uniform(0, max(side - part / zoom, 0)) for side, part in zip(frame.size, shown, strict=True)
        )
        # A pixel u shows the frame's pixel u / zoom + x0; mirrored, that of width - 1 - u.
        mirror = rng.random() < c.mirror_probability
        uv = np.array([[1 / zoom, 0, x0], [0, 1 / zoom, y0]])
        K = frame.K.copy()
        boxes, areas, places = frame.boxes.copy(), frame.areas.copy(), frame.places.copy()
        K[:2] *= zoom
        K[:2, 2] -= np.array([x0, y0]) * zoom
        boxes, areas = (((b - [x0, y0, x0, y0]) * zoom) for b in (boxes, areas))
        if mirror:
            last = shown[0] - 1
            uv[0] = [-1 / zoom, 0, x0 + last / zoom]
            K[0, 2] = last - K[0, 2]
            boxes, areas = (
                np.column_stack([last - b[:, 2], b[:, 1], last - b[:, 0], b[:, 3]]) for b in (boxes, areas)
            )
            places[:, 0] *= -1
        camera_height, slope = frame.ground
        R_CW = _turned(-slope) @ _LEVEL
        return View(K, R_CW, R_CW @ np.array([0, 0, -camera_height]), shown, areas, boxes, places, uv)

    # -- who stands where -----------------------------------------------------------------------------------

    def _placed(self, rng: np.random.Generator, view: View) -> list[Stander]:
        c = self.config
        standers: list[Stander] = []
        # In a frame most places are taken: other streets are tried until enough objects stand there.
        wanted = int(rng.integers(1, c.max_targets)) if rng.random() < c.crowd_probability else 1
        for _ in range(_MOST_STREETS):
            if len(standers) >= wanted:
                break
            mirror = -1.0 if rng.random() < 0.5 else 1.0
            for row in rng.permutation(self.layouts.street(int(rng.integers(len(self.layouts))))):
                kind, size = self.layouts.classes[self.layouts.kind[row]], self.layouts.size[row]
                if kind == "Car" and rng.random() < c.swap_probability:
                    other = str(rng.choice(list(_SWAPPED), p=list(_SWAPPED.values())))
                    if other in self._variants and other in self._sizes:
                        kind, size = other, self._sizes[other][rng.integers(len(self._sizes[other]))]
                if kind not in self._variants:
                    continue
                yaw = self.layouts.yaw[row]
                if kind == "Pedestrian" and rng.random() < 0.5:
                    yaw = rng.uniform(-np.pi, np.pi)
                # rotation_y is about the camera's y, which points down; 0 looks along x. Front is -y.
                turn = about_z(-float(yaw) + np.pi / 2)
                place = self.layouts.place[row].copy()
                if mirror < 0:
                    place[0], turn = -place[0], np.diag([-1.0, 1, 1]) @ turn @ np.diag([-1.0, 1, 1])
                stander = Stander(kind, place, turn, size * rng.normal(1, 0.02))
                if c.distance[0] < place[1] < c.distance[1] and self._free(stander, standers, view):
                    standers.append(stander)
        for _ in range(int(rng.integers(0, c.things + 1))):
            place = np.array([rng.normal(0, 9), np.exp(rng.uniform(np.log(4), np.log(60)))])
            tall = rng.uniform(0.5, 5.0) if rng.random() < 0.6 else rng.uniform(0.4, 1.6)
            wide = rng.uniform(0.06, 0.3) if tall > 1.6 else rng.uniform(0.2, 1.3)
            stander = Stander(THING, place, about_z(rng.uniform(0, 6)), np.array([wide, wide, tall]))
            if abs(place[0]) > 1.2 and self._free(stander, standers, view):
                standers.append(stander)
        return sorted(standers, key=lambda s: float(s.place[1]))

    def _free(self, new: Stander, standers: list[Stander], view: View) -> bool:
        """Whether it stands clear of the others, and behind nothing of the frame, which it would cover."""
        if any(np.linalg.norm(new.place - o.place) < _apart(new, o) for o in standers):
            return False
        if not len(view.boxes):
            return True
        gaps = np.hypot(view.places[:, 0] - new.place[0], view.places[:, 1] - new.place[1])
        if (gaps < 0.8 * (new.radius + view.places[:, 2])).any():
            return False
        box = self._box(new, view)
        if box is None:
            return True
        low, high = np.maximum(box[:2], view.boxes[:, :2]), np.minimum(box[2:], view.boxes[:, 2:])
        common = (high - low).clip(0).prod(axis=1) / max((box[2:] - box[:2]).prod(), 1e-6)
        return not (common[view.places[:, 3] < new.place[1]] > self.config.behind).any()

    def _box(self, stander: Stander, view: View) -> Floats | None:
        R, t = view.placed(stander)
        half = stander.size / 2
        return corner_box(np.vstack([np.column_stack([R, t]), [0, 0, 0, 1]]), -half, half, np.ones(3), view.K)

    # -- what is drawn --------------------------------------------------------------------------------------

    def _empty_fields(self, view: View) -> dict[str, Floats]:
        c = self.config
        world = np.column_stack([view.R_CW.T, -view.R_CW.T @ view.t_CW])
        up = view.R_CW[:, 2]
        areas = np.zeros((AREAS, 4))
        areas[: min(len(view.areas), AREAS - c.max_targets)] = view.areas[: AREAS - c.max_targets]
        return {
            "K": view.K, "labels": np.full(c.max_targets, -1.0),
            "T_CO": np.tile(np.eye(4), (c.max_targets, 1, 1)), "boxes": np.zeros((c.max_targets, 4)),
            "scale": np.ones((c.max_targets, 3)), "table": np.array(1.0),
            "plane": np.array([*up, up @ view.t_CW]), "P_C": world[:2],
            "materials": np.tile([0.9, 0.0, 0.1], (c.materials, 1)), "slots": np.zeros(c.materials),
            "areas": areas, "frame": np.array([-1.0, *view.shown, 1.0]), "frame_uv": np.zeros((2, 3)),
        }  # fmt: skip

    def _drawn(
        self, rng: np.random.Generator, standers: list[Stander], view: View, fields: dict[str, Floats]
    ) -> tuple[list[Draw], Floats]:
        """Nearest first: slots go to those that are large and whole enough, areas to the others."""
        c = self.config
        names = [mesh.name for mesh in self.targets]
        draws: list[Draw] = []
        centres = []
        slot, other, area = 0, c.max_targets, min(len(view.areas), AREAS - c.max_targets)
        for stander in standers:
            R, t = view.placed(stander)
            box = self._box(stander, view)
            if box is None or t[2] < c.near or t[2] - stander.radius < c.near:
                continue
            if box[0] > view.shown[0] or box[2] < 0 or box[1] > view.shown[1] or box[3] < 0:
                continue
            centres.append(t)
            found = None
            if stander.kind in names:
                corner = np.array(view.shown)
                part = (np.minimum(box[2:], corner) - np.maximum(box[:2], 0)).clip(0).prod()
                share = part / (box[2:] - box[:2]).prod()
                if box[3] - box[1] >= c.least_height and share >= c.least_shown and slot < c.max_targets:
                    slot, found = slot + 1, slot + 1
                    label = names.index(stander.kind)
                    self._label(fields, slot - 1, label, stander, R, t, box)
                elif area < AREAS:
                    fields["areas"][area] = box
                    area += 1
            variants = self._variants[stander.kind]
            variant = variants[int(rng.integers(len(variants)))]
            T_CM = np.column_stack([R * (stander.size / variant.extents), t])
            for mesh, part_name in variant.parts:
                if part_name == "body" and found is not None:
                    material = found
                else:
                    other += 1
                    material = other
                if material >= c.plane_material:
                    continue
                fields["slots"][material] = found or 0
                look = part_name if stander.kind not in ("Pedestrian", THING) else "thing"
                fields["materials"][material] = material_of(rng, look)
                paint = _paint(rng, stander.kind, part_name)
                draws.append(Draw(mesh, T_CM, material, paint.matrix, paint.gamma, paint.grain))
        ground = np.array([rng.uniform(0.6, 1.0), 0.0, rng.uniform(0.0, 0.4)])
        fields["materials"][-1] = ground
        return draws, np.array(centres).reshape(-1, 3)

    def _label(
        self,
        fields: dict[str, Floats],
        slot: int,
        label: int,
        stander: Stander,
        R: Floats,
        t: Floats,
        box: Floats,
    ) -> None:
        mesh = self.targets[label]
        scale = stander.size / np.ptp(mesh.hull, axis=0)
        fields["labels"][slot] = label
        fields["T_CO"][slot, :3, :3] = R
        fields["T_CO"][slot, :3, 3] = t - R @ (scale * mesh.centre)
        fields["scale"][slot], fields["boxes"][slot] = scale, box


@dataclass(frozen=True, eq=False)
class View:
    """A camera over the ground, and what its picture shows already."""

    K: Floats
    R_CW: Floats
    t_CW: Floats
    shown: tuple[int, int]  # width and height of what is not empty, pixels
    areas: Floats  # [I, 4]
    boxes: Floats  # [O, 4]
    places: Floats  # [O, 4]
    uv: Floats = field(default_factory=lambda: np.zeros((2, 3)))

    def placed(self, stander: Stander) -> tuple[Floats, Floats]:
        """Rotation [3, 3] and the middle of its box [3] in the camera."""
        middle = np.array([*stander.place, stander.size[2] / 2])
        return self.R_CW @ stander.R_WO, self.R_CW @ middle + self.t_CW


def _paint(rng: np.random.Generator, kind: str, part: str) -> Paint:
    if part == "glass":
        return glass_paint(rng)
    if kind == "Pedestrian":
        return person_paint(rng)
    return thing_paint(rng) if kind == THING else vehicle_paint(rng, kind)


def _turned(slope: float) -> Floats:
    return about_vector(np.array([slope, 0.0, 0.0]))


def _apart(a: Stander, b: Stander) -> float:
    """Metres between the middles of two that do not touch: long ones stand side by side."""
    along = abs(float(a.R_WO[:2, 1] @ b.R_WO[:2, 1]))
    gap = a.place - b.place
    gap = gap / max(float(np.linalg.norm(gap)), 1e-6)
    reach = 0.0
    for item in (a, b):
        across, ahead = np.abs(gap @ item.R_WO[:2, 0]), np.abs(gap @ item.R_WO[:2, 1])
        reach += float(min(item.size[0] / 2 / max(across, 1e-3), item.size[1] / 2 / max(ahead, 1e-3)))
    return reach + (0.3 if along > 0.9 else 0.5)


def _measured(body: PreparedMesh) -> Floats:
    """[3] extents as a label has them: of vehicles across without mirrors, which stick out high up."""
    extents = np.ptp(body.hull, axis=0).astype(np.float64)
    if body.name.startswith(("Car", "Van", "Truck")):
        low = body.vertices[body.vertices[:, 2] < 0.0]
        extents[0] = 2 * float(np.abs(low[:, 0]).max())
    return extents
