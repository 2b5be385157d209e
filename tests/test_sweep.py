"""Sweeps: what is shared, what an interruption or a failure leaves, and the table.

Most tests put stages of a few lines in place of the real ones; everything around them is real.
"""

import csv
import json

import numpy as np
import pytest
from scipy import stats

from configs.sweeps import quickstart_algorithms, quickstart_kl
from rlaif_jax import compare, main, sweep
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_json, write_json
from rlaif_jax.stages import pipeline, rl
from rlaif_jax.stages import run as runs
from tests.helpers import STAGES, one_device_mesh
from tests.tiny_judge import tiny_run_flags, write_judge

SWEEP = """
from ml_collections import config_dict

from configs import quickstart


def get_config():
    sweep = config_dict.ConfigDict({"base": quickstart.get_config(), "seeds": (0, 1), "baseline": "low"})
    sweep.arms = config_dict.ConfigDict(ARMS, allow_dotted_keys=True, sort_keys=False)
    sweep.figures = FIGURES
    return sweep
"""
ARMS = {"low": {"rl.kl.coef": 0.05}, "high_0.5": {"rl.kl.coef": 0.5}}


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


def sweep_flags(judge, folder, arms=ARMS, figures=("win",), name="sweep"):
    """Flags of a sweep with tiny cells in `folder`/sweep."""
    file = folder / "sweep.py"
    file.write_text(SWEEP.replace("ARMS", repr(arms)).replace("FIGURES", repr(figures)))
    base = [flag.replace("--config.", "--config.base.") for flag in tiny_run_flags(judge, "")[2:]]
    return [f"--config={file}", f"--workdir={folder / name}", *base]


def win(kl, seed):
    return 0.5 + kl * (1 + seed) + 0.01 * seed


class FakeStages:
    """Stages that pass a number on through their folders; they keep a list of calls, and can raise."""

    def __init__(self, monkeypatch):
        self.calls = []
        self.error = lambda stage, run: None  # an exception to raise at the end of the stage
        for stage in STAGES:
            monkeypatch.setitem(pipeline.STAGES, stage, lambda run, stage=stage: self.run(stage, run))

    def run(self, stage, run):
        self.calls.append((stage, run.config.rl.kl.coef, run.config.seed))
        order = list(STAGES)
        for earlier in order[: order.index(stage)]:
            assert read_json(run.folder(earlier) / "seed.json") == run.config.seed
        write_json(run.folder(stage) / "seed.json", run.config.seed)
        if stage == "rl":
            write_json(run.folder("rl") / "kl.json", run.config.rl.kl.coef)
        if stage == "eval":
            mean = win(read_json(run.folder("rl") / "kl.json"), run.config.seed)
            figures = {"win": {"mean": mean, "ci95": [0, 1], "n": 8}, "nothing": {"mean": None, "ci95": [None] * 2}}
            write_json(run.folder("eval") / "results.json", figures | {"same_judge": True})
        error = self.error(stage, run)
        if error:
            raise error


@pytest.fixture
def fake(monkeypatch):
    return FakeStages(monkeypatch)


def rows(folder, **wanted):
    with (folder / "table.csv").open() as file:
        return [row for row in csv.DictReader(file) if all(row[name] == value for name, value in wanted.items())]


def cell(folder, name):
    return json.loads((folder / "sweep" / "cells" / name / "cell.json").read_text())


def test_a_stage_with_the_same_inputs_runs_once(fake, judge, tmp_path, capfd):
    flags = sweep_flags(judge, tmp_path)
    assert sweep.main(["sweep", *flags]) == 0
    counts = {stage: sum(call[0] == stage for call in fake.calls) for stage in STAGES}
    assert counts == {"sft": 2, "label": 2, "reward_model": 2, "rl": 4, "eval": 4}
    out = capfd.readouterr().out
    assert "cell 3/4 low seed 1" in out and "4 cells, 4 done: 14 stages run, 6 reused" in out
    low, high = (cell(tmp_path, f"{arm}/seed0")["stages"] for arm in ("low", "high_0.5"))
    assert [stage for stage in STAGES if low[stage] == high[stage]] == ["sft", "label", "reward_model"]
    assert all((tmp_path / "sweep" / path / "stage.json").exists() for path in (*low.values(), *high.values()))
    assert json.loads((tmp_path / "sweep/cells/low/seed1/config.json").read_text())["config"]["seed"] == 1
    assert json.loads((tmp_path / "sweep/sweep.json").read_text())["config"]["arms"] == ARMS

    assert sweep.main(["sweep", *flags]) == 0
    assert "4 done: 0 stages run, 20 reused" in capfd.readouterr().out


def test_more_seeds_and_arms_add_to_what_is_there(fake, judge, tmp_path):
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path), "--config.seeds=0,"]) == 0
    before = len(fake.calls)
    arms = ARMS | {"middle": {"rl.kl.coef": 0.2}, "long": {"reward_model.steps": 5}}
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path, arms), "--config.seeds=0,"]) == 0
    base_kl = 0.1
    added = [("rl", 0.2), ("eval", 0.2), ("reward_model", base_kl), ("rl", base_kl), ("eval", base_kl)]
    assert [call[:2] for call in fake.calls[before:]] == added
    assert [row["arm"] for row in rows(tmp_path / "sweep", quantity="mean")] == list(arms)  # in their order


@pytest.mark.parametrize("stop", [4, 13])
def test_an_interrupted_sweep_goes_on_to_the_same_table(fake, judge, tmp_path, stop, capfd):
    def interrupt(stage, run):
        return KeyboardInterrupt() if len(fake.calls) == stop + 1 else None

    whole, interrupted = (sweep_flags(judge, tmp_path, name=name) for name in ("whole", "interrupted"))
    assert sweep.main(["sweep", *whole]) == 0
    undisturbed, fake.calls = fake.calls, []
    fake.error = interrupt
    assert sweep.main(["sweep", *interrupted]) == 130
    assert "the same command goes on" in capfd.readouterr().err
    assert not (tmp_path / "interrupted" / "table.md").exists()
    assert sweep.main(["sweep", *interrupted]) == 0
    assert fake.calls == undisturbed[: stop + 1] + undisturbed[stop:]  # the stage that was cut short, and no other
    for name in ("table.md", "table.csv"):
        assert (tmp_path / "interrupted" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_a_failed_cell_does_not_stop_the_rest_and_is_tried_again(fake, judge, tmp_path, capfd):
    def fail(stage, run):
        if stage == "rl" and run.config.seed == 1 and run.config.rl.kl.coef == 0.05:
            return UserError("stage rl stopped at step 3: loss not finite")
        return RuntimeError("out of memory\nat length") if (stage, run.config.seed) == ("eval", 0) else None

    fake.error = fail
    flags = sweep_flags(judge, tmp_path)
    assert sweep.main(["sweep", *flags]) == 1
    err = capfd.readouterr().err.splitlines()
    failures = ["cell low seed 0 failed: RuntimeError: out of memory", "cells/low/seed0: RuntimeError: out of memory"]
    for message in failures:  # as it happens, and at the end
        assert sum(line.endswith(message) for line in err) == 1
    assert err[-1].endswith("cells/low/seed1: stage rl stopped at step 3: loss not finite")
    failed = cell(tmp_path, "low/seed1")
    assert (failed["status"], failed["error"]) == ("failed", "stage rl stopped at step 3: loss not finite")
    assert failed["traceback"] is None and "in run" in cell(tmp_path, "low/seed0")["traceback"]
    assert cell(tmp_path, "high_0.5/seed1")["status"] == "done"
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert table.count("[failed](cells/") == 3 and "[done](cells/high_0.5/seed1/cell.json)" in table
    assert [row["seed"] for row in rows(tmp_path / "sweep", quantity="value")] == ["1"]

    fake.error, fake.calls = lambda stage, run: None, []
    assert sweep.main(["sweep", *flags]) == 0
    assert sorted(call[0] for call in fake.calls) == ["eval", "eval", "eval", "rl"]
    assert cell(tmp_path, "low/seed1") == failed | {"status": "done", "error": None}


def test_a_shared_stage_that_fails_is_tried_once_a_call(fake, judge, tmp_path, capfd):
    fake.error = lambda stage, run: ValueError("bad") if (stage, run.config.seed) == ("sft", 0) else None
    flags = sweep_flags(judge, tmp_path)
    assert sweep.main(["sweep", *flags]) == 1
    assert sum(call[0] == "sft" for call in fake.calls) == 2  # one a seed
    assert cell(tmp_path, "low/seed0")["error"] == cell(tmp_path, "high_0.5/seed0")["error"] == "ValueError: bad"
    assert sweep.main(["sweep", *flags]) == 1
    assert sum(call[0] == "sft" for call in fake.calls) == 3


def test_the_table_holds_t_intervals_over_seeds_and_paired_differences(fake, judge, tmp_path, capfd):
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path), "--config.seeds=0,1,5"]) == 0
    folder, seeds = tmp_path / "sweep", [0, 1, 5]
    values = {arm: np.array([win(fields["rl.kl.coef"], seed) for seed in seeds]) for arm, fields in ARMS.items()}
    expected = values | {"difference": values["high_0.5"] - values["low"]}
    found = {arm: rows(folder, arm=arm, quantity="mean")[0] for arm in ARMS}
    found["difference"] = rows(folder, arm="high_0.5", quantity="mean_difference")[0]
    for name, row in found.items():
        interval = stats.t.interval(0.95, 2, expected[name].mean(), stats.sem(expected[name]))
        np.testing.assert_allclose([float(row[x]) for x in ("value", "ci_low", "ci_high")],
                                   [expected[name].mean(), *interval])  # fmt: skip
        assert row["n"] == "3"
    singles = rows(folder, arm="high_0.5", quantity="difference")
    np.testing.assert_allclose([float(row["value"]) for row in singles], expected["difference"])
    assert [row["cell"] for row in singles] == [f"cells/high_0.5/seed{seed}" for seed in seeds]
    table, mean = (folder / "table.md").read_text(), expected["difference"].mean()
    assert f"| high_0.5 | `win` | {' | '.join(f'{x:+.3f}' for x in expected['difference'])} | {mean:+.3f} [" in table
    assert table in capfd.readouterr().out


def test_one_seed_has_no_interval(fake, judge, tmp_path):
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path), "--config.seeds=3,"]) == 0
    mean = rows(tmp_path / "sweep", arm="low", quantity="mean")[0]
    assert float(mean["value"]) == pytest.approx(win(0.05, 3)) and (mean["ci_low"], mean["ci_high"]) == ("", "")
    table = (tmp_path / "sweep" / "table.md").read_text()
    assert f"| low | {win(0.05, 3):.3f} (n=1) |" in table and "has no interval" in table


def test_a_figure_without_observations_is_no_number(fake, judge, tmp_path):
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path, figures=("nothing",))]) == 0
    assert "| low | - (n=0) |" in (tmp_path / "sweep" / "table.md").read_text()


def test_a_misspelt_figure_is_named(fake, judge, tmp_path, capfd):
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path, figures=("wim",))]) == 2
    assert "no figure 'wim': did you mean win?" in capfd.readouterr().err


# Each of these ends with one line on stderr that holds the words given, and writes nothing.
BAD_SWEEPS = {
    "misspelt override": ({"low": {}, "b": {"rl.kl.coeff": 1.0}}, [], ["config.arms.b", "rl.kl.coeff", "rl.kl.coef?"]),
    "mistyped override": ({"low": {"rl.kl.coef": "x"}}, [], ["config.arms.low", "config.rl.kl.coef", "float"]),
    "override of a group": ({"low": {"rl": 3}}, [], ["config.arms.low", "field rl:"]),
    "override out of range": ({"low": {}, "b": {"rl.kl.coef": -1.0}}, [], ["config.arms.b", "rl.kl.coef=-1.0"]),
    "override of the seed": ({"low": {"seed": 3}}, [], ["config.arms.low", "config.seeds"]),
    "missing judge": ({"low": {"judge.weights": "/no/x.gguf"}}, [], ["config.arms.low", "judge.weights", "/no/x.gguf"]),
    "missing template": ({"low": {"judge.prompt.template": "no"}}, [], ["config.arms.low", "judge.prompt.template"]),
    "arm that is no folder": ({"low": {}, "a/b": {}}, [], ["'a/b'", "letters"]),
    "no such baseline": (ARMS, ["--config.baseline=lo"], ["config.baseline='lo'", "did you mean low?"]),
    "seed twice": (ARMS, ["--config.seeds=1,1"], ["config.seeds=(1, 1)"]),
    "no seed": (ARMS, ["--config.seeds=()"], ["config.seeds"]),
    "misspelt field of the sweep": (ARMS, ["--config.seedz=1"], ["config.seedz", "seeds"]),
    "misspelt field of the base": (ARMS, ["--config.base.sft.stepz=1"], ["config.base.sft.stepz", "steps"]),
    "no sweep": (ARMS, ["--config=configs/quickstart.py"], ["config.base"]),
    "pattern for a folder": (ARMS, ["--workdir=runs/a*"], ["--workdir=runs/a*"]),
}


@pytest.mark.parametrize("case", BAD_SWEEPS)
def test_bad_usage_is_one_line_before_any_work(fake, judge, tmp_path, capfd, case):
    arms, flags, words = BAD_SWEEPS[case]
    assert sweep.main(["sweep", *sweep_flags(judge, tmp_path, arms), *flags]) == 2
    err = capfd.readouterr().err
    assert len(err.strip().splitlines()) == 1, err
    for word in words:
        assert word in err
    assert not (tmp_path / "sweep").exists() and not fake.calls


@pytest.fixture(scope="module")
def real(judge, tmp_path_factory):
    """A sweep of real stages on one device, for which they compile quickly. Returns its folder."""
    folder = tmp_path_factory.mktemp("real")
    arms = {"low": {}, "cold": {"evaluation.sampling.temperature": 0.0}}
    flags = sweep_flags(judge, folder, arms, ("ground_truth_good/rl", "kl/rl_vs_sft"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
        assert sweep.main(["sweep", *flags, "--config.seeds=0,"]) == 0
    return folder / "sweep"


def test_real_stages_work_in_shared_folders(real):
    folders = {path.name.rsplit("-", 1)[0] for path in (real / "shared").iterdir()}
    assert folders == set(STAGES) and len(list((real / "shared").iterdir())) == len(STAGES) + 1  # two of eval
    (rl,) = (real / "shared").glob("rl-*")
    assert len((rl / "rl" / "metrics.jsonl").read_text().splitlines()) == 6 and any(rl.glob("logs/rl/*tfevents*"))
    results = json.loads(next((real / "shared").glob("eval-*/eval/results.json")).read_text())
    values = {float(row["value"]) for row in rows(real, figure="kl/rl_vs_sft", quantity="value")}
    assert len(values) == 2 and results["kl/rl_vs_sft"]["mean"] in values


def test_the_other_commands_read_a_cell_as_a_run(real, judge, capfd, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    cells = [real / "cells" / arm / "seed0" for arm in ("low", "cold")]
    assert compare.main(["compare", *map(str, cells)]) == 0
    assert "| `kl/rl_vs_sft` |" in capfd.readouterr().out
    assert main.main(["main", *tiny_run_flags(judge, cells[0]), "--replay=3"]) == 0
    assert main.main(["main", *tiny_run_flags(judge, cells[0])]) == 0
    assert capfd.readouterr().out.count("nothing to do") == 5


@pytest.mark.slow
def test_a_cell_interrupted_in_the_middle_of_rl_ends_as_a_run_of_its_own(judge, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    flags = sweep_flags(judge, tmp_path, figures=("kl/rl_vs_sft",))
    steps = []

    def interrupted(*arguments, **settings):
        steps.append(0)
        if len(steps) == 6 + 6 + 6 + 4:  # the fourth step of the last cell: after a checkpoint, before the next
            raise KeyboardInterrupt
        return make_rollout(*arguments, **settings)

    make_rollout = rl.make_rollout
    monkeypatch.setattr(rl, "make_rollout", interrupted)
    assert sweep.main(["sweep", *flags]) == 130
    assert sweep.main(["sweep", *flags]) == 0
    assert len(steps) == 6 + 6 + 6 + 4 + 4  # from the checkpoint after the second step
    monkeypatch.setattr(rl, "make_rollout", make_rollout)
    own = tiny_run_flags(judge, tmp_path / "own")
    assert main.main(["main", *own, "--config.seed=1", "--config.rl.kl.coef=0.5"]) == 0
    stages = cell(tmp_path, "high_0.5/seed1")["stages"]
    for stage, name in (("rl", "metrics.jsonl"), ("eval", "results.json")):
        assert (tmp_path / "own" / stage / name).read_text() == (tmp_path / "sweep" / stages[stage] / name).read_text()


def test_the_sweep_of_algorithms_has_an_arm_for_each():
    config = sweep.parse(quickstart_algorithms.get_config("smoke").to_dict(), sweep.SweepConfig)
    assert config.arms["ppo"] == {} and config.baseline == "ppo"
    assert config.arms["drlaif"]["stages"] == ("sft", "rl", "eval")
    assert config.arms["grpo"] | {"rl.advantage": "group", "rl.kl.placement": "loss"} == config.arms["grpo"]


def test_the_quickstart_sweep_is_valid():
    config = sweep.parse(quickstart_kl.get_config("smoke").to_dict(), sweep.SweepConfig)
    assert config.baseline in config.arms and config.seeds == (0, 1, 2)
    assert config.arms[config.baseline] == {"rl.kl.coef": config.base.rl.kl.coef}
