"""Makes the arrays that tests/models/test_gguf.py and tests/data/test_tokenizers.py compare with.

Every figure comes from PyTorch and transformers, none from rlaif_jax:

    python3 -m venv /tmp/peer
    /tmp/peer/bin/pip install torch==2.13.0 transformers==5.23.0 gguf numpy
    /tmp/peer/bin/python tests/reference/make_llama_reference.py PATH_TO/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import json
import pathlib
import sys

import gguf
import numpy as np

FOLDER = pathlib.Path(__file__).parent

TEXTS = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "Reinforcement learning from AI feedback trains a reward model on the preferences of a language model "
    "instead of those of people. In 2023, a study found it on par with human feedback (71% against 73%).",
)
TOKENIZED = (
    *TEXTS,
    "",
    " leading and trailing ",
    "In 2024 I paid 1234567.89 for 10 apples",
    "naïve café 東京 🙂 Ω",
    "two\n\nnewlines\n\ttab",
    "don't, you'll; it's (fine)!",
    "<|im_start|>user\nHi<|im_end|>\n",
)
CHAT = [{"role": "user", "content": "How do I cook rice?"}]

# The random Llama, in the names of transformers' LlamaConfig.
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
TINY_ROPE_THETA = 500.0

GGUF_TO_HF = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama(weights, rope_theta, **fields):
    """A LlamaForCausalLM in float32 with the given weights, by transformers' names."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "default", "rope_theta": rope_theta}
    model = LlamaForCausalLM(LlamaConfig(rope_parameters=rope, attn_implementation="eager", **fields))
    model.load_state_dict({name: torch.from_numpy(np.array(weight, np.float32)) for name, weight in weights.items()})
    return model.eval()


def halves(rows, heads):
    """Rows of q or k from GGUF's order (both of an angle side by side) to transformers' (all firsts, all seconds)."""
    return np.concatenate(
        [np.concatenate([head[0::2], head[1::2]]) for head in np.split(rows, heads)]  # each [head_dim, width]
    )


def smollm2(path):
    """transformers' Llama with the dequantised weights of a llama-family GGUF file."""
    reader = gguf.GGUFReader(path)
    field = lambda name: reader.fields[f"llama.{name}"].contents()  # noqa: E731
    tensors = {x.name: gguf.dequantize(x.data, x.tensor_type).astype(np.float32) for x in reader.tensors}
    embedding = tensors["token_embd.weight"]
    weights = {
        "model.embed_tokens.weight": embedding,
        "lm_head.weight": embedding,
        "model.norm.weight": tensors["output_norm.weight"],
    }
    heads = {"attn_q": field("attention.head_count"), "attn_k": field("attention.head_count_kv")}
    for layer in range(field("block_count")):
        for name, hf in GGUF_TO_HF.items():
            weight = tensors[f"blk.{layer}.{name}.weight"]
            weights[f"model.layers.{layer}.{hf}.weight"] = halves(weight, heads[name]) if name in heads else weight
    return llama(
        weights,
        rope_theta=float(field("rope.freq_base")),
        vocab_size=embedding.shape[0],
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings=True,
    )


def smollm2_reference(path):
    """For each text: tokens, logits of 64 vocabulary entries at every position, log-probs of the next tokens."""
    import torch

    tokenizer, model = hf_tokenizer(path), smollm2(path)
    vocabulary = np.sort(np.random.default_rng(0).choice(len(tokenizer), 64, replace=False))
    arrays = {"vocabulary": vocabulary}
    for i, text in enumerate(TEXTS):
        tokens = tokenizer.encode(text, add_special_tokens=False)
        with torch.inference_mode():
            logits = model(torch.tensor([tokens])).logits[0]
        following = torch.tensor(tokens[1:])[:, None]
        arrays |= {
            f"tokens_{i}": np.array(tokens, np.int32),
            f"logits_{i}": logits[:, vocabulary].numpy(),
            f"logprobs_{i}": torch.log_softmax(logits[:-1], -1).gather(1, following)[:, 0].numpy(),
        }
    return arrays


def tiny_weights():
    """Random weights of the TINY Llama; halves are exact in float16, so that they are small on disk."""
    rng = np.random.default_rng(0)
    width, mlp, head_dim = TINY["hidden_size"], TINY["intermediate_size"], TINY["head_dim"]
    queries, keys = TINY["num_attention_heads"] * head_dim, TINY["num_key_value_heads"] * head_dim
    shapes = {
        "self_attn.q_proj": (queries, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, queries),
        "mlp.gate_proj": (mlp, width),
        "mlp.up_proj": (mlp, width),
        "mlp.down_proj": (width, mlp),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    names = {
        f"model.layers.{i}.{name}.weight": s for i in range(TINY["num_hidden_layers"]) for name, s in shapes.items()
    }
    matrix = (TINY["vocab_size"], width)
    names |= {"model.embed_tokens.weight": matrix, "lm_head.weight": matrix, "model.norm.weight": (width,)}
    return {
        name: (rng.normal(0, 1.5 * shape[-1] ** -0.5, shape) if len(shape) > 1 else rng.normal(1, 0.2, shape)).astype(
            np.float16
        )
        for name, shape in names.items()
    }


def tiny_reference():
    """Weights, tokens, logits, and gradients of the summed next-token loss for one random Llama."""
    import torch

    weights = tiny_weights()
    model = llama(weights, TINY_ROPE_THETA, **TINY)
    tokens = np.random.default_rng(1).integers(0, TINY["vocab_size"], (2, 12)).astype(np.int32)
    logits = model(torch.from_numpy(tokens).long()).logits
    targets = torch.from_numpy(tokens[:, 1:]).long()[..., None]
    loss = -torch.log_softmax(logits[:, :-1], -1).gather(2, targets).sum()
    loss.backward()
    gradients = {
        "gradient_embedding": model.model.embed_tokens.weight.grad.numpy(),
        "gradient_query_1": model.model.layers[1].self_attn.q_proj.weight.grad.numpy(),
    }
    return weights | gradients | {"tokens": tokens, "logits": logits.detach().numpy(), "loss": loss.detach().numpy()}


def hf_tokenizer(path):
    """The tokenizer that transformers itself makes of a GGUF file."""
    from transformers import AutoTokenizer

    path = pathlib.Path(path)
    return AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)


def tokenizer_reference(path):
    """Token ids of a few strings, and one rendered chat."""
    tokenizer = hf_tokenizer(path)
    chat = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    ids = [{"text": text, "ids": tokenizer.encode(text, add_special_tokens=False)} for text in (*TOKENIZED, chat)]
    return {"strings": ids, "messages": CHAT, "chat": chat}


def main(path):
    """Writes the reference files beside this script."""
    np.savez_compressed(FOLDER / "smollm2.npz", **smollm2_reference(path))
    np.savez_compressed(FOLDER / "tiny_llama.npz", **tiny_reference())
    (FOLDER / "smollm2_tokenizer.json").write_text(json.dumps(tokenizer_reference(path), ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
