"""kill at seeded random moments, damage, a full disk: the same command comes to the same result, bit for bit."""

import shutil

import pytest
from etils import epath

from rlaif_jax.training.checkpoints import damage
from tests.helpers import flip_a_byte, largest_file
from tests.survival import STAGES, Command, assert_same, draw_kills, survive
from tests.tiny_judge import constitutional_flags, write_judge

pytestmark = pytest.mark.slow
KILLS, SEED = 14, 0  # two in each stage


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    flags = constitutional_flags(write_judge(folder / "judge.gguf"), folder, folder)
    return Command([flag for flag in flags if not flag.startswith("--workdir")], folder / "cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, command):
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, error = command.run(workdir)
    assert status == 0, error
    return workdir


def test_a_run_killed_a_dozen_times_ends_as_an_undisturbed_one(tmp_path, command, undisturbed):
    kills = draw_kills(undisturbed, KILLS, SEED)
    assert len(kills) >= KILLS and {kill.stage for kill in kills} == set(STAGES)
    assert sum(kill.stage == "critique" for kill in kills) == 2
    survive(command, tmp_path, kills)
    assert_same(tmp_path, undisturbed)


def test_the_comparison_sees_a_single_bit(tmp_path, undisturbed):
    copy = shutil.copytree(undisturbed, tmp_path / "copy")
    assert_same(copy, undisturbed)
    flip_a_byte(copy / "rl" / "metrics.jsonl")
    with pytest.raises(AssertionError, match=r"rl/metrics\.jsonl"):
        assert_same(copy, undisturbed)


def test_a_finished_stage_whose_last_checkpoint_is_damaged_is_named_and_trained_again(tmp_path, command, undisturbed):
    workdir = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(workdir / "eval")
    flip_a_byte(largest_file(workdir / "sft" / "checkpoints" / "4" / "params"))
    status, error = command.run(workdir)
    assert status == 2 and error.count("\n") == 1, error
    assert f"{workdir}/sft/checkpoints/4 has other bytes in params/" in error
    assert f"Delete {workdir}/sft/stage.json" in error
    (workdir / "sft" / "stage.json").unlink()
    status, error = command.run(workdir)
    assert status == 0 and error.count("deleted checkpoint") == 1, error
    assert_same(workdir, undisturbed)


def test_a_checkpoint_of_another_config_is_one_line_without_traceback(tmp_path, command, undisturbed):
    shutil.copytree(undisturbed / "sft", tmp_path / "sft")
    (tmp_path / "sft" / "stage.json").unlink()
    status, error = command.run(tmp_path, "--stages=sft", "--config.policy.model.hidden_size=64")
    assert status == 2 and error.count("\n") == 1, error
    assert "decoder/embedding is float32[600, 32] there, and the config wants float32[600, 64]" in error


def test_a_full_disk_stops_a_run_that_goes_on_once_there_is_room(small_disk, command, undisturbed):
    workdir, room_for_one = small_disk.folder / "run", 7 << 18  # bytes
    for room in (room_for_one, 0):  # the second checkpoint finds no room, then nothing does
        small_disk.leave(room)
        status, error = command.run(workdir, "--stages=sft")
        last = error.replace("\r", "\n").strip().splitlines()[-1]
        assert status == 2 and "Traceback" not in error, error
        assert last.startswith("rlaif_jax: ") and f"no space left on the disk of {workdir}" in last
        assert not damage(epath.Path(workdir / "sft" / "checkpoints"), 2)
    small_disk.leave(4 * room_for_one)
    status, error = command.run(workdir, "--stages=sft")
    assert status == 0, error
    assert (workdir / "sft" / "metrics.jsonl").read_bytes() == (undisturbed / "sft" / "metrics.jsonl").read_bytes()
