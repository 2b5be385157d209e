"""A PPO iteration, by what its time goes to.

    python benchmarks/ppo_iteration.py

Sampling, scoring (old and reference log-probs, values, rewards, advantages: one program) and the updates (all epochs:
one program), each awaited by itself; and the whole iteration as a run does it, awaited once.
"""

import dataclasses
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
from harness import load, parser, watch

from configs import quickstart
from rlaif_jax.config import parse
from rlaif_jax.models.parameters import decoding_model, decoding_parameters, init_parameters
from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import Stopping
from rlaif_jax.training.optimizer import make_optimizer
from rlaif_jax.training.policy_update import update
from rlaif_jax.training.reward_models import RewardModel
from rlaif_jax.training.rollout import RLState, Sampled, initial_control, make_rollout
from rlaif_jax.training.sequences import Sequences
from rlaif_jax.training.state import init_state


def main() -> None:
    """Prints the JSON line."""
    flags = parser(__doc__)
    flags.add_argument("--batch", type=int, default=8)
    flags.add_argument("--prompt", type=int, default=64)
    flags.add_argument("--new", type=int, default=32)
    flags.add_argument("--epochs", type=int, default=4)
    options = flags.parse_args()
    model, parameters, placement = load(options.shape, options.dtype)
    scalar_model = ScalarModel(model.config)
    config = parse(quickstart.get_config().to_dict()).rl
    config = dataclasses.replace(config, batch_size=options.batch, epochs=options.epochs, minibatches=1)
    optimizer = make_optimizer(config.optimizer, 1000)
    value_params = init_parameters(scalar_model, jax.random.key(1), placement)
    policy = init_state(model, parameters, optimizer, placement)
    members = jax.tree.map(lambda x: x[None], value_params)
    reward_model = RewardModel(members, jnp.zeros(1), jnp.float32(0), jnp.float32(1), "mean", 0.0)
    value = init_state(scalar_model, value_params, optimizer, placement)
    control = jax.device_put(initial_control(config), placement.whole)
    state = RLState(policy.step, policy.params, policy.opt_state, policy.skipped, value, control, None)
    no_scores = np.zeros(options.batch, np.float32)
    prompts = np.random.default_rng(0).integers(3, model.config.vocab_size, (options.batch, options.prompt))
    prompts, mask = prompts.astype(np.int32), np.ones(prompts.shape, bool)
    stopping = Stopping((), (), jnp.zeros((0, 0), jnp.uint8), jnp.zeros(0, jnp.int32))
    update_fn = functools.partial(update, model=model, scalar_model=scalar_model, config=config,
                                  optimizer=optimizer, value_optimizer=optimizer)  # fmt: skip
    update_fn = jax.jit(update_fn, donate_argnums=0)

    def iteration(state, step, wait):
        """The phases of `rl.run_rl`, each handed to `wait` with its name."""
        moved = wait("move", decoding_parameters(model, state.params, placement))
        replies = generate(decoding_model(model), moved, prompts, mask, jax.random.key(step),
                           np.arange(options.batch, dtype=np.int32), stopping, max_new_tokens=options.new,
                           sampling=config.sampling, cache_dtype=options.dtype)  # fmt: skip
        wait("sample", replies.samples)
        sequences = Sequences(prompts, mask, replies.samples.tokens, replies.samples.mask)
        sampled = Sampled(sequences, replies.samples.logprobs, replies.ended)
        rollout, control, _, metrics = make_rollout(model, scalar_model, state, parameters, reward_model, sampled,
                                                    no_scores, config=config)  # fmt: skip
        wait("score", rollout)
        state, more = wait(
            "update",
            update_fn(
                state.replace(control=None), rollout, state.control.kl_coef, parameters, None, jax.random.key(step)
            ),
        )
        return state.replace(control=control), metrics | more

    phases: dict[str, list[float]] = {}
    began = 0.0

    def timed(name, result):
        nonlocal began
        jax.block_until_ready(result)
        now = time.perf_counter()
        phases.setdefault(name, []).append(now - began)
        began = now
        return result

    state, metrics = iteration(state, 0, lambda name, result: result)
    jax.block_until_ready((state, metrics))
    whole = []
    with watch() as watched:
        for step in range(1, options.runs + 1):
            began = time.perf_counter()
            state, _ = iteration(state, step, timed)
            began = time.perf_counter()
            state, metrics = iteration(state, step, lambda name, result: result)
            jax.device_get(metrics)
            whole.append(time.perf_counter() - began)
    seconds = {name: float(np.median(times)) for name, times in phases.items()}
    total = float(np.median(whole))
    share, name = watched.busiest()
    line = {
        "task": f"ppo iteration {options.batch} x ({options.prompt} -> {options.new}), {options.epochs} epochs, "
        f"{options.shape} {options.dtype}",
        "iteration_seconds": total,
        "iteration_runs": [round(each, 3) for each in whole],
        "phase_seconds": seconds,
        "share_outside_sampling_scoring_and_updates": seconds["move"] / sum(seconds.values()),
        "share_outside_sampling_and_updates": 1 - (seconds["sample"] + seconds["update"]) / sum(seconds.values()),
        "generated_tokens_per_second": options.batch * options.new / total,
        "busiest_other_process": f"{name} {share:.0%} of a core",
        "device": jax.devices()[0].device_kind,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
