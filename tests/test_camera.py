"""Cameras against hand-computed values, an independent numpy lens, PIL's resampling, and round trips."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smope.camera import Camera, CameraError

K = [[572.4114, 0.0, 325.2611], [0.0, 573.57043, 242.04899], [0.0, 0.0, 1.0]]
SIZE = (640, 480)


def changed(row: int, column: int, value: float) -> list[list[float]]:
    matrix = [list(line) for line in K]
    matrix[row][column] = value
    return matrix


@pytest.mark.parametrize(
    ("matrix", "size", "says"),
    [
        (np.eye(4), SIZE, r"\(4, 4\) given, \[3, 3\] expected"),
        (changed(0, 0, math.nan), SIZE, "not finite"),
        (changed(2, 2, 2.0), SIZE, "last row"),
        (np.array(K).T, SIZE, "transposed"),
        (changed(1, 0, 3.0), SIZE, r"K\[1, 0\]"),
        (changed(0, 0, 1300.0), SIZE, "fx / fy"),
        (changed(0, 0, 250.0), SIZE, "fx / fy"),
        (changed(0, 0, -572.0), SIZE, "above 0"),
        (changed(0, 2, 700.0), SIZE, "principal point"),
        (changed(1, 2, -5.0), SIZE, "principal point"),
        (K, (320, 240), "another resolution"),
        ([[20, 0, 320], [0, 20, 240], [0, 0, 1]], SIZE, "field of view"),
        ([[9000, 0, 320], [0, 9000, 240], [0, 0, 1]], SIZE, "field of view"),
        (K, (640, 0), "at least 1 pixel"),
        ("K", SIZE, "numbers expected"),
    ],
)
def test_a_wrong_camera_is_refused_with_its_reason(matrix, size, says):
    with pytest.raises(CameraError, match=says):
        Camera(matrix, size)


@pytest.mark.parametrize("dist", [[0.1], [0.1] * 6, [0.1, 0.1, 0.0, math.inf]])
def test_a_wrong_lens_is_refused(dist):
    with pytest.raises(CameraError, match="dist"):
        Camera(K, SIZE, dist)


def test_from_fov_reaches_from_edge_to_edge():
    camera = Camera.from_fov(90.0, (640, 480))
    # tan(45 degrees) = 1: the left edge, u = -0.5, is seen at x/z = -1.
    assert torch.allclose(camera.project(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([-0.5, 239.5]))
    assert camera.fov_deg[0] == pytest.approx(90.0, abs=1e-4)
    with pytest.raises(CameraError, match="degrees"):
        Camera.from_fov(1.0, SIZE)


def test_project_by_hand():
    uv = Camera(K, SIZE).project(torch.tensor([0.1, -0.2, 0.5]))
    assert torch.allclose(uv, torch.tensor([572.4114 * 0.2 + 325.2611, 573.57043 * -0.4 + 242.04899]))


def test_resize_follows_the_pixels_of_a_resampled_picture():
    # A bright spot's centre of mass moves in PIL's box resampling as the camera says.
    picture = np.zeros((48, 64), np.float32)
    picture[20:24, 36:40] = 1.0  # its middle is (37.5, 21.5)
    half = np.asarray(Image.fromarray(picture).resize((32, 24), Image.Resampling.BOX))
    rows, columns = np.nonzero(half)
    camera = Camera([[50, 0, 37.5], [0, 50, 21.5], [0, 0, 1]], (64, 48)).resize((32, 24))
    assert camera.K[:2, 2].tolist() == [columns.mean(), rows.mean()]
    assert camera.K[0, 0] == 25
    assert camera.size == (32, 24)


def test_crop_shifts_and_allows_a_principal_point_outside():
    camera = Camera(K, SIZE).crop(400, 300, 100, 90)
    assert torch.allclose(camera.K[:2, 2], torch.tensor([325.2611 - 400, 242.04899 - 300]))
    assert camera.size == (100, 90)


def lens_by_numpy(x: float, y: float, k: list[float]) -> tuple[float, float]:
    """OpenCV's model, written out term by term from its manual."""
    k1, k2, p1, p2, k3, k4, k5, k6 = [*k, *[0.0] * (8 - len(k))]
    r = np.hypot(x, y)
    radial = (1 + k1 * r**2 + k2 * r**4 + k3 * r**6) / (1 + k4 * r**2 + k5 * r**4 + k6 * r**6)
    return (
        x * radial + 2 * p1 * x * y + p2 * (r**2 + 2 * x**2),
        y * radial + p1 * (r**2 + 2 * y**2) + 2 * p2 * x * y,
    )


LENSES = [
    [-0.28, 0.07, 0.001, -0.002],
    [-0.3, 0.1, 0.0005, 0.001, -0.01],
    [0.4, 0.05, -0.001, 0.0007, 0.01, 0.6, 0.1, 0.02],
]


@pytest.mark.parametrize("lens", LENSES)
def test_the_lens_bends_as_opencv_says(lens):
    camera = Camera(K, SIZE, lens)
    x, y, z = 0.21, -0.17, 0.8
    bent = lens_by_numpy(x / z, y / z, lens)
    expected = [K[0][0] * bent[0] + K[0][2], K[1][1] * bent[1] + K[1][2]]
    assert camera.project(torch.tensor([x, y, z], dtype=torch.float64)).tolist() == pytest.approx(
        expected, abs=1e-4
    )


@settings(max_examples=50, deadline=None)
@given(u=st.floats(0, 639), v=st.floats(0, 479), z=st.floats(0.1, 10), lens=st.sampled_from(LENSES))
def test_lens_round_trips(u, v, z, lens):
    camera = Camera(K, SIZE, lens)
    uv = torch.tensor([u, v], dtype=torch.float64)
    assert torch.allclose(camera.distort_points(camera.undistort_points(uv)), uv, atol=1e-6)
    point = camera.backproject(uv, torch.tensor(z, dtype=torch.float64))
    assert point[2] == z
    assert torch.allclose(camera.project(point), uv, atol=1e-6)


def test_undistort_image_puts_a_bent_spot_where_a_pinhole_sees_it():
    camera = Camera(K, SIZE, LENSES[0])
    ideal = torch.tensor([120.0, 90.0])
    u, v = camera.distort_points(ideal).tolist()
    yy, xx = np.mgrid[:480, :640]
    photo = torch.from_numpy(255 * np.exp(-((xx - u) ** 2 + (yy - v) ** 2) / 18)).round().to(torch.uint8)
    straight = camera.undistort_image(photo.expand(3, -1, -1))
    weight = straight[0].double().numpy()
    found = (weight * xx).sum() / weight.sum(), (weight * yy).sum() / weight.sum()
    assert straight.dtype == torch.uint8
    assert found == pytest.approx(ideal.tolist(), abs=0.2)
    assert camera.pinhole.dist is None


def test_undistort_image_without_bending_changes_nothing():
    image = torch.rand(3, 480, 640)
    assert torch.allclose(Camera(K, SIZE, [0.0] * 4).undistort_image(image), image, atol=1e-3)
    with pytest.raises(CameraError, match="camera of size"):
        Camera(K, SIZE).undistort_image(image[:, :100])
