"""The stages that train a policy without policy gradients, as whole runs with a tiny judge."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.judge import score
from rlaif_jax.main import main
from rlaif_jax.stages import best_of_n, preference
from rlaif_jax.stages import run as runs
from tests.helpers import one_device, one_device_mesh, quickstart_config, random_sequences
from tests.tiny_judge import tiny_run_flags, write_judge

STEPS = {
    "preference.steps": 6,
    "preference.batch_size": 8,
    "preference.checkpoint_every": 2,
    "best_of_n.steps": 4,
    "best_of_n.prompts": 24,
    "best_of_n.samples": 3,
    "best_of_n.commit_every": 16,
    "best_of_n.checkpoint_every": 2,
}
ONLINE = ("--config.stages=('sft','preference','eval')", "--config.preference.online=True")
OFFLINE = ("--config.stages=('sft','label','preference','eval')",)
BEST = (
    "--config.stages=('sft','best_of_n','eval')",
    "--config.rl.rewards.reward_model=0.0",
    "--config.rl.rewards.verifier=1.0",
)


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def labelled(judge, tmp_path_factory):
    """Folders of SFT and of labels, which all of these runs begin with."""
    folder = tmp_path_factory.mktemp("labelled")
    assert main(["main", *flags_of(judge, folder, *OFFLINE), "--stages=sft,label"]) == 0
    return folder


def flags_of(judge, workdir, *options):
    steps = [f"--config.{name}={value}" for name, value in STEPS.items()]
    return [*tiny_run_flags(judge, workdir), *steps, *options]


def begun(judge, labelled, workdir, *options):
    """Arguments of a run that finds SFT and labels done."""
    if not workdir.exists():
        shutil.copytree(labelled / "sft", workdir / "sft")
        shutil.copytree(labelled / "label", workdir / "label")
    return ["main", *flags_of(judge, workdir, *options)]


def lines(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


SLOW = [pytest.param(loss, marks=pytest.mark.slow) for loss in ("ipo", "slic")]


@pytest.mark.parametrize("loss", ["dpo", *SLOW])
def test_a_policy_learns_from_labels_without_a_reward_model(judge, labelled, tmp_path, loss):
    options = (*OFFLINE, f"--config.preference.loss={loss}", "--stages=preference", "--config.preferences.hard=True")
    options += ("--config.preference.optimizer.learning_rate=0.0005",)
    assert main(begun(judge, labelled, tmp_path / "run", *options)) == 0
    first, *_, last = lines(tmp_path / "run", "preference")
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-5)  # the policy is the reference
    assert last["loss"] < first["loss"] and last["rewards/margins"] > 0
    stored = pq.read_table(tmp_path / "run" / "preference" / "reference.parquet")
    assert stored.num_rows == pq.read_table(tmp_path / "run" / "label" / "preferences.parquet").num_rows


def test_online_pairs_are_judged_at_once_and_a_kill_changes_nothing(judge, labelled, tmp_path, monkeypatch):
    # Eight threads of a CPU add up in any order.
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    assert main(begun(judge, labelled, tmp_path / "whole", *ONLINE)) == 0
    judge_live, calls, waited = preference.judge_live, [], set()

    def killed(*arguments):
        calls.append(len(arguments[1]))
        waited.update(x.sharding.memory_kind for x in jax.tree.leaves(arguments[0].scorer.params))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return judge_live(*arguments)

    monkeypatch.setattr(preference, "judge_live", killed)
    options = (*ONLINE, "--stages=preference", "--config.mesh.offload=('reference','judge')")
    assert main(begun(judge, labelled, tmp_path / "killed", *options)) == 130
    assert main(begun(judge, labelled, tmp_path / "killed", *options)) == 0
    assert lines(tmp_path / "whole", "preference") == lines(tmp_path / "killed", "preference")
    assert set(calls) == {8} and waited == {"pinned_host"}
    results = json.loads((tmp_path / "whole" / "eval" / "results.json").read_text())
    assert {"win_rate/preference_vs_sft", "ground_truth_good/preference", "kl/preference_vs_sft"} <= set(results)
    assert results["judge_is_training_judge"] is True
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Online DPO replies" in page and "RL replies" not in page


def test_a_pair_without_a_judgement_counts_for_nothing(judge, labelled, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    judge_live, asked = score.judge_live, []

    def lost(*arguments):
        found = judge_live(*arguments)
        asked.append((arguments[1][0].principle, found[0].hash_forward, found[0].hash_reversed))
        return [*found[:1], *(dataclasses.replace(each, status="not_finite", verdict=None) for each in found[1:])]

    monkeypatch.setattr(preference, "judge_live", lost)
    options, allowed = (*ONLINE, "--stages=preference"), ("--config.preference.max_unscored_rate=0.9",)
    allowed += ("--config.constitution.file=assistant", "--config.label.principles=draw")
    allowed += ("--config.judge.prompt.template=everyday_principles",)
    assert main(begun(judge, labelled, tmp_path / "run", *options, *allowed, "--config.preference.steps=1")) == 0
    sample = json.loads((tmp_path / "run" / "preference" / "samples.jsonl").read_text())
    assert asked == [(sample["principle"], sample["hash_forward"], sample["hash_reversed"])] and None not in asked[0]
    (line,) = lines(tmp_path / "run", "preference")
    assert line["unscored"] == 7 / 8 and line["loss"] == pytest.approx(np.log(2), rel=1e-4)
    assert main(begun(judge, labelled, tmp_path / "stopped", *options)) == 2
    assert "could not score 87.5% of the pairs" in capfd.readouterr().err


@pytest.mark.slow
def test_the_best_of_n_is_what_the_policy_is_tuned_on(judge, labelled, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    assert main(begun(judge, labelled, tmp_path / "whole", *BEST)) == 0
    chosen = pq.read_table(tmp_path / "whole" / "best_of_n" / "chosen.parquet").to_pylist()
    assert len(chosen) == 24 and all(row["reward"] >= row["mean_reward"] for row in chosen)
    assert any(row["reward"] > row["mean_reward"] for row in chosen)
    assert "win_rate/best_of_n_vs_sft" in json.loads((tmp_path / "whole" / "eval" / "results.json").read_text())
    scored = best_of_n.score_replies

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(best_of_n, "score_replies", killed)
    assert main(begun(judge, labelled, tmp_path / "killed", *BEST, "--stages=best_of_n")) == 130
    monkeypatch.setattr(best_of_n, "score_replies", scored)
    assert main(begun(judge, labelled, tmp_path / "killed", *BEST, "--stages=best_of_n")) == 0
    assert lines(tmp_path / "whole", "best_of_n") == lines(tmp_path / "killed", "best_of_n")


def test_replies_of_another_config_are_never_taken_for_those_of_this_one(judge, labelled, tmp_path, monkeypatch, capfd):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(best_of_n, "score_replies", killed)
    assert main(begun(judge, labelled, tmp_path / "run", *BEST, "--stages=best_of_n")) == 130
    other = ("--config.best_of_n.sampling.temperature=0.5", "--stages=best_of_n")
    assert main(begun(judge, labelled, tmp_path / "run", *BEST, *other)) == 2
    assert "best_of_n.sampling.temperature=0.5 (was 1.0)" in capfd.readouterr().err


def test_prompts_at_which_no_reply_is_the_best_are_counted_and_said(tmp_path, monkeypatch, capfd):
    changes = {"best_of_n.prompts": 3, "best_of_n.samples": 2, "rl.rewards.max_unscored_rate": 0.5}
    config = override(quickstart_config(), changes | {"rl.rewards.reward_model": 0.0, "rl.rewards.verifier": 1.0})
    run = runs.Run(config, epath.Path(tmp_path), one_device())
    for name, value in {"data": {"prompt": ["a", "b", "c"]}, "start_params": None, "tokenizer": None}.items():
        monkeypatch.setattr(runs.Run, name, lambda *_, value=value: value)
    made = {
        "keep_replies": SimpleNamespace(texts=list("uvwxyz"), sequences=random_sequences(0, 6)),
        "score_replies": np.array([1.0, 1.0, np.nan, 2.0, 0.0, 1.0]),
        **dict.fromkeys(("load_rewards", "tune", "packed")),
        "prompt_tokens": [[1]] * 3,
    }
    for name, value in made.items():
        monkeypatch.setattr(best_of_n, name, lambda *_, value=value: value)
    best_of_n.run_best_of_n(run)
    assert pq.read_table(tmp_path / "best_of_n" / "chosen.parquet")["tied"].to_pylist() == [True, True, False]
    found = json.loads((tmp_path / "best_of_n" / "results.json").read_text())["tied_prompts/best_of_n"]
    assert (found["mean"], found["n"]) == (2 / 3, 3)
    assert capfd.readouterr().out.count("at 2 of 3 prompts all replies have the same reward") == 1


@pytest.mark.slow
def test_replies_without_a_score_are_never_chosen(judge, labelled, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(best_of_n, "score_replies", lambda run, rewards, reward_model, replies, prompts: np.where(
        np.arange(len(prompts)) % 3 == 0, np.nan, -(np.arange(len(prompts)) % 3.0)))  # fmt: skip
    options = (*BEST, "--config.best_of_n.steps=1", "--stages=best_of_n")
    assert main(begun(judge, labelled, tmp_path / "run", *options)) == 2
    assert "33.3% of the replies have no score" in capfd.readouterr().err
    assert main(begun(judge, labelled, tmp_path / "run", *options, "--config.rl.rewards.max_unscored_rate=0.5")) == 0
    chosen = pq.read_table(tmp_path / "run" / "best_of_n" / "chosen.parquet").to_pydict()
    assert set(chosen["reward"]) == {-1.0} and set(chosen["mean_reward"]) == {-1.5}


REWARDED = [option.removeprefix("--") for option in BEST[1:]]
BAD = {
    "labels for nobody": (["config.stages=('sft','label','preference','eval')", "config.preference.online=True"], (
        ["makes its own labels", "leave label out"])),
    "same samples": ([BEST[0][2:], *REWARDED, "config.best_of_n.sampling.temperature=0.0"], (
        ["all samples are the same"])),
    "few": (["config.reward_model.train_pairs=4"], ["train_pairs=4", "at least reward_model.batch_size, 8"]),
    "no labels": (["config.stages=('sft','preference','eval')"], ["preference needs label", "preference.online=True"]),
    "two policies": (["config.stages=('sft','label','preference','rl','eval')"], ["only one of preference, rl"]),
    "no policy": (["config.stages=('sft','label','eval')"], ["eval needs one of"]),
    "loss": (["config.preference.loss=kto"], ["preference.loss='kto'", "dpo, ipo, slic"]),
    "beta": (["config.preference.beta=0.0"], ["preference.beta=0.0", "positive"]),
    "smoothing": (["config.preferences.smoothing=0.5"], ["preferences.smoothing=0.5"]),
    "flaw of less": (["config.reward_model.flaw_pattern=x", "config.reward_model.flawed_members=-1"], (
        ["flawed_members=-1", "0 or more"])),
    "flaw of none": (["config.reward_model.flaw_pattern=x"], ["flaw_pattern and flawed_members are set together"]),
    "flaw of more": (["config.reward_model.flaw_pattern=x", "config.reward_model.flawed_members=2"], (
        ["flawed_members=2 is more than its members, 1"])),
    "flaw": (["config.reward_model.flaw_pattern=(", "config.reward_model.flawed_members=1"], ["malformed"]),
    "one member": (["config.reward_model.combine=min"], ["combine=min needs reward_model.members of 2"]),
    "one": (["config.best_of_n.samples=1"], ["best_of_n.samples=1", "2 or more"]),
    "too large": (["config.stages=('sft','label','preference','eval')", "config.preference.batch_size=800"], (
        ["preference.batch_size=800", "at most label.pairs, 16"])),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_trained_is_one_clear_line(judge, labelled, tmp_path, capfd, case):
    options, words = BAD[case]
    assert main(begun(judge, labelled, tmp_path / "run", *(f"--{option}" for option in options))) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert len(error) == 1 and all(word in error[0] for word in words), error


MEMBERS = ("--config.stages=('sft','label','reward_model','rl','eval')", "--config.reward_model.members=3")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["min", "weights"])
def test_reward_models_side_by_side_are_one_reward(judge, labelled, tmp_path, how):
    options = (*MEMBERS, f"--config.reward_model.combine={how}", "--config.reward_model.train_pairs=8")
    options += ("--config.reward_model.centring=0.01", "--config.reward_model.margin=0.1")
    if how == "weights":  # of rewards that are not set to 0, though they are of a random judge
        options += ("--config.reward_model.calibrate=False",)
    stages = ("--config.rl.steps=2", "--stages=reward_model,rl")
    assert main(begun(judge, labelled, tmp_path / "run", *options, *stages)) == 0
    folder = tmp_path / "run" / "reward_model"
    assert len(json.loads((folder / "normalisation.json").read_text())["member_means"]) == (
        1 if how == "weights" else 3
    )
    results = json.loads((folder / "results.json").read_text())
    assert results["reward_model_accuracy/held_out"]["n"] == 4
    assert ("reward_model_disagreement" in results) == (how == "min")
    assert all(np.isfinite(line["reward/mean"]) for line in lines(tmp_path / "run", "rl"))
