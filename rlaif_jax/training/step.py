"""The one train step: a loss that is a sum, divided by its weight, then an optimizer update."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from rlaif_jax.training.state import TrainState

# (params, batch) -> (sum of the loss, weight, sums of metrics by name). A loss is a sum and a weight, never a
# mean, so that it does not depend on how a batch is split or padded.
Loss = Callable[[dict, dict], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


def train_step(
    state: TrainState, batch, loss: Loss, optimizer: optax.GradientTransformation
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update. Metrics are means over the loss's weight, and `loss`, `grad_norm` and the new `param_norm`.

    A parameter that is not finite shows in `param_norm`, so that it is never saved.
    """

    def mean(params):
        total, weight, sums = loss(params, batch)
        weight = jnp.maximum(weight, 1.0)
        return total / weight, {name: value / weight for name, value in sums.items()}

    (value, metrics), grads = jax.value_and_grad(mean, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    norms = {"grad_norm": optax.tree.norm(grads), "param_norm": optax.tree.norm(params)}
    return TrainState(state.step + 1, params, opt_state), metrics | norms | {"loss": value}
