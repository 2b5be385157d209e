"""kill at seeded random moments, damage, a full disk: the same command comes to the same result, bit for bit."""

import pytest

from rlaif_jax.stages.pipeline import STAGES
from tests.survival import Command, assert_same, draw_kills, survive
from tests.tiny_judge import tiny_run_flags, write_judge

pytestmark = pytest.mark.slow
KILLS, SEED = 10, 0


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("command")
    flags = tiny_run_flags(write_judge(folder / "judge.gguf"), folder)
    return Command([flag for flag in flags if not flag.startswith("--workdir")], folder / "cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, command):
    workdir = tmp_path_factory.mktemp("undisturbed")
    status, error = command.run(workdir)
    assert status == 0, error
    return workdir


def test_a_run_killed_ten_times_ends_as_an_undisturbed_one(tmp_path, command, undisturbed):
    kills = draw_kills(undisturbed, KILLS, SEED)
    assert len(kills) >= KILLS and {kill.stage for kill in kills} == set(STAGES)
    survive(command, tmp_path, kills)
    assert_same(tmp_path, undisturbed)
