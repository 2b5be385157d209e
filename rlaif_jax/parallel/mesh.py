"""The device mesh, and the tables of rules that map logical axis names to mesh axes."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rlaif_jax.parallel import processes

MESH_AXES = ("data", "fsdp", "tensor", "sequence")
OFFLOADED = ("reference", "reward_model", "judge")  # the roles whose parameters may wait in host memory

# What each logical axis of a weight or an activation is split over, by what the model does. Training: weights, and so
# gradients and moments, are split over `fsdp` along the model width and over `tensor` along heads, MLP width and
# vocabulary; activations over `data` and `fsdp` along the batch, and over `sequence` along the length.
Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {
    "batch": ("data", "fsdp"),
    "length": ("sequence",),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "head_dim": (),
    "layers": (),
    "positions": (),
    "rank": (),
    "scalar": (),
}
# A model that is only read, a whole pass at a time (reference, reward model), is read with the policy and split alike.
FORWARD_RULES: Rules = RULES
# While decoding, every token reads all weights, so they are not split over `fsdp`, from where each would come anew.
DECODE_RULES: Rules = {**RULES, "embed": ()}
# A judge reads long prompts and few tokens after them, on a mesh of its own: what `fsdp` is there is up to its config.
JUDGE_RULES: Rules = RULES


@dataclasses.dataclass(frozen=True)
class AxesConfig:
    """Devices along each mesh axis; -1 (at most once) takes all devices that are left."""

    data: int
    fsdp: int
    tensor: int
    sequence: int
    # Logical axes that may stay whole where their mesh axis does not divide them (SmolLM2: 9 heads).
    replicated: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class JudgeMeshConfig(AxesConfig):
    """The mesh of judges."""

    # "process": over the devices of each process, which labels rows of its own; "all": one over all devices, for TPUs
    # that run no program on a part of their slice (v5e, v6e) and for a judge that no single process has room for.
    spans: str


@dataclasses.dataclass(frozen=True)
class MeshConfig(AxesConfig):
    """The mesh of all devices, on which policy, reference, value network and reward model live, and that of judges."""

    slices: int  # TPU slices, or groups of GPU nodes with slower links between them; `data` is split over them first
    offload: tuple[str, ...]  # of OFFLOADED: whose parameters wait in host memory between uses
    judge: JudgeMeshConfig


def make_mesh(config: AxesConfig, devices: Sequence | None = None, slices: int = 1) -> Mesh:
    """The mesh of all devices, or of these, which may be those of an ahead-of-time topology, in so many slices.

    A slice holds consecutive devices. On TPUs the axes follow the wires within it.
    Raises ValueError where the sizes do not multiply to the device count, and for slices that do not fit.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    if sizes.count(-1) > 1 or any(size == 0 or size < -1 for size in sizes):
        raise ValueError(f"mesh sizes must be positive, with at most one -1: {sizes} of {', '.join(MESH_AXES)}")
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = max(len(devices) // known, 1)
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, sizes, strict=True))
        raise ValueError(
            f"a mesh of {shape} needs {math.prod(sizes)} devices, but there are {len(devices)}: change its sizes"
        )
    slices = config.slices if isinstance(config, MeshConfig) else slices
    if slices < 1 or sizes[0] % slices:
        raise ValueError(
            f"slices={slices} must be positive and divide data={sizes[0]}, which is split over slices first: "
            "set data to a multiple"
        )
    shape = sizes[0] // slices, *sizes[1:]
    # Slices are along `data`, and nothing else is: what is summed over them is a gradient, once a step.
    blocks = [
        mesh_utils.create_device_mesh(shape, block, allow_split_physical_axes=True)
        for block in _slices(devices, slices)
    ]
    return Mesh(np.concatenate(blocks), MESH_AXES)


def _slices(devices: list, count: int) -> list[list]:
    """The devices of each slice. Devices that name no slices are in one, or in consecutive blocks of equal size."""
    devices = sorted(devices, key=_slice_index)
    named = len({_slice_index(device) for device in devices})
    if devices[0].platform == "tpu" and named != count:
        raise ValueError(f"slices={count}, but the devices are in {named}: set slices={named}")
    size = len(devices) // count
    return [devices[start : start + size] for start in range(0, len(devices), size)]


def _slice_index(device) -> int:
    return getattr(device, "slice_index", None) or 0


def batch_ways(mesh: Mesh) -> int:
    """Over how many groups of devices a batch is split: what its rows must be a multiple of."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def platform() -> str:
    """What a program is traced for, "cpu", "gpu" or "tpu": the ambient mesh's devices, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device else jax.default_backend()


def partition_spec(
    logical_axes: tuple[str | None, ...],
    shape: tuple[int, ...],
    mesh: Mesh,
    replicated: tuple[str, ...] = (),
    rules: Rules = RULES,
) -> PartitionSpec:
    """The mesh axes of one array from its logical axes; those of one device split nothing and are left out.

    Raises ValueError for an unknown logical axis, for two dimensions that claim one mesh axis, and for a
    dimension that its mesh axes do not divide, unless that logical axis is listed in `replicated`.
    """
    spec: list[tuple[str, ...] | None] = []
    used: dict[str, str] = {}
    for name, size in zip(logical_axes, shape, strict=True):
        if name is None:
            spec.append(None)
            continue
        if name not in rules:
            raise ValueError(f"logical axis {name!r} has no rule; known: {sorted(rules)}")
        mesh_axes = tuple(axis for axis in rules[name] if mesh.shape[axis] > 1)
        ways = math.prod(mesh.shape[axis] for axis in mesh_axes)
        if size % ways:
            if name not in replicated:
                raise ValueError(
                    f"logical axis {name!r} has size {size}, which mesh axes {mesh_axes} ({ways} ways) do "
                    f"not divide: change the mesh's sizes, or list {name!r} in its `replicated`"
                )
            mesh_axes = ()
        for axis in mesh_axes:
            if axis in used:
                raise ValueError(f"logical axes {used[axis]!r} and {name!r} both claim mesh axis {axis!r}")
            used[axis] = name
        spec.append(mesh_axes or None)
    return PartitionSpec(*spec)


def parameter_shardings(abstract_parameters, mesh: Mesh, replicated: tuple[str, ...] = (), rules: Rules = RULES):
    """Shardings of a tree of Flax partitioned boxes (`jax.eval_shape(model.init, ...)["params"]`)."""

    def sharding(box):
        if not isinstance(box, nn.LogicallyPartitioned):
            raise ValueError(f"a weight of shape {box.shape} declares no logical axes")
        return NamedSharding(mesh, partition_spec(box.names, box.value.shape, mesh, replicated, rules))

    return jax.tree.map(sharding, abstract_parameters, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def constrain(x: jax.Array, *logical_axes: str | None, odd: tuple[str, ...] = ()) -> jax.Array:
    """Pins the sharding of an activation under the ambient mesh (`jax.set_mesh`); without one, `x` itself.

    Raises ValueError as `partition_spec` does. A dimension of size 1 stays whole, for there is nothing to split: the
    token of a decoding step, the one row of a judge's preamble. odd: other axes that may stay whole here.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    names = (None if size == 1 else name for name, size in zip(logical_axes, x.shape, strict=True))
    return jax.lax.with_sharding_constraint(x, partition_spec(tuple(names), x.shape, mesh, odd))


def splits_batch() -> bool:
    """Whether the ambient mesh splits activations along their batch."""
    return _splits("batch")


def splits_length() -> bool:
    """Whether the ambient mesh splits activations along their length."""
    return _splits("length")


def _splits(name: str) -> bool:
    return any(jax.sharding.get_abstract_mesh().shape.get(axis, 1) > 1 for axis in RULES[name])


def shard_batch(batch, mesh: Mesh):
    """Puts a tree of host arrays on the mesh, split along their first axis over `data` and `fsdp`.

    Raises ValueError where the devices do not divide the batch: every process must hold whole rows.
    """
    return jax.tree.map(lambda x: processes.put(np.asarray(x), batch_sharding(np.shape(x), mesh)), batch)


def shard_rows(rows: Sequence, read: Callable[[list], Any], mesh: Mesh):
    """`shard_batch` of `read(rows)`, a tree of host arrays; each process reads the rows that its devices hold alone."""
    if processes.count() == 1:
        return shard_batch(read(list(rows)), mesh)
    held = batch_sharding((len(rows),), mesh).addressable_devices_indices_map((len(rows),))
    mine = sorted({row for (part,) in held.values() for row in range(len(rows))[part]})
    place = {row: i for i, row in enumerate(mine)}

    def put(x: np.ndarray) -> jax.Array:
        shape = (len(rows), *x.shape[1:])
        part = lambda index: x[[place[row] for row in range(len(rows))[index[0]]]]  # noqa: E731
        return jax.make_array_from_callback(shape, batch_sharding(shape, mesh), part)

    return jax.tree.map(put, read([rows[row] for row in mine]))


def batch_sharding(shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    """The sharding of a batch's array: along its first axis."""
    return NamedSharding(mesh, partition_spec(("batch",) + (None,) * (len(shape) - 1), shape, mesh))
