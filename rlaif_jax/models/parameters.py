"""Parameter trees on a mesh: fresh, from host arrays, or as shapes to restore into."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel import processes
from rlaif_jax.parallel.mesh import DECODE_RULES, RULES, Rules, parameter_shardings

_HOST = "pinned_host"


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where arrays live: the mesh and the logical axes that may stay whole on it."""

    mesh: Mesh
    replicated: tuple[str, ...] = ()

    def parameters(self, model: nn.Module, rules: Rules = RULES):
        """Shardings of a model's parameters, as a tree of their shape."""
        return parameter_shardings(abstract_boxes(model), self.mesh, self.replicated, rules)

    @property
    def whole(self) -> NamedSharding:
        """The sharding of what every device holds whole."""
        return NamedSharding(self.mesh, PartitionSpec())


@functools.lru_cache(maxsize=32)  # tracing a model takes a good part of a second, and loading it asks several times
def abstract_boxes(model: nn.Module):
    """Shapes of a model's parameters with their logical axes."""
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    # The key is made inside: a mesh of devices that nobody has can't run anything.
    return jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens, tokens), tokens)["params"]


def parameter_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each parameter by its name: the groups but for those of decoder and layers, with "/" between.

    A parameter of the layers has the shape that it has in one of them.
    """
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(abstract_boxes(model)))
    return {parameter_name(path): leaf.shape[in_layers(path) :] for path, leaf in leaves}


def parameter_name(path) -> str:
    """The name of a parameter (`parameter_shapes`) at a path of a tree."""
    return "/".join(key.key for key in path if key.key not in ("decoder", "layers"))


def in_layers(path) -> bool:
    """Whether the parameter at a path of a tree is stacked along a first axis of layers."""
    return any(key.key == "layers" for key in path)


def init_parameters(model: nn.Module, key: jax.Array, placement: Placement, parts: tuple[str, ...] = ()):
    """Fresh parameters, each device making only its own slices. parts: those at the top that are wanted; () for all."""
    shardings = placement.parameters(model)
    wanted = parts or tuple(shardings)

    def init(key):
        tokens = jnp.zeros((1, 1), jnp.int32)
        params = nn.unbox(model.init(key, tokens, tokens)["params"])
        return {name: params[name] for name in wanted}

    return jax.jit(init, out_shardings={name: shardings[name] for name in wanted})(key)


def place_parameters(model: nn.Module, parameters, placement: Placement):
    """Puts a tree of host arrays on the mesh. Raises ValueError where its structure or a shape differs."""
    shardings, boxes = placement.parameters(model), abstract_boxes(model)
    shapes = jax.tree.map(lambda box: box.shape, nn.unbox(boxes))
    given = jax.tree.map(lambda x: x.shape, parameters)
    if given != shapes:
        raise ValueError(f"parameters do not fit the model: expected {shapes}, got {given}")
    return jax.tree.map(processes.put, parameters, shardings)


def move_parameters(model: nn.Module, parameters, placement: Placement):
    """Parameters of a model that lie on another mesh, on this one, leaf by leaf, matrices in the model's dtype.

    This mesh is of the same devices, or of those of one process among several.
    """
    half = _matrices_in(parameters, model.config.dtype)
    if processes.count() == 1:
        return jax.device_put(half, placement.parameters(model))
    return jax.tree.map(lambda x, to: processes.put(_whole(x), to), half, placement.parameters(model))


@functools.partial(jax.jit, static_argnames="dtype")
def _matrices_in(parameters, dtype: str):
    matrix = lambda path, x: x.astype(dtype) if x.ndim - in_layers(path) > 1 else x  # noqa: E731
    return jax.tree_util.tree_map_with_path(matrix, parameters)


def _whole(x: jax.Array | np.ndarray) -> np.ndarray:
    """An array on the host, whichever processes hold its parts: layer by layer, for no device has room for all."""
    if x.ndim < 3 or isinstance(x, np.ndarray) or x.is_fully_addressable:
        return processes.to_host(x)
    return np.stack([layer_to_host(x, i) for i in range(len(x))])


def layer_to_host(x: jax.Array, i: int) -> np.ndarray:
    """`x[i]` on the host, whichever processes hold its parts; all of them call this."""
    return processes.to_host(_layer(x, np.int32(i)))


@jax.jit
def _layer(x: jax.Array, i: jax.Array) -> jax.Array:
    return x[i]


def to_host_memory(tree):
    """A tree of arrays in the memory of the hosts, each part where its device can get at it: between uses."""
    return _in_memory(tree, _HOST)


def to_device(tree):
    """A tree of arrays in the memory of the devices: for a use. What is there already is not copied."""
    return _in_memory(tree, "device")


def _in_memory(tree, kind: str):
    return jax.device_put(tree, jax.tree.map(lambda x: x.sharding.with_memory_kind(kind), tree))


def check_host_memory() -> None:
    """Raises ValueError where the devices can't get at memory of their host."""
    device = jax.local_devices()[0]
    if _HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise ValueError(
            f"{device.platform} devices have no {_HOST} memory here for parameters to wait in: set it to ()"
        )


def parameters_hash(parameters) -> str:
    """xxh3 of names and bytes of a tree of arrays: the same for the same values, wherever they lie."""
    digest = xxhash.xxh3_64()
    for path, leaf in jax.tree_util.tree_leaves_with_path(parameters):
        digest.update(jax.tree_util.keystr(path).encode())
        digest.update(_whole(leaf).tobytes())
    return digest.hexdigest()


def abstract_parameters(model: nn.Module, placement: Placement, rules: Rules = RULES):
    """Shapes, dtypes and shardings of a model's parameters."""
    return jax.tree.map(
        lambda box, sharding: jax.ShapeDtypeStruct(box.shape, box.dtype, sharding=sharding),
        nn.unbox(abstract_boxes(model)),
        placement.parameters(model, rules),
    )


def decoding_model(model: LanguageModel) -> LanguageModel:
    """The same decoder with a layer of its own for each set of weights: none is cut out of a stack at each token."""
    return LanguageModel(dataclasses.replace(model.config, remat="products"), scan_layers=False)


def decoding_parameters(model: LanguageModel, parameters, placement: Placement, rules: Rules = DECODE_RULES):
    """The parameters of a model as `decoding_model` takes them, under the sharding rules of decoding or others.

    They are in the dtype of the computation, so that a token reads no more bytes than it must, and an adapter is merged
    into them.
    """
    return to_decoding(model, placement, tuple(rules.items()))(parameters)


def abstract_decoding_parameters(model: LanguageModel, placement: Placement, rules: Rules = DECODE_RULES):
    """Shapes, dtypes and shardings of what `decoding_parameters` gives."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(to_decoding(model, placement, tuple(rules.items())), abstract_parameters(model, placement)),
        placement.parameters(decoding_model(model), rules),
    )


def merged(params: dict, scale: float) -> dict:
    """The parameters of the same model without an adapter (models/lora.py); a tree without one as it is.

    scale: of the adapter's products.
    """
    layers = params["decoder"]["layers"]
    if "lora" not in layers:
        return params
    weights = {name: layer for name, layer in layers.items() if name != "lora"}
    for name, adapter in layers["lora"].items():
        a, b = adapter["a"], adapter["b"]
        product = jnp.einsum("lir,lro->lio", a.reshape(len(a), -1, a.shape[-1]), b.reshape(*b.shape[:2], -1))
        weights[name] = (layers[name] + scale * product.reshape(layers[name].shape)).astype(layers[name].dtype)
    return params | {"decoder": params["decoder"] | {"layers": weights}}


@functools.lru_cache(maxsize=8)
def to_decoding(model: LanguageModel, placement: Placement, rules: tuple):
    """The program of `decoding_parameters`; rules: as items."""

    def move(parameters):
        parameters = merged(parameters, model.config.lora_scale)
        decoder = dict(parameters["decoder"])
        stacked = decoder.pop("layers")
        for i in range(model.config.num_hidden_layers):
            decoder[f"layer_{i}"] = jax.tree.map(lambda x, i=i: x[i], stacked)
        matrices = lambda x: x.astype(model.config.dtype) if x.ndim > 1 else x  # noqa: E731
        return jax.tree.map(matrices, parameters | {"decoder": decoder})

    return jax.jit(move, out_shardings=placement.parameters(decoding_model(model), dict(rules)))
