"""From the log-probabilities of a judge's answers to a label, by each method; pure NumPy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rlaif_jax.judge.prompts import Template
from rlaif_jax.sampling.trees import Tokens


class Verdict(NamedTuple):
    """What a judge says of a pair. Probabilities are those of response a being the better one."""

    prob_a: float
    prob_a_forward: float | None  # with a in slot 1; None where there are no slots
    prob_a_reversed: float | None  # with a in slot 2
    prob_a_axes: list[float] | None  # in the order of `Template.axes`, where there are several
    rating_a: float | None  # in [-1, 1], where each response is rated
    rating_b: float | None
    answer_mass: float  # how likely the judge gives one of the answers at all


def verdict(template: Template, logprobs: np.ndarray) -> Verdict | None:
    """The verdict on one pair; None where a probability is not finite.

    logprobs: [2, samples, questions, choices] float64: of every choice, after each rationale (one sample without),
    for both orders, or for both responses where the method is "rating".
    """
    if np.any(np.isnan(logprobs)) or not np.all(np.isfinite(logprobs.max(axis=-1))):
        return None
    answer_mass = float(np.exp(logprobs).sum(axis=-1).mean())
    # Distributions are averaged over rationales, not votes (arXiv 2309.00267, section 2.1.2).
    probabilities = normalise(logprobs).mean(axis=1)  # [2, questions, choices]
    if template.method == "rating":
        a, b = probabilities[:, 0]
        ratings = [rating(distribution) for distribution in (a, b)]
        return Verdict(prob_higher(a, b), None, None, None, *ratings, answer_mass)
    first, second = probabilities[:, :, 0]  # how likely slot 1 is named, by question
    forward, backward = (1 - first, second) if template.inverted else (first, 1 - second)
    axes = (forward + backward) / 2
    several = axes.tolist() if len(axes) > 1 else None
    return Verdict(float(axes.mean()), float(forward.mean()), float(backward.mean()), several, None, None, answer_mass)


def normalise(logprobs: np.ndarray) -> np.ndarray:
    """The softmax over the choices alone (arXiv 2309.00267, section 2.1), along the last axis."""
    weights = np.exp(logprobs - logprobs.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def rating(distribution: np.ndarray) -> float:
    """The mean score, the lowest being -1 and the highest 1 (direct RLAIF, arXiv 2309.00267, section 2.2.2).

    distribution: [scores], the lowest first, evenly spaced.
    """
    return float(np.linspace(-1, 1, len(distribution)) @ distribution)


def prob_higher(a: np.ndarray, b: np.ndarray) -> float:
    """How likely a score drawn from `a` [scores] is higher than one from `b`, equal ones counted half."""
    return float(a @ (np.cumsum(b) - b / 2))


def exclusive(logprobs: np.ndarray, choices: Sequence[Tokens]) -> np.ndarray:
    """Log-probs of answers that are exactly a choice, where one choice is the beginning of another ("1", "10").

    logprobs: [..., choices], of texts that begin with each choice; the same shape is returned.
    """
    longer = [[j for j, other in enumerate(choices) if _begins(other, choice)] for choice in choices]
    result = logprobs.copy()
    for i, extensions in enumerate(longer):
        nearest = [j for j in extensions if not any(j in longer[k] for k in extensions)]
        if nearest:
            left = np.exp(logprobs[..., i]) - np.exp(logprobs[..., nearest]).sum(axis=-1)
            with np.errstate(divide="ignore"):
                result[..., i] = np.log(np.maximum(left, 0))  # rounding can leave less than nothing
    return result


def _begins(text: Tokens, beginning: Tokens) -> bool:
    return len(text) > len(beginning) and tuple(text[: len(beginning)]) == tuple(beginning)
