import json

import pytest

from rlaif_jax.data import tokenizers
from rlaif_jax.errors import UserError
from rlaif_jax.models.weights import resolve
from tests.conftest import SMOLLM2
from tests.reference import make_llama_reference

CHAT = [
    {"role": "user", "content": "How are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Good."},
]


@pytest.fixture(scope="module", params=["committed", pytest.param("live", marks=pytest.mark.peer)])
def reference(request):
    if request.param == "live":
        return make_llama_reference.tokenizer_reference(str(resolve(SMOLLM2)))
    return json.loads((make_llama_reference.FOLDER / "smollm2_tokenizer.json").read_text())


@pytest.fixture(scope="module")
def trained():
    return tokenizers.train(["How are you? I am fine. How do I cook rice 10 times?"] * 3, 300)


def encode(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_gguf_tokenizer_equals_transformers(smollm2_tokenizer, reference):
    for string in reference["strings"]:
        assert encode(smollm2_tokenizer, string["text"]) == string["ids"], string["text"]


def test_gguf_chat_template_equals_transformers(smollm2_tokenizer, reference):
    chat = smollm2_tokenizer.apply_chat_template(reference["messages"], add_generation_prompt=True, tokenize=False)
    assert chat == reference["chat"]


@pytest.mark.parametrize("text", make_llama_reference.TOKENIZED)
@pytest.mark.parametrize("name", ["smollm2_tokenizer", "trained"])
def test_decode_inverts_encode(request, name, text):
    tokenizer = request.getfixturevalue(name)
    assert tokenizer.decode(encode(tokenizer, text), clean_up_tokenization_spaces=False) == text


def test_gguf_tokenizer_splits_every_digit(smollm2_tokenizer):
    tokens = [smollm2_tokenizer.decode([index]) for index in encode(smollm2_tokenizer, "10, 100  and 2024")]
    assert [t for t in tokens if any(c.isdigit() for c in t)] == list("101002024")


def test_gguf_tokenizer_cuts_before_digits_as_the_original_does(smollm2_tokenizer):
    # SmolLM2 splits digits off before byte-level BPE; transformers' reading of the GGUF file leaves that out.
    pieces = [smollm2_tokenizer.decode([index]) for index in encode(smollm2_tokenizer, "a  5  b")]
    assert pieces == ["a", "  ", "5", " ", " b"]


def test_end_of_sequence_is_the_end_of_a_turn(smollm2_tokenizer, trained):
    assert smollm2_tokenizer.eos_token == "<|im_end|>"
    assert trained.eos_token == "<|end|>"
    assert trained.pad_token_id != trained.eos_token_id


def test_role_tokens_are_single(trained, smollm2_tokenizer):
    for role in ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"):
        assert len(encode(trained, role)) == 1
    for role in ("<|im_start|>", "<|im_end|>"):
        assert len(encode(smollm2_tokenizer, role)) == 1


def test_trained_vocabulary_has_the_size_asked_for_and_is_a_function_of_the_texts(trained):
    assert len(trained) <= 300
    again = tokenizers.train(["How are you? I am fine. How do I cook rice 10 times?"] * 3, 300)
    assert again.get_vocab() == trained.get_vocab()


def test_trained_chat_template_renders_turns_and_the_opening_of_the_reply(trained):
    text = trained.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert text == "<|user|>How are you?<|end|><|assistant|>Fine.<|end|><|user|>Good.<|end|><|assistant|>"


@pytest.mark.parametrize("name", ["smollm2_tokenizer", "trained"])
def test_a_saved_tokenizer_is_the_same(request, name, tmp_path):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save_pretrained(str(tmp_path))
    loaded = tokenizers.from_folder(tmp_path)
    for text in (*make_llama_reference.TOKENIZED, "<|user|>Hi<|end|>"):
        assert encode(loaded, text) == encode(tokenizer, text)
    assert (loaded.eos_token_id, loaded.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert loaded.apply_chat_template(CHAT, tokenize=False) == tokenizer.apply_chat_template(CHAT, tokenize=False)


def test_a_folder_without_a_readable_tokenizer_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer\.json"):
        tokenizers.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="can't be read") as error:
        tokenizers.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_without_a_fast_tokenizer_says_what_to_do(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json in .*: delete it"):
        tokenizers.from_folder(tmp_path, remedy="delete it")
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"AutoTokenizer\.from_pretrained\('.*'\)\.save_pretrained") as error:
        tokenizers.from_folder(tmp_path)
    assert "\n" not in str(error.value)


def test_a_folder_whose_tokenizer_has_no_end_is_one_clear_line(tmp_path, trained):
    trained.save_pretrained(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no eos_token"):
        tokenizers.from_folder(tmp_path)


def test_code_that_a_folder_names_never_runs(tmp_path, trained):
    trained.save_pretrained(str(tmp_path))
    named = {"auto_map": {"AutoTokenizer": ["code.Mine", "code.Mine"]}, "tokenizer_class": "Mine"}
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | named
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    assert encode(tokenizers.from_folder(tmp_path), "How are you?") == encode(trained, "How are you?")
    assert not (tmp_path / "ran").exists()
