import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.data import tokenizers
from rlaif_jax.sampling.stopping import cut, make_stopping, token_pieces
from tests.gguf_files import sentencepiece_fields, sentencepiece_reference, tokenizer_reader

TEXT = "One two.\n\nHuman: déjà vu 中文\n\nThree.\n\nHuman: no more."


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train([TEXT] * 30, 300)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_pieces_of_a_text_are_its_bytes(tokenizer, smollm2_tokenizer):
    for each in (tokenizer, smollm2_tokenizer):
        pieces = token_pieces(each)
        assert b"".join(pieces[token] for token in encode(each, TEXT)) == TEXT.encode()
        assert pieces[each.eos_token_id] == b""


def first_stop(stopping, tokens):
    window = jnp.zeros((1, stopping.window), jnp.uint8)
    for i, token in enumerate(tokens):
        window, ended = stopping.push(window, jnp.array([token]))
        if ended[0]:
            return i
    return None


@pytest.mark.parametrize(
    "strings", [["\n\nHuman:"], ["vu", "two."], ["文"], ["e"], [" déjà vu 中", "never"], ["never"]]
)
def test_a_reply_stops_with_the_token_that_completes_the_first_stop_string(tokenizer, smollm2_tokenizer, strings):
    for each in (tokenizer, smollm2_tokenizer):
        tokens, pieces = encode(each, TEXT), token_pieces(each)
        texts = [b"".join(pieces[token] for token in tokens[: i + 1]) for i in range(len(tokens))]
        complete = [any(string.encode() in text for string in strings) for text in texts]
        expected = complete.index(True) if any(complete) else None
        assert first_stop(make_stopping(each, strings), tokens) == expected


def test_every_row_has_a_window_of_its_own(tokenizer):
    stopping = make_stopping(tokenizer, ["two"])
    rows = [encode(tokenizer, text) for text in ("two", "One")]
    window = jnp.zeros((2, stopping.window), jnp.uint8)
    ended = np.zeros(2, bool)
    for tokens in zip(*(row + [rows[1][0]] * (8 - len(row)) for row in rows), strict=True):
        window, now = stopping.push(window, jnp.array(tokens))
        ended |= np.asarray(now)
    assert ended.tolist() == [True, False]


def test_end_of_turn_tokens_end_a_reply_beside_the_end_of_sequence(smollm2_tokenizer):
    stopping = make_stopping(smollm2_tokenizer)
    ends = {smollm2_tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert set(stopping.eos_token_ids) == ends
    _, ended = stopping.push(jnp.zeros((3, 0), jnp.uint8), jnp.array([*ends, 100]))
    assert ended.tolist() == [True, True, False]


def test_a_text_is_cut_at_its_first_stop_string():
    assert cut("a b c", ["c", "b"]) == "a "
    assert cut("a b c", ["d"]) == "a b c"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty stop string"):
        make_stopping(tokenizers.train(["a"], 300), [""])


def test_tokens_that_a_user_added_are_their_own_text():
    tokenizer = tokenizers.train(["a"], 300)
    tokenizer.add_tokens(["two words"])
    assert token_pieces(tokenizer)[-1] == b"two words"


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_pieces_of_sentencepiece_are_its_bytes(tmp_path, kind):
    fields = sentencepiece_fields(sentencepiece_reference()[kind])
    tokenizer = tokenizers.from_gguf(tokenizer_reader(tmp_path / "tokenizer.gguf", **fields))
    pieces, blank = token_pieces(tokenizer), b" " if kind == "llama" else b""
    assert b"".join(pieces[token] for token in encode(tokenizer, TEXT)) == blank + TEXT.encode()
    assert pieces[tokenizer.eos_token_id] == b""
