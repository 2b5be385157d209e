import numpy as np
import pytest

from rlaif_jax.evaluation.panel import krippendorff_alpha
from rlaif_jax.evaluation.principles import DISPUTED, by_principle, principle_audit
from rlaif_jax.reporting.principles import principle_section

RNG = np.random.default_rng(0)
N = 60


def row(pair, principle, forward, backward, better=None, status="ok"):
    ok = status == "ok"
    return {
        "prompt": f"p{pair}",
        "response_a": f"a{pair}",
        "response_b": f"b{pair}",
        "principle": principle,
        "status": status,
        "prob_a_forward": forward if ok else None,
        "prob_a_reversed": backward if ok else None,
        "prob_a": (forward + backward) / 2 if ok else None,
        "ground_truth": better,
    }


def columns_of(rows):
    return {name: [one[name] for one in rows] for name in rows[0]}


def ensemble():
    """Two principles on every pair: "x" is right and leans to slot 1, "y" guesses; the first pair "y" can't score."""
    rows = []
    for pair in range(N):
        better = float(pair % 2)
        right = 0.2 + 0.5 * better
        rows.append(row(pair, "x", right + 0.1, right - 0.1, better))
        guess = RNG.uniform(0, 1, 2).tolist()
        rows.append(row(pair, "y", *guess, better, "too_long" if pair == 0 else "ok"))
    return rows


def test_the_figures_of_each_principle_are_those_of_its_own_rows():
    rows = ensemble()
    found = principle_audit(columns_of(rows), 50, 0)
    for name in "xy":
        own = [one for one in rows if one["principle"] == name and one["status"] == "ok"]
        prob_a = [one["prob_a"] for one in own]
        assert found[f"principle_use/{name}"]["mean"] == len(own) / N
        assert found[f"principle_decisiveness/{name}"]["mean"] == pytest.approx(
            np.mean([abs(2 * p - 1) for p in prob_a])
        )
        assert found[f"principle_share_a/{name}"]["mean"] == pytest.approx(np.mean([p > 0.5 for p in prob_a]))
        sides = [(p > 0.5) == (one["ground_truth"] == 1) for p, one in zip(prob_a, own, strict=True)]
        assert found[f"principle_ground_truth/{name}"]["mean"] == pytest.approx(np.mean(sides))
        slot = [((one["prob_a_forward"] > 0.5) + (one["prob_a_reversed"] < 0.5)) / 2 for one in own]
        assert found[f"principle_first_slot/{name}"]["mean"] == pytest.approx(np.mean(slot))
        surest = [rows[i]["prob_a"] for i in found[f"principle_surest_a/{name}"]]
        assert surest == sorted(prob_a)[::-1][: len(surest)] and rows[found[f"principle_surest_a/{name}"][0]] in own
    assert found["principle_ground_truth/x"]["mean"] == 1


def test_agreement_between_principles_is_over_the_pairs_that_both_judged():
    rows = ensemble()
    found = principle_audit(columns_of(rows), 50, 0)
    x, y = (np.array([one["prob_a"] for one in rows[side::2]], float) for side in (0, 1))
    assert found["principle_agreement/x/y"]["mean"] == pytest.approx(np.mean((x[1:] > 0.5) == (y[1:] > 0.5)))
    assert found["principle_agreement/x/y"]["n"] == N - 1
    assert found["principle_alpha/prob_a"]["mean"] == pytest.approx(krippendorff_alpha(np.stack([x, y]), False))
    gaps = [abs(x[row // 2] - y[row // 2]) for row in found["principle_disputed"]]
    assert len(gaps) == DISPUTED and gaps == pytest.approx(sorted(np.nan_to_num(abs(x - y)))[::-1][:DISPUTED])
    firsts, labels = by_principle(columns_of(rows))
    assert firsts == list(range(0, 2 * N, 2))
    np.testing.assert_array_equal(labels["y"], y)


def test_one_principle_a_pair_is_counted_by_use_and_compared_with_none():
    rows = [row(pair, "xyz"[pair % 3], 0.7, 0.6) for pair in range(30)]
    found = principle_audit(columns_of(rows), 20, 0)
    assert [found[f"principle_use/{name}"]["mean"] for name in "xyz"] == [1 / 3] * 3
    assert not any(name.startswith(("principle_agreement", "principle_alpha", "principle_disp")) for name in found)


def test_a_principle_that_decided_nothing_has_a_use_of_0():
    columns = columns_of([row(pair, "x", 0.7, 0.6) for pair in range(4)])
    found = principle_audit(columns, 20, 0, ("y", "x"))
    assert found["principle_use/y"] == {"mean": 0, "ci95": [0, 0], "n": 4} and found["principle_use/x"]["mean"] == 1
    section = principle_section(columns, found)
    assert section["names"] == ["y", "x"] and section["examples"][0] == ("y", "", [])
    assert principle_audit(columns_of([row(0, None, 0.7, 0.6)]), 20, 0, ("x",)) == {}


def test_what_principles_agree_on_is_not_disputed():
    rows = [
        row(pair, name, 0.7, 0.6 if pair else side, 1.0) for pair in range(4) for name, side in (("x", 0.1), ("y", 0.9))
    ]
    assert principle_audit(columns_of(rows), 20, 0)["principle_disputed"] == [0]


def test_a_label_file_without_principles_has_no_such_figures():
    columns = columns_of([row(0, None, 0.7, 0.6)])
    assert principle_audit(columns, 20, 0) == principle_audit({"status": ["ok"]}, 20, 0) == {}
    assert principle_section(columns, {}) is None


def test_the_page_shows_for_each_principle_what_it_is_for_and_against_and_where_they_differ():
    rows = ensemble()
    section = principle_section(columns_of(rows), principle_audit(columns_of(rows), 20, 0))
    assert section["names"] == ["x", "y"] and [name for name, _ in section["rows"]] == ["x", "y"]
    assert section["agreement"][0][1][0] is None and section["agreement"][0][1][1] == section["agreement"][1][1][0]
    for _, _, examples in section["examples"]:
        for example in examples:
            one = rows[example["row"]]
            assert (one["prob_a"] > 0.5) == (example["better"] == one["response_a"])
            assert {example["better"], example["worse"]} == {one["response_a"], one["response_b"]}
    assert "by x, " in section["disputed"][0]["said"]
