"""GGUF files: a model's configuration and its dequantised weights."""

import functools
from collections.abc import Mapping
from typing import Any

import gguf
import numpy as np
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.layouts import fits, in_our_layout
from rlaif_jax.models.parameters import parameter_shapes
from rlaif_jax.models.rotary import NO_SCALING, RopeScaling, rope_frequencies
from rlaif_jax.models.transformer import LanguageModel, ModelConfig

# Architectures in general.architecture, and the family of each; Mistral and SmolLM2 are "llama".
_FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3"}
_PRODUCTS = {"query": "q", "key": "k", "value": "v"}
# Our name of a parameter -> its tensor's.
_NAMES = {"embedding": "token_embd.weight", "final_norm/scale": "output_norm.weight", "lm_head": "output.weight"}
_LAYER_NAMES = {
    "attention_norm/scale": "attn_norm.weight",
    **{name: f"attn_{letter}.weight" for name, letter in _PRODUCTS.items()},
    **{f"{name}_bias": f"attn_{letter}.bias" for name, letter in _PRODUCTS.items()},
    "query_norm/scale": "attn_q_norm.weight",
    "key_norm/scale": "attn_k_norm.weight",
    "output": "attn_output.weight",
    "post_attention_norm/scale": "post_attention_norm.weight",
    "mlp_norm/scale": "ffn_norm.weight",
    "gate": "ffn_gate.weight",
    "up": "ffn_up.weight",
    "down": "ffn_down.weight",
    "post_mlp_norm/scale": "post_ffw_norm.weight",
}
_ROPE_FACTORS = "rope_freqs.weight"  # by which frequencies are divided
_LLAMA3_CONTEXT = 8192  # in tokens, which Llama 3 was trained on before its rotation was stretched
# What llama.cpp knows of Gemma and its files do not say; the last, newer ones do.
_GEMMA_FULL_EVERY = {"gemma2": 2, "gemma3": 6}
# Of files that say nothing of them.
_GEMMA2 = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "attention.sliding_window": 4096}
_GEMMA_27B = {("gemma2", 46): 144.0, ("gemma3", 62): 168.0}  # layers -> query_pre_attn_scalar, width over heads
_GEMMA3_LOCAL_THETA = 10_000.0


@functools.cache  # parsing the vocabulary takes seconds, and the weights and the tokenizer are read from it
def open_reader(file: epath.Path) -> gguf.GGUFReader:
    """Raises UserError where the file is no readable GGUF file."""
    try:
        return gguf.GGUFReader(str(file))
    except Exception as error:  # gguf raises whatever its parser stumbles over
        raise UserError(f"{file} is not a readable GGUF file, or cut short: {error!r}".replace("\n", " ")) from error


def open_file(file: epath.Path):
    """(config, read, files, names), as `weights.Weights` has them. Raises UserError for a damaged or unknown model."""
    reader = open_reader(file)
    architecture = metadata(reader, "general.").get("architecture")
    if architecture not in _FAMILIES:
        raise UserError(f"{file} holds a model of family {architecture!r}; the known ones are {', '.join(_FAMILIES)}")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    try:
        config = model_config(reader, architecture, tensors)
    except KeyError as error:
        raise UserError(f"{file} is not a whole model: it has no {error.args[0]}") from error
    names = _tensor_names(config)
    _check(file, tensors, config, names)

    def read(name: str, layer: int) -> np.ndarray:
        if name not in names:
            raise UserError(f"{file} has no {name}: it is a language model")
        tensor = tensors[names[name].format(layer)]
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        return in_our_layout(name, _as_hugging_face(name, weight, config, architecture), config)

    return config, read, (file,), frozenset(names)


def model_config(reader: gguf.GGUFReader, architecture: str, tensors: Mapping[str, Any]) -> ModelConfig:
    """The decoder's shape from metadata. Raises KeyError for what is missing."""
    fields = (_GEMMA2 if architecture == "gemma2" else {}) | metadata(reader, f"{architecture}.")
    heads, layers = fields["attention.head_count"], fields["block_count"]
    head_dim = fields.get("attention.key_length") or int(tensors["blk.0.attn_q.weight"].shape[1]) // heads
    theta = float(fields.get("rope.freq_base", 10_000.0))
    slides, every = fields.get("attention.sliding_window", 0), _GEMMA_FULL_EVERY.get(architecture, 0)
    scalar = float(_GEMMA_27B.get((architecture, layers), head_dim)) if every else 0.0
    return ModelConfig(
        vocab_size=int(tensors["token_embd.weight"].shape[1]),
        hidden_size=fields["embedding_length"],
        intermediate_size=fields["feed_forward_length"],
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=fields.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=fields["context_length"],
        rope_theta=theta,
        rms_norm_eps=float(fields["attention.layer_norm_rms_epsilon"]),
        tie_word_embeddings="output.weight" not in tensors,
        family=_FAMILIES[architecture],
        rope_scaling=_scaling(fields, tensors, head_dim, theta),
        sliding_window=slides if every else 0,
        full_attention_layers=tuple(range(every - 1, layers, every)) if every else (),
        rope_local_base_freq=_local_theta(fields) if architecture == "gemma3" else 0.0,
        query_pre_attn_scalar=scalar,
        attn_logit_softcapping=float(fields.get("attn_logit_softcapping", 0.0)),
        final_logit_softcapping=float(fields.get("final_logit_softcapping", 0.0)),
    )


def _local_theta(fields: Mapping) -> float:
    return float(fields.get("rope.freq_base_swa", _GEMMA3_LOCAL_THETA))


def _scaling(fields: Mapping, tensors: Mapping[str, Any], head_dim: int, theta: float) -> RopeScaling:
    if _ROPE_FACTORS in tensors:
        factors = np.array(tensors[_ROPE_FACTORS].data, np.float32)
        scaling = RopeScaling("llama3", float(factors.max()), 1.0, 4.0, _LLAMA3_CONTEXT)
        plain, stretched = (np.asarray(rope_frequencies(head_dim, theta, x)) for x in (NO_SCALING, scaling))
        if not np.allclose(plain / factors, stretched, rtol=1e-3):
            raise UserError("the GGUF file stretches its rotary embedding in another way than Llama 3")
        return scaling
    kind = fields.get("rope.scaling.type", "none")
    if kind == "none":
        return NO_SCALING
    if kind != "linear":
        raise UserError(
            f"the GGUF file stretches its rotary embedding by {kind!r}; known are linear and that of Llama 3"
        )
    return RopeScaling("linear", float(fields["rope.scaling.factor"]))


def _tensor_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter -> its tensor's, with {} for the number of a layer."""
    layer = {name: f"blk.{{}}.{_LAYER_NAMES[name]}" for name in FAMILIES[config.family].layer}
    whole = {name: theirs for name, theirs in _NAMES.items() if name != "lm_head" or not config.tie_word_embeddings}
    return whole | layer


def _check(file: epath.Path, tensors: Mapping[str, Any], config: ModelConfig, names: Mapping[str, str]) -> None:
    """Raises UserError for a tensor that is missing, superfluous, of another shape or of an unknown quantisation."""
    wanted = {theirs.format(i): name for name, theirs in names.items() for i in range(config.num_hidden_layers)}
    missing = [theirs for theirs in wanted if theirs not in tensors]
    if missing:
        raise UserError(f"{file} lacks {len(missing)} tensors of its model, for example {missing[0]}")
    unknown = [name for name in tensors if name not in wanted and name != _ROPE_FACTORS]
    if unknown:
        raise UserError(f"{file} has weights that the decoder does not: {', '.join(unknown[:3])}")
    expected, kinds = parameter_shapes(LanguageModel(config)), {}
    for theirs, name in wanted.items():
        shape = tuple(int(size) for size in reversed(tensors[theirs].shape))
        if not fits(name, shape, config, expected[name]):
            raise UserError(f"{file}: {theirs} of shape {list(shape)} does not fit the file's metadata")
        kinds[tensors[theirs].tensor_type] = tensors[theirs].data[:1]
    for kind, rows in kinds.items():
        try:
            gguf.dequantize(rows, kind)
        except NotImplementedError as error:
            raise UserError(
                f"{file} is quantised as {kind.name}, which can't be read: take a file of Q4_K, Q6_K, Q8_0, F16 or BF16"
            ) from error


def _as_hugging_face(name: str, weight: np.ndarray, config: ModelConfig, architecture: str) -> np.ndarray:
    """A tensor as a Hugging Face folder has it."""
    if architecture == "llama" and name in ("query", "key"):
        # The rows of q and k are interleaved rotary pairs; `rotate` works on halves.
        return weight.reshape(-1, config.head_dim // 2, 2, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    if FAMILIES[config.family].norm == "rms_plus_one" and name.endswith("norm/scale"):
        return weight - 1  # the file has what the decoder adds
    return weight


def metadata(reader: gguf.GGUFReader, prefix: str) -> Mapping[str, Any]:
    """The metadata fields whose name starts with `prefix`, by the rest of their name."""
    fields = reader.fields.items()
    return {name.removeprefix(prefix): field.contents() for name, field in fields if name.startswith(prefix)}
