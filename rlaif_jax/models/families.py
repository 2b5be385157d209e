"""The families of decoders, as data: what sets each apart, and what Hugging Face calls its weights."""

import dataclasses
from collections.abc import Mapping

_QKV = ("query", "key", "value")
# Our name of a parameter of a layer -> the tensor of a layer in a Hugging Face folder.
_LLAMA_LAYER = {
    "attention_norm/scale": "input_layernorm.weight",
    "query": "self_attn.q_proj.weight",
    "key": "self_attn.k_proj.weight",
    "value": "self_attn.v_proj.weight",
    "output": "self_attn.o_proj.weight",
    "mlp_norm/scale": "post_attention_layernorm.weight",
    "gate": "mlp.gate_proj.weight",
    "up": "mlp.up_proj.weight",
    "down": "mlp.down_proj.weight",
}
_LLAMA_WHOLE = {
    "embedding": "model.embed_tokens.weight",
    "layers": "model.layers.{}.",
    "final_norm/scale": "model.norm.weight",
    "lm_head": "lm_head.weight",
    "kernel": "score.weight",
}
_QUERY_KEY_NORM = {"query_norm/scale": "self_attn.q_norm.weight", "key_norm/scale": "self_attn.k_norm.weight"}
_POST_NORMS = {
    "post_attention_norm/scale": "post_attention_layernorm.weight",
    "mlp_norm/scale": "pre_feedforward_layernorm.weight",
    "post_mlp_norm/scale": "post_feedforward_layernorm.weight",
}
_ALL_BIASES = ("query", "key", "value", "output", "up", "down")


@dataclasses.dataclass(frozen=True)
class Family:
    """What all models of a family have in common; what differs between them is in `ModelConfig`."""

    model_type: str  # of a Hugging Face config.json
    causal: str  # the class there of its language models
    classifier: str  # and of its reward models
    whole: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_WHOLE)  # our names -> theirs
    layer: Mapping[str, str] = dataclasses.field(default_factory=lambda: _LLAMA_LAYER)  # the same in a layer
    norm: str = "rms"  # "rms_plus_one": a weight of 0 leaves its input's size; "layer": with mean and bias
    post_norms: bool = False  # what attention and MLP give is normed, too, before it is added
    parallel: bool = False  # attention and MLP read the same states, and are added together
    activation: str = "silu"  # a name in transformer.ACTIVATIONS
    gated: bool = True
    biases: tuple[str, ...] = ()  # the products that have one
    query_key_norm: bool = False  # of each head
    learned_positions: bool = False  # an embedding in place of rotation
    scaled_embedding: bool = False  # by the root of the width
    fused: str = ""  # query, key and value are one tensor: of each head ("heads"), or one after another ("thirds")
    transposed: bool = False  # matrices are [in, out]


def _biased(names: Mapping[str, str]) -> dict[str, str]:
    """The same with the biases of products and norms."""
    biases = {f"{name}_bias": theirs.replace(".weight", ".bias") for name, theirs in names.items() if "/" not in name}
    norms = {
        name.replace("/scale", "/bias"): theirs.replace(".weight", ".bias")
        for name, theirs in names.items()
        if "/" in name
    }
    return {**names, **biases, **norms}


_GEMMA = Family(
    model_type="gemma2",
    causal="Gemma2ForCausalLM",
    classifier="Gemma2ForSequenceClassification",
    layer=_LLAMA_LAYER | _POST_NORMS,
    norm="rms_plus_one",
    post_norms=True,
    activation="gelu_tanh",
    scaled_embedding=True,
)
_NEOX = Family(
    model_type="gpt_neox",
    causal="GPTNeoXForCausalLM",
    classifier="GPTNeoXForSequenceClassification",
    whole={
        "embedding": "gpt_neox.embed_in.weight",
        "layers": "gpt_neox.layers.{}.",
        "final_norm/scale": "gpt_neox.final_layer_norm.weight",
        "final_norm/bias": "gpt_neox.final_layer_norm.bias",
        "lm_head": "embed_out.weight",
        "kernel": "score.weight",
    },
    layer=_biased(
        {
            "attention_norm/scale": "input_layernorm.weight",
            **{name: "attention.query_key_value.weight" for name in _QKV},
            "output": "attention.dense.weight",
            "mlp_norm/scale": "post_attention_layernorm.weight",
            "up": "mlp.dense_h_to_4h.weight",
            "down": "mlp.dense_4h_to_h.weight",
        }
    ),
    norm="layer",
    parallel=True,
    activation="gelu",
    gated=False,
    biases=_ALL_BIASES,
    fused="heads",
)
FAMILIES: dict[str, Family] = {
    "llama": Family("llama", "LlamaForCausalLM", "LlamaForSequenceClassification"),
    "mistral": Family("mistral", "MistralForCausalLM", "MistralForSequenceClassification"),
    "smollm3": Family("smollm3", "SmolLM3ForCausalLM", "SmolLM3ForSequenceClassification"),
    "qwen2": Family(
        "qwen2",
        "Qwen2ForCausalLM",
        "Qwen2ForSequenceClassification",
        layer=_LLAMA_LAYER | {f"{name}_bias": _LLAMA_LAYER[name].replace(".weight", ".bias") for name in _QKV},
        biases=_QKV,
    ),
    "qwen3": Family(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3ForSequenceClassification",
        layer=_LLAMA_LAYER | _QUERY_KEY_NORM,
        query_key_norm=True,
    ),
    "gemma2": _GEMMA,
    "gemma3": dataclasses.replace(
        _GEMMA,
        model_type="gemma3_text",
        causal="Gemma3ForCausalLM",
        classifier="Gemma3TextForSequenceClassification",
        layer=_GEMMA.layer | _QUERY_KEY_NORM,
        query_key_norm=True,
    ),
    "gpt_neox": _NEOX,  # Pythia
    "gpt_neox_sequential": dataclasses.replace(_NEOX, parallel=False),
    "gpt2": Family(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        whole={
            "embedding": "transformer.wte.weight",
            "position_embedding": "transformer.wpe.weight",
            "layers": "transformer.h.{}.",
            "final_norm/scale": "transformer.ln_f.weight",
            "final_norm/bias": "transformer.ln_f.bias",
            "lm_head": "lm_head.weight",
            "kernel": "score.weight",
        },
        layer=_biased(
            {
                "attention_norm/scale": "ln_1.weight",
                **{name: "attn.c_attn.weight" for name in _QKV},
                "output": "attn.c_proj.weight",
                "mlp_norm/scale": "ln_2.weight",
                "up": "mlp.c_fc.weight",
                "down": "mlp.c_proj.weight",
            }
        ),
        norm="layer",
        activation="gelu_tanh",
        gated=False,
        biases=_ALL_BIASES,
        learned_positions=True,
        fused="thirds",
        transposed=True,
    ),
}
