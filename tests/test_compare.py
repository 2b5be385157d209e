"""Runs side by side, and which round of a run with rounds its column is of."""

import json

import pytest

from rlaif_jax import compare
from tests.report_run import figure, write

STAGES = ("sft", "label", "reward_model", "rl", "eval")


def write_rounds(folder, begun: int, rounds: int = 2):
    """A run of `rounds` rounds of which `begun` have been gone through, each figure being the number of its round."""
    write(folder / "config.json", {"config": {"stages": STAGES, "rounds": rounds}})
    for number in range(1, begun + 1):
        start = folder if number == 1 else folder / f"round{number}"
        for stage, name in (("reward_model", "reward_model_accuracy/held_out"), ("eval", "win_rate/rl_vs_sft")):
            write(start / stage / "results.json", {name: figure(number, 0, 9)})
        for stage in ("rl", *(("sft",) if number == 1 else ())):
            write(start / stage / "timing.jsonl", {})
            (start / stage / "timing.jsonl").write_text(json.dumps({"time": 10 * number}) + "\n")
    return folder


def shown(capsys, *arguments) -> dict[str, str]:
    assert compare.main(["compare", *map(str, arguments)]) == 0
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    return {row[0].strip(): row[1].strip() for row in lines}


def test_all_figures_of_a_column_are_of_one_round_and_its_seconds_of_those_up_to_it(tmp_path, capsys):
    done = shown(capsys, write_rounds(tmp_path / "run", begun=2))
    assert done[""] == "run"
    assert {done[f"`{name}`"][0] for name in ("reward_model_accuracy/held_out", "win_rate/rl_vs_sft")} == {"2"}
    assert (done["`seconds/sft`"], done["`seconds/rl`"]) == ("10", "30")


@pytest.mark.parametrize("begun", [1, 2])
def test_the_column_of_a_run_with_rounds_to_come_says_which_it_is_of(tmp_path, capsys, begun):
    run = write_rounds(tmp_path / "run", begun, rounds=3)
    later = run / f"round{begun + 1}" / "reward_model" / "results.json"
    write(later, {"reward_model_accuracy/held_out": figure(9, 0, 9)})
    left = shown(capsys, run)
    assert left[""] == f"run (round {begun} of 3)"
    assert left["`reward_model_accuracy/held_out`"][0] == left["`win_rate/rl_vs_sft`"][0] == str(begun)


def test_the_folder_that_one_is_in_has_its_name_and_help_is_no_error(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(write_rounds(tmp_path / "run", begun=2))
    assert shown(capsys, ".")[""] == "run"
    assert compare.main(["compare", "--help"]) == 0
    assert "usage: python -m rlaif_jax.compare RUN" in capsys.readouterr().out


def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path, capfd):
    assert compare.main(["compare", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} is no folder of rlaif_jax.main" in capfd.readouterr().err
