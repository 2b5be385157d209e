import dataclasses
import json

import pytest
from etils import epath

from rlaif_jax.data import tokenizers
from rlaif_jax.data.prepare import ABOUT, prepare
from rlaif_jax.data.sources import SourceConfig
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_parquet
from tests.helpers import quickstart_config

NONE = SourceConfig("", "", "", "", {}, 0)
TOKENIZER = tokenizers.train(["How are you? I am fine."] * 3, 300)


def write(folder, name, rows):
    (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = {key: key for key in rows[0]}
    return SourceConfig("jsonl", name, "", "", fields, 0)


def run(folder, rate=0.5, **sets):
    data = dataclasses.replace(
        quickstart_config().data, root=str(folder), max_malformed_rate=rate,
        **dict.fromkeys(["demonstrations", "train_prompts", "evaluation_prompts"], NONE) | sets,
    )  # fmt: skip
    prepare(data, 0, TOKENIZER, 24, 8, epath.Path(folder) / "out")
    return json.loads((folder / "out" / "report.json").read_text())


def kept(folder, name):
    return read_parquet(epath.Path(folder) / "out" / f"{name}.parquet").to_pylist()


def test_rows_are_kept_or_counted_by_reason(tmp_path):
    demonstrations = write(tmp_path, "d.jsonl", [
        {"prompt": "How are you?", "reply": " fine. "},
        {"prompt": "How are you?", "reply": ["am", "I"]},
        {"prompt": "How are you?", "reply": "How are you? How are you? How are you? zebra"},
        {"prompt": "a long word: " + "zebra " * 20, "reply": "fine"},
        {"prompt": "", "reply": "fine"},
        {"prompt": "Hi", "reply": "  "},
        {"prompt": "held out", "reply": "fine"},
    ])  # fmt: skip
    evaluation = write(tmp_path, "e.jsonl", [{"prompt": "held out"}])
    report = run(tmp_path, demonstrations=demonstrations, evaluation_prompts=evaluation)
    rows = [{"prompt": "How are you?", "reply": "fine."}, {"prompt": "How are you?", "reply": "am"}]
    assert kept(tmp_path, "demonstrations") == rows
    assert kept(tmp_path, "evaluation_prompts") == [{"prompt": "held out", "group": ""}]
    assert report["demonstrations"] == {
        "rows": 2,
        "malformed": {"prompt is empty": 1, "reply is empty": 1},
        "dropped": {"reply too long": 1, "prompt too long": 1, "evaluated on": 1},
    }


def test_comparisons_say_which_response_people_chose(tmp_path):
    rows = [{"prompt": "Hi", "response_a": "x", "response_b": "y", "choice": choice} for choice in (0, 1, 2)]
    rows.append({"prompt": "Hi", "response_a": "x", "response_b": "x ", "choice": 0})
    report = run(tmp_path, comparisons=write(tmp_path, "c.jsonl", rows))
    assert [row["prob_a"] for row in kept(tmp_path, "comparisons")] == [1.0, 0.0]
    assert report["comparisons"]["malformed"] == {
        "choice is none of 0, 1, a, b and tie": 1,
        "both responses are the same": 1,
    }


def test_whole_dialogues_are_split_into_prompt_and_responses(tmp_path):
    pair = {"response_a": "\n\nHuman: Hi\n\nAssistant: Hello.", "response_b": "\n\nHuman: Hi\n\nAssistant: What?"}
    config = quickstart_config().data
    data = dataclasses.replace(
        config, root=str(tmp_path), layout="dialogue", comparisons=write(tmp_path, "c.jsonl", [pair]),
        demonstrations=NONE, train_prompts=NONE, evaluation_prompts=NONE,
    )  # fmt: skip
    prepare(data, 0, TOKENIZER, 24, 8, epath.Path(tmp_path) / "out")
    (row,) = kept(tmp_path, "comparisons")
    expected = {"prompt": "\n\nHuman: Hi\n\nAssistant:", "response_a": "Hello.", "response_b": "What?", "prob_a": 1.0}
    assert row == expected | dict.fromkeys(ABOUT, "")


def test_too_many_malformed_rows_stop_the_run(tmp_path):
    rows = [{"prompt": "Hi"}, {"prompt": ""}, {"prompt": "  "}]
    with pytest.raises(UserError, match=r"2 of 3 rows of config\.data\.train_prompts.*prompt is empty: 2.*=0\.5"):
        run(tmp_path, train_prompts=write(tmp_path, "p.jsonl", rows))


def test_a_set_without_a_usable_row_stops_the_run(tmp_path):
    with pytest.raises(UserError, match=r"config\.data\.train_prompts has no usable row \(prompt too long: 1\)"):
        run(tmp_path, train_prompts=write(tmp_path, "p.jsonl", [{"prompt": "zebra " * 30}]))
