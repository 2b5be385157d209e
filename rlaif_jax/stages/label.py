"""AI labelling: candidate pairs sampled from the SFT policy, judged in both orders into a label file."""

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.data import embedded
from rlaif_jax.evaluation.statistics import mean_ci
from rlaif_jax.files import read_parquet, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.score import Pair, load_judge
from rlaif_jax.stages.replies import keep_replies
from rlaif_jax.stages.run import Run, shuffled_batches


def run_label(run: Run) -> None:
    """Reads the SFT policy, or human comparisons; writes `label/` candidates, preferences, manifest and audit."""
    folder = run.folder("label")
    candidates = folder / "candidates.parquet"
    if run.config.label.source == "human":
        _human_labels(run, candidates)
        return
    if not candidates.exists():
        write_parquet(candidates, _sample_candidates(run, folder / "candidates"))
    (folder / "candidates").rmtree(missing_ok=True)  # the shards of what the file now has
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in read_parquet(candidates).to_pylist()]
    judge = load_judge(run.config.judge, run.config.seed, run.placement)
    table = store.label(judge, pairs, folder, "label")
    write_json(folder / "audit.json", audit(run, table))


def _human_labels(run: Run, candidates: epath.Path) -> None:
    """The comparisons that people made, the first `label.pairs` of them, as a label file."""
    comparisons = run.data("comparisons")
    rows = [dict(zip(comparisons, row, strict=True)) for row in zip(*comparisons.values(), strict=True)]
    table = store.human_table(rows[: run.config.label.pairs])
    ended = [True] * table.num_rows
    columns = {name: table[name] for name in ("prompt", "response_a", "response_b")}
    write_parquet(candidates, pa.table(columns | {"ended_a": ended, "ended_b": ended}))
    write_parquet(candidates.parent / "preferences.parquet", table)
    manifest = {"judge": "human", "rows": table.num_rows, "status": {"ok": table.num_rows}}
    write_json(candidates.parent / "manifest.json", manifest)


def _sample_candidates(run: Run, shards: epath.Path) -> pa.Table:
    """Two responses to each of `label.pairs` training prompts, drawn in shuffled epochs, and whether each ended."""
    config, drawn = run.config.label, shuffled_batches(run.data("train_prompts")["prompt"], 1, run.order_seed("label"))
    prompts = [drawn[i][0] for i in range(config.pairs)]
    params = run.trained_params("sft", run.language_model())
    replies = keep_replies(run, params, prompts, 2, run.key("candidates"), config.sampling, shards, config.commit_every)
    columns: dict[str, list] = {"prompt": prompts}
    for i, name in enumerate("ab"):
        columns |= {f"response_{name}": replies.texts[i::2], f"ended_{name}": replies.ended[i::2]}
    return pa.table(columns)


def audit(run: Run, table: pa.Table) -> dict:
    """The judge's slot preference, its taste for length and its agreement with the ground truth, with 95 % CIs."""
    rows = store.scored(table).to_pylist()
    forward = np.array([row["prob_a_forward"] for row in rows])
    reversed_ = np.array([row["prob_a_reversed"] for row in rows])
    prob_a = np.array([row["prob_a"] for row in rows])
    longer = np.array([len(row["response_a"]) - len(row["response_b"]) for row in rows])
    figures = {
        "first_slot_rate": np.concatenate([forward > 0.5, reversed_ < 0.5]),  # a sits in slot 2 when reversed
        "same_slot_in_both_orders": (forward > 0.5) != (reversed_ > 0.5),
        "longer_preferred": (prob_a > 0.5)[longer != 0] == (longer > 0)[longer != 0],
    }
    if truth := run.ground_truth():
        figures["judge_agreement/ground_truth"] = ground_truth_agreement(truth, rows, prob_a)
    samples, seed = run.config.evaluation.bootstrap_samples, run.config.seed
    return {name: mean_ci(values, samples, seed) for name, values in figures.items()}


def ground_truth_agreement(truth: embedded.GroundTruth, rows: list[dict], preference_a: np.ndarray) -> np.ndarray:
    """1 where `preference_a` sides with the good reply, 0 where with the other, 0.5 where with neither: [rows] float.

    Only the rows where exactly one reply is good count.
    """
    good_a = np.array([truth.is_good(row["prompt"], row["response_a"]) for row in rows], bool)
    good_b = np.array([truth.is_good(row["prompt"], row["response_b"]) for row in rows], bool)
    return agreement(preference_a, good_a.astype(float))[good_a != good_b]


def agreement(preference_a: np.ndarray, label_a: np.ndarray) -> np.ndarray:
    """1 where both are on one side of 0.5, 0 where they are not, 0.5 where `preference_a` is on none: [rows] float."""
    return (1 + np.sign(preference_a - 0.5) * np.sign(label_a - 0.5)) / 2
