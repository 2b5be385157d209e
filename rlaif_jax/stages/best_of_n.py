"""Rejection sampling: the policy is tuned on the best of n of its own replies to each prompt, by any reward.

As in "best-of-n" or rejection-sampling fine-tuning (Touvron et al., arXiv 2307.09288, section 3.2.3).
"""

import numpy as np
import pyarrow as pa

from rlaif_jax.data.encoding import prompt_tokens
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.statistics import wilson_ci
from rlaif_jax.files import read_parquet, remove_folder, there, write_json, write_parquet
from rlaif_jax.stages.replies import keep_replies
from rlaif_jax.stages.rewards import load_rewards, load_token_reward_model, score_replies
from rlaif_jax.stages.run import Run, shuffled_batches
from rlaif_jax.stages.sft import packed, tune


def run_best_of_n(run: Run) -> None:
    """Reads the SFT policy and what `rl.rewards` needs; writes `best_of_n/` chosen.parquet, results.json, checkpoints.

    `tied_prompts/best_of_n` is the share of the prompts at which no reply was better than another.
    """
    folder = run.folder("best_of_n")
    file = folder / "chosen.parquet"
    if not there(file):
        write_parquet(file, _choose(run))
    remove_folder(folder / "replies_start")  # the shards of what the file now has
    chosen = read_parquet(file).to_pydict()
    tied, prompts = sum(chosen["tied"]), len(chosen["tied"])
    write_json(folder / "results.json", {"tied_prompts/best_of_n": wilson_ci(tied, prompts)})
    if tied:
        print(f"best_of_n: at {tied} of {prompts} prompts all replies have the same reward: the first is learned, "
              "which nothing speaks for", flush=True)  # fmt: skip
    prompts = prompt_tokens(run.tokenizer(), chosen["prompt"])
    rows = packed(list(zip(prompts, chosen["tokens"], strict=True)), run.config.sft, run.order_seed("packing"))
    tune(run, "best_of_n", run.config.best_of_n, rows, lambda: run.base_params("best_of_n"))


def _choose(run: Run) -> pa.Table:
    """Samples n replies a prompt, scores them, and keeps the best of each.

    Columns: prompt, response, tokens (with end of sequence), reward, mean_reward of the n, and tied: whether all with a
    score have the same. Prompts none of whose replies has a score are left out. Raises UserError where more of the
    replies than `rl.rewards.max_unscored_rate` have none.
    """
    config = run.config.best_of_n
    drawn = shuffled_batches(run.data("train_prompts")["prompt"], 1, run.order_seed("best_of_n"), "best_of_n.prompts")
    prompts = [drawn[i][0] for i in range(config.prompts)]
    shards = run.folder("best_of_n") / "replies_start"
    params, key = run.start_params(), run.key("best_of_n")
    replies = keep_replies(run, params, prompts, config.samples, key, config.sampling, shards, config.commit_every)
    repeated = [prompt for prompt in prompts for _ in range(config.samples)]
    scores = score_replies(run, load_rewards(run), load_token_reward_model(run), replies, repeated)
    scores = scores.reshape(-1, config.samples)
    scored, limit = np.isfinite(scores), run.config.rl.rewards.max_unscored_rate
    if np.mean(~scored) > limit:
        raise UserError(
            f"stage best_of_n: {np.mean(~scored):.1%} of the replies have no score, more than "
            f"config.rl.rewards.max_unscored_rate={limit:g}"
        )
    known = np.where(scored, scores, -np.inf)
    kept = np.flatnonzero(scored.any(axis=1))
    best = known.argmax(axis=1)
    rows = [int(i * config.samples + best[i]) for i in kept]
    tokens, mask = replies.sequences.responses, replies.sequences.response_mask
    return pa.table({
        "prompt": [prompts[i] for i in kept],
        "response": [replies.texts[row] for row in rows],
        "tokens": [tokens[row][mask[row]].tolist() for row in rows],
        "reward": known.max(axis=1)[kept],
        "tied": (known.max(axis=1) == np.where(scored, scores, np.inf).min(axis=1))[kept],
        "mean_reward": np.nanmean(np.where(scored, scores, np.nan)[kept], axis=1),
    })  # fmt: skip
