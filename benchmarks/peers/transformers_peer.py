"""The same work with Hugging Face transformers on PyTorch, once for each line on stdin.

The first line is the request: task, weights (a GGUF file), dtype and what the task needs. Every line after it asks for
a run; the answer is one JSON line. On a GPU if there is one.
"""

import copy
import json
import sys

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def load(path: str, dtype: str) -> LlamaForCausalLM:
    """The dequantised weights of a GGUF file, whose query and key rows are those of interleaved rotary pairs."""
    reader = gguf.GGUFReader(path)
    weights = {t.name: gguf.dequantize(t.data, t.tensor_type).astype(np.float32) for t in reader.tensors}

    def field(name):
        return reader.fields[f"llama.{name}"].contents()

    heads, kv_heads = field("attention.head_count"), field("attention.head_count_kv")

    def halves(weight, heads):
        rows = weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1)
        return rows.swapaxes(1, 2).reshape(weight.shape)

    embedding = weights["token_embd.weight"]
    state = {"model.embed_tokens.weight": embedding, "model.norm.weight": weights["output_norm.weight"]}
    state["lm_head.weight"] = weights.get("output.weight", embedding)
    for i in range(field("block_count")):
        for name, theirs in NAMES.items():
            weight = weights[f"blk.{i}.{name}.weight"]
            count = {"attn_q": heads, "attn_k": kv_heads}.get(name)
            state[f"model.layers.{i}.{theirs}.weight"] = halves(weight, count) if count else weight
    config = LlamaConfig(
        vocab_size=len(embedding),
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=field("context_length"),
        rope_theta=field("rope.freq_base"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in weights,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict({name: torch.from_numpy(np.array(weight)) for name, weight in state.items()})
    return model.to(DEVICE, getattr(torch, dtype)).eval()


def on_device(rows):
    """A tensor of token ids."""
    return torch.tensor(rows, device=DEVICE)


class Judge:
    """A labelling job as a user writes it: batches of whole prompts, or their common beginning run once."""

    def __init__(self, request, model):
        self.model, self.request = model, request
        self.tokenizer = AutoTokenizer.from_pretrained(request["tokenizer"])
        self.answers = [self.tokenizer.encode(x, add_special_tokens=False)[0] for x in request["choices"]]

    @torch.inference_mode()
    def run(self):
        """The log-probs of the choices after each prompt."""
        prompts, batch = self.request["prompts"], self.request["batch"]
        ids = [self.tokenizer.encode(text, add_special_tokens=False) for text in prompts]
        shared, cache = 0, None
        if self.request["prefix_cache"]:
            shared = next(i for i, tokens in enumerate(zip(*ids, strict=False)) if len(set(tokens)) > 1)
            cache = DynamicCache(config=self.model.config)
            self.model(input_ids=on_device([ids[0][:shared]]), past_key_values=cache, logits_to_keep=1)
        rows = []
        for start in range(0, len(ids), batch):
            rows += self.batch([row[shared:] for row in ids[start : start + batch]], shared, cache)
        return {"logprobs": rows, "shared_tokens": shared}

    def batch(self, ids, shared, cache):
        """The same for some prompts, given as what follows the shared tokens."""
        length = max(map(len, ids))
        tokens = on_device([[0] * (length - len(row)) + row for row in ids])
        mask = on_device([[0] * (length - len(row)) + [1] * len(row) for row in ids])
        positions = shared + (mask.cumsum(1) - 1).clamp(min=0)
        arguments = {"input_ids": tokens, "position_ids": positions, "logits_to_keep": 1}
        if cache is not None:
            cache = copy.deepcopy(cache)
            cache.batch_repeat_interleave(len(ids))
            mask = torch.cat([torch.ones((len(ids), shared), dtype=mask.dtype, device=DEVICE), mask], dim=1)
        logits = self.model(**arguments, attention_mask=mask, past_key_values=cache, use_cache=cache is not None).logits
        return torch.log_softmax(logits[:, -1].float(), -1)[:, self.answers].tolist()


class Score:
    """One forward pass; the log-probs of every next token at the last position."""

    def __init__(self, request, model):
        self.model, self.tokens = model, on_device(request["tokens"])

    @torch.inference_mode()
    def run(self):
        """One pass."""
        logits = self.model(input_ids=self.tokens, logits_to_keep=1).logits[:, -1].float()
        return {"logprobs": torch.log_softmax(logits, -1)[:, :100].tolist()}


class Sample:
    """Sampling at temperature 1 with a KV cache; the log-probs of what was sampled."""

    def __init__(self, request, model):
        self.model, self.tokens, self.new = model, on_device(request["tokens"]), request["new"]

    @torch.inference_mode()
    def run(self):
        """One batch."""
        out = self.model.generate(
            self.tokens,
            attention_mask=torch.ones_like(self.tokens),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=self.new,
            min_new_tokens=self.new,
            eos_token_id=None,
            pad_token_id=0,
        )
        return {"tokens": out[:, self.tokens.shape[1] :].tolist()}


class SFT:
    """A whole training step with AdamW."""

    def __init__(self, request, model):
        self.model, self.tokens = model.train(), on_device(request["tokens"])
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-4, fused=True)

    def run(self):
        """One step."""
        loss = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item()}


def main():
    """Answers requests until stdin ends."""
    torch.manual_seed(0)
    request = json.loads(sys.stdin.readline())
    task = {"judge": Judge, "score": Score, "sample": Sample, "sft": SFT}[request["task"]](
        request, load(request["weights"], request["dtype"])
    )
    print(
        json.dumps({"warm_up": task.run(), "threads": torch.get_num_threads(), "torch": torch.__version__}), flush=True
    )
    for _ in sys.stdin:
        answer = task.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
