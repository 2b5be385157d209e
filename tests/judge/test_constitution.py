import json

import numpy as np
import pytest
import yaml

from rlaif_jax.constitution import convert, main
from rlaif_jax.errors import UserError
from rlaif_jax.judge.constitution import (
    TEXTS,
    ConstitutionConfig,
    Principle,
    draw,
    load_constitution,
    principles_for,
)

TAGS = {"harmlessness", "honesty", "helpfulness", "privacy", "autonomy"}
ROW = {"id": "kind", "comparison": "Choose the kinder response."}


def principles(*weights):
    return [Principle(f"p{i}", "c", "r", "x", "", weight, ()) for i, weight in enumerate(weights)]


def written(tmp_path, *rows):
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump({"principles": list(rows)}))
    return str(path)


def test_the_shipped_constitution_has_every_text_of_every_principle_and_each_tag_twice():
    found = load_constitution("assistant")
    assert all(getattr(principle, name) for principle in found.principles for name in (*TEXTS, "source"))
    tags = [tag for principle in found.principles for tag in principle.tags]
    assert set(tags) == TAGS and all(tags.count(tag) >= 2 for tag in TAGS)
    for name in TEXTS:
        assert len({getattr(principle, name) for principle in found.principles}) == len(found.principles)


def test_draws_follow_the_weights_and_a_weight_of_0_is_never_drawn():
    weights, n = np.array([0, 1, 2, 0, 5, 0]), 4000
    drawn = [principle.id for principle in draw(principles(*weights), 3, range(n))]
    counts = np.array([drawn.count(f"p{i}") for i in range(len(weights))])
    assert not counts[weights == 0].any()
    expected = n * weights / weights.sum()
    assert np.all(abs(counts - expected) < 4 * np.sqrt(expected + 1))  # 4 standard deviations


def test_a_draw_is_a_function_of_seed_and_row_alone():
    some = principles(1, 1, 1, 1)
    whole = draw(some, 7, range(100))
    assert draw(some, 7, [42, 3, 42]) == [whole[42], whole[3], whole[42]]
    assert draw(some, 8, range(100)) != whole
    scaled = draw(principles(2.5, 2.5, 2.5, 2.5), 7, range(100))
    assert [one.id for one in scaled] == [one.id for one in whole]


def test_the_digest_changes_with_all_that_a_judge_can_notice_and_with_nothing_else(tmp_path):
    digests = [
        load_constitution(written(tmp_path, ROW | changes)).digest
        for changes in (
            {},
            {"source": "a book"},
            {"comparison": "Choose."},
            {"weight": 2},
            {"id": "x"},
            {"tags": ["a"]},
        )
    ]
    assert digests[0] == digests[1] and len(set(digests)) == 5


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([ROW, ROW], "has the principle 'kind' twice"),
        ([ROW | {"comparison": " "}], r"principle 0 \(kind\): it needs a text"),
        ([ROW | {"comparson": "x"}], "unknown field 'comparson': did you mean comparison"),
        ([ROW | {"weight": -1}], "weight must be a finite number, 0 or more, not -1"),
        ([ROW | {"weight": float("nan")}], "not nan"),
        ([ROW | {"weight": float("inf")}], "not inf"),
        ([ROW | {"weight": True}], "not True"),
        ([ROW | {"weight": 0}], "every weight is 0"),
        ([ROW | {"tags": "honesty"}], "tags must be a list of texts"),
        ([ROW | {"critique": 3}], "critique must be a text, not 3"),
        ([ROW | {"id": "be kind"}], "letters, digits, _ and -"),
        ([{"comparison": "x"}], "a text `id`"),
        (["be kind"], "principle 0: it must be a mapping"),
        ([], "a list of one or more"),
    ],
)
def test_a_malformed_constitution_is_one_line_that_names_file_and_principle(tmp_path, rows, words):
    with pytest.raises(UserError, match=words) as error:
        load_constitution(written(tmp_path, *rows))
    assert "own.yaml" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "principles: 3", "principles: []\nrules: []"])
def test_a_file_that_is_no_constitution_is_one_line(tmp_path, text):
    (tmp_path / "other.yaml").write_text(text)
    with pytest.raises(UserError, match=r"other\.yaml") as error:
        load_constitution(str(tmp_path / "other.yaml"))
    assert "\n" not in str(error.value)


def test_a_key_that_is_there_twice_is_one_line_with_both_places(tmp_path):
    (tmp_path / "own.yaml").write_text("principles:\n  - id: kind\n    comparison: a\n    comparison: b\n")
    with pytest.raises(UserError, match=r"own\.yaml has the key 'comparison' twice, in the lines 3 and 4: leave one"):
        load_constitution(str(tmp_path / "own.yaml"))
    (tmp_path / "own.yaml").write_text("principles: [{id: a, comparison: b}]\nprinciples: [{id: c, comparison: d}]\n")
    with pytest.raises(UserError, match="the key 'principles' twice, in the lines 1 and 2"):
        load_constitution(str(tmp_path / "own.yaml"))


def test_an_unknown_name_or_tag_names_the_nearest():
    with pytest.raises(UserError, match="did you mean assistant"):
        load_constitution("asistant")
    with pytest.raises(UserError, match="did you mean honesty"):
        principles_for("label", ConstitutionConfig("assistant", ("honsty",)), ("comparison",))


def test_a_stage_draws_what_has_its_texts_and_a_weight_and_says_what_is_left_out(tmp_path, capfd):
    only = {"id": "rewrite", "revision": "Rewrite it."}
    file = written(tmp_path, ROW | {"tags": ["a"]}, ROW | {"id": "never", "weight": 0, "tags": ["a", "b"]}, only)
    assert [one.id for one in principles_for("label", ConstitutionConfig(file, ()), ("comparison",))] == ["kind"]
    assert "label: principles never drawn: weight 0: never; no comparison: rewrite" in capfd.readouterr().out
    assert [one.id for one in principles_for("critique", ConstitutionConfig(file, ()), ("revision",))] == ["rewrite"]
    with pytest.raises(UserError, match=r"stage critique can draw no principle.*give one a critique and a revision"):
        principles_for("critique", ConstitutionConfig(file, ()), ("critique", "revision"))
    with pytest.raises(UserError, match=r"tags=b \(weight 0: never\)"):
        principles_for("label", ConstitutionConfig(file, ("b",)), ("comparison",))
    capfd.readouterr()
    principles_for("label", ConstitutionConfig("assistant", ("privacy",)), ("comparison",))
    assert capfd.readouterr().out == ""


# The forms in which the requests are published: a mapping with lists of one text, one of plain names, and lists.
FORMS = {
    "published": {
        "harm0": {
            "prompt": ["\n\nCritiqueRequest: Say what harms.\n\nCritique:"],
            "edit_request": "\n\nRevisionRequest: Take it out.\n\nRevision:",
        }
    },
    "names": {"harm0": {"critique_request": "Say what harms.", "revision_request": "Take it out."}},
    "a list": [{"critique": "Say what harms.", "revision": "Take it out."}],
}


@pytest.mark.parametrize("form", FORMS)
def test_published_requests_become_principles_without_the_words_around_them(tmp_path, form):
    (tmp_path / "harm.json").write_text(json.dumps(FORMS[form]))
    (tmp_path / "rl.json").write_text(
        json.dumps(["\nPlease choose the kinder one. Options:", "Which is truer? Options:"])
    )
    files = f"{tmp_path / 'harm.json'},{tmp_path / 'rl.json'}"
    assert main(["constitution", f"--convert={files}", f"--out={tmp_path / 'out.yaml'}"]) == 0
    harm, kind, true = load_constitution(str(tmp_path / "out.yaml")).principles
    assert harm.id == ("harm-0" if form == "a list" else "harm0")
    assert (harm.critique, harm.revision, harm.comparison) == ("Say what harms.", "Take it out.", "")
    assert (kind.id, kind.comparison, kind.source) == ("rl-0", "Please choose the kinder one.", "rl.json")
    assert true.comparison == "Which is truer?"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": {"prompt": "x"}, "a": {"prompt": "y"}}', "has the name 'a' twice"),
        ('{"a": {"promt": "x"}}', "unknown text 'promt'"),
        ('{"a": {"prompt": ["x", "y"]}}', "prompt must be one text"),
        ('{"a": {"critique_request": "x", "critique": "y"}}', "two texts for a critique"),
        ('{"a": {"critique": ""}}', "it needs a text"),
        ('{"a": {"prompt": "Consider this."}}', "a: prompt does not begin with 'CritiqueRequest:': name a file of"),
        ('{"a": {"edit_request": "Better."}}', "edit_request does not begin with 'RevisionRequest:'"),
        (r'["\n\nHuman: Hello.\n\nAssistant: Hello."]', "a-0: comparison has the turns of a dialogue: name a file of"),
        (r'{"a": {"prompt": "CritiqueRequest: x\n\nHuman: Hello."}}', "prompt has the turns of a dialogue"),
        ('{"a": 3}', "must be a text or a mapping"),
        ("{}", "must hold a mapping"),
        ("[", "is not JSON"),
    ],
)
def test_what_can_not_be_converted_is_one_line(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=words) as error:
        convert([tmp_path / "a.json"])
    assert "a.json" in str(error.value) and "\n" not in str(error.value)


def test_the_command_says_how_likely_each_principle_is_and_what_keeps_it_out(tmp_path, capfd):
    file = written(tmp_path, ROW | {"weight": 3}, ROW | {"id": "true"}, {"id": "rewrite", "revision": "Rewrite it."})
    assert main(["constitution", f"--file={file}"]) == 0
    out = capfd.readouterr().out
    assert "0.750" in out and "0.250" in out
    assert "critique never draws, no critique: rewrite" in out and "label never draws, no comparison: rewrite" in out
    for arguments in ([], ["--file=x", "--convert=y"], ["--convert=x.json"], ["--file=x", "--out=y.yaml"]):
        assert main(["constitution", *arguments]) == 2
        assert "usage:" in capfd.readouterr().err
