"""The parts of a reward that need the text of a response: the judge's rating, a verifier, a format, a length."""

import dataclasses
import importlib
import re
from collections.abc import Callable, Sequence

import numpy as np

from rlaif_jax.errors import UserError
from rlaif_jax.judge.score import Judge, load_judge, rate
from rlaif_jax.stages.run import Run

# (prompts, responses) -> one number a response; None or NaN where there is none to be had.
Verifier = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]


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
            parts["verifier"] = config.verifier, _verified(self.verifier, prompts, responses, config.verifier_function)
        if config.format:
            matches = [re.fullmatch(config.format_pattern, text, re.DOTALL) is not None for text in responses]
            parts["format"] = config.format, np.array(matches, float)
        if config.length:
            parts["length"] = config.length, -np.maximum(lengths - config.length_limit, 0.0)
        total = sum((weight * values for weight, values in parts.values()), np.zeros(len(responses)))
        known = {name: values[np.isfinite(values)] for name, (_, values) in parts.items()}
        return total.astype(np.float32), {f"reward/{name}": float(x.mean()) for name, x in known.items() if len(x)}


def load_rewards(run: Run) -> TextRewards:
    """Loads the judge and finds the verifier, where they have a weight. Raises UserError where they can't be."""
    rewards, judge = run.config.rl.rewards, None
    if rewards.judge:
        config = dataclasses.replace(run.config.judge, prompt=rewards.judge_prompt)
        judge = load_judge(config, run.config.seed, run.placement)
    return TextRewards(run, judge, _find(run, rewards.verifier_function) if rewards.verifier else None)


def _find(run: Run, name: str) -> Verifier:
    if name == "ground_truth":
        truth = run.ground_truth()
        if truth is None:
            raise UserError("config.rl.rewards.verifier_function=ground_truth: only embedded data has a ground truth")
        return lambda prompts, responses: list(map(truth.is_good, prompts, responses))
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise UserError(f"config.rl.rewards.verifier_function={name!r} must be module:function ({error})") from error


def _verified(verifier: Verifier, prompts, responses, name: str) -> np.ndarray:
    values = list(verifier(prompts, responses))
    if len(values) != len(responses):
        raise UserError(f"config.rl.rewards.verifier_function={name} returned {len(values)} numbers for "
                        f"{len(responses)} responses")  # fmt: skip
    return np.array([np.nan if value is None else value for value in values], float)
