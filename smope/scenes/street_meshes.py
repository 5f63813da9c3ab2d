"""Vehicles and people made ready to be painted anew for every street: body, glass, wheels, lamps told apart.

Class meshes come without materials, or with one colour, so parts are told by where they lie on the class:
glass in the upper half between pillars, wheels at the axles, lamps at the ends. A vertex colour then is no
colour but three shares: of the paint, of neutral grey, of red (of a person: shirt, trousers, skin); each draw
says what those are (`Paint.matrix`). Glass is a mesh of its own, as it has another material.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import trimesh
from numpy.typing import NDArray

from smope.meshes import load_mesh
from smope.scenes.meshes import PreparedMesh, prepare_mesh

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]
FACES = 6000
THING = "Thing"
# Files in the folder of vehicles (metres, z up, front = -y) and the class that each is one of. A bus is none.
VEHICLES = {"hatchback": "Car", "prius_hybrid": "Car", "suv": "Car", "pickup": "Car", "ambulance": "Van"}


class Place:
    """Where points lie within their vehicle: u across and v along in -1..1 (front -1), h up in 0..1."""

    def __init__(self, points: Floats, normals: Floats, low: Floats, high: Floats) -> None:
        middle, half = (low + high) / 2, (high - low) / 2
        self.u, self.v = ((points[:, k] - middle[k]) / half[k] for k in (0, 1))
        self.h = (points[:, 2] - low[2]) / (high[2] - low[2])
        self.y, self.z = points[:, 1] - middle[1], points[:, 2] - low[2]  # metres
        self.n = np.abs(normals)


def street_meshes(classes: Mapping[str, trimesh.Trimesh], vehicles: Path | None) -> tuple[PreparedMesh, ...]:
    """Every variant of every class as its parts, named "Car/sedan/body", "Car/sedan/glass" and so on.

    `classes` are the class meshes (metres, z up, origin at the bottom's middle, front = -y) under KITTI's
    names; those that are none of these are left out.
    """
    parts: list[PreparedMesh] = []
    for name, mesh in classes.items():
        for variant, changed in _VARIANTS.get(name, lambda _: {})(mesh).items():
            parts += _parts(
                f"{name}/{variant}", changed, _GLASS.get(f"{name}/{variant}", _GLASS[name]), _COLOURS[name]
            )
    for stem, name in VEHICLES.items():
        file = (vehicles or Path()) / f"{stem}.glb"
        if vehicles is not None and file.is_file() and name in classes:
            parts += _parts(f"{name}/{stem}", load_mesh(file, "m"), _GLASS[stem], _COLOURS[name])
    for stem, thing in _things().items():
        parts += _parts(f"{THING}/{stem}", thing, _no_glass, lambda p: np.ones((len(p.h), 3)))
    return tuple(parts)


def _things() -> dict[str, trimesh.Trimesh]:
    """What else stands on streets and is none of the classes: posts, bins and boxes, bushes; 1 m across."""
    rng = np.random.default_rng(5)
    bush = trimesh.creation.icosphere(subdivisions=3, radius=0.5)
    bumps = np.sin(bush.vertices @ rng.normal(0, 14, (3, 6))).mean(axis=1, keepdims=True)
    bush = trimesh.Trimesh(bush.vertices * (1 + 0.35 * bumps), bush.faces, process=False)
    return {
        "post": trimesh.creation.cylinder(0.5, 1.0, sections=14),
        "box": trimesh.creation.box((1.0, 1.0, 1.0)),
        "bush": bush,
    }


def _parts(
    name: str, mesh: trimesh.Trimesh, glass: Callable[[Place], Mask], paint: Callable[[Place], Floats]
) -> list[PreparedMesh]:
    """Body and glass of one variant; the body's coarse mesh, which casts shadows, is that of both."""
    whole = prepare_mesh(name, clustered(mesh), faces=FACES, coarse_faces=800)
    if not name.startswith(("Pedestrian", THING)):
        whole = _cut_small(whole, at_glass=0.11 if name.startswith(("Car", "Van")) else 0.25)
    vertices, faces = whole.vertices.astype(np.float64), whole.faces
    low, high = whole.hull.min(axis=0).astype(np.float64), whole.hull.max(axis=0).astype(np.float64)
    corners = vertices[faces]
    normals = np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    is_glass = glass(Place(corners.mean(axis=1), normals, low, high))
    colours = paint(Place(vertices, whole.normals.astype(np.float64), low, high))
    bytes_ = (colours.clip(0, 1) * 255).round().astype(np.uint8)
    body = replace(whole, name=f"{name}/body", faces=faces[~is_glass], colors=bytes_)
    if not is_glass.any():
        return [body]
    # The silhouette and the shadow are the body's: what is left of them here is one point.
    point = np.zeros((3, 3), dtype=np.float32)
    window = replace(
        whole,
        name=f"{name}/glass",
        faces=faces[is_glass],
        colors=np.full_like(bytes_, 255),
        coarse_vertices=point,
        coarse_faces=np.array([[0, 1, 2]], dtype=np.int32),
    )
    return [_trimmed(body), _trimmed(window)]


def _cut_small(mesh: PreparedMesh, longest: float = 0.35, at_glass: float = 0.11) -> PreparedMesh:
    """With no edge longer than that, metres, and finer where glass may begin: parts then end where they
    should and not with a large face."""
    low, high = mesh.hull[:, 2].min(), mesh.hull[:, 2].max()
    vertices, normals, faces = mesh.vertices, mesh.normals, mesh.faces
    while len(faces) < 3 * FACES:
        corners = vertices[faces]
        h = (corners[..., 2].mean(axis=1) - low) / (high - low)
        finest = np.where((h > 0.5) & (h < 0.97), at_glass, longest)
        long = np.linalg.norm(corners - np.roll(corners, 1, axis=1), axis=-1).max(axis=1) > finest
        if not long.any():
            break
        vertices, faces, more = trimesh.remesh.subdivide(vertices, faces, long, {"normals": normals})
        normals = more["normals"]
    normals = normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    colours = np.zeros((len(vertices), 3), dtype=np.uint8)
    return replace(
        mesh,
        vertices=vertices.astype(np.float32),
        normals=normals.astype(np.float32),
        faces=faces.astype(np.int32),
        colors=colours,
    )


def clustered(mesh: trimesh.Trimesh, most: int = 30_000, wanted: int = 16_000) -> trimesh.Trimesh:
    """A mesh of too many loose sheets with its vertices brought together on a grid, until few faces are left
    (Rossignac and Borrel 1993): collapsing edges, as `prepare_mesh` does, would tear the sheets away."""
    vertices, faces, cell = np.asarray(mesh.vertices, dtype=np.float64), np.asarray(mesh.faces), 0.02
    if len(faces) <= most:
        return mesh
    while len(faces) > wanted and cell < 0.15:
        keys = np.round(np.asarray(mesh.vertices) / cell).astype(np.int64)
        _, first, cells = np.unique(keys, axis=0, return_index=True, return_inverse=True)
        merged = cells.reshape(-1)[np.asarray(mesh.faces)]
        merged = merged[np.unique(np.sort(merged, axis=1), axis=0, return_index=True)[1]]
        whole = (merged != np.roll(merged, 1, axis=1)).all(axis=1)
        vertices, faces = np.asarray(mesh.vertices)[first], merged[whole]
        cell *= 1.4
    return trimesh.Trimesh(vertices, faces, process=False)


def _trimmed(mesh: PreparedMesh) -> PreparedMesh:
    """Without the vertices that no face needs."""
    used, faces = np.unique(mesh.faces, return_inverse=True)
    return replace(
        mesh,
        vertices=mesh.vertices[used],
        normals=mesh.normals[used],
        colors=mesh.colors[used],
        faces=faces.reshape(-1, 3).astype(np.int32),
    )


# -- glass ----------------------------------------------------------------------------------------------


def _car_glass(
    p: Place, belt: float = 0.62, top: float = 0.94, front: float = -0.5, back: float = 0.93
) -> Mask:
    inside = (p.h > belt) & (p.h < top) & (p.v > front) & (p.v < back) & (p.n[:, 2] < 0.93)
    side = p.n[:, 0] > 0.7
    pillar = side & ((np.abs(p.v - 0.06) < 0.025) | (np.abs(p.v - 0.48) < 0.03))
    corner = ~side & (np.abs(p.u) > 0.74)
    return inside & ~pillar & ~corner


def _van_glass(p: Place) -> Mask:
    band = (p.h > 0.52) & (p.h < 0.87) & (p.n[:, 2] < 0.93)
    front = band & (p.v < -0.42) & (p.v > -0.97)
    rear = band & (p.v > 0.9) & (np.abs(p.u) < 0.8) & (np.abs(p.u) > 0.06) & (p.n[:, 1] > 0.6)
    return (front & ~((p.n[:, 0] < 0.7) & (np.abs(p.u) > 0.84))) | rear


def _bus_van_glass(p: Place) -> Mask:
    """A van with windows all along."""
    side = (p.h > 0.55) & (p.h < 0.87) & (p.n[:, 0] > 0.7) & (np.abs(p.v) < 0.86)
    return _van_glass(p) | (side & (np.abs(np.abs(p.v - 0.2) - 0.3) > 0.03))


def _truck_glass(p: Place) -> Mask:
    band = (p.z > 1.75) & (p.z < 2.5)
    return band & (((p.n[:, 1] > 0.6) & (p.v < -0.9)) | ((p.n[:, 0] > 0.8) & (p.y < p.y.min() + 1.2)))


def _tram_glass(p: Place) -> Mask:
    band = (p.h > 0.42) & (p.h < 0.8)
    pillar = np.abs((p.y / 1.6) % 1 - 0.5) > 0.44
    side = band & (p.n[:, 0] > 0.8) & ~pillar & (np.abs(p.v) < 0.97)
    return side | (band & (p.n[:, 1] > 0.6) & (np.abs(p.v) > 0.93) & (np.abs(p.u) < 0.88))


def _no_glass(p: Place) -> Mask:
    return np.zeros(len(p.h), dtype=bool)


# -- colours: shares of paint, grey, red ----------------------------------------------------------------


def _vehicle_colours(p: Place, axles: tuple[float, ...], radius: float, lamp: tuple[float, float]) -> Floats:
    colours = np.zeros((len(p.h), 3))
    colours[:, 0] = 1.0
    trim = (p.h < 0.17) | ((np.abs(p.v) > 0.9) & (p.h < 0.26))
    colours[trim] = [0.25, 0.05, 0.0]
    for axle in axles:
        gap = np.hypot(p.y - axle, p.z - radius)
        outer = np.abs(p.u) > 0.55
        colours[outer & (gap < 1.12 * radius)] = [0.0, 0.05, 0.0]  # tyre and wheel arch
        colours[outer & (gap < 0.62 * radius)] = [0.0, 0.45, 0.0]
    low, high = lamp
    at_height = (p.h > low) & (p.h < high) & (np.abs(p.u) > 0.6)
    colours[at_height & (p.v < -0.9)] = [0.0, 0.9, 0.0]
    colours[at_height & (p.v > 0.93)] = [0.0, 0.05, 0.9]
    plate = (p.h > 0.36) & (p.h < 0.44) & (np.abs(p.u) < 0.27) & (np.abs(p.v) > 0.94)
    colours[plate] = [0.0, 0.95, 0.0]
    return colours


def _car_colours(p: Place) -> Floats:
    half = float(np.abs(p.y).max())
    return _vehicle_colours(p, (-0.61 * half, 0.58 * half), 0.31, (0.45, 0.62))


def _van_colours(p: Place) -> Floats:
    half = float(np.abs(p.y).max())
    return _vehicle_colours(p, (-0.64 * half, 0.57 * half), 0.33, (0.33, 0.5))


def _truck_colours(p: Place) -> Floats:
    half = float(np.abs(p.y).max())
    colours = _vehicle_colours(p, (-half + 1.35, half - 1.5, half - 2.8), 0.5, (0.16, 0.24))
    box = (p.y > -half + 2.05) & (p.z > 1.15)
    colours[box] = [0.0, 0.8, 0.0]  # the body behind the cab is seldom of the cab's colour
    return colours


def _tram_colours(p: Place) -> Floats:
    colours = np.zeros((len(p.h), 3))
    colours[:, 0] = 1.0
    colours[p.h < 0.13] = [0.0, 0.12, 0.0]
    colours[p.h > 0.86] = [0.0, 0.55, 0.0]
    colours[(p.h > 0.38) & (p.h < 0.84)] = [0.25, 0.1, 0.0]
    return colours


def _person_colours(p: Place) -> Floats:
    colours = np.zeros((len(p.h), 3))
    colours[p.h < 0.52] = [0, 1, 0]
    colours[p.h >= 0.52] = [1, 0, 0]
    colours[p.h < 0.05] = [0, 0.15, 0.05]  # shoes
    hand = (p.h > 0.38) & (p.h < 0.52) & (np.abs(p.u) > 0.72)
    colours[(p.h > 0.845) | hand] = [0, 0, 1]
    hair = (p.h > 0.955) | ((p.h > 0.89) & (p.v > 0.12))
    colours[hair] = [0.0, 0.0, 0.25]
    return colours


# -- variants of the class meshes -----------------------------------------------------------------------


def _cars(mesh: trimesh.Trimesh) -> dict[str, trimesh.Trimesh]:
    """A sedan, and with its roof drawn out to the rear a hatchback and an estate."""
    return {"sedan": mesh, "hatch": _roof_moved(mesh, 0.7), "estate": _roof_moved(mesh, 1.5)}


def _roof_moved(mesh: trimesh.Trimesh, amount: float) -> trimesh.Trimesh:
    vertices = np.array(mesh.vertices, dtype=np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    v = 2 * (vertices[:, 1] - low[1]) / (high[1] - low[1]) - 1
    up = (((vertices[:, 2] - low[2]) / (high[2] - low[2]) - 0.6) / 0.36).clip(0, 1)
    moved = np.where(v > 0, np.minimum(v * (1 + amount * up), np.maximum(0.95 - 0.08 * up, v)), v)
    vertices[:, 1] = (moved + 1) / 2 * (high[1] - low[1]) + low[1]
    return trimesh.Trimesh(vertices, mesh.faces, process=False)


def _vans(mesh: trimesh.Trimesh) -> dict[str, trimesh.Trimesh]:
    return {"panel": mesh, "bus": mesh}


def _trucks(mesh: trimesh.Trimesh) -> dict[str, trimesh.Trimesh]:
    """The tractor alone, and with a box or a flat bed behind the cab."""
    found = {"tractor": mesh}
    low, high = np.asarray(mesh.bounds, dtype=np.float64)
    for name, length, top in (("box", 8.5, high[2] + 0.25), ("long", 12.5, high[2] + 0.5), ("bed", 8.0, 1.7)):
        start, bottom = low[1] + 2.2, 1.05
        box = trimesh.creation.box((high[0] - low[0], length - 2.2, top - bottom))
        box.apply_translation(((high[0] + low[0]) / 2, start + (length - 2.2) / 2, (top + bottom) / 2))
        wheels = [
            trimesh.creation.cylinder(0.5, high[0] - low[0] - 0.1, sections=20)
            .apply_transform(trimesh.transformations.rotation_matrix(np.pi / 2, (0, 1, 0)))
            .apply_translation((0, low[1] + length - back, 0.5))
            for back in (1.5, 2.8)
        ]
        bare = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
        whole: Any = trimesh.util.concatenate([bare, _fine(box), *wheels])
        found[name] = whole
    return found


def _fine(box: trimesh.Trimesh) -> trimesh.Trimesh:
    """Faces short enough that colours by place come out."""
    vertices, faces = trimesh.remesh.subdivide_to_size(box.vertices, box.faces, 0.8)
    return trimesh.Trimesh(vertices, faces, process=False)


def _trams(mesh: trimesh.Trimesh) -> dict[str, trimesh.Trimesh]:
    return {"tram": mesh}


def _people(mesh: trimesh.Trimesh) -> dict[str, trimesh.Trimesh]:
    """Standing, and at moments of a step."""
    return {f"step{k}": _stepping(mesh, swing) for k, swing in enumerate((0.0, 0.16, 0.3, -0.3, 0.45))}


def _stepping(mesh: trimesh.Trimesh, swing: float) -> trimesh.Trimesh:
    """Legs turned about the hip and arms about the shoulder by `swing` radians, one side forward."""
    vertices = np.array(mesh.vertices, dtype=np.float64)
    low, high = vertices.min(axis=0), vertices.max(axis=0)
    height, half = high[2] - low[2], (high[0] - low[0]) / 2
    u, h = (vertices[:, 0] - (high[0] + low[0]) / 2) / half, (vertices[:, 2] - low[2]) / height
    side = np.tanh(u * 12)
    arm = (np.abs(u) > 0.42) & (h > 0.38)
    legs = np.where(arm, 0, (0.5 - h).clip(0)) * height
    arms = np.where(arm, (0.8 - h).clip(0), 0) * height
    angle = side * swing
    vertices[:, 1] += np.sin(angle) * legs - np.sin(0.8 * angle) * arms
    vertices[:, 2] += (1 - np.cos(angle)) * legs
    # Arms hang closer to a walking body than to one that shows its shape.
    vertices[:, 0] -= np.where(arm, np.sign(u) * (0.8 - h).clip(0) * 0.55 * half, 0) * (0.4 + np.abs(swing))
    return trimesh.Trimesh(vertices, mesh.faces, process=False)


_VARIANTS: dict[str, Callable[[trimesh.Trimesh], dict[str, trimesh.Trimesh]]] = {
    "Car": _cars, "Van": _vans, "Truck": _trucks, "Tram": _trams, "Pedestrian": _people,
}  # fmt: skip
_GLASS: dict[str, Callable[[Place], Mask]] = {
    "Car": _car_glass, "Van": _van_glass, "Truck": _truck_glass, "Tram": _tram_glass, "Pedestrian": _no_glass,
    "hatchback": _car_glass, "prius_hybrid": _car_glass, "ambulance": _no_glass,
    "suv": lambda p: _car_glass(p, belt=0.66, top=0.9, front=-0.45, back=0.95),
    "pickup": lambda p: _car_glass(p, belt=0.64, top=0.93, front=-0.4, back=0.35),
    "Van/bus": _bus_van_glass,
}  # fmt: skip
_COLOURS: dict[str, Callable[[Place], Floats]] = {
    "Car": _car_colours, "Van": _van_colours, "Truck": _truck_colours, "Tram": _tram_colours,
    "Pedestrian": _person_colours,
}  # fmt: skip
