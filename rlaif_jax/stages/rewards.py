"""The parts of a reward that need the text of a response: the judge's rating, a verifier, a format, a length."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np

from rlaif_jax.judge.score import Judge, load_judge, rate
from rlaif_jax.stages.replies import Replies
from rlaif_jax.stages.reward_model import score
from rlaif_jax.stages.run import Run
from rlaif_jax.stages.verifier import Verifier, find_verifier, verified
from rlaif_jax.training.reward_models import RewardModel


@dataclasses.dataclass(frozen=True)
class TextRewards:
    """What is loaded to score texts."""

    run: Run
    judge: Judge | None
    verifier: Verifier | None

    @property
    def needed(self) -> bool:
        """Whether any part of the reward needs the texts."""
        rewards = self.run.config.rl.rewards
        return any((rewards.judge, rewards.verifier, rewards.format, rewards.length))

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], lengths: np.ndarray
    ) -> tuple[np.ndarray, dict[str, float]]:
        """The weighted sum of the parts, [n] float32 with NaN where one of them is missing, and the mean of each.

        lengths: [n] tokens of each response.
        """
        config = self.run.config.rl.rewards
        parts: dict[str, tuple[float, np.ndarray]] = {}
        if self.judge:
            parts["judge"] = config.judge, rate(self.judge, prompts, responses)
        if self.verifier:
            parts["verifier"] = config.verifier, verified(self.verifier, prompts, responses, config.verifier_function)
        if config.format:
            matches = [re.fullmatch(config.format_pattern, text, re.DOTALL) is not None for text in responses]
            parts["format"] = config.format, np.array(matches, float)
        if config.length:
            parts["length"] = config.length, -np.maximum(lengths - config.length_limit, 0.0)
        total = sum((weight * values for weight, values in parts.values()), np.zeros(len(responses)))
        known = {name: values[np.isfinite(values)] for name, (_, values) in parts.items()}
        return total.astype(np.float32), {f"reward/{name}": float(x.mean()) for name, x in known.items() if len(x)}


def score_replies(
    run: Run, rewards: TextRewards, reward_model: RewardModel | None, replies: Replies, prompts: list[str]
):
    """The score of each reply by all parts of `rl.rewards`, as RL would have it before normalisation: [n] float64.

    prompts: one a reply. reward_model: None where it has no part. NaN where a part is missing.
    """
    config, lengths = run.config.rl, replies.sequences.response_mask.sum(axis=1)
    scores, _ = rewards(prompts, replies.texts, lengths)
    scores = scores.astype(float)
    if reward_model is not None:
        batch_size = run.config.evaluation.batch_size
        scores += config.rewards.reward_model * score(run, reward_model, replies.sequences, batch_size)
    if config.penalise_missing_eos:
        scores = np.where(np.array(replies.ended) | np.isnan(scores), scores, config.missing_eos_reward)
    return scores


def load_rewards(run: Run) -> TextRewards:
    """Loads the judge and finds the verifier, where they have a weight. Raises UserError where they can't be."""
    rewards, judge = run.config.rl.rewards, None
    if rewards.judge:
        config = dataclasses.replace(run.config.judge, prompt=rewards.judge_prompt)
        judge = load_judge(config, run.config.seed, run.placement)
    return TextRewards(run, judge, _verifier(run) if rewards.verifier else None)


def _verifier(run: Run) -> Verifier:
    if run.config.rl.rewards.verifier_function != "ground_truth":
        return find_verifier(run.config.rl.rewards.verifier_function)
    truth = run.ground_truth()
    return lambda prompts, responses: list(map(truth.is_good, prompts, responses))
