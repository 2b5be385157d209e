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
from rlaif_jax.parallel.mesh import platform
from rlaif_jax.training.sequences import Sequences, response_rewards


class RewardModel(struct.PyTreeNode):
    """One or more members, and how their rewards are put together, centred and calibrated."""

    params: dict  # each leaf [members, ...]
    means: jax.Array  # [members] float32: of each member's rewards on samples of the SFT policy
    offset: jax.Array  # [] float32: the mean of what the members come to there
    scale: jax.Array  # [] float32: the calibration of that
    how: str = struct.field(pytree_node=False)  # a name in `losses.reward.COMBINATIONS`
    uncertainty_coef: float = struct.field(pytree_node=False)
    weights: jax.Array | None = None  # [members] float32 with sum 1, of a mean; None where they count alike
    principles: tuple[str, ...] = struct.field(pytree_node=False, default=())  # what each member learned, where it did


def rewards_of(model: ScalarModel, reward_model: RewardModel, sequences: Sequences) -> jax.Array:
    """The reward of each response: [batch] float32."""
    return combined_reward(reward_model, centred_rewards(model, reward_model, sequences))


def centred_rewards(model: ScalarModel, reward_model: RewardModel, sequences: Sequences) -> jax.Array:
    """What each member says, less its mean on samples of the SFT policy: [members, batch] float32."""
    return member_rewards(model, reward_model.params, sequences) - reward_model.means[:, None]


def combined_reward(reward_model: RewardModel, each: jax.Array) -> jax.Array:
    """The reward that `centred_rewards` come to: [batch] float32."""
    together = combine(each, reward_model.how, reward_model.uncertainty_coef, reward_model.weights)
    return reward_model.scale * (together - reward_model.offset)


def principle_metrics(reward_model: RewardModel, each: jax.Array) -> dict[str, jax.Array]:
    """Of each principle that has a member, the mean reward and its share of the variance of the reward over the batch.

    The share is the covariance of the principle's part with the reward, over the reward's variance: the shares come to
    1, and one is negative where a principle holds against the others. All are 0 where the reward does not vary.

    each: [members, batch] float32, `centred_rewards`.
    """
    if not reward_model.principles:
        return {}
    parts = reward_model.weights[:, None] * each
    deviations = parts - jnp.mean(parts, axis=1, keepdims=True)
    total = jnp.sum(deviations, axis=0)
    variance = jnp.sum(total**2)
    # By more than rounding, and not scaled to nothing.
    varies = (variance > 1e-10 * jnp.sum(jnp.sum(parts, axis=0) ** 2)) & (reward_model.scale > 0)
    shares = jnp.where(varies, deviations @ total / jnp.where(varies, variance, 1.0), 0.0)
    means = reward_model.scale * jnp.mean(each, axis=1)
    metrics = {f"reward/principle/{name}": means[i] for i, name in enumerate(reward_model.principles)}
    return metrics | {f"reward/principle_share/{name}": shares[i] for i, name in enumerate(reward_model.principles)}


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
    if platform() == "gpu" or model.config.attention == "cudnn":
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
