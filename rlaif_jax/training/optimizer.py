"""Optimizers from the config."""

import dataclasses

import optax

from rlaif_jax.errors import UserError


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


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """The optimizer of a run of `steps` updates. Raises UserError for an unknown schedule."""
    peak, decay_steps = config.learning_rate, max(steps - config.warmup_steps, 1)
    schedules = {
        "constant": lambda: optax.constant_schedule(peak),
        "linear": lambda: optax.linear_schedule(peak, 0.0, decay_steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, decay_steps),
    }
    if config.schedule not in schedules:
        raise UserError(f"unknown learning-rate schedule {config.schedule!r}; known: {', '.join(schedules)}")
    schedule = schedules[config.schedule]()
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay),
    )
