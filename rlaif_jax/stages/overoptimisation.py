"""Over-optimisation: proxy and gold reward of best of n and along RL, by the square root of the KL from RL's start."""

import math
from collections.abc import Callable

import jax
import numpy as np
import pyarrow as pa
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.overoptimisation import (
    best_of_n,
    best_of_n_kl,
    early_stop,
    fit_best_of_n,
    fit_rl,
)
from rlaif_jax.evaluation.statistics import mean_ci
from rlaif_jax.files import read_json_lines, read_parquet, remove_folder, there, write_json, write_parquet, write_text
from rlaif_jax.reporting.overoptimisation_page import render_overoptimisation
from rlaif_jax.stages.replies import Replies, keep_replies
from rlaif_jax.stages.rewards import load_gold, load_rewards, load_token_reward_model, proxy_scores
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.values import keep_values

REWARDS = ("proxy", "gold")  # what the policy follows, and what it is held against


def run_overoptimisation(run: Run) -> None:
    """Reads the policy that RL begins with, the reward model and RL's metrics; writes samples, results and a page.

    Raises UserError where too few replies have both rewards.
    """
    folder = run.folder("overoptimisation")
    if not there(folder / "samples.parquet"):
        write_parquet(folder / "samples.parquet", _sample(run))
    for shards in (_replies_folder(folder), _scores_folder(folder)):
        remove_folder(shards)
    best, best_curve = best_of_n_figures(run, read_parquet(folder / "samples.parquet").to_pydict())
    rl, rl_curve = rl_figures(run, read_json_lines(run.folder("rl") / "metrics.jsonl"))
    write_json(folder / "results.json", best | rl)
    write_text(folder / "curve.html", render_overoptimisation(run.workdir.name, best | rl, best_curve, rl_curve))
    print(f"overoptimisation: {folder / 'curve.html'}", flush=True)


def _replies_folder(folder: epath.Path) -> epath.Path:
    return folder / "replies_start"


def _scores_folder(folder: epath.Path) -> epath.Path:
    return folder / "scores"


def _sample(run: Run) -> pa.Table:
    """`samples` replies of RL's first policy to each held-out prompt, in consecutive rows, with both rewards.

    A reward that a reply does not have is NaN.
    """
    config, folder = run.config.overoptimisation, run.folder("overoptimisation")
    prompts = run.data("evaluation_prompts")["prompt"][: config.prompts or None]
    params = run.start_params()
    copies = math.gcd(config.samples, run.config.sampler.slots)  # replies that are sampled from one reading
    replies = keep_replies(
        run, params, np.repeat(prompts, config.samples // copies).tolist(), copies, run.key("overoptimisation"),
        run.config.rl.sampling, _replies_folder(folder), config.commit_every,
    )  # fmt: skip
    repeated = np.repeat(prompts, config.samples).tolist()
    scores = keep_values(
        _scorer(run, repeated, replies), REWARDS, len(repeated), _scores_folder(folder), config.commit_every
    )
    return pa.table({"prompt": repeated, "response": replies.texts} | scores)


def _scorer(run: Run, prompts: list[str], replies: Replies) -> Callable[[list[int]], dict[str, np.ndarray]]:
    """What gives rows their proxy (as RL's reward/mean: not normalised, without KL) and gold reward: [n] float each."""
    text_rewards, gold, reward_model = load_rewards(run), load_gold(run), load_token_reward_model(run)

    def score_replies(rows: list[int]) -> dict[str, np.ndarray]:
        asked, texts, ended = ([of[row] for row in rows] for of in (prompts, replies.texts, replies.ended))
        some = Replies(texts, ended, jax.tree.map(lambda x: x[rows], replies.sequences))
        batch_size = run.config.overoptimisation.batch_size
        proxy = proxy_scores(run, text_rewards, reward_model, some, asked, batch_size)
        return {"proxy": proxy, "gold": gold(asked, texts, ended)}

    return score_replies


def best_of_n_figures(run: Run, samples: dict) -> tuple[dict, dict]:
    """Figures of best of n over n = 1, and what is drawn of them. A prompt counts where all its replies have rewards.

    Raises UserError where fewer than two prompts do.
    """
    config, seed = run.config.overoptimisation, run.config.seed
    rewards = {name: np.array(samples[name]).reshape(-1, config.samples) for name in REWARDS}
    whole = np.isfinite(rewards["proxy"]).all(axis=1) & np.isfinite(rewards["gold"]).all(axis=1)
    if whole.sum() < 2:
        raise UserError(
            f"stage overoptimisation: {whole.sum()} of {len(whole)} prompts have a proxy and a gold reward for each of "
            f"their {config.samples} replies: see samples.parquet in {run.folder('overoptimisation')}, and what "
            "config.rl.rewards and config.rl.gold make of it"
        )
    rewards = {name: values[whole] for name, values in rewards.items()}
    numbers, distances = config.numbers, np.sqrt([best_of_n_kl(n) for n in config.numbers])
    figures: dict = {"best_of_n/prompts": int(whole.sum()), "best_of_n/prompts_unscored": int((~whole).sum())}
    curve = {"distances": distances}
    for name, values in rewards.items():
        chosen = [best_of_n(rewards["proxy"], values, n) for n in numbers]
        gains = np.stack(chosen, axis=1) - values.mean(axis=1, keepdims=True)
        points = [mean_ci(gains[:, i], config.bootstrap_samples, seed) for i in range(len(numbers))]
        fit = fit_best_of_n(distances, gains, config.bootstrap_samples, seed)
        figures |= {f"best_of_n/{name}/{n}": point for n, point in zip(numbers, points, strict=True)}
        figures |= {f"best_of_n/{name}/{part}": value for part, value in fit.items()}
        curve[name] = {"points": points, "fit": fit}
    return figures, curve


def rl_figures(run: Run, lines: list[dict]) -> tuple[dict, dict]:
    """Figures of RL over its first iteration, and what is drawn of them. Iterations without all values are left out."""
    config, names = run.config.overoptimisation, ("kl/sequence", "reward/mean", "gold/mean")
    lines = [line for line in lines if None not in [line.get(name) for name in names]]
    kl = np.array([line["kl/sequence"] for line in lines])
    distances = np.sqrt(np.maximum(kl, 0))  # an estimate near 0 can fall below it
    figures: dict = {"rl/iterations": len(lines)}
    curve = {"distances": distances}
    for name, metric in (("proxy", "reward"), ("gold", "gold")):
        values = np.array([line[f"{metric}/mean"] for line in lines])
        scored = [run.config.rl.batch_size * (1 - line[f"{metric}/unscored"]) for line in lines]
        errors = np.array([line[f"{metric}/std"] for line in lines]) / np.sqrt(scored)
        gains = values - values[:1]
        fit = fit_rl(distances, gains, config.bootstrap_samples, run.config.seed)
        figures |= {f"rl/{name}/{part}": value for part, value in fit.items()}
        curve[name] = {"points": _normal(gains, errors), "fit": fit}
    stop = early_stop(kl, curve["gold"]["fit"])
    if stop["early_stop"] is not None:
        stop["early_stop"] = int(lines[stop["early_stop"]]["step"])
    return figures | {f"rl/{name}": value for name, value in stop.items()}, curve


def _normal(values: np.ndarray, errors: np.ndarray) -> list[dict]:
    """Means over a batch, with the interval that their standard errors make."""
    return [
        {"mean": float(value), "ci95": [float(value - 1.96 * error), float(value + 1.96 * error)]}
        for value, error in zip(values, errors, strict=True)
    ]
