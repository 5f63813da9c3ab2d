"""Streets against KITTI's own geometry, and what their pictures and labels say of each other."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smope.data.items import UNKNOWN
from smope.data.kitti import KittiLabel, pose_of_label, projected_box
from smope.data.records import Annotation, Record, to_batch
from smope.networks.smope_s import SmopeS, SmopeSConfig
from smope.objects import ObjectModel
from smope.scenes.assets import SceneAssets
from smope.scenes.meshes import prepare_mesh
from smope.scenes.street import Stander, StreetSampler, View
from smope.scenes.street_config import StreetConfig
from smope.scenes.street_frames import Frame, Layouts, frames_of
from smope.scenes.street_meshes import street_meshes
from smope.scenes.street_stream import StreetStream, in_any, inside_frame
from smope.scenes.turns import about_z
from smope.train.augment import AugmentConfig, augmented, concatenated
from smope.train.objective import Objective

CONFIG = StreetConfig(
    width=320, height=96, fx=186.0, fy=186.0, cx=157.0, cy=44.0, shadow_size=64, max_targets=6,
    targets=(1, 6), materials=40, distance=(4.0, 30.0), least_height=6.0,
)  # fmt: skip
K = np.array([[186.0, 0, 157], [0, 186, 44], [0, 0, 1]])
LABEL = KittiLabel("Car", 0.0, 0, 0.0, (20, 40, 70, 70), (1.5, 1.7, 4.2), (-4.0, 1.7, 12.0), 1.5)


@pytest.fixture(scope="module")
def objects() -> list[ObjectModel]:
    car = trimesh.creation.box((1.9, 4.4, 1.5)).apply_translation((0, 0, 0.75))
    person = trimesh.creation.cylinder(0.3, 1.8, sections=12).apply_translation((0, 0, 0.9))
    return [ObjectModel.from_mesh("Pedestrian", person, "m"), ObjectModel.from_mesh("Car", car, "m")]


@pytest.fixture(scope="module")
def assets(objects: list[ObjectModel]) -> SceneAssets:
    meshes = {model.name: model.mesh for model in objects}
    targets = tuple(prepare_mesh(name, mesh) for name, mesh in meshes.items())
    parts = street_meshes(meshes, None)  # type: ignore[arg-type]
    rng = np.random.default_rng(0)
    return SceneAssets(targets, parts, (), rng.random((2, 16, 32, 3)).astype(np.float16))


@pytest.fixture(scope="module")
def layouts() -> Layouts:
    kind = np.array([1, 1, 0, 1, 0, 1], dtype=np.uint8)
    place = np.array([[-3.0, 9], [3, 14], [1.5, 8], [-2, 20], [4, 12], [2.5, 22]])
    size = np.where(kind[:, None] == 1, [1.7, 4.0, 1.5], [0.6, 0.7, 1.75])
    yaw = np.array([-1.5, 1.6, 0.3, -1.4, 2.0, 0.1])
    return Layouts(("Pedestrian", "Car"), np.array([0, 3, 6], np.int32), kind, place, yaw, size)


def sampler(assets: SceneAssets, layouts: Layouts, frames: tuple[Frame, ...] = ()) -> StreetSampler:
    return StreetSampler(assets.targets, assets.clutter, CONFIG, layouts, frames, 0, 4, 2)


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Record:
    path = tmp_path_factory.mktemp("frame") / "frame.png"
    picture = np.zeros((90, 310, 3), dtype=np.uint8)
    picture[:] = np.linspace(60, 200, 310)[None, :, None]
    Image.fromarray(picture).save(path)
    T = pose_of_label(LABEL, np.column_stack([K, np.zeros(3)]))
    annotation = Annotation("Car", T, box_xyxy=np.array(LABEL.bbox), extra={"label": LABEL})
    return Record("frame", path, K, (annotation,), ignored=((200.0, 30.0, 240.0, 50.0),))


@settings(max_examples=30)
@given(
    ry=st.floats(-3.1, 3.1),
    place=st.tuples(st.floats(-8, 8), st.floats(6, 40)),
    size=st.tuples(st.floats(1.4, 2.0), st.floats(3, 5), st.floats(1.3, 2)),
)
def test_an_object_stands_as_its_label_would_say(
    assets: SceneAssets,
    layouts: Layouts,
    ry: float,
    place: tuple[float, float],
    size: tuple[float, float, float],
) -> None:
    """A street's object before a level camera against `pose_of_label`."""
    street = sampler(assets, layouts)
    none = np.zeros((0, 4))
    R_CW = np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    view = View(K, R_CW, R_CW @ np.array([0, 0, -1.65]), (320, 96), none, none, none)
    stander = Stander("Car", np.array(place), about_z(-ry + np.pi / 2), np.array(size))
    width, length, height = size
    label = replace(
        LABEL, rotation_y=ry, dimensions=(height, width, length), location=(place[0], 1.65, place[1])
    )
    expected = pose_of_label(label, np.column_stack([K, np.zeros(3)]))
    fields = street._empty_fields(view)
    box = street._box(stander, view)
    assert box is not None
    street._label(fields, 0, 1, stander, *view.placed(stander), box)
    np.testing.assert_allclose(fields["T_CO"][0], expected, atol=1e-6)
    np.testing.assert_allclose(fields["scale"][0] * np.array([1.9, 4.4, 1.5]), size, rtol=1e-5)
    np.testing.assert_allclose(box, projected_box(expected, size, K), atol=1e-6)


@given(st.integers(0, 200))
def test_a_frames_camera_goes_with_its_zoom_and_mirror(seed: int) -> None:
    """A point of the frame's world is seen at the pixel that shows the frame's own pixel of it."""
    frame = Frame(
        K, (310, 90), np.zeros((0, 4)), np.array([LABEL.bbox]), np.array([[-4.0, 12, 2, 12]]), (1.7, 0.01)
    )
    street = StreetSampler.__new__(StreetSampler)
    street.config = CONFIG
    view = street._view(np.random.default_rng(seed), frame)
    point = np.array([1.3, 0.4, 9.0])
    mirrored = view.uv[0, 0] < 0
    there = point * ([-1, 1, 1] if mirrored else [1, 1, 1])
    seen, own = view.K @ there, K @ point
    shows = view.uv @ np.array([*(seen[:2] / seen[2]), 1.0])
    np.testing.assert_allclose(shows, own[:2] / own[2], atol=1e-9)
    assert view.places[0, 0] == (4.0 if mirrored else -4.0)
    # Its own object's box goes along: its corners show the label's.
    shown = np.sort([view.uv[0, 0] * u + view.uv[0, 2] for u in view.boxes[0, [0, 2]]])
    np.testing.assert_allclose(shown, [20, 70], atol=1e-9)


def test_the_ground_runs_below_the_feet_of_a_frames_objects(record: Record) -> None:
    (frame,) = frames_of([record])
    height, slope = frame.ground
    assert 1.65 < height < 1.7  # one pair of feet at 1.7 m moves it a little
    assert abs(slope) < 0.01
    assert frame.areas.tolist() == [[200, 30, 240, 50], [20, 40, 70, 70]]
    (bare,) = frames_of([replace(record, annotations=())])
    assert bare.ground == pytest.approx((1.65, 0.0), abs=1e-6)


def test_a_batch_and_its_labels_agree(assets: SceneAssets, layouts: Layouts, record: Record) -> None:
    with StreetStream(
        (), assets=assets, layouts=layouts, frames=[record], config=CONFIG, seed=3, batch_size=6
    ) as s:
        batch = s.batch(0)
        again = s.batch(0)
        assert s.names == ("Pedestrian", "Car")
    assert torch.equal(batch.images, again.images)
    assert batch.images.shape == (6, 3, 96, 320)
    assert batch.present.sum() >= 6
    assert batch.instance is not None
    assert batch.scale is not None
    assert batch.ignored is not None
    v, u = torch.meshgrid(torch.arange(96), torch.arange(320), indexing="ij")
    centres = torch.tensor([[0, 0, 0.9], [0, 0, 0.75]])
    coordinates, seen = batch.surface_at_stride(1, centres, torch.ones(2))
    extents = torch.tensor([[0.6, 0.6, 1.8], [1.9, 4.4, 1.5]])
    for b, slot in batch.present.nonzero().tolist():
        mask = batch.instance[b] == slot + 1
        assert mask.any()
        x0, y0, x1, y1 = batch.boxes_xyxy[b, slot].tolist()
        wide = 0.08 * (x1 - x0) + 1.5  # parts above the doors may stand out a little: mirrors do
        assert u[mask].min() >= x0 - wide
        assert u[mask].max() <= x1 + wide
        assert v[mask].min() >= y0 - 1.5
        assert v[mask].max() <= y1 + 1.5
        places = coordinates[b].permute(1, 2, 0)[mask & (seen[b] >= 0)]
        half = extents[batch.labels[b, slot]] / 2
        assert (
            places.abs() <= half * 1.12 + 0.05
        ).all()  # on the registered mesh, however large the instance
        sizes = batch.scale[b, slot] * extents[batch.labels[b, slot]]
        assert (sizes > 0.4).all()
        assert (sizes < 5).all()


def test_a_frame_is_shown_and_its_objects_are_ignored(
    assets: SceneAssets, layouts: Layouts, record: Record
) -> None:
    config = replace(
        CONFIG, frame_probability=1.0, mirror_probability=0.0, zoom=(1.0, 1.0), least_height=90.0
    )
    with StreetStream((), assets=assets, layouts=layouts, frames=[record], config=config, batch_size=2) as s:
        batch = s.batch(0)
    assert batch.ignored is not None
    assert batch.instance is not None
    areas = {tuple(area) for area in batch.ignored[0].tolist()}
    assert {(20.0, 40.0, 70.0, 70.0), (200.0, 30.0, 240.0, 50.0)} <= areas
    assert not batch.present.any()  # all are too low for this config: they are ignored too
    assert (batch.instance[:, 35, 220] == UNKNOWN).all()
    assert (batch.instance[:, 5, 150] == 0).all()
    assert (batch.images[..., 90:, :] == 0).all()  # the frame is 310 x 90
    assert (batch.images[..., 310:] == 0).all()
    row = batch.images[0, :, 5, 10:300].mean(0)  # above all objects: the ramp of the frame
    assert torch.corrcoef(torch.stack([row, torch.linspace(0, 1, 290)]))[0, 1] > 0.97


def test_masks_of_areas_and_frames_against_loops() -> None:
    areas = torch.tensor([[[2.0, 1.0, 5.0, 3.0], [0.0, 0.0, 0.0, 0.0], [6.5, 0.5, 8.2, 6.0]]])
    found = in_any(areas, 5, 9)[0]
    for v in range(5):
        for u in range(9):
            inside = any(x0 < u < x1 and y0 < v < y1 for x0, y0, x1, y1 in areas[0].tolist())
            assert bool(found[v, u]) == inside
    assert inside_frame(torch.tensor([[0.0, 7, 3, 1]]), 5, 9).sum() == 21


def test_layouts_made_of_the_labels_hold_streets(data_root: Path, tmp_path: Path) -> None:
    tool = Path(__file__).parent.parent / "tools" / "make_street_layouts.py"
    variables = {**os.environ, "SMOPE_DATA": str(data_root)}
    subprocess.run([sys.executable, tool, tmp_path / "layouts.npz"], check=True, env=variables)
    layouts = Layouts.load(tmp_path / "layouts.npz")
    assert layouts.classes == ("Tram", "Car", "Truck", "Van", "Pedestrian")
    assert layouts.starts[-1] == len(layouts.kind) == len(layouts.place) == len(layouts.size)
    cars = layouts.size[layouts.kind == 1]
    np.testing.assert_allclose(cars.mean(axis=0), [1.63, 3.88, 1.53], atol=0.06)  # of all labels, FACTS
    assert (layouts.place[:, 1] > 1.5).all()


# 2026-11: torch 2.13's Dynamo looks at the .grad of what it is given, leaf or not.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_one_training_step_on_renders_beside_a_photo(
    assets: SceneAssets, layouts: Layouts, record: Record, objects: list[ObjectModel], device: str
) -> None:
    """A mixed batch through the network with sizes, its loss, and back: every part that should learn does."""
    given = {"assets": assets, "layouts": layouts, "frames": [record], "config": CONFIG}
    with StreetStream((), seed=3, batch_size=1, **given) as s:  # type: ignore[arg-type]
        render = s.batch(0)
    names = [model.name for model in objects]
    photo = augmented(to_batch([record], names), (320, 96), AugmentConfig(zoom=(1.0, 1.0)), (1,))
    batch = concatenated([render, photo]).to(device)
    torch.manual_seed(0)
    network = SmopeS(
        SmopeSConfig(
            width=32, heads=4, encoder_layers=1, encoder_hidden=32, decoder_layers=2, decoder_hidden=32,
            queries=24, mesh_tokens=4, surface_points=64, anchors=16, refine_layers=1, rebuilt_points=32,
            region_cells=8, denoising_groups=1, predict_scale=True,
        )
    ).to(device)  # fmt: skip
    objective = Objective(objects)
    whole = torch.compile(objective.detection_losses, backend="eager", fullgraph=True)
    objective.detection_losses = whole  # type: ignore[method-assign]
    poses = torch.compile(objective.pose_losses, backend="eager", fullgraph=True)
    objective.pose_losses = poses  # type: ignore[method-assign]
    loss, parts = objective(network, batch)
    assert torch.isfinite(loss)
    assert {"scale/direct", "scale/region", "scale/refined", "regions/where", "coordinates"} <= parts.keys()
    loss.backward()
    assert network.pose_head.log_scale is not None
    gradient = network.pose_head.log_scale.layers[-1].bias.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0
    # The photo's pixels say nothing of surfaces: without the render those losses are nothing.
    alone = objective(network, batch[1:2])[1]
    assert alone["regions/where"] == 0
    assert alone["regions/seen"] == 0
    assert alone["coordinates"] == 0
    assert alone["points/direct"] > 0
