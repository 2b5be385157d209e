"""Optimizers from the config."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": optax.cosine_decay_schedule,
}
MOMENT_DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a learning-rate schedule and clipping by the global norm."""

    learning_rate: float  # peak
    schedule: str  # "constant", "linear" (to 0) or "cosine" (to 0)
    warmup_steps: int  # linear, from 0
    b1: float
    b2: float
    eps: float
    weight_decay: float
    max_grad_norm: float
    moment_dtype: str  # of both moments between updates: "float32", or "bfloat16", stochastically rounded


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates."""
    peak = config.learning_rate
    schedule = SCHEDULES[config.schedule](peak, max(steps - config.warmup_steps, 1))
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    moments = optax.scale_by_adam(config.b1, config.b2, config.eps)
    if config.moment_dtype == "bfloat16":
        moments = in_bfloat16(moments)
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.chain(  # optax.adamw
            moments,
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(schedule),
        ),
    )


def in_bfloat16(adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optax.scale_by_adam` that keeps its moments in bfloat16 between updates, and computes in float32.

    They are rounded stochastically. A bfloat16 has 8 bits: rounded to nearest, a moment stands still that is to change
    by less than 2^-9 of it, and at b2 = 0.999 a second moment falls by 2^-10 of it at most. The random bits are of
    the count of updates alone, and the same however the parameters are split.
    """

    def init(params):
        state = adam.init(params)
        return state._replace(mu=_cast(state.mu, jnp.bfloat16), nu=_cast(state.nu, jnp.bfloat16))

    def update(gradient, state, params=None):
        wide = state._replace(mu=_cast(state.mu, jnp.float32), nu=_cast(state.nu, jnp.float32))
        updates, wide = adam.update(gradient, wide, params)
        keys = optax.tree.split_key_like(jax.random.fold_in(jax.random.key(0), state.count), wide.nu)
        bits = jax.tree.map(lambda x, key: jax.random.bits(key, x.shape, jnp.uint32), wide.nu, keys)
        mu = jax.tree.map(lambda x, bits: round_stochastically(x, bits & 0xFFFF), wide.mu, bits)
        nu = jax.tree.map(lambda x, bits: round_stochastically(x, bits >> 16), wide.nu, bits)
        return updates, wide._replace(mu=mu, nu=nu)

    return optax.GradientTransformation(init, update)


def round_stochastically(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 -> bfloat16: one of the two neighbours, the nearer the likelier, so that the expectation is x.

    bits: uint32 of the shape of x, random below 2^16. They are added to the 16 bits that are cut off, and may carry
      over (Gupta et al., arXiv 1502.02551, section 3.1).
    """
    total = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits
    return jax.lax.bitcast_convert_type((total >> 16).astype(jnp.uint16), jnp.bfloat16)


def _cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)
