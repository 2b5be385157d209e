"""The stage of over-optimisation with a tiny judge, and the gold reward that RL logs for it."""

import json
import shutil

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.overoptimisation import best_of_n
from rlaif_jax.main import main
from rlaif_jax.reporting.overoptimisation_page import render_overoptimisation
from rlaif_jax.stages import overoptimisation, replies, rewards, values
from rlaif_jax.stages import run as runs
from rlaif_jax.stages.reward_model import load_reward_model, score_texts
from rlaif_jax.stages.rewards import load_gold, load_rewards
from rlaif_jax.stages.run import Run, reopen_run
from tests.helpers import one_device, one_device_mesh, quickstart_config
from tests.tiny_judge import tiny_run_flags, write_judge

RNG = np.random.default_rng(0)
SAMPLES, PROMPTS = 16, 5
STAGES = "--config.stages=('sft','rl','overoptimisation')"
FLAGS = (
    "--config.rl.advantage=leave_one_out",  # no value network to compile
    "--config.rl.group_size=2",
    "--config.rl.loss=reinforce",
    "--config.rl.epochs=1",
    "--config.rl.minibatches=1",
    "--config.rl.rewards.reward_model=0.0",
    "--config.rl.rewards.verifier=2.0",
    f"--config.rl.rewards.verifier_function={__name__}:length",
    "--config.rl.gold.verifier=1.0",
    f"--config.rl.gold.verifier_function={__name__}:words",
    f"--config.overoptimisation.samples={SAMPLES}",
    f"--config.overoptimisation.prompts={PROMPTS}",
    "--config.overoptimisation.commit_every=8",
    "--config.overoptimisation.batch_size=8",
    "--config.overoptimisation.bootstrap_samples=100",
)


def length(prompts, responses):
    return [len(response) / 10 for response in responses]


def words(prompts, responses):
    return [len(response.split()) for response in responses]


def rarely(prompts, responses):
    return [None if len(response) % 7 == 0 else float(len(response)) for response in responses]


def nothing(prompts, responses):
    return [None for _ in responses]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def finished(judge, tmp_path_factory):
    """A run on one device, with all stages."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
        assert main(["main", *tiny_run_flags(judge, folder), *FLAGS, STAGES]) == 0
    return folder


@pytest.fixture
def small_mesh(monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())


def again(judge, finished, workdir, *stages):
    """Flags of a copy of the run without some of its stages."""
    shutil.copytree(finished, workdir)
    for stage in stages:
        shutil.rmtree(workdir / stage)
    return ["main", *tiny_run_flags(judge, workdir), *FLAGS]


def lines(workdir):
    return [json.loads(line) for line in (workdir / "rl" / "metrics.jsonl").read_text().splitlines()]


def results(workdir):
    return json.loads((workdir / "overoptimisation" / "results.json").read_text())


def test_best_of_n_is_of_the_samples_and_rises_by_its_proxy(finished):
    samples = pq.read_table(finished / "overoptimisation" / "samples.parquet").to_pydict()
    assert len(samples["prompt"]) == SAMPLES * PROMPTS and len(set(samples["prompt"][:SAMPLES])) == 1
    np.testing.assert_allclose(samples["proxy"], [2 * len(text) / 10 for text in samples["response"]], rtol=1e-6)
    assert samples["gold"] == [len(text.split()) for text in samples["response"]]
    found, proxy, gold = (
        results(finished),
        *(np.reshape(samples[name], (PROMPTS, SAMPLES)) for name in ("proxy", "gold")),
    )
    for n in (2, 4, 8, 16):
        gains = best_of_n(proxy, gold, n) - gold.mean(axis=1)
        assert found[f"best_of_n/gold/{n}"]["mean"] == pytest.approx(gains.mean())
    assert 0 < found["best_of_n/proxy/2"]["mean"] < found["best_of_n/proxy/16"]["mean"]
    assert found["best_of_n/proxy/16"]["n"] == PROMPTS and found["best_of_n/proxy/alpha"]["mean"] > 0
    assert "best_of_n/gold/32" not in found


def test_rl_logs_the_gold_reward_of_the_responses_that_it_trains_on(finished):
    gold = lines(finished)
    assert all(line["gold/unscored"] == 0 and line["gold/std"] > 0 for line in gold)
    for sample in map(json.loads, (finished / "rl" / "samples.jsonl").read_text().splitlines()):
        assert sample["reward"] == pytest.approx(2 * len(sample["response"]) / 10, rel=1e-5)  # gold has no part in it
    found = results(finished)
    assert found["rl/iterations"] == len(gold) == 6
    assert found["rl/gold/alpha"]["n"] == 6 and (found["rl/early_stop"] is None) == bool(found["rl/early_stop_reason"])


def test_the_page_stands_alone(finished):
    page = (finished / "overoptimisation" / "curve.html").read_text()
    assert page.isascii() and page.count("<svg") == 2 and "default-src 'none'" in page
    assert "http" not in page.replace("http-equiv", "") and "{{" not in page


@pytest.mark.slow
def test_gold_changes_nothing_of_the_training(judge, finished, tmp_path, small_mesh):
    flags = again(judge, finished, tmp_path / "run", "rl", "overoptimisation")
    assert main([*flags, "--config.rl.gold.verifier=0.0", "--config.stages=('sft','rl')"]) == 0
    with_gold = [{k: v for k, v in line.items() if not k.startswith("gold/")} for line in lines(finished)]
    assert lines(tmp_path / "run") == with_gold


@pytest.mark.slow
@pytest.mark.parametrize("where", ["samples", "scores"])
def test_a_killed_stage_ends_as_an_undisturbed_one(judge, finished, tmp_path, monkeypatch, small_mesh, where):
    flags, calls = again(judge, finished, tmp_path / "run", "overoptimisation"), []
    module = replies if where == "samples" else values
    write = module.write_checked_parquet

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checked_parquet", killed)
        assert main([*flags, STAGES]) == 130
    kept = tmp_path / "run" / "overoptimisation" / ("replies_start" if where == "samples" else "scores")
    assert len(list(kept.iterdir())) == 3
    written = []
    monkeypatch.setattr(module, "write_checked_parquet", lambda *arguments: written.append(0) or write(*arguments))
    assert main([*flags, STAGES]) == 0
    assert 0 < len(written) <= SAMPLES * PROMPTS // 8 - 2  # a prompt's replies are sampled together, so one group again
    assert not kept.exists() and results(tmp_path / "run") == results(finished)
    samples = (
        pq.read_table(folder / "overoptimisation" / "samples.parquet") for folder in (tmp_path / "run", finished)
    )
    assert next(samples).equals(next(samples))


def run_of(**changes):
    """A run of the quickstart, of which nothing is there."""
    fields = {"overoptimisation.samples": 8, "overoptimisation.bootstrap_samples": 50}
    config = override(quickstart_config(), fields | changes)
    return Run(config, epath.Path("nowhere"), one_device())


def samples_of(proxy, gold):
    return {"proxy": np.ravel(proxy).tolist(), "gold": np.ravel(gold).tolist()}


def test_prompts_with_unscored_replies_are_left_out_and_counted():
    proxy, gold = RNG.normal(size=(2, 6, 8))
    whole, _ = overoptimisation.best_of_n_figures(run_of(), samples_of(proxy[1:5], gold[1:5]))
    proxy[0, 3], gold[5, 2] = np.nan, np.nan
    found, _ = overoptimisation.best_of_n_figures(run_of(), samples_of(proxy, gold))
    assert (found["best_of_n/prompts"], found["best_of_n/prompts_unscored"]) == (4, 2)
    assert found | {"best_of_n/prompts_unscored": 0} == whole
    gold[2:] = np.nan
    with pytest.raises(UserError, match=r"1 of 6 prompts have a proxy and a gold reward for each of their 8 replies"):
        overoptimisation.best_of_n_figures(run_of(), samples_of(proxy, gold))


def test_iterations_without_gold_are_left_out_and_the_early_stop_names_the_iteration():
    distances = np.linspace(0, 4, 40)
    gold = 0.1 + distances * (0.5 - 0.4 * np.log(np.maximum(distances, 1e-9)))
    lines = [
        {"step": i, "kl/sequence": d**2, "reward/mean": d, "gold/mean": g}
        | {f"{name}/{part}": 0.0 for name in ("reward", "gold") for part in ("std", "unscored")}
        for i, (d, g) in enumerate(zip(distances, gold, strict=True))
    ]
    lines[0]["kl/sequence"] = -1e-3  # an estimate
    del lines[3]["gold/mean"]
    lines[5]["kl/sequence"] = None  # of a skipped update
    found, curve = overoptimisation.rl_figures(run_of(), lines)
    assert found["rl/iterations"] == 38 == len(curve["distances"]) and curve["distances"][0] == 0
    assert found["rl/gold/peak"]["mean"] == pytest.approx(np.exp(0.25), rel=1e-3)
    assert found["rl/early_stop"] == np.flatnonzero(distances > np.exp(0.25))[0]
    assert found["rl/proxy/alpha"]["mean"] == pytest.approx(1) and found["rl/proxy/peak"]["mean"] is None
    empty, curve = overoptimisation.rl_figures(run_of(), lines[3:4])
    assert empty["rl/iterations"] == 0 and "too few" in empty["rl/early_stop_reason"]
    best, best_curve = overoptimisation.best_of_n_figures(run_of(), samples_of(*RNG.normal(size=(2, 6, 8))))
    page = render_overoptimisation("run", best | empty, best_curve, curve)
    assert page.count("<svg") == 1 and "no iteration has all of KL" in page


def test_the_gold_of_another_judge_is_that_judges(judge, tmp_path):
    rewarded = {"judge.weights": judge, "rl.rewards.judge": 0.5}
    prompts, responses = ["How do I boil an egg?"] * 3, ["Ten minutes.", "Thank you for asking! Ten.", "No."]
    ratings = []
    for weights in ("", write_judge(tmp_path / "other.gguf", seed=1)):
        run = run_of(**rewarded, **{"rl.gold.judge": 0.5, "rl.gold.judge_weights": weights})
        proxy, _ = load_rewards(run)(prompts, responses, np.ones(3), [True] * 3)
        ratings.append((proxy, load_gold(run)(prompts, responses, [True] * 3)))
    np.testing.assert_allclose(*ratings[0], rtol=1e-5)
    assert np.all(np.abs(ratings[1][1] - ratings[1][0]) > 1e-5)


def test_gold_metrics_count_what_has_no_score():
    def gold(verifier):
        name = f"{__name__}:{verifier.__name__}"
        return load_gold(run_of(**{"rl.gold.verifier": 2.0, "rl.gold.verifier_function": name}))

    assert gold(rarely).metrics(["a"] * 4, ["z", "", "z" * 7, "z" * 3], [True] * 4) == {
        "gold/mean": 2 * 2.0, "gold/std": 2 * 1.0, "gold/unscored": 0.5}  # fmt: skip
    assert gold(nothing).metrics(["a"], ["x"], [True]) == {"gold/unscored": 1.0}
    assert not load_gold(run_of()).needed


BAD = {
    "no gold": (["rl.gold.verifier=0.0"], ["needs a gold reward", "rl.gold.verifier"]),
    "no such verifier": (["rl.gold.verifier_function=json:nowhere"], ["rl.gold.verifier_function='json:nowhere'"]),
    "pairwise": (["rl.gold.judge=1.0", "rl.gold.judge_prompt.method=pairwise"], ["rl.gold.judge", "method=rating"]),
    "no such weights": (["rl.gold.judge=1.0", "rl.gold.judge_weights=no.gguf"], ["rl.gold.judge_weights", "no.gguf"]),
    "too few samples": (["overoptimisation.samples=4"], ["best_of=(2, 4)", "three or more"]),
    "more than sampled": (["overoptimisation.best_of=(2,4,64)"], ["(2, 4, 64)", "samples, 16"]),
    "best of one": (["overoptimisation.best_of=(1,2,4)"], ["(1, 2, 4)", "from 2"]),
    "falling": (["overoptimisation.best_of=(8,4,2)"], ["(8, 4, 2)", "rising"]),
    "prompts": (["overoptimisation.prompts=-1"], ["overoptimisation.prompts=-1"]),
    "without rl": (["stages=('sft','overoptimisation')"], ["overoptimisation needs rl"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_measured_is_one_clear_line_before_any_work(judge, tmp_path, capfd, case):
    options, said = BAD[case]
    options = options if case == "without rl" else ["stages=('sft','rl','overoptimisation')", *options]
    flags = [*tiny_run_flags(judge, tmp_path / "run"), *FLAGS, *(f"--config.{option}" for option in options)]
    assert main(["main", *flags]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert len(error) == 1 and all(word in error[0] for word in said), error
    assert not (tmp_path / "run" / "sft").exists()


def test_the_gold_of_a_run_with_rounds_is_its_last_reward_model(tmp_path, monkeypatch):
    for name in ("reward_model", "round2/reward_model"):
        (tmp_path / "other" / name).mkdir(parents=True)
        (tmp_path / "other" / name / "normalisation.json").write_text("{}")
    assert rewards.normalisation_file(str(tmp_path / "other")).parent == tmp_path / "other" / "round2" / "reward_model"
    gold = {"rl.gold.reward_model": 1.0, "rl.gold.reward_model_run": str(tmp_path / "other")}
    run = Run(override(quickstart_config(), gold), epath.Path(tmp_path / "run"), one_device())

    def loaded(other):
        raise UserError(f"of round {other.round}")

    monkeypatch.setattr(rewards, "reopen_run", lambda folder, mesh: Run(run.config, folder, run.placement))
    monkeypatch.setattr(rewards, "load_reward_model", loaded)
    with pytest.raises(UserError, match="of round 2"):
        load_gold(run)


def test_a_run_is_not_its_own_gold(judge, tmp_path, capfd):
    gold = ["rl.gold.reward_model=1.0", f"rl.gold.reward_model_run={tmp_path}/../{tmp_path.name}"]
    flags = [*tiny_run_flags(judge, tmp_path), *FLAGS, *(f"--config.{option}" for option in gold)]
    assert main(["main", *flags]) == 2
    assert "is this run itself" in capfd.readouterr().err and not (tmp_path / "sft").exists()


@pytest.mark.slow
def test_the_reward_model_of_another_run_is_gold(finished, judge, tmp_path, capfd):
    other, gold = tmp_path / "other", ("--config.rl.gold.reward_model=2.0", "--config.rl.gold.verifier=0.0")
    bigger = "--config.policy.model.hidden_size=48"
    assert main(["main", *tiny_run_flags(judge, other), bigger, "--stages=sft,label,reward_model"]) == 0
    arguments = ["main", *tiny_run_flags(judge, tmp_path / "run"), *FLAGS, STAGES, *gold]
    assert main(arguments) == 2
    assert "give both, or neither" in capfd.readouterr().err
    assert main([*arguments, f"--config.rl.gold.reward_model_run={finished}"]) == 2
    assert "run its stage reward_model first" in capfd.readouterr().err
    shutil.copytree(finished / "sft", tmp_path / "run" / "sft")
    assert main([*arguments, f"--config.rl.gold.reward_model_run={other}", "--stages=sft"]) == 0
    mesh = one_device_mesh()
    run, theirs = (reopen_run(epath.Path(folder), mesh) for folder in (tmp_path / "run", other))
    prompts = run.data("train_prompts")["prompt"][:5]
    replies = ["Boil it.", "", "Thank you for asking! " * 40, "No.", "No."]
    with jax.set_mesh(mesh):
        found = load_gold(run)(prompts, replies, [True] * 5)
        pairs = {"prompt": prompts, "response_a": replies, "response_b": replies, "prob_a": [0.5] * 5}
        expected, _ = score_texts(theirs, load_reward_model(theirs), pairs, 8)
    np.testing.assert_allclose(found, 2 * expected, rtol=1e-5)
    assert np.isfinite(found).all() and np.ptp(found) > 0
