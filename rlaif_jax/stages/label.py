"""AI labelling: candidate pairs of the policy that RL begins with, judged in both orders into a label file."""

import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.data import embedded
from rlaif_jax.data.prepare import ABOUT
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.audit import agreement, audit
from rlaif_jax.evaluation.panel import panel_audit
from rlaif_jax.evaluation.principles import comparable, principle_audit, principle_columns
from rlaif_jax.evaluation.statistics import mean_ci
from rlaif_jax.files import read_parquet, remove_folder, there, write_json, write_parquet, write_text
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.reporting.audit_page import render_audit
from rlaif_jax.stages.panel import labeller
from rlaif_jax.stages.principles import Labeller, comparison_principles, draws
from rlaif_jax.stages.replies import keep_replies
from rlaif_jax.stages.run import Run, shuffled_batches


def run_label(run: Run) -> bool:
    """Reads the policy (`Run.start`) and human comparisons; writes `label/` candidates, preferences, manifest, audit.

    Returns whether it is done: one of several workers leaves shards to the others.
    """
    folder, config = run.folder("label"), run.config.label
    if config.source in ("human", "both"):
        _human_labels(run, folder if config.source == "human" else folder / "people")
    if config.source == "human":
        return True
    label = labeller(run, comparison_principles(run, "label"), draws(run))
    if not label(candidate_pairs(run), folder, "label", run.worker):
        return False
    write_json(folder / "audit.json", _audit(run, folder / "preferences.parquet") | _human_audit(run, label))
    return True


def candidate_pairs(run: Run) -> list[Pair]:
    """Two replies of the policy to each prompt, from `label/candidates.parquet`, which is made if missing."""
    folder = run.folder("label")
    candidates = folder / "candidates.parquet"
    if not there(candidates):
        if run.worker.index:
            raise UserError(f"{candidates} is missing: worker 0 makes it, so start that one first")
        write_parquet(candidates, _sample_candidates(run, folder / "candidates"))
    remove_folder(folder / "candidates")  # the shards of what the file now has
    return [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in read_parquet(candidates).to_pylist()]


def _human_labels(run: Run, folder: epath.Path) -> None:
    """The comparisons that people made, the first `label.pairs` of them, as a label file."""
    comparisons = run.data("comparisons")
    names = ("prompt", "response_a", "response_b", "prob_a")
    rows = [dict(zip(names, row, strict=True)) for row in zip(*(comparisons[name] for name in names), strict=True)]
    if len(rows) < run.config.label.pairs:
        print(f"label: {len(rows)} comparisons that people made, not {run.config.label.pairs}: there are no more",
              flush=True)  # fmt: skip
    table = store.human_table(rows[: run.config.label.pairs])
    ended = [True] * table.num_rows
    columns = {name: table[name] for name in names[:3]}
    write_parquet(folder / "candidates.parquet", pa.table(columns | {"ended_a": ended, "ended_b": ended}))
    write_parquet(folder / "preferences.parquet", table)
    manifest = {"judge": "human", "rows": table.num_rows, "status": {"ok": table.num_rows}}
    write_json(folder / "manifest.json", manifest)


def _human_audit(run: Run, label: Labeller) -> dict:
    """The audit of who labels on `label.audit_pairs` comparisons that people made, kept in `label/audit/`."""
    count, folder = run.config.label.audit_pairs, run.folder("label") / "audit"
    if not count:
        return {}
    comparisons = {name: values[:count] for name, values in run.data("comparisons").items()}
    pairs = list(map(Pair, comparisons["prompt"], comparisons["response_a"], comparisons["response_b"]))
    label(pairs, folder, "audit")
    columns = read_parquet(folder / "preferences.parquet").to_pydict()
    columns |= {"human": comparisons["prob_a"]} | {name: comparisons[name] for name in ABOUT}
    write_parquet(folder / "audited.parquet", pa.table(columns))
    config = run.config.evaluation
    figures = audit(columns, config.bootstrap_samples, run.config.seed, ("group", "human_confidence"))
    figures |= panel_audit(columns, config.bootstrap_samples, run.config.seed)
    file = folder / "preferences.parquet"
    by_principle = principle_columns(file, columns)
    figures |= principle_audit(by_principle, config.bootstrap_samples, run.config.seed, comparable(file))
    write_text(folder / "audit.html", render_audit("Comparisons that people made", columns, figures, by_principle))
    return {f"people/{name}": figure for name, figure in figures.items()}


def _sample_candidates(run: Run, shards: epath.Path) -> pa.Table:
    """Two responses to each of `label.pairs` training prompts, drawn in shuffled epochs, and whether each ended."""
    config, drawn = (
        run.config.label,
        shuffled_batches(run.data("train_prompts")["prompt"], 1, run.order_seed("label"), "label"),
    )
    prompts = [drawn[i][0] for i in range(config.pairs)]
    replies = keep_replies(
        run, run.start_params(), prompts, 2, run.key("candidates"), config.sampling, shards, config.commit_every
    )
    columns: dict[str, list] = {"prompt": prompts}
    for i, name in enumerate("ab"):
        columns |= {f"response_{name}": replies.texts[i::2], f"ended_{name}": replies.ended[i::2]}
    return pa.table(columns)


def _audit(run: Run, file: epath.Path) -> dict:
    """The judge's biases on the label file, and its agreement with the ground truth where there is one."""
    config, columns = run.config.evaluation, read_parquet(file).to_pydict()
    figures = audit(columns, config.bootstrap_samples, run.config.seed)
    if truth := run.ground_truth():
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        columns["ground_truth"] = better_responses(truth, rows).tolist()
        rows = [row for row in rows if row["status"] == "ok"]
        prob_a = np.array([row["prob_a"] for row in rows])
        values = ground_truth_agreement(truth, rows, prob_a)
        figures["judge_agreement/ground_truth"] = mean_ci(values, config.bootstrap_samples, run.config.seed)
    figures |= panel_audit(columns, config.bootstrap_samples, run.config.seed)
    by_principle = principle_columns(file, columns)
    figures |= principle_audit(by_principle, config.bootstrap_samples, run.config.seed, comparable(file))
    write_text(file.parent / "audit.html", render_audit("The labels of a run", columns, figures, by_principle))
    return figures


def ground_truth_agreement(truth: embedded.GroundTruth, rows: list[dict], preference_a: np.ndarray) -> np.ndarray:
    """1 where `preference_a` sides with the good reply, 0 where with the other, 0.5 where with neither: [rows] float.

    Only the rows where exactly one reply is good count.
    """
    good_a = better_responses(truth, rows)
    return agreement(preference_a, good_a)[np.isfinite(good_a)]


def better_responses(truth: embedded.GroundTruth, rows: list[dict]) -> np.ndarray:
    """1 where response a alone is good, 0 where b alone is, else NaN: [rows] float."""
    good_a, good_b = (
        np.array([truth.is_good(row["prompt"], row[f"response_{x}"]) for row in rows], float) for x in "ab"
    )
    return np.where(good_a != good_b, good_a, np.nan)
