import numpy as np
import pytest
from scipy import stats

from rlaif_jax.evaluation.statistics import (
    difference,
    distinct_2,
    jackknife_ci,
    mean_ci,
    most_common_share,
    paired_differences,
    show_figure,
    t_ci,
    wilson_ci,
)


def test_the_interval_covers_the_mean_about_95_times_in_100():
    rng = np.random.default_rng(0)
    figures = [mean_ci(rng.normal(2, 1, 60), 200, seed) for seed in range(200)]
    covered = np.mean([low <= 2 <= high for low, high in (figure["ci95"] for figure in figures)])
    assert 0.88 < covered < 0.99


def test_the_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.default_rng(0).normal(size=400)
    figure = mean_ci(values, 2000, 0)
    half = 1.96 * values.std() / 20
    np.testing.assert_allclose(figure["ci95"], [values.mean() - half, values.mean() + half], atol=0.1 * half)
    assert figure["mean"] == values.mean()
    assert figure["n"] == 400


def test_the_interval_is_a_function_of_the_seed():
    values = np.arange(10.0)
    assert mean_ci(values, 100, 3) == mean_ci(values, 100, 3)
    assert mean_ci(values, 100, 3)["ci95"] != mean_ci(values, 100, 4)["ci95"]


def test_nothing_gives_nulls():
    assert mean_ci([], 100, 0) == {"mean": None, "ci95": [None, None], "n": 0}


@pytest.mark.parametrize("values", [[0.5], [True] * 5])
def test_one_value_or_equal_values_give_an_interval_of_no_width(values):
    assert mean_ci(values, 100, 0) == {"mean": values[0], "ci95": [values[0]] * 2, "n": len(values)}


def test_the_t_interval_is_scipys_and_covers_the_mean_about_95_times_in_100_with_three_values():
    draws = np.random.default_rng(0).normal(2, 1, (500, 3))
    figures = [t_ci(draw) for draw in draws]
    expected = stats.t.interval(0.95, 2, draws.mean(axis=1), stats.sem(draws, axis=1))
    np.testing.assert_allclose([figure["ci95"] for figure in figures], np.transpose(expected))
    covered = np.mean([low <= 2 <= high for low, high in (figure["ci95"] for figure in figures)])
    assert 0.92 < covered < 0.98


def test_one_value_has_a_mean_and_no_t_interval():
    assert t_ci([0.5]) == {"mean": 0.5, "ci95": [None, None], "n": 1}
    assert t_ci([]) == {"mean": None, "ci95": [None, None], "n": 0}


def test_differences_are_paired_by_key():
    assert paired_differences({0: 3.0, 1: 5.0, 2: 9.0}, {1: 1.0, 0: 2.0, 7: 4.0}) == {0: 1.0, 1: 4.0}


def test_a_figure_is_shown_with_what_it_has():
    assert show_figure(t_ci([0.25, 0.75])) == "0.500 [-2.677, 3.677]"
    assert show_figure(t_ci([0.25]), signed=True) == "+0.250"
    assert show_figure(t_ci([])) == "-"


def test_the_jackknife_of_a_mean_is_the_standard_error():
    values = list(np.random.default_rng(0).normal(size=30))
    figure, error = jackknife_ci(values, np.mean), np.std(values, ddof=1) / np.sqrt(30)
    np.testing.assert_allclose(figure["ci95"], [np.mean(values) - 1.96 * error, np.mean(values) + 1.96 * error])
    assert figure["n"] == 30


@pytest.mark.parametrize(
    ("texts", "share"), [(["a b c", "b c d"], 3 / 4), (["a b", "a b"], 1 / 2), (["a", ""], 0), ([], 0), (["a b"], 1)]
)
def test_distinct_2_is_the_share_of_distinct_bigrams(texts, share):
    assert distinct_2(texts) == share


@pytest.mark.parametrize(("texts", "share"), [(["a", "b", "a", "c"], 1 / 2), (["a"], 1), (["a", "b"], 1 / 2)])
def test_most_common_share_is_the_share_of_the_most_frequent_text(texts, share):
    assert most_common_share(texts) == share


def test_wilson_is_as_published_and_stays_between_0_and_1():
    np.testing.assert_allclose(wilson_ci(81, 263)["ci95"], [0.2553, 0.3662], atol=5e-5)  # Newcombe (1998), table I
    np.testing.assert_allclose(wilson_ci(0, 20)["ci95"], [0.0, 0.1611], atol=5e-5)
    assert wilson_ci(10, 10) == {"mean": 1.0, "ci95": [pytest.approx(0.7225, abs=1e-4), 1.0], "n": 10}


def test_a_difference_of_proportions_is_newcombes():
    # Newcombe (1998), Interval estimation for the difference between independent proportions, table II, method 10.
    found = difference(wilson_ci(56, 70), wilson_ci(48, 80))
    np.testing.assert_allclose([found["mean"], *found["ci95"]], [0.2, 0.0524, 0.3339], atol=5e-5)
    assert found["n"] == 70


def test_the_interval_of_a_difference_covers_it_about_95_times_in_100():
    rng = np.random.default_rng(0)
    draws = [[mean_ci(rng.normal(mean, 1, 60), 200, seed) for mean in (2, 1)] for seed in range(200)]
    covered = np.mean([low <= 1 <= high for low, high in (difference(*pair)["ci95"] for pair in draws)])
    assert 0.88 < covered < 0.99
