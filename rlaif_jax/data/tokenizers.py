"""Tokenizers: from a GGUF file's metadata, from a Hugging Face folder, or trained on a corpus."""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import gguf
import tokenizers
from etils import epath
from gguf import TokenType
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlaif_jax.errors import UserError
from rlaif_jax.models.gguf import metadata, open_reader
from rlaif_jax.models.weights import open_weights

# Layout of a dialogue for tokenizers that we train; the same turns as ChatML, with one token a role.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
_SPECIAL_TOKENS = ["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"]

# How each pre-tokenizer that a GGUF file may name cuts a text before byte-level BPE: the patterns of the models' own
# tokenizer.json files, and for "default" those of llama.cpp (src/llama-vocab.cpp), one after the other.
_GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN_2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class _Splitter(NamedTuple):
    patterns: tuple[str, ...]
    whole: bool = False  # a piece that is a token is that token, whatever the merges make of it
    composed: bool = False  # Unicode is composed (NFC) before
    bos: bool = False  # texts begin with the beginning-of-sequence token where the file does not say


_SPLITTERS = {
    "llama-bpe": _Splitter((_LLAMA_3,), whole=True, bos=True),  # Llama 3 and SmolLM3
    "qwen2": _Splitter((_QWEN_2,), composed=True),  # Qwen 2, 2.5 and 3
    "tekken": _Splitter((_TEKKEN,), whole=True, bos=True),  # Mistral Nemo
    "smollm": _Splitter((r"\p{N}", _GPT_2)),
    "gpt-2": _Splitter((_GPT_2,)),
    "default": _Splitter((r"[\p{P}\$\+<=>\^~\|]+", _GPT_2, r"\p{N}+", "[0-9][0-9][0-9]")),
}
# Tokens that end a turn, by family; a model may write one of them where its tokenizer names another as the end.
_END_OF_TURN = (
    *("<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),  # Llama 3
    *("<|im_end|>", "<|endoftext|>"),  # Qwen, SmolLM
    *("<end_of_turn>", "<eos>"),  # Gemma
    "</s>",  # Llama 2, Mistral
)
# Files of before July 2024 have Gemma's turns as text that is one token.
_ROLES = ("<start_of_turn>", *_END_OF_TURN)


@functools.cache  # a vocabulary takes seconds to parse
def from_weights(path: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a model (`open_weights`). Raises UserError where the model does not know all its tokens."""
    weights = open_weights(path)
    tokenizer = from_folder(weights.path) if weights.path.is_dir() else from_gguf(open_reader(weights.path))
    rows, special = weights.config.vocab_size, special_tokens(tokenizer)
    # Gemma 3 1B has a special token for images beyond its embedding, which no text has.
    if any(index >= rows and index not in special for index in tokenizer.get_vocab().values()):
        raise UserError(
            f"{path}: the tokenizer has {len(tokenizer)} tokens, more than the {rows} rows of the embedding: take the "
            "tokenizer that the model was saved with"
        )
    return tokenizer


def from_gguf(reader: gguf.GGUFReader) -> PreTrainedTokenizerFast:
    """Rebuilds the tokenizer of a GGUF file, with its chat template if it has one.

    Byte-level BPE (kind "gpt2") cut as `_SPLITTERS` says, or SentencePiece's BPE (kind "llama"): the tokenizers of
    Llama, Mistral, SmolLM, Qwen and Gemma. Raises UserError for any other, and for one with a part missing.
    """
    fields = dict(metadata(reader, "tokenizer.ggml."))
    kind, splitter = fields.get("model"), fields.get("pre")
    if kind != "llama" and (kind != "gpt2" or splitter not in _SPLITTERS):
        raise UserError(
            f"the GGUF file has a tokenizer of kind {kind!r}/{splitter!r}; supported: gpt2 with "
            f"{sorted(_SPLITTERS)}, and llama (SentencePiece)"
        )
    try:
        fields |= {"tokens": _as_in_texts(fields)}
        tokenizer = _sentencepiece(fields) if kind == "llama" else _gpt2(fields, _SPLITTERS[splitter])
        tokenizer.add_tokens(_added(fields))
        named = {f"{role}_token": fields["tokens"][index] for role, index in _named(fields).items()}
    except Exception as error:  # tokenizers knows no other
        raise UserError(f"the GGUF file's tokenizer is malformed, convert the model again: {error!r}") from error
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=metadata(reader, "tokenizer.").get("chat_template"),
        add_bos_token=bool(fields.get("add_bos_token", kind == "llama" or _SPLITTERS[splitter].bos)),
        add_eos_token=bool(fields.get("add_eos_token", False)),
        **named,
    )


def _gpt2(fields: Mapping, splitter: _Splitter) -> tokenizers.Tokenizer:
    vocabulary = {token: index for index, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in fields["merges"]]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=splitter.whole)
    tokenizer = _byte_level(model, splitter.patterns)
    if splitter.composed:
        tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def _sentencepiece(fields: Mapping) -> tokenizers.Tokenizer:
    tokens, types = fields["tokens"], fields["token_type"]
    unknown = [token for token, token_type in zip(tokens, types, strict=True) if token_type == TokenType.UNKNOWN]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=_merges(tokens, fields["scores"], types),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    spaced = fields.get("add_space_prefix", True)
    tokenizer.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend("▁")] if spaced else []), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            *([decoders.Strip(" ", 1, 0)] if spaced else []),
        ]
    )
    return tokenizer


def _merges(tokens: Sequence[str], scores: Sequence[float], types: Sequence[int]) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose whole has the highest score: every way to halve a piece, in order.

    Role tokens and single bytes are no pieces, so that a text that spells one out stays text.
    """
    scored = zip(tokens, scores, types, strict=True)
    pieces = {token: score for token, score, token_type in scored if token_type == TokenType.NORMAL}
    halved = [
        (-score, -cut, piece[:cut], piece[cut:])
        for piece, score in pieces.items()
        for cut in range(1, len(piece))
        if piece[:cut] in pieces and piece[cut:] in pieces
    ]
    return [(left, right) for _, _, left, right in sorted(halved)]


def _as_in_texts(fields: Mapping) -> list[str]:
    """The tokens; those that users define are found in texts, which have blanks where SentencePiece has its mark."""
    return [
        token.replace("▁", " ") if token_type == TokenType.USER_DEFINED else token
        for token, token_type in zip(fields["tokens"], fields["token_type"], strict=True)
    ]


def _added(fields: Mapping) -> list[AddedToken]:
    """The tokens that are cut out before all others; those that are special are no text."""
    no_text = {TokenType.CONTROL, TokenType.UNKNOWN}
    named = {fields["tokens"][index] for index in _named(fields).values()}
    return [
        AddedToken(token, normalized=False, special=special)
        for token, token_type in zip(fields["tokens"], fields["token_type"], strict=True)
        if (special := token_type in no_text or token in named or token in _ROLES)
        or token_type == TokenType.USER_DEFINED
    ]


def _named(fields: Mapping) -> dict[str, int]:
    """The tokens that have a role, by its name: `eos` and `pad`, which may be the same, and what else there is.

    A file may name a token of text, such as the first one for padding; only the end of sequence is taken as it is.
    """
    names = {"bos": "bos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    given = {role: fields[f"{name}_token_id"] for role, name in names.items() if f"{name}_token_id" in fields}
    found = {role: index for role, index in given.items() if fields["token_type"][index] != TokenType.NORMAL}
    return {"pad": fields["eos_token_id"], **found, "eos": fields["eos_token_id"]}


def end_tokens(tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """The tokens at which a reply ends: end of sequence, and every end of turn that the tokenizer knows as special."""
    names = {*_END_OF_TURN, getattr(tokenizer, "eot_token", None), getattr(tokenizer, "eom_token", None)}
    turns = {index for index, token in special_tokens(tokenizer).items() if token in names}
    return tuple(sorted({tokenizer.eos_token_id, *turns}))


@functools.lru_cache(maxsize=8)
def continuation(tokenizer: PreTrainedTokenizerFast) -> tokenizers.Tokenizer | None:
    """A twin that splits what continues a text: without the blank that SentencePiece puts before a text.

    None for a tokenizer that puts none there. The twin reads role tokens as text.
    """
    backend = tokenizer.backend_tokenizer
    parts = {"normalizer": backend.normalizer, "pre_tokenizer": backend.pre_tokenizer}
    steps = {name: part and json.loads(part.__getstate__()) for name, part in parts.items()}
    without = {name: _without_blank(step) for name, step in steps.items()}
    if without == steps:
        return None
    layout = json.loads(backend.to_str()) | without | {"truncation": None, "padding": None}
    twin = tokenizers.Tokenizer.from_str(json.dumps(layout))
    twin.encode_special_tokens = True
    return twin


def _without_blank(step: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer as tokenizer.json has it, without what it puts before a text."""
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "Sequence":
        (name,) = step.keys() - {"type"}
        return step | {name: [kept for each in step[name] if (kept := _without_blank(each))]}
    return step


def beginning(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """What the tokenizer itself puts before a text: the beginning-of-sequence token of most families, or nothing."""
    whole, text = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (True, False))
    return whole[: whole.index(text[0])]


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[int, str]:
    """All tokens that are no text, whether or not the tokenizer has a role for them."""
    return {index: token.content for index, token in tokenizer.added_tokens_decoder.items() if token.special}


def from_folder(folder: str | epath.Path, remedy: str | None = None) -> PreTrainedTokenizerFast:
    """The fast tokenizer of a Hugging Face folder, as its tokenizer.json has it; code that the folder names never runs.

    Raises UserError where there is none, with `remedy` in place of how to save one.
    """
    folder = epath.Path(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f"no tokenizer.json in {folder}: {remedy or _how_to_save(folder)}")
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers passes on whatever the files make it raise
        raise UserError(f"the tokenizer in {folder} can't be read: {error}".replace("\n", " ")) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{folder}/tokenizer_config.json names no eos_token: write there which token ends a text")
    return tokenizer


def _how_to_save(folder: epath.Path) -> str:
    if not (folder / "tokenizer.model").exists():
        return "give the folder of a model with its tokenizer"
    convert = f"AutoTokenizer.from_pretrained('{folder}').save_pretrained('{folder}')"
    return (
        "save its tokenizer.model as a fast tokenizer, with the packages sentencepiece and protobuf installed: "
        f'python -c "from transformers import AutoTokenizer; {convert}"'
    )


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` tokens, with role tokens and a chat template.

    Raises UserError where `vocab_size` has no room for the single bytes and the role tokens.
    """
    least = len(pre_tokenizers.ByteLevel.alphabet()) + len(_SPECIAL_TOKENS)
    if vocab_size < least:
        raise UserError(f"config.policy.model.vocab_size={vocab_size} is less than {least}, the bytes and role tokens")
    tokenizer = _byte_level(models.BPE(), (_GPT_2,))
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


def _byte_level(model: models.BPE, patterns: Sequence[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
