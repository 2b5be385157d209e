"""Rounds: each policy makes the pairs that the next one learns from, judged by itself or by another."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax import audit, export, rounds
from rlaif_jax.config import nested, override, parse
from rlaif_jax.main import main
from rlaif_jax.models.parameters import parameters_hash
from rlaif_jax.reporting.rounds import draw_rounds, series, table
from rlaif_jax.stages import panel
from rlaif_jax.stages import run as runs
from rlaif_jax.stages.folders import all_stages, in_round, name_in_round
from rlaif_jax.stages.rounds import run_rounds
from rlaif_jax.summary import print_summary
from tests.helpers import one_device, one_device_mesh
from tests.tiny_judge import tiny_run_flags, write_judge

STAGES = ("sft", "label", "preference", "eval")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


def flags_of(judge, workdir, *options):
    steps = {"preference.steps": 2, "preference.batch_size": 8, "preference.checkpoint_every": 2, "rounds": 2}
    steps |= {"policy.model.max_position_embeddings": 2048, "preference.optimizer.warmup_steps": 0}
    steps |= {"preference.optimizer.learning_rate": 0.01}  # replies that differ from those of SFT
    config = [f"--config.{name}={value}" for name, value in steps.items()]
    flags = tiny_run_flags(judge, workdir)[1:]
    return ["main", "--config=tests/stages/self_judge.py", *flags, *config, *options]


@pytest.fixture(scope="module")
def finished(judge, tmp_path_factory):
    """A whole run of two rounds in which the policy is its own judge, on one device."""
    workdir = tmp_path_factory.mktemp("rounds") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
        assert main(flags_of(judge, workdir)) == 0
    return workdir


def test_stages_of_rounds_have_names_of_their_own():
    names = all_stages((*STAGES, "overoptimisation"), 3)
    assert names[:5] == (*STAGES, "overoptimisation") and names[-1] == "rounds"
    assert names[5:8] == ("round2/label", "round2/preference", "round2/eval") and len(names) == 12
    assert all(name_in_round(*in_round(name)) == name for name in names)
    assert all_stages(STAGES, 1) == STAGES


def test_each_round_is_labelled_by_the_policy_that_made_its_pairs(finished):
    labels = [pq.read_table(finished / name / "panel" / "self" / "preferences.parquet").to_pylist()
              for name in ("label", "round2/label", "rounds/round1", "rounds/round2")]  # fmt: skip
    stages = ("sft", "preference", "preference", "round2/preference")
    assert [{row["judge"] for row in rows} for rows in labels] == [{f"policy after {stage}"} for stage in stages]
    hashes = [{row["judge_hash"] for row in rows} for rows in labels]
    assert hashes[1] == hashes[2] and len(set.union(*hashes)) == 3
    manifests = [json.loads((finished / name / "label" / "manifest.json").read_text()) for name in ("", "round2")]
    assert manifests[0]["members"]["self"]["judge_hash"] != manifests[1]["members"]["self"]["judge_hash"]
    candidates = [
        pq.read_table(finished / name / "label" / "candidates.parquet").to_pylist() for name in ("", "round2")
    ]
    assert candidates[0] != candidates[1]


def test_a_round_begins_with_the_policy_of_the_round_before(finished):
    logged = [json.loads((finished / name / "preference" / "metrics.jsonl").read_text().splitlines()[0])
              for name in ("", "round2")]  # fmt: skip
    # The reference is the policy that the round began with.
    assert all(line["rewards/margins"] == pytest.approx(0, abs=1e-5) for line in logged)


def test_the_figures_are_by_round(finished, capsys):
    results = json.loads((finished / "rounds" / "results.json").read_text())
    found = series(results)
    assert set(found["ground_truth_good"]) == {0, 1, 2} and set(found["kl"]) == {1, 2}
    assert set(found["proxy_win_rate"]) == set(found["judge_agreement"]) == {1, 2}
    last = json.loads((finished / "round2" / "eval" / "results.json").read_text())
    assert results["ground_truth_good/preference"] == last["ground_truth_good/preference"]
    assert results["ground_truth_good/round2"] == last["ground_truth_good/preference"]
    assert last["entropy/sft"]["mean"] > 0
    assert rounds.main(["rounds", str(finished), f"--out={finished / 'figure.svg'}"]) == 0
    printed = capsys.readouterr().out
    assert "win rate over SFT, by who labels | 2 |" in printed and printed.strip() == table({"run": results})
    assert (finished / "figure.svg").read_text().startswith("<?xml")
    page = (finished / "report.html").read_text()
    assert "round 2 of 2" in page and "data:image/svg+xml" in page


def test_a_run_has_one_colour_in_all_charts():
    whole = {f"{name}/round1": {"mean": 0.5, "ci95": (0.4, 0.6), "n": 9} for name in ("win_rate", "proxy_win_rate")}
    alone = draw_rounds({"first": {}, "second": whole})
    beside = draw_rounds({"first": {"win_rate/round1": whole["win_rate/round1"]}, "second": whole})
    assert alone.count("#ff7f0e") > 0 == alone.count("#1f77b4")
    assert beside.count("#ff7f0e") >= alone.count("#ff7f0e") and beside.count("#1f77b4") > 0


def test_entropy_is_the_surprise_of_a_token(finished):
    samples = pq.read_table(finished / "eval" / "samples.parquet").to_pydict()
    results = json.loads((finished / "eval" / "results.json").read_text())
    expected = np.sum(samples["surprise/sft"]) / np.sum(samples["length/sft"])
    assert results["entropy/sft"]["mean"] == pytest.approx(expected)


def test_killed_in_the_second_round_it_goes_on_to_the_same(finished, judge, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    make, made = panel.make_judge, []

    def killed(*arguments):
        made.append(arguments[1].name)
        if len(made) == 2:
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(panel, "make_judge", killed)
    assert main(flags_of(judge, tmp_path / "run")) == 130
    assert main(flags_of(judge, tmp_path / "run")) == 0
    assert made[:3] == ["policy after sft", "policy after preference", "policy after preference"]
    for name in ("round2/preference/metrics.jsonl", "round2/eval/results.json", "rounds/results.json"):
        assert (finished / name).read_bytes() == (tmp_path / "run" / name).read_bytes(), name
    assert main(flags_of(judge, tmp_path / "run", "--replay=self/1", "--round=2")) == 0


@pytest.fixture
def copied(finished, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def test_rounds_are_compared_again_where_there_are_more_and_cannot_become_fewer(copied, judge, capfd):
    record = copied / "rounds" / "stage.json"
    stale = json.loads(record.read_text())
    stale["config"]["rounds"] = 1  # as if the second had been added since
    record.write_text(json.dumps(stale))
    results = (copied / "rounds" / "results.json").read_bytes()
    (copied / "rounds" / "results.json").unlink()
    assert main(flags_of(judge, copied)) == 0
    assert "rounds: nothing to do" not in capfd.readouterr().out
    assert (copied / "rounds" / "results.json").read_bytes() == results
    assert main(flags_of(judge, copied, "--config.rounds=1")) == 2
    assert "rounds can be raised in a folder, not lowered" in capfd.readouterr().err


def test_pairs_that_were_deleted_are_made_again(copied, judge):
    file = copied / "round2" / "label" / "candidates.parquet"
    before = file.read_bytes()
    file.unlink()
    assert main(flags_of(judge, copied)) == 0
    assert file.read_bytes() == before


def test_runs_of_one_name_have_columns_of_their_own(copied, finished, capsys):
    assert rounds.main(["rounds", str(finished), str(copied)]) == 0
    assert f"| {finished} | {copied} |" in capsys.readouterr().out
    assert rounds.main(["rounds", str(copied), f"--out={copied / 'figure.png'}"]) == 2
    assert "must end in .svg" in capsys.readouterr().err


def test_one_judge_is_no_proxy_beside_itself(copied):
    run = runs.reopen_run(epath.Path(copied), one_device_mesh())
    run_rounds(dataclasses.replace(run, config=override(run.config, {"panel.judges": {}})))
    found = series(json.loads((copied / "rounds" / "results.json").read_text()))
    assert "win_rate" in found and not {"proxy_win_rate", "judge_agreement"} & set(found)


def test_labels_of_any_round_are_exported_audited_and_judged_by_workers(finished, judge, tmp_path, capfd, monkeypatch):
    flags = [f"--workdir={finished}", f"--out={tmp_path / 'set'}"]
    assert export.main(["export", *flags, "--stage=round2/label"]) == 0
    exported = pq.read_table(tmp_path / "set" / "data" / "train.parquet")
    assert set(exported["judge"].to_pylist()) <= {"panel: self"}
    second = pq.read_table(finished / "round2" / "label" / "preferences.parquet")
    assert set(exported["hash_forward"].to_pylist()) <= set(second["hash_forward"].to_pylist())
    assert export.main(["export", *flags, "--stage=round3/label"]) == 2
    assert "run --stages=round3/label first" in capfd.readouterr().err
    audited = [f"--workdir={finished}", f"--out={tmp_path}", "--resamples=20"]
    assert audit.main(["audit", *audited]) == 0 == audit.main(["audit", *audited, "--round=2"])
    assert capfd.readouterr().out.count("round 1 of 2 that have labels; --round=K audits another") == 1
    assert "round2/label/preferences.parquet" in (tmp_path / "preferences.audit.html").read_text()
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    assert main(flags_of(judge, finished, "--stages=round2/label", "--worker=0/2")) == 0
    assert "round2/label: nothing to do" in capfd.readouterr().out
    assert main(flags_of(judge, finished, "--stages=round2/eval", "--worker=0/2")) == 2
    assert "--worker is for one stage alone: --stages=label or round2/label" in capfd.readouterr().err


def test_a_round_that_there_is_not_is_named(finished, judge, capfd):
    assert main(flags_of(judge, finished, "--replay=self/0", "--round=3")) == 2
    assert "--round=3: the config has 2 rounds" in capfd.readouterr().err


def test_the_last_table_says_of_which_round_it_is(finished, capsys):
    config = parse(nested(json.loads((finished / "config.json").read_text())["config"]))
    print_summary(runs.Run(config, epath.Path(finished), one_device(), round=2))
    assert "run, round 2 of 2: mean" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["rl.gold.judge_weights=policy", "rl.gold.judge=1"], "config.rl.gold.judge_weights='policy': gold must not"),
        (
            ["stages=('sft','preference','eval')", "preference.online=True"],
            "live policy has new pairs",
        ),
        (["stages=('sft','rl','eval')"], "which needs the stage label in config.stages"),
        (["policy.model.max_position_embeddings=256"], "raise config.policy.model.max_position_embeddings"),
    ],
)
def test_what_does_not_go_with_rounds_is_said_with_its_reason(judge, tmp_path, capfd, options, words):
    assert main(flags_of(judge, tmp_path, *(f"--config.{option}" for option in options))) == 2
    assert words in capfd.readouterr().err


def test_what_evaluates_is_not_the_policy(judge, tmp_path, capfd):
    assert main(flags_of(judge, tmp_path, "--config.judge.weights=policy")) == 2
    assert "what evaluates must not change with the policy" in capfd.readouterr().err
    assert main(flags_of(judge, tmp_path, "--config.policy.model.max_position_embeddings=256")) == 2
    assert "config.panel.judges.self.max_length" in capfd.readouterr().err
    assert main(flags_of(judge, tmp_path, "--config.stages=('sft','label','preference')")) == 2
    assert "config.rounds=2 needs the stage eval" in capfd.readouterr().err
    assert rounds.main(["rounds", str(epath.Path(tmp_path) / "none")]) == 2


def test_the_hash_of_parameters_is_of_names_and_values():
    params = {"a": np.arange(3.0), "b": np.zeros(2)}
    assert parameters_hash(params) == parameters_hash({"b": np.zeros(2), "a": np.arange(3.0)})
    assert parameters_hash(params) != parameters_hash({"a": np.zeros(2), "b": np.arange(3.0)})
    assert parameters_hash(params) != parameters_hash(params | {"b": np.array([0.0, 1.0])})
