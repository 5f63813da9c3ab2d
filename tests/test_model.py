"""SMOPE itself on a small random network: what holds whatever the weights are."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from small_model import SIZE, K, noise, small_model

from smope import SMOPE, Camera, Poses, hub
from smope.camera import CameraError
from smope.images import ImageError
from smope.networks.outputs import PoseEstimate
from smope.networks.regions import RegionReader
from smope.results import find_table

COLUMNS = ("labels", "scores", "boxes_xyxy", "T_CO", "scale", "visibility", "sigma")


@pytest.fixture(scope="module")
def shared() -> SMOPE:
    """For tests that register nothing."""
    return small_model()


@pytest.fixture
def model(shared: SMOPE) -> SMOPE:
    return copy.deepcopy(shared)


def everything(model: SMOPE, image: object, **options: object) -> Poses:
    found = model.predict(image, threshold=0.0, **options)
    assert len(found) >= 6
    assert {"ball", "brick"} <= set(found.names)
    return found


def assert_same(a: Poses, b: Poses, columns: Sequence[str] = COLUMNS) -> None:
    assert a.names == b.names
    for column in columns:
        assert torch.equal(getattr(a, column), getattr(b, column)), column


def rows_like(a: Poses, b: Poses) -> torch.Tensor:
    """Of each object of `a`, the row in `b` that has its box and its name: that of the same query."""
    apart = torch.cdist(a.boxes_xyxy, b.boxes_xyxy)
    same = torch.tensor([[one == other for other in b.names] for one in a.names])
    distances, rows = apart.masked_fill(~same, torch.inf).min(1)
    assert distances.max() < 1e-3
    return rows


def test_two_calls_are_equal_to_the_bit(shared: SMOPE) -> None:
    before = {name: t.clone() for name, t in shared.network.state_dict().items()}
    assert_same(everything(shared, noise(1)), everything(shared, noise(1)))
    assert all(torch.equal(t, before[name]) for name, t in shared.network.state_dict().items())
    assert not shared.network.training


def test_a_batch_gives_what_single_images_give(shared: SMOPE) -> None:
    images = [noise(1), noise(2), noise(3, 70, 90), noise(1)]
    cameras = [K, np.array(K), [[80.0, 0, 40], [0, 82, 50], [0, 0, 1]], torch.tensor(K)]
    together = shared.predict(images, K=cameras, threshold=0.0)
    assert isinstance(together, list)
    for image, matrix, one in zip(images, cameras, together, strict=True):
        alone = shared.predict(image, K=matrix, threshold=0.0)
        assert one.camera.size == (image.shape[2], image.shape[1])
        rows = rows_like(alone, one)
        assert sorted(rows.tolist()) == list(range(len(one)))
        for column in COLUMNS:
            torch.testing.assert_close(
                getattr(one, column)[rows], getattr(alone, column), rtol=1e-4, atol=1e-4
            )


def test_a_list_gives_a_list_and_one_image_one_result(shared: SMOPE) -> None:
    assert isinstance(shared.predict(noise(1)), Poses)
    for many in ([noise(1)], (noise(1),)):
        found = shared.predict(many)
        assert isinstance(found, list)
        assert len(found) == 1
    assert shared.predict([]) == []


def test_threshold_and_top_k_only_leave_out(shared: SMOPE) -> None:
    found = everything(shared, noise(1))
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)
    middle = float(found.scores[2])
    best, expected = shared.predict(noise(1), threshold=middle), found[found.scores >= middle]
    assert best.names == expected.names
    for column in COLUMNS:  # in the sums of fewer pairs other numbers are rounded
        torch.testing.assert_close(getattr(best, column), getattr(expected, column), rtol=1e-4, atol=1e-4)
    few = shared.predict(noise(1), threshold=0.0, top_k=3)
    assert 1 <= len(few) <= 3
    torch.testing.assert_close(few.T_CO[0], found.T_CO[0], rtol=1e-5, atol=1e-5)
    assert len(shared.predict(noise(1), threshold=1.0)) == 0


def test_pairs_below_the_threshold_are_not_looked_at_closer(
    model: SMOPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch looks at as many as its richest image has, and at one where there is none."""
    looked, real = [], RegionReader.forward

    def spied(self: RegionReader, direct: PoseEstimate, pairs: torch.Tensor, *rest: Any) -> Any:
        looked.append(tuple(pairs.shape[:2]))
        return real(self, direct, pairs, *rest)

    monkeypatch.setattr(RegionReader, "forward", spied)
    images = [noise(1), noise(2)]
    assert model._tokens is not None
    scores = find_table(model.network, torch.stack(images), torch.tensor([K, K]), model._tokens, 32)[..., 0]
    above, below = scores[0, 3:5].tolist()
    middle = (above + below) / 2  # between two, as the last bit depends on how images are stored
    assert (scores - middle).abs().min() > 1e-6
    most = int((scores >= middle).sum(1).max())
    assert 1 < most < 12
    model.predict(images, threshold=middle)
    model.predict(images, threshold=1.0)
    model.fast = True  # a graph is for any number of them
    model.predict(images[0], threshold=1.0)
    assert looked == [(2, 12), (2, most), (2, 1), (1, 12)]


def test_poses_are_rigid_finite_and_in_front(shared: SMOPE) -> None:
    found = everything(shared, noise(1))
    rotation = found.T_CO[:, :3, :3].double()
    identity = torch.eye(3, dtype=torch.float64).expand_as(rotation)
    torch.testing.assert_close(rotation @ rotation.mT, identity, rtol=0, atol=1e-5)
    assert (torch.linalg.det(rotation) - 1).abs().max() < 1e-5
    for i, name in enumerate(found.names):
        middle = found.T_CO[i, :3, :3] @ shared.objects[name].centre + found.T_CO[i, :3, 3]
        assert middle[2] > 0
    assert all(getattr(found, column).isfinite().all() for column in COLUMNS)
    assert ((found.visibility >= 0) & (found.visibility <= 1)).all()
    assert (found.sigma > 0).all()


def test_saved_and_loaded_it_says_the_same(shared: SMOPE, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path / "a")
    loaded = SMOPE.from_pretrained(tmp_path / "a", device="cpu")
    assert (loaded.config.objects, loaded.card) == (shared.config.objects, shared.card)
    state = loaded.network.state_dict()
    for name, tensor in shared.network.state_dict().items():
        assert torch.equal(state[name], tensor)
    assert_same(everything(loaded, noise(1)), everything(shared, noise(1)))
    loaded.save_pretrained(tmp_path / "b")
    for name in hub.MODEL_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_half_precision_is_in_the_file_only(shared: SMOPE, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path / "a", dtype=torch.float16)
    loaded = SMOPE.from_pretrained(tmp_path / "a", device="cpu")
    assert {p.dtype for p in loaded.network.parameters()} == {torch.float32}
    for name, tensor in shared.network.state_dict().items():
        if tensor.is_floating_point():
            assert torch.equal(loaded.network.state_dict()[name], tensor.half().float())
    assert shared.network.level_embed.dtype == torch.float32
    loaded.save_pretrained(tmp_path / "b", dtype=torch.float16)
    again = hub.load_weights(tmp_path / "b")
    for name, tensor in hub.load_weights(tmp_path / "a").items():
        assert tensor.dtype == again[name].dtype
        assert torch.equal(tensor, again[name])


def test_a_loaded_object_is_the_one_that_was_saved(shared: SMOPE, tmp_path: Path) -> None:
    shared.save_pretrained(tmp_path)
    loaded = SMOPE.from_pretrained(tmp_path, device="cpu")
    for name, one in shared.objects.items():
        other = loaded.objects[name]
        assert (other.name, other.diameter, other.trained, other.mesh) == (name, one.diameter, True, None)
        for part in ("points", "normals", "centre", "extents"):
            assert torch.equal(getattr(other, part), getattr(one, part))
        assert torch.equal(other.symmetries.transforms(), one.symmetries.transforms())


def test_another_mesh_moves_no_pose(model: SMOPE) -> None:
    """The pairs that are still found are the same to the bit; one that the new mesh takes is gone."""
    before = everything(model, noise(1))
    model.register_meshes({"torus": trimesh.creation.torus(0.04, 0.015)}, "m", add=True)
    after = model.predict(noise(1), threshold=0.0)
    kept = before[[i for i, box in enumerate(before.boxes_xyxy) if after_has(after, before.names[i], box)]]
    assert len(kept) >= 2
    rows = rows_like(kept, after)
    torch.testing.assert_close(after.T_CO[rows], kept.T_CO, rtol=0, atol=1e-5)
    torch.testing.assert_close(after.scores[rows], kept.scores, rtol=0, atol=1e-5)
    assert after.labels[rows].tolist() == kept.labels.tolist()


def after_has(poses: Poses, name: str, box: torch.Tensor) -> bool:
    return any(n == name and torch.equal(b, box) for n, b in zip(poses.names, poses.boxes_xyxy, strict=True))


def test_the_order_of_names_is_in_the_labels_only(model: SMOPE) -> None:
    before = everything(model, noise(1))
    model.register_meshes(["brick", "ball"])
    after = everything(model, noise(1))
    assert_same(before, after, [c for c in COLUMNS if c != "labels"])
    assert after.labels.tolist() == [1 - label for label in before.labels.tolist()]


def test_names_are_names_only(model: SMOPE) -> None:
    """The same two meshes under each other's names: the poses stay and the names change."""
    first, second = (model.objects[name].mesh for name in ("ball", "brick"))
    model.register_meshes({"x": first, "y": second}, "m")
    before = model.predict(noise(1), threshold=0.0)
    model.register_meshes({"y": first, "x": second}, "m")
    after = model.predict(noise(1), threshold=0.0)
    assert {"x", "y"} == set(before.names)
    assert after.names == tuple({"x": "y", "y": "x"}[name] for name in before.names)
    for column in COLUMNS:
        assert torch.equal(getattr(before, column), getattr(after, column))


def test_registering_replaces_or_adds_and_a_failure_changes_nothing(
    model: SMOPE, caplog: pytest.LogCaptureFixture
) -> None:
    before = everything(model, noise(1))
    torus = trimesh.creation.torus(0.04, 0.015)
    with caplog.at_level(logging.WARNING):
        model.register_meshes(["brick"])
        assert not caplog.records
        model.register_meshes({"torus": torus}, "m", add=True)
    assert list(model.objects) == ["brick", "torus"]
    assert [r.message for r in caplog.records if "have not seen" in r.message] == caplog.messages
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="no file"):
        model.register_meshes({"ring": torus, "gone": "nowhere.ply"}, "m")
    assert list(model.objects) == ["brick", "torus"]
    model.register_meshes({"ring": torus}, "m")
    assert list(model.objects) == ["ring"]
    model.register_meshes(["ball", "brick"])
    assert_same(everything(model, noise(1)), before)


def test_a_pose_is_in_the_mesh_frame_whatever_its_origin_and_unit(model: SMOPE) -> None:
    """A mesh moved by v in its file: the same surface is seen, so T_CO (x + v) is where x was."""
    box = trimesh.creation.box((0.1, 0.06, 0.04))
    model.register_meshes({"box": box}, "m")
    before = model.predict(noise(1), threshold=0.0)
    moved = box.copy()
    moved.apply_scale(1000).apply_translation((250.0, -40.0, 1000.0))
    model.register_meshes({"box": moved}, "mm")
    after = model.predict(noise(1), threshold=0.0)
    shift = torch.tensor([0.25, -0.04, 1.0, 1.0])
    assert len(before) == len(after) > 0
    torch.testing.assert_close((after.T_CO @ shift)[:, :3], before.T_CO[:, :3, 3], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.T_CO[:, :3, :3], before.T_CO[:, :3, :3], rtol=1e-4, atol=1e-4)


def test_the_camera_of_the_weights_serves_images_of_its_size(shared: SMOPE) -> None:
    assert_same(everything(shared, noise(1)), everything(shared, noise(1), K=K))
    with pytest.raises(ValueError, match=r"no camera given for an image of 50x40: pass K=.* or fov="):
        shared.predict(noise(1, 50, 40))


def test_in_a_list_the_bad_picture_is_named(shared: SMOPE) -> None:
    with pytest.raises(ImageError, match=r"^image 2 of 2: no image file"):
        shared.predict([noise(0), "missing.png"])
    with pytest.raises(CameraError, match=r"^image 2 of 2: no camera given for an image of 60x40"):
        shared.predict([noise(0), noise(1, 60, 40)])
    with pytest.raises(CameraError, match=r"^image 2 of 2: the principal point"):
        shared.predict([noise(0), noise(1, 40, 40)], K=torch.tensor(shared.config.K))
    with pytest.raises(CameraError, match=r"^no camera given"):
        shared.predict(noise(1, 60, 40))


def test_a_field_of_view_is_the_K_that_has_it(shared: SMOPE) -> None:
    width, height = SIZE
    focal = width / 2 / np.tan(np.radians(56.0) / 2)
    matrix = [[focal, 0, (width - 1) / 2], [0, focal, (height - 1) / 2], [0, 0, 1]]
    assert_same(everything(shared, noise(1), fov=56.0), everything(shared, noise(1), K=matrix))


def test_a_lens_is_undone_before_and_in_the_boxes(shared: SMOPE) -> None:
    lens = [-0.2, 0.05, 0.001, -0.002, 0.0]
    camera = Camera(K, SIZE, lens)
    bent = everything(shared, noise(1), dist=lens)
    undone = (camera.undistort_image(noise(1).float() / 255) * 255).round().to(torch.uint8)
    straight = everything(shared, undone)
    assert bent.camera.dist is not None
    assert sorted(bent.names) == sorted(straight.names)
    best = straight.names.index(bent.names[0])
    torch.testing.assert_close(bent.T_CO[0], straight.T_CO[best], rtol=0.05, atol=0.05)
    # A point within the straight box is, through the lens, within the bent one.
    low, high = straight.boxes_xyxy[best].unflatten(0, (2, 2))
    for share in ((0.1, 0.1), (0.9, 0.1), (0.5, 0.5), (0.1, 0.9), (0.9, 0.9)):
        point = camera.distort_points(low + torch.tensor(share) * (high - low))
        assert (bent.boxes_xyxy[0, :2] < point).all()
        assert (point < bent.boxes_xyxy[0, 2:]).all()
