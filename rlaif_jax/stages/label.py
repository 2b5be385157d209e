"""AI labelling: candidate pairs sampled from the SFT policy, judged in both orders into a label file."""

import numpy as np
import pyarrow as pa

from rlaif_jax.data import embedded
from rlaif_jax.evaluation.statistics import mean_ci
from rlaif_jax.files import read_parquet, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.score import Pair, load_judge
from rlaif_jax.progress import progress
from rlaif_jax.stages.run import Run, sample_responses, shuffled_batches


def run_label(run: Run) -> None:
    """Reads the SFT policy; writes `label/candidates.parquet`, `preferences.parquet`, manifest and audit."""
    folder = run.folder("label")
    candidates = folder / "candidates.parquet"
    if not candidates.exists():
        write_parquet(candidates, _sample_candidates(run))
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in read_parquet(candidates).to_pylist()]
    judge = load_judge(run.config.judge, run.config.seed, run.placement)
    table = store.label(judge, pairs, folder, "label")
    write_json(folder / "audit.json", audit(run, table))


def _sample_candidates(run: Run) -> pa.Table:
    """Two responses to each of `label.pairs` training prompts, drawn in shuffled epochs, and whether each ended."""
    config, prompts, eos = run.config.label, run.corpus().train_prompts, run.tokenizer().eos_token_id
    drawn = shuffled_batches([prompt.text for prompt in prompts], 1, run.order_seed("label"))
    doubled = [drawn[i][0] for i in range(config.pairs) for _ in range(2)]
    params = run.trained_params("sft", run.language_model())
    texts: list[str] = []
    ended: list[bool] = []
    key = run.key("candidates")
    batches = sample_responses(run, params, doubled, key, config.temperature, config.sample_batch_size)
    with progress(None, "candidates", total=len(doubled), unit="sample") as bar:
        for batch, sequences in batches:
            texts += batch
            ended += np.any(np.asarray(sequences.responses) == eos, axis=1).tolist()[: len(batch)]
            bar.update(len(batch))
    columns = {"prompt": doubled[::2]}
    for i, name in enumerate("ab"):
        columns |= {f"response_{name}": texts[i::2], f"ended_{name}": ended[i::2]}
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
        "judge_agreement/ground_truth": ground_truth_agreement(run, rows, prob_a),
    }
    samples, seed = run.config.evaluation.bootstrap_samples, run.config.seed
    return {name: mean_ci(values, samples, seed) for name, values in figures.items()}


def ground_truth_agreement(run: Run, rows: list[dict], preference_a: np.ndarray) -> np.ndarray:
    """1 where `preference_a` sides with the good reply, 0 where with the other, 0.5 where with neither: [rows] float.

    Only the rows where exactly one reply is good count.
    """
    corpus = run.corpus()
    prompts = {prompt.text: prompt for prompt in (*corpus.train_prompts, *corpus.evaluation_prompts)}
    agreement = []
    for row, preference in zip(rows, preference_a, strict=True):
        good_a, good_b = (embedded.is_good(prompts[row["prompt"]], row[f"response_{x}"]) for x in "ab")
        if good_a != good_b:
            share_a = float(preference > 0.5) + 0.5 * float(preference == 0.5)
            agreement.append(share_a if good_a else 1 - share_a)
    return np.array(agreement)
