"""The floating-point operations of a traced program: what its matrix products take, loops counted as often as they run.

Compilers count the body of a loop once, and count nothing of what they make kernels of, so we count before they begin.
"""

import math

from jax.extend import core


def product_flops(jaxpr: core.ClosedJaxpr | core.Jaxpr, trips: int = 1) -> int:
    """Two for each multiplication and addition of a matrix product or an attention kernel; the rest is not counted.

    What is recomputed in a backward pass counts each time. Of a `cond` the dearest branch counts; of a `while` loop,
    whose length data decides, `trips` passes do, and one pass of those inside it.
    """
    jaxpr = jaxpr.jaxpr if isinstance(jaxpr, core.ClosedJaxpr) else jaxpr
    return sum(_equation_flops(equation, trips) for equation in jaxpr.eqns)


def _equation_flops(equation: core.JaxprEqn, trips: int) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot_flops(equation)
    if name.startswith("dot_product_attention"):  # cuDNN's
        return _attention_flops(equation, backward="bwd" in name)
    if name == "scan":
        return parameters["length"] * product_flops(parameters["jaxpr"], trips)
    if name == "while":
        return trips * product_flops(parameters["body_jaxpr"])
    if name == "cond":
        return max(product_flops(branch, trips) for branch in parameters["branches"])
    if name == "shard_map":  # its jaxpr is one device's
        return math.prod(parameters["mesh"].shape.values()) * product_flops(parameters["jaxpr"], trips)
    inner = sum(product_flops(jaxpr, trips) for jaxpr in _jaxprs(parameters))
    if name == "pallas_call":
        return math.prod(parameters["grid_mapping"].grid) * inner
    return inner


def _jaxprs(parameters: dict) -> list:
    """The programs that a primitive is made of: of a jit, a remat, a custom derivative's function ..."""
    return [value for value in parameters.values() if isinstance(value, (core.Jaxpr, core.ClosedJaxpr))]


def _dot_flops(equation: core.JaxprEqn) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _attention_flops(equation: core.JaxprEqn, backward: bool) -> int:
    """Two products of queries and keys [batch, length, heads, head_dim]; the backward pass takes five."""
    query, key = (x.aval.shape for x in equation.invars[:2])
    one = 2 * math.prod(query) * key[1]
    return (5 if backward else 2) * one
