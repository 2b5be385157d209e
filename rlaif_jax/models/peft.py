"""LoRA adapters in the format of PEFT, adapter_config.json and adapter_model.safetensors: read and written."""

import json
from collections.abc import Mapping

import numpy as np
from etils import epath
from safetensors import SafetensorError
from safetensors.numpy import load_file

from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.huggingface_export import save_tensors
from rlaif_jax.models.layouts import fits, in_our_layout
from rlaif_jax.models.lora import TARGETS, LoraConfig
from rlaif_jax.models.parameters import parameter_shapes
from rlaif_jax.models.transformer import LanguageModel, ModelConfig
from rlaif_jax.models.weights import Weights

_CONFIG, _TENSORS, _BEGINNING = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Fields that make an adapter more than W + scale * B A, unless they have one of these values.
_PLAIN = {
    "bias": ("none",),
    "use_dora": (None, False),
    "lora_bias": (None, False),
    "alpha_pattern": (None, {}),
    "modules_to_save": (None, []),
    "layer_replication": (None,),
    "trainable_token_indices": (None,),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None,),
    "init_lora_weights": (None, True, False, "gaussian", "orthogonal", "eva"),  # others change the base, too
}


def with_adapter(weights: Weights, folder: str) -> Weights:
    """A model with the adapter in `folder` merged into its weights as they are read.

    Raises UserError for an adapter that is missing, damaged, of another model or of a kind that can't be merged.
    """
    path = epath.Path(folder)
    fields, tensors = _read(path)
    family, config = FAMILIES[weights.config.family], weights.config
    names = {
        _module(config, name, layer): (name, layer) for name in TARGETS if name in family.layer
        for layer in range(config.num_hidden_layers)
    }  # fmt: skip
    modules = {name.rsplit(".lora_", 1)[0] for name in tensors}
    unknown = sorted(modules - set(names))
    if unknown:
        raise UserError(f"{path} adapts {unknown[0]}, which {weights.path} ({config.family}) does not have")
    expected = parameter_shapes(LanguageModel(config))
    pairs = {f"{module}.lora_{letter}.weight" for module in modules for letter in "AB"}
    if set(tensors) != pairs:
        raise UserError(f"{path}/{_TENSORS} does not have both matrices of {sorted(set(tensors) ^ pairs)[0]}")
    for module, (name, _) in names.items():
        if module in modules:
            a, b = (tensors[f"{module}.lora_{letter}.weight"].shape for letter in "AB")
            stored = (a[-1], b[0]) if family.transposed else (b[0], a[-1])
            if (len(a), len(b)) != (2, 2) or a[0] != b[1] or not fits(name, stored, config, expected[name]):
                raise UserError(f"{path}: {module} of {list(a)} and {list(b)} does not fit {weights.path}")

    def read(name: str, layer: int) -> np.ndarray:
        weight, module = weights.read(name, layer), _module(config, name, layer) if name in TARGETS else None
        if module not in modules:
            return weight
        a, b = (tensors[f"{module}.lora_{letter}.weight"].astype(np.float32) for letter in "AB")
        scale = fields["lora_alpha"] / (len(a) ** 0.5 if fields.get("use_rslora") else len(a))
        change = scale * b @ a
        return weight.astype(np.float32) + in_our_layout(name, change.T if family.transposed else change, config)

    return weights._replace(read=read, files=(*weights.files, path / _CONFIG, path / _TENSORS))


def _read(path: epath.Path) -> tuple[dict, dict[str, np.ndarray]]:
    """The fields of its config, and all tensors. A module's rank is that of its matrices, whatever the config says."""
    for name in (_CONFIG, _TENSORS):
        if not (path / name).exists():
            raise UserError(f"{path} is no adapter of PEFT: it has no {name}")
    try:
        config = json.loads((path / _CONFIG).read_text())
        tensors = load_file(str(path / _TENSORS))
    except (ValueError, SafetensorError) as error:
        raise UserError(f"{path} can't be read: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}/{_CONFIG} is no config of an adapter")
    if config.get("peft_type") != "LORA":
        raise UserError(f"{path}/{_CONFIG} is of peft_type={config.get('peft_type')!r}; only LORA is known")
    for name, plain in _PLAIN.items():
        if config.get(name, plain[0]) not in plain:
            raise UserError(
                f"{path}/{_CONFIG} has {name}={config[name]!r}: merge it with PEFT's merge_and_unload first"
            )
    if not isinstance(config.get("lora_alpha"), (int, float)):
        raise UserError(f"{path}/{_CONFIG} has no lora_alpha that is a number")
    return config, tensors


def write_adapter(adapter: Mapping, config: ModelConfig, lora: LoraConfig, base: str, folder: epath.Path) -> None:
    """An adapter as PEFT's `PeftModel.from_pretrained` reads it. base: the model that it goes with.

    adapter: of host arrays, decoder/layers/lora of a parameter tree. Raises UserError where PEFT can't have it.
    """
    family = FAMILIES[config.family]
    if family.fused and set(lora.targets) & {"query", "key", "value"}:
        raise UserError(
            f"PEFT has one adapter for query, key and value of {config.family}, and here each has its own: export the "
            "merged model, without --adapter"
        )
    tensors = {}
    for name, matrices in adapter.items():
        for layer in range(config.num_hidden_layers):
            a, b, module = matrices["a"][layer], matrices["b"][layer], _module(config, name, layer)
            tensors[f"{module}.lora_A.weight"] = np.ascontiguousarray(a.reshape(-1, lora.rank).T)
            tensors[f"{module}.lora_B.weight"] = np.ascontiguousarray(b.reshape(lora.rank, -1).T)
    save_tensors(folder / _TENSORS, tensors)
    written = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({family.layer[name].removesuffix(".weight").split(".")[-1] for name in adapter}),
        "fan_in_fan_out": family.transposed,
        "inference_mode": True,
    }
    (folder / _CONFIG).write_text(json.dumps(written, indent=2) + "\n")


def _module(config: ModelConfig, name: str, layer: int) -> str:
    """PEFT's name of the module that holds a weight of a layer."""
    family = FAMILIES[config.family]
    return _BEGINNING + family.whole["layers"].format(layer) + family.layer[name].removesuffix(".weight")
