"""Evaluation on held-out prompts: the RL policy beside the SFT policy, by the judge and by the ground truth."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

from rlaif_jax.data import embedded
from rlaif_jax.evaluation.statistics import Figure, distinct_2, jackknife_ci, mean_ci, most_common_share
from rlaif_jax.files import read_parquet, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.score import Pair, load_judge
from rlaif_jax.losses.kl import k1
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.progress import progress
from rlaif_jax.stages.label import ground_truth_agreement
from rlaif_jax.stages.reward_model import centred_params
from rlaif_jax.stages.run import Run, sample_responses
from rlaif_jax.training.sequences import Sequences, response_logprobs, response_rewards

POLICIES = ("sft", "rl")


def run_evaluation(run: Run) -> None:
    """Reads policies, reward model and labels; writes `eval/samples.parquet`, its judgements and `results.json`."""
    folder = run.folder("eval")
    prompts = run.corpus().evaluation_prompts
    if not (folder / "samples.parquet").exists():
        write_parquet(folder / "samples.parquet", _sample(run, [prompt.text for prompt in prompts]))
    samples = read_parquet(folder / "samples.parquet").to_pydict()
    pairs = list(map(Pair, samples["prompt"], samples["rl"], samples["sft"]))
    judge = load_judge(run.config.judge, run.config.seed, run.placement)
    judged = store.label(judge, pairs, folder, "evaluate").to_pylist()
    write_json(folder / "results.json", _results(run, prompts, samples, judged))


def _sample(run: Run, prompts: list[str]) -> pa.Table:
    """One response of each policy to each prompt, with its reward, length and log-ratio to the SFT policy."""
    model, scalar_model = run.language_model(), run.scalar_model()
    params = {name: run.trained_params(name, model) for name in POLICIES}
    reward_params, config = centred_params(run), run.config.evaluation
    columns: dict[str, list] = {"prompt": prompts}
    with progress(None, "eval samples", total=len(POLICIES) * len(prompts), unit="sample") as bar:
        for name in POLICIES:
            texts, numbers = [], []
            batches = sample_responses(
                run, params[name], prompts, run.key(f"eval/{name}"), config.temperature, config.sample_batch_size
            )
            for batch_texts, sequences in batches:
                scores = _measure(
                    model, scalar_model, params[name], params["sft"], reward_params, sequences, config.temperature
                )
                texts += batch_texts
                numbers.append(np.stack([np.asarray(x, float) for x in scores])[:, : len(batch_texts)])
                bar.update(len(batch_texts))
            columns[name] = texts
            for column, values in zip(("reward", "kl", "length"), np.concatenate(numbers, axis=1), strict=True):
                columns[f"{column}/{name}"] = values.tolist()
    return pa.table(columns)


@functools.partial(jax.jit, static_argnames=("model", "scalar_model", "temperature"))
def _measure(
    model: LanguageModel,
    scalar_model: ScalarModel,
    params,
    reference,
    reward_params,
    sequences: Sequences,
    temperature: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reward, log-ratio to the reference summed over the response (nats), and tokens: three [batch] arrays.

    The log-ratio is that of the distributions sampled from; at temperature 0, of those at temperature 1.
    """
    logprobs, _ = response_logprobs(model, params, sequences, temperature or 1.0)
    ref_logprobs, _ = response_logprobs(model, reference, sequences, temperature or 1.0)
    rewards = response_rewards(scalar_model, reward_params, sequences)
    return rewards, jnp.sum(k1(logprobs, ref_logprobs), axis=1), jnp.sum(sequences.response_mask, axis=1)


def _results(run: Run, prompts: tuple[embedded.Prompt, ...], samples: dict, judged: list[dict]) -> dict:
    mean = functools.partial(mean_ci, resamples=run.config.evaluation.bootstrap_samples, seed=run.config.seed)
    unseen = np.array([prompt.unseen_template for prompt in prompts])
    # Equal replies are a tie; pairs that the judge could not score are left out, and `n` says so.
    wins = {"ok": lambda row: float(row["prob_a"] > 0.5) + 0.5 * (row["prob_a"] == 0.5), "identical": lambda row: 0.5}
    win = np.array([wins[row["status"]](row) if row["status"] in wins else np.nan for row in judged])
    valid = np.isfinite(win)

    results: dict[str, Figure | bool] = {
        "win_rate/rl_vs_sft": mean(win[valid]),
        "win_rate_new_combinations/rl_vs_sft": mean(win[valid & ~unseen]),
        "win_rate_unseen_templates/rl_vs_sft": mean(win[valid & unseen]),
        "kl/rl_vs_sft": mean(samples["kl/rl"]),
    }
    for name in POLICIES:
        good = np.array(list(map(embedded.is_good, prompts, samples[name])))
        results |= {
            f"ground_truth_good/{name}": mean(good),
            f"ground_truth_good_new_combinations/{name}": mean(good[~unseen]),
            f"ground_truth_good_unseen_templates/{name}": mean(good[unseen]),
            f"ground_truth_well_mannered/{name}": mean([embedded.well_mannered(reply) for reply in samples[name]]),
            f"ground_truth_answers_prompt/{name}": mean(list(map(embedded.answers_prompt, prompts, samples[name]))),
            f"reward/{name}": mean(samples[f"reward/{name}"]),
            f"response_length/{name}": mean(samples[f"length/{name}"]),
            f"distinct_2/{name}": jackknife_ci(samples[name], distinct_2),
            f"most_common_reply/{name}": jackknife_ci(samples[name], most_common_share),
        }
    return results | _agreement(run, samples, judged, mean)


def _agreement(run: Run, samples: dict, judged: list[dict], mean) -> dict:
    """How far judge and reward model agree with the ground truth and with each other."""
    labels = store.scored(read_parquet(run.folder("label") / "preferences.parquet")).to_pylist()
    scored = [(row, i) for i, row in enumerate(judged) if row["status"] == "ok"]
    rows = [row for row, _ in scored]
    margin = np.array([samples["reward/rl"][i] - samples["reward/sft"][i] for _, i in scored])
    prefers_rl = (1 + np.sign(margin)) / 2
    judge_prefers_rl = np.array([row["prob_a"] > 0.5 for row in rows], bool)
    return {
        "judge_agreement/ground_truth": mean(
            ground_truth_agreement(run, labels, np.array([row["prob_a"] for row in labels]))
        ),
        "reward_model_accuracy/ground_truth": mean(ground_truth_agreement(run, rows, prefers_rl)),
        "reward_model_accuracy/judge": mean(1 - abs(prefers_rl - judge_prefers_rl)),
        "judge_is_training_judge": all(judged[0][name] == labels[0][name] for name in ("judge", "judge_hash")),
    }
