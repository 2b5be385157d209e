import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rlaif_jax.evaluation.budget import label_next, labels_needed


def width(agreement, n):
    interval = stats.binomtest(round(agreement * n), n).proportion_ci(0.95, method="wilson")
    return (interval.high - interval.low) / 2


@pytest.mark.parametrize("agreement", [0.5, 0.75, 0.9])
@pytest.mark.parametrize("half_width", [0.1, 0.05, 0.02])
def test_that_many_labels_give_that_interval_and_fewer_do_not(agreement, half_width):
    n = labels_needed(agreement, half_width)
    assert width(agreement, n) <= half_width * 1.03  # the share of few labels is rounded
    assert width(agreement, int(0.9 * n)) > half_width


@given(st.floats(0.5, 0.99), st.floats(0.01, 0.2))
def test_a_narrower_interval_or_a_share_nearer_a_half_takes_more(agreement, half_width):
    n = labels_needed(agreement, half_width)
    assert labels_needed(agreement, half_width / 2) > n
    assert labels_needed(0.5, half_width) >= n


COLUMNS = {
    "status": ["ok", "ok", "too_long", "identical", "ok", "ok"],
    "prob_a": [0.5, 0.9, None, None, 0.55, 0.6],
    "prob_a_forward": [0.95, 0.9, None, None, 0.6, 0.6],
    "prob_a_reversed": [0.05, 0.9, None, None, 0.5, 0.6],
    "prob_a_axes": [None, None, None, None, None, None],
}


def test_people_are_asked_first_where_the_judge_failed_then_where_it_contradicts_itself():
    assert label_next(COLUMNS, 9) == [2, 0, 4, 5, 1]
    assert label_next(COLUMNS, 2) == [2, 0]
    assert label_next(COLUMNS | {"human": [1.0, None, None, None, 0.0, None]}, 9) == [2, 5, 1]


def test_questions_that_differ_count_as_orders_do():
    axes = [None, [0.1, 0.9], None, None, None, None]
    assert label_next(COLUMNS | {"prob_a_axes": axes}, 3) == [2, 0, 1]
