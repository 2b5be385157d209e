"""What follows from a judge's log-probabilities, whatever they are."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_jax.judge.prompts import Template
from rlaif_jax.judge.verdict import exclusive, prob_higher, rating, verdict

PAIRWISE = Template("t", "pairwise", "", "", ("?",), ("",), ("1", "2"), inverted=False)
logprobs = st.floats(-40, 0)


def answers(*shape):
    size = int(np.prod(shape))
    return st.lists(logprobs, min_size=size, max_size=size).map(lambda values: np.reshape(values, shape))


@given(answers(2, 3, 2, 2), st.booleans())
def test_label_a_b_and_label_b_a_add_up_to_one(logprobs, inverted):
    template = dataclasses.replace(PAIRWISE, questions=("?", "!"), axes=("x", "y"), inverted=inverted)
    one, other = verdict(template, logprobs), verdict(template, logprobs[::-1])
    assert one.prob_a + other.prob_a == pytest.approx(1, abs=1e-9)
    assert one.prob_a_forward + other.prob_a_reversed == pytest.approx(1, abs=1e-9)
    assert one.prob_a == pytest.approx((one.prob_a_forward + one.prob_a_reversed) / 2, abs=1e-9)
    assert np.mean(one.prob_a_axes) == pytest.approx(one.prob_a, abs=1e-9)


@given(answers(2, 1, 1, 2))
def test_a_question_for_the_worse_response_is_inverted(logprobs):
    plain = verdict(PAIRWISE, logprobs)
    worse = verdict(dataclasses.replace(PAIRWISE, inverted=True), logprobs)
    assert worse.prob_a == pytest.approx(1 - plain.prob_a, abs=1e-9)
    assert worse.prob_a_forward == pytest.approx(1 - plain.prob_a_forward, abs=1e-9)


def test_a_judge_that_always_names_slot_1_has_no_preference():
    found = verdict(PAIRWISE, np.tile(np.log([0.9, 0.1]), (2, 1, 1, 1)))
    assert (found.prob_a, found.prob_a_forward, found.prob_a_reversed) == pytest.approx((0.5, 0.9, 0.1))


def test_distributions_are_averaged_over_rationales_not_votes():
    logprobs = np.log([[[[0.6, 0.4]], [[0.6, 0.4]], [[0.01, 0.99]]], [[[0.5, 0.5]]] * 3])
    assert verdict(PAIRWISE, logprobs).prob_a_forward == pytest.approx((0.6 + 0.6 + 0.01) / 3)


def test_what_the_judge_would_say_instead_is_kept():
    assert verdict(PAIRWISE, np.log([[[[0.03, 0.01]]], [[[0.02, 0.02]]]])).answer_mass == pytest.approx(0.04)


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_is_not_finite_is_no_verdict(value):
    logprobs = np.full((2, 1, 1, 2), -1.0)
    logprobs[1] = value
    assert verdict(PAIRWISE, logprobs) is None


RATING = dataclasses.replace(PAIRWISE, method="rating", choices=tuple(map(str, range(1, 11))))


@given(answers(2, 2, 1, 10))
def test_ratings_are_likelihood_weighted_scores_from_minus_one_to_one(logprobs):
    found = verdict(RATING, logprobs)
    weights = np.exp(logprobs - logprobs.max(-1, keepdims=True))
    scores = (weights / weights.sum(-1, keepdims=True)).mean(1)[:, 0] @ np.arange(1, 11)
    np.testing.assert_allclose((found.rating_a, found.rating_b), (scores - 5.5) / 4.5, atol=1e-9)
    assert found.prob_a + verdict(RATING, logprobs[::-1]).prob_a == pytest.approx(1, abs=1e-9)
    assert found.prob_a_forward is None


def test_a_surer_and_higher_score_is_preferred():
    ten, one, even = np.eye(10)[9], np.eye(10)[0], np.full(10, 0.1)
    assert (rating(ten), rating(one), rating(even)) == pytest.approx((1, -1, 0))
    assert (prob_higher(ten, one), prob_higher(one, ten), prob_higher(even, even)) == pytest.approx((1, 0, 0.5))
    assert prob_higher(ten, even) == pytest.approx(0.95)  # a tenth of the time both are 10


def test_one_is_not_counted_where_the_judge_says_ten():
    # "1" is 0.5 likely, and goes on to "10" in 0.4 of those; "2" has no longer choice.
    logprobs = np.log([0.5, 0.3, 0.2])
    found = exclusive(logprobs, [(17,), (18,), (17, 16)])
    np.testing.assert_allclose(np.exp(found), [0.3, 0.3, 0.2])
    nested = exclusive(np.log([0.5, 0.3, 0.1]), [(1,), (1, 0), (1, 0, 0)])
    np.testing.assert_allclose(np.exp(nested), [0.2, 0.2, 0.1])
    assert np.isneginf(exclusive(np.log([0.2, 0.2]), [(1,), (1, 0)])[0])
    np.testing.assert_array_equal(exclusive(logprobs, [(1,), (2,), (3,)]), logprobs)
