"""Reward models that were trained side by side, and the one reward that they come to."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.losses.reward import combine
from rlaif_jax.models.transformer import ScalarModel
from rlaif_jax.training.sequences import Sequences, response_rewards


class RewardModel(struct.PyTreeNode):
    """One or more members, and how their rewards are put together, centred and calibrated."""

    params: dict  # each leaf [members, ...]
    means: jax.Array  # [members] float32: of each member's rewards on samples of the SFT policy
    offset: jax.Array  # [] float32: the mean of what the members come to there
    scale: jax.Array  # [] float32: the calibration of that
    how: str = struct.field(pytree_node=False)  # a name in `losses.reward.COMBINATIONS`
    uncertainty_coef: float = struct.field(pytree_node=False)


def rewards_of(model: ScalarModel, reward_model: RewardModel, sequences: Sequences) -> jax.Array:
    """The reward of each response: [batch] float32."""
    each = member_rewards(model, reward_model.params, sequences) - reward_model.means[:, None]
    return reward_model.scale * (combine(each, reward_model.how, reward_model.uncertainty_coef) - reward_model.offset)


def member_rewards(model: ScalarModel, params, sequences: Sequences) -> jax.Array:
    """What each member says: [members, batch] float32. params: each leaf [members, ...]."""
    return over_members(lambda model, params: response_rewards(model, params, sequences), model, params)


def over_members(function: Callable, model: ScalarModel, *trees):
    """`function(model, *trees of one member)` for all members at once; each leaf of `trees` is [members, ...].

    cuDNN's attention can't be vectorised over parameters, so several members go without it; one keeps it.
    """
    if jax.tree.leaves(trees)[0].shape[0] == 1:
        result = function(model, *jax.tree.map(lambda x: x[0], trees))
        return jax.tree.map(lambda x: x[None], result)
    if jax.default_backend() == "gpu" or model.config.attention == "cudnn":
        model = ScalarModel(dataclasses.replace(model.config, attention="plain"))
    return jax.vmap(functools.partial(function, model))(*trees)


def side_by_side(abstract, members: int):
    """Shapes and shardings of so many states or parameter trees as one, each leaf with a first axis of members."""

    def stacked(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        sharding = NamedSharding(x.sharding.mesh, PartitionSpec(None, *x.sharding.spec))
        return jax.ShapeDtypeStruct((members, *x.shape), x.dtype, sharding=sharding)

    return jax.tree.map(stacked, abstract)


def stack(trees: list, abstract):
    """Trees as one, on the shardings of `abstract` (`side_by_side`)."""
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    return jax.jit(lambda trees: jax.tree.map(lambda *x: jnp.stack(x), *trees), out_shardings=shardings)(trees)
