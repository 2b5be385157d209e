"""Tokenizers: from a GGUF file's metadata, from a Hugging Face folder, or trained on a corpus."""

import functools
from collections.abc import Iterable

import gguf
import tokenizers
from etils import epath
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlaif_jax.errors import UserError
from rlaif_jax.models.gguf import metadata, open_reader
from rlaif_jax.models.weights import open_weights

# Layout of a dialogue for tokenizers that we train; the same turns as ChatML, with one token a role.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]

# How each pre-tokenizer that a GGUF file may name splits text before byte-level BPE.
_PRE_TOKENIZERS = {
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True)],
    "gpt-2": list,
}
# Tokens that end a turn, by family; a model may write one of them where its tokenizer names another as the end.
_END_OF_TURN = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end_of_text|>")
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL


@functools.cache  # a vocabulary takes seconds to parse
def from_weights(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model (`open_weights`). Raises UserError where the model does not know all its tokens."""
    weights = open_weights(path)
    tokenizer = from_folder(weights.path) if weights.path.is_dir() else from_gguf(open_reader(weights.path))
    if len(tokenizer) > weights.config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, more than the {weights.config.vocab_size} rows of the "
            "embedding: take the tokenizer that the model was saved with"
        )
    return tokenizer


def from_gguf(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """Rebuilds the byte-level BPE tokenizer of a GGUF file, with its chat template.

    Raises UserError for another kind of tokenizer.
    """
    fields = metadata(reader, "tokenizer.ggml.")
    kind, splitter = fields["model"], fields.get("pre", "gpt-2")
    if kind != "gpt2" or splitter not in _PRE_TOKENIZERS:
        raise UserError(
            f"the GGUF file has a tokenizer of kind {kind!r}/{splitter!r}; supported: gpt2 with "
            f"{sorted(_PRE_TOKENIZERS)}"
        )
    tokens = fields["tokens"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    tokenizer = _byte_level(models.BPE(vocab=vocabulary, merges=merges), _PRE_TOKENIZERS[splitter]())
    control = [t for t, token_type in zip(tokens, fields["token_type"], strict=True) if token_type == _CONTROL_TOKEN]
    tokenizer.add_special_tokens(control)
    eos = tokens[fields["eos_token_id"]]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[fields["bos_token_id"]],
        eos_token=eos,
        pad_token=tokens[fields.get("padding_token_id", fields["eos_token_id"])],
        chat_template=metadata(reader, "tokenizer.").get("chat_template"),
    )


def end_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens at which a reply ends: end of sequence, and every end of turn that the tokenizer knows as special."""
    turns = {index for index, token in special_tokens(tokenizer).items() if token in _END_OF_TURN}
    return tuple(sorted({tokenizer.eos_token_id, *turns}))


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """All tokens that are no text, whether or not the tokenizer has a role for them."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def from_folder(folder: str | epath.Path) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder. Raises UserError where there is none; runs no remote code."""
    folder = epath.Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"no tokenizer.json in {folder}: delete {folder.parent} and run its stage again")
    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers passes on whatever the files make it raise
        raise UserError(f"the tokenizer in {folder} can't be read: {error}") from error


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` tokens, with role tokens and a chat template.

    Raises UserError where `vocab_size` has no room for the single bytes and the role tokens.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(_SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(f"config.policy.model.vocab_size={vocab_size} is less than {least}, the bytes and role tokens")
    tokenizer = _byte_level(models.BPE(), [])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", chat_template=CHAT_TEMPLATE
    )


def _byte_level(model: models.BPE, before: list) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*before, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
