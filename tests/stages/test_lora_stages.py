"""Stages that train adapters, as a whole run of a tiny policy of a GGUF file."""

import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.errors import AGAIN
from rlaif_jax.export import main as export
from rlaif_jax.main import main
from rlaif_jax.models.parameters import abstract_parameters
from rlaif_jax.models.peft import with_adapter
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.parallel import processes
from rlaif_jax.planning.estimate import bytes_of
from rlaif_jax.planning.programs import programs_of
from rlaif_jax.stages.rl import abstract_rl_state
from rlaif_jax.stages.run import open_run, reopen_run
from tests.helpers import one_device_mesh, quickstart_config
from tests.tiny_judge import tiny_run_flags, write_judge

RANK = 2
LORA = {
    "policy.weights": None,
    "lora.rank": RANK,
    "rl.steps": 4,
    "rl.checkpoint_every": 1,
    "policy.max_prompt_length": 80,
}
PREFERENCE = {"preference.steps": 2, "preference.batch_size": 8, "preference.checkpoint_every": 1}


def flags(judge, workdir, **changes):
    fields = LORA | PREFERENCE | {"policy.weights": judge, "sft.row_length": 160} | changes
    return [*tiny_run_flags(judge, workdir), *(f"--config.{name}={value}" for name, value in fields.items())]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def workdir(judge, tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora") / "run"
    assert main(["main", *flags(judge, folder), "--stages=sft,label,reward_model,rl"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(workdir):
    return reopen_run(epath.Path(workdir), one_device_mesh())


def metrics(workdir, stage):
    return [json.loads(line) for line in (workdir / stage / "metrics.jsonl").read_text().splitlines()]


def ranks(after, before):
    """Of the change of each weight of the first layer."""
    found = {}
    for name, weight in before["decoder"]["layers"].items():
        if name.endswith("norm"):
            assert np.array_equal(weight["scale"], after["decoder"]["layers"][name]["scale"])
        else:
            change = np.asarray(after["decoder"]["layers"][name][0]) - np.asarray(weight[0])
            inputs = 2 if name == "output" else 1
            matrix = change.reshape(np.prod(change.shape[:inputs]), -1)
            values = np.linalg.svd(matrix, compute_uv=False)
            found[name] = int(np.sum(values > 1e-3 * values[0]))
    assert np.array_equal(after["decoder"]["embedding"], before["decoder"]["embedding"])
    return found


@pytest.mark.slow
def test_a_stage_changes_its_weights_by_its_rank_and_nothing_else(run):
    base, sft, rl = run.base_params("sft"), run.trained_params("sft", run.language_model()), None
    assert set(ranks(sft, base).values()) == {RANK}
    rl = run.trained_params("rl", run.language_model())
    assert set(ranks(rl, sft).values()) == {RANK}
    assert set(ranks(rl, base).values()) == {2 * RANK}  # an adapter of its own, to what SFT has made


@pytest.mark.slow
def test_states_hold_adapters_alone(run):
    state = abstract_rl_state(run)  # what a checkpoint is
    assert list(state.params["decoder"]["layers"]) == ["lora"] and list(state.params) == ["decoder"]
    assert set(state.value.params) == {"decoder", "kernel", "bias"}
    whole = sum(x.size for x in jax.tree.leaves(run.base_params("rl")))
    assert sum(x.size for x in jax.tree.leaves(state)) < 0.5 * whole


@pytest.mark.slow
def test_rl_begins_as_its_reference(workdir):
    first, *_, last = metrics(workdir, "rl")
    assert first["kl/k3"] == pytest.approx(0, abs=1e-9)
    assert last["kl/k3"] > 0


@pytest.mark.slow
def test_the_reward_model_is_an_adapter_and_a_head_to_the_sft_policy(run):
    model = run.scalar_model()
    trained = run.trained_params("reward_model", model, members=1)
    one = jax.tree.map(lambda x: x[0], trained)
    assert set(ranks(one, run.trained_params("sft", run.language_model())).values()) == {RANK}
    assert {"kernel", "bias"} < set(one)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rl", "preference"])
def test_a_stage_that_is_stopped_goes_on_to_the_same_result(judge, workdir, tmp_path, monkeypatch, stage):
    stages = f"('sft','label',{'' if stage == 'preference' else repr('reward_model') + ','}{stage!r},'eval')"
    command = [*flags(judge, tmp_path / "run", stages=stages), f"--stages={stage}"]
    for name in ("sft", "label", "reward_model"):
        shutil.copytree(workdir / name, tmp_path / "run" / name)
    shutil.copytree(tmp_path / "run", tmp_path / "undisturbed")
    undisturbed = [*flags(judge, tmp_path / "undisturbed", stages=stages), f"--stages={stage}"]
    assert main(["main", *undisturbed]) == 0
    looks = iter([True])
    with monkeypatch.context() as patch:
        patch.setattr(processes, "stop_point", lambda: next(looks, False))
        assert main(["main", *command]) == AGAIN
    assert len(metrics(tmp_path / "run", stage)) == 1
    assert main(["main", *command]) == 0
    assert metrics(tmp_path / "run", stage) == metrics(tmp_path / "undisturbed", stage)


@pytest.mark.slow
def test_an_exported_adapter_is_all_that_the_stages_have_learned(judge, workdir, run, tmp_path, capfd):
    command = ["export", f"--workdir={workdir}", "--stage=rl"]
    assert export([*command, f"--out={tmp_path / 'adapter'}", "--adapter"]) == 0
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 2 * RANK  # of SFT and of RL
    adapted, model = with_adapter(open_weights(judge), str(tmp_path / "adapter")), run.language_model()
    rl = run.trained_params("rl", model)
    read = load_parameters(adapted, abstract_parameters(model, run.placement))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), read, rl)
    assert export([*command, f"--out={tmp_path / 'merged'}"]) == 0
    merged = load_parameters(open_weights(str(tmp_path / "merged")), abstract_parameters(model, run.placement))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), merged, rl)  # on other devices
    capfd.readouterr()
    for stage, words in (("reward_model", "for policies"), ("label", "--adapter is for models")):
        assert export(["export", f"--workdir={workdir}", f"--stage={stage}", f"--out={tmp_path / stage}", "--adapter"])
        assert words in capfd.readouterr().err


NO_GATE = {"policy.weights": "", "policy.model.family": "gpt2", "policy.model.max_position_embeddings": 256}
BAD = {
    "target that there is not": (NO_GATE | {"lora.stages": "('rl',)"}, "has no gate"),
    "unknown target": ({"lora.targets": "('queries',)"}, "lora.targets"),
    "unknown stage": ({"lora.stages": "('label',)"}, "lora.stages"),
    "random weights": ({"policy.weights": ""}, "policy.weights"),
    "offloaded reference": ({"mesh.offload": "('reference',)"}, "mesh.offload"),
    "adapter to nothing": ({"policy.weights": "", "lora.rank": 0, "policy.adapter": "/no"}, "policy.adapter"),
    "no adapter": ({"policy.adapter": "/no/adapter"}, "/no/adapter"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_choice_is_one_clear_line(judge, tmp_path, capfd, name):
    changes, words = BAD[name]
    assert main(["main", *flags(judge, tmp_path / "run", **changes)]) != 0
    errors = capfd.readouterr().err.strip().splitlines()
    assert len(errors) == 1 and words in errors[0]


@pytest.mark.slow
def test_another_rank_is_another_run(judge, workdir, capfd):
    assert main(["main", *flags(judge, workdir, **{"lora.rank": 3}), "--stages=sft"]) != 0
    assert "lora.sft" in capfd.readouterr().err


def test_a_plan_has_one_copy_of_what_is_frozen():
    def arguments(**changes):
        config = override(quickstart_config(), {"judge.weights": "shape:llama-3.2-1b"} | changes)
        programs = programs_of(open_run(config, epath.Path(".")), ["rl"])
        return {program.name: jax.tree.leaves((program.arguments[2:], program.keywords)) for program in programs}

    def size(leaves):
        return sum(x.size for x in leaves if hasattr(x, "size"))

    full, lora = arguments(), arguments(**{"lora.rank": 1, "lora.stages": ("rl",)})
    assert size(lora["rollout"]) < 0.8 * size(full["rollout"])  # no moments, and no reference beside the policy


@pytest.mark.parametrize("value_init", ["sft", "reward_model"])
def test_a_plan_has_the_decoder_that_the_value_network_shares_once(value_init):
    changes = {
        "judge.weights": "shape:llama-3.2-1b",
        "lora.rank": 1,
        "lora.stages": ("rl",),
        "rl.value_init": value_init,
    }
    run = open_run(override(quickstart_config(), changes), epath.Path("."))
    decoder = bytes_of(abstract_parameters(run.language_model(), run.placement))
    for program in programs_of(run, ["rl"]):
        if program.name in ("rollout", "update"):
            assert bytes_of(program.shared) == (decoder if value_init == "sft" else 0)
