"""Trained models of a run, exported: they are what the run itself reads, and transformers can do what the card says."""

import dataclasses
import functools
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import struct
from transformers import GenerationConfig

from rlaif_jax import export
from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import encode_prompts, encode_responses
from rlaif_jax.errors import UserError
from rlaif_jax.files import new_folder, write_json
from rlaif_jax.models.parameters import abstract_parameters, place_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.stages.export import _pad
from rlaif_jax.stages.folders import in_round
from rlaif_jax.stages.reward_model import load_reward_model, one_member, score
from rlaif_jax.stages.run import Run, run_record
from rlaif_jax.training.checkpoints import Checkpoints
from rlaif_jax.training.sequences import Sequences, response_rewards
from tests.helpers import (
    assert_trees_close,
    eight_devices,
    full_logits,
    one_device,
    quickstart_config,
    random_params,
    tiny,
)

PROMPTS = ["How do I cook rice?", "Name a river."]
RESPONSES = ["Rinse it, then boil it.", "The Nile, which is long."]


class State(struct.PyTreeNode):
    params: dict
    step: jax.Array


def with_model(run, name, params):
    """Leaves a stage of a run as its training does."""
    checkpoints = Checkpoints(run.folder(name) / "checkpoints")
    checkpoints.save(getattr(run.config, in_round(name)[0]).steps, State(jax.device_put(params), jnp.zeros(())), {})
    checkpoints.close()
    write_json(run.record(name), {"done": True, "config": {}})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two rounds with random models, on 8 devices, and a reward model of two members; the second round did no RL."""
    config, folder = quickstart_config(), epath.Path(tmp_path_factory.mktemp("made")) / "run"
    tokenizer = tokenizers.train([*PROMPTS, *RESPONSES], 320)
    tokenizer.save_pretrained(str(folder / "sft" / "tokenizer"))
    changes = {
        "rounds": 2,
        "policy.model": tiny(vocab_size=320, max_position_embeddings=128),
        "policy.max_response_length": 60,
        "reward_model.members": 2,
        "rl.sampling.top_k": 7,
        "evaluation.sampling.temperature": 0.0,
    }
    run = Run(functools.reduce(changed, changes.items(), config), folder, eight_devices())
    write_json(folder / "config.json", run_record(run.config))
    for seed, name in enumerate(("sft", "rl")):
        params = random_params(run.language_model(), seed)
        with_model(run, name, place_parameters(run.language_model(), params, run.placement))
    members = [random_params(run.scalar_model(), seed) for seed in (7, 8)]
    with_model(run, "reward_model", jax.tree.map(lambda *x: np.stack(x), *members))
    figures = {"member_means": [0.5, -0.75], "mean": 0.125, "scale": 1.75}
    write_json(folder / "reward_model" / "normalisation.json", figures)
    write_json(run.record("round2/rl"), {"done": False, "config": {}})
    return run


def changed(config, change):
    (name, value), fields = change, {}
    first, _, rest = name.partition(".")
    fields[first] = changed(getattr(config, first), (rest, value)) if rest else value
    return dataclasses.replace(config, **fields)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """What the command wrote, by stages; of the reward model, the second member."""
    folder, options = tmp_path_factory.mktemp("exported"), {"reward_model": ["--member=1"]}
    for stage in ("sft", "rl", "reward_model"):
        flags = [f"--workdir={run.workdir}", f"--stage={stage}", f"--out={folder / stage}", "--license=mit"]
        assert export.main(["export", *flags, *options.get(stage, [])]) == 0
    return folder


def loaded(folder, kind=LanguageModel):
    weights = open_weights(str(folder))
    abstract = abstract_parameters(kind(weights.config), one_device())
    parameters = load_parameters(weights, {name: x for name, x in abstract.items() if name != "bias"})
    return kind(weights.config), parameters


rewards_of = jax.jit(response_rewards, static_argnums=0)


def rows_of(tokenizer):
    """Prompts and responses as rows of tokens, padded on the right; and as our sequences."""
    sequences = Sequences(*encode_prompts(tokenizer, PROMPTS, 64), *encode_responses(tokenizer, RESPONSES, 64))
    rows = [
        np.concatenate([prompt[there], response[valid]])
        for prompt, there, response, valid in zip(
            sequences.prompts, sequences.prompt_mask, sequences.responses, sequences.response_mask, strict=True
        )
    ]
    assert len(set(map(len, rows))) == len(rows)
    padded = np.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    for padded_row, row in zip(padded, rows, strict=True):
        padded_row[: len(row)] = row
    return padded, sequences


@pytest.mark.parametrize("stage", ["sft", "rl"])
def test_a_policy_is_exported_to_the_bit_with_all_that_it_needs(run, exported, stage):
    model, parameters = loaded(exported / stage)
    jax.tree.map(np.testing.assert_array_equal, parameters, run.trained_params(stage, model))
    tokenizer, ours = tokenizers.from_folder(exported / stage), run.tokenizer()
    assert tokenizer.get_vocab() == ours.get_vocab() and tokenizer.chat_template == ours.chat_template
    settings = GenerationConfig.from_pretrained(str(exported / stage))
    assert tuple(settings.eos_token_id) == tokenizers.end_tokens(ours)
    assert (settings.pad_token_id, settings.max_new_tokens) == (ours.pad_token_id, 60)
    assert (settings.do_sample, settings.top_k) == ((True, 7) if stage == "rl" else (False, None))
    config = json.loads((exported / stage / "config.json").read_text())
    assert (config["architectures"], config["dtype"]) == (["LlamaForCausalLM"], "float32")
    assert config["eos_token_id"] == ours.eos_token_id
    card = (exported / stage / "README.md").read_text()
    assert "license: mit" in card and f"| stage | {stage} |" in card
    assert f"| step | {getattr(run.config, stage).steps} |" in card
    assert not list(exported.glob("*.tmp"))


def test_the_rewards_of_exported_members_come_to_that_of_the_run(run, exported, tmp_path):
    flags = [f"--workdir={run.workdir}", "--stage=reward_model", f"--out={tmp_path / 'first'}", "--member=0"]
    assert export.main(["export", *flags]) == 0
    found = []
    for folder in (tmp_path / "first", exported / "reward_model"):
        (model, parameters), sequences = loaded(folder, ScalarModel), rows_of(run.tokenizer())[1]
        scores = rewards_of(model, parameters | {"bias": jnp.zeros(1)}, sequences)
        found.append(scores + json.loads((folder / "config.json").read_text())["reward_offset"])
    assert np.ptp(found, axis=0).max() > 1e-3
    expected = score(run, load_reward_model(run), sequences, 8)
    np.testing.assert_allclose(np.mean(found, axis=0), expected, atol=1e-5)
    card = (exported / "reward_model" / "README.md").read_text()
    assert "member 1 of 2" in card and "reward_offset" in card


def test_members_whose_weights_are_averaged_are_exported_as_one(run, tmp_path):
    members = jax.device_get(run.trained_params("reward_model", run.scalar_model(), members=2))
    workdir = tmp_path / "run"
    shutil.copytree(run.workdir, workdir)
    averaged = dataclasses.replace(run, config=changed(run.config, ("reward_model.combine", "weights")))
    write_json(epath.Path(workdir) / "config.json", run_record(averaged.config))
    figures = {"member_means": [0.5], "mean": 0.25, "scale": 2.0}
    write_json(epath.Path(workdir) / "reward_model" / "normalisation.json", figures)
    flags = [f"--workdir={workdir}", "--stage=reward_model", f"--out={tmp_path / 'found'}", "--dtype=float16"]
    assert export.main(["export", *flags]) == 0
    _, found = loaded(tmp_path / "found", ScalarModel)
    np.testing.assert_allclose(found["kernel"], 2 * np.mean(members["kernel"], axis=0), rtol=1e-3, atol=1e-6)
    mean = jax.tree.map(lambda x: np.mean(x, axis=0), members["decoder"])
    assert_trees_close(found["decoder"], mean, rtol=1e-3, atol=1e-6)
    offset = json.loads((tmp_path / "found" / "config.json").read_text())["reward_offset"]
    assert offset == pytest.approx(2 * (np.mean(members["bias"]) - 0.75), rel=1e-5)
    assert "the average of 2 members" in (tmp_path / "found" / "README.md").read_text()


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(run, small_disk, capfd):
    small_disk.leave(60_000)
    out = small_disk.folder / "out"
    assert f"{out} can't be written" in refusal(capfd, f"--workdir={run.workdir}", "--stage=rl", f"--out={out}")
    assert not [path for path in small_disk.folder.iterdir() if path.name.startswith("out")]


def test_a_reward_model_pads_with_what_ends_no_response():
    def tokenizer(pad, special=()):
        made = tokenizers.train(["some text"], 300)
        made.add_special_tokens({"additional_special_tokens": list(special)})
        made.pad_token = pad
        return made

    kept, other = tokenizer("<|pad|>"), tokenizer("<|end|>", ["<|unused|>"])
    assert "`<|pad|>`" in _pad(kept) and kept.pad_token == "<|pad|>"
    said = _pad(other)  # not a token of the chat template, for it would do no more than work
    assert other.pad_token in ("<|pad|>", "<|unused|>") and f"`{other.pad_token}`" in said
    assert "`<|end|>` ends responses, too" in said and other.padding_side == "right"


def test_a_tokenizer_whose_only_special_token_is_the_end_has_none_to_pad_with():
    bare = tokenizers.train(["some text"], 300)
    backend = json.loads(bare.backend_tokenizer.to_str())
    backend["added_tokens"] = [token for token in backend["added_tokens"] if token["content"] == "<|end|>"]
    only_end = type(bare)(
        tokenizer_object=tokenizers.tokenizers.Tokenizer.from_str(json.dumps(backend)), eos_token="<|end|>"
    )
    only_end.pad_token = "<|end|>"
    assert "one text at a time" in _pad(only_end) and only_end.pad_token is None


def refusal(capfd, *flags):
    assert export.main(["export", *flags]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    return error


def test_misuse_is_one_clear_line(run, exported, tmp_path, capfd):
    of_run, out = f"--workdir={run.workdir}", f"--out={tmp_path / 'x'}"
    bad = {
        ("--stage=rll", of_run, out): "--stage=rll is unknown: did you mean rl?",
        ("--stage=round2/rl", of_run, out): "stage round2/rl has not finished",
        ("--stage=round3/rl", of_run, out): "is unknown: did you mean round2/rl",
        ("--stage=label2", of_run, out): "sft, reward_model, rl, round2/reward_model, round2/rl",
        ("--stage=eval", of_run, out): "sft, reward_model, rl, round2/reward_model, round2/rl",
        ("--stage=reward_model", of_run, out): "2 members .*--member=0 to --member=1",
        ("--stage=reward_model", "--member=2", of_run, out): "--member=2",
        ("--stage=reward_model", "--member=-1", of_run, out): "member",
        ("--stage=rl", "--member=0", of_run, out): "for reward models",
        ("--stage=rl", "--dtype=int8", of_run, out): "float32.*bfloat16.*float16",
        ("--stage=rl", "--judge-license=mit", of_run, out): "--judge-license is for labels",
        ("--stage=label", "--dtype=float32", of_run, out): "--dtype is for models",
        ("--stage=rl", f"--workdir={tmp_path}", out): "no folder of rlaif_jax.main",
        ("--stage=rl", of_run, f"--out={exported / 'rl'}"): "is there already",
        ("--stage=rl", of_run): "usage",
    }
    for flags, expected in bad.items():
        assert re.search(expected, refusal(capfd, *flags)), flags
    assert not (tmp_path / "x").exists()


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    folder = epath.Path(tmp_path) / "folder"
    with pytest.raises(UserError, match="can't be written"), new_folder(folder) as temporary:
        (temporary / "half").write_text("")
        assert not folder.exists()
        raise OSError("the disk is full")
    assert not any(tmp_path.iterdir())
    (folder.parent / "folder.tmp").mkdir()  # as a kill leaves it
    (folder.parent / "folder.tmp" / "half").write_text("")
    with new_folder(folder) as temporary:
        (temporary / "whole").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "whole"]
    with pytest.raises(UserError, match="is there already"), new_folder(folder):
        pass


@pytest.mark.peer
def test_transformers_computes_what_the_run_does_and_writes_replies(exported):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tests.reference.make_families_reference import logits_of_folder

    tokenizer = AutoTokenizer.from_pretrained(exported / "rl")
    rows, _ = rows_of(tokenizer)
    np.testing.assert_allclose(
        logits_of_folder(exported / "rl", rows), full_logits(*loaded(exported / "rl"), rows), atol=1e-4
    )
    model = AutoModelForCausalLM.from_pretrained(exported / "rl")
    turns = [{"role": "user", "content": PROMPTS[0]}]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert inputs["input_ids"][0].tolist() == rows[0][: inputs["input_ids"].shape[1]].tolist()
    torch.manual_seed(0)
    reply = model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
    assert 0 < len(reply) <= 64


@pytest.mark.peer
def test_transformers_gives_the_rewards_of_padded_texts(run, exported):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from tests.reference.make_families_reference import score_of_folder

    folder = exported / "reward_model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows, sequences = rows_of(tokenizer)
    expected = rewards_of(run.scalar_model(), one_member(load_reward_model(run), 1), sequences)
    offset = json.loads((folder / "config.json").read_text())["reward_offset"]
    np.testing.assert_allclose(score_of_folder(folder, rows)[:, 0] + offset, expected, atol=1e-4)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False)
        + response
        + tokenizer.eos_token
        for prompt, response in zip(PROMPTS, RESPONSES, strict=True)
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    np.testing.assert_array_equal(inputs["input_ids"], rows)
    with torch.inference_mode():
        rewards = model(**inputs).logits[:, 0] + model.config.reward_offset
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
