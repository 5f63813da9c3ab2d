"""The rasteriser against ray casting by trimesh, and the overlay against pixels worked out by hand."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
import trimesh
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from smope.camera import Camera
from smope.draw import DrawError, Surface, draw_poses, render, surface_of, tint_of
from smope.objects import ObjectModel
from smope.poses import Poses
from smope.software_raster import barycentric, rasterise

SIZE = (120, 90)
K = np.array([[140.0, 0.0, 57.3], [0.0, 150.0, 46.1], [0.0, 0.0, 1.0]])
CAMERA = Camera(K=K, size=SIZE)
MESHES = {
    "sphere": trimesh.creation.icosphere(subdivisions=3, radius=0.1),
    "box": trimesh.creation.box(extents=(0.1, 0.2, 0.15)),
    "torus": trimesh.creation.torus(major_radius=0.1, minor_radius=0.04),
    "thin open sheet": trimesh.Trimesh([[-0.2, -0.1, 0], [0.2, -0.1, 0], [0.1, 0.1, 0.0]], [[0, 1, 2]]),
}


def ray_cast(mesh: trimesh.Trimesh) -> NDArray[np.float64]:
    """[H, W] depth of a mesh in the camera frame, inf where a pixel's ray misses it."""
    v, u = np.mgrid[: SIZE[1], : SIZE[0]]
    rays = np.stack([u, v, np.ones_like(u)], axis=-1).reshape(-1, 3) @ np.linalg.inv(K).T
    where, index, _ = mesh.ray.intersects_location(np.zeros_like(rays), rays)
    depth = np.full(len(rays), np.inf)
    np.minimum.at(depth, index, where[:, 2])
    return depth.reshape(SIZE[1], SIZE[0])


def pose(seed: int, z: float = 0.6) -> NDArray[np.float64]:
    T = np.eye(4)
    T[:3, :3] = Rotation.random(random_state=seed).as_matrix()
    T[:3, 3] = np.random.default_rng(seed).uniform(-0.05, 0.05, 3)
    T[2, 3] += z
    return T


def as_surface(mesh: trimesh.Trimesh) -> Surface:
    return Surface(np.asarray(mesh.vertices), np.asarray(mesh.faces), None)


def overlap(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("seed", [1, 2])
def test_mask_and_depth_are_those_of_ray_casting(name: str, seed: int) -> None:
    mesh, T = MESHES[name], pose(seed)
    expected = ray_cast(mesh.copy().apply_transform(T))
    raster, owner, _, _ = render([as_surface(mesh)], T[None], CAMERA)
    assert np.isfinite(expected).sum() > 200
    assert overlap(raster.mask, np.isfinite(expected)) > 0.98
    np.testing.assert_array_equal(owner == 0, raster.mask)
    both = raster.mask & np.isfinite(expected)
    off = np.abs(raster.depth[both] / expected[both] - 1)
    assert np.quantile(off, 0.99) < 1e-6  # the rest are rays that slip past an edge
    assert off.max() < 0.2


def test_of_several_objects_the_nearest_is_seen() -> None:
    meshes = [MESHES["sphere"], MESHES["torus"], MESHES["box"]]
    poses = np.stack([pose(3, 0.6), pose(4, 0.55), pose(5, 0.65)])
    depths = np.stack(
        [ray_cast(mesh.copy().apply_transform(T)) for mesh, T in zip(meshes, poses, strict=True)]
    )
    expected = np.where(np.isfinite(depths).any(axis=0), depths.argmin(axis=0), -1)
    _, owner, _, _ = render([as_surface(mesh) for mesh in meshes], poses, CAMERA)
    assert set(np.unique(expected)) == {-1, 0, 1, 2}
    assert (owner == expected).mean() > 0.99


def test_a_face_that_fills_and_leaves_the_image() -> None:
    uv = np.array([[-1e4, -1e4], [2e4, -1e4], [-1e4, 2e4], [np.nan, 0.0], [5.0, 5.0]])
    z = np.array([2.0, 2.0, 2.0, 1.0, -1.0])
    raster = rasterise(uv, z, np.array([[0, 1, 2], [0, 1, 3], [0, 1, 4]]), SIZE)
    assert (raster.face == 0).all()
    np.testing.assert_allclose(raster.depth, 2.0, rtol=1e-9)


@pytest.mark.parametrize("faces", [np.zeros((0, 3), int), np.array([[0, 0, 0]]), np.array([[0, 1, 2]])])
def test_no_face_and_faces_without_area_cover_nothing(faces: NDArray[np.int64]) -> None:
    line = np.array([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    raster = rasterise(line, np.ones(3), faces, SIZE)
    assert not raster.mask.any()
    assert np.isinf(raster.depth).all()


def test_weights_find_the_point_that_was_projected() -> None:
    rng = np.random.default_rng(0)
    corners = rng.uniform([-0.3, -0.3, 0.5], [0.3, 0.3, 2.0], size=(50, 3, 3))
    weights = rng.dirichlet(np.ones(3), size=50)

    def project(points: NDArray[np.float64]) -> NDArray[np.float64]:
        image = points @ K.T
        return np.asarray(image[..., :2] / image[..., 2:])

    inside = np.einsum("nk,nkc->nc", weights, corners)
    found = barycentric(project(inside), project(corners), corners[..., 2])
    np.testing.assert_allclose(found, weights, atol=1e-6)


def test_a_lens_bends_the_straight_edges_of_large_faces() -> None:
    """The upper and lower edge of a plate of two triangles, against OpenCV's lens formula written out."""
    k1, k2, p1, p2 = -0.8, 0.3, 0.01, -0.01
    camera = Camera(K=K, size=SIZE, dist=torch.tensor([k1, k2, p1, p2]))
    plate = Surface(
        np.array([[-0.36, -0.26, 1], [0.36, -0.26, 1], [0.36, 0.26, 1], [-0.36, 0.26, 1.0]]),
        np.array([[0, 1, 2], [0, 2, 3]]),
        None,
    )
    raster, _, _, _ = render([plate], np.eye(4)[None], camera)

    x = np.linspace(-0.35, 0.35, 400)
    for y, rows in (
        (-0.26, lambda column: column.argmax()),
        (0.26, lambda column: SIZE[1] - 1 - column[::-1].argmax()),
    ):
        r2 = x * x + y * y
        radial = 1 + k1 * r2 + k2 * r2 * r2
        u = K[0, 0] * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + K[0, 2]
        v = K[1, 1] * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + K[1, 2]
        columns = np.arange(int(np.ceil(u.min())), int(u.max()) + 1)
        edge = np.array([rows(raster.mask[:, column]) for column in columns])
        np.testing.assert_allclose(edge, np.interp(columns, u, v), atol=1.1)
        assert np.ptp(np.interp(columns, u, v)) > 3  # a pinhole's edge would be level


@cache
def object_model(name: str, colour: tuple[int, int, int] | None = None) -> ObjectModel:
    mesh = MESHES[name].copy()
    if colour is not None:
        mesh.visual = trimesh.visual.ColorVisuals(
            mesh, vertex_colors=np.tile(colour, (len(mesh.vertices), 1))
        )
    return ObjectModel.from_mesh(name, mesh, "m")


def as_poses(models: list[ObjectModel], T: NDArray[np.float64], camera: Camera = CAMERA) -> Poses:
    count = len(models)
    return Poses(
        names=tuple(model.name for model in models),
        labels=torch.arange(count),
        scores=torch.full((count,), 0.9),
        boxes_xyxy=torch.tensor([[30.0, 20.0, 80.0, 60.0]]).repeat(count, 1),
        T_CO=torch.from_numpy(T).float(),
        scale=torch.ones(count, 3),
        visibility=torch.ones(count),
        sigma=torch.ones(count, 2),
        camera=camera,
        objects={model.name: model for model in models},
    )


GREY = np.full((SIZE[1], SIZE[0], 3), 128, dtype=np.uint8)
SURFACES_ONLY = {"boxes": False, "axes": False, "labels": False}


@pytest.mark.parametrize("name", ["sphere", "torus"])
def test_discs_stand_for_a_mesh_that_is_not_there(name: str) -> None:
    model = object_model(name)
    whole, _, _, _ = render([surface_of(model)], pose(6)[None], CAMERA)
    discs, _, _, _ = render([surface_of(replace(model, mesh=None))], pose(6)[None], CAMERA)
    assert overlap(whole.mask, discs.mask) > 0.93
    assert (discs.mask | ~whole.mask).mean() > 0.998  # no holes
    both = whole.mask & discs.mask
    assert np.median(np.abs(discs.depth[both] / whole.depth[both] - 1)) < 0.01


def test_only_covered_pixels_change_and_colours_and_tint_show() -> None:
    model = object_model("sphere", colour=(0, 200, 0))
    poses = as_poses([model], pose(1)[None])
    drawn = np.asarray(draw_poses(GREY, poses, **SURFACES_ONLY, opacity=1.0))
    covered = np.isfinite(ray_cast(MESHES["sphere"].copy().apply_transform(pose(1))))
    changed = (drawn != 128).any(axis=2)
    assert overlap(changed, covered) > 0.97
    inner = drawn[covered].mean(axis=0)
    assert tint_of(0)[0] == 0
    assert inner[1] > inner[2] > inner[0]  # green of the mesh before blue of the tint, and no red

    half = np.asarray(draw_poses(GREY, poses, **SURFACES_ONLY, opacity=0.5)).astype(int)
    middle = half[46, 57], (drawn[46, 57].astype(int) + 128) / 2
    np.testing.assert_allclose(*middle, atol=1)


def test_a_surface_is_brighter_where_it_faces_the_light() -> None:
    T = np.eye(4)
    T[2, 3] = 0.6
    drawn = np.asarray(
        draw_poses(GREY, as_poses([object_model("sphere")], T[None]), **SURFACES_ONLY, opacity=1.0)
    )
    u, v = round(K[0, 2]), round(K[1, 2])
    assert drawn[v - 12, u - 8, 2] > drawn[v, u, 2] > drawn[v + 18, u + 12, 2]


def test_axes_end_where_the_camera_sees_their_tips() -> None:
    model = object_model("sphere")  # diameter 0.2: axes of 0.1 m
    T = np.eye(4)
    T[:3, 3] = [0.01, -0.02, 0.6]
    drawn = np.asarray(
        draw_poses(GREY, as_poses([model], T[None]), surfaces=False, boxes=False, labels=False)
    ).astype(int)
    origin = np.array([140 * 0.01 / 0.6 + 57.3, -150 * 0.02 / 0.6 + 46.1])
    red = np.argwhere(drawn[..., 0] - drawn[..., 1] > 60)[:, ::-1]
    green = np.argwhere((drawn[..., 1] - drawn[..., 0] > 60) & (drawn[..., 1] - drawn[..., 2] > 60))[:, ::-1]
    assert red[:, 0].max() == pytest.approx(origin[0] + 140 * 0.1 / 0.6, abs=1.5)
    assert red[:, 1].mean() == pytest.approx(origin[1], abs=1.5)
    assert green[:, 1].max() == pytest.approx(origin[1] + 150 * 0.1 / 0.6, abs=1.5)
    assert green[:, 0].mean() == pytest.approx(origin[0], abs=1.5)


def test_the_box_in_space_reaches_its_projected_corners() -> None:
    model = object_model("box")
    T = np.eye(4)
    T[:3, 3] = [0, 0, 0.7]
    poses = as_poses([model], T[None])
    drawn = np.asarray(
        draw_poses(GREY, poses, surfaces=False, boxes=False, boxes_3d=True, axes=False, labels=False)
    )
    v, u = np.nonzero((drawn != 128).any(axis=2))
    half, near = np.array([0.05, 0.1]), 0.7 - 0.075
    reach = np.array([140.0, 150.0]) * half / near
    np.testing.assert_allclose([u.min(), v.min()], K[:2, 2] - reach, atol=1)
    np.testing.assert_allclose([u.max(), v.max()], K[:2, 2] + reach, atol=1)


def test_scale_stretches_the_mesh_in_its_own_frame() -> None:
    box = object_model("box")
    poses = as_poses([box], pose(2)[None])
    stretched = replace(poses, scale=torch.tensor([[1.5, 0.5, 1.0]]))
    drawn = np.asarray(draw_poses(GREY, stretched, **SURFACES_ONLY))
    same = MESHES["box"].copy()
    same.vertices = same.vertices * [1.5, 0.5, 1.0]
    expected = np.isfinite(ray_cast(same.apply_transform(pose(2))))
    assert overlap((drawn != 128).any(axis=2), expected) > 0.97


def test_names_and_the_box_are_drawn_also_for_an_object_without_a_surface() -> None:
    poses = replace(as_poses([object_model("sphere")], pose(1)[None]), objects={})
    drawn = np.asarray(draw_poses(GREY, poses, axes=False))
    assert tuple(drawn[60, 50]) == tint_of(0)  # lower side of the box (30, 20, 80, 60)
    assert tuple(drawn[40, 80]) == tint_of(0)
    label = drawn[:20, 30:90].reshape(-1, 3)
    assert (label == tint_of(0)).all(axis=1).sum() > 200  # the label's ground
    assert (label.min(axis=1) > 200).sum() + (label.max(axis=1) < 60).sum() > 20  # its letters
    assert (np.asarray(draw_poses(GREY, poses)) != drawn).any()  # axes of a length taken from the box


def test_what_is_behind_or_at_the_camera_or_far_outside_does_no_harm() -> None:
    models = [object_model("sphere"), object_model("box"), object_model("torus")]
    T = np.stack([pose(1, -0.6), pose(2, 0.0), pose(3)])
    T[2, 0, 3] = 1e6
    poses = replace(as_poses(models, T), boxes_xyxy=torch.tensor([[1e9, -1e9, -1e9, 1e9]] * 3))
    lens = Camera(K=K, size=SIZE, dist=torch.tensor([-0.3, 0.1, 0.0, 0.0]))
    for camera in (CAMERA, lens):
        picture = draw_poses(GREY, replace(poses, camera=camera), boxes_3d=True)
        assert picture.size == SIZE


def test_nothing_found_gives_the_image_back() -> None:
    poses = as_poses([object_model("sphere")], pose(1)[None])[[]]
    np.testing.assert_array_equal(np.asarray(poses.draw(GREY)), GREY)


def test_another_image_than_the_one_predicted_is_refused() -> None:
    poses = as_poses([object_model("sphere")], pose(1)[None])
    with pytest.raises(DrawError, match="100 x 90 pixels given, 120 x 90 expected"):
        poses.draw(GREY[:, :100])
