import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from rlaif_jax.parallel.mesh import MeshConfig, constrain, make_mesh, parameter_shardings, partition_spec, shard_batch
from tests.helpers import eight_device_mesh


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
    mesh = make_mesh(MeshConfig(data=2, fsdp=4, tensor=1, replicated=()))
    assert partition_spec(("batch", "vocab"), (8, 3), mesh) == P(("data", "fsdp"), None)


def test_an_unknown_axis_is_an_error(mesh):
    with pytest.raises(ValueError, match="'sequence' has no rule"):
        partition_spec(("sequence",), (8,), mesh)


def test_two_dimensions_of_one_mesh_axis_are_an_error(mesh):
    with pytest.raises(ValueError, match="'heads' and 'mlp' both claim mesh axis 'tensor'"):
        partition_spec(("heads", "mlp"), (4, 64), mesh)


def test_an_axis_that_does_not_divide_is_an_error_unless_the_config_lists_it(mesh):
    with pytest.raises(ValueError, match=r"'heads' has size 9.*config\.mesh"):
        partition_spec(("heads",), (9,), mesh)
    with pytest.raises(ValueError, match="'heads'"):
        partition_spec(("heads",), (9,), mesh, replicated=("vocab",))
    assert partition_spec(("heads",), (9,), mesh, replicated=("heads",)) == P(None)
    assert partition_spec(("heads",), (8,), mesh, replicated=("heads",)) == P(("tensor",))


def test_a_weight_without_axes_is_an_error(mesh):
    with pytest.raises(ValueError, match="declares no logical axes"):
        parameter_shardings({"weight": jax.ShapeDtypeStruct((2, 2), jnp.float32)}, mesh)


@pytest.mark.parametrize(
    ("sizes", "expected"), [((1, -1, 1), (1, 8, 1)), ((2, 2, -1), (2, 2, 2)), ((-1, 4, 2), (1, 4, 2))]
)
def test_minus_one_takes_the_devices_that_are_left(sizes, expected):
    assert tuple(make_mesh(MeshConfig(*sizes, replicated=())).shape.values()) == expected


@pytest.mark.parametrize("sizes", [(3, 1, 1), (1, 4, 1), (-1, -1, 1), (0, -1, 1), (-2, 4, 1), (-1, 3, 1), (-1, 16, 1)])
def test_sizes_that_do_not_give_the_device_count_are_an_error(sizes):
    with pytest.raises(ValueError, match="mesh"):
        make_mesh(MeshConfig(*sizes, replicated=()))


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 2))
    assert constrain(x, "batch", None) is x


@pytest.mark.parametrize(("batch", "spec"), [(8, P(("fsdp",), None)), (1, P())])
def test_constrain_splits_what_the_mesh_divides(mesh, batch, spec):
    with jax.set_mesh(mesh):
        x = jax.jit(lambda x: constrain(x * 2, "batch", None))(np.ones((batch, 2), np.float32))
    assert x.sharding.is_equivalent_to(jax.NamedSharding(mesh, spec), 2)


def test_a_batch_is_split_in_whole_rows(mesh):
    x = np.arange(16).reshape(8, 2)
    placed = shard_batch({"x": x}, mesh)["x"]
    assert np.array_equal(placed, x)
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 2)}
    with pytest.raises(ValueError, match="'batch' has size 6"):
        shard_batch(x[:6], mesh)
