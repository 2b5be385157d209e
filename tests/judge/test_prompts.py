import pytest
import yaml

from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import load_template

GOOD = {
    "instruction": "Judge.",
    "comparison": "Q {prompt} A {response_1} B {response_2}",
    "verdict": " Best:",
    "choices": [" one", " two"],
    "examples": [{"prompt": "p", "response_1": "x", "response_2": "y", "choice": 2}],
}


REASONING = {"cue": " Why:", "stop": ["."]}


def template(tmp_path, chain_of_thought=False, **changes):
    path = tmp_path / "template.yaml"
    path.write_text(yaml.safe_dump(GOOD | changes))
    return load_template(str(path), chain_of_thought)


def test_the_preamble_holds_the_instruction_and_the_examples_with_their_choice(tmp_path):
    assert template(tmp_path).preamble == "Judge.\n\nQ p A x B y Best: two\n\n"


def test_a_chain_of_thought_puts_a_rationale_between_comparison_and_verdict(tmp_path):
    example = GOOD["examples"][0] | {"rationale": " Because."}
    reasoned = template(tmp_path, True, reasoning=REASONING, examples=[example])
    assert reasoned.preamble == "Judge.\n\nQ p A x B y Why: Because. Best: two\n\n"
    assert reasoned.suffix("p", "x", "y") == "Q p A x B y Why:"
    assert (reasoned.reasoning.verdict, reasoned.reasoning.stop) == (" Best:", (".",))
    assert template(tmp_path, reasoning=REASONING).suffix("p", "x", "y") == "Q p A x B y Best:"


def test_a_chain_of_thought_needs_a_template_and_examples_that_show_it(tmp_path):
    with pytest.raises(UserError, match="no reasoning"):
        template(tmp_path, True)
    with pytest.raises(UserError, match=r"example 0.*rationale"):
        template(tmp_path, True, reasoning=REASONING)


def test_braces_in_a_users_text_stay_as_they_are(tmp_path):
    assert template(tmp_path).suffix("{prompt}", "{", "{response_1}") == "Q {prompt} A { B {response_1} Best:"


def test_the_digest_changes_with_any_part(tmp_path):
    variants = [{}, {"instruction": ""}, {"choices": [" two", " one"]}, {"examples": []}]
    assert len({template(tmp_path, **changes).digest for changes in variants}) == len(variants)


@pytest.mark.parametrize(
    "changes",
    [
        {"comparison": "Q {prompt} A {response_1}"},
        {"comparison": "Q {prompt} A {response_1} B {response_2} {rubric}"},
        {"verdict": None},
        {"comparison": "Q {prompt!r} A {response_1} B {response_2:>9}"},
        {"choices": [" one"]},
        {"choices": [1, 2]},
        {"choices": [" 1", " 12"]},
        {"choices": [" 1", " 1"]},
        {"exampels": []},
        {"examples": ["foo"]},
        {"choices": None},
        {"examples": [{"prompt": "p", "response_1": "x", "response_2": "y", "choice": 3}]},
        {"examples": [{"prompt": "p", "response_1": "x", "choice": 1}]},
    ],
)
def test_a_malformed_template_is_an_error_that_names_the_file(tmp_path, changes):
    with pytest.raises(UserError, match=r"template\.yaml"):
        template(tmp_path, **changes)


@pytest.mark.parametrize("text", ["", "- a list", "a: [", "just words"])
def test_a_file_that_is_no_template_is_one_line(tmp_path, text):
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(UserError, match=r"other\.yaml") as error:
        load_template(str(tmp_path / "other.yaml"), False)
    assert "\n" not in str(error.value)


def test_a_stop_that_is_one_text_is_refused_for_it_would_be_its_letters(tmp_path):
    with pytest.raises(UserError, match="stop must be a list"):
        template(tmp_path, True, reasoning=REASONING | {"stop": "\n\n"}, examples=[])


def test_an_unknown_template_names_the_known_ones():
    with pytest.raises(UserError, match="everyday_requests"):
        load_template("everyday_request", False)
