"""Makes tests/reference/families: what transformers and PEFT compute, and how they save it (families.py says what).

Every figure comes from PyTorch, transformers and PEFT, none from rlaif_jax; from the root of the repository:

    python3 -m venv /tmp/peer
    /tmp/peer/bin/pip install torch==2.13.0 transformers==5.23.0 peft==0.21.2 safetensors numpy
    /tmp/peer/bin/python -m tests.reference.make_families_reference

Each case is the smallest model that has every feature of its family in a form that acts on 14 tokens. VARIANTS takes
those features away one by one, and a run stops where that leaves the logits within 1e-3.
"""

import json
import pathlib
import re
import tempfile

import numpy as np

from tests.reference.families import ADAPTED, FOLDER, norm_mean, weight

VOCABULARY, LENGTH, PAD = 64, 14, 0
# Fields of every config but GPT-2's, whose names differ.
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
# Epsilon is large and theta is low so that both show in a few tokens of a narrow model.
RMS = SMALL | {"rms_norm_eps": 1e-3, "num_key_value_heads": 2}
GEMMA = RMS | {"rms_norm_eps": 1e-2, "head_dim": 12, "query_pre_attn_scalar": 20}  # its embeddings are scaled up
NEOX = SMALL | {"layer_norm_eps": 1e-3, "intermediate_size": 128}


def rope(theta=100.0, kind="default", **fields):
    """rope_parameters of transformers' configs."""
    return {"rope_type": kind, "rope_theta": theta, **fields}


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
GEMMA3_ROPE = {"sliding_attention": rope(50.0), "full_attention": rope(500.0, "linear", factor=4.0)}

# Case: model_type of AutoConfig, and its fields.
CASES = {
    "llama2": ("llama", RMS | {"num_key_value_heads": 4, "rope_parameters": rope()}),
    "llama3": ("llama", RMS | {"tie_word_embeddings": True, "rope_parameters": rope(100.0, "llama3", **LLAMA3_ROPE)}),
    "mistral": ("mistral", RMS | {"sliding_window": 4, "rope_parameters": rope()}),
    "smollm2": (
        "llama",
        RMS
        | {"hidden_size": 24, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"tie_word_embeddings": True, "rope_parameters": rope()},
    ),
    "smollm3": (
        "smollm3",
        RMS
        | {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1], "rope_parameters": rope()}
        | {"pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "qwen2": ("qwen2", RMS | {"tie_word_embeddings": True, "rope_parameters": rope()}),
    "qwen3": ("qwen3", RMS | {"head_dim": 12, "rope_parameters": rope()}),
    "gemma2": (
        "gemma2",
        GEMMA
        | {"num_hidden_layers": 3, "sliding_window": 4, "rope_parameters": rope()}
        | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 10.0},
    ),
    "gemma3": (
        "gemma3_text",
        GEMMA
        | {"num_hidden_layers": 4, "sliding_window": 4, "sliding_window_pattern": 3, "rope_parameters": GEMMA3_ROPE},
    ),
    "gpt_neox": (
        "gpt_neox",
        NEOX | {"num_hidden_layers": 3, "num_attention_heads": 2, "rope_parameters": rope(partial_rotary_factor=0.25)},
    ),
    "gpt_neox_sequential": (
        "gpt_neox",
        NEOX | {"use_parallel_residual": False, "rope_parameters": rope(partial_rotary_factor=0.5)},
    ),
    "gpt2": (
        "gpt2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"layer_norm_epsilon": 1e-3, "bos_token_id": 1, "eos_token_id": 2},
    ),
}


def without_rms(name):
    """Takes the norm of this name out of every layer's attention."""

    def change(model):
        import torch

        for layer in model.model.layers:
            setattr(layer.self_attn, name, torch.nn.Identity())

    return change


def zeroed(pattern):
    """Sets to 0 the parameters whose names match."""

    def change(model):
        matching = [parameter for name, parameter in model.named_parameters() if re.search(pattern, name)]
        assert matching, pattern
        for parameter in matching:
            parameter.data.zero_()

    return change


EPS = {"epsilon": {"rms_norm_eps": 1e-4}}
QK_NORM = {"query norm": without_rms("q_norm"), "key norm": without_rms("k_norm")}
THETA = {"theta": {"rope_parameters": rope(200.0)}}
BIASES = {f"biases of {pattern}": zeroed(rf"({pattern}).*\.bias") for pattern in ("attn|attention", "mlp", "ln|norm")}
# Case: features, each with the fields, or the change of the model, that take it away.
VARIANTS = {
    "llama2": EPS | THETA,
    "llama3": EPS | {"rope scaling": {"rope_parameters": rope()}},
    "mistral": EPS | THETA | {"sliding window": {"sliding_window": None}, "window + 1": {"sliding_window": 5}},
    "smollm2": EPS | THETA,
    "smollm3": EPS | THETA | {"layer without rope": {"no_rope_layers": [1, 1, 1]}},
    "qwen2": EPS | THETA | {f"bias of {x}": zeroed(rf"{x}_proj\.bias") for x in "qkv"},
    "qwen3": EPS | THETA | QK_NORM,
    "gemma2": EPS
    | THETA
    | {
        "sliding window": {"sliding_window": 64},
        "order of layers": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
        "attention softcap": {"attn_logit_softcapping": None},
        "final softcap": {"final_logit_softcapping": None},
        "scale": {"query_pre_attn_scalar": 12},
        "tanh of gelu": {"hidden_activation": "gelu"},
    },
    "gemma3": EPS
    | QK_NORM
    | {
        "sliding window": {"sliding_window": 64},
        "full layer": {"layer_types": ["sliding_attention"] * 4},
        "local theta": {"rope_parameters": GEMMA3_ROPE | {"sliding_attention": rope(500.0)}},
        "linear scaling": {"rope_parameters": GEMMA3_ROPE | {"full_attention": rope(500.0)}},
        "scale": {"query_pre_attn_scalar": 12},
        "tanh of gelu": {"hidden_activation": "gelu"},
    },
    "gpt_neox": BIASES
    | {
        "epsilon": {"layer_norm_eps": 1e-4},
        "partial rotation": {"rope_parameters": rope(partial_rotary_factor=0.5)},
        "parallel residual": {"use_parallel_residual": False},
        "exact gelu": {"hidden_act": "gelu_new"},
    },
    "gpt_neox_sequential": BIASES
    | {
        "epsilon": {"layer_norm_eps": 1e-4},
        "partial rotation": {"rope_parameters": rope(partial_rotary_factor=0.25)},
        "sequential residual": {"use_parallel_residual": True},
    },
    "gpt2": BIASES
    | {
        "epsilon": {"layer_norm_epsilon": 1e-4},
        "positions": zeroed("wpe"),
        "tanh of gelu": {"activation_function": "gelu"},
    },
}

LLAMA_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# LoraConfig's fields, by case.
ADAPTERS = {
    "llama3": {"target_modules": LLAMA_PROJECTIONS},
    "gpt_neox": {"target_modules": ["query_key_value"]},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},  # transformers' Conv1D has weights [in, out]
}
# The attention weight of layer 1 whose gradient is kept, by model_type; q_proj where it is not here.
FUSED = {"gpt_neox": "gpt_neox.layers.1.attention.query_key_value.weight", "gpt2": "transformer.h.1.attn.c_attn.weight"}


def saved_name(model, name):
    """The name in the safetensors file of a parameter of the model."""
    if model.config.model_type == "gpt_neox":
        name = re.sub(r"^lm_head\.", "embed_out.", name)  # transformers 5 renames it as it loads and saves
    return name.replace(".default.", ".")  # PEFT leaves out the name of the adapter


def fill(model, mean, only=""):
    """Gives the parameters whose names hold `only` their weights, by the names they are saved under."""
    import torch

    for name, parameter in model.named_parameters():  # a tied weight comes once, by the embedding's name
        if only in name:
            parameter.data = torch.from_numpy(weight(saved_name(model, name), tuple(parameter.shape), mean))
    model.tie_weights()
    return model.eval()


def model_of(case, part="lm", **changed):
    """transformers' model of a case in float32, with fields of its config changed."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    model_type, fields = CASES[case]
    if part == "score":
        fields = fields | {"num_labels": 1, "pad_token_id": PAD}
    config = AutoConfig.for_model(model_type, **fields | changed)
    auto = {"lm": AutoModelForCausalLM, "score": AutoModelForSequenceClassification}[part]
    return fill(auto.from_config(config, attn_implementation="eager"), norm_mean(model_type))


def adapted(case):
    """PEFT's LoRA model of a case: rank 4, scale 8 / 4, A and B both filled."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, task_type="CAUSAL_LM", **ADAPTERS[case])
    return fill(get_peft_model(model_of(case), config), 1.0, only="lora_")


def lm_tokens():
    """[2, LENGTH] int32. No token is special: nn.Embedding gives the padding token no gradient."""
    return np.random.default_rng(0).integers(3, VOCABULARY, (2, LENGTH)).astype(np.int32)


def score_tokens():
    """[2, LENGTH] int32, the second row shorter and padded on the right."""
    tokens = np.random.default_rng(1).integers(3, VOCABULARY, (2, LENGTH)).astype(np.int32)
    tokens[1, 9:] = PAD
    return tokens


def outputs(model, tokens):
    """float32 logits of int tokens [rows, length], all attended to: padding on the right changes none before it."""
    import torch

    with torch.inference_mode():
        return model(torch.from_numpy(np.asarray(tokens)).long()).logits.numpy()


def lm_reference(case):
    """Tokens, logits, the summed next-token loss and two of its gradients."""
    import torch

    model, tokens = model_of(case), lm_tokens()
    ids = torch.from_numpy(tokens).long()
    logits = model(ids).logits
    loss = -torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None]).sum()
    loss.backward()
    attention = FUSED.get(model.config.model_type, "model.layers.1.self_attn.q_proj.weight")
    gradients = {
        f"gradient.{name}": parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if name == attention or parameter is model.get_input_embeddings().weight
    }
    return {"tokens": tokens, "logits": logits.detach().numpy(), "loss": loss.detach().numpy()} | gradients


def reference(case):
    """The arrays of families.read(case), live; those of an adapter need PEFT: adapter_reference()."""
    padded = score_tokens()
    return lm_reference(case) | {"score_tokens": padded, "score_logits": outputs(model_of(case, "score"), padded)}


def adapter_reference(case):
    """adapter_logits of families.read(case), live."""
    return {"adapter_logits": outputs(adapted(case), lm_tokens())}


def saved(model):
    """The JSON files that save_pretrained writes, by their stems, and the shapes of the tensors by their names."""
    from safetensors.numpy import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tensors = load_file(next(pathlib.Path(folder).glob("*.safetensors")))
        files = {path.stem: json.loads(path.read_text()) for path in sorted(pathlib.Path(folder).glob("*.json"))}
    return files | {"tensors": {name: list(tensors[name].shape) for name in sorted(tensors)}}


def saved_adapter(case):
    """As saved(), with "config" for adapter_config.json."""
    files = saved(adapted(case))
    config = files["adapter_config"]
    config["target_modules"].sort()  # a set in PEFT, whose order in the file is another in every run
    return {"config": config, "tensors": files["tensors"]}


def files_of(case):
    """The first of families.read(case), live."""
    files = {part: saved(model_of(case, part)) for part in ("lm", "score")}
    return files | ({"adapter": saved_adapter(case)} if case in ADAPTED else {})


def differences(case):
    """By feature of VARIANTS: the largest change of a logit where the feature is taken away."""
    tokens = lm_tokens()
    logits = outputs(model_of(case), tokens)
    found = {}
    for feature, change in VARIANTS[case].items():
        model = model_of(case, **({} if callable(change) else change))
        if callable(change):
            change(model)
        found[feature] = float(np.abs(outputs(model, tokens) - logits).max())
    return found


def loaded(auto, folder):
    """The model of a Hugging Face folder in float32; an AssertionError where names or shapes do not all match."""
    import torch

    model, info = auto.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, attn_implementation="eager"
    )
    wrong = {name: list(found) for name, found in info.items() if found}
    assert not wrong, wrong
    return model.eval()


def logits_of_folder(folder, tokens):
    """[rows, length, vocabulary] float32 of AutoModelForCausalLM for tokens [rows, length]."""
    from transformers import AutoModelForCausalLM

    return outputs(loaded(AutoModelForCausalLM, folder), tokens)


def score_of_folder(folder, tokens):
    """[rows, labels] float32 of AutoModelForSequenceClassification for tokens [rows, length], right-padded."""
    from transformers import AutoModelForSequenceClassification

    return outputs(loaded(AutoModelForSequenceClassification, folder), tokens)


def logits_of_adapter(folder, adapter, tokens):
    """As logits_of_folder(), with the PEFT adapter of another folder on top."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    return outputs(PeftModel.from_pretrained(loaded(AutoModelForCausalLM, folder), adapter).eval(), tokens)


def main():
    """Writes the files of every case, and prints how much each feature matters."""
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        found = differences(case)
        print(case, ", ".join(f"{feature} {value:.2g}" for feature, value in found.items()))
        assert min(found.values()) > 1e-3, f"{case} does not show one of its features"
        text = json.dumps(files_of(case), indent=1)
        shapes_on_a_line = re.sub(r"\[\s+(\d+(?:,\s+\d+)*)\s+\]", lambda x: f"[{' '.join(x[1].split())}]", text)
        (FOLDER / f"{case}.json").write_text(shapes_on_a_line + "\n")
        adapter = adapter_reference(case) if case in ADAPTED else {}
        np.savez_compressed(FOLDER / f"{case}.npz", **reference(case) | adapter)


if __name__ == "__main__":
    main()
