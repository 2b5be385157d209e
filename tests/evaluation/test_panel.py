import itertools

import numpy as np
import pytest

from rlaif_jax.evaluation.panel import (
    combine,
    disagreement,
    enough,
    krippendorff_alpha,
    panel_audit,
    trust,
    vote_entropy,
)

RNG = np.random.default_rng(0)
NAN = np.nan
PROB = RNG.uniform(0, 1, (4, 200)).round(2)  # some are 0.5
PROB[RNG.random(PROB.shape) < 0.2] = NAN
PROB[:, 0] = NAN


def said(pair):
    return [p for p in PROB[:, pair] if p == p]


def oracle(pair, rule):
    members = said(pair)
    mean = sum(members) / len(members)
    if rule == "mean":
        return mean
    if rule == "majority":
        return sum(1.0 if p > 0.5 else 0.5 if p == 0.5 else 0.0 for p in members) / len(members)
    if mean == 0.5:
        return 0.5
    return max(0.5, min(members)) if mean > 0.5 else 1 - max(0.5, min(1 - p for p in members))


@pytest.mark.parametrize("rule", ["mean", "majority", "minimum"])
def test_labels_are_combined_as_the_rule_says_of_those_who_scored_the_pair(rule):
    expected = [oracle(pair, rule) for pair in range(1, 200)]
    np.testing.assert_allclose(combine(PROB, rule)[1:], expected, atol=1e-12)
    assert np.isnan(combine(PROB, rule)[0])


def test_the_worst_case_keeps_the_side_of_the_mean_and_is_no_preference_where_one_disagrees():
    prob = np.array([[0.9, 0.2, 0.9, 0.6], [0.7, 0.4, 0.4, 0.4]])
    np.testing.assert_allclose(combine(prob, "minimum"), [0.7, 0.4, 0.5, 0.5])


@pytest.mark.parametrize("rule", ["mean", "majority", "minimum"])
def test_swapping_the_responses_swaps_the_label_and_the_order_of_members_is_nothing(rule):
    np.testing.assert_allclose(combine(1 - PROB, rule), 1 - combine(PROB, rule), atol=1e-12)
    np.testing.assert_allclose(combine(PROB[::-1], rule), combine(PROB, rule), atol=1e-12)


def test_a_pair_needs_two_scores_and_more_than_half_of_the_members():
    scored = lambda *some: np.where(some, 0.7, NAN)[:, None]  # noqa: E731
    assert all(enough(scored(*some))[0] for some in ((1, 1), (1, 1, 0), (1, 1, 1, 0), (1,)))
    assert not any(enough(scored(*some))[0] for some in ((1, 0), (1, 0, 0), (1, 1, 0, 0), (0, 0), (0,)))


def test_disagreement_is_the_variance_and_the_entropy_of_the_vote():
    np.testing.assert_allclose(disagreement(PROB)[1:], [np.var(said(pair)) for pair in range(1, 200)], atol=1e-12)
    prob = np.array([[0.9, 0.9, 1.0, 0.5], [0.8, 0.1, 0.0, NAN], [0.7, 0.9, NAN, NAN], [0.6, 0.6, NAN, NAN]])
    three_to_one = -(0.75 * np.log(0.75) + 0.25 * np.log(0.25))
    np.testing.assert_allclose(vote_entropy(prob), [0, three_to_one, np.log(2), np.log(2)])
    assert np.isnan(disagreement(PROB)[0]) and np.isnan(vote_entropy(PROB)[0])


def test_the_less_members_agree_the_less_a_pair_counts():
    variance = np.array([0, 0.01, 0.05, 0.25])
    np.testing.assert_allclose(trust(variance, "weight", 0.01), [1, 0.96, 0.8, 0])
    np.testing.assert_array_equal(trust(variance, "filter", 0.01), [1, 1, 0, 0])


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011), section C: four observers, twelve units.
PUBLISHED = np.array([
    [1, 2, 3, 3, 2, 1, 4, 1, 2, NAN, NAN, NAN],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, NAN, 3],
    [NAN, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, NAN],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, NAN],
])  # fmt: skip


@pytest.mark.parametrize(("nominal", "alpha"), [(True, 0.743), (False, 0.849)])
def test_alpha_is_that_of_krippendorffs_example(nominal, alpha):
    assert krippendorff_alpha(PUBLISHED, nominal) == pytest.approx(alpha, abs=5e-4)


def by_coincidence_matrix(values, metric):
    """Krippendorff's definition, value by value: 1 - sum o_ck d_ck / sum e_ck d_ck."""
    categories = sorted({v for v in values.ravel() if v == v})
    coincidences = {pair: 0.0 for pair in itertools.product(categories, repeat=2)}
    for unit in values.T:
        unit = [v for v in unit if v == v]
        for c, k in itertools.permutations(unit, 2):
            coincidences[c, k] += 1 / (len(unit) - 1)
    totals = {c: sum(coincidences[c, k] for k in categories) for c in categories}
    n = sum(totals.values())
    observed = sum(count * metric(c, k) for (c, k), count in coincidences.items())
    expected = sum(totals[c] * totals[k] * metric(c, k) for c, k in coincidences) / (n - 1)
    return 1 - observed / expected


@pytest.mark.parametrize("nominal", [True, False])
def test_alpha_is_that_of_the_coincidence_matrix(nominal):
    metric = (lambda c, k: c != k) if nominal else (lambda c, k: (c - k) ** 2)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        values = np.round(rng.normal(rng.normal(0, 1, 30), 0.5, (3, 30)))
        values[rng.random(values.shape) < 0.3] = NAN
        assert krippendorff_alpha(values, nominal) == pytest.approx(by_coincidence_matrix(values, metric), abs=1e-12)


@pytest.mark.parametrize("nominal", [True, False])
def test_alpha_is_1_for_one_opinion_0_for_none_and_below_for_opposites(nominal):
    votes = RNG.integers(0, 2, (3, 4000)).astype(float)
    assert krippendorff_alpha(votes[[0, 0, 0]], nominal) == pytest.approx(1)
    assert krippendorff_alpha(votes, nominal) == pytest.approx(0, abs=0.03)
    assert krippendorff_alpha(np.stack([votes[0], 1 - votes[0]]), nominal) < -0.9
    assert krippendorff_alpha(np.ones((3, 5)), nominal) == krippendorff_alpha(np.full((3, 5), NAN), nominal) == 0


def columns_of(prob_a, **more):
    names = ("first", "second", "noise")
    members = [{name: None if p != p else p for name, p in zip(names, row, strict=True)} for row in prob_a.T.tolist()]
    return {"status": ["ok"] * len(members), "prob_a_members": members, "combine": ["mean"] * len(members), **more}


def test_a_member_that_knows_nothing_is_found_by_leaving_it_out():
    n = 600
    better = RNG.integers(0, 2, n).astype(float)
    truth = [b if i % 3 else None for i, b in enumerate(better)]
    prob = np.clip(0.2 + 0.6 * better + RNG.normal(0, 0.3, (3, n)), 0, 1)
    prob[2] = RNG.uniform(0, 1, n)
    prob[2, :10] = NAN
    found = panel_audit(columns_of(prob, ground_truth=truth), 100, 0)
    at = lambda name: found[name]["mean"]  # noqa: E731
    assert at("panel_without/noise/alpha/votes") > at("panel_alpha/votes") + 0.2
    assert at("panel_without/first/alpha/votes") < at("panel_alpha/votes")
    assert at("panel_without/noise/alpha/prob_a") == pytest.approx(krippendorff_alpha(prob[:2], False))
    assert at("panel_member/noise/with_others") == pytest.approx(0.5, abs=0.06)
    assert at("panel_member/first/with_others") > 0.6
    assert at("panel_without/noise/ground_truth") > at("panel_without/first/ground_truth") > 0.6
    assert at("panel_member/noise/ground_truth") == pytest.approx(0.5, abs=0.08)
    assert found["panel_without/noise/ground_truth"]["n"] == sum(x is not None for x in truth)
    assert at("panel_member/noise/scored") == 1 - 10 / n
    for figure in found.values():
        low, high = figure["ci95"]
        assert low <= figure["mean"] <= high


def test_pairs_without_a_label_and_files_of_one_judge_are_left_alone():
    prob = np.array([[0.9, 0.2, NAN, 0.6], [0.8, 0.4, NAN, 0.7], [0.7, 0.6, 0.4, 0.3]])
    columns = columns_of(prob) | {"status": ["ok", "ok", "panel_unscored", "ok"]}
    assert panel_audit(columns, 20, 0)["panel_disagreement/variance"]["n"] == 3
    assert panel_audit(columns | {"status": ["panel_unscored"] * 4}, 20, 0) == {}
    assert panel_audit({"status": ["ok"] * 4, "prob_a": [0.5] * 4}, 20, 0) == {}


def test_of_a_panel_of_two_no_alpha_is_left_without_one():
    prob = np.array([[0.9, 0.2, 0.6], [0.8, 0.4, 0.7]])
    columns = columns_of(np.vstack([prob, prob[:1]]))
    columns["prob_a_members"] = [{"x": a, "y": b} for a, b in prob.T.tolist()]
    found = panel_audit(columns, 20, 0)
    assert "panel_without/x/alpha/votes" not in found and found["panel_member/x/with_others"]["mean"] == 1
