import os
import re
import shlex
import shutil
import subprocess

import pytest

from tests.launch.conftest import ROOT

SCRIPTS = [*sorted((ROOT / "launch").glob("*.sh")), ROOT / "launch" / "slurm.sbatch", ROOT / ".ci" / "run"]


def test_shellcheck_has_nothing_to_say():
    # That of requirements-test.txt first.
    shellcheck = shutil.which("shellcheck", path=f"{ROOT / '.venv' / 'bin'}:{os.environ['PATH']}")
    done = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def commands_of(page) -> list[list[str]]:
    """The calls of launchers in a page, whose lines may go on after a backslash, and loop or go to the background."""
    text = page.read_text().replace("\\\n", " ")
    calls = re.findall(r"(?:^|; |  |[A-Z]=\d+ )((?:bash|sbatch) [^\n]*?launch/[^\n>]*)", text, re.M)
    return [shlex.split(call.replace("$i", "0").split(" && ")[0]) for call in calls if "install.sh" not in call]


@pytest.mark.parametrize("page", ["local", "tpu_pod", "slurm", "gke"])
def test_a_page_shows_commands_that_work(launcher, page):
    commands = commands_of(ROOT / "docs" / f"launch_{page}.md")
    assert len(commands) >= 2
    for command in commands:
        at = next(i for i, word in enumerate(command) if word.startswith("launch/"))
        done = launcher.run(command[at], "--dry-run", *command[at + 1 :])
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"
        assert re.search(r"rlaif_jax\.(main|sweep)", done.stdout) or "delete" in command
        for config in re.findall(r"--config=(\S+?\.py)", " ".join(command)):
            assert (ROOT / config).exists()
