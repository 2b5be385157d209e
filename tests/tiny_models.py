"""Random tiny models of any family as Hugging Face folders, with tokenizers and chat templates of their own."""

import json

from safetensors.numpy import save_file

from rlaif_jax.data import embedded, tokenizers
from rlaif_jax.judge.prompts import load_template
from tests.helpers import quickstart_config
from tests.reference import families

_OF_VOCABULARY = ("wte.weight", "embed_tokens.weight", "embed_in.weight", "lm_head.weight", "embed_out.weight")


def write_model(case: str, folder, vocab_size: int, positions: int = 256, part: str = "lm", turn: str = "") -> str:
    """Writes the folder of a case of tests/reference/families.py, wider and longer, and returns its path.

    part: "lm", or "score" for a reward model. turn: what its chat template has before each turn.
    """
    files, _ = families.read(case)
    config, tensors = files[part]["config"], files[part]["tensors"]
    longest = "n_positions" if "n_positions" in config else "max_position_embeddings"
    config |= {"vocab_size": vocab_size, longest: positions}
    mean, arrays = families.norm_mean(config["model_type"]), {}
    for name, (first, *rest) in tensors.items():
        sizes = {"wpe.weight": positions} | dict.fromkeys(_OF_VOCABULARY, vocab_size)
        size = next((size for ending, size in sizes.items() if name.endswith(ending)), first)
        arrays[name] = families.weight(name, (size, *rest), mean)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(arrays, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer = tokenizers.train(_texts(), vocab_size - 10)  # rows to spare, as models have
    tokenizer.chat_template = turn + tokenizers.CHAT_TEMPLATE
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def _texts() -> list[str]:
    """So many that a tokenizer knows the judge's choices as tokens."""
    kinds = embedded.KINDS.values()
    texts = [prompt.format(t=topic) for kind in kinds for prompt in kind.prompts for topic in kind.topics]
    return [load_template(quickstart_config().judge.prompt).preamble, *texts, " good bad" * 50]
