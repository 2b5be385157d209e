"""Opening what `weights` names in a config, a GGUF file or a Hugging Face folder, and loading it onto a mesh."""

import functools
import importlib.util
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xxhash
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.errors import UserError
from rlaif_jax.files import file_hashes
from rlaif_jax.models import gguf, huggingface
from rlaif_jax.models.parameters import in_layers, parameter_name
from rlaif_jax.models.transformer import ModelConfig

SHAPE = "shape:"  # begins what names a shape without weights, see models/shapes.py


class Weights(NamedTuple):
    """A model on disk."""

    path: epath.Path
    config: ModelConfig
    read: Callable[[str, int], np.ndarray]  # (our name of a parameter, layer) -> it in our layout, however stored
    files: tuple[epath.Path, ...]  # all that the model depends on
    names: frozenset[str]  # our names of the parameters that it has: "kernel" where it is a reward model


@functools.cache  # parsing a vocabulary takes seconds, and several stages and cells of a sweep open the same file
def open_weights(path: str) -> Weights:
    """Opens what `path` names. Raises UserError where it is missing, damaged or of a family that the decoder is not."""
    file = resolve(path)
    return Weights(file, *(huggingface.open_folder(file) if file.is_dir() else gguf.open_file(file)))


def resolve(path: str) -> epath.Path:
    """The file or folder that `path` names; `package:NAME` is the one GGUF file inside an installed Python package.

    Raises UserError where there is none.
    """
    if path.startswith(SHAPE):
        raise UserError(f"{path} has no weights, and only python -m rlaif_jax.plan takes a shape: name a model")
    if path.startswith("package:"):
        return _in_package(path.removeprefix("package:"))
    file = epath.Path(path)
    if not file.exists():
        raise UserError(
            f"no model at {path}: name a GGUF file, or a Hugging Face folder (hf download ID --local-dir=DIR makes one)"
        )
    if file.suffix == ".safetensors":
        raise UserError(f"{path} is a file of a Hugging Face folder: name the folder")
    return file


def _in_package(package: str) -> epath.Path:
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise UserError(f"the model package {package!r} is not installed: run bash launch/install.sh")
    folders = spec.submodule_search_locations or []
    files = sorted(file for folder in folders for file in epath.Path(folder).glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"package {package!r} holds {len(files)} GGUF files, expected one")
    return files[0]


def weights_hash(path: str) -> str:
    """xxh3 of the files that the model at `path` is made of."""
    return hash_of(open_weights(path).files)


@functools.cache
def hash_of(files: tuple[epath.Path, ...]) -> str:
    """xxh3 of files."""
    found = file_hashes(files)
    return found[0] if len(found) == 1 else xxhash.xxh3_64("".join(found).encode()).hexdigest()


def load_parameters(weights: Weights, abstract, dtype: str = "float32", shuffle_seed: int | None = None):
    """Parameters on the mesh, matrices in `dtype`. A device reads its own slices, a layer at a time.

    abstract: of `abstract_parameters`, or a part of that tree. shuffle_seed: permutes the entries of every matrix: a
    model of the same statistics that knows nothing.
    """
    if "kernel" in weights.names and "kernel" not in abstract:
        raise UserError(f"{weights.path} is a reward model, which writes nothing: name a language model")
    read = weights.read if shuffle_seed is None else _shuffled(weights.read, shuffle_seed)

    def load(path, abstract: jax.ShapeDtypeStruct) -> jax.Array:
        name, stacked = parameter_name(path), in_layers(path)
        kind = dtype if len(abstract.shape) - stacked > 1 else "float32"
        if not stacked:
            return _put(functools.partial(read, name, 0), abstract).astype(kind)
        leaf = _zeros(abstract.shape, kind, abstract.sharding)
        sharding = NamedSharding(abstract.sharding.mesh, PartitionSpec(*abstract.sharding.spec[1:]))
        of_layer = jax.ShapeDtypeStruct(abstract.shape[1:], abstract.dtype, sharding=sharding)
        for layer in range(len(leaf)):
            leaf = _written(leaf, _put(functools.partial(read, name, layer), of_layer), np.int32(layer))
        return leaf

    with jax.set_mesh(jax.tree.leaves(abstract)[0].sharding.mesh):  # a judge's is not that of the stage which loads it
        return jax.tree_util.tree_map_with_path(load, abstract)


def _put(read: Callable[[], np.ndarray], abstract: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of which each device gets its own slice, in the dtype in which it is stored."""
    read = functools.cache(read)  # for all slices
    parts: dict[str, np.ndarray] = {}  # and devices that hold the same slice share it

    def part(index):
        if str(index) not in parts:
            parts[str(index)] = np.array(read()[index], order="K")  # JAX turns it faster than NumPy
        return parts[str(index)]

    return jax.make_array_from_callback(abstract.shape, abstract.sharding, part)


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "sharding"))
def _zeros(shape, dtype, sharding) -> jax.Array:
    return jax.lax.with_sharding_constraint(jnp.zeros(shape, dtype), sharding)


@functools.partial(jax.jit, donate_argnames="stack")
def _written(stack: jax.Array, layer: jax.Array, i: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer.astype(stack.dtype), i, 0)


def _shuffled(read: Callable[[str, int], np.ndarray], seed: int) -> Callable[[str, int], np.ndarray]:
    def shuffled(name: str, layer: int) -> np.ndarray:
        weight = read(name, layer)
        if weight.ndim == 1:
            return weight
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), layer])
        return rng.permuted(weight.ravel()).reshape(weight.shape)

    return shuffled
