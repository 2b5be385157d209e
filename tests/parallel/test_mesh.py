import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlaif_jax.parallel.mesh import constrain, make_mesh, parameter_shardings, partition_spec, shard_batch
from tests.helpers import Chip, axes, eight_device_mesh, mesh_config


@pytest.fixture(scope="module")
def mesh():
    return eight_device_mesh()


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("vocab", "embed"), (64, 32), P(("tensor",), ("fsdp",))),
        (("batch", None), (8, 7), P(("fsdp",), None)),
        (("layers", "embed", "heads", "head_dim"), (3, 32, 4, 5), P(None, ("fsdp",), ("tensor",), None)),
        (("scalar",), (1,), P(None)),
    ],
)
def test_each_axis_is_split_by_its_rule(mesh, axes, shape, spec):
    assert partition_spec(axes, shape, mesh) == spec


def test_the_batch_is_split_over_data_and_fsdp():
    mesh = make_mesh(axes(data=2, fsdp=4))
    assert partition_spec(("batch", "vocab"), (8, 3), mesh) == P(("data", "fsdp"), None)


def test_an_unknown_axis_is_an_error(mesh):
    with pytest.raises(ValueError, match="'sequence' has no rule"):
        partition_spec(("sequence",), (8,), mesh)


def test_two_dimensions_of_one_mesh_axis_are_an_error(mesh):
    with pytest.raises(ValueError, match="'heads' and 'mlp' both claim mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (4, 64), mesh)


def test_an_axis_that_does_not_divide_is_an_error_unless_the_config_lists_it(mesh):
    with pytest.raises(ValueError, match=r"'heads' has size 9.*list 'heads' in its `replicated`"):
        partition_spec(("heads",), (9,), mesh)
    with pytest.raises(ValueError, match="'heads'"):
        partition_spec(("heads",), (9,), mesh, replicated=("vocab",))
    assert partition_spec(("heads",), (9,), mesh, replicated=("heads",)) == P(None)
    assert partition_spec(("heads",), (8,), mesh, replicated=("heads",)) == P(("tensor",))


def test_a_weight_without_axes_is_an_error(mesh):
    with pytest.raises(ValueError, match="declares no logical axes"):
        parameter_shardings({"weight": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, mesh)


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1, -1, 1), (1, 8, 1, 1)), ((2, 2, -1), (2, 2, 2, 1)), ((-1, 2, 1, 2), (2, 2, 1, 2))]
)
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
    assert tuple(make_mesh(axes(*sizes)).shape.values()) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 4, 1), (-1, -1, 1), (0, -1, 1), (-2, 4, 1), (-1, 3, 1), (-1, 16, 1)])
def test_sizes_that_do_not_give_the_device_count_are_an_error(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(axes(*sizes))


@pytest.mark.parametrize(("slices", "data", "fsdp"), [(2, 2, 2), (2, -1, 2), (4, 4, 1), (2, 2, 4)])
def test_slices_are_consecutive_devices_along_data(slices, data, fsdp):
    mesh = make_mesh(mesh_config(slices=slices, data=data, fsdp=fsdp, tensor=-1 if data > 0 else 2))
    of_slice = np.vectorize(lambda device: device.id * slices // 8)(mesh.devices)
    each = of_slice.reshape(slices, -1)  # data is the first axis, and its blocks are whole slices
    assert np.array_equal(each, np.repeat(np.arange(slices), 8 // slices).reshape(slices, -1))


def test_devices_that_name_their_slice_are_grouped_by_it():
    mesh = make_mesh(mesh_config(slices=2, data=4, fsdp=2), [Chip(i, i % 2) for i in range(8)])
    assert [chip.slice_index for chip in mesh.devices.flat] == [0] * 4 + [1] * 4


def test_slices_that_do_not_fit_are_an_error():
    with pytest.raises(ValueError, match="slices=4 must be positive and divide data=2"):
        make_mesh(mesh_config(slices=4, data=2, fsdp=4))
    with pytest.raises(ValueError, match="slices=0 must be positive"):
        make_mesh(mesh_config(slices=0, data=2, fsdp=4))
    chips = [Chip(i, i // 4, "tpu") for i in range(8)]
    with pytest.raises(ValueError, match="slices=1, but the devices are in 2: set slices=2"):
        make_mesh(mesh_config(slices=1, data=2, fsdp=4), chips)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(
    ("shape", "odd", "spec"),
    [((8, 6), (), P("fsdp", "sequence")), ((1, 1), (), P()), ((6, 8), ("batch",), P(None, "sequence"))],
)
def test_constrain_splits_what_the_mesh_divides(shape, odd, spec):
    mesh = make_mesh(axes(fsdp=4, sequence=2))
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x * 2, "batch", "length", odd=odd))(np.ones(shape, np.float32))
    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)


@pytest.mark.parametrize(("shape", "odd", "name"), [((6, 8), (), "batch"), ((6, 7), ("batch",), "length")])
def test_an_activation_that_does_not_divide_is_an_error_unless_it_may_be_odd(shape, odd, name):
    with jax.set_mesh(make_mesh(axes(fsdp=4, sequence=2))), pytest.raises(ValueError, match=f"'{name}' has size"):
        constrain(np.ones(shape), "batch", "length", odd=odd)


def test_a_batch_is_split_in_whole_rows(mesh):
    x = np.arange(16).reshape(8, 2)
    placed = shard_batch({"x": x}, mesh)["x"]
    assert np.array_equal(placed, x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    with pytest.raises(ValueError, match="'batch' has size 6"):
        shard_batch(x[:6], mesh)
