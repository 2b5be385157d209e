"""The stage of over-optimisation with a tiny judge, and the gold reward that RL logs for it."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlaif_jax.evaluation.overoptimisation import best_of_n
from rlaif_jax.main import main
from rlaif_jax.stages import overoptimisation, replies
from rlaif_jax.stages import run as runs
from tests.helpers import one_device_mesh
from tests.tiny_judge import tiny_run_flags, write_judge

SAMPLES, PROMPTS = 16, 5
FLAGS = (
    "--config.stages=('sft','rl','overoptimisation')",
    "--config.rl.value_init=sft",
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
    return [None if len(response) % 7 == 0 else 1.0 for response in responses]


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
        patch.setattr(runs, "make_mesh", lambda config: one_device_mesh())
        assert main(["main", *tiny_run_flags(judge, folder), *FLAGS]) == 0
    return folder


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda config: one_device_mesh())


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


def test_gold_changes_nothing_of_the_training(judge, finished, tmp_path, one_device):
    flags = again(judge, finished, tmp_path / "run", "rl", "overoptimisation")
    assert main([*flags, "--config.rl.gold.verifier=0.0", "--config.stages=('sft','rl')"]) == 0
    with_gold = [{k: v for k, v in line.items() if not k.startswith("gold/")} for line in lines(finished)]
    assert lines(tmp_path / "run") == with_gold


@pytest.mark.parametrize("where", ["samples", "scores"])
def test_a_killed_stage_ends_as_an_undisturbed_one(judge, finished, tmp_path, monkeypatch, one_device, where):
    flags, calls = again(judge, finished, tmp_path / "run", "overoptimisation"), []
    module = replies if where == "samples" else overoptimisation
    write = module.write_checked_parquet

    def killed(*arguments):
        calls.append(0)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_checked_parquet", killed)
        assert main(flags) == 130
    kept = tmp_path / "run" / "overoptimisation" / ("replies_sft" if where == "samples" else "scores")
    assert len(list(kept.iterdir())) == 3
    written = []
    monkeypatch.setattr(module, "write_checked_parquet", lambda *arguments: written.append(0) or write(*arguments))
    assert main(flags) == 0
    assert 0 < len(written) <= SAMPLES * PROMPTS // 8 - 2  # a prompt's replies are sampled together, so one group again
    assert not kept.exists() and results(tmp_path / "run") == results(finished)
    for name in ("samples.parquet",):
        assert pq.read_table(tmp_path / "run" / "overoptimisation" / name).equals(
            pq.read_table(finished / "overoptimisation" / name)
        )


def test_prompts_with_unscored_replies_are_left_out_and_counted(judge, finished, tmp_path, one_device, capfd):
    flags = again(judge, finished, tmp_path / "run", "rl", "overoptimisation")
    flags += ["--config.overoptimisation.prompts=0", "--config.overoptimisation.samples=8"]
    assert main([*flags, f"--config.rl.gold.verifier_function={__name__}:rarely"]) in (0, 2)
    samples = pq.read_table(tmp_path / "run" / "overoptimisation" / "samples.parquet").to_pydict()
    whole = np.isfinite(np.reshape(samples["gold"], (-1, 8))).all(axis=1)
    assert {line["gold/unscored"] > 0 for line in lines(tmp_path / "run")} == {True}
    if whole.sum() < 2:
        assert f"{whole.sum()} of 8 prompts have a proxy and a gold reward" in capfd.readouterr().err
    else:
        found = results(tmp_path / "run")
        assert (found["best_of_n/prompts"], found["best_of_n/prompts_unscored"]) == (whole.sum(), (~whole).sum())


def test_the_gold_of_another_judge_is_that_judges(judge, finished, tmp_path, one_device):
    other = write_judge(tmp_path / "other.gguf", seed=1)
    means = []
    for name, weights in (("same", ""), ("other", other)):
        flags = again(judge, finished, tmp_path / name, "rl", "overoptimisation")
        flags += [
            "--config.rl.gold.verifier=0.0",
            "--config.rl.gold.judge=1.0",
            f"--config.rl.gold.judge_weights={weights}",
        ]
        assert main([*flags, "--config.rl.rewards.judge=1.0", "--config.rl.steps=2", "--stages=rl"]) == 0
        means.append([(line["reward/judge"], line["gold/mean"]) for line in lines(tmp_path / name)])
    for rewarded, gold in means[0]:
        assert gold == pytest.approx(rewarded)
    assert all(abs(gold - rewarded) > 1e-4 for rewarded, gold in means[1])


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
    flags = [*tiny_run_flags(judge, tmp_path / "run"), *FLAGS, *(f"--config.{option}" for option in options)]
    assert main(["main", *flags]) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert len(error) == 1 and all(word in error[0] for word in said), error
    assert not (tmp_path / "run" / "sft").exists()


def test_too_few_whole_prompts_end_the_stage_with_the_reason(judge, finished, tmp_path, one_device, capfd):
    flags = again(judge, finished, tmp_path / "run", "rl", "overoptimisation")
    assert main([*flags, f"--config.rl.gold.verifier_function={__name__}:nothing"]) == 2
    assert f"0 of {PROMPTS} prompts have a proxy and a gold reward" in capfd.readouterr().err
    assert all("gold/mean" not in line and line["gold/unscored"] == 1 for line in lines(tmp_path / "run"))
