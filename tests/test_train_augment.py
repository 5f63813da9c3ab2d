"""Augmented photos: what a point of an object projects to, before and after; and batches put together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import roma
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from smope.data.items import UNKNOWN, Batch
from smope.train.augment import (
    AugmentConfig,
    augmented,
    concatenated,
    framed,
    mirrored,
    resized,
    without_unseen,
)

K = torch.tensor([[[70.0, 0.0, 52.3], [0.0, 72.0, 20.8], [0.0, 0.0, 1.0]]])
PLAIN = AugmentConfig(brightness=(1, 1), contrast=(1, 1), saturation=(1, 1), warmth=0, gamma=(1, 1), noise=0)


def make(seed: int, size: tuple[int, int] = (96, 40), slots: int = 2, **more: Tensor) -> Batch:
    g = torch.Generator().manual_seed(seed)
    T = torch.eye(4).repeat(1, slots, 1, 1)
    quaternions = torch.nn.functional.normalize(torch.randn(1, slots, 4, generator=g), dim=-1)
    T[..., :3, :3] = roma.unitquat_to_rotmat(quaternions)
    T[..., :3, 3] = torch.tensor([0.3, 0.1, 6.0]) + torch.rand(1, slots, 3, generator=g)
    return Batch(
        images=torch.rand(1, 3, size[1], size[0], generator=g),
        K=K,
        labels=torch.zeros(1, slots, dtype=torch.int64),
        T_CO=T,
        boxes_xyxy=torch.tensor([[40.0, 10.0, 60.0, 30.0]]).expand(1, slots, 4),
        visibility=torch.ones(1, slots),
        scale=torch.rand(1, slots, 3, generator=g) + 0.5,
        **more,
    )


def seen(batch: Batch, points: Tensor) -> Tensor:
    """Points [P, 3] of the registered mesh -> pixels [N, P, 2] of the first image."""
    assert batch.scale is not None
    T = batch.T_CO[0]
    there = (points * batch.scale[0][:, None]) @ T[:, :3, :3].mT + T[:, None, :3, 3]
    pixels = there @ batch.K[0].T
    return pixels[..., :2] / pixels[..., 2:]


@given(st.integers(0, 1000))
def test_a_mirrored_point_of_the_object_is_seen_at_the_mirrored_pixel(seed: int) -> None:
    batch = make(seed)
    turned = mirrored(batch)
    points = torch.randn(7, 3, generator=torch.Generator().manual_seed(seed))
    opposite = points * torch.tensor([-1.0, 1.0, 1.0])  # the object's other side
    expected = seen(batch, points)
    expected[..., 0] = 95 - expected[..., 0]
    assert torch.allclose(seen(turned, opposite), expected, atol=1e-3)
    assert torch.allclose(torch.linalg.det(turned.T_CO), torch.ones(1, 2), atol=1e-5)  # still turns
    assert torch.equal(mirrored(turned).images, batch.images)
    assert turned.boxes_xyxy[0, 0].tolist() == [35.0, 10.0, 55.0, 30.0]


@given(st.integers(0, 1000), st.integers(30, 150), st.integers(20, 90), st.integers(0, 20), st.integers(0, 9))
def test_points_follow_a_resize_and_a_crop_of_the_picture(
    seed: int, width: int, height: int, x0: int, y0: int
) -> None:
    batch = make(seed)
    points = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
    changed = framed(resized(batch, (width, height)), (x0, y0), (100, 50))
    before, after = seen(batch, points), seen(changed, points)
    # In shares of the picture, whose left edge is at -0.5, a resize moves nothing.
    factor = torch.tensor([width / 96, height / 40])
    expected = (before + 0.5) * factor - 0.5 - torch.tensor([x0, y0])
    assert torch.allclose(after, expected, atol=2e-3)
    corners = (batch.boxes_xyxy.unflatten(-1, (2, 2)) + 0.5) * factor - 0.5 - torch.tensor([x0, y0])
    assert torch.allclose(changed.boxes_xyxy, corners.flatten(-2), atol=1e-3)
    assert changed.images.shape[-2:] == (50, 100)


def test_a_bright_pixel_goes_where_its_point_goes() -> None:
    """Against the picture itself: the point under a blob is under it again after all the changes together."""
    batch = make(1, size=(192, 96), slots=1)
    batch.images.zero_()
    batch.K[0] = torch.tensor([[140.0, 0.0, 95.0], [0.0, 140.0, 48.0], [0.0, 0.0, 1.0]])
    u, v = seen(batch, torch.zeros(1, 3))[0, 0].round().int().tolist()
    batch.images[..., v - 2 : v + 3, u - 2 : u + 3] = 1.0
    checked = 0
    for seed in range(8):
        changed = augmented(batch, (160, 96), PLAIN, (seed,))
        light = changed.images[0].mean(0)
        inside = (light > 0).nonzero()
        if len(inside) == 0 or inside.min() < 3 or inside[:, 0].max() > 92 or inside[:, 1].max() > 156:
            continue  # the frame cuts the blob
        checked += 1
        rows, columns = torch.arange(96.0), torch.arange(160.0)
        centre = torch.stack([(light.sum(0) * columns).sum(), (light.sum(1) * rows).sum()]) / light.sum()
        assert torch.allclose(seen(changed, torch.zeros(1, 3))[0, 0], centre, atol=1.0)
    assert checked >= 3


def test_what_the_frame_cuts_away_is_ignored() -> None:
    batch = make(0, ignored=torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    boxes = torch.tensor([[[70.0, 5.0, 100.0, 25.0], [10.0, 5.0, 30.0, 25.0]]])
    batch = replace(batch, boxes_xyxy=boxes)
    cut = without_unseen(framed(batch, (0, 0), (64, 32)), (64, 32), 0.3)
    assert cut.labels.tolist() == [[-1, 0]]
    assert cut.ignored is not None
    assert cut.ignored[0].tolist() == [[1, 2, 3, 4], [70, 5, 100, 25], [0, 0, 0, 0]]
    half = without_unseen(framed(batch, (20, 0), (64, 32)), (64, 32), 0.3)
    assert half.labels.tolist() == [[0, 0]]
    assert half.visibility[0].tolist() == pytest.approx([(63.5 - 50) / 30, 10.5 / 20])


def test_batches_of_photos_and_renders_go_together() -> None:
    instance, depth = torch.ones(1, 40, 96, dtype=torch.uint8), torch.full((1, 40, 96), 7.0)
    render = make(0, slots=3, instance=instance, depth=depth)
    photo = make(1, slots=1, ignored=torch.tensor([[[1.0, 2.0, 3.0, 4.0]]]))
    both = concatenated([render, photo])
    assert both.labels.tolist() == [[0, 0, 0], [0, -1, -1]]
    assert both.instance is not None
    assert both.instance[0].unique().tolist() == [1]
    assert both.instance[1].unique().tolist() == [UNKNOWN]
    assert both.ignored is not None
    assert both.ignored[:, 0].tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert both.scale is not None
    assert np.allclose(both.scale[1, 1:], 1)


def test_the_same_seed_gives_the_same_picture() -> None:
    batch = make(2)
    one, again = (augmented(batch, (96, 64), AugmentConfig(), (5, 1)) for _ in range(2))
    other = augmented(batch, (96, 64), AugmentConfig(), (5, 2))
    assert torch.equal(one.images, again.images)
    assert not torch.equal(one.images, other.images)
