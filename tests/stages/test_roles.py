"""Policy, reward model and judge of three families with three tokenizers, in one run."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from etils import epath

from rlaif_jax.config import override
from rlaif_jax.data import tokenizers
from rlaif_jax.main import main
from rlaif_jax.models.weights import weights_hash
from rlaif_jax.stages import reward_model
from rlaif_jax.stages import run as runs
from rlaif_jax.stages.critique import check_reviser
from rlaif_jax.stages.reading import Reader, reward_reader
from rlaif_jax.stages.replies import Replies, loaded_decoder
from rlaif_jax.stages.reward_model import load_reward_model, score, score_texts
from rlaif_jax.stages.rewards import (
    TextRewardModel,
    TextRewards,
    load_gold,
    load_rewards,
    load_token_reward_model,
    score_replies,
)
from rlaif_jax.stages.run import Run, reopen_run
from rlaif_jax.training.reward_models import RewardModel
from rlaif_jax.training.sequences import Sequences
from tests.helpers import apply, one_device, one_device_mesh, quickstart_config, random_params
from tests.reference import families
from tests.tiny_judge import tiny_run_flags
from tests.tiny_models import write_model

POLICY, REWARD, JUDGE = "gpt2", "qwen2", "gemma3"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of a policy, a reward model with a head, one without, and a judge."""
    folder = tmp_path_factory.mktemp("models")
    return {
        "policy": write_model(POLICY, folder / "policy", 600),
        "reward": write_model(REWARD, folder / "reward", 400, part="score", turn="A conversation."),
        "headless": write_model(REWARD, folder / "headless", 400),
        "judge": write_model(JUDGE, folder / "judge", 700, positions=2048),
    }


def flags_of(models, workdir, *options):
    overrides = {
        "policy.weights": models["policy"],
        "reward_model.weights": models["reward"],
        "reward_model.max_prompt_length": 80,
        "reward_model.max_response_length": 60,
        "reward_model.calibrate": False,
        "rl.value_init": "sft",
        "rl.steps": 3,
        "rl.checkpoint_every": 1,
        "rl.penalise_missing_eos": False,
    }
    flags = [f"--config.{name}={value}" for name, value in overrides.items()]
    return ["main", *tiny_run_flags(models["judge"], workdir), *flags, *options]


@pytest.fixture(scope="module")
def finished(models, tmp_path_factory):
    """The folder of a whole run, and what its RL had scored: (prompts, texts, ended, scores) of each iteration."""
    folder, calls, scored = tmp_path_factory.mktemp("run"), [], TextRewards.__call__

    def kept(self, prompts, texts, lengths, ended):
        scores, metrics = scored(self, prompts, texts, lengths, ended)
        calls.append((prompts, texts, ended, scores))
        return scores, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
        patch.setattr(TextRewards, "__call__", kept)
        assert main(flags_of(models, folder)) == 0
    return folder, calls


def reopened(folder) -> Run:
    return reopen_run(epath.Path(folder), one_device_mesh())


def lines(folder, stage):
    return [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_each_role_has_the_model_and_the_tokenizer_that_it_was_given(finished, models):
    folder, _ = finished
    run = reopened(folder)
    shapes = run.model_config(), run.reward_model().config
    assert [(shape.family, shape.vocab_size) for shape in shapes] == [(POLICY, 600), (REWARD, 400)]
    assert run.tokenizer().get_vocab() == tokenizers.from_weights(models["policy"]).get_vocab()
    assert json.loads((folder / "label" / "manifest.json").read_text())["judge_hash"] == weights_hash(models["judge"])
    results = json.loads((folder / "eval" / "results.json").read_text())
    assert {"win_rate/rl_vs_sft", "reward/rl", "reward/sft"} <= set(results)


@pytest.mark.slow
def test_rl_follows_what_the_reward_model_says_of_the_text(finished, models):
    folder, calls = finished
    run = reopened(folder)
    params = jax.tree.map(lambda x: x[0], load_reward_model(run).params)
    normalisation = json.loads((folder / "reward_model" / "normalisation.json").read_text())
    tokenizer, model = tokenizers.from_weights(models["reward"]), run.reward_model()

    def expected(prompt, text, ended):
        turns = [{"role": "user", "content": prompt}]
        laid_out = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(laid_out)["input_ids"]
        tokens += (tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * bool(ended))[:60]
        padded = np.zeros((1, 140), np.int32)
        padded[0, : len(tokens)] = tokens
        said = apply(model, params, padded, (np.arange(140) < len(tokens))[None].astype(np.int32))[0, len(tokens) - 1]
        return said - normalisation["member_means"][0] - normalisation["mean"]

    ends = set()
    for (prompts, texts, ended, scores), line in zip(calls, lines(folder, "rl"), strict=True):
        np.testing.assert_allclose(scores, list(map(expected, prompts, texts, ended)), atol=1e-4)
        assert line["reward/mean"] == pytest.approx(scores.mean(), abs=1e-5)
        assert line["reward/reward_model"] == pytest.approx(scores.mean(), abs=1e-5)
        assert 0 <= line["reward/reward_model_cut"] <= np.mean(ended)
        ends |= set(np.asarray(ended).tolist())
    assert ends == {True, False}  # or the end of sequence would not have been put to the test


@pytest.mark.slow
def test_a_kill_changes_nothing(finished, models, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
    whole, killed = finished[0], tmp_path / "killed"
    for stage in ("sft", "label"):
        shutil.copytree(whole / stage, killed / stage)
    command = flags_of(models, killed, "--stages=reward_model,rl", "--config.mesh.offload=('reward_model',)")
    for place, name, last in ((reward_model, "shard_batch", 3), (TextRewards, "__call__", 2)):
        found, calls = getattr(place, name), []

        def until(*arguments, found=found, calls=calls, last=last, **options):
            calls.append(None)
            if len(calls) > last:
                raise KeyboardInterrupt
            return found(*arguments, **options)

        monkeypatch.setattr(place, name, until)
        assert main(command) == 130 and len(calls) == last + 1
        monkeypatch.setattr(place, name, found)
    assert main(command) == 0
    for stage in ("reward_model", "rl"):
        assert lines(whole, stage) == lines(killed, stage)
    one, other = ((folder / "reward_model" / "normalisation.json").read_text() for folder in (whole, killed))
    assert one == other


@pytest.mark.slow
def test_all_who_ask_the_reward_model_get_the_same_answer(finished, models, tmp_path):
    folder, calls = finished
    run, (prompts, texts, ended, scores) = reopened(folder), calls[0]
    gold = {"rl.gold.reward_model": 2.0, "rl.gold.reward_model_run": str(folder)}
    other = dataclasses.replace(run, config=override(run.config, gold), workdir=epath.Path(tmp_path))
    with jax.set_mesh(run.placement.mesh):
        np.testing.assert_allclose(load_gold(other)(prompts, texts, ended), 2 * scores, atol=1e-4)
        nothing = Sequences(*[np.zeros((len(texts), 2), bool)] * 4)
        replies = Replies(texts, ended, nothing)  # tokens that are not the reward model's are not asked
        assert load_token_reward_model(run) is None
        found = score_replies(run, load_rewards(run), None, replies, prompts)
        np.testing.assert_allclose(found, scores, atol=1e-4)
        pairs = {"prompt": prompts, "response_a": texts, "response_b": texts, "prob_a": [0.5] * len(texts)}
        of_a, of_b = score_texts(run, load_reward_model(run), pairs, 8)
        np.testing.assert_array_equal(of_a, of_b)
        np.testing.assert_allclose(of_a[ended], scores[ended], atol=1e-4)


@pytest.mark.slow
def test_other_weights_are_another_config(finished, models, tmp_path, capfd):
    other = models | {"reward": shutil.copytree(models["reward"], tmp_path / "other")}
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    assert main(flags_of(other, finished[0], "--stages=rl")) == 2
    assert "reward_model.weights_hash" in capfd.readouterr().err


def test_reviser_and_teacher_may_be_folders(models, tmp_path):
    changes = {"critique.weights": models["judge"], "constitution.file": "assistant"}
    run = Run(override(quickstart_config(), changes), epath.Path(tmp_path), one_device())
    check_reviser(run)  # its tokenizer reads the template
    model, params = loaded_decoder(run, models["judge"], "float32")
    assert model.config.family == JUDGE
    expected = families.weight("model.embed_tokens.weight", (700, 32))
    np.testing.assert_array_equal(params["decoder"]["embedding"], expected)


def test_the_reward_model_begins_with_the_head_of_its_weights(models, tmp_path):
    for name, parts in (("reward", {"decoder", "kernel"}), ("headless", {"decoder"})):
        config = override(quickstart_config(), {"reward_model.weights": models[name]})
        run = Run(config, epath.Path(tmp_path), one_device())
        with jax.set_mesh(run.placement.mesh):
            begin = run.base_params("reward_model")
        assert set(begin) == parts
    head = families.weight("score.weight", (1, 32))
    with jax.set_mesh(run.placement.mesh):
        found = dataclasses.replace(run, config=override(config, {"reward_model.weights": models["reward"]}))
        np.testing.assert_array_equal(found.base_params("reward_model")["kernel"], head.T)


def test_only_what_has_ended_gets_an_end_and_what_is_cut_is_known(models):
    tokenizer = tokenizers.from_weights(models["reward"])
    reader, end = Reader(tokenizer, 40, 8, "reward_model"), tokenizer.eos_token_id
    texts, ended = ["Yes.", "Yes.", "word " * 20, "word " * 20], [True, False, True, False]
    found = reader.sequences(["Hello?"] * 4, texts, ended)
    assert [end in row[mask] for row, mask in zip(found.responses, found.response_mask, strict=True)] == [
        True, False, False, False]  # fmt: skip
    assert reader.cut(found, ended).tolist() == [False, False, True, False]
    prompt = found.prompts[0][found.prompt_mask[0]]
    assert tokenizer.decode(prompt).startswith("A conversation.<|user|>Hello?")


@pytest.mark.slow
def test_what_each_principle_gives_is_known_of_texts_too(models, tmp_path):
    config = override(quickstart_config(), {"reward_model.weights": models["headless"]})
    run = Run(config, epath.Path(tmp_path), one_device())
    params = jax.tree.map(lambda *x: np.stack(x), *(random_params(run.reward_model(), seed) for seed in (0, 1)))
    parts = np.float32([0.1, -0.2]), np.float32(0.3), np.float32(2.0), "mean", 0.0, np.float32([0.75, 0.25])
    by_principle = RewardModel(jax.device_put(params, run.placement.whole), *parts, ("kind", "brief"))
    by_principle = jax.device_put(by_principle, run.placement.whole)
    prompts, texts, ended = ["Hello?"] * 3, ["Yes.", "No, thank you.", "Perhaps"], [True, True, False]
    scorer = TextRewardModel(run, reward_reader(run), by_principle, 4, "reward_model")
    with jax.set_mesh(run.placement.mesh):
        values, metrics = scorer(prompts, texts, ended)
        expected = score(run, by_principle, scorer.reader.sequences(prompts, texts, ended), 4)
    np.testing.assert_allclose(values, expected, rtol=1e-5)
    means = 0.75 * metrics["reward/principle/kind"] + 0.25 * metrics["reward/principle/brief"]
    assert means - 2 * 0.3 == pytest.approx(values.mean(), rel=1e-5)
    assert metrics["reward/principle_share/kind"] + metrics["reward/principle_share/brief"] == pytest.approx(1)


BAD = {
    "value": (["rl.value_init=reward_model"], ["rl.value_init=reward_model", "set rl.value_init=sft"]),
    "lengths": (["reward_model.weights="], ["reward_model.max_prompt_length", "set it to 0"]),
    "context": (["reward_model.max_response_length=1000"], ["1080", "256 tokens", "lower them"]),
    "nothing": (["reward_model.weights=nowhere"], ["config.reward_model.weights", "no model at nowhere"]),
    "shape": (["reward_model.weights=shape:llama-3.2-1b"], ["reward_model.weights", "name a model"]),
    "family": (["policy.weights=", "policy.model.family=gpt"], ["policy.model.family='gpt'", "gpt2"]),
    "prompts": (["reward_model.max_prompt_length=12"], ["data.", "config.reward_model.max_prompt_length=12", "raise"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_reward_model_that_can_not_be_is_refused_in_one_line(models, tmp_path, capfd, case):
    options, said = BAD[case]
    assert main(flags_of(models, tmp_path / "run", *(f"--config.{option}" for option in options))) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rlaif_jax:")]
    assert len(error) == 1 and all(word in error[0] for word in said), error
    assert not (tmp_path / "run" / "sft" / "checkpoints").exists()


def test_a_tokenizer_that_can_not_lay_out_a_prompt_is_refused(models, tmp_path, capfd):
    broken = models | {"reward": shutil.copytree(models["headless"], tmp_path / "broken")}
    (tmp_path / "broken" / "chat_template.jinja").unlink()
    assert main(flags_of(broken, tmp_path / "run")) == 2
    error = capfd.readouterr().err
    assert "config.reward_model.weights" in error and "no chat template" in error
