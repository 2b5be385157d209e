"""The parts of Hugging Face's tensors that our parameters are."""

import math

import numpy as np

from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.transformer import ModelConfig

_QKV = ("query", "key", "value")


def in_our_layout(name: str, tensor: np.ndarray, config: ModelConfig) -> np.ndarray:
    """The part of a Hugging Face tensor that is our parameter `name`, as a view: to read it, and to write into it.

    query, key, value: [in, heads, head_dim]; output: [heads, head_dim, out]; other matrices of products: [in, out].
    """
    product, family = name.removesuffix("_bias"), FAMILIES[config.family]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    if tensor.ndim == 1 and product not in _QKV:
        return tensor
    if name in ("embedding", "position_embedding"):
        return tensor
    if family.transposed and tensor.ndim == 2 and name not in ("lm_head", "kernel"):
        tensor = tensor.T
    if product in _QKV:
        count, rest = heads if product == "query" else kv_heads, tensor.shape[1:]
        if family.fused == "heads":
            tensor = tensor.reshape(count, len(_QKV), -1, *rest)[:, _QKV.index(product)]
        elif family.fused == "thirds":
            tensor = tensor.reshape(len(_QKV), count, -1, *rest)[_QKV.index(product)]
        else:
            tensor = tensor.reshape(count, -1, *rest)
        return np.moveaxis(tensor, 2, 0) if rest else tensor
    if name == "output":
        return np.moveaxis(tensor.reshape(len(tensor), heads, -1), 0, 2)
    return tensor.T


def stored_shape(name: str, shape: tuple[int, ...], config: ModelConfig) -> tuple[int, ...]:
    """The shape of the Hugging Face tensor of which our parameter `name`, of this shape in a layer, is a part."""
    product, family = name.removesuffix("_bias"), FAMILIES[config.family]
    parts = len(_QKV) if product in _QKV and family.fused else 1
    if name in ("embedding", "position_embedding"):
        return shape
    if name != product or "/" in name:
        return (parts * math.prod(shape),)
    inputs = 2 if name == "output" else 1  # dimensions
    stored = parts * math.prod(shape[inputs:]), math.prod(shape[:inputs])
    return stored[::-1] if family.transposed and name not in ("lm_head", "kernel") else stored


def fits(name: str, shape: tuple[int, ...], config: ModelConfig, expected: tuple[int, ...]) -> bool:
    """Whether a tensor of this shape holds our parameter `name`, of the shape `expected`."""
    try:
        return in_our_layout(name, np.broadcast_to(np.float32(0), shape), config).shape == expected
    except (ValueError, IndexError):  # what does not divide, or has too few dimensions
        return False
