"""Hugging Face folders, written: the inverse of `huggingface`, for `from_pretrained` of transformers."""

import dataclasses
import json
import os
from collections.abc import Mapping
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import save_file
from transformers import AutoConfig, PretrainedConfig

from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.huggingface import SCALING_FIELDS, model_config
from rlaif_jax.models.layouts import in_our_layout, stored_shape
from rlaif_jax.models.parameters import in_layers, layer_to_host, parameter_name
from rlaif_jax.models.rotary import NO_SCALING, RopeScaling
from rlaif_jax.models.transformer import ModelConfig
from rlaif_jax.parallel import processes

DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
SHARD_BYTES = 5 * 10**9  # at most, as transformers has it, but for a tensor that is larger
_NOT_OF_THE_MODEL = ("lora_scale", "remat", "attention", "dtype")  # fields of ModelConfig that say how it is computed


class Stored(NamedTuple):
    """A tensor to be written."""

    shape: tuple[int, ...]
    parts: tuple[tuple[str, int], ...]  # the parameters that it holds, and the layer of each


def huggingface_config(config: ModelConfig, dtype: str, scalar: bool, **fields) -> PretrainedConfig:
    """What `model_config` reads as the same model: of a language model, or of one that gives a score.

    fields: others to go into config.json. Raises UserError for a model that transformers has no class for.
    """
    family, config = FAMILIES[config.family], _as_read(config)
    fields |= {"architectures": [family.classifier if scalar else family.causal], "dtype": dtype}
    fields |= {"num_labels": 1} if scalar else {}
    try:
        known = AutoConfig.for_model(family.model_type)
        found = AutoConfig.for_model(family.model_type, **_fields(config, known), **fields)
    except Exception as error:  # transformers checks with exceptions of many classes
        reason = " ".join(str(error).split())
        raise UserError(f"transformers takes no {family.model_type} model of this shape: {reason}") from error
    read = _as_read(model_config(found, epath.Path(family.model_type)))
    for field in dataclasses.fields(ModelConfig):
        ours, theirs = getattr(config, field.name), getattr(read, field.name)
        if ours != theirs and field.name not in _NOT_OF_THE_MODEL:
            raise UserError(
                f"{field.name}={ours!r} can't be written: {family.model_type} models of transformers have {theirs!r}"
            )
    return found


def _as_read(config: ModelConfig) -> ModelConfig:
    """The same model as `model_config` gives it: what has no effect in it is as it is by default."""
    if FAMILIES[config.family].learned_positions:
        config = dataclasses.replace(
            config, rope_theta=10_000.0, rope_scaling=NO_SCALING, partial_rotary_factor=1.0, no_rope_layers=()
        )
    if not config.sliding_window:
        config = dataclasses.replace(config, full_attention_layers=(), rope_local_base_freq=0.0)
    if config.query_pre_attn_scalar == config.head_dim:
        config = dataclasses.replace(config, query_pre_attn_scalar=0.0)
    return config


def _fields(config: ModelConfig, known: PretrainedConfig) -> dict:
    """The arguments of a class of which `known` is an instance; what it does not know is left out."""
    c, family = config, FAMILIES[config.family]
    layers, window = range(c.num_hidden_layers), c.sliding_window
    kinds = ["full_attention" if not window or i in c.full_attention_layers else "sliding_attention" for i in layers]
    query_scale = c.query_pre_attn_scalar or c.head_dim
    eps = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")
    if_known = dict.fromkeys(eps, c.rms_norm_eps) | {
        "intermediate_size": c.intermediate_size,
        "n_inner": c.intermediate_size if c.intermediate_size != 4 * c.hidden_size else None,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "use_parallel_residual": family.parallel,
        "rope_parameters": _rope_parameters(c, known),
        "no_rope_layers": [int(i not in c.no_rope_layers) for i in layers],
        "layer_types": kinds,
        "sliding_window": window or None,
        "use_sliding_window": bool(window),
        "query_pre_attn_scalar": int(query_scale) if query_scale == int(query_scale) else query_scale,
        "attn_logit_softcapping": c.attn_logit_softcapping or None,
        "final_logit_softcapping": c.final_logit_softcapping or None,
    }
    fields = {name: value for name, value in if_known.items() if hasattr(known, name)}
    # Qwen 2 and SmolLM3 read a size of heads that their configs do not declare.
    if not family.fused and c.head_dim * c.num_attention_heads != c.hidden_size:
        fields["head_dim"] = c.head_dim
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    return fields | {name: getattr(c, name) for name in (*names, "tie_word_embeddings")}


def _rope_parameters(config: ModelConfig, known: PretrainedConfig) -> dict:
    default = getattr(known, "rope_parameters", None) or {}
    rope = _rope(config.rope_theta, config.rope_scaling)
    if "partial_rotary_factor" in default:
        rope |= {"partial_rotary_factor": config.partial_rotary_factor}
    if "sliding_attention" not in default:
        return rope
    local = _rope(config.rope_local_base_freq, NO_SCALING) if config.rope_local_base_freq else rope
    return {"full_attention": rope, "sliding_attention": local}


def _rope(theta: float, scaling: RopeScaling) -> dict:
    fields = {name: getattr(scaling, name) for name in SCALING_FIELDS[scaling.rope_type]}
    return {"rope_type": scaling.rope_type, "rope_theta": theta, **fields}


def write_weights(folder: epath.Path, config: ModelConfig, parameters, dtype: str, limit: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes and their index, one at a time.

    parameters: of a LanguageModel or ScalarModel; the latter's bias is left out, for which there is no place. All
    processes call this, and the first one writes. Raises UserError where a value is not finite in `dtype`, and OSError.
    """
    paths = jax.tree_util.tree_leaves_with_path(parameters)
    leaves = {parameter_name(path): (leaf, in_layers(path)) for path, leaf in paths}
    shapes = {name: leaf.shape[stacked:] for name, (leaf, stacked) in leaves.items()}
    tensors = stored_tensors(config, shapes)
    size = {name: int(np.prod(tensor.shape)) * np.dtype(DTYPES[dtype]).itemsize for name, tensor in tensors.items()}
    shards, files = _shards(size, limit), {}
    for number, names in enumerate(shards, 1):
        one = "model.safetensors"
        file = one if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        arrays = {}
        for name in names:
            array = _filled(name, tensors[name], config, leaves, dtype)
            if processes.first():
                arrays[name] = array
        if processes.first():
            save_tensors(folder / file, arrays)
        files |= dict.fromkeys(names, file)
    if len(shards) > 1 and processes.first():
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_tensors(file: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes one file, with the permissions of any other. Raises OSError where there is no room."""
    file.touch()
    mode = os.stat(file).st_mode
    try:
        save_file(dict(arrays), str(file), metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    os.chmod(file, mode)


def stored_tensors(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Stored]:
    """The tensors of a Hugging Face folder by name, those of the layers last, from `parameter_shapes`."""
    family, found = FAMILIES[config.family], {}
    whole = [(family.whole[name], name, 0) for name in family.whole if name in shapes]
    layers = [
        (family.whole["layers"].format(layer) + theirs, name, layer)
        for layer in range(config.num_hidden_layers)
        for name, theirs in family.layer.items()
    ]
    for theirs, name, layer in whole + layers:
        parts = found[theirs].parts if theirs in found else ()
        found[theirs] = Stored(stored_shape(name, shapes[name], config), (*parts, (name, layer)))
    return found


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """The names of each shard, in their order, of at most `limit` bytes where no tensor is larger by itself."""
    shards, room = [], 0
    for name, size in sizes.items():
        if not shards or size > room:
            shards.append([])
            room = limit
        shards[-1].append(name)
        room -= size
    return shards


def _filled(name: str, tensor: Stored, config: ModelConfig, leaves: Mapping, dtype: str) -> np.ndarray:
    """A tensor on the host."""
    array = np.empty(tensor.shape, DTYPES[dtype])
    for ours, layer in tensor.parts:
        leaf, stacked = leaves[ours]
        value = layer_to_host(leaf, layer) if stacked else processes.to_host(leaf)
        with np.errstate(over="ignore"):
            in_our_layout(ours, array, config)[...] = value
    if not np.isfinite(array).all():
        raise UserError(f"{name} has values that are not finite in {dtype}: export it as float32, or check its stage")
    return array
