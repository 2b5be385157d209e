"""A synthetic judge of known bias is found out, and one without is cleared."""

import numpy as np
import pytest

from rlaif_jax.evaluation.audit import agreement, audit, kappa
from rlaif_jax.evaluation.calibration import logit

N = 5_000


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def synthetic(slot=0.0, length=0.0, lists=0.0, own=0.0, temperature=1.0, seed=0):
    """Labels of a judge that sees the better response's margin, and whose log-odds have these biases on top."""
    rng = np.random.default_rng(seed)
    margin, lengths, listed = rng.normal(0, 1.5, N), rng.integers(10, 400, (N, 2)), rng.random((N, 2)) < 0.3
    authors = np.where(rng.random((N, 2)) < 0.4, "tiny", "other")
    bias = length * (lengths[:, 0] - lengths[:, 1]) / 100 + lists * (listed[:, 0] * 1.0 - listed[:, 1])
    bias += own * ((authors[:, 0] == "tiny") * 1.0 - (authors[:, 1] == "tiny"))
    log_odds = (margin + bias) / temperature
    forward, backward = sigmoid(log_odds + slot), sigmoid(log_odds - slot)
    text = [["- x\n" + "y" * size if is_list else "z" * size for size, is_list in zip(*row, strict=True)]
            for row in zip(lengths - 4 * listed, listed, strict=True)]  # fmt: skip
    return {
        "status": ["ok"] * N,
        "judge": ["tiny"] * N,
        "response_a": [row[0] for row in text],
        "response_b": [row[1] for row in text],
        "prob_a": ((forward + backward) / 2).tolist(),
        "prob_a_forward": forward.tolist(),
        "prob_a_reversed": backward.tolist(),
        "answer_mass": [0.5] * N,
        "human": (rng.random(N) < sigmoid(margin)).astype(float).tolist(),
        "generator_a": authors[:, 0].tolist(),
        "generator_b": authors[:, 1].tolist(),
        "group": np.where(margin > 0, "right", "left").tolist(),
    }


def holds(figure, value):
    low, high = figure["ci95"]
    return low <= value <= high


def test_an_unbiased_judge_is_cleared():
    found = audit(synthetic(), 200, 0)
    for name in ("first_slot_rate", "longer_preferred", "list_preferred", "self_preferred"):
        assert holds(found[name], 0.5), name
    assert found["same_slot_in_both_orders"]["mean"] == 0
    assert holds(found["length_slope"], 0)
    assert found["answer_mass"]["mean"] == 0.5


def test_each_bias_is_recovered_within_its_interval():
    assert holds(audit(synthetic(length=0.4), 200, 0)["length_slope"], 0.4)
    assert audit(synthetic(length=0.4), 200, 0)["longer_preferred"]["ci95"][0] > 0.55
    assert audit(synthetic(lists=1.0), 200, 0)["list_preferred"]["ci95"][0] > 0.6
    assert audit(synthetic(own=1.0), 200, 0)["self_preferred"]["ci95"][0] > 0.6
    slot = audit(synthetic(slot=1.0), 200, 0)
    margin = np.random.default_rng(9).normal(0, 1.5, 400_000)
    assert holds(slot["first_slot_rate"], np.mean(margin > -1))
    assert holds(slot["same_slot_in_both_orders"], np.mean(np.abs(margin) < 1))
    assert slot["first_slot_when_same"]["mean"] == 1


def test_calibration_is_recovered_from_what_people_chose():
    columns = synthetic(temperature=1 / 3)
    found = audit(columns, 200, 0)
    assert found["calibration/temperature"] == pytest.approx(3, rel=0.1)
    prob = sigmoid(logit(np.array(columns["prob_a"])) / 3)
    assert holds(found["judge_agreement/human"], np.mean(np.maximum(prob, 1 - prob)))
    assert found["calibration/ece"]["ci95"][0] > 0.1
    assert found["calibration/ece_after_scaling"]["mean"] < 0.03
    assert found["calibration/brier_after_scaling"]["mean"] < found["calibration/brier"]["mean"]
    sure = found["judge_agreement/human/confidence 0.90 to 1.00"]["mean"]
    assert sure > found["judge_agreement/human/confidence 0.50 to 0.60"]["mean"] + 0.2


def test_a_judge_that_always_names_slot_one_is_told_so():
    columns = synthetic()
    columns |= {"prob_a": [0.5] * N, "prob_a_forward": [0.9] * N, "prob_a_reversed": [0.1] * N}
    found = audit(columns, 100, 0)
    assert found["first_slot_rate"]["mean"] == found["same_slot_in_both_orders"]["mean"] == 1
    assert found["judge_agreement/human"]["mean"] == 0.5
    assert found["judge_kappa/human"]["mean"] == pytest.approx(0, abs=1e-9)


def test_pairs_that_it_cannot_tell_apart_count_half_in_both_slots():
    columns = synthetic()
    columns |= {name: [0.5] * N for name in ("prob_a", "prob_a_forward", "prob_a_reversed")}
    found = audit(columns, 100, 0)
    assert found["first_slot_rate"] == {"mean": 0.5, "ci95": [0.5, 0.5], "n": N}
    assert found["same_slot_in_both_orders"]["mean"] == 0.5


def test_the_calibration_error_lies_in_its_interval_even_of_few_labels():
    columns = {name: values if isinstance(values, str) else values[:48] for name, values in synthetic().items()}
    found = audit(columns, 500, 0)["calibration/ece"]
    assert 0 <= found["ci95"][0] < found["mean"] < found["ci95"][1]


def test_agreement_is_split_by_any_column():
    columns = synthetic()
    wrong = [human if group == "right" else 1 - human
             for human, group in zip(columns["human"], columns["group"], strict=True)]  # fmt: skip
    found = audit(columns | {"human": wrong}, 100, 0, by=("group",))
    assert found["judge_agreement/human/group=right"]["ci95"][0] > 0.6
    assert found["judge_agreement/human/group=left"]["ci95"][1] < 0.4


def test_failures_and_what_people_did_not_say_are_left_out():
    columns = synthetic()
    columns["status"] = ["too_long" if i % 4 == 0 else "ok" for i in range(N)]
    for name in ("prob_a", "prob_a_forward", "prob_a_reversed"):
        columns[name] = [None if i % 4 == 0 else value for i, value in enumerate(columns[name])]
    columns["human"] = [None if i % 2 else value for i, value in enumerate(columns["human"])]
    found = audit(columns, 100, 0)
    assert found["scored"]["mean"] == 0.75
    assert found["judge_agreement/human"]["n"] == N // 4


def test_a_rating_judge_has_no_slots():
    columns = synthetic() | {"prob_a_forward": [None] * N, "prob_a_reversed": [None] * N}
    assert "first_slot_rate" not in audit(columns, 100, 0)


def test_kappa_and_agreement_are_the_textbooks():
    judge, human = np.array([0.9, 0.8, 0.3, 0.4, 0.7]), np.array([1.0, 0.0, 0.0, 1.0, 1.0])
    one, other = (np.concatenate([x, 1 - x]) > 0.5 for x in (judge, human))  # both ways round
    chance = one.mean() * other.mean() + (1 - one.mean()) * (1 - other.mean())
    assert kappa(judge, human) == pytest.approx((np.mean(one == other) - chance) / (1 - chance)) == pytest.approx(0.2)
    always_a = np.ones(5)  # the sets whose chosen response comes first
    swapped = np.where(human > 0.5, judge, 1 - judge)
    assert kappa(swapped, always_a) == pytest.approx(kappa(judge, human))
    assert agreement(np.array([0.5]), np.array([1.0])) == 0.5
