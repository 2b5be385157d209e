"""Alarms of an RL run: what an iteration's metrics say has gone wrong, and where to look."""

from collections.abc import Mapping

from rlaif_jax.config import AlarmsConfig

# Metric, field of the config, whether it is an upper limit, and what to look at.
_ALARMS = (
    ("kl/sequence", "kl_above", True, "the policy is far from SFT: read rl/samples.jsonl, raise rl.kl.coef"),
    ("entropy", "entropy_below", False, "replies grow alike: read rl/samples.jsonl, raise rl.kl.coef"),
    ("response_length", "length_below", False, "replies collapse: see what reward short ones get in rl/samples.jsonl"),
    ("clip_fraction", "clip_fraction_above", True, "updates are too large: lower rl.optimizer.learning_rate or epochs"),
)


def alarms(metrics: Mapping[str, float | None], config: AlarmsConfig) -> dict[str, str]:
    """The alarms that an iteration's metrics raise: metric -> what to say. Metrics that are not there raise none."""
    raised = {}
    for name, field, upper, advice in _ALARMS:
        value, limit = metrics.get(name), getattr(config, field)
        if limit and value is not None and (value > limit if upper else value < limit):
            side = "above" if upper else "below"
            raised[name] = f"{name} {value:.3g} is {side} rl.alarms.{field}={limit:g}: {advice}"
    return raised
