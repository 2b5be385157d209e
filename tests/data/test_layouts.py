import pytest

from rlaif_jax.data.layouts import LAYOUTS, Draft, messages, split_dialogues
from rlaif_jax.data.sources import Malformed

POST = {"subreddit": "running", "title": "Shoes?", "post": "I run.\n\nMy shoes are old. Which ones last? Thanks"}
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Why?\nTell me.\n\nAssistant:"


def words(text):
    return len(text.split())


def test_the_tldr_layout():
    text = LAYOUTS["tldr"](POST).versions[0]
    assert text == f"SUBREDDIT: r/running\n\nTITLE: Shoes?\n\nPOST: {POST['post']}\n\nTL;DR:"
    assert LAYOUTS["tldr"]({"prompt": text}) == LAYOUTS["tldr"](POST)
    assert messages(text) == [{"role": "user", "content": text}]


@pytest.mark.parametrize(("limit", "kept"), [(99, POST["post"]), (14, "I run.\n\nMy shoes are old."), (9, "I run.")])
def test_the_post_is_shortened_at_sentences_and_nothing_else(limit, kept):
    fitted = LAYOUTS["tldr"](POST).fitted(words, limit)
    assert fitted == f"SUBREDDIT: r/running\n\nTITLE: Shoes?\n\nPOST: {kept}\n\nTL;DR:"
    assert words(fitted) <= limit


def test_a_draft_that_no_version_of_fits_is_none():
    assert LAYOUTS["tldr"](POST).fitted(words, 7) is None


def test_the_longest_version_that_fits_is_taken():
    draft = Draft(["a b c d", "a b c", "a b", "a"])
    assert [draft.fitted(words, n) for n in range(6)] == [None, "a", "a b", "a b c", "a b c d", "a b c d"]


def test_a_dialogue_is_its_turns_and_loses_the_earliest_first():
    draft = LAYOUTS["dialogue"]({"prompt": HH})
    assert draft.versions == [HH, "\n\nHuman: Why?\nTell me.\n\nAssistant:"]
    assert messages(HH) == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?\nTell me."},
    ]


def test_a_prompt_without_turns_is_the_first_of_a_dialogue():
    assert LAYOUTS["dialogue"]({"prompt": "Hi"}).versions == ["\n\nHuman: Hi\n\nAssistant:"]


def test_what_two_dialogues_share_is_their_prompt():
    pair = {"response_a": HH + " Because.", "response_b": HH + " Begone.", "choice": 1}
    assert split_dialogues(pair) == {"prompt": HH, "response_a": " Because.", "response_b": " Begone.", "choice": 1}
    # They part within the assistant's first turn.
    pair = {"response_a": HH + " x", "response_b": HH.replace("Hello", "Help"), "reply": HH + " x"}
    split = split_dialogues(pair)
    assert split["prompt"] == "\n\nHuman: Hi\n\nAssistant:"
    assert split["reply"] == split["response_a"] == (HH + " x").removeprefix(split["prompt"])
    assert split_dialogues(split) == split


def test_an_abstract_may_be_a_list_of_sentences():
    draft = LAYOUTS["abstract"]({"title": "T", "source": ["One.", "Two."]})
    assert draft.versions == ["TITLE: T\n\nABSTRACT: One. Two.\n\nTL;DR:", "TITLE: T\n\nABSTRACT: One.\n\nTL;DR:"]


@pytest.mark.parametrize(
    ("layout", "row", "reason"),
    [
        ("request", {}, "no field prompt"),
        ("request", {"prompt": 3}, "prompt is not text"),
        ("request", {"prompt": "  "}, "prompt is empty"),
        ("request", {"prompt": "half of \ud83d"}, "prompt is not valid Unicode"),
        ("tldr", {"prompt": "Summarise this"}, "prompt is not in the TL;DR layout"),
        ("tldr", {"subreddit": "a", "title": "b", "post": None}, "post is not text"),
        ("abstract", {"title": "b", "source": []}, "source is empty"),
        ("dialogue", {"prompt": ""}, "prompt is empty"),
        ("dialogue", {"prompt": "\n\nHuman: a\n\nAssistant: b"}, "the human does not have the last turn"),
        ("dialogue", {"response_a": "x"}, "no field prompt"),
    ],
)
def test_a_malformed_row_has_its_reason(layout, row, reason):
    result = LAYOUTS[layout](row)
    assert isinstance(result, Malformed)
    assert reason in result.reason
