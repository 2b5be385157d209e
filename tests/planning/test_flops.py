import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlaif_jax.planning.flops import product_flops
from tests.helpers import eight_device_mesh

ROWS, WIDTH, LAYERS = 8, 16, 5
X, WEIGHTS = jnp.zeros((ROWS, WIDTH)), jnp.zeros((LAYERS, WIDTH, WIDTH))
PRODUCT = 2 * ROWS * WIDTH * WIDTH  # of X with one layer's weights


def counted(function, *arguments, trips=1):
    return product_flops(jax.jit(function).trace(*arguments).jaxpr, trips)


def layers(weights, x, layer):
    return jax.lax.scan(lambda x, weight: (layer(x, weight), None), x, weights)[0].sum()


def one(x, weight):
    return jnp.tanh(x @ weight)


def two(x, weight):
    return jnp.tanh(jnp.tanh(x @ weight) @ weight)


def test_a_product_takes_two_for_each_entry_of_the_result_and_contracted_index():
    assert counted(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), np.zeros((3, 4, 5)), np.zeros((3, 5, 7))) == (
        2 * 3 * 4 * 5 * 7
    )


def test_a_scan_counts_as_often_as_it_runs():
    assert counted(lambda w, x: layers(w, x, one), WEIGHTS, X) == LAYERS * PRODUCT


def test_a_gradient_takes_twice_as_much_again():
    assert counted(jax.grad(lambda w, x: layers(w, x, one), (0, 1)), WEIGHTS, X) == 3 * LAYERS * PRODUCT


def test_what_is_recomputed_counts_again():
    # Of two products a layer the backward pass makes both again, for what comes after each is not kept.
    gradient = jax.grad(lambda w, x: layers(w, x, jax.checkpoint(two)), (0, 1))
    assert counted(gradient, WEIGHTS, X) == (2 + 2 + 4) * LAYERS * PRODUCT


def test_a_loop_whose_length_the_data_decide_counts_as_often_as_is_said():
    def until_small(x, weight):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: one(x, weight), x)

    assert counted(until_small, X, WEIGHTS[0], trips=7) == 7 * PRODUCT


def test_the_dearest_branch_counts():
    def either(x, weight):
        return jax.lax.cond(x.sum() > 0, two, one, x, weight)

    assert counted(either, X, WEIGHTS[0]) == 2 * PRODUCT


def test_what_is_written_for_one_device_counts_for_all():
    mesh = eight_device_mesh()
    spec = PartitionSpec("fsdp")
    with jax.set_mesh(mesh):
        split = jax.shard_map(one, in_specs=(spec, PartitionSpec()), out_specs=spec, check_vma=False)
        # `tensor` has two devices, which do the same.
        assert counted(split, X, WEIGHTS[0]) == mesh.shape["tensor"] * PRODUCT


@pytest.mark.parametrize(("length", "products"), [(64, 2), (128, 2)])
def test_attention_takes_two_products_of_queries_and_keys(length, products):
    heads, head_dim = 2, 8
    query = jnp.zeros((1, length, heads, head_dim))
    attended = counted(lambda q: jax.nn.dot_product_attention(q, q, q), query)
    assert attended == products * 2 * heads * length * length * head_dim
