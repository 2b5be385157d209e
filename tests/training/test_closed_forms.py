"""Each algorithm and KL penalty ends where the mathematics says, on problems small enough to enumerate.

A one-layer decoder, the project's own sampling, rollout and updates; only the scores come from a table.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize

from configs import parts, quickstart
from rlaif_jax.config import parse
from rlaif_jax.models.parameters import decoding_model, decoding_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.sampling.generate import generate
from rlaif_jax.stages.rollouts import joined
from rlaif_jax.training.policy_update import update
from rlaif_jax.training.rollout import RLState, initial_control, make_rollout
from rlaif_jax.training.sequences import Sequences, response_logprobs
from rlaif_jax.training.state import init_state
from tests.helpers import EOS, STOPPING, one_device, random_params, tiny

BATCH, STEPS, GROUP = 320, 300, 8
PROMPT = [2, 3]
TOLERANCE = 0.02  # nats


class Problem:
    """Responses of at most `length` tokens from a small vocabulary, each with a score."""

    def __init__(self, vocab, length):
        self.vocab, self.length = vocab, length
        config = tiny(vocab_size=vocab, num_hidden_layers=1)
        self.language, self.scalar = LanguageModel(config), ScalarModel(config)
        self.reference = place_parameters(self.language, random_params(self.language, seed=3), one_device())
        self.responses = self._enumerate(())
        rng = np.random.default_rng(0)
        self.scores = {response: rng.normal() for response in self.responses}
        self.table = np.zeros((vocab,) * length, np.float32)  # by tokens, 0 after the end
        for response, score in self.scores.items():
            self.table[response + (0,) * (length - len(response))] = score

    def _enumerate(self, prefix):
        if prefix and (prefix[-1] == EOS or len(prefix) == self.length):
            return [prefix]
        return [response for token in range(self.vocab) for response in self._enumerate((*prefix, token))]

    def probabilities(self, params) -> dict:
        rows = len(self.responses)
        tokens, mask = np.zeros((rows, self.length), np.int32), np.zeros((rows, self.length), bool)
        for row, response in enumerate(self.responses):
            tokens[row, : len(response)], mask[row, : len(response)] = response, True
        prompts = np.tile(np.int32(PROMPT), (rows, 1))
        sequences = Sequences(prompts, np.ones_like(prompts, bool), tokens, mask)
        logprobs = jax.jit(response_logprobs, static_argnums=(0, 3))(self.language, params, sequences, 1.0)
        return dict(zip(self.responses, np.exp(np.asarray(logprobs, np.float64).sum(1)), strict=True))


def tilted(probs, values, beta):
    """The maximum of E[value] - beta KL(policy || reference)."""
    weights = probs * np.exp((values - values.max()) / beta)
    return weights / weights.sum()


def reverse_tilted(probs, values, beta):
    """The maximum of E[value] - beta KL(reference || policy): beta * reference / (lambda - value)."""
    excess = lambda top: (beta * probs / (top - values)).sum() - 1  # noqa: E731
    least = values.max()
    return beta * probs / (optimize.brentq(excess, least + beta * probs.min() / 2, least + 2 * beta + 1) - values)


def whole(problem, scale, beta):
    """The optimum of a penalty on whole responses."""
    reference = problem.probabilities(problem.reference)
    probs, values = (np.array([x[response] for response in problem.responses]) for x in (reference, problem.scores))
    return dict(zip(problem.responses, tilted(probs, scale * values, beta), strict=True))


def by_token(problem, scale, beta, rule):
    """Where a penalty on each token by itself ends: it does not see that a token leads to states of more or less KL.

    From the last token backwards, each state's distribution is the optimum for the expected score after each token.
    """
    reference, policy = problem.probabilities(problem.reference), {}

    def total(prefix):
        return sum(p for response, p in reference.items() if response[: len(prefix)] == prefix)

    def solve(prefix):
        """The expected score after a prefix; leaves the responses' probabilities given it in `policy`."""
        if prefix in problem.scores:
            policy[prefix] = 1.0
            return scale * problem.scores[prefix]
        children = [(*prefix, token) for token in range(problem.vocab)]
        values = np.array([solve(child) for child in children])
        probs = rule(np.array([total(child) for child in children]) / total(prefix), values, beta)
        for child, prob in zip(children, probs, strict=True):
            for response in policy:
                if response[: len(child)] == child:
                    policy[response] *= prob
        return probs @ values

    solve(())
    return policy


def divergence(policy, optimum):
    return sum(p * np.log(p / optimum[response]) for response, p in policy.items() if p > 0)


def config_of(algorithm, beta, **kl):
    base = quickstart.get_config()
    parts.rl_losses(base, algorithm)
    base.rl.update(batch_size=BATCH, whiten_advantages=False, group_std=False, penalise_missing_eos=False, epochs=1)
    base.rl.update(minibatches=1, gae_lambda=1.0, clip_value=0.0, aggregation="sequence_sum", value_init="sft")
    if base.rl.advantage != "gae":
        base.rl.group_size = GROUP
    base.rl.kl.update(coef=beta, **kl)
    return parse(base.to_dict()).rl


def make_optimizer():
    return optax.adam(optax.cosine_decay_schedule(0.005, STEPS))


@functools.partial(jax.jit, static_argnames=("problem", "config"))
def train(problem, config, state, table):
    optimizer = make_optimizer()
    prompts = jnp.tile(jnp.int32(PROMPT), (BATCH // config.group_size, 1))
    mask = jnp.ones_like(prompts, bool)

    def iteration(state, key):
        replies = generate(
            decoding_model(problem.language),
            decoding_parameters(problem.language, state.params, one_device()),
            prompts,
            mask,
            key,
            jnp.arange(BATCH),
            STOPPING,
            max_new_tokens=problem.length,
            sampling=config.sampling,
            cache_dtype="float32",
        )
        sampled = joined(prompts, mask, replies.samples, replies.ended, copies=config.group_size)
        scores = table[tuple(sampled.sequences.responses.T)]
        rollout, _, _, metrics = make_rollout(
            problem.language, problem.scalar, state, problem.reference, None, sampled, scores, config=config
        )
        state, _ = update(
            state, rollout, state.control.kl_coef, problem.reference, None, key, model=problem.language,
            scalar_model=problem.scalar, config=config, optimizer=optimizer, value_optimizer=optimizer,
        )  # fmt: skip
        return state, metrics["kl/sequence"]

    return jax.lax.scan(iteration, state, jax.random.split(jax.random.key(0), STEPS))


def trained(problem, config):
    placement = one_device()
    optimizer = make_optimizer()
    policy = init_state(problem.language, problem.reference, optimizer, placement)
    value = None
    if config.advantage == "gae":
        params = place_parameters(problem.scalar, random_params(problem.scalar), placement)
        value = init_state(problem.scalar, params, optimizer, placement)
    state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, initial_control(config), None)
    state, _ = train(problem, config, state, problem.table)
    return problem.probabilities(state.params)


LONG, SHORT = Problem(vocab=4, length=3), Problem(vocab=8, length=1)
SCALE = (GROUP - 1) / GROUP  # a group's mean holds the response itself
REWARD, LOSS = dict(placement="reward", estimator="k1"), dict(placement="loss")
CASES = {
    "ppo, k1 in the reward": (LONG, "ppo", 0.5, REWARD, lambda p, b: whole(p, 1, b)),
    "reinforce, Lee et al.": (LONG, "reinforce", 0.4, REWARD, lambda p, b: whole(p, 1 - b, b)),
    "rloo, k1 in the reward": (LONG, "rloo", 0.5, REWARD, lambda p, b: whole(p, 1, b)),
    "ppo, k2 in the loss": (SHORT, "ppo", 0.5, LOSS | {"estimator": "k2"}, lambda p, b: whole(p, 1, b)),
    "ppo, k3 in the loss": (SHORT, "ppo", 0.5, LOSS | {"estimator": "k3"}, (
        lambda p, b: by_token(p, 1, b, reverse_tilted))),
    "ppo, full in the loss": (SHORT, "ppo", 0.5, LOSS | {"estimator": "full"}, lambda p, b: whole(p, 1, b)),
    "rloo, k2 in the loss": (SHORT, "rloo", 0.5, LOSS | {"estimator": "k2"}, lambda p, b: whole(p, 1, b)),
    "grpo, k2 in the loss": (SHORT, "grpo", 0.5, LOSS | {"estimator": "k2"}, lambda p, b: whole(p, SCALE, b)),
    "grpo, k3 in the loss": (SHORT, "grpo", 0.5, LOSS | {"estimator": "k3"}, (
        lambda p, b: by_token(p, SCALE, b, reverse_tilted))),
    "grpo, k1 in the reward": (LONG, "grpo", 0.5, REWARD, lambda p, b: whole(p, 1, b)),
    "rloo, full in the loss, by token": (LONG, "rloo", 0.5, LOSS | {"estimator": "full"}, (
        lambda p, b: by_token(p, 1, b, tilted))),
    "rloo, k2 in the loss, by token": (LONG, "rloo", 0.5, LOSS | {"estimator": "k2"}, (
        lambda p, b: by_token(p, 1, b, tilted))),
    "rloo, k3 in the loss, by token": (LONG, "rloo", 0.5, LOSS | {"estimator": "k3"}, (
        lambda p, b: by_token(p, 1, b, reverse_tilted))),
}  # fmt: skip


FAST = ("reinforce, Lee et al.", "rloo, k2 in the loss", "grpo, k3 in the loss")
MARKED = [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]


@pytest.mark.parametrize("case", MARKED)
def test_the_policy_ends_at_its_own_optimum(case):
    problem, algorithm, beta, kl, optimum_of = CASES[case]
    optimum = optimum_of(problem, beta)
    assert sum(optimum.values()) == pytest.approx(1)
    assert divergence(problem.probabilities(problem.reference), optimum) > 0.15
    assert divergence(trained(problem, config_of(algorithm, beta, **kl)), optimum) < TOLERANCE


def test_the_optima_tell_penalties_apart():
    ends = [whole(LONG, 1, 0.5), by_token(LONG, 1, 0.5, tilted), by_token(LONG, 1, 0.5, reverse_tilted)]
    ends += [whole(LONG, 0.6, 0.4)]
    for i, one in enumerate(ends):
        for other in ends[i + 1 :]:
            assert divergence(one, other) > TOLERANCE / 2
    for rule in (tilted, reverse_tilted):
        assert divergence(by_token(SHORT, 1, 0.5, rule), by_token(SHORT, SCALE, 0.5, rule)) > 1e-3


def test_configs_are_of_the_arms_they_name():
    assert dataclasses.asdict(config_of("reinforce", 0.3, **REWARD).kl)["interpolate"]
    assert not config_of("rloo", 0.3, **REWARD).kl.interpolate
