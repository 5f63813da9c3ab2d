"""Where objects, camera, lights and sheets of paper are: one random scene from a seed."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from smope.scenes.config import SceneConfig
from smope.scenes.dress import (
    Paint,
    draw_colour,
    sample_background,
    sample_layers,
    sample_lights,
    sample_materials,
)
from smope.scenes.layout import Draw, Scene
from smope.scenes.meshes import PreparedMesh
from smope.scenes.turns import about_vector, about_z, any_turn

Floats = NDArray[np.float64]


@dataclass
class Placed:
    """One instance. `target` is its object index, -1 for clutter."""

    mesh: int
    target: int
    R: Floats  # [3, 3] centred mesh frame to world (table) or camera (free), scale included
    t: Floats  # [3]
    radius: float  # footprint or bounding radius, metres
    top: float = 0.0  # height of its highest point, metres
    hides: bool = False  # put there to hide a target


@dataclass
class SceneSampler:
    """Draws scenes; the same `seed` always gives the same scene, whoever asks."""

    targets: tuple[PreparedMesh, ...]
    clutter: tuple[PreparedMesh, ...]
    config: SceneConfig
    backgrounds: int  # textures in the bank that are photos come first ...
    sheets: int  # ... then procedural ones ...
    boards: int  # ... then marker boards
    environments: int
    _known: NDArray[np.intp] = field(init=False)
    _invented: NDArray[np.intp] = field(init=False)
    _handy: NDArray[np.intp] = field(init=False)
    _slender: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        known = np.array([mesh.scale_known for mesh in self.clutter], dtype=bool)
        self._known, self._invented = np.nonzero(known)[0], np.nonzero(~known)[0]
        size = np.array([mesh.diameter for mesh in self.clutter])
        slender = np.array([mesh.slender for mesh in self.clutter])
        largest = max(mesh.diameter for mesh in self.targets)
        # What may hide a target and yet leave the others in sight: about their size, or long and thin.
        self._handy = np.nonzero((size > 0.25 * largest) & (size < largest))[0]
        self._slender = np.nonzero((size > 0.4 * largest) & (size < 1.2 * largest) & (slender > 1.8))[0]

    def __call__(self, seed: tuple[int, ...]) -> Scene:
        rng = np.random.default_rng(seed)
        K = self._intrinsics(rng)
        wanted = self._choose_targets(rng)
        table = rng.random() < self.config.table_probability
        if table:
            placed = self._heap(rng, wanted)
            R_CW, t_CW = self._camera(rng, placed)
            placed = self._out_of_the_way(placed, -R_CW.T @ t_CW)
            placed += self._occluders(rng, placed, -R_CW.T @ t_CW)
        else:
            placed = self._free(rng, wanted, K)
            # World up is somewhere on the camera's upper side: lights and the environment hang on it.
            lean, roll = np.deg2rad([rng.uniform(-150, -60), rng.normal(0, 30)])
            R_CW = about_z(roll) @ about_vector(np.array([lean, 0.0, 0.0]))
            t_CW = np.array([0.0, 0.0, 0.8])
            for item in placed:
                item.R, item.t = R_CW.T @ item.R, R_CW.T @ (item.t - t_CW)
        return self._assemble(rng, placed, K, R_CW, t_CW, table)

    def mesh(self, index: int) -> PreparedMesh:
        return self.targets[index] if index < len(self.targets) else self.clutter[index - len(self.targets)]

    def _intrinsics(self, rng: np.random.Generator) -> Floats:
        c = self.config
        K = np.array([[c.fx, 0, c.cx], [0, c.fy, c.cy], [0, 0, 1.0]])
        if rng.random() < c.focal_jitter_probability:
            K[:2, :2] *= np.exp(rng.uniform(*np.log(c.focal_scale)))
            K[:2, 2] += rng.normal(0, 0.015, 2) * (c.width, c.height)
        return K

    def _choose_targets(self, rng: np.random.Generator) -> NDArray[np.intp]:
        c, known = self.config, len(self.targets)
        count = int(rng.integers(c.targets[0], c.targets[1] + 1))
        if rng.random() < c.full_set_probability:
            count = c.targets[1]
        if rng.random() >= c.repeat_probability:
            return rng.permutation(known)[: min(count, known)]
        if rng.random() < 0.5:
            return rng.integers(0, known, count)
        copies = min(int(rng.integers(2, 4)), c.targets[1])
        kinds = rng.permutation(known)[: 1 + max(count - copies, 0)]
        return rng.permutation(np.append(kinds, np.full(copies - 1, kinds[0])))

    def _choose_clutter(self, rng: np.random.Generator) -> int:
        """Index of a clutter mesh, counted behind the targets."""
        invented = len(self._invented) > 0 and rng.random() < self.config.invented_scale_share
        pool = self._invented if invented or len(self._known) == 0 else self._known
        return len(self.targets) + int(rng.choice(pool))

    def _resting(self, rng: np.random.Generator, index: int, target: int, scale: float = 1.0) -> Placed:
        """An instance standing or lying on z = 0 at the origin."""
        c, mesh = self.config, self.mesh(index)
        if target >= 0 and rng.random() < c.upright_probability:
            R = np.eye(3)
        else:
            # Flattened odds: rare rests are views too.
            odds = np.sqrt(mesh.rest_weights.astype(np.float64))
            R = mesh.rests[rng.choice(len(odds), p=odds / odds.sum())].astype(np.float64)
        R = about_z(rng.uniform(0, 2 * np.pi)) @ R
        if rng.random() < c.tilt_probability:
            R = about_vector(rng.normal(0, np.deg2rad(15), 3)) @ R
        if target < 0:
            R = R * (scale * rng.uniform(*c.clutter_scale))
        points = R @ mesh.hull_rows
        low, high = points.min(axis=1), points.max(axis=1)
        extent = (high - low)[:2]
        # Between the inscribed and the circumscribed circle of the footprint box.
        radius = 0.25 * float(extent.max() + extent.min())
        shift = np.array([-(low[0] + high[0]) / 2, -(low[1] + high[1]) / 2, -low[2]])
        return Placed(index, target, R, shift, radius, float(high[2] - low[2]))

    def _heap(self, rng: np.random.Generator, wanted: NDArray[np.intp]) -> list[Placed]:
        c = self.config
        items = [self._resting(rng, int(k), int(k)) for k in wanted]
        if self.clutter:
            extra = int(rng.integers(c.clutter[0], c.clutter[1] + 1))
            items += [self._resting(rng, self._choose_clutter(rng), -1) for _ in range(extra)]
        items = [items[k] for k in rng.permutation(len(items))]
        spread, overlap = np.exp(rng.uniform(*np.log(c.heap_radius))), rng.uniform(*c.overlap)
        centres = np.zeros((0, 2))
        radii = np.zeros(0)
        for k, item in enumerate(items):
            if k > 0 and rng.random() < c.stack_probability:
                below = items[int(rng.integers(k))]
                item.t = item.t + np.array([*(below.t[:2] + rng.normal(0, 0.2 * below.radius, 2)), below.top])
                item.top += below.top
                continue
            position = _free_spot(rng, item.radius, centres, radii, spread, overlap)
            centres, radii = np.vstack([centres, position]), np.append(radii, item.radius)
            item.t = item.t + np.array([*position, 0.0])
        if self.clutter:
            for _ in range(int(rng.integers(c.far_clutter[0], c.far_clutter[1] + 1))):
                item = self._resting(rng, self._choose_clutter(rng), -1, rng.uniform(*c.far_scale))
                angle, away = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 1.2) + item.radius
                item.t = item.t + away * np.array([np.cos(angle), np.sin(angle), 0.0])
                items.append(item)
        return items

    def _camera(self, rng: np.random.Generator, placed: list[Placed]) -> tuple[Floats, Floats]:
        """World-to-camera rotation and translation, looking at one of the targets from above the plane."""
        c = self.config
        subjects = [item for item in placed if item.target >= 0]
        subject = subjects[int(rng.integers(len(subjects)))]
        low, high = c.elevation
        elevation = rng.uniform(low, high)
        if rng.random() < 0.5:
            elevation = np.clip(rng.normal(45, 18), low, high)
        elevation = np.deg2rad(elevation)
        azimuth = rng.uniform(0, 2 * np.pi)
        look_at = 0.6 * subject.t + rng.normal(0, c.look_at_jitter, 3) * (1, 1, 0.4)
        look_at[2] = max(look_at[2], 0.0)
        outward = np.array(
            [np.cos(elevation) * np.cos(azimuth), np.cos(elevation) * np.sin(azimuth), np.sin(elevation)]
        )
        part = c.usual_distance if rng.random() < c.usual_distance_probability else (0.0, 1.0)
        distance = c.distance[0] * (c.distance[1] / c.distance[0]) ** rng.uniform(*part)
        eye = look_at + outward * distance
        eye[2] = max(eye[2], 0.03)
        # Keep the lens out of every object.
        for item in placed:
            away = eye - item.t
            near = self.mesh(item.mesh).diameter / 2 + 0.15
            gap = float(np.linalg.norm(away))
            if gap < near:
                eye = eye + outward * (near - gap)
        forward = look_at - eye
        forward /= np.linalg.norm(forward)
        side = np.cross(forward, [0.0, 0.0, 1.0])
        if np.linalg.norm(side) < 1e-6:
            side = np.array([-np.sin(azimuth), np.cos(azimuth), 0.0])
        side /= np.linalg.norm(side)
        upright = np.stack([side, np.cross(forward, side), forward])
        roll = rng.uniform(-180, 180) if rng.random() < c.any_roll_probability else rng.normal(0, c.roll)
        R_CW = about_z(np.deg2rad(roll)) @ upright
        return R_CW, -R_CW @ eye

    def _out_of_the_way(self, placed: list[Placed], eye: Floats) -> list[Placed]:
        """Without the clutter that holds the lens or, large, stands between it and the heap: such an image
        shows one flat colour and teaches nothing."""
        kept = []
        for item in placed:
            radius = self.mesh(item.mesh).diameter / 2 * float(np.cbrt(np.linalg.det(item.R)))
            share = float(
                np.clip(1 - (item.t @ eye) / (eye @ eye), 0.0, 1.0)
            )  # from the eye to the heap's middle
            aside = float(np.linalg.norm(eye * (1 - share) - item.t))
            holds = np.linalg.norm(eye - item.t) < radius + 0.15
            blocks = radius > 0.15 and share < 0.8 and aside < 0.7 * radius
            if item.target >= 0 or not (holds or blocks):
                kept.append(item)
        return kept

    def _occluders(self, rng: np.random.Generator, placed: list[Placed], eye: Floats) -> list[Placed]:
        """Things between the camera and targets on the table: standing there, or held in from the air."""
        c = self.config
        if not self.clutter:
            return []
        found: list[Placed] = []
        for subject in [item for item in placed if item.target >= 0]:
            if rng.random() > c.table_occluder_probability:
                continue
            away = eye - subject.t
            gap = float(np.linalg.norm(away))
            flat = float(np.linalg.norm(away[:2]))
            # Seen from above nothing that stands beside it hides a target.
            held = rng.random() < c.held_probability or away[2] > 1.4 * flat
            pool = self._slender if held and rng.random() < 0.6 else self._handy
            index = len(self.targets) + int(rng.choice(pool)) if len(pool) else self._choose_clutter(rng)
            if held:
                R = any_turn(rng) * rng.uniform(*c.clutter_scale)
                radius = self.mesh(index).diameter / 2
                reach = subject.radius * rng.uniform(0.4, 1.4) + 0.4 * radius * rng.random()
                side = np.cross(away / gap, rng.normal(0, 1, 3))
                spot = subject.t + rng.uniform(0.06, 0.35) * away + side / np.linalg.norm(side) * reach
                spot[2] = max(spot[2], 0.3 * radius)
                item = Placed(index, -1, R, spot, radius, hides=True)
            else:
                item = self._resting(rng, index, -1)
                turn = about_z(rng.normal(0, np.deg2rad(30)))[:2, :2]
                step = (subject.radius + item.radius) * rng.uniform(0.8, 1.5)
                item.t[:2] += subject.t[:2] + turn @ away[:2] * (step / flat)
                item.hides = True
            if np.linalg.norm(eye - item.t) > self.mesh(index).diameter / 2 + 0.15:
                found.append(item)
        return found

    def _free(self, rng: np.random.Generator, wanted: NDArray[np.intp], K: Floats) -> list[Placed]:
        """Objects in the air, in camera coordinates, with others between them and the camera."""
        c = self.config
        placed: list[Placed] = []
        K_inverse = np.linalg.inv(K)

        def put(index: int, target: int, pixel: Floats, depth: float, hides: bool = False) -> bool:
            R = any_turn(rng)
            if target < 0:
                R = R * rng.uniform(*c.clutter_scale)
            radius = self.mesh(index).diameter / 2
            centre = K_inverse @ np.array([*pixel, 1.0]) * max(depth, radius + c.near + 0.05)
            clear = all(np.linalg.norm(centre - o.t) > 0.45 * (radius + o.radius) for o in placed)
            if clear:
                placed.append(Placed(index, target, R, centre, radius, hides=hides))
            return clear

        size = np.array([c.width, c.height])
        focus, gather = rng.uniform(0.25, 0.75, 2) * size, rng.random() < 0.5
        for k in wanted:
            for _ in range(12):
                pixel = rng.normal(focus, 0.16 * size) if gather else rng.uniform(0.03, 0.97, 2) * size
                if put(int(k), int(k), pixel, np.exp(rng.uniform(*np.log(c.distance)))):
                    break
        if self.clutter:
            for subject in [item for item in placed if item.target >= 0]:
                if rng.random() > c.front_occluder_probability:
                    continue
                projected = K @ subject.t
                reach = K[0, 0] * subject.radius / subject.t[2]
                pixel = projected[:2] / projected[2] + rng.uniform(-0.9, 0.9, 2) * reach
                put(self._choose_clutter(rng), -1, pixel, subject.t[2] * rng.uniform(0.55, 0.95), True)
            for _ in range(int(rng.integers(c.clutter[0], c.clutter[1] + 1))):
                put(
                    self._choose_clutter(rng),
                    -1,
                    rng.uniform(0, 1, 2) * size,
                    np.exp(rng.uniform(np.log(0.5), np.log(2.0))),
                )
        return placed

    def _paints(self, rng: np.random.Generator, placed: list[Placed]) -> list[Paint]:
        """Colours of all items; clutter often takes that of a target beside it, in the image, or known."""
        c = self.config
        subjects = [item for item in placed if item.target >= 0]
        own = [draw_colour(rng, True, self.mesh(item.mesh).mean_color, c) for item in subjects]
        shown = [p.of(self.mesh(item.mesh).mean_color) for p, item in zip(own, subjects, strict=True)]
        spots = np.array([item.t for item in subjects]).reshape(-1, 3)
        reach = np.array([item.radius for item in subjects])
        known, paints = iter(own), []
        for item in placed:
            if item.target >= 0:
                paints.append(next(known))
                continue
            gaps = np.linalg.norm(spots - item.t, axis=1)
            near = item.hides or bool((gaps < 1.25 * (reach + item.radius)).any())
            aim = None
            if rng.random() < (c.lookalike_near_probability if near else c.lookalike_probability):
                choice = rng.random()
                if choice < 0.4 and shown:
                    aim = shown[int(gaps.argmin())]
                elif choice < 0.7 and shown:
                    aim = shown[int(rng.integers(len(shown)))]
                else:
                    any_known = self.targets[int(rng.integers(len(self.targets)))].mean_color
                    aim = draw_colour(rng, True, any_known, c).of(any_known)
            paints.append(draw_colour(rng, False, self.mesh(item.mesh).mean_color, c, aim=aim))
        return paints

    def _assemble(
        self,
        rng: np.random.Generator,
        placed: list[Placed],
        K: Floats,
        R_CW: Floats,
        t_CW: Floats,
        table: bool,
    ) -> Scene:
        c = self.config
        fields = {
            "K": K,
            "labels": np.full(c.max_targets, -1.0),
            "T_CO": np.tile(np.eye(4), (c.max_targets, 1, 1)),
            "boxes": np.zeros((c.max_targets, 4)),
        }
        paints = self._paints(rng, placed)
        draws: list[Draw] = []
        slot, other = 0, c.max_targets
        for item, paint in zip(placed, paints, strict=True):
            mesh = self.mesh(item.mesh)
            R, t = R_CW @ item.R, R_CW @ item.t + t_CW
            if item.target >= 0:
                outline = mesh.hull_rows if c.box == "silhouette" else mesh.box_rows
                points = R @ outline + t[:, None]
                if slot == c.max_targets or points[2].min() < c.near:
                    continue  # the silhouette of something that reaches behind the lens has no box
                pixels = (K @ points)[:2] / points[2]
                fields["labels"][slot] = item.target
                fields["T_CO"][slot, :3, :3] = R
                fields["T_CO"][slot, :3, 3] = t - R @ mesh.centre
                fields["boxes"][slot] = [*pixels.min(axis=1), *pixels.max(axis=1)]
                slot += 1
                material = slot
            else:
                if t[2] + mesh.diameter * np.linalg.norm(R[:, 0]) / 2 < c.near:
                    continue
                other += 1
                material = other
            T_CM = np.column_stack([R, t])
            draws.append(Draw(item.mesh, T_CM, material, paint.matrix, paint.gamma, paint.grain, paint.marks))
        up = R_CW[:, 2]
        fields["table"] = np.array(float(table))
        fields["plane"] = np.array([*up, up @ t_CW])
        world_xy = np.column_stack([R_CW.T, -R_CW.T @ t_CW])[:2]
        fields["P_C"] = world_xy
        fields |= sample_layers(rng, c, self.backgrounds, self.sheets, self.boards)
        fields |= sample_background(rng, self.backgrounds, self.sheets)
        centres = np.array([d.T_CM[:, 3] for d in draws if d.T_CM[2, 3] < 2.5]).reshape(-1, 3)
        fields |= sample_lights(rng, c, R_CW, centres, self.environments, table)
        fields["materials"] = sample_materials(rng, c)
        return Scene(tuple(draws), {k: np.asarray(v, dtype=np.float32) for k, v in fields.items()})


def _free_spot(
    rng: np.random.Generator, radius: float, centres: Floats, radii: Floats, spread: float, overlap: float
) -> Floats:
    """A place near the heap's middle where a circle overlaps others no more than allowed, or the least."""
    tries = rng.normal(0, 1, (48, 2)) * spread * np.linspace(0.4, 2.0, 48)[:, None]
    if len(centres) == 0:
        return tries[0]
    gaps = np.linalg.norm(tries[:, None] - centres, axis=2)
    smaller = np.minimum(radius, radii)
    deepest = ((radius + radii - gaps) / smaller).max(axis=1)  # share of the smaller radius
    fits = np.nonzero(deepest <= overlap)[0]
    return tries[fits[0] if len(fits) else int(deepest.argmin())]
