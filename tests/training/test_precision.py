"""A bfloat16 computation: what adds up in float32."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.data.packing import lay_out
from rlaif_jax.losses.logprobs import entropy_and_kl, token_logprobs
from rlaif_jax.models.parameters import place_parameters
from rlaif_jax.models.products import look_up, project
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import make_mesh, shard_batch
from rlaif_jax.training.packed import sft_loss
from tests.helpers import axes, eight_devices, random_params, tiny

RNG = np.random.default_rng(0)
ROWS, LENGTH, WIDTH = 16, 32, 32
HALF = jnp.bfloat16


def normal(*shape, dtype=HALF):
    return jnp.asarray(RNG.normal(size=shape), dtype)


@pytest.mark.parametrize(("shape", "contracted"), [((WIDTH, 4, 8), 1), ((4, 8, WIDTH), 2)])
@pytest.mark.parametrize("sequence", [1, 2])
def test_the_gradient_of_a_weight_is_a_float32_sum_over_tokens(shape, contracted, sequence):
    x, weight = normal(ROWS, LENGTH, *shape[:contracted]), normal(*shape, dtype=jnp.float32)
    slope = normal(ROWS, LENGTH, *shape[contracted:])
    with jax.set_mesh(make_mesh(axes(sequence=sequence), jax.devices()[:sequence])):
        _, backward = jax.vjp(jax.jit(functools.partial(project, contracted=contracted)), x, weight)
        for_x, for_weight = backward(slope)
    wide = [np.asarray(y, np.float64) for y in (x, slope)]
    expected = np.tensordot(*wide, ((0, 1), (0, 1)))
    np.testing.assert_allclose(for_weight, expected, rtol=1e-5, atol=1e-4)  # bfloat16: rtol=4e-3
    assert for_x.dtype == HALF and for_weight.dtype == jnp.float32
    outputs = tuple(range(contracted, len(shape)))
    for_x_expected = np.tensordot(wide[1], np.asarray(weight.astype(HALF), np.float64), (
        tuple(range(2, slope.ndim)), outputs))  # fmt: skip
    np.testing.assert_allclose(np.asarray(for_x, np.float64), for_x_expected, rtol=1e-2, atol=1e-2)


def test_the_gradient_of_an_embedding_is_a_float32_sum_over_its_tokens():
    tokens, slope = np.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) % 3, normal(ROWS, LENGTH, WIDTH)
    table = normal(5, WIDTH, dtype=jnp.float32)
    states, backward = jax.vjp(lambda table: look_up(table, tokens, "bfloat16"), table)
    np.testing.assert_array_equal(states, table.astype(HALF)[tokens])
    expected = [np.asarray(slope, np.float64)[tokens == token].sum(0) for token in range(5)]
    np.testing.assert_allclose(backward(slope)[0], expected, rtol=1e-5, atol=1e-4)


HIDDEN, MATRIX = normal(ROWS, LENGTH, WIDTH), normal(WIDTH, 20, dtype=jnp.float32)
TARGETS = RNG.integers(0, 20, (ROWS, LENGTH))


def logprobs(hidden, matrix):
    return token_logprobs(hidden, matrix, TARGETS, chunk=LENGTH)


def kl(hidden, matrix):
    return entropy_and_kl(hidden, matrix, hidden * 0.5, matrix, chunk=LENGTH)[1]


@pytest.mark.parametrize("function", [logprobs, kl])
def test_logits_and_the_gradient_of_the_output_matrix_are_float32_sums(function):
    both = jax.jit(lambda *arguments: (function(*arguments), jax.grad(lambda *x: jnp.sum(function(*x)), 1)(*arguments)))
    values, for_matrix = both(HIDDEN, MATRIX)
    rounded = MATRIX.astype(HALF).astype(jnp.float32)  # the factors are bfloat16, and nothing else
    expected, for_matrix_expected = both(HIDDEN.astype(jnp.float32), rounded)
    np.testing.assert_allclose(values, expected, rtol=1e-5, atol=1e-5)
    # What comes back from the logits is rounded, being a factor as well.
    np.testing.assert_allclose(for_matrix, for_matrix_expected, atol=0.01 * np.abs(for_matrix_expected).max())
    assert np.mean(np.asarray(for_matrix).view(np.uint32) % (1 << 16) == 0) < 0.01  # all, of sums in bfloat16


def test_gradients_are_summed_over_devices_in_float32(tmp_path):
    """In the program as it is split over devices: later the CPU's compiler widens all sums, an accelerator's none."""
    model, placement = LanguageModel(tiny(dtype="bfloat16")), eight_devices()
    gradient = jax.jit(jax.grad(lambda params, batch: sft_loss(params, batch, model)[0]))
    rows = lay_out([[([2, 3, 4], [5, 6, 7])]] * ROWS, LENGTH)
    with jax.set_mesh(placement.mesh):
        arguments = place_parameters(model, random_params(model), placement), shard_batch(rows, placement.mesh)
        gradient.lower(*arguments).compile(
            {"xla_dump_to": str(tmp_path), "xla_dump_hlo_as_text": True, "xla_dump_hlo_pass_re": "spmd-partitioning"}
        )
    (file,) = tmp_path.glob("*.after_spmd-partitioning*.txt")
    sums = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-reduce|reduce-scatter)\(", file.read_text())
    c, rows_here = model.config, ROWS // 4
    width, mlp, heads = c.hidden_size, c.intermediate_size // 2, c.num_attention_heads // 2 * c.head_dim
    weights = {f"{width},{mlp}", f"{mlp},{width}", f"{width},{heads}", f"{heads},{width}"}
    assert weights <= {shape for dtype, shape in sums if dtype == "f32"}
    activations = {f"{rows_here * LENGTH},{width}"} | {f"{rows_here},{LENGTH - i},{width}" for i in (0, 1)}
    assert {shape for dtype, shape in sums if dtype == "bf16"} <= activations
