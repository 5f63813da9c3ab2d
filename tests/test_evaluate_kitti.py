"""KITTI's scores by hand, and overlaps against scipy's half-space volumes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, HalfspaceIntersection, QhullError

from smope.data.kitti import KittiLabel
from smope.evaluate.kitti import (
    DIFFICULTIES,
    METRICS,
    Frame,
    average_precision,
    bev_and_3d_overlaps,
    clip_polygon,
    kitti_scores,
    polygon_area,
)

EASY, MODERATE, _ = DIFFICULTIES


def car(
    x: float, score: float | None = None, type: str = "Car", height: float = 50, alpha: float = 0.0
) -> KittiLabel:
    """A box 100 pixels wide at pixel 10 x, and a car of 1.5 by 2 by 4 metres at x."""
    box = (10 * x, 100.0, 10 * x + 100, 100 + height)
    return KittiLabel(type, 0.0, 0, alpha, box, (1.5, 2.0, 4.0), (x, 1.6, 20.0), 0.0, score)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("count", [1, 7, 40, 95])
def test_the_truth_scores_one(metric: str, count: int) -> None:
    truth = [car(20 * i) for i in range(count)]
    frame = Frame(truth, [replace(t, score=0.9) for t in truth])
    assert average_precision([frame], "Car", metric, EASY) == (1.0, 1.0)  # type: ignore[arg-type]


def test_a_false_one_between_two_right_ones() -> None:
    frame = Frame([car(0), car(20)], [car(0, 0.9), car(60, 0.8), car(20, 0.7)])
    # Recalls up to 1/2 (20 of 40) at precision 1, the others at 2/3.
    assert average_precision([frame], "Car", "2d", EASY)[0] == pytest.approx((20 + 20 * 2 / 3) / 40)


def test_a_missed_object_costs_its_share_of_the_recalls() -> None:
    frame = Frame([car(0), car(20), car(40)], [car(0, 0.9)])
    assert average_precision([frame], "Car", "2d", EASY)[0] == pytest.approx(13 / 40)  # up to 1/3


def test_precision_is_the_best_at_that_recall_or_beyond() -> None:
    frame = Frame([car(0), car(20)], [car(60, 0.9), car(0, 0.8), car(20, 0.7)])
    assert average_precision([frame], "Car", "2d", EASY)[0] == pytest.approx(2 / 3)


def test_orientation_similarity() -> None:
    truth = [car(0), car(20)]
    found = [car(0, 0.9, alpha=np.pi / 2), car(20, 0.8, alpha=np.pi / 3)]
    ap, aos = average_precision([Frame(truth, found)], "Car", "2d", EASY)
    # (1 + cos) / 2 is 1/2 and 3/4: after one hit 1/2, after both (1/2 + 3/4) / 2, the better one throughout.
    assert (ap, aos) == pytest.approx((1, 0.625))
    reversed_ = [car(0, 0.9, alpha=np.pi), car(20, 0.8, alpha=np.pi)]
    assert average_precision([Frame(truth, reversed_)], "Car", "2d", EASY) == pytest.approx((1, 0))


@pytest.mark.parametrize(
    ("change", "counted"),
    [
        ({}, (True, True, True)),
        ({"occluded": 1}, (False, True, True)),
        ({"occluded": 2}, (False, False, True)),
        ({"occluded": 3}, (False, False, False)),
        ({"truncated": 0.2}, (False, True, True)),
        ({"truncated": 0.4}, (False, False, True)),
        ({"truncated": 0.6}, (False, False, False)),
        ({"bbox": (0.0, 100.0, 100.0, 130.0)}, (False, True, True)),
        ({"bbox": (0.0, 100.0, 100.0, 120.0)}, (False, False, False)),
    ],
)
def test_what_counts_at_each_difficulty(change: dict[str, object], counted: tuple[bool, ...]) -> None:
    hidden = replace(car(0), **change)  # type: ignore[arg-type]
    found = replace(hidden, score=0.9, occluded=-1, truncated=-1.0)
    for difficulty, counts in zip(DIFFICULTIES, counted, strict=True):
        # Alone: nothing to find unless it counts.
        alone = average_precision([Frame([hidden], [found])], "Car", "2d", difficulty)[0]
        assert (alone == 1) if counts else np.isnan(alone)
        # Beside another: finding it never harms; missing it does only where it counts.
        other, other_found = car(40), car(40, 0.5)
        both = [Frame([hidden, other], [found, other_found])]
        assert average_precision(both, "Car", "2d", difficulty)[0] == 1
        missed = average_precision([Frame([hidden, other], [other_found])], "Car", "2d", difficulty)[0]
        assert missed == (0.5 if counts else 1)


def test_alike_classes_and_dont_care_areas_do_no_harm() -> None:
    van, area = car(20, type="Van"), car(40, type="DontCare")
    found = [car(0, 0.1), car(20, 0.9), car(40, 0.8)]
    assert average_precision([Frame([car(0), van, area], found)], "Car", "2d", EASY)[0] == 1
    # A tram is not alike; a box only a third inside a DontCare area is wrong; an area has no place in 3D.
    tram = replace(van, type="Tram")
    assert average_precision([Frame([car(0), tram, area], found)], "Car", "2d", EASY)[0] == 0.5
    beside = [car(0, 0.1), car(47, 0.8)]
    assert average_precision([Frame([car(0), area], beside)], "Car", "2d", EASY)[0] == 0.5
    assert average_precision([Frame([car(0), area], [found[0], found[2]])], "Car", "3d", EASY)[0] == 0.5


def test_low_boxes_are_left_out_and_other_classes_are_not_looked_at() -> None:
    low = car(60, 0.9, height=20)
    assert average_precision([Frame([car(0)], [car(0, 0.1), low])], "Car", "2d", MODERATE)[0] == 1
    tram = car(60, 0.9, type="Tram")
    assert average_precision([Frame([car(0)], [car(0, 0.1), tram])], "Car", "2d", EASY)[0] == 1


def test_a_second_box_on_one_object_is_wrong() -> None:
    frame = Frame([car(0)], [car(0, 0.9), car(0, 0.95)])
    assert (
        average_precision([frame], "Car", "2d", EASY)[0] == 1
    )  # the better scored one reaches the recall alone
    late = Frame([car(0), car(20)], [car(0, 0.9), car(0, 0.95), car(20, 0.5)])
    assert average_precision([late], "Car", "2d", EASY)[0] == pytest.approx((20 + 20 * 2 / 3) / 40)


def test_overlap_thresholds_by_class() -> None:
    # Shifted by 0.6 m of 4: overlap 3.4 / 4.6 = 0.74; by 1 m: 0.6.
    near, far = car(0.6, 0.9), car(1.0, 0.9)
    for metric in ("bev", "3d"):
        assert average_precision([Frame([car(0)], [near])], "Car", metric, EASY)[0] == 1
        assert average_precision([Frame([car(0)], [far])], "Car", metric, EASY)[0] == 0
        people = Frame([car(0, type="Pedestrian")], [replace(far, type="Pedestrian")])
        assert average_precision([people], "Pedestrian", metric, EASY)[0] == 1


def test_the_table_names_every_score() -> None:
    table = kitti_scores([Frame([car(0)], [car(0, 1.0)])], ["Car", "Tram"])
    expected = {f"AP_{m}_{d.name}" for m in METRICS for d in DIFFICULTIES} | {
        f"AOS_{d.name}" for d in DIFFICULTIES
    }
    assert set(table["Car"]) == expected
    assert set(table["Car"].values()) == {1.0}
    assert all(np.isnan(v) for v in table["Tram"].values())


def test_overlaps_by_hand() -> None:
    a = car(0)
    raised = replace(a, location=(0.0, 1.1, 20.0))
    turned = replace(a, rotation_y=np.pi / 2)
    bev, solid = bev_and_3d_overlaps([a], [a, raised, turned, car(10)])
    np.testing.assert_allclose(bev, [[1, 1, 4 / 12, 0]], atol=1e-12)
    np.testing.assert_allclose(solid, [[1, 1 / 2, 4 / 12, 0]], atol=1e-12)


sizes = st.floats(0.5, 5)
places = st.floats(-2, 2)
angles = st.floats(-3.2, 3.2)


dimensions = st.tuples(sizes, sizes, sizes)


@given(dimensions, dimensions, st.tuples(places, places, places), angles, angles)
def test_overlaps_are_scipys(
    size_a: tuple[float, float, float],
    size_b: tuple[float, float, float],
    place: tuple[float, float, float],
    turn_a: float,
    turn_b: float,
) -> None:
    a = KittiLabel("Car", 0, 0, 0, (0, 0, 1, 1), size_a, (0.0, 0.0, 0.0), turn_a)
    b = KittiLabel("Car", 0, 0, 0, (0, 0, 1, 1), size_b, place, turn_b)
    planes = np.concatenate([_half_spaces(a), _half_spaces(b)])
    bev, solid = bev_and_3d_overlaps([a], [b])
    corners = _inside(planes)
    shared = 0.0 if corners is None else ConvexHull(corners).volume
    expected = shared / (np.prod(size_a) + np.prod(size_b) - shared)
    assert solid[0, 0] == pytest.approx(expected, abs=1e-6)
    # On one level and of one height the solids overlap as their grounds do.
    level = replace(b, dimensions=(a.dimensions[0], *b.dimensions[1:]), location=(place[0], 0.0, place[2]))
    flat, same = bev_and_3d_overlaps([a], [level])
    np.testing.assert_allclose(flat, same, atol=1e-9)
    assert flat[0, 0] == pytest.approx(bev[0, 0])


def _half_spaces(label: KittiLabel) -> np.ndarray:
    """[6, 4] planes n p + d <= 0 of the box."""
    h, w, length = label.dimensions
    c, s = np.cos(label.rotation_y), np.sin(label.rotation_y)
    axes = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    centre = np.array(label.location) - [0, h / 2, 0]
    rows = []
    for axis, extent in zip(axes, (length, h, w), strict=True):
        for sign in (1, -1):
            rows.append([*(sign * axis), -sign * axis @ centre - extent / 2])
    return np.array(rows)


def _inside(planes: np.ndarray) -> np.ndarray | None:
    """Corners of the intersection, None where it is empty; the deepest point by linear programming."""
    from scipy.optimize import linprog

    deepest = linprog(
        [0, 0, 0, -1],
        A_ub=np.hstack([planes[:, :3], np.ones((len(planes), 1))]),
        b_ub=-planes[:, 3],
        bounds=[(None, None)] * 3 + [(0, None)],
    )
    if not deepest.success or deepest.x[3] < 1e-6:
        return None
    try:
        return np.asarray(HalfspaceIntersection(planes, deepest.x[:3]).intersections)
    except QhullError:
        return None


def test_polygons_by_hand() -> None:
    square = np.array([[0.0, 0], [2, 0], [2, 2], [0, 2]])
    assert polygon_area(square) == 4
    assert polygon_area(clip_polygon(square, square + 1)) == pytest.approx(1)
    assert polygon_area(clip_polygon(square, square + 5)) == 0
    diamond = np.array([[1.0, -1], [3, 1], [1, 3], [-1, 1]])
    assert polygon_area(clip_polygon(square, diamond)) == pytest.approx(4)
