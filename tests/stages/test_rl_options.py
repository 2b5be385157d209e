"""Whole RL stages with a tiny judge: what the options of `config.rl` do, and that a kill changes nothing of it."""

import json
import shutil

import numpy as np
import pytest

from configs import parts, quickstart
from rlaif_jax import check
from rlaif_jax.main import main
from rlaif_jax.stages import rl
from rlaif_jax.stages import run as runs
from tests.helpers import one_device_mesh
from tests.tiny_judge import tiny_run_flags, write_judge

DIRECT = (
    "--config.stages=('sft','rl','eval')",
    "--config.rl.value_init=sft",
    "--config.rl.rewards.reward_model=0.0",
)
VERIFIED = "--config.rl.rewards.verifier=1.0"
# Everything at once that an iteration hands to the next, and a part of the reward that needs the texts.
OPTIONS = (
    "--config.rl.rollout_lag=1",
    "--config.rl.importance_cap=2.0",
    "--config.rl.kl.target=0.5",
    "--config.rl.kl.horizon=64.0",
    "--config.rl.rewards.length=0.01",
    "--config.rl.rewards.length_limit=8",
    "--config.rl.rewards.normalise=running",
    "--config.rl.ptx_coef=0.5",
)


def verifier(prompts, responses):
    """Most responses have a score."""
    return [None if len(response) % 7 == 0 else len(response) / 100 for response in responses]


def nothing(prompts, responses):
    return [None for _ in responses]


def failing(prompts, responses):
    yield 1 / 0


def words(prompts, responses):
    return ["good" for _ in responses]


def one(prompts, responses):
    return 1.0


def huge(prompts, responses):
    return [10**400 for _ in responses]


def few(prompts, responses):
    return [1.0]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def sft(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    assert main(["main", *tiny_run_flags(judge, folder), *DIRECT, VERIFIED, "--stages=sft"]) == 0
    return folder / "sft"


def flags(judge, sft, workdir, *options):
    if not workdir.exists():
        shutil.copytree(sft, workdir / "sft")
    return ["main", *tiny_run_flags(judge, workdir), *DIRECT, VERIFIED, *options]


def metrics(workdir):
    return [json.loads(line) for line in (workdir / "rl" / "metrics.jsonl").read_text().splitlines()]


def kill_at_the_fourth_rollout(monkeypatch):
    make_rollout, steps = rl.make_rollout, []

    def killed(*arguments, **settings):
        steps.append(0)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return make_rollout(*arguments, **settings)

    monkeypatch.setattr(rl, "make_rollout", killed)


def test_what_an_iteration_hands_to_the_next_survives_a_kill(judge, sft, tmp_path, monkeypatch):
    # Eight threads of a CPU add up in any order.
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    options = (*OPTIONS, f"--config.rl.rewards.verifier_function={__name__}:verifier", "--stages=rl")
    options += ("--config.rl.rewards.max_unscored_rate=0.9",)
    assert main(flags(judge, sft, tmp_path / "whole", *options)) == 0
    kill_at_the_fourth_rollout(monkeypatch)
    assert main(flags(judge, sft, tmp_path / "killed", *options)) == 130
    assert main(flags(judge, sft, tmp_path / "killed", *options)) == 0
    lines = metrics(tmp_path / "whole")
    assert lines == metrics(tmp_path / "killed")
    assert len({line["kl/coef"] for line in lines}) > 2  # the coefficient moves, and is not reset by the kill
    assert {line["reward/unscored"] > 0 for line in lines} == {False, True}
    assert all({"reward/verifier", "reward/length", "ptx_loss", "importance/mean"} <= set(line) for line in lines)
    assert lines[0]["sampler_mismatch/max"] < 1e-4 < lines[2]["sampler_mismatch/max"]  # from then on rollouts lag


def test_direct_rlaif_needs_neither_labels_nor_a_reward_model(judge, sft, tmp_path):
    options = ("--config.rl.rewards.verifier=0.0", "--config.rl.rewards.judge=1.0", "--config.rl.steps=2")
    assert main(flags(judge, sft, tmp_path / "run", *options)) == 0
    assert not (tmp_path / "run" / "label").exists() and not (tmp_path / "run" / "reward_model").exists()
    lines = metrics(tmp_path / "run")
    assert all(-1 <= line["reward/judge"] <= 1 for line in lines)
    for line in lines:
        assert line["reward/judge"] == pytest.approx(line["reward/mean"], abs=1e-6)
    results = json.loads((tmp_path / "run" / "eval" / "results.json").read_text())
    assert results["judge_is_training_judge"] is True and "reward/rl" not in results
    assert "Reward model" not in (tmp_path / "run" / "report.html").read_text().split("<h2")[1]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["reinforce", "rloo", "grpo"])
def test_every_algorithm_runs_as_a_stage(judge, sft, tmp_path, algorithm):
    config = quickstart.get_config()
    parts.rl_losses(config, algorithm)
    names = ("advantage", "loss", "aggregation", "epochs", "minibatches", "gae_lambda", "clip_value")
    arm = [f"--config.rl.{name}={config.rl[name]}" for name in names]
    arm += [f"--config.rl.kl.{name}={config.rl.kl[name]}" for name in ("placement", "estimator", "interpolate")]
    arm += ["--config.rl.group_size=2", "--config.rl.rewards.verifier_function=ground_truth", "--stages=rl"]
    assert main(flags(judge, sft, tmp_path / "run", *arm)) == 0
    assert all(np.isfinite(line["loss"]) and ("value/loss" in line) == (algorithm == "reinforce")
               for line in metrics(tmp_path / "run"))  # fmt: skip


def test_policies_on_the_way_of_rl_survive_a_kill_and_are_evaluated(judge, sft, tmp_path, monkeypatch, capfd):
    run, keep = tmp_path / "run", ("--config.rl.steps=4", "--config.rl.keep_every=1")
    kill_at_the_fourth_rollout(monkeypatch)
    assert main(flags(judge, sft, run, *keep)) == 130
    assert main(flags(judge, sft, run, *keep, "--stages=rl")) == 0
    kept = run / "rl" / "checkpoints" / "1"
    moved = kept.rename(tmp_path / "1")
    capfd.readouterr()
    assert main(flags(judge, sft, run, *keep)) == 2
    (error,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert all(words in error for words in ("no checkpoint", "checkpoints/1", f"Delete {run}/rl,"))
    assert not list(run.glob("eval/*.parquet")) and not list(run.glob("eval/replies_*"))  # before any work
    moved.rename(kept)
    assert main(flags(judge, sft, run, *keep)) == 0
    assert "RL, iteration" not in capfd.readouterr().out  # the summary is of the main policies
    results = json.loads((run / "eval" / "results.json").read_text())
    for name in ("rl@1", "rl@2", "rl@3"):
        assert {f"ground_truth_good/{name}", f"entropy/{name}", f"kl/{name}_vs_sft"} <= set(results)
        assert f"win_rate/{name}_vs_sft" not in results
    assert len({results[f"kl/{name}_vs_sft"]["mean"] for name in ("rl@1", "rl@2", "rl@3", "rl")}) == 4
    assert main(flags(judge, sft, run, "--config.rl.steps=4", "--stages=rl")) == 2  # which would have kept others
    error = capfd.readouterr().err
    assert "stage rl" in error and "rl.keep_every=0 (was 1)" in error


BAD = {
    "no gradient": (["kl.placement=loss"], ["k1 is zero", "use k2, k3 or full"]),
    "not a KL": (["kl.estimator=k3"], ["reward must be the log-ratio"]),
    "adapted through 1": (["kl.target=1.0", "kl.interpolate=True"], ["interpolate=True", "turn the score"]),
    "adapted too fast": (["kl.target=1.0", "kl.horizon=8.0"], ["rl.kl.horizon=8.0", "at least rl.batch_size, 16"]),
    "nothing to adapt": (["kl.target=1.0", "kl.coef=0.0"], ["rl.kl.coef=0.0", "above 0"]),
    "alone": (["advantage=group"], ["group_size", "compare"]),
    "reused": (["loss=reinforce"], ["rl.loss=reinforce", "epochs=1"]),
    "nothing to learn": (["rewards.verifier=0.0"], ["no part with a weight"]),
    "no such function": (["rewards.verifier_function=json:nowhere"], ["verifier_function='json:nowhere'", "nowhere"]),
    "no function": (["rewards.verifier_function=nowhere"], ["must be ground_truth or module:function"]),
    "no module": (["rewards.verifier_function=nowhere:score"], ["No module named 'nowhere'", "PYTHONPATH"]),
    "not a function": (["rewards.verifier_function=json:__doc__"], ["has no function __doc__"]),
    "verifier fails": ([f"rewards.verifier_function={__name__}:failing"], ["failing", "ZeroDivisionError", ".py:"]),
    "words": ([f"rewards.verifier_function={__name__}:words"], ["returned 'good' for response 0"]),
    "one number": ([f"rewards.verifier_function={__name__}:one"], ["one", "TypeError"]),
    "too large": ([f"rewards.verifier_function={__name__}:huge"], ["returned 1000", "for response 0"]),
    "too few": ([f"rewards.verifier_function={__name__}:few"], ["returned 1 numbers for 16"]),
    "any format": (["rewards.format=1.0"], ["needs rl.rewards.format_pattern"]),
    "any length": (["rewards.length=1.0", "rewards.length_limit=99"], ["length_limit=99", "at most"]),
    "value network of nothing": (["value_init=reward_model"], ["rl.value_init=sft"]),
    "demonstrations": (["ptx_coef=1.0", "ptx_rows=4000"], ["rl.ptx_rows x epochs x minibatches"]),
    "prompts": (["batch_size=80000"], ["rl.batch_size / group_size", "80000"]),
    "dual clip": (["dual_clip=0.5"], ["rl.dual_clip=0.5", "above 1"]),
    "ratio below 0": (["clip_low=1.5"], ["rl.clip_low=1.5"]),
    "pairwise rating": (["rewards.judge=1.0", "rewards.judge_prompt.method=pairwise"], ["method=rating"]),
    "pattern": (["rewards.format=1.0", "rewards.format_pattern=("], ["format_pattern='('", "malformed"]),
    "no reward model": (["rewards.reward_model=1.0"], ["needs the stage reward_model"]),
    "unscored": ([f"rewards.verifier_function={__name__}:nothing"], ["100.0% of the responses have no score"]),
    "unscored by rule": (["rewards.max_unscored_rate=2.0"], ["max_unscored_rate=2.0", "from 0 to below 1"]),
    "uneven groups": (["group_size=3"], ["rl.batch_size=16", "rl.group_size x devices"]),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_trained_is_one_clear_line(judge, sft, tmp_path, capfd, case):
    options, words = BAD[case]
    options = [f"--config.rl.{option}" for option in options]
    assert main(flags(judge, sft, tmp_path / "run", *options, "--stages=rl")) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert len(error) == 1 and all(word in error[0] for word in words), error


def test_a_stage_without_the_one_that_it_reads_is_refused(judge, tmp_path, capfd):
    assert main(["main", *tiny_run_flags(judge, tmp_path), "--config.stages=('sft','reward_model')"]) == 2
    assert "reward_model needs label" in capfd.readouterr().err


def test_only_embedded_data_has_a_ground_truth(judge, sft, tmp_path, capfd):
    options = ("--config.rl.rewards.verifier_function=ground_truth", "--config.data.evaluation_prompts.kind=jsonl")
    assert main(flags(judge, sft, tmp_path / "run", *options, "--stages=rl")) == 2
    assert "only embedded data has a ground truth" in capfd.readouterr().err


def test_a_verifier_is_found_before_any_stage_begins(judge, tmp_path, capfd):
    options = ("--config.rl.rewards.verifier_function=nowhere:score",)
    assert main(["main", *tiny_run_flags(judge, tmp_path / "run"), *DIRECT, VERIFIED, *options]) == 2
    assert "nowhere" in capfd.readouterr().err and not (tmp_path / "run" / "sft").exists()


def test_alarms_are_said_once(judge, sft, tmp_path, capfd):
    options = ("--config.rl.alarms.length_below=1000.0", "--config.rl.steps=2", "--stages=rl")
    assert main(flags(judge, sft, tmp_path / "run", *options)) == 0
    assert capfd.readouterr().err.count("alarm at rl step 0: response_length") == 1


def test_the_check_command_passes_on_eight_devices_and_sees_a_sampler_that_differs(capfd, monkeypatch):
    small = [f"--config.policy.model.{name}={value}" for name, value in (
        ("hidden_size", 32), ("intermediate_size", 64), ("vocab_size", 128), ("num_hidden_layers", 1))]  # fmt: skip
    arguments = ["check", *small, "--config.rl.batch_size=64", "--config.mesh.tensor=2"]
    arguments += ["--config.mesh.replicated=('heads','kv_heads')"]
    assert check.main(arguments) == 0
    printed = capfd.readouterr().out
    assert "8 device(s)" in printed and "FAILS" not in printed and "sharding" in printed
    logprobs = check._logprobs
    monkeypatch.setattr(check, "_logprobs", lambda *arguments: logprobs(*arguments) + 0.01)
    assert check.main(arguments) == 1
    assert capfd.readouterr().out.count("FAILS") == 1
