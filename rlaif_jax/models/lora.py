"""Low-rank adapters (Hu et al., arXiv 2106.09685): W + alpha / rank * A B, of which A and B alone are trained.

An adapter is a part of the parameter tree, decoder/layers/lora; a tree without it is the model without the adapter, and
`merged` gives the tree of the same model without it.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from rlaif_jax.models.parameters import Placement, abstract_boxes, abstract_parameters, merged
from rlaif_jax.models.transformer import HEAD, ScalarModel
from rlaif_jax.parallel.mesh import RULES, Rules, parameter_shardings

TARGETS = ("query", "key", "value", "output", "gate", "up", "down")
_INPUTS = {"output": 2}  # dimensions of a weight that are contracted, where they are not one


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """What adapters are like, and who trains them in place of all weights."""

    rank: int  # 0: nobody
    alpha: float  # their products count alpha / rank
    targets: tuple[str, ...]  # of TARGETS: the weights that have one
    stages: tuple[str, ...]  # that train adapters; heads of reward models and value networks are trained whole

    @property
    def scale(self) -> float:
        """What the product of two matrices counts."""
        return self.alpha / self.rank if self.rank else 0.0


class Start(NamedTuple):
    """What a stage begins with: with `joined`, the parameters of a whole model."""

    frozen: dict  # what is left alone; {} where all is trained
    trained: Callable[[], dict]


def start(
    model: nn.Module, lora: LoraConfig | None, params: Callable[[], dict], key: jax.Array, placement: Placement
) -> Start:
    """The start of a stage that begins with `params()`: of all of them, or of a new adapter to them, which is 0."""
    if lora is None:
        return Start({}, params)
    whole = params()
    heads = {name: whole[name] for name in _heads(model)}
    frozen = {name: part for name, part in whole.items() if name not in heads}
    return Start(frozen, lambda: heads | init_adapter(model, lora, key, placement))


def joined(frozen: dict, trained: dict) -> dict:
    """One tree of two that have no leaf in common."""
    both = {name: joined(frozen[name], part) for name, part in trained.items() if name in frozen}
    return {**frozen, **trained, **both}


def abstract_trained(model: nn.Module, placement: Placement, lora: LoraConfig | None, rules: Rules = RULES):
    """Shapes, dtypes and shardings of what is trained of a model's parameters."""
    whole = abstract_parameters(model, placement, rules)
    if lora is None:
        return whole
    boxes = _boxes(model, lora)
    adapter = jax.tree.map(
        lambda box, sharding: jax.ShapeDtypeStruct(box.shape, box.dtype, sharding=sharding),
        nn.unbox(boxes),
        parameter_shardings(boxes, placement.mesh, placement.replicated, rules),
    )
    return {name: whole[name] for name in _heads(model)} | adapter


def init_adapter(model: nn.Module, lora: LoraConfig, key: jax.Array, placement: Placement) -> dict:
    """A new adapter: A uniform within 1 / sqrt(inputs), as PEFT has it, and B 0."""
    shapes = nn.unbox(_boxes(model, lora))

    def init(key):
        leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
        keys = jax.random.split(key, len(leaves))
        return structure.unflatten(
            [_init(path[-1].key, x.shape, key) for (path, x), key in zip(leaves, keys, strict=True)]
        )

    shardings = jax.tree.map(lambda x: x.sharding, abstract_trained(model, placement, lora)["decoder"])
    return jax.jit(init, out_shardings={"decoder": shardings})(key)


def _init(name: str, shape: tuple[int, ...], key: jax.Array) -> jax.Array:
    if name == "b":
        return jnp.zeros(shape, jnp.float32)
    bound = math.prod(shape[1:-1]) ** -0.5
    return jax.random.uniform(key, shape, jnp.float32, -bound, bound)


def _heads(model: nn.Module) -> tuple[str, ...]:
    return HEAD if isinstance(model, ScalarModel) else ()


def _boxes(model: nn.Module, lora: LoraConfig) -> dict:
    """The adapter's leaves with their logical axes."""
    layers = abstract_boxes(model)["decoder"]["layers"]

    def pair(name: str) -> dict:
        shape, axes, inputs = layers[name].value.shape, layers[name].names, 1 + _INPUTS.get(name, 1)
        box = lambda shape, axes: nn.LogicallyPartitioned(jax.ShapeDtypeStruct(shape, jnp.float32), axes)  # noqa: E731
        return {
            "a": box((*shape[:inputs], lora.rank), (*axes[:inputs], "rank")),
            "b": box((shape[0], lora.rank, *shape[inputs:]), (axes[0], "rank", *axes[inputs:])),
        }

    return {"decoder": {"layers": {"lora": {name: pair(name) for name in lora.targets}}}}


def _whole(frozen: dict, trained: dict, scale: float, members: int = 0) -> dict:
    """The parameters of the model that a stage has trained, without an adapter.

    members: of models trained side by side, each leaf of `trained` [members, ...]; 0 for one without that axis.
    """
    merge = lambda trained: merged(joined(frozen, trained), scale)  # noqa: E731
    return jax.vmap(merge)(trained) if members else merge(trained)


whole_params = jax.jit(_whole, static_argnames=("scale", "members"))
# Where nobody needs what was frozen any more.
whole_params_in_place = jax.jit(_whole, static_argnames=("scale", "members"), donate_argnames="frozen")
