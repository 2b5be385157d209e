import pytest
import yaml

from rlaif_jax.errors import UserError
from rlaif_jax.judge.critiques import TEMPLATES, load_critique_template

NAMES = ("prompt", "response", "critique_request", "critique", "revision_request")
FIELDS = {
    "conversation": "Q: {prompt} A: {response}",
    "critique": " CR: {request} C:",
    "revision": " RR: {request} R:",
    "stop": ["\n"],
    "examples": [dict(zip(NAMES, ("p", "r", "cr", "c", "rr"), strict=True)) | {"revision": x} for x in ("one", "two")],
}


def write(path, **changes):
    path.write_text(yaml.safe_dump(FIELDS | changes))
    return str(path)


def test_a_prompt_is_the_examples_then_the_reply_with_each_request(tmp_path):
    template = load_critique_template(write(tmp_path / "t.yaml"), 2, revise_only=False)
    assert template.preamble == "Q: p A: r CR: cr C: c RR: rr R: one\n\nQ: p A: r CR: cr C: c RR: rr R: two"
    asked = template.critique_prompt(" {x}\n", "reply {request}", "is it good?")
    assert asked == "\n\nQ: {x} A: reply {request} CR: is it good? C:"  # braces of texts are texts
    assert template.revision_prompt(asked, "no", "do better") == asked + " no RR: do better R:"


def test_without_critiques_neither_examples_nor_prompts_have_them(tmp_path):
    template = load_critique_template(write(tmp_path / "t.yaml"), 1, revise_only=True)
    assert template.preamble == "Q: p A: r RR: rr R: one"
    needless = ("critique_request", "critique")
    (short,) = ({name: x for name, x in one.items() if name not in needless} for one in FIELDS["examples"][:1])
    (tmp_path / "short.yaml").write_text(
        yaml.safe_dump({name: x for name, x in FIELDS.items() if name != "critique"} | {"examples": [short]})
    )
    path = str(tmp_path / "short.yaml")
    assert load_critique_template(path, 1, revise_only=True).preamble == template.preamble
    with pytest.raises(UserError, match="must have the fields"):
        load_critique_template(path, 1, revise_only=False)
    asked = template.critique_prompt("p", "r", "never asked")
    assert template.revision_prompt(asked, "", "do better") == "\n\nQ: p A: r RR: do better R:"


def test_a_hash_is_of_the_examples_and_of_the_prompt(tmp_path):
    path = write(tmp_path / "t.yaml")
    one, two, plain = (load_critique_template(path, *options) for options in ((1, False), (2, False), (1, True)))
    assert len({one.hash("x"), two.hash("x"), plain.hash("x"), one.hash("y")}) == 4
    assert len({one.digest, two.digest, plain.digest}) == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"conversation": "{prompt}"}, "response"),
        ({"critique": "C:"}, "request"),
        ({"revision": 3}, "texts"),
        ({"stop": "x"}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"extra": 1}, "fields"),
        ({"examples": FIELDS["examples"][:1]}, "critique.shots=2"),
        ({"examples": [{"prompt": "p"}] * 2}, "critique_request"),
    ],
)
def test_a_malformed_template_is_one_line_that_names_what_is_wrong(tmp_path, changes, words):
    with pytest.raises(UserError, match=words) as error:
        load_critique_template(write(tmp_path / "t.yaml", **changes), 2, revise_only=False)
    assert "\n" not in str(error.value) and "t.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"), [("stop: [", "is not YAML"), ("stop: []\nstop: []", "has the key 'stop' twice")]
)
def test_a_file_that_can_not_be_read_is_called_what_it_is(tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"^critique template .*t\.yaml {words}"):
        load_critique_template(str(tmp_path / "t.yaml"), 0, revise_only=False)


def test_an_unknown_template_names_those_there_are():
    with pytest.raises(UserError, match="everyday_requests"):
        load_critique_template("everyday", 0, revise_only=False)
    for path in TEMPLATES.glob("*.yaml"):
        assert load_critique_template(path.stem, 2, revise_only=False).preamble
