"""The one train step: a loss that is a sum, divided by its weight, then an optimizer update."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.models.lora import joined
from rlaif_jax.training.state import TrainState

# (params, batch) -> (sums, weights, metrics): the loss is the sum of what each sum is over its weight, one of each or
# a dict of several terms; a metric is a (sum, weight), too. Never a mean, so that a loss does not depend on how a batch
# is split or padded. Weights depend on the batch alone.
Loss = Callable[[dict, Any], tuple[Any, Any, dict[str, tuple[jax.Array, jax.Array]]]]


def train_step(
    state: TrainState,
    batch,
    loss: Loss,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    frozen: dict | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Returns the state, and the loss's metrics, `loss`, `grad_norm` and the new `param_norm`.

    A loss or gradient that is not finite changes nothing but `state.skipped`: then the metric `skipped` is 1, and
    `skipped_updates` counts them since the start.

    micro_batches: parts of the batch that are worked on one after another, for memory; a divisor of its rows on each
      device. Their gradients add up to that of the whole batch.
    frozen: parameters of the model that are not in the state, and stay as they are.
    """
    whole = lambda params, batch: loss(joined(frozen or {}, params), batch)  # noqa: E731
    value, metrics, grads = _loss_and_gradient(state.params, batch, whole, micro_batches)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(value) & jnp.isfinite(grad_norm)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    changed = optax.apply_updates(state.params, updates), opt_state
    params, opt_state = jax.tree.map(lambda new, old: jnp.where(finite, new, old), changed, (
        state.params, state.opt_state))  # fmt: skip
    skipped = 1 - finite.astype(jnp.int32)
    state = TrainState(state.step + 1 - skipped, params, opt_state, state.skipped + skipped)
    norms = {"grad_norm": grad_norm, "param_norm": optax.tree.norm(params)}
    return state, metrics | norms | {"loss": value, "skipped": skipped, "skipped_updates": state.skipped}


def compiled_step(loss: Loss, optimizer: optax.GradientTransformation, micro_batches: int) -> jax.stages.Wrapped:
    """(state, batch, frozen={}) -> (state, metrics): `train_step`, compiled; the state is donated."""
    step = functools.partial(train_step, loss=loss, optimizer=optimizer, micro_batches=micro_batches)
    return jax.jit(step, donate_argnums=0)


def _loss_and_gradient(params, batch, loss: Loss, parts: int) -> tuple[jax.Array, dict[str, jax.Array], Any]:
    def weighted(params, batch, weights):
        sums, own, metrics = loss(params, batch)
        means = jax.tree.map(_over, sums, own if weights is None else weights)
        return sum(jax.tree.leaves(means)), metrics

    gradient = jax.value_and_grad(weighted, has_aux=True)
    if parts == 1:
        (value, metrics), grads = gradient(params, batch, None)
    else:
        # Rows i, i + parts, i + 2 parts ... are part i, so that each is spread over all devices.
        batch = jax.tree.map(lambda x: jnp.moveaxis(x.reshape(-1, parts, *x.shape[1:]), 1, 0), batch)
        weights = jax.lax.map(lambda part: loss(params, part)[1], batch)  # compiled without the model
        weights = jax.tree.map(lambda x: jnp.sum(x, axis=0), weights)

        def add(total, part):
            return jax.tree.map(jnp.add, total, gradient(params, part, weights)), None

        shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], batch), weights)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        ((value, metrics), grads), _ = jax.lax.scan(add, zeros, batch)
    return value, {name: _over(x, weight) for name, (x, weight) in metrics.items()}, grads


def _over(total: jax.Array, weight: jax.Array) -> jax.Array:
    """The mean; 0 where nothing counts."""
    return total / jnp.where(weight > 0, weight, 1.0)
