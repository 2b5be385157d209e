"""Hugging Face folders: config.json and safetensors, read and written. Nothing in them is run."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import NamedTuple

import ml_dtypes
import numpy as np
from etils import epath
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PretrainedConfig

from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES, Family
from rlaif_jax.models.layouts import fits, in_our_layout
from rlaif_jax.models.parameters import parameter_shapes
from rlaif_jax.models.rotary import NO_SCALING, SCALINGS, RopeScaling
from rlaif_jax.models.transformer import LanguageModel, ModelConfig

_DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F64": np.float64}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_LAYER_TYPES = ("full_attention", "sliding_attention")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# What begins the names of a decoder's tensors, besides what is usual: nothing, and inside a Gemma 3 that sees images.
_BEGINNINGS = ("", "language_model.model.", "model.language_model.")
# What old versions saved beside the weights, and the parts of Gemma 3 that see images.
_IGNORED = ("inv_freq", "attn.bias", "attention.bias", "masked_bias")
_IGNORED_PARTS = ("vision_tower.", "multi_modal_projector.")


class Tensor(NamedTuple):
    """Where a tensor lies."""

    file: epath.Path
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    offset: int  # bytes


def open_folder(folder: epath.Path):
    """(config, read, files, names), as `weights.Weights` has them. Raises UserError where it is missing or damaged."""
    config = model_config(read_config(folder), folder)
    tensors, files = _tensors(folder)
    family = FAMILIES[config.family]
    names = _tensor_names(tensors, config, family)
    _check_names(folder, tensors, config, names)
    _check_tensors(folder, tensors, config, names)
    _check_tied(folder, tensors, config, names)

    def read(name: str, layer: int) -> np.ndarray:
        if name not in names:
            kind = "reward" if name == "lm_head" else "language"
            raise UserError(f"{folder} is a {kind} model: it has no {family.whole[name]}")
        return in_our_layout(name, _mapped(tensors[names[name].format(layer)]), config)

    tokenizer = (file for file in map(folder.__truediv__, _TOKENIZER) if file.exists())
    return config, read, (folder / "config.json", *files, *tokenizer), frozenset(names)


def read_config(folder: epath.Path) -> PretrainedConfig:
    """The folder's config.json, its defaults filled in. Raises UserError where there is none that is known."""
    file = folder / "config.json"
    if not file.exists():
        raise UserError(f"{folder} is no model: it has no config.json")
    try:
        model_type = json.loads(file.read_text()).get("model_type")
        known = {family.model_type for family in FAMILIES.values()} | {"gemma3"}
        if model_type not in known:
            raise UserError(f"{file} is of family {model_type!r}; the known ones are {', '.join(sorted(known))}")
        config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    except UserError:
        raise
    except Exception as error:  # whatever the file makes the libraries raise
        raise _unreadable(file, error) from error
    return config.text_config if model_type == "gemma3" else config


def _unreadable(file: epath.Path, error: Exception) -> UserError:
    return UserError(f"{file} can't be read: {type(error).__name__}: {' '.join(str(error).split())}")


def model_config(hf: PretrainedConfig, folder: epath.Path) -> ModelConfig:
    """The decoder's shape. Raises UserError for what the decoder does not have, and for values that none has."""
    try:
        config = _model_config(hf, folder)
    except (AttributeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise _unreadable(folder / "config.json", error) from error
    _check_values(config, folder)
    return config


def _model_config(hf: PretrainedConfig, folder: epath.Path) -> ModelConfig:
    name = _family_name(hf)
    family, heads = FAMILIES[name], hf.num_attention_heads
    _check_supported(hf, family, folder)
    ropes = getattr(hf, "rope_parameters", None) or {}
    types = list(getattr(hf, "layer_types", None) or [])
    rope, local = ropes.get("full_attention", ropes), ropes.get("sliding_attention", {})
    slides = bool(getattr(hf, "sliding_window", None)) and (not types or "sliding_attention" in types)
    rotates = getattr(hf, "no_rope_layers", None) or []  # 1 for the layers that do
    return ModelConfig(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=getattr(hf, "intermediate_size", None) or getattr(hf, "n_inner", None) or 4 * hf.hidden_size,
        num_hidden_layers=hf.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(hf, "num_key_value_heads", None) or heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // heads,
        max_position_embeddings=hf.max_position_embeddings,
        rope_theta=rope.get("rope_theta", 10_000.0),
        rms_norm_eps=getattr(hf, _eps_name(hf)),
        tie_word_embeddings=hf.tie_word_embeddings,
        family=name,
        rope_scaling=_scaling(rope, folder),
        partial_rotary_factor=rope.get("partial_rotary_factor") or 1.0,
        no_rope_layers=tuple(i for i, rotated in enumerate(rotates) if not rotated),
        sliding_window=hf.sliding_window if slides else 0,
        full_attention_layers=tuple(i for i, kind in enumerate(types) if slides and kind == "full_attention"),
        rope_local_base_freq=local.get("rope_theta", 0.0),
        query_pre_attn_scalar=getattr(hf, "query_pre_attn_scalar", None) or 0.0,
        attn_logit_softcapping=getattr(hf, "attn_logit_softcapping", None) or 0.0,
        final_logit_softcapping=getattr(hf, "final_logit_softcapping", None) or 0.0,
    )


_POSITIVE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "rope_theta", "partial_rotary_factor", "factor"),
)


def _check_values(config: ModelConfig, folder: epath.Path) -> None:
    """Raises UserError for a value that makes no decoder, which AutoConfig lets pass."""
    values = [(field, getattr(part, field.name)) for part in (config, config.rope_scaling) for field in fields(part)]
    for field, value in values:
        number = field.type in (int, float)
        wrong_type = number and (isinstance(value, bool) or not isinstance(value, (field.type, int)))
        if wrong_type or (number and value <= 0 and field.name in _POSITIVE):
            kind = "a number" if field.type is float else "a whole number"
            raise UserError(f"{folder}/config.json has {field.name}={value!r}, which must be {kind}, and positive")
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{folder}/config.json has num_attention_heads={config.num_attention_heads}, which must be a multiple of "
            f"num_key_value_heads={config.num_key_value_heads}"
        )


def _family_name(hf: PretrainedConfig) -> str:
    if hf.model_type == "gpt_neox":
        return "gpt_neox" if hf.use_parallel_residual else "gpt_neox_sequential"
    return next(name for name, family in FAMILIES.items() if family.model_type == hf.model_type)


def _eps_name(hf: PretrainedConfig) -> str:
    return next(name for name in ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon") if hasattr(hf, name))


def _activation_name(hf: PretrainedConfig) -> str:
    names = ("hidden_activation", "activation_function", "hidden_act")
    return next(name for name in names if getattr(hf, name, None))


def _scaling(rope: Mapping, folder: epath.Path) -> RopeScaling:
    kind = rope.get("rope_type", "default")
    if kind not in SCALINGS:
        raise UserError(f"{folder}/config.json has rope_type={kind!r}; supported are {', '.join(SCALINGS)}")
    if kind == "default":
        return NO_SCALING
    return RopeScaling(kind, **{name: rope[name] for name in SCALING_FIELDS[kind]})


SCALING_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _check_supported(hf: PretrainedConfig, family: Family, folder: epath.Path) -> None:
    """Raises UserError where a config asks for what no model of its family that we know has."""
    activation = _activation_name(hf)
    biased, rotates = "output" in family.biases, getattr(hf, "no_rope_layers", None)
    wrong = {
        activation: _ACTIVATIONS.get(getattr(hf, activation)) != family.activation,
        "attention_bias": getattr(hf, "attention_bias", biased) != biased,
        "mlp_bias": getattr(hf, "mlp_bias", False),
        "scale_attn_by_inverse_layer_idx": getattr(hf, "scale_attn_by_inverse_layer_idx", False),
        "scale_attn_weights": not getattr(hf, "scale_attn_weights", True),
        "use_bidirectional_attention": getattr(hf, "use_bidirectional_attention", False),
        "quantization_config": getattr(hf, "quantization_config", None) is not None,
    }
    wrong["layer_types"] = bool(set(getattr(hf, "layer_types", None) or ()) - set(_LAYER_TYPES))
    wrong["no_rope_layers"] = bool(rotates) and len(rotates) != hf.num_hidden_layers
    for name, is_wrong in wrong.items():
        if is_wrong:
            value = "..." if name == "quantization_config" else repr(getattr(hf, name))
            raise UserError(f"{folder}/config.json has {name}={value}, which the decoder of {hf.model_type} does not")


def _tensors(folder: epath.Path) -> tuple[dict[str, Tensor], list[epath.Path]]:
    """All tensors by name, and the files that hold them. Raises UserError where a file is missing or damaged."""
    index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if index.exists():
        try:
            files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
        except (ValueError, LookupError, AttributeError, TypeError) as error:
            raise _unreadable(index, error) from error
    elif whole.exists():
        files = [whole]
    else:
        pickles = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
        if pickles:
            raise UserError(
                f"{folder} has its weights in {pickles[0]}, a pickle file, which can run any code and is never opened: "
                "save them as safetensors (transformers' save_pretrained does)"
            )
        raise UserError(f"{folder} has no model.safetensors and no model.safetensors.index.json: download it again")
    return {name: tensor for file in files for name, tensor in _in_file(file).items()}, files


def _in_file(file: epath.Path) -> dict[str, Tensor]:
    if not file.exists():
        raise UserError(f"{file} is missing, which {file.parent}/model.safetensors.index.json names: download it again")
    try:
        with safe_open(str(file), "numpy"):  # checks the header against the file's length
            pass
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or incomplete ({error}): download it again") from error
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return {
        name: Tensor(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _tensor_names(tensors: Iterable[str], config: ModelConfig, family: Family) -> dict[str, str]:
    """Our name of each parameter -> its tensor's, with {} for the number of a layer."""
    whole = {name: theirs for name, theirs in family.whole.items() if name not in ("layers", "lm_head", "kernel")}
    names = whole | {name: family.whole["layers"] + theirs for name, theirs in family.layer.items()}
    usual = family.whole["embedding"].split(".")[0] + "."
    for beginning in (usual, *_BEGINNINGS):
        renamed = {name: beginning + theirs.removeprefix(usual) for name, theirs in names.items()}
        if renamed["embedding"] in tensors:
            names = renamed
            break
    heads = ("kernel",) if family.whole["kernel"] in tensors else ()
    if not config.tie_word_embeddings and not heads:
        heads = ("lm_head",)
    return names | {name: family.whole[name] for name in heads}


def _check_names(folder: epath.Path, tensors: Mapping[str, Tensor], config: ModelConfig, names: dict[str, str]) -> None:
    """Raises UserError for a tensor that is missing, superfluous or of another shape than the config says."""
    wanted = {theirs.format(layer) for theirs in names.values() for layer in range(config.num_hidden_layers)}
    family = FAMILIES[config.family]
    missing = sorted(wanted - set(tensors))
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the tensors that its config.json asks for, such as {missing[0]}: "
            "take weights and config.json of one model"
        )
    ignored = {family.whole["lm_head"]}  # of tied embeddings
    extra = sorted(
        name
        for name in set(tensors) - wanted - ignored
        if not name.endswith(_IGNORED) and not any(part in name for part in _IGNORED_PARTS)
    )
    if extra:
        raise UserError(
            f"{folder} has weights for which its config.json has no place: {', '.join(extra[:3])}; take weights and "
            "config.json of one model"
        )


def _check_tied(folder: epath.Path, tensors: Mapping[str, Tensor], config: ModelConfig, names: dict[str, str]) -> None:
    """Raises UserError where embeddings are said to be tied, and are not."""
    head = FAMILIES[config.family].whole["lm_head"]
    if not config.tie_word_embeddings or head not in tensors:
        return
    if not np.array_equal(_mapped(tensors[head]), _mapped(tensors[names["embedding"]])):
        raise UserError(
            f"{folder}/config.json ties the embeddings, but {head} differs from {names['embedding']}: set "
            "tie_word_embeddings to false there, or leave that tensor out"
        )


def _mapped(tensor: Tensor) -> np.ndarray:
    return np.memmap(tensor.file, _DTYPES[tensor.dtype], "r", tensor.offset, tensor.shape)


def _check_tensors(
    folder: epath.Path, tensors: Mapping[str, Tensor], config: ModelConfig, names: dict[str, str]
) -> None:
    """Raises UserError for a tensor of another shape than config.json says, or of a dtype that is not known."""
    expected = parameter_shapes(LanguageModel(config)) | {"kernel": (config.hidden_size, 1)}
    for name, theirs in names.items():
        for tensor in dict.fromkeys(theirs.format(layer) for layer in range(config.num_hidden_layers)):
            _, dtype, shape, _ = tensors[tensor]
            if dtype not in _DTYPES:
                raise UserError(
                    f"{folder}: {tensor} is of dtype {dtype}; known are {', '.join(_DTYPES)}: save it as BF16"
                )
            if not fits(name, shape, config, expected[name]):
                raise UserError(
                    f"{folder}: {tensor} of shape {list(shape)} does not fit config.json: take those of one model"
                )
