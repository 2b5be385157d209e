"""A small finished run, written file by file, for the tests of the report."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rlaif_jax.data import embedded
from tests.helpers import STAGES

DATA = {
    "evaluation_combinations": 6,
    "evaluation_unseen_templates": 2,
    "train_prompts": 40,
    "demonstrations_per_prompt": 1,
    "polite_share": 0.5,
    "answering_share": 1.0,
    "red_team": 0,
    "red_team_evaluation": 0,
    "complying_share": 0.5,
    "evasive_share": 0.25,
}
HOSTILE = "<script>alert(1)</script> and </script><img src=x onerror=alert(2)> {{ 7 * 7 }} \" ' & \u202e"
CURVES = {
    "sft": ("loss",),
    "reward_model": ("loss", "accuracy", "margin"),
    "rl": ("reward/mean", "kl/sequence", "entropy", "clip_fraction", "response_length", "loss", "value/loss"),
}


def figure(mean: float, low: float, high: float, n: int = 96) -> dict:
    return {"mean": mean, "ci95": [low, high], "n": n}


def figures(**changes) -> dict:
    """The results of a run in which RL wins and nothing is wrong; `changes` replace figures, None leaves one out."""
    results = {
        "win_rate/rl_vs_sft": figure(0.8, 0.72, 0.88),
        "kl/rl_vs_sft": figure(1.27, 1.0, 1.55),
        "ground_truth_good/sft": figure(0.3, 0.22, 0.4),
        "ground_truth_good/rl": figure(0.6, 0.5, 0.69),
        "reward/sft": figure(0.01, -0.04, 0.06),
        "reward/rl": figure(0.25, 0.22, 0.27),
        "response_length/sft": figure(23.0, 22.4, 23.5),
        "response_length/rl": figure(22.4, 21.9, 22.8),
        "distinct_2/sft": figure(0.31, 0.29, 0.33),
        "distinct_2/rl": figure(0.29, 0.27, 0.31),
        "most_common_reply/sft": figure(0.0104, 0.01, 0.011),
        "most_common_reply/rl": figure(0.0104, 0.01, 0.011),
        "judge_agreement/ground_truth": figure(0.85, 0.76, 0.92, 84),
        "judge_is_training_judge": True,
    }
    return {name: value for name, value in (results | changes).items() if value is not None}


def write_run(folder: Path, results: dict | None = None, config: dict | None = None, hostile: str = HOSTILE) -> Path:
    """Writes the run; every other prompt and reply is `hostile`."""
    config = {
        "seed": 0,
        "stages": STAGES,
        "judge.shuffle_weights": False,
        "judge.max_failure_rate": 0.02,
        **(config or {}),
    }
    config |= {f"data.embedded.{name}": value for name, value in DATA.items()}
    config |= {"data.evaluation_prompts.kind": "embedded", "reward_model.calibrate": True}
    record = {"config": config, "packages": {"jax": "0.10.2"}, "python": "3.11.7", "devices": ["cpu"] * 2}
    write(folder / "config.json", record | {"git_commit": None})
    for stage in STAGES:
        write(folder / stage / "stage.json", {"done": True, "config": {}})
    for stage, names in CURVES.items():
        lines = [{"step": i} | {name: 1 / (i + k + 1) for k, name in enumerate(names)} for i in range(12)]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    corpus = embedded.generate(embedded.EmbeddedConfig(**DATA), 0)
    _write_labels(folder / "label", corpus)
    validation = {"validation_loss": 0.66, "validation_accuracy": 0.875, "validation_pairs": 48}
    write(folder / "reward_model" / "normalisation.json", {"mean": 0.1, "std": 1.0, "n": 80, "scale": 0.9} | validation)
    _write_evaluation(folder / "eval", corpus, hostile)
    write(folder / "eval" / "results.json", results or figures())
    return folder


def write(file: Path, value) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(value))


def _write_labels(folder: Path, corpus: embedded.Corpus) -> None:
    # The demonstrations are polite and good or rude and not: the judge sees most of it, and is too unsure.
    rows = []
    for i, item in enumerate(corpus.demonstrations):
        probability = 0.6 if item.polite and i % 7 else 0.4
        rows.append(_judgement(item.prompt.text, item.reply, "Get lost.", probability))
    pq.write_table(pa.Table.from_pylist(rows), folder / "preferences.parquet")
    write(folder / "manifest.json", {"judge": "package:x", "rows": len(rows), "status": {"ok": len(rows)}})
    write(folder / "audit.json", {"first_slot_rate": figure(0.4, 0.3, 0.5), "judge_agreement/ground_truth": figure(
        0.85, 0.76, 0.92, 84)})  # fmt: skip


def _write_evaluation(folder: Path, corpus: embedded.Corpus, hostile: str) -> None:
    samples, judged = [], []
    for i, prompt in enumerate(corpus.evaluation_prompts):
        answer = embedded.KINDS[prompt.kind].answers[0].format(t=prompt.topic)
        text = hostile if i == 1 else prompt.text
        sft, rl = (hostile if i % 2 else "Get lost."), (hostile if i % 2 else f"Thank you! {answer}")
        sample = {"prompt": text, "sft": sft, "rl": rl}
        for name in ("sft", "rl"):
            sample |= {f"reward/{name}": 0.1, f"kl/{name}": 0.5, f"length/{name}": 9.0}
        samples.append(sample)
        judged.append(_judgement(text, rl, sft, None if sft == rl else 0.7, "identical" if sft == rl else "ok"))
    pq.write_table(pa.Table.from_pylist(samples), folder / "samples.parquet")
    pq.write_table(pa.Table.from_pylist(judged), folder / "preferences.parquet")
    status = {"ok": len(judged) // 2, "identical": len(judged) // 2}
    write(folder / "manifest.json", {"judge": "package:x", "rows": len(judged), "status": status})


def _judgement(prompt: str, a: str, b: str, probability: float | None, status: str = "ok") -> dict:
    row = {"prompt": prompt, "response_a": a, "response_b": b, "status": status}
    return row | dict.fromkeys(("prob_a", "prob_a_forward", "prob_a_reversed"), probability)
