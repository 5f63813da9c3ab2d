"""Box AP against cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from smope.evaluate.boxes import ImageBoxes, average_precision, box_ap, iou_matrix


def image(
    truth: list[list[float]],
    predicted: list[list[float]],
    scores: list[float],
    ignore: list[bool] | None = None,
) -> ImageBoxes:
    def boxes(rows: list[list[float]]) -> np.ndarray:
        return np.array(rows, np.float64).reshape(-1, 4)

    marks = None if ignore is None else np.array(ignore)
    return ImageBoxes(boxes(truth), boxes(predicted), np.array(scores, np.float64), marks)


A, B, C = [0.0, 0, 10, 10], [20.0, 0, 30, 10], [40.0, 0, 50, 10]


def test_iou_by_hand() -> None:
    a = np.array([A, [0, 0, 0, 0]])
    b = np.array([A, [5, 5, 15, 15], [10, 0, 20, 10], [0, 0, 0, 0]])
    np.testing.assert_allclose(iou_matrix(a, b), [[1, 25 / 175, 0, 0], [0, 0, 0, 0]])


def test_perfect_and_empty() -> None:
    assert box_ap({"x": [image([A, B], [B, A], [0.9, 0.8])]})["all"] == {"AP": 1, "AP50": 1, "AP75": 1}
    assert average_precision([image([A], [], [])], 0.5) == 0
    assert np.isnan(average_precision([image([], [A], [0.5])], 0.5))


def test_iou_of_082_counts_up_to_080() -> None:
    table = box_ap({"x": [image([A], [[0, 0, 10, 8.2]], [0.9])]})
    assert table["x"] == pytest.approx({"AP": 0.7, "AP50": 1, "AP75": 1})


def test_a_false_one_between_two_right_ones() -> None:
    # Recall 0.5 at precision 1, recall 1 at 2/3: the recall points 0, 0.01 .. 0.50 are 51, those beyond 50.
    expected = (51 + 50 * 2 / 3) / 101
    assert average_precision([image([A, B], [A, C, B], [0.9, 0.8, 0.7])], 0.5) == pytest.approx(expected)


def test_precision_is_the_best_at_that_recall_or_beyond() -> None:
    # Wrong, right, right: precisions 0, 1/2, 2/3, so 2/3 throughout.
    assert average_precision([image([A, B], [C, A, B], [0.9, 0.8, 0.7])], 0.5) == pytest.approx(2 / 3)


def test_a_second_box_on_the_same_object_is_wrong() -> None:
    expected = (51 + 50 * 2 / 3) / 101
    assert average_precision([image([A, B], [A, A, B], [0.9, 0.8, 0.7])], 0.5) == pytest.approx(expected)


def test_scores_are_ranked_over_all_images() -> None:
    images = [image([A], [A], [0.3]), image([A], [C, A], [0.9, 0.2])]
    assert average_precision(images, 0.5) == pytest.approx(2 / 3)


def test_an_ignored_object_neither_counts_nor_harms() -> None:
    both = image([A, B], [B, A], [0.9, 0.8], [False, True])
    assert average_precision([both], 0.5) == 1
    alone = image([B], [B, C], [0.9, 0.8], [True])
    assert average_precision([alone, image([A], [A], [0.1])], 0.5) == pytest.approx(0.5)


def test_an_object_that_counts_is_preferred_to_an_ignored_one_that_is_nearer() -> None:
    near = image([[0, 0, 10, 9], A], [A], [0.9], [False, True])
    assert average_precision([near], 0.5) == 1


def test_the_mean_leaves_out_classes_without_objects() -> None:
    table = box_ap({"x": [image([A], [A], [1])], "y": [image([], [A], [1])], "z": [image([A], [], [])]})
    assert table["all"]["AP"] == pytest.approx(0.5)
    assert np.isnan(table["y"]["AP"])


@given(st.integers(1, 6), st.integers(0, 6), st.floats(0.5, 0.95))
def test_right_first_then_wrong(n: int, wrong: int, threshold: float) -> None:
    """All right ones ranked before all wrong ones: AP is 1; the other way round it is n / (n + wrong)."""
    truth = [[20.0 * i, 0, 20.0 * i + 10, 10] for i in range(n)]
    off = [[20.0 * i, 50, 20.0 * i + 10, 60] for i in range(wrong)]
    scores = np.linspace(1, 0.1, n + wrong).tolist()
    assert average_precision([image(truth, truth + off, scores)], threshold) == 1
    found = average_precision([image(truth, off + truth, scores)], threshold)
    assert found == pytest.approx(n / (n + wrong))
