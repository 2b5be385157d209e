"""Optimizers from the config."""

import dataclasses

import optax

SCHEDULES = {
    "constant": lambda peak, steps: optax.constant_schedule(peak),
    "linear": lambda peak, steps: optax.linear_schedule(peak, 0.0, steps),
    "cosine": optax.cosine_decay_schedule,
}


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
    """The optimizer of a run of `steps` updates."""
    peak = config.learning_rate
    schedule = SCHEDULES[config.schedule](peak, max(steps - config.warmup_steps, 1))
    if config.warmup_steps:
        warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
        schedule = optax.join_schedules([warmup, schedule], [config.warmup_steps])
    return optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm),
        optax.adamw(schedule, config.b1, config.b2, config.eps, weight_decay=config.weight_decay),
    )
