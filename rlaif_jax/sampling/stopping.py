"""Where a reply ends: at a token of the end-of-sequence set, or with the token that completes a stop string.

Stop strings are found on the device, in the bytes of the tokens, however the tokenizer splits them.
"""

import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast

from rlaif_jax.data.tokenizers import end_tokens, special_tokens


class Stopping(struct.PyTreeNode):
    """What ends a reply."""

    eos_token_ids: tuple[int, ...] = struct.field(pytree_node=False)
    strings: tuple[bytes, ...] = struct.field(pytree_node=False)
    token_bytes: jax.Array  # [vocab, longest token] uint8, zeros after a token's end; [0, 0] without stop strings
    token_lengths: jax.Array  # [vocab] int32

    @property
    def window(self) -> int:
        """How many of a reply's last bytes can hold a stop string that its last token completes."""
        if not self.strings:
            return 0
        return max(map(len, self.strings)) + self.token_bytes.shape[1] - 1

    def push(self, window: jax.Array, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Adds a token to each row: ([rows, window] uint8, whether the reply ends with it [rows] bool)."""
        ended = jnp.isin(tokens, jnp.asarray(self.eos_token_ids, jnp.int32))
        if not self.strings:
            return window, ended
        both = jnp.concatenate([window, self.token_bytes[tokens]], axis=1)
        start = self.token_lengths[tokens][:, None]
        window = jnp.take_along_axis(both, start + jnp.arange(self.window), axis=1)
        for string in self.strings:
            offsets = jnp.arange(self.window - len(string) + 1)[:, None] + jnp.arange(len(string))
            found = jnp.all(window[:, offsets] == jnp.frombuffer(string, jnp.uint8), axis=-1)
            ended |= jnp.any(found, axis=-1)
        return window, ended


def make_stopping(tokenizer: PreTrainedTokenizerFast, strings: Sequence[str] = ()) -> Stopping:
    """Ends at the tokens of `tokenizers.end_tokens`, and at any of the strings, which must not be empty."""
    ids = end_tokens(tokenizer)
    if not all(strings):
        raise ValueError("an empty stop string would end every reply at once")
    if not strings:
        return Stopping(ids, (), jnp.zeros((0, 0), jnp.uint8), jnp.zeros(0, jnp.int32))
    pieces = token_pieces(tokenizer)
    table = np.zeros((len(pieces), max(map(len, pieces))), np.uint8)
    for row, piece in zip(table, pieces, strict=True):
        row[: len(piece)] = np.frombuffer(piece, np.uint8)
    lengths = np.array([len(piece) for piece in pieces], np.int32)
    return Stopping(ids, tuple(string.encode() for string in strings), jnp.asarray(table), jnp.asarray(lengths))


def token_pieces(tokenizer: PreTrainedTokenizerFast) -> list[bytes]:
    """The bytes that each token adds to a text; none for special tokens, which are left out of texts."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    special = special_tokens(tokenizer)
    if isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel):
        to_byte = _byte_of_character()
        piece = lambda token: bytes(to_byte[character] for character in token)  # noqa: E731
    else:
        piece = _sentencepiece_bytes
    added = {index: token.content.encode() for index, token in tokenizer.added_tokens_decoder.items()}
    none = {index for index, token in enumerate(tokens) if token is None} | set(special)  # holes in a vocabulary
    return [b"" if index in none else added.get(index) or piece(token) for index, token in enumerate(tokens)]


def _sentencepiece_bytes(token: str) -> bytes:
    """SentencePiece writes blanks as its mark, and bytes that are no piece as e.g. <0x0A>."""
    byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
    return bytes.fromhex(byte[1]) if byte else token.replace("▁", " ").encode()


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes printable bytes as themselves, the others as the characters from 256 on (GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def cut(text: str, strings: Sequence[str]) -> str:
    """The text up to the first stop string."""
    ends = [text.index(string) for string in strings if string in text]
    return text[: min(ends)] if ends else text
