"""Train states: parameters, optimizer state and counts of updates, sharded alike."""

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct

from rlaif_jax.models.lora import LoraConfig, abstract_trained
from rlaif_jax.models.parameters import Placement


class TrainState(struct.PyTreeNode):
    """Everything that an update changes."""

    step: jax.Array  # [] int32: updates done
    params: dict
    opt_state: optax.OptState
    skipped: jax.Array  # [] int32: updates left out because loss or gradient was not finite


def new_state(params, optimizer: optax.GradientTransformation) -> TrainState:
    """A state at step 0 of these very parameters."""
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), jnp.zeros((), jnp.int32))


def abstract_state(
    model: nn.Module, optimizer: optax.GradientTransformation, placement: Placement, lora: LoraConfig | None = None
) -> TrainState:
    """Shapes, dtypes and shardings of a TrainState; the optimizer's moments are split as their parameters.

    lora: of the adapter that is trained in place of all parameters.
    """
    params = abstract_trained(model, placement, lora)
    opt_state = optax.tree_utils.tree_map_params(
        optimizer,
        lambda moment, param: jax.ShapeDtypeStruct(moment.shape, moment.dtype, sharding=param.sharding),
        jax.eval_shape(optimizer.init, params),
        params,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placement.whole),
    )
    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=placement.whole)
    return TrainState(count, params, opt_state, count)


def init_state(
    model: nn.Module,
    params,
    optimizer: optax.GradientTransformation,
    placement: Placement,
    lora: LoraConfig | None = None,
) -> TrainState:
    """A state at step 0 of what is trained. The parameters are copied, since updates donate the state."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(model, optimizer, placement, lora))
    init = jax.jit(lambda params: new_state(jax.tree.map(jnp.copy, params), optimizer), out_shardings=shardings)
    return init(params)
