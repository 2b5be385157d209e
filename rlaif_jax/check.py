"""Checks the numerics of a config's own policy: python -m rlaif_jax.check --config=configs/NAME.py[:ARM]"""

import dataclasses
import functools
import math
import sys
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags
from etils import epath
from rich.console import Console
from rich.table import Table

from rlaif_jax.commands import parse_flags, run_command
from rlaif_jax.config import RLConfig, parse
from rlaif_jax.data.packing import lay_out, pack
from rlaif_jax.errors import UserError
from rlaif_jax.losses.advantages import gae
from rlaif_jax.models.parameters import (
    Placement,
    decoding_model,
    decoding_parameters,
    init_parameters,
    place_parameters,
)
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import AxesConfig, batch_ways, make_mesh, shard_batch
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import Stopping
from rlaif_jax.stages.run import Run, open_run, with_seed
from rlaif_jax.training.packed import sft_loss
from rlaif_jax.training.policy_update import policy_loss
from rlaif_jax.training.rollout import RLState, Sampled, initial_control, make_rollout
from rlaif_jax.training.sequences import Sequences, response_logprobs
from rlaif_jax.training.state import new_state
from rlaif_jax.training.step import train_step

_USAGE = "usage: python -m rlaif_jax.check --config=configs/NAME.py[:ARM]"
_HELP = """  --config.FIELD=VALUE   overrides a field of the config, e.g. --config.policy.weights=FILE

Exit status 1 if a check fails. Nothing is written."""
# Of log-probs in nats, and of gradients by their norm: what rounding alone may do.
_TOLERANCES = {"float32": (1e-4, 1e-4), "bfloat16": (0.25, 0.05), "float16": (0.1, 0.02)}
_PROMPT, _RESPONSE, _PADDING, _EXAMPLES = 24, 16, 8, 16  # tokens, and rows of SFT


class Check(NamedTuple):
    """One comparison: what was measured, and the most that it may be; None where there was nothing to compare."""

    name: str
    measured: float | None
    limit: float
    note: str

    @property
    def passed(self) -> bool:
        """Whether it holds; NaN does not."""
        return self.measured is None or self.measured <= self.limit


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    options = parse_flags(argv, _USAGE, flags.FlagValues(), default_config="configs/quickstart.py")
    if processes.count() > 1:
        raise UserError("rlaif_jax.check is for one process: give it as many devices as the mesh wants")
    run = open_run(with_seed(parse(options.config.to_dict()), None), epath.Path("."))
    with jax.set_mesh(run.placement.mesh):
        checks = list(run_checks(run))
    _print(run, checks)
    return 0 if all(check.passed for check in checks) else 1


def run_checks(run: Run) -> Iterator[Check]:
    """All checks on the policy that the config begins with, its mesh, its dtypes and its RL settings."""
    model, dtype = run.language_model(), run.model_config().dtype
    nats, share = _TOLERANCES[dtype]
    cache = run.config.sampler.cache_dtype or dtype
    params = run.base_params("sft")
    config, sampled = _sample(run, params)
    yield Check(
        "sampler = trainer",
        _largest(sampled.logprobs - _logprobs(run, params, sampled.sequences)),
        nats if cache == dtype else max(nats, _TOLERANCES["bfloat16"][0] if cache == "bfloat16" else 1.0),
        f"log-probs by decoding with a {cache} cache, and by one full pass, nats",
    )
    padded = _more_padding(run, sampled.sequences)
    yield Check(
        "padding",
        _largest(_logprobs(run, params, padded) - _logprobs(run, params, sampled.sequences)),
        nats,
        f"log-probs with {_PADDING} more tokens of padding before each prompt, nats",
    )
    packed, apart = _sft_rows(run)
    one = _gradient(run.placement, model, params, apart)
    yield Check("packing", _distance(one, _gradient(run.placement, model, params, packed)), share,
                "gradient of examples that share rows, and of one example a row")  # fmt: skip
    for parts in (2, 4):
        other = _gradient(run.placement, model, params, apart, parts)
        yield Check(
            f"accumulation over {parts}", _distance(one, other), share, "gradient in micro-batches, and at once"
        )
    yield _sharding(run, params, apart, one, share)
    yield from _rollout_checks(run, config, params, sampled, nats)
    yield _gae_check(config)


def _sample(run: Run, params) -> tuple[RLConfig, Sampled]:
    """Ragged responses to ragged random prompts, and the RL config for as many."""
    devices, rl, policy = _devices(run), run.config.rl, run.config.policy
    rows = math.lcm(4 * devices, rl.group_size * devices)
    config = dataclasses.replace(rl, batch_size=rows, minibatches=1, micro_batches=1)
    model, rng = run.language_model(), np.random.default_rng(run.config.seed)
    prompt, response = min(_PROMPT, policy.max_prompt_length), min(_RESPONSE, policy.max_response_length)
    mask = np.arange(prompt) >= rng.integers(0, prompt, (rows, 1))
    tokens = (rng.integers(0, model.config.vocab_size, mask.shape) * mask).astype(np.int32)
    kept = np.arange(response) < rng.integers(1, response + 1, (rows, 1))
    arrays = shard_batch((tokens, mask, np.arange(rows, dtype=np.int32), kept), run.placement.mesh)
    replies = generate(
        decoding_model(model),
        decoding_parameters(model, params, run.placement),
        *arrays[:2],
        run.key("check"),
        arrays[2],
        Stopping((), (), jnp.zeros((0, 0), jnp.uint8), jnp.zeros(0, jnp.int32)),
        max_new_tokens=response,
        sampling=config.sampling,
        cache_dtype=run.config.sampler.cache_dtype or model.config.dtype,
    ).samples
    sequences = Sequences(*arrays[:2], replies.tokens * arrays[3], arrays[3])
    return config, Sampled(sequences, replies.logprobs * arrays[3], jnp.any(arrays[3], axis=1))


def _devices(run: Run) -> int:
    return batch_ways(run.placement.mesh)


def _logprobs(run: Run, params, sequences: Sequences) -> jax.Array:
    apply = jax.jit(response_logprobs, static_argnums=(0, 3))
    return apply(run.language_model(), params, sequences, run.config.rl.sampling.temperature)


def _more_padding(run: Run, sequences: Sequences) -> Sequences:
    prompts, mask = (np.pad(np.asarray(x), ((0, 0), (_PADDING, 0))) for x in (sequences.prompts, sequences.prompt_mask))
    prompts, mask = shard_batch((prompts, mask), run.placement.mesh)
    return Sequences(prompts, mask, sequences.responses, sequences.response_mask)


def _sft_rows(run: Run):
    """The same random examples sharing rows, and one a row, in as many rows."""
    rng, rows = np.random.default_rng(run.config.seed), math.lcm(_EXAMPLES, 4 * _devices(run))
    vocab, length = run.model_config().vocab_size, run.config.sft.row_length

    def tokens(most: int) -> list[int]:
        return rng.integers(0, vocab, rng.integers(1, max(min(most, length // 2), 2))).tolist()

    examples = [(tokens(_PROMPT), tokens(_RESPONSE)) for _ in range(rows)]
    shared = pack([len(prompt) + len(completion) for prompt, completion in examples], length)
    together = [[examples[i] for i in row] for row in shared] + [[]] * (rows - len(shared))
    return lay_out(together, length), lay_out([[example] for example in examples], length)


def _gradient(placement: Placement, model, params, batch, parts: int = 1):
    """The gradient of the SFT loss, as the parameters' change under gradient descent at rate 1."""
    descent = optax.sgd(1.0)

    @jax.jit
    def step(params, batch):
        state, _ = train_step(
            new_state(params, descent), batch, functools.partial(sft_loss, model=model), descent, parts
        )
        return jax.tree.map(jnp.subtract, params, state.params)

    with jax.set_mesh(placement.mesh):
        return step(params, shard_batch(batch, placement.mesh))


def _sharding(run: Run, params, batch, expected, limit: float) -> Check:
    name, note = "sharding", f"gradient on {run.placement.mesh.size} devices, and on one"
    if run.placement.mesh.size == 1:
        return Check(name, None, limit, "one device: nothing to compare")
    one = AxesConfig(data=1, fsdp=1, tensor=1, sequence=1, replicated=())
    alone, model = Placement(make_mesh(one, jax.local_devices()[:1])), run.language_model()
    placed = place_parameters(model, jax.device_get(params), alone)
    return Check(name, _distance(expected, _gradient(alone, model, placed, batch)), limit, note)


def _rollout_checks(run: Run, config: RLConfig, params, sampled: Sampled, nats: float) -> Iterator[Check]:
    model, scalar_model = run.language_model(), run.scalar_model()
    value = None
    if config.advantage == "gae":
        value = new_state(init_parameters(scalar_model, run.key("check value"), run.placement), optax.sgd(1.0))
    policy = new_state(params, optax.sgd(1.0))
    control = jax.device_put(initial_control(config), run.placement.whole)
    state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, control, None)
    scores = shard_batch(np.zeros(config.batch_size, np.float32), run.placement.mesh)
    rollout, _, _, metrics = make_rollout(model, scalar_model, state, params, None, sampled, scores, config=config)
    for name in ("kl/k1", "kl/full"):
        yield Check(
            f"{name} is 0 at the start", abs(float(metrics[name])), nats / 10, "of the policy from itself, nats"
        )
    clipped = dataclasses.replace(config, loss="clipped")
    _, _, found = jax.jit(
        lambda params: policy_loss(params, (rollout, None), control.kl_coef, params, model, clipped)
    )(params)  # fmt: skip
    total, weight = found["ratio"]
    yield Check("ratio is 1 at the start", abs(float(total / weight) - 1), 0.0 if nats < 1e-3 else nats / 10,
                "of new to old log-probs before the first update")  # fmt: skip


def _gae_check(config: RLConfig) -> Check:
    """`losses.advantages.gae` against the sum of its definition."""
    rng, length = np.random.default_rng(0), _RESPONSE
    rewards, values = rng.normal(size=(2, 4, length))
    mask = np.arange(length) < np.array([[length], [1], [5], [9]])
    expected = np.zeros_like(rewards)
    for row, t in zip(*np.nonzero(mask), strict=True):
        for later in range(t, mask[row].sum()):
            after = values[row, later + 1] if later + 1 < mask[row].sum() else 0.0
            delta = rewards[row, later] + config.gamma * after - values[row, later]
            expected[row, t] += (config.gamma * config.gae_lambda) ** (later - t) * delta
    found, _ = jax.jit(gae, static_argnums=(3, 4))(
        rewards.astype(np.float32), values.astype(np.float32), mask, config.gamma, config.gae_lambda
    )
    return Check("advantages", _largest(found - expected), 1e-4, "GAE, and the sum of its definition in float64")


def _largest(x) -> float:
    return float(np.max(np.abs(np.asarray(x, np.float64))))


def _distance(a, b) -> float:
    """The norm of the difference of two trees over that of the first."""
    leaves = zip(*map(jax.tree.leaves, (a, b)), strict=True)
    pairs = [(np.asarray(x, np.float64), np.asarray(y, np.float64)) for x, y in leaves]
    return float(np.sqrt(sum(((x - y) ** 2).sum() for x, y in pairs) / sum((x**2).sum() for x, _ in pairs)))


def _print(run: Run, checks: list[Check]) -> None:
    policy = run.config.policy.weights or "from scratch"
    table = Table(title=f"{policy}, {run.model_config().dtype}, {run.placement.mesh.size} device(s)",
                  title_justify="left")  # fmt: skip
    for column, justify in (("", "left"), ("measured", "right"), ("at most", "right"), ("", "left"), ("what", "left")):
        table.add_column(column, justify=justify)
    for check in checks:
        measured = "-" if check.measured is None else f"{check.measured:.2g}"
        table.add_row(check.name, measured, f"{check.limit:.2g}", "ok" if check.passed else "FAILS", check.note)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
