"""DPO and IPO end at their known optima, on a problem small enough to enumerate every response and every pair.

A one-layer decoder, the stage's own loss and train step; labels are those of the Bradley-Terry model of known scores.
"""

import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from rlaif_jax.stages.preference import PreferenceBatch, loss_of_pairs
from rlaif_jax.stages.preferences import Comparisons
from rlaif_jax.training.sequences import Sequences, response_logprobs
from rlaif_jax.training.state import init_state
from rlaif_jax.training.step import train_step
from tests.helpers import one_device, quickstart_config
from tests.training.test_closed_forms import PROMPT, Problem, divergence, tilted

STEPS = 400


@functools.cache
def problem():
    return Problem(vocab=4, length=2)


def pairs_of(problem):
    """Every pair of responses, and how likely the first is the better one."""
    pairs = list(itertools.combinations(problem.responses, 2))
    better = [1 / (1 + np.exp(problem.scores[b] - problem.scores[a])) for a, b in pairs]
    return pairs, np.float32(better)


def sequences(problem, responses):
    tokens, mask = (np.zeros((len(responses), problem.length), dtype) for dtype in (np.int32, bool))
    for row, response in enumerate(responses):
        tokens[row, : len(response)], mask[row, : len(response)] = response, True
    prompts = np.tile(np.int32(PROMPT), (len(responses), 1))
    return Sequences(prompts, np.ones_like(prompts, bool), tokens, mask)


def trained(problem, loss, beta):
    model, reference = problem.language, problem.reference
    pairs, prob_a = pairs_of(problem)
    a, b = (sequences(problem, [pair[side] for pair in pairs]) for side in (0, 1))
    logprobs = jax.jit(lambda x: response_logprobs(model, reference, x, 1.0).sum(axis=1))
    batch = PreferenceBatch(Comparisons(a, b, prob_a, np.ones_like(prob_a)), logprobs(a), logprobs(b))
    fields = {"loss": loss, "beta": beta, "length_normalise": False}
    config = quickstart_config().preference.__class__(**vars(quickstart_config().preference) | fields)
    optimizer = optax.adam(optax.cosine_decay_schedule(0.01, STEPS))
    step = functools.partial(train_step, loss=functools.partial(loss_of_pairs, model=model, config=config))
    state = init_state(model, reference, optimizer, one_device())

    @jax.jit
    def train(state):
        return jax.lax.scan(lambda state, _: (step(state, batch, optimizer=optimizer)[0], None), state, length=STEPS)

    return problem.probabilities(train(state)[0].params)


def optimum(problem, loss, beta):
    """DPO: reference exp(score / beta). IPO: reference exp(P(better than a uniform response) / beta)."""
    reference = problem.probabilities(problem.reference)
    probs, scores = (np.array([x[response] for response in problem.responses]) for x in (reference, problem.scores))
    values = scores
    if loss == "ipo":
        values = (1 / (1 + np.exp(scores[None, :] - scores[:, None]))).mean(axis=1)
    return dict(zip(problem.responses, tilted(probs, values, beta), strict=True))


@pytest.mark.parametrize(("loss", "beta"), [("dpo", 0.5), pytest.param("ipo", 0.2, marks=pytest.mark.slow)])
def test_the_policy_ends_at_its_own_optimum(loss, beta):
    wanted = optimum(problem(), loss, beta)
    assert divergence(problem().probabilities(problem().reference), wanted) > 0.15
    assert divergence(trained(problem(), loss, beta), wanted) < 0.02
