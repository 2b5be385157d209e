import os
import subprocess
import sys

import pytest

from tests.judge.conftest import PAIRS
from tests.tiny_judge import write_judge


@pytest.mark.parametrize("named", [False, True])
def test_compiled_programs_are_kept_for_the_next_process(tmp_path, named):
    judge = write_judge(tmp_path / "judge.gguf")
    pair = PAIRS[0]
    flags = [f"--prompt={pair.prompt}", f"--a={pair.response_a}", f"--b={pair.response_b}"]
    env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    env |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "named")} if named else {}
    command = [sys.executable, "-m", "rlaif_jax.judge", f"--config.judge.weights={judge}", *flags]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "cache").rglob("jit_*")) is not named
    assert (tmp_path / "named").exists() is named
