"""The recorded pass's own kernels for poses: on the CPU through g++, on a GPU where there is one, against
NumPy, SciPy and the PyTorch forms in float64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from test_inference_kernels import fused, needs_gpu
from torch import Tensor

from smope.networks.gauss_newton import prior_of, step_by_layer, step_pose
from smope.networks.outputs import PoseEstimate
from smope.networks.pose_head import pose_from_values
from smope.networks.recorded import recorded_whole
from smope.networks.refine import place_anchors
from smope.results import make_table, make_table_whole

KINDS = [torch.float32, torch.bfloat16, torch.float16]
SIZE = (640, 480)
K = torch.tensor([[[600.0, 2, 320], [0, 580, 240], [0, 0, 1]], [[300.0, 0, 310], [0, 310, 250], [0, 0, 1]]])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def rotations(batch: int, pairs: int) -> Tensor:
    turned = Rotation.random(batch * pairs, rng=0).as_matrix()
    return torch.from_numpy(turned).float().unflatten(0, (batch, pairs))


def of_rows(rotation: Tensor, translation: Tensor) -> tuple[Tensor, Tensor]:
    """The same as views into rows of twelve, which is how a pass hands poses on"""
    rows = torch.cat([rotation.flatten(-2), translation], -1)
    return rows[..., :9].unflatten(-1, (3, 3)), rows[..., 9:]


def direct(*given: Tensor) -> Tensor:
    pose = pose_from_values(*given, SIZE)
    return torch.cat([pose.rotation.flatten(-2), pose.translation, pose.centre], -1)


def head_values(device: torch.device, kind: torch.dtype) -> list[Tensor]:
    """What the head says of 2 x 5 pairs, in rows of one tensor, with their boxes, sizes and cameras"""
    torch.manual_seed(0)
    said = torch.randn(2, 5, 9).to(kind)
    boxes = torch.rand(2, 5, 4) * torch.tensor([1.0, 1.0, 0.4, 0.4])
    given = (said[..., :6], said[..., 6:8], said[..., 8], boxes, torch.rand(2, 5) * 0.2 + 0.05, K)
    return [t.to(device) for t in given]


@pytest.mark.parametrize("kind", KINDS)
def test_direct_pose_kernel(kind: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Against the ray of NumPy's inverse and SciPy's turn onto it"""
    given = head_values(device, kind)
    found, kinds = fused(direct, tmp_path, *given)
    assert kinds == ["smope_direct_pose_"]
    six, shift, factor, boxes, diameters, cameras = [t.double().cpu().numpy() for t in given]
    for b, p in np.ndindex(2, 5):
        sides = boxes[b, p, 2:] * SIZE
        centre = boxes[b, p, :2] * SIZE - 0.5 + shift[b, p] * sides
        ray = np.linalg.inv(cameras[b]) @ [*centre, 1.0]
        focal = np.sqrt(cameras[b, 0, 0] * cameras[b, 1, 1])
        depth = focal * diameters[b, p] / np.sqrt(sides.prod()) * np.exp(np.clip(factor[b, p], -3, 3))
        unit = ray / np.linalg.norm(ray)
        axis = np.cross([0, 0, 1], unit)
        onto = Rotation.from_rotvec(axis / np.linalg.norm(axis) * np.arccos(unit[2])).as_matrix()
        q, r = np.linalg.qr(six[b, p].reshape(2, 3).T)
        columns = q * np.sign(np.diag(r))
        seen_along = np.column_stack([columns, np.cross(*columns.T)])
        expected = np.concatenate([(onto @ seen_along).ravel(), ray * depth, centre])
        np.testing.assert_allclose(found[b, p].cpu().numpy(), expected, rtol=1e-4, atol=1e-5)


def test_direct_pose_kernel_at_its_bounds(device: torch.device, tmp_path: Path) -> None:
    """Boxes of no size, factors beyond the clamp, rotations that are no rotations, and what is no number"""
    given = head_values(device, torch.float32)
    six, _, factor, boxes = [t.clone() for t in given[:4]]
    boxes[0, 0, 2:], boxes[0, 1, 2:] = 0.0, 1e-4
    factor[0, 2], factor[0, 3] = 50.0, -50.0
    six[1, 0], six[1, 1, :3], six[1, 2] = 0.0, 1e-13, six[1, 2, :3].repeat(2)
    given = [six, given[1], factor, boxes, *given[4:]]
    found, _ = fused(direct, tmp_path, *given)
    expected = direct(*[t.double() for t in given])
    # Of two columns in one direction only the first says something.
    expected[1, 2, :9].unflatten(-1, (3, 3))[:, 1:] = found[1, 2, :9].double().unflatten(-1, (3, 3))[:, 1:]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    given[2][0, 4] = torch.nan
    assert fused(direct, tmp_path, *given)[0].isnan().any(-1).nonzero().tolist() == [[0, 4]]


def anchored(kind: torch.dtype, *given: Tensor) -> tuple[Tensor, ...]:
    """As `place_anchors` is called, its inputs as a pass has them: rows of larger tensors"""
    rotation, translation, anchors, diameters, cameras = given
    pose = PoseEstimate(*of_rows(rotation, translation), translation[..., :2])
    wide = torch.cat([anchors, anchors], -1)[..., :9]
    with torch.autocast(anchors.device.type, kind, enabled=kind != torch.float32):
        return place_anchors(pose, wide, diameters, cameras, SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_anchor_kernel(kind: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Against plain products in float64; some anchors lie at the camera and behind it"""
    torch.manual_seed(0)
    anchors = torch.cat([torch.rand(2, 3, 7, 3) - 0.5, torch.randn(2, 3, 7, 6)], -1)
    translation = 0.1 * torch.randn(2, 3, 3) + torch.tensor([[[0.0, 0, 0.8]], [[0.0, 0, 0.02]]])
    diameters = torch.rand(2, 3) * 0.2 + 0.05
    given = [t.to(device) for t in (rotations(2, 3), translation, anchors, diameters, K)]
    parts = []
    for i in range(3):
        part, kinds = fused(lambda *t, i=i: anchored(kind, *t)[i], tmp_path, *given)
        assert "smope_place_anchors_" in kinds
        parts.append(part)
    placed, uv, unit = parts
    assert (placed.dtype, uv.dtype, unit.dtype) == (kind, torch.float32, torch.float32)
    R, t, points, d, cameras = [x.double().cpu().numpy() for x in given]
    arms = np.einsum("bpij,bpaj->bpai", R, points[..., :3])
    normals = np.einsum("bpij,bpaj->bpai", R, points[..., 3:6])
    where = arms * d[..., None, None] + t[..., None, :]
    assert (where[0, ..., 2] > 0.1).all()
    assert (where[1, ..., 2] < 0.01).any()
    pixels = np.einsum("bij,bpaj->bpai", cameras, where / np.maximum(where[..., 2:], 0.01))[..., :2]
    np.testing.assert_allclose(uv.cpu(), pixels, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(unit.cpu(), (pixels + 0.5) / SIZE, rtol=1e-4, atol=1e-5)
    expected = torch.from_numpy(np.concatenate([points, arms, normals], -1))
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[kind]
    torch.testing.assert_close(placed.double().cpu(), expected, rtol=rounding, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_step_kernel(kind: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Against `step_pose` in float64, which its own tests hold against truth; also the softplus's far end"""
    torch.manual_seed(0)
    translation = 0.1 * torch.randn(2, 3, 3) + torch.tensor([0.0, 0.0, 0.8])
    moved, prior = torch.randn(2, 3, 40, 3).to(kind), torch.randn(2, 3, 12).to(kind)
    prior[0, 0, 6:], prior[0, 1, 6:] = 60.0, -60.0
    anchors, diameters = torch.rand(2, 3, 40, 9) - 0.5, torch.rand(2, 3) * 0.2 + 0.05
    given = [t.to(device) for t in (rotations(2, 3), translation, anchors, moved, prior, diameters, K)]

    def function(*given: Tensor) -> Tensor:
        rotation, translation, anchors, moved, prior, diameters, K = given
        start = PoseEstimate(*of_rows(rotation, translation), translation[..., :2])
        pose = step_by_layer(start, anchors[..., :3], moved, prior, diameters, K)
        return torch.cat([pose.rotation.flatten(-2), pose.translation], -1)

    found, kinds = fused(function, tmp_path, *given)
    assert "smope_step_pose_" in kinds
    rotation, translation, anchors, moved, prior, diameters, cameras = [t.double() for t in given]
    pose = PoseEstimate(rotation, translation, translation[..., :2])
    rest = (moved[..., :2], moved[..., 2].sigmoid(), *prior_of(prior), diameters, cameras)
    pose = step_pose(pose, anchors[..., :3], *rest)
    assert (pose.translation - translation).abs().max() > 0.005  # it moves
    expected = torch.cat([pose.rotation.flatten(-2), pose.translation], -1)
    torch.testing.assert_close(found.double(), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(
    ("scored", "kind"), [(torch.float32, torch.bfloat16), (torch.float16, torch.float16)]
)
def test_table_kernel(scored: torch.dtype, kind: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    torch.manual_seed(0)
    said = torch.randn(2, 4, 3).to(kind)
    boxes, translation, scale = torch.rand(2, 4, 4), torch.randn(2, 4, 3), torch.rand(2, 4, 3)
    labels, scores = torch.arange(8.0).view(2, 4), torch.rand(2, 4).to(scored)
    rotation, translation = of_rows(rotations(2, 4), translation)
    given = (scores, labels, boxes, rotation, translation, said[..., 0], said[..., 1:], scale)

    def function(*given: Tensor) -> Tensor:
        return (make_table_whole if recorded_whole() else make_table)(*given, *SIZE)

    found, kinds = fused(function, tmp_path, *[t.to(device) for t in given])
    assert kinds == ["smope_table_"]
    assert found.dtype == torch.float32
    for b, p in np.ndindex(2, 4):
        x, y, w, h = (boxes[b, p].double().numpy() * np.tile(SIZE, 2)).tolist()
        row = [float(scores[b, p]), float(labels[b, p])]
        row += [x - w / 2 - 0.5, y - h / 2 - 0.5, x + w / 2 - 0.5, y + h / 2 - 0.5]
        row += [*rotation[b, p].flatten().tolist(), *translation[b, p].tolist(), *said[b, p].tolist()]
        np.testing.assert_allclose(found[b, p].cpu(), [*row, *scale[b, p].tolist()], rtol=1e-5, atol=1e-4)
