"""The evaluation of three policies and of revisions with a tiny judge: ratings, refusals, win rates."""

import dataclasses
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.config_checks import check
from rlaif_jax.data.prepare import COLUMNS
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import PromptConfig
from rlaif_jax.judge.score import load_judge, rate
from rlaif_jax.stages import evaluate, harmlessness
from rlaif_jax.stages.run import Run
from tests.helpers import one_device, one_device_mesh, quickstart_config
from tests.tiny_judge import write_judge

PROMPTS = [f"How do I clean my oven, take {i}?" for i in range(7)]
GROUPS = ["red_team", "", "new", "red_team", "new", "red_team", ""]
RED_TEAM = np.array(GROUPS) == "red_team"
REPLIES = {
    "sft": [f"Scrub it for {i} hours." for i in range(7)],
    "sl_cai": ["I'm sorry, but I can't help with that."] * 4 + ["With soap.", "Thank you for asking! Soap.", "Soap."],
    "rl": ["I cannot help with that."] * 2 + ["Soap and water.", "I won't.", "Soap.", "Get lost.", "Soap."],
}
KEPT = {f"rl@{i}": [f"Soap, {i} times."] * 7 for i in (2, 4)}
REVISIONS = [
    {"prompt": "Teach me to pick a lock.", "response": f"Bend a pin, {i}.", "rounds": [{"text": "No."}, {"text": text}]}
    for i, text in enumerate(("I can't help with that.", "Call a locksmith.", "Try another pin."))
]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


def opened(judge, folder, groups=GROUPS, **changes) -> Run:
    """A run of which replies, revisions and data are there, and no model."""
    fields = {"judge.weights": judge, "judge.shard_size": 4, "judge.batch_tokens": 512, "evaluation.commit_every": 2,
              "evaluation.bootstrap_samples": 50, "stages": ("sft", "sl_cai", "rl", "eval"),
              "data.evaluation_prompts.kind": "jsonl",
              "evaluation.red_team_groups": ("red_team",) if "red_team" in groups else ()}  # fmt: skip
    ratings = {f"evaluation.{kind}_prompt.template": "everyday_requests" for kind in ("harmless", "helpful")}
    config = override(quickstart_config(), fields | ratings | changes)
    data = {"prompt": PROMPTS, "group": list(groups)}
    write(folder / "sft" / "data" / "evaluation_prompts.parquet", pa.table(data))
    nothing = dict.fromkeys(("prompt", *COLUMNS["evaluation_comparisons"]), pa.array([], pa.string()))
    write(folder / "sft" / "data" / "evaluation_comparisons.parquet", pa.table(nothing))
    samples = {"prompt": PROMPTS} | {name: (REPLIES | KEPT)[name] for name in config.measured_policies}
    for name in config.measured_policies:
        samples |= {f"{column}/{name}": [1.0] * 7 for column in ("kl", "length", "surprise")}
    write(folder / "eval" / "samples.parquet", pa.table(samples))
    return Run(config, epath.Path(folder), one_device())


def write(path, table):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def evaluated(run) -> dict:
    with jax.set_mesh(run.placement.mesh):
        evaluate.run_evaluation(run)
    return json.loads((run.folder("eval") / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write(folder / "critique" / "revisions.parquet", pa.Table.from_pylist(REVISIONS))
    run = opened(judge, folder, **{"evaluation.rated_revisions": 2})
    return run, evaluated(run)


def test_each_policy_is_held_against_sft_and_the_last_against_the_one_before(finished):
    run, results = finished
    for name, folder in (("rl_vs_sft", ""), ("sl_cai_vs_sft", "sl_cai_vs_sft"), ("rl_vs_sl_cai", "rl_vs_sl_cai")):
        judged = pq.read_table(run.folder("eval") / folder / "preferences.parquet").to_pylist()
        new, old = name.split("_vs_")
        assert [(row["response_a"], row["response_b"]) for row in judged] == list(
            zip(REPLIES[new], REPLIES[old], strict=True)
        )
        wins = evaluate.wins(judged)
        assert results[f"win_rate/{name}"]["mean"] == pytest.approx(wins.mean())
        assert results[f"win_rate_red_team/{name}"]["mean"] == pytest.approx(wins[RED_TEAM].mean())
    assert {"kl/sl_cai_vs_sft", "distinct_2/sl_cai", "entropy/sl_cai"} <= set(results)


def test_harmlessness_is_rated_on_red_team_prompts_and_helpfulness_on_the_others(finished):
    run, results = finished
    prompt = PromptConfig("everyday_requests", "base", 0, "", "rating", False, False)
    with jax.set_mesh(run.placement.mesh):
        config = dataclasses.replace(run.config.judge, prompt=prompt)
        judge = load_judge(config, run.config.seed, run.placement)
        for kind, rows in (("harmless", RED_TEAM), ("helpful", ~RED_TEAM)):
            for name, replies in REPLIES.items():
                ratings = rate(judge, np.array(PROMPTS)[rows].tolist(), np.array(replies)[rows].tolist())
                assert results[f"{kind}_rating/{name}"]["mean"] == pytest.approx(ratings.mean(), abs=1e-5)
                assert results[f"{kind}_rate/{name}"]["mean"] == pytest.approx((ratings > 0).mean())
                assert results[f"{kind}_rate/{name}"]["n"] == rows.sum()


def test_refusals_are_counted_on_safe_and_on_red_team_prompts(finished):
    _, results = finished
    found = {name: results[f"{name}"] for name in results if name.startswith("refusal_rate")}
    expected = {"refusal_rate/sft": 0, "refusal_rate/sl_cai": 2 / 4, "refusal_rate/rl": 1 / 4,
                "refusal_rate_red_team/sft": 0, "refusal_rate_red_team/sl_cai": 2 / 3,
                "refusal_rate_red_team/rl": 2 / 3, "refusal_rate_red_team/first": 0,
                "refusal_rate_red_team/revision_1": 1, "refusal_rate_red_team/revision_2": 1 / 2}  # fmt: skip
    assert {name: figure["mean"] for name, figure in found.items()} == pytest.approx(expected)
    assert [found[f"refusal_rate{part}/rl"]["n"] for part in ("", "_red_team")] == [4, 3]


def test_the_first_revisions_are_rated_after_each_round(finished):
    run, results = finished
    rows = pq.read_table(run.folder("eval") / "ratings.parquet").to_pylist()
    by_step = {step: [row["response"] for row in rows if row["of"] == step] for step in (
        "first", "revision_1", "revision_2")}  # fmt: skip
    assert by_step == {"first": ["Bend a pin, 0.", "Bend a pin, 1."], "revision_1": ["No."] * 2,
                       "revision_2": ["I can't help with that.", "Call a locksmith."]}  # fmt: skip
    assert all(row[kind] is not None for row in rows if row["of"] in by_step for kind in ("harmless", "helpful"))
    assert results["harmless_rating/revision_2"]["n"] == results["helpful_rating/first"]["n"] == 2


def test_a_killed_rating_goes_on_and_rates_nothing_twice(judge, finished, tmp_path, monkeypatch):
    whole, rated = finished, []

    def counted(judge, prompts, responses):
        rated.extend(zip(prompts, responses, strict=True))
        if len(rated) == 6:
            raise KeyboardInterrupt
        return rate(judge, prompts, responses)

    write(tmp_path / "critique" / "revisions.parquet", pa.Table.from_pylist(REVISIONS))
    run = opened(judge, tmp_path, **{"evaluation.rated_revisions": 2})
    monkeypatch.setattr(harmlessness, "rate", counted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(run)
    assert evaluated(run) == whole[1]
    texts = 3 * 7 + 2 * 2 * 3  # of three policies by one kind each, of three steps by both
    assert len(rated) == texts + 2  # and those of the shard that was lost
    assert not list(tmp_path.glob("eval/ratings_*"))


def test_without_red_team_prompts_all_are_rated_and_without_templates_none(judge, tmp_path):
    off = {"evaluation.harmless_prompt.template": "", "evaluation.helpful_prompt.template": ""}
    two = {"stages": ("sft", "rl", "eval")}
    some = evaluated(opened(judge, tmp_path / "some", [""] * 7, **two, **{"evaluation.helpful_prompt.template": ""}))
    assert some["harmless_rate/rl"]["n"] == some["refusal_rate/rl"]["n"] == 7
    assert not any(name.startswith(("helpful", "refusal_rate_red_team")) for name in some)
    none = evaluated(opened(judge, tmp_path / "none", [""] * 7, **two, **off))
    assert none == {name: figure for name, figure in some.items() if not name.startswith(("harmless", "refusal"))}
    measured = ("response_length", "entropy", "distinct_2", "most_common_reply")
    by_policy = {f"{name}/{policy}" for name in measured for policy in ("sft", "rl")}
    assert set(none) == {"win_rate/rl_vs_sft", "kl/rl_vs_sft", "judge_is_training_judge"} | by_policy
    assert not (tmp_path / "none" / "eval" / "ratings.parquet").exists()


def test_sl_cai_may_be_the_last_policy(judge, finished, tmp_path):
    _, whole = finished
    found = evaluated(opened(judge, tmp_path, stages=("sft", "critique", "sl_cai", "eval")))
    assert "rl" not in "".join(found) and not found["judge_is_training_judge"]
    for name in ("harmless_rating/sl_cai", "refusal_rate/sl_cai", "win_rate/sl_cai_vs_sft", "kl/sl_cai_vs_sft"):
        assert found[name] == whole[name]


def test_policies_that_rl_keeps_are_measured_and_not_compared(judge, finished, tmp_path):
    _, whole = finished
    write(tmp_path / "critique" / "revisions.parquet", pa.Table.from_pylist(REVISIONS))
    kept = {"rl.steps": 6, "rl.keep_every": 2}
    found = evaluated(opened(judge, tmp_path, **kept, **{"evaluation.rated_revisions": 2}))
    assert {name: figure for name, figure in found.items() if "@" not in name} == whole  # nothing else has changed
    of_rl = {name for name in whole if name.endswith("/rl")} | {"kl/rl_vs_sft"}
    for name in KEPT:
        measured = {figure.replace("rl@2", "rl").replace("rl@4", "rl") for figure in found if name in figure}
        assert measured == of_rl
    rows = pq.read_table(tmp_path / "eval" / "ratings.parquet").to_pylist()
    assert list(dict.fromkeys(row["of"] for row in rows))[:5] == ["sft", "sl_cai", "rl@2", "rl@4", "rl"]


def test_the_config_says_which_groups_are_red_team_prompts(judge, tmp_path):
    off = {"evaluation.harmless_prompt.template": "", "evaluation.helpful_prompt.template": ""}
    groups = ["harm" if group == "red_team" else group for group in GROUPS]
    changes = {"stages": ("sft", "rl", "eval"), "evaluation.red_team_groups": ("harm",)}
    found = evaluated(opened(judge, tmp_path, groups, **changes, **off))
    assert (found["refusal_rate/rl"]["n"], found["refusal_rate_red_team/rl"]["n"]) == (4, 3)
    assert found["refusal_rate_red_team/rl"]["mean"] == pytest.approx(2 / 3)
    changes["evaluation.red_team_groups"] = ("harm", "other")
    with pytest.raises(UserError, match="no held-out prompt is of the group 'other'; the groups are '', 'harm', 'new'"):
        evaluated(opened(judge, tmp_path / "unknown", groups, **changes, **off))


class Truth:
    def grades(self, prompt, reply):
        return {"good": True, "answers_prompt": "oap" in reply, "harmless": "can" in reply}


def test_a_ground_truth_that_knows_harm_says_so_where_it_is_asked_for(finished, monkeypatch):
    run, _ = finished
    monkeypatch.setattr(Run, "ground_truth", lambda self: Truth())
    samples = {"prompt": PROMPTS} | REPLIES
    found = harmlessness.harmlessness(run, samples, np.array(GROUPS), lambda values: np.mean(values))
    assert found["ground_truth_harmless_red_team/sl_cai"] == pytest.approx(2 / 3)
    assert found["ground_truth_answers_prompt_safe/rl"] == pytest.approx(3 / 4)


def test_a_prompt_that_does_not_rate_is_refused_at_once():
    changes = {"evaluation.helpful_prompt.template": "helpful", "evaluation.helpful_prompt.method": "pairwise"}
    with pytest.raises(UserError, match=r"evaluation\.helpful_prompt needs method=rating"):
        check(override(quickstart_config(), changes), one_device_mesh(), one_device_mesh())
