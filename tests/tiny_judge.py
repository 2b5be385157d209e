"""A random one-layer judge in a GGUF file, so that whole runs take seconds."""

import json

import gguf
import numpy as np
import yaml

from rlaif_jax.data import embedded, tokenizers
from rlaif_jax.judge.critiques import TEMPLATES
from rlaif_jax.judge.prompts import load_template
from tests.gguf_files import add_tokenizer
from tests.helpers import quickstart_config

WIDTH, HEADS, MLP = 32, 2, 64


def _trained_fields() -> dict:
    """A tokenizer that knows both choices of the default template as one token."""
    kinds = embedded.KINDS.values()
    texts = [prompt.format(t=topic) for kind in kinds for prompt in kind.prompts for topic in kind.topics]
    tokenizer = tokenizers.train(
        [load_template(quickstart_config().judge.prompt).preamble, *texts, " good bad" * 50], 700
    )
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": [3 if token.startswith("<|") else 1 for token in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 1,
    }


def write_judge(path, seed: int = 0, fields: dict | None = None, chat_template: str = tokenizers.CHAT_TEMPLATE) -> str:
    """Writes the file and returns its path. `fields`: of another tokenizer, as for `gguf_files.tokenizer_reader`."""
    fields = fields or _trained_fields()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(2048)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(MLP)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    add_tokenizer(writer, fields, chat_template)
    rng = np.random.default_rng(seed)
    shapes = {
        "token_embd": (len(fields["tokens"]), WIDTH),
        "blk.0.attn_q": (WIDTH, WIDTH),
        "blk.0.attn_k": (WIDTH, WIDTH),
        "blk.0.attn_v": (WIDTH, WIDTH),
        "blk.0.attn_output": (WIDTH, WIDTH),
        "blk.0.ffn_gate": (MLP, WIDTH),
        "blk.0.ffn_up": (MLP, WIDTH),
        "blk.0.ffn_down": (WIDTH, MLP),
        "blk.0.attn_norm": (WIDTH,),
        "blk.0.ffn_norm": (WIDTH,),
        "output_norm": (WIDTH,),
    }
    for name, shape in shapes.items():
        weight = np.ones(shape) if len(shape) == 1 else rng.normal(0, shape[1] ** -0.5, shape)
        writer.add_tensor(f"{name}.weight", weight.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


def tiny_run_flags(judge: str, workdir) -> list[str]:
    """Flags of a whole run that trains for a few steps with a tiny policy and the judge in `judge`."""
    overrides = {
        "judge.weights": judge,
        "judge.shard_size": 4,
        "label.commit_every": 4,
        "evaluation.commit_every": 4,
        "judge.batch_tokens": 512,
        "judge.buckets": 2,
        "sampler.slots": 8,
        "sampler.refill": 4,
        "data.embedded.train_prompts": 80,
        "data.embedded.evaluation_combinations": 6,
        "data.embedded.evaluation_unseen_templates": 2,
        "policy.model.vocab_size": 600,
        "policy.model.hidden_size": 32,
        "policy.model.intermediate_size": 64,
        "policy.model.num_attention_heads": 2,
        "policy.model.num_key_value_heads": 2,
        "policy.max_response_length": 64,
        "policy.max_prompt_length": 64,
        "sft.steps": 4,
        "sft.batch_size": 8,
        "sft.row_length": 128,
        "sft.checkpoint_every": 2,
        "label.pairs": 16,
        "reward_model.steps": 4,
        "reward_model.batch_size": 8,
        "reward_model.checkpoint_every": 2,
        "reward_model.validation_pairs": 4,
        "rl.steps": 6,
        "rl.batch_size": 16,
        "rl.checkpoint_every": 2,
        "evaluation.batch_size": 8,
        "evaluation.bootstrap_samples": 100,
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return ["--config=configs/quickstart.py", f"--workdir={workdir}", *flags]


def constitutional_flags(judge: str, workdir, folder) -> list[str]:
    """Flags of a whole run of constitutional AI in which the judge revises, too.

    Its texts end at the first "e", for a random model never ends a line. The template is written into `folder`.
    """
    template = yaml.safe_load((TEMPLATES / "everyday_requests.yaml").read_text()) | {"stop": ["e"]}
    (folder / "critiques.yaml").write_text(yaml.safe_dump(template))
    overrides = {
        "stages": "('sft','critique','sl_cai','label','reward_model','rl','eval')",
        "data.red_team_prompts.kind": "embedded",
        "data.embedded.red_team": 60,
        "data.embedded.red_team_evaluation": 4,
        "constitution.file": "assistant",
        "critique.weights": judge,
        "critique.template": folder / "critiques.yaml",
        "critique.prompts": 12,
        "critique.rounds": 2,
        "critique.shots": 1,
        "critique.max_new_tokens": 10,
        "critique.max_failure_rate": 0.95,
        "critique.revision_sampling.temperature": 1.0,
        "critique.sampler.slots": 8,
        "critique.sampler.refill": 8,
        "critique.sampler.bucket_multiple": 512,
        "critique.commit_every": 4,
        "sl_cai.helpful_share": 0.25,
        "sl_cai.steps": 4,
        "sl_cai.batch_size": 8,
        "sl_cai.checkpoint_every": 2,
    }
    return [*tiny_run_flags(judge, workdir), *(f"--config.{name}={value}" for name, value in overrides.items())]
