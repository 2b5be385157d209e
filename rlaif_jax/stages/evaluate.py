"""Evaluation on held-out prompts: trained policies beside the SFT policy, by the judge and by the ground truth."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.evaluation.audit import agreement
from rlaif_jax.evaluation.names import stage_and_iteration
from rlaif_jax.evaluation.statistics import (
    Figure,
    bootstrap_ci,
    distinct_2,
    jackknife_ci,
    mean_ci,
    most_common_share,
)
from rlaif_jax.files import read_json, read_parquet, remove_folder, there, write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import load_judge
from rlaif_jax.losses.kl import k1
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.parallel.processes import to_host
from rlaif_jax.stages.harmlessness import harmlessness
from rlaif_jax.stages.label import ground_truth_agreement
from rlaif_jax.stages.principles import Labeller, by_principles, comparison_principles, evaluation_draws
from rlaif_jax.stages.replies import keep_replies, padded_batches
from rlaif_jax.stages.reward_model import load_reward_model, score_texts
from rlaif_jax.stages.rewards import TextRewardModel, load_text_reward_model
from rlaif_jax.stages.run import Run
from rlaif_jax.training.reward_models import RewardModel, rewards_of
from rlaif_jax.training.sequences import Sequences, response_logprobs

Mean = Callable[[np.ndarray | Sequence[float]], Figure]  # values -> their mean with its interval


def run_evaluation(run: Run) -> None:
    """Reads policies, reward model and labels; writes `eval/samples.parquet`, its judgements and `results.json`.

    Human comparisons, where the data has some to evaluate on, are judged into `eval/human/`.
    """
    folder, prompts, policies = run.folder("eval"), run.data("evaluation_prompts"), run.config.policies
    if not there(folder / "samples.parquet"):
        run.check_kept()  # before hours of sampling
        write_parquet(folder / "samples.parquet", _sample(run, prompts["prompt"]))
    for name in run.config.measured_policies:
        remove_folder(_shards(run, name))
    samples, groups = read_parquet(folder / "samples.parquet").to_pydict(), np.array(prompts["group"])
    mean = functools.partial(mean_ci, resamples=run.config.evaluation.bootstrap_samples, seed=run.config.seed)
    rated = harmlessness(run, samples, groups, mean)  # first, so that one judge at a time is in memory
    label = _labeller(run)
    judged = _judged(run, label, samples, policies[-1], "sft")
    results = _win_rates(f"{policies[-1]}_vs_sft", judged, groups, mean)
    for new, old in [(name, "sft") for name in policies[1:-1]] + [(policies[-1], name) for name in policies[1:-1]]:
        results |= _win_rates(f"{new}_vs_{old}", _judged(run, label, samples, new, old), groups, mean)
    results |= _by_policy(run, samples, groups, mean) | rated
    results |= _agreement(run, samples, judged, mean) | _human_agreement(run, label, mean)
    write_json(folder / "results.json", results)


def _labeller(run: Run) -> Labeller:
    """The judge that evaluates."""
    judge = load_judge(run.config.judge, run.config.seed, run.judge_placement)
    label = functools.partial(store.label, judge)
    if not judge.template.by_principle:
        return label
    return by_principles(run, label, comparison_principles(run, "eval"), evaluation_draws(run))


def _judged(run: Run, label: Callable[..., bool], samples: dict, new: str, old: str) -> list[dict]:
    """The judge's labels of pairs, a being the `new` policy's reply; in `eval/` itself of the last policy and SFT's."""
    last = (new, old) == (run.config.policy_stage, "sft")
    folder = run.folder("eval") / ("" if last else f"{new}_vs_{old}")
    label(list(map(Pair, samples["prompt"], samples[new], samples[old])), folder, "evaluate")
    return read_parquet(folder / "preferences.parquet").to_pylist()


def _sample(run: Run, prompts: list[str]) -> pa.Table:
    """One response of each policy to each prompt, with its reward, length and log-ratio to the SFT policy."""
    model, scalar_model, config = run.language_model(), run.scalar_model(), run.config.evaluation
    sft, by_text = run.trained_params("sft", model), _text_reward_model(run)
    reward_model = None if by_text else _reward_model(run)
    columns: dict[str, list] = {"prompt": prompts}
    key = run.in_round(1).key("eval")
    for name in run.config.measured_policies:
        stage, iteration = stage_and_iteration(name)
        params = sft if name == "sft" else run.trained_params(stage, model, iteration=iteration)
        # One key for all policies, of any round: what they differ in is then their own doing, not the luck of the draw.
        replies = keep_replies(run, params, prompts, 1, key, config.sampling, _shards(run, name), config.commit_every)
        columns[name] = replies.texts
        measured_columns: dict[str, list] = {}
        for rows, batch in padded_batches(replies.sequences, config.batch_size, run.placement):
            measured = measure(model, scalar_model, params, sft, reward_model, batch, config.sampling.temperature)
            for column, values in to_host(measured).items():
                measured_columns.setdefault(f"{column}/{name}", []).extend(values[:rows].astype(float).tolist())
        if by_text:
            measured_columns[f"reward/{name}"] = by_text(prompts, replies.texts, replies.ended)[0].tolist()
        columns |= measured_columns
    return pa.table(columns)


def _reward_model(run: Run) -> RewardModel | None:
    """The reward model's, where the config trains one."""
    return load_reward_model(run) if "reward_model" in run.config.stages else None


def _text_reward_model(run: Run) -> TextRewardModel | None:
    """The same, where it does not read the policy's tokens."""
    own = "reward_model" in run.config.stages and run.config.reward_model.weights
    return load_text_reward_model(run, run, "reward_model") if own else None


def _shards(run: Run, policy: str) -> epath.Path:
    """Where a policy's replies are kept until all are there."""
    return run.folder("eval") / f"replies_{policy}"


@functools.partial(jax.jit, static_argnames=("model", "scalar_model", "temperature"))
def measure(
    model: LanguageModel,
    scalar_model: ScalarModel,
    params,
    reference,
    reward_model,
    sequences: Sequences,
    temperature: float,
) -> dict[str, jax.Array]:
    """Log-ratio to the reference and surprise, both summed over the response (nats), tokens, and reward: [batch] each.

    Both are of the distributions sampled from; at temperature 0, of those at temperature 1. The reward is that of the
    reward model, where there is one.
    """
    logprobs = response_logprobs(model, params, sequences, temperature or 1.0)
    ref_logprobs = response_logprobs(model, reference, sequences, temperature or 1.0)
    kl = jnp.sum(k1(logprobs, ref_logprobs), axis=1)
    measured = {"kl": kl, "length": jnp.sum(sequences.response_mask, axis=1), "surprise": -jnp.sum(logprobs, axis=1)}
    if reward_model is not None:
        measured["reward"] = rewards_of(scalar_model, reward_model, sequences)
    return measured


def wins(judged: list[dict]) -> np.ndarray:
    """1 where a judge prefers response a, 0 where b, 0.5 where they are alike; NaN where it could not tell: [rows]."""
    value = {"ok": lambda row: float(row["prob_a"] > 0.5) + 0.5 * (row["prob_a"] == 0.5), "identical": lambda row: 0.5}
    return np.array([value[row["status"]](row) if row["status"] in value else np.nan for row in judged])


def _win_rates(who: str, judged: list[dict], groups: np.ndarray, mean: Mean) -> dict[str, Figure]:
    """How often the judge prefers response a, over all prompts and by group. who: "rl_vs_sft"."""
    win = wins(judged)
    valid = np.isfinite(win)
    figures = {f"win_rate/{who}": mean(win[valid])}
    for group in filter(None, np.unique(groups)):
        figures[f"win_rate_{group}/{who}"] = mean(win[valid & (groups == group)])
    return figures


def _by_policy(run: Run, samples: dict, groups: np.ndarray, mean: Mean) -> dict[str, Figure]:
    """The figures of each policy's replies."""
    truth, policies = run.ground_truth(), run.config.measured_policies
    figures = {f"kl/{name}_vs_sft": mean(samples[f"kl/{name}"]) for name in policies[1:]}
    for name in policies:
        if truth:
            grades = list(map(truth.grades, samples["prompt"], samples[name]))
            figures |= {f"ground_truth_{grade}/{name}": mean([row[grade] for row in grades]) for grade in grades[0]}
            good = np.array([row["good"] for row in grades])
            for group in filter(None, np.unique(groups)):
                figures[f"ground_truth_good_{group}/{name}"] = mean(good[groups == group])
        if f"reward/{name}" in samples:
            figures[f"reward/{name}"] = mean(samples[f"reward/{name}"])
        figures |= {
            f"response_length/{name}": mean(samples[f"length/{name}"]),
            f"entropy/{name}": _entropy(run, samples[f"surprise/{name}"], samples[f"length/{name}"]),
            f"distinct_2/{name}": jackknife_ci(samples[name], distinct_2),
            f"most_common_reply/{name}": jackknife_ci(samples[name], most_common_share),
        }
    return figures


def _entropy(run: Run, surprise: list[float], lengths: list[float]) -> Figure:
    """Nats a token, from the surprise of what the policy itself has sampled."""
    ratio = lambda total, tokens: total.sum() / tokens.sum()  # noqa: E731
    return bootstrap_ci((surprise, lengths), ratio, run.config.evaluation.bootstrap_samples, run.config.seed)


def _agreement(run: Run, samples: dict, judged: list[dict], mean: Mean) -> dict[str, Figure | bool]:
    """How far judge and reward model agree with the ground truth, where there is one, and with each other."""
    rows = [row for row in judged if row["status"] == "ok"]
    figures: dict[str, Figure | bool] = {"judge_is_training_judge": _is_training_judge(run, judged[0])}
    truth, labels_file = run.ground_truth(), run.folder("label") / "preferences.parquet"
    labels = store.scored(read_parquet(labels_file)).to_pylist() if "label" in run.config.stages else rows
    if truth:
        prob_a = np.array([row["prob_a"] for row in labels])
        figures["judge_agreement/ground_truth"] = mean(ground_truth_agreement(truth, labels, prob_a))
    reward = f"reward/{run.config.policy_stage}"
    if reward not in samples:
        return figures
    margin = np.array(samples[reward]) - np.array(samples["reward/sft"])
    prefers_policy = 0.5 + 0.5 * np.sign(margin[[row["status"] == "ok" for row in judged]])
    if truth:
        figures["reward_model_accuracy/ground_truth"] = mean(ground_truth_agreement(truth, rows, prefers_policy))
    judge_prefers_policy = np.array([row["prob_a"] for row in rows])
    return figures | {"reward_model_accuracy/judge": mean(agreement(prefers_policy, judge_prefers_policy))}


def _is_training_judge(run: Run, judged: dict) -> bool:
    """Whether the weights that evaluate have made labels or given rewards."""
    judged_live = {"rl": run.config.rl.rewards.judge, "best_of_n": run.config.rl.rewards.judge}
    judged_live["preference"] = run.config.preference.online
    if judged_live.get(run.config.policy_stage):  # SL-CAI has no judge
        return True
    if "label" not in run.config.stages:
        return False
    manifest = read_json(run.folder("label") / "manifest.json")
    labellers = manifest.get("members", {"": manifest}).values()  # a panel's, or the one that there is
    return any(all(judged[name] == label.get(name) for name in ("judge", "judge_hash")) for label in labellers)


def _human_agreement(run: Run, label: Labeller, mean: Mean) -> dict[str, Figure]:
    """How far judge and reward model agree with people (AI labeler alignment, arXiv 2309.00267, section 2.4)."""
    comparisons = run.data("evaluation_comparisons")
    if not comparisons["prompt"]:
        return {}
    pairs = list(map(Pair, comparisons["prompt"], comparisons["response_a"], comparisons["response_b"]))
    folder = run.folder("eval") / "human"
    label(pairs, folder, "human pairs")
    judged = read_parquet(folder / "preferences.parquet").to_pydict()
    chosen = np.array(comparisons["prob_a"])
    scored = np.array(judged["status"]) == "ok"
    prob_a = np.array(judged["prob_a"], float)
    figures = {"judge_agreement/human": mean(agreement(prob_a[scored], chosen[scored]))}
    if (params := _reward_model(run)) is not None:
        a, b = score_texts(run, params, comparisons, run.config.evaluation.batch_size)
        figures["reward_model_accuracy/human"] = mean(agreement(0.5 + 0.5 * np.sign(a - b), chosen))
    return figures
