"""Products with weights and rows of embeddings, in the dtype of the computation; their gradients are float32 sums."""

import functools
import math

import jax
import jax.numpy as jnp

from rlaif_jax.parallel.mesh import constrain, platform, splits_length


def project(x: jax.Array, weight: jax.Array, contracted: int = 1) -> jax.Array:
    """Contracts the last `contracted` dimensions of x with the first ones of weight, in the dtype of x.

    [batch, length, *in] x [*in, *out] -> [batch, length, *out], as one product of two matrices: XLA's CPU backend
    takes twice as long for the gradient of the same contraction with separate batch and length dimensions. Where both
    are split, one dimension of them could not be. The gradient of weight is summed in weight's dtype.
    """
    if splits_length():
        return _product(x, weight, contracted)
    inputs, outputs = weight.shape[:contracted], weight.shape[contracted:]
    matrix = weight.reshape(math.prod(inputs), math.prod(outputs))
    return _product(x.reshape(-1, math.prod(inputs)), matrix, 1).reshape(*x.shape[:-contracted], *outputs)


def _product(x: jax.Array, weight: jax.Array, contracted: int) -> jax.Array:
    if x.dtype == weight.dtype:
        return jnp.tensordot(x, weight, contracted)
    product = jnp.tensordot(x, jax.lax.stop_gradient(weight).astype(x.dtype), contracted)
    return _with_weight_gradient(product, x, weight)


@jax.custom_vjp
def _with_weight_gradient(product, x, weight):
    """`product` itself. Without this, the gradient of a weight that is cast would be summed as what it is cast to, over
    tokens and over devices. The product stands outside, where a policy of `REMAT` can tell it.
    """
    return product


def _with_weight_gradient_forward(product, x, weight):
    return product, (x, weight)


def _with_weight_gradient_backward(residuals, slope):
    x, weight = residuals
    rows = tuple(range((x.ndim + slope.ndim - weight.ndim) // 2))
    # XLA's CPU backend lacks some products of bfloat16 factors with float32 sums: there the factors are widened.
    x, slope_of_weight = (y.astype(weight.dtype) if platform() == "cpu" else y for y in (x, slope))
    return slope, None, jnp.tensordot(x, slope_of_weight, (rows, rows), preferred_element_type=weight.dtype)


_with_weight_gradient.defvjp(_with_weight_gradient_forward, _with_weight_gradient_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def look_up(embedding: jax.Array, rows: jax.Array, dtype: str, axis: str = "vocab") -> jax.Array:
    """Rows of an embedding, in a dtype; their gradients are summed in the dtype of the embedding.

    [size, width], [batch, length] int32 -> [batch, length, width]. axis: the logical axis along `size`.
    """
    # Whole along the width, or the states of all rows would be looked up on every device, a part of the width each.
    return constrain(embedding.astype(dtype), axis, None, odd=("vocab",))[rows]


def _look_up_forward(embedding, rows, dtype: str, axis: str):
    return look_up(embedding, rows, dtype, axis), (embedding, rows)


def _look_up_backward(dtype: str, axis: str, residuals, slope):
    embedding, rows = residuals
    gradient = jnp.zeros_like(embedding).at[rows].add(slope.astype(embedding.dtype))
    return constrain(gradient, axis, None, odd=("vocab",)), None


look_up.defvjp(_look_up_forward, _look_up_backward)
