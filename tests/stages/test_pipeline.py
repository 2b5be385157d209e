import dataclasses
import json
import shutil

import datasets
import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from etils import epath

from rlaif_jax import audit, export
from rlaif_jax.commands import parse_flags
from rlaif_jax.config import override, parse
from rlaif_jax.errors import UserError
from rlaif_jax.main import main
from rlaif_jax.models.parameters import abstract_parameters, to_device
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.stages import replies, rl
from rlaif_jax.stages.preferences import read_preferences
from rlaif_jax.stages.run import open_run
from tests.helpers import one_device
from tests.tiny_judge import tiny_run_flags, write_judge


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run on 8 devices (the tests' default), with a tiny random judge."""
    folder = tmp_path_factory.mktemp("run")
    flags = tiny_run_flags(write_judge(folder / "judge.gguf"), folder / "run")
    assert main(["main", *flags]) == 0
    return folder / "run", flags


def opened(finished):
    options = parse_flags(["main", *finished[1]], "", flags.FlagValues())
    return open_run(parse(options.config.to_dict()), epath.Path(finished[0]))


def test_a_run_leaves_the_files_that_users_rely_on(finished):
    workdir, _ = finished
    for stage in ("sft", "reward_model", "rl"):
        assert any((workdir / stage / "checkpoints").iterdir())
        steps = [json.loads(line)["step"] for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]
        assert steps == list(range(len(steps))) and len(steps) in (4, 6)
        assert len((workdir / stage / "timing.jsonl").read_text().splitlines()) == len(steps)
    assert (workdir / "rl" / "samples.jsonl").read_text()
    assert json.loads((workdir / "config.json").read_text())["packages"]["jax"]
    assert any((workdir / "logs").rglob("*tfevents*"))
    assert "</html>" in (workdir / "report.html").read_text()
    labels = pq.read_table(workdir / "label" / "preferences.parquet")
    assert labels.num_rows == 16
    assert json.loads((workdir / "label" / "manifest.json").read_text())["rows"] == 16


def test_results_have_mean_interval_and_n(finished):
    results = json.loads((finished[0] / "eval" / "results.json").read_text())
    assert results.pop("judge_is_training_judge") is True
    assert {"win_rate/rl_vs_sft", "ground_truth_good/sft", "ground_truth_good/rl", "distinct_2/rl"} <= set(results)
    for name, figure in results.items():
        assert set(figure) == {"mean", "ci95", "n"}, name
        if figure["n"]:
            low, high = figure["ci95"]
            assert low <= figure["mean"] <= high, name


def test_the_label_is_the_mean_of_both_orders(finished):
    rows = pq.read_table(finished[0] / "label" / "preferences.parquet").to_pylist()
    labelled = [row for row in rows if row["status"] == "ok"]
    assert labelled
    for row in labelled:
        assert row["prob_a"] == pytest.approx((row["prob_a_forward"] + row["prob_a_reversed"]) / 2, abs=1e-12)


def test_a_finished_run_has_nothing_to_do(finished, capfd):
    before = {path: path.stat().st_mtime_ns for path in finished[0].rglob("*.parquet")}
    assert main(["main", *finished[1]]) == 0
    assert capfd.readouterr().out.count("nothing to do") == 5
    assert before == {path: path.stat().st_mtime_ns for path in finished[0].rglob("*.parquet")}


def test_a_label_is_replayed(finished, capfd):
    assert main(["main", *finished[1], "--replay=3"]) == 0
    out = capfd.readouterr().out
    assert "same label" in out and "DIFFERENT" not in out and "The second reply is" in out


def test_a_label_that_another_judge_made_is_not_reproduced(finished, capfd, tmp_path):
    other = write_judge(tmp_path / "other.gguf", seed=1)
    assert main(["main", *finished[1], f"--config.judge.weights={other}", "--replay=3"]) == 1
    assert "DIFFERENT label" in capfd.readouterr().out


# Each of these ends with one line on stderr that holds the words given, and starts no work.
BAD_USAGE = {
    "empty workdir": (["--workdir="], ["--workdir is empty"]),
    "workdir that can't be": (["--workdir=/proc/x"], ["/proc/x", "can't be written"]),
    "seed too large": (["--config.seed=4294967296"], ["seed=4294967296", "2147483647"]),
    "not finite": (["--config.rl.kl.coef=inf"], ["rl.kl.coef", "finite"]),
    "unknown axis": (["--config.mesh.replicated=('headz',)"], ["replicated", "headz"]),
    "other cache": (["--config.sampler.cache_dtype=int8"], ["sampler.cache_dtype='int8'"]),
    "no such cache": (["--config.sampler.cache_dtype=int4"], ["sampler.cache_dtype", "int8"]),
    "no such attention": (["--config.judge.attention=flash"], ["judge.attention", "cudnn"]),
    "filter out of range": (["--config.rl.sampling.top_p=0"], ["rl.sampling.top_p", "above 0"]),
    "one of two fields of a name": (
        ["--config.critique.max_new_tokens=9", "--config.judge.prompt.max_new_tokens=9"],
        ["unknown config field config.critique.max_new_tokens or config.judge.prompt.max_new_tokens"],
    ),
    "misspelt field": (["--config.sft.stepz=3"], ["config.sft.stepz", "did you mean steps?"]),
    "unknown group": (["--config.stf.steps=3"], ["config.stf.steps"]),
    "mistyped value": (["--config.sft.steps=many"], ["sft.steps", "many"]),
    "unknown flag": (["--stagez=sft"], ["stagez", "stages"]),
    "unknown stage": (["--stages=sft,labels"], ["labels", "label"]),
    "no stage": (["--stages="], ["no stage", "reward_model"]),
    "changed config": (["--config.sft.steps=5"], ["sft.steps=5", "was 4"]),
    "changed config of an earlier stage": (["--config.sft.steps=5", "--stages=eval"], ["stage sft", "sft.steps=5"]),
    "missing judge": (["--config.judge.weights=/nowhere/x.gguf"], ["judge.weights", "/nowhere/x.gguf"]),
    "missing template": (["--config.judge.prompt.template=nothing"], ["judge.prompt.template", "everyday_requests"]),
    "judge too short": (["--config.judge.max_length=4096"], ["judge.max_length=4096", "2048"]),
    "batch of no device": (["--config.rl.batch_size=17"], ["rl.batch_size=17"]),
    "no minibatch": (["--config.rl.minibatches=0"], ["rl.minibatches=0", "positive"]),
    "samples all alike": (
        ["--config.judge.rationale.samples=2"],
        ["judge.rationale.samples=2", "temperature=0"],
    ),
    "share above 1": (["--config.data.embedded.polite_share=1.5"], ["polite_share=1.5"]),
    "unknown schedule": (["--config.rl.optimizer.schedule=cosin"], ["rl.optimizer.schedule", "cosine"]),
    "unknown moments": (["--config.sft.optimizer.moment_dtype=int8"], ["moment_dtype='int8'", "float32, bfloat16"]),
    "unknown dtype": (["--config.judge.dtype=float8"], ["judge.dtype='float8'", "bfloat16"]),
    "odd heads": (["--config.policy.model.num_attention_heads=3"], ["num_attention_heads=3", "multiple"]),
    "row too short": (["--config.policy.max_prompt_length=100"], ["sft.row_length=128", "164"]),
    "context too short": (["--config.policy.model.max_position_embeddings=64"], ["max_position_embeddings=64", "128"]),
    "mesh of too many": (["--config.mesh.tensor=5", "--config.mesh.fsdp=5"], ["config.mesh", "devices"]),
    "mesh that does not divide": (["--config.mesh.tensor=4", "--config.mesh.fsdp=2"], ["policy", "heads'", "size 2"]),
    "judges that do not divide": (["--config.mesh.judge.tensor=4"], ["mesh.judge", "fit judge", "heads' has size 2"]),
    "judges' mesh of too many": (["--config.mesh.judge.tensor=5"], ["config.mesh.judge", "5 devices", "are 8"]),
    "offload of none": (["--config.mesh.offload=('policy',)"], ["mesh.offload", "reward_model"]),
    "slices of three": (["--config.mesh.slices=3", "--config.mesh.data=2"], ["config.mesh", "slices=3", "data=2"]),
    "odd length": (["--config.mesh.sequence=2", "--config.sft.row_length=129"], ["row_length=129", "sequence, 2"]),
    "odd bucket": (
        ["--config.mesh.judge.sequence=2", "--config.mesh.judge.data=4", "--config.judge.bucket_multiple=9"],
        ["judge.bucket_multiple=9", "mesh.judge.sequence, 2"],
    ),
    "kept less than never": (["--config.rl.keep_every=-1"], ["rl.keep_every=-1", "0 or more"]),
    "best by nothing": (["--config.rl.keep_best=loss"], ["rl.keep_best='loss'", "min METRIC"]),
    "label row": (["--replay=99"], ["99", "0 to 15"]),
    "stray argument": (["sft"], ["sft"]),
    "no arm": (["--config=configs/quickstart.py:nonsense"], ["nonsense", "smoke"]),
    "no config file": (["--config=configs/nowhere.py"], ["nowhere.py"]),
    "pattern for a folder": (["--workdir=runs/a*"], ["--workdir=runs/a*"]),
    "file for a folder": (["--workdir=README.md"], ["README.md", "is a file"]),
}


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_is_one_line(finished, capfd, case):
    flags, words = BAD_USAGE[case]
    capfd.readouterr()
    assert main(["main", *finished[1], *flags]) == 2
    captured = capfd.readouterr()
    assert len(captured.err.strip().splitlines()) == 1, captured.err
    assert "Traceback" not in captured.err
    for word in words:
        assert word in captured.err


def test_a_stage_needs_the_stages_before_it(finished, capfd, tmp_path):
    flags = [flag for flag in finished[1] if "workdir" not in flag]
    assert main(["main", *flags, f"--workdir={tmp_path}", "--stages=rl"]) == 2
    assert "stage rl needs stage sft" in capfd.readouterr().err


def test_a_stage_that_kept_nothing_does_not_bind_the_config(finished, capfd, tmp_path):
    flags = [flag for flag in finished[1] if "workdir" not in flag]
    flags += [f"--workdir={tmp_path}", "--stages=sft"]
    for length in (2, 3):
        assert main(["main", *flags, f"--config.policy.max_prompt_length={length}"]) == 2
        assert "evaluation_prompts has no usable row (prompt too long: 8)" in capfd.readouterr().err


def test_help_is_no_error(capfd):
    assert main(["main", "--help"]) == 0
    assert "--stages" in capfd.readouterr().out


def test_a_damaged_record_is_named(finished, capfd):
    file = finished[0] / "eval" / "results.json"
    whole = file.read_text()
    file.write_text(whole[:50])
    assert main(["main", *finished[1]]) == 2
    file.write_text(whole)
    assert "results.json is damaged" in capfd.readouterr().err


def test_a_seed_left_out_is_drawn_printed_saved_and_kept(finished, tmp_path, capfd):
    arguments = [*finished[1], f"--workdir={tmp_path}", "--stages=sft", "--config.sft.steps=1", "--config.seed=-1"]
    seeds = []
    for _ in range(2):
        assert main(["main", *arguments]) == 0
        seeds.append(json.loads((tmp_path / "config.json").read_text())["config"]["seed"])
        printed = capfd.readouterr().out
        assert (f"seed: {seeds[0]} (drawn)" in printed) is (len(seeds) == 1)
    assert seeds[0] == seeds[1] != -1
    assert "sft: nothing to do" in printed


def test_an_rl_iteration_moves_nothing_to_or_from_the_device_but_its_prompts(finished, monkeypatch):
    guarded = []

    def first_two_steps(folder, loop, abstract, init, next_step, watch):
        state, _, _ = next_step(init(), 0)  # compiles
        with jax.transfer_guard("disallow"):
            state, metrics, _ = next_step(state, 1)
        guarded.append(float(metrics["loss"]))

    monkeypatch.setattr(rl, "train", first_two_steps)
    run = opened(finished)
    with jax.set_mesh(run.placement.mesh):
        rl.run_rl(run)
    assert np.isfinite(guarded).all() and guarded


def test_parameters_that_wait_in_host_memory_change_nothing(finished, monkeypatch):
    metrics, waited = [], []

    def watched(tree):
        waited.append({x.sharding.memory_kind for x in jax.tree.leaves(tree)})
        return to_device(tree)

    def one_step(folder, loop, abstract, init, next_step, watch):
        metrics.append(jax.device_get(next_step(init(), 0)[1]))

    monkeypatch.setattr(rl, "train", one_step)
    monkeypatch.setattr(rl, "to_device", watched)
    for offload in ((), ("reference", "reward_model")):
        run = opened(finished)
        run = dataclasses.replace(run, config=override(run.config, {"mesh.offload": offload}))
        with jax.set_mesh(run.placement.mesh):
            rl.run_rl(run)
    assert waited == [{"device"}] * 3 + [{"pinned_host"}] * 3  # policy and value network begin, then a rollout
    assert metrics[0] == metrics[1]


def test_replies_that_were_written_are_not_sampled_again(finished, tmp_path, monkeypatch):
    run = opened(finished)
    prompts, write, sampled = run.data("train_prompts")["prompt"][:9], replies.write_checked_parquet, []

    def keep(folder):
        with jax.set_mesh(run.placement.mesh):
            params = run.trained_params("sft", run.language_model())
            sampling = run.config.label.sampling
            return replies.keep_replies(run, params, prompts, 2, run.key("candidates"), sampling, folder, 4)

    def write_two(folder, stem, table):
        if stem == "00002":
            raise KeyboardInterrupt
        return write(folder, stem, table)

    def counted(*arguments):
        for row, reply in replies_sample(*arguments):
            sampled.append(row)
            yield row, reply

    whole = keep(epath.Path(tmp_path / "whole"))
    monkeypatch.setattr(replies, "write_checked_parquet", write_two)
    with pytest.raises(KeyboardInterrupt):
        keep(epath.Path(tmp_path / "killed"))
    monkeypatch.setattr(replies, "write_checked_parquet", write)
    replies_sample = replies.sample
    monkeypatch.setattr(replies, "sample", counted)
    resumed = keep(epath.Path(tmp_path / "killed"))
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)
    assert 10 <= len(sampled) < 18  # 8 were written, of which some may be of prompts that have but one
    assert not any(path.name.startswith("replies_") for path in (finished[0] / "eval").iterdir())

    shard = next((tmp_path / "killed").glob("00000.*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match="its replies alone are sampled again"):
        keep(epath.Path(tmp_path / "killed"))


def test_a_label_file_that_is_gone_is_put_together_again_from_its_shards(finished, capfd):
    file = finished[0] / "label" / "preferences.parquet"
    before = file.read_bytes()
    file.write_bytes(before[: len(before) // 2])
    assert main(["main", *finished[1], "--replay=0"]) == 2
    assert "delete it and run the stage" in capfd.readouterr().err
    file.unlink()
    assert main(["main", *finished[1], "--stages=label"]) == 0
    assert file.read_bytes() == before


def test_workers_label_as_one_process_does(finished, tmp_path, capfd):
    for stage in ("sft", "label"):
        shutil.copytree(finished[0] / stage, tmp_path / stage)
    for name in ("shards", "preferences.parquet", "stage.json", "manifest.json", "audit.json", "candidates.parquet"):
        path = tmp_path / "label" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    flags = [flag for flag in finished[1] if not flag.startswith("--workdir")] + [f"--workdir={tmp_path}"]
    stage = ["--stages=label"]
    assert main(["main", *flags, *stage, "--worker=1/2"]) == 2
    assert "worker 0 makes it" in capfd.readouterr().err
    assert [main(["main", *flags, *stage, f"--worker={i}/2"]) for i in (0, 1)] == [0, 0]
    assert capfd.readouterr().out.count("this worker is done") == 1
    for name in ("preferences.parquet", "candidates.parquet"):
        assert pq.read_table(tmp_path / "label" / name).equals(pq.read_table(finished[0] / "label" / name))
    for name in ("manifest.json", "audit.json", "audit.html", "stage.json"):
        assert (tmp_path / "label" / name).read_bytes() == (finished[0] / "label" / name).read_bytes()


def preferences_of(finished, **changes):
    run = opened(finished)
    config = dataclasses.replace(run.config, preferences=dataclasses.replace(run.config.preferences, **changes))
    return read_preferences(dataclasses.replace(run, config=config))


def test_what_is_learned_from_a_label_is_what_the_config_says(finished):
    rows = [row for row in pq.read_table(finished[0] / "label" / "preferences.parquet").to_pylist() if row["prob_a"]]
    soft = preferences_of(finished)
    assert soft["prob_a"] == [row["prob_a"] for row in rows]
    for order in ("forward", "reversed"):
        assert preferences_of(finished, order=order)["prob_a"] == [row[f"prob_a_{order}"] for row in rows]
    hard = preferences_of(finished, hard=True)["prob_a"]
    assert hard == [float(row["prob_a"] > 0.5) for row in rows]
    assert preferences_of(finished, noise_rate=1.0)["prob_a"] == pytest.approx([1 - p for p in soft["prob_a"]])
    some = np.array(preferences_of(finished, noise_rate=0.25)["prob_a"])
    turned = some != soft["prob_a"]
    assert 0 < turned.sum() < len(rows)
    np.testing.assert_allclose(some[turned], 1 - np.array(soft["prob_a"])[turned])
    assert preferences_of(finished, noise_rate=0.25)["prob_a"] == some.tolist()  # the same ones each time


def test_labels_are_exported_as_a_preference_data_set(finished, tmp_path, capfd):
    flags = [f"--workdir={finished[0]}", "--stage=label", f"--out={tmp_path / 'set'}", "--license=apache-2.0"]
    assert export.main(["export", *flags]) == 0
    rows = datasets.load_dataset(str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache")).to_list()
    labels = {row["row"]: row for row in pq.read_table(finished[0] / "label" / "preferences.parquet").to_pylist()}
    assert rows
    for row in rows:
        label = labels[row["row"]]
        sides = ("response_a", "response_b") if label["prob_a"] > 0.5 else ("response_b", "response_a")
        assert (row["chosen"], row["rejected"]) == tuple(label[side] for side in sides)
        assert row["prompt"] == label["prompt"] and row["chosen_probability"] > 0.5
        assert row["margin"] == pytest.approx(np.log(row["chosen_probability"] / (1 - row["chosen_probability"])))
    card = (tmp_path / "set" / "README.md").read_text()
    assert "license: apache-2.0" in card and "first_slot_rate" in card and labels[0]["template_hash"] in card
    assert export.main(["export", f"--workdir={tmp_path}", "--stage=label", f"--out={tmp_path / 'x'}"]) == 2
    assert "run --stages=label first" in capfd.readouterr().err


def test_models_are_exported_from_any_devices_as_they_were_trained(finished, tmp_path):
    run = opened(finished)
    for stage in ("rl", "reward_model"):
        out, scalar = tmp_path / stage, stage == "reward_model"
        assert export.main(["export", f"--workdir={finished[0]}", f"--stage={stage}", f"--out={out}"]) == 0
        model = run.scalar_model() if scalar else run.language_model()
        trained = run.trained_params(stage, model, members=int(scalar))
        trained = jax.tree.map(lambda x: x[0], trained) if scalar else trained
        abstract = abstract_parameters(model, one_device())
        abstract.pop("bias", None)  # which transformers has no place for
        found = load_parameters(open_weights(str(out)), abstract)
        jax.tree.map(np.testing.assert_array_equal, found["decoder"], jax.device_get(trained["decoder"]))


def test_the_audit_command_reads_a_run_and_says_what_is_wrong(finished, tmp_path, capfd):
    assert audit.main(["audit", f"--workdir={finished[0]}", f"--out={tmp_path}", "--next=3", "--resamples=50"]) == 0
    assert "first_slot_rate" in capfd.readouterr().out
    assert json.loads((tmp_path / "preferences.audit.json").read_text())["scored"]["n"] == 16
    assert len((tmp_path / "next.jsonl").read_text().splitlines()) == 3
    assert "To label next" in (tmp_path / "preferences.audit.html").read_text()
    file = finished[0] / "label" / "preferences.parquet"

    def bad(name, value):
        columns = pq.read_table(file).to_pydict()
        pq.write_table(pa.table(columns | {name: [value] * len(columns["row"])}), tmp_path / f"{name}-{value}.parquet")
        return str(tmp_path / f"{name}-{value}.parquet")

    for arguments, words in (
        (["--labels=/nowhere.parquet"], "/nowhere.parquet does not exist"),
        ([f"--labels={file}", "--by=colour"], "no column 'colour'"),
        ([], "usage:"),
        (["--label=x"], "labels"),
        ([f"--labels={tmp_path}"], "is a folder"),
        ([f"--labels={tmp_path / 'next.jsonl'}"], "is no Parquet file"),
        *((["--labels=" + bad(name, value)], words) for name, value, words in (
            ("prob_a", 1.5, "row 0: prob_a must be from 0 to 1, not 1.5"),
            ("prob_a", float("nan"), "row 0: prob_a must be from 0 to 1, not None"),
            ("human", "yes", "row 0: human must be from 0 to 1, not 'yes'"),
            ("response_a", None, "row 0: response_a must be a text"),
            ("generator_a", "tiny", "must have both generator_a and generator_b"),
        )),
    ):  # fmt: skip
        assert audit.main(["audit", *arguments]) == 2
        error = capfd.readouterr().err
        assert words in error and error.count("\n") == 1
