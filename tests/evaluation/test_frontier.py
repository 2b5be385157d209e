"""Helpfulness against harmlessness from named figures, and the chart of it."""

import re

import pytest

from rlaif_jax.evaluation.frontier import Point, frontiers, is_of_revisions
from rlaif_jax.evaluation.names import (
    BY_POLICY,
    SINGLE,
    by_role,
    measured_policies,
    policies,
    policy_titles,
    stage_and_iteration,
    title,
)
from rlaif_jax.reporting.charts import frontier
from tests.report_run import figure

POLICIES = {"sft": "SFT", "sl_cai": "SL-CAI", "policy": "RL"}


def judged(*names):
    return {f"{side}_rating/{name}": figure(0.1 * i, 0, 1) for i, name in enumerate(names) for side in (
        "helpful", "harmless")}  # fmt: skip


def test_points_are_in_the_order_of_training_and_of_rounds():
    results = judged("policy", "sl_cai", "sft", "revision_10", "revision_2", "first")
    revisions, training = frontiers(results, POLICIES)
    assert [point.name for point in revisions.points] == ["first reply", "revision 2", "revision 10"]
    assert [point.name for point in training.points] == ["SFT", "SL-CAI", "RL"]
    assert training.points[1].harmless == results["harmless_rating/sl_cai"]
    assert training.by == revisions.by == "the judge's rating"


def test_what_is_not_measured_is_no_point_and_one_point_no_frontier():
    results = judged("sft", "sl_cai", "policy") | {"helpful_rating/sl_cai": figure(None, None, None, 0)}
    (found,) = frontiers(results, POLICIES)
    assert [point.name for point in found.points] == ["SFT", "RL"]
    del results["harmless_rating/sft"]
    assert frontiers(results, POLICIES) == [] == frontiers({}, POLICIES)


def test_the_ground_truth_of_critiques_and_of_policies_makes_frontiers_of_its_own():
    sides = {"critique_answers_prompt": 0.2, "critique_harmless": 0.9}
    results = {f"{side}/{name}": figure(mean, 0, 1) for side, mean in sides.items() for name in ("first", "revision_1")}
    sides = {"ground_truth_answers_prompt_safe": 0.4, "ground_truth_harmless_red_team": 0.6}
    results |= {f"{side}/{name}": figure(mean, 0, 1) for side, mean in sides.items() for name in ("sft", "policy")}
    found = frontiers(results, POLICIES)
    assert [(each.by, len(each.points)) for each in found] == [("the ground truth", 2)] * 2
    assert [(p.helpful["mean"], p.harmless["mean"]) for each in found for p in each.points[:1]] == [(0.2, 0.9), (
        0.4, 0.6)]  # fmt: skip


def test_the_policies_are_those_of_the_stages():
    assert policies(("sft", "label", "reward_model", "rl", "eval")) == ("sft", "rl")
    three = policies(("sft", "critique", "sl_cai", "label", "preference", "eval"))
    assert three == ("sft", "sl_cai", "preference")
    assert policy_titles(three, "DPO") == POLICIES | {"policy": "DPO"}
    stages = ("sft", "critique", "sl_cai", "eval")
    assert policies(stages) == ("sft", "sl_cai") and title({"stages": stages}) == "SL-CAI"
    assert policy_titles(policies(stages), "SL-CAI") == {"sft": "SFT", "policy": "SL-CAI"}
    names = dict.fromkeys(("win_rate/rl_vs_sl_cai", "win_rate/sl_cai_vs_sft", "win_rate/rl_vs_sft", "reward/rl"))
    assert list(by_role(names, "rl")) == [
        "win_rate/policy_vs_sl_cai", "win_rate/sl_cai_vs_sft", "win_rate/policy_vs_sft", "reward/policy"]  # fmt: skip


def test_the_policies_that_rl_keeps_come_before_its_last_in_their_order():
    stages = ("sft", "critique", "sl_cai", "label", "reward_model", "rl", "eval")
    kept = measured_policies(stages, 12, 4)
    assert kept == ("sft", "sl_cai", "rl@4", "rl@8", "rl")
    assert list(map(stage_and_iteration, kept[1:4])) == [("sl_cai", 0), ("rl", 4), ("rl", 8)]
    titles = policy_titles(kept, "RL")
    (found,) = frontiers(judged("policy", "rl@8", "sl_cai", "rl@4", "sft"), titles)
    assert [point.name for point in found.points] == ["SFT", "SL-CAI", "RL, iteration 4", "RL, iteration 8", "RL"]
    assert set(by_role(dict.fromkeys(("reward/rl@4", "kl/rl@4_vs_sft")), "rl")) == {"reward/rl@4", "kl/rl@4_vs_sft"}
    for same in (measured_policies(stages, 12, 0), measured_policies(stages, 12, 12)):
        assert same == policies(stages)
    assert measured_policies(("sft", "label", "preference", "eval"), 12, 4) == ("sft", "preference")


@pytest.mark.parametrize(
    ("name", "expected"), [("x/first", True), ("x/revision_3", True), ("x/sft", False), ("first/x", False)]
)
def test_figures_of_revisions_are_known_by_their_names(name, expected):
    assert is_of_revisions(name) is expected


def test_the_chart_shows_every_point_with_both_intervals():
    points = [Point(f"point {i}", figure(i, i - 0.5, i + 0.2), figure(-i, -i - 1, -i + 1)) for i in range(3)]
    chart = frontier("frontier", points)
    assert [name in chart for name in ("point 0", "point 1", "point 2", "helpful", "harmless")] == [True] * 5
    assert "point 2 2 and -2" in re.search(r'aria-label="([^"]*)"', chart)[1]
    sure = points[1]._replace(harmless=figure(-1, -1, -1))
    assert frontier("frontier", [points[0], sure]) != frontier("frontier", points[:2])


def test_what_is_said_of_red_team_prompts_has_names_for_people():
    named = {name for _, name in (*BY_POLICY, *SINGLE)}
    assert {"ground_truth_harmless_red_team", "ground_truth_answers_prompt_safe", "ground_truth_good_red_team"} <= named
    pairs = ("policy_vs_sft", "sl_cai_vs_sft", "policy_vs_sl_cai")
    assert {f"win_rate_red_team/{pair}" for pair in pairs} <= named
    assert len(named) == len(BY_POLICY) + len(SINGLE)
