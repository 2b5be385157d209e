import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.planning.advice import advice
from rlaif_jax.planning.compile import read, write_down
from rlaif_jax.planning.estimate import Estimate, bytes_of, estimate
from rlaif_jax.planning.machines import DEVICES, Machine
from rlaif_jax.planning.programs import Program, programs_of
from rlaif_jax.planning.report import as_data, markdown, print_plan, scaling
from rlaif_jax.planning.traffic import Traffic
from rlaif_jax.stages.run import open_run
from tests.helpers import quickstart_config

GIB = 1 << 30


def machine(memory=GIB):
    return Machine("v5e:2x4", 1, DEVICES["v5e"], memory, list)


@pytest.fixture(scope="module")
def run():
    return open_run(override(quickstart_config(), {"judge.weights": "shape:llama-3.2-1b"}), epath.Path("."))


@pytest.fixture(scope="module")
def sft(run, tmp_path_factory):
    """The SFT step, compiled as a plan does and as a run does."""
    cache, folder = jax.config.jax_enable_compilation_cache, tmp_path_factory.mktemp("compiled")
    jax.config.update("jax_enable_compilation_cache", False)  # what is found there is not written down
    (program,) = programs_of(run, ["sft"])
    write_down(program, folder)
    with jax.set_mesh(program.mesh):
        compiled = program.function.lower(*program.arguments).compile()
    jax.config.update("jax_enable_compilation_cache", cache)
    return program, read(folder), compiled


def test_every_program_of_the_stages_is_there_with_its_calls(run):
    programs = {program.title: program for program in programs_of(run)}
    config = run.config
    assert {title.split("/")[0] for title in programs} == set(config.stages)
    assert programs["sft/step"].calls == config.sft.steps
    assert programs["rl/update"].calls == programs["rl/generate"].calls == config.rl.steps
    assert programs["label/prefill"].calls == config.label.pairs / (config.sampler.refill)
    assert programs["rl/generate"].trips == config.policy.max_response_length - 1
    assert [program.title for program in programs_of(run, ["rl"])] == [
        title for title in programs if title.startswith("rl/")
    ]


def test_a_reward_model_of_its_own_shape_is_planned_by_itself(run):
    own = {"reward_model.weights": "shape:llama-3.2-1b", "reward_model.max_response_length": 48, "rl.value_init": "sft"}
    other = dataclasses.replace(run, config=override(run.config, own))
    config, of_device = other.config, 1.2e9 / other.placement.mesh.size
    programs = {program.title: program for program in programs_of(other, ["reward_model", "rl"])}
    assert bytes_of(programs["reward_model/step"].arguments) > 12 * of_device  # Adam's moments with them
    scoring, rollout = programs["rl/reward_model"], programs["rl/rollout"]
    assert scoring.calls == config.rl.steps * config.rl.batch_size / config.evaluation.batch_size
    assert scoring.tokens == config.evaluation.batch_size * (config.policy.max_prompt_length + 48)
    assert bytes_of(rollout.arguments) < 4 * of_device < bytes_of(rollout.beside)  # it waits there
    assert bytes_of(programs["rl/update"].beside) > 4 * of_device


def test_rounds_repeat_the_stages_after_sft(run):
    thrice = dataclasses.replace(run, config=override(run.config, {"rounds": 3}))
    once, often = (
        {program.title: program.calls for program in programs_of(each, ["sft", "rl"])} for each in (run, thrice)
    )
    assert often["sft/step"] == once["sft/step"] and often["rl/update"] == 3 * once["rl/update"]


def test_what_waits_in_host_memory_is_not_beside_a_program(run):
    def beside(**changes):
        other = dataclasses.replace(run, config=override(run.config, changes))
        return {program.name: bytes_of(program.beside) for program in programs_of(other, ["rl"])}

    inside, waiting = beside(), beside(**{"mesh.offload": ("reference", "reward_model")})
    assert waiting["update"] == 0 < inside["update"]
    assert waiting["generate"] < inside["generate"]
    assert waiting["rollout"] == inside["rollout"]  # where both are used


def test_memory_is_what_the_program_of_a_run_takes(sft):
    program, compiled, of_run = sft
    stats, found = of_run.memory_analysis(), estimate(program, compiled, machine())
    assert found.arguments == stats.argument_size_in_bytes
    assert found.outputs == pytest.approx(stats.output_size_in_bytes - stats.alias_size_in_bytes, abs=256)
    assert found.temporaries == pytest.approx(stats.temp_size_in_bytes, rel=0.01)
    assert found.total == found.arguments + found.outputs + found.temporaries


def test_what_two_arguments_share_is_in_memory_once(sft):
    program, compiled, _ = sft
    params = program.arguments[0].params
    shared, found = (
        estimate(each, compiled, machine()) for each in (dataclasses.replace(program, shared=(params,)), program)
    )
    assert bytes_of(params) == found.arguments - shared.arguments == found.total - shared.total > 0


def test_flops_are_those_of_the_layers_and_the_vocabulary(run, sft):
    _, compiled, _ = sft
    shape, batch, length = run.model_config(), run.config.sft.batch_size, run.config.sft.row_length
    heads = shape.num_attention_heads * shape.head_dim
    layer = shape.hidden_size * (2 * heads + 2 * shape.num_key_value_heads * shape.head_dim)
    layer += 3 * shape.hidden_size * shape.intermediate_size
    weights = shape.num_hidden_layers * layer * batch * length + shape.hidden_size * shape.vocab_size * batch * (
        length - 1
    )
    attention = 2 * shape.num_hidden_layers * heads * batch * length * length
    assert 6 * weights < compiled.flops < 6 * (weights + attention) * 1.4  # some of the forward pass is done again


def test_the_slowest_of_what_a_program_needs_binds_it(sft):
    program, compiled, _ = sft
    found = estimate(program, compiled, machine())
    device = DEVICES["v5e"]
    assert found.flops == compiled.flops / 8
    assert found.seconds["compute"] == found.flops / device.flops
    assert found.seconds["memory"] == found.traffic.memory / device.memory_bandwidth
    assert found.seconds["network"] == 0
    assert found.least_seconds == found.seconds[found.bound] == max(found.seconds.values())


def test_a_program_that_does_not_fit_is_said_with_what_would_help(run, sft, capsys):
    program, compiled, _ = sft
    small = machine(memory=1 << 20)
    plan = as_data(run, small, [estimate(program, compiled, small)], "COMMAND", 0.5, 2.0) | {"unplanned": ["critique"]}
    (line,) = plan["over"]
    assert "sft/step needs" in line and "config.sft.micro_batches" in line and "remat" in line
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "OVER" in printed and "config.sft.micro_batches" in printed and "not planned: critique" in printed
    assert f"{run.config.label.pairs} labels" in printed
    assert plan["run"]["price"] == pytest.approx(2 * plan["run"]["device_hours"])
    page = markdown([plan])
    assert "COMMAND" in page and "| sft/step | 300 |" in page
    assert not as_data(run, machine(), [estimate(program, compiled, machine())], "", 0.5, 0.0)["over"]


def test_a_compiler_that_gives_up_says_why(run, sft, tmp_path):
    program, compiled, _ = sft
    (tmp_path / "flops.json").write_text(str(compiled.flops))
    (tmp_path / "error.txt").write_text(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for temporaries (17.50G) exceeds"
    )
    assert estimate(program, read(tmp_path), machine()).temporaries == 17.5 * GIB
    (tmp_path / "error.txt").write_text("INTERNAL: partitioner:\n  File x\nValueError: one and the same\n\nLocation")
    refused = estimate(program, read(tmp_path), machine())
    plan = as_data(run, machine(), [refused], "", 0.5, 0.0) | {"unplanned": []}
    assert plan["over"] == ["sft/step: the compiler refuses: ValueError: one and the same"]
    assert "| refused |" in markdown([plan])
    (tmp_path / "error.txt").unlink()
    assert read(tmp_path).refused == "the compiler has crashed"


def made_up(stage, name, **parts):
    program = Program(stage, name, None, (), {}, None, 1)
    sizes = {"arguments": GIB, "outputs": 0, "temporaries": GIB, "beside": GIB} | parts
    return Estimate(program, **sizes, flops=1e12, traffic=Traffic(), seconds={})


@pytest.mark.parametrize(
    ("estimate", "fields"),
    [
        (made_up("rl", "update", temporaries=9 * GIB), ["config.rl.micro_batches", 'remat="full"']),
        (made_up("rl", "update", beside=9 * GIB), ["reference, reward_model, judge", "config.mesh.offload"]),
        (made_up("rl", "update", arguments=9 * GIB), ["config.mesh.fsdp"]),
        (made_up("rl", "generate", arguments=9 * GIB), ["config.mesh.tensor", "config.sampler.cache_dtype"]),
        (made_up("label", "decode", temporaries=9 * GIB), ["config.sampler.slots"]),
        (made_up("label", "judge", temporaries=9 * GIB), ["config.mesh.judge.tensor", "config.judge.batch_tokens"]),
        (made_up("label", "judge_weights", arguments=9 * GIB), ["config.mesh.judge.tensor"]),
    ],
)
def test_the_fields_that_help_are_those_of_what_is_largest(run, estimate, fields):
    line = advice(estimate, run, machine(memory=2 * GIB))
    assert all(field in line for field in fields) and "\n" not in line
    assert f"{estimate.total / GIB - 2:.1f} GiB more" in line


def test_scaling_compares_what_is_computed_with_what_is_moved():
    seconds = {"compute": 0.3, "memory": 0.35, "links": 0.4, "network": 0.1}
    program = {"name": "sft/step", "tokens": 1000, "flops": 1e12, "seconds": seconds, "least_seconds": 0.4}
    program |= {"collectives": {"all-gather": 4e9}, "links_bytes": 3e9, "network_bytes": 1e9}
    plan = {"topology": "v5e:4x4", "slices": 2, "devices": 32, "programs": [program]}
    row = scaling([plan]).splitlines()[-1]
    assert "2 x v5e:4x4 | 32 |" in row and row.endswith("| 75% | 35% |")


def plan_command(*arguments):
    command = [sys.executable, "-m", "rlaif_jax.plan", "--config=configs/quickstart.py", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_command_plans_for_a_tpu_that_nobody_has(tmp_path):
    folder = epath.Path(__file__).parents[2] / ".plan"
    if not (folder / "libtpu").exists() and importlib.util.find_spec("libtpu") is None:
        pytest.skip("no libtpu: pip install --no-deps --target=.plan -r requirements-plan.txt")
    file = tmp_path / "plan.json"
    arguments = ["--topology=v5e:2x2", "--slices=2", "--config.mesh.data=2", "--programs=sft/step", f"--json={file}"]
    done = plan_command(*arguments)
    assert done.returncode == 0, done.stderr
    (program,) = json.loads(file.read_text())["programs"]
    assert program["fits"] and program["memory"]["total"] > program["memory"]["arguments"] > 0
    assert program["flops"] > 0 and program["memory_bytes"] > 0
    assert program["links_bytes"] > 0 and program["network_bytes"] > 0  # gradients are summed over both slices
    assert f"{program['memory']['total'] / 2**30:.2f}" in done.stdout


@pytest.mark.slow
def test_a_program_that_is_none_is_one_line():
    done = plan_command("--topology=cpu:2", "--programs=sft/stop")
    assert done.returncode == 2 and "--programs=sft/stop is no program of this config" in done.stderr
