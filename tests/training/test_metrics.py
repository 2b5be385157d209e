import json

import pytest
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.training.metrics import JsonLines, StageLog


@pytest.fixture
def file(tmp_path):
    return epath.Path(tmp_path) / "metrics.jsonl"


def write(file, resume_step, steps, tag):
    log = JsonLines(file, resume_step)
    for step in steps:
        log.write({"step": step, "tag": tag})
    log.close()


def rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_resumed_file_holds_each_step_once(file):
    write(file, 0, range(5), "first")
    write(file, 3, range(3, 6), "second")
    assert [row["step"] for row in rows(file)] == list(range(6))
    assert [row["tag"] for row in rows(file)] == ["first"] * 3 + ["second"] * 3


def test_several_lines_of_one_step_are_kept_or_dropped_together(file):
    write(file, 0, [0, 0, 1, 1], "first")
    write(file, 1, [], "second")
    assert [row["step"] for row in rows(file)] == [0, 0]


@pytest.mark.parametrize("half", ['{"step": 2, "ta', '{"step": 2}', "{", '{"step": 1, "tag": "fi'])
def test_a_last_line_without_its_newline_was_never_written(file, half):
    write(file, 0, range(2), "first")
    with file.open("a") as stream:
        stream.write(half)
    write(file, 9, [9], "second")
    assert [row["step"] for row in rows(file)] == [0, 1, 9]


@pytest.mark.parametrize("damage", ["{", "[]", '{"stop": 1}'])
def test_a_damaged_line_is_named(file, damage):
    file.write_text(f'{{"step": 0}}\n{damage}\n{{"step": 2}}\n')
    with pytest.raises(UserError, match=r"line 2 of .*metrics\.jsonl is damaged"):
        JsonLines(file, 3)


def test_a_new_run_starts_an_empty_file(file):
    write(file, 0, range(3), "first")
    write(file, 0, [], "second")
    assert rows(file) == []


def test_a_line_is_on_disk_as_soon_as_it_is_written(file):
    log = JsonLines(file, 0)
    log.write({"step": 0})
    assert rows(file) == [{"step": 0}]
    log.close()


def test_a_stage_log_sorts_names_and_keeps_wall_clock_out_of_metrics(file):
    folder = file.parent / "sft"
    log = StageLog(folder, file.parent / "logs", 0)
    log.write(0, {"tokens": 100.0, "loss": 1.5, "entropy": None}, [{"prompt": "a", "response": "b"}], 0.25)
    log.close()
    text = (folder / "metrics.jsonl").read_text()
    assert text == '{"step": 0, "entropy": null, "loss": 1.5, "tokens": 100.0}\n'
    assert rows(folder / "timing.jsonl") == [{"step": 0, "time": 0.25, "tokens_per_second": 400.0}]
    assert rows(folder / "samples.jsonl") == [{"step": 0, "prompt": "a", "response": "b"}]
    assert list((file.parent / "logs" / "sft").iterdir())
