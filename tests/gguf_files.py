"""Small GGUF files that hold a tokenizer alone."""

import json

import gguf
from tokenizers import pre_tokenizers

from tests.reference import make_tokenizer_reference

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf.TokenType


def tokenizer_reader(path, chat_template=None, **fields) -> gguf.GGUFReader:
    """A GGUF file whose metadata are `fields`, by their names after "tokenizer.ggml."; None leaves one out."""
    writer = gguf.GGUFWriter(str(path), "llama")
    add_tokenizer(writer, fields, chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf.GGUFReader(str(path))


def add_tokenizer(writer: gguf.GGUFWriter, fields: dict, chat_template=None) -> None:
    """Adds the metadata of a tokenizer to a file; the arguments are those of `tokenizer_reader`."""
    for name, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"tokenizer.ggml.{name}", value)
        elif isinstance(value, str):
            writer.add_string(f"tokenizer.ggml.{name}", value)
        elif value is not None:
            writer.add_array(f"tokenizer.ggml.{name}", value)
    if chat_template is not None:
        writer.add_chat_template(chat_template)


def byte_level_fields(pre: str, added=(("<|end|>", CONTROL),), tokens=("zz",), merges=("z z",), **fields) -> dict:
    """Metadata of byte-level BPE: the bytes, `tokens` of text, and `added` ones with types; their first ends texts."""
    text = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *tokens]
    return {
        "model": "gpt2",
        "pre": pre,
        "tokens": [*text, *(token for token, _ in added)],
        "token_type": [*([NORMAL] * len(text)), *(token_type for _, token_type in added)],
        "merges": list(merges),
        "eos_token_id": len(text),
    } | fields


def sentencepiece_reference() -> dict:
    """What SentencePiece itself makes of texts, by kind ("llama", "gemma")."""
    file = make_tokenizer_reference.FOLDER / "sentencepiece_tokenizers.json"
    return json.loads(file.read_text(encoding="utf-8"))


def sentencepiece_fields(reference: dict, **fields) -> dict:
    """Metadata of one of the tokenizers of `sentencepiece_reference`."""
    return {
        "model": "llama",
        "pre": "default",
        "tokens": reference["tokens"],
        "scores": reference["scores"],
        "token_type": reference["types"],
        "add_space_prefix": reference["add_space_prefix"],
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | fields
