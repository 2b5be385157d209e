"""What continues a text is split as in the whole: texts after prompts, responses after chats, for each family."""

import copy
import itertools
import json

import pytest

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import prompt_tokens, response_tokens, texts_to_tokens, tokens_to_text
from tests.gguf_files import byte_level_fields, sentencepiece_fields, sentencepiece_reference, tokenizer_reader

SENTENCEPIECE = sentencepiece_reference()
# How a tokenizer says where a text has a blank of its own before it: Llama 2 and Mistral 0.1 as a normalizer, later
# files as a pre-tokenizer; the others say nowhere.
KINDS = ("prepend", "always", "first", "gemma", "byte-level")
TURN = "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }} </s>{% endif %}"
LLAMA_2 = "<s>{% for m in messages %}" + TURN + "{% endfor %}"
MISTRAL = LLAMA_2.replace("{% else %} {{", "{% else %}{{")  # the first one's, without a blank before replies
ROLES = (  # each turn begins with a role token
    "<s>{% for m in messages %}{{ '<unk>' if m['role'] == 'user' else '</s>' }}{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '</s>' }}{% endif %}"
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tokenizer of each kind; the Metaspace ones from folders."""
    folder = tmp_path_factory.mktemp("continuing")
    fields = {kind: sentencepiece_fields(reference) for kind, reference in SENTENCEPIECE.items()}
    found = {
        "prepend": tokenizers.from_gguf(tokenizer_reader(folder / "llama.gguf", **fields["llama"])),
        "gemma": tokenizers.from_gguf(tokenizer_reader(folder / "gemma.gguf", **fields["gemma"])),
        "byte-level": tokenizers.from_gguf(tokenizer_reader(folder / "bytes.gguf", **byte_level_fields("llama-bpe"))),
    }
    for scheme in ("always", "first"):
        found["prepend"].save_pretrained(str(folder / scheme))
        file = folder / scheme / "tokenizer.json"
        cut = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": False}
        file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": None, "pre_tokenizer": cut}))
        found[scheme] = tokenizers.from_folder(folder / scheme)
    return found


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_a_continuing_text_is_split_as_sentencepiece_splits_it_behind_its_own_blank(made, kind):
    for string in SENTENCEPIECE["llama"]["strings"]:
        if string["text"]:
            assert texts_to_tokens(made[kind], [" " + string["text"]], continuing=True) == [string["ids"]]


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_of_a_text_are_the_whole(made, kind):
    parts = ["How are you today?", " I am", " fine", ", thank you.", "\n", "</s>", " rice"]
    (first,), rest = texts_to_tokens(made[kind], parts[:1]), texts_to_tokens(made[kind], parts[1:], continuing=True)
    assert [*first, *itertools.chain(*rest)] == texts_to_tokens(made[kind], ["".join(parts)])[0]
    assert [tokens_to_text(made[kind], tokens) for tokens in rest] == parts[1:]


@pytest.mark.parametrize("kind", ["gemma", "byte-level"])
def test_a_tokenizer_without_a_blank_of_its_own_splits_every_text_alike(made, kind):
    assert tokenizers.continuation(made[kind]) is None
    texts = [string["text"] for string in SENTENCEPIECE["gemma"]["strings"]]
    assert texts_to_tokens(made[kind], texts, continuing=True) == texts_to_tokens(made[kind], texts)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [*itertools.product(KINDS[:3], [LLAMA_2, MISTRAL, ROLES]), ("gemma", MISTRAL), ("gemma", ROLES)],
)
def test_prompt_and_response_are_the_tokens_of_the_rendered_chat(made, kind, layout):
    tokenizer = copy.deepcopy(made[kind])
    tokenizer.chat_template = layout
    for turns in (["How are you?", "fine"], ["How are you?", "I am fine.", "hello", "fine, thank you"]):
        prompt = turns[0]
        if len(turns) > 2:
            prompt = f"\n\nHuman: {turns[0]}\n\nAssistant: {turns[1]}\n\nHuman: {turns[2]}\n\nAssistant:"
        (tokens,), (reply,) = prompt_tokens(tokenizer, [prompt]), response_tokens(tokenizer, turns[-1:])
        chat = [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        end = text.rindex(turns[-1]) + len(turns[-1])
        assert tokens + reply == tokenizer(text[:end], add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_begins_with_what_the_tokenizer_says(made, kind):
    bos = [] if kind == "byte-level" else [1]
    assert tokenizers.beginning(made[kind]) == bos
    (tokens,) = texts_to_tokens(made[kind], ["How are you?"])
    assert bos + tokens == made[kind]("How are you?")["input_ids"]
