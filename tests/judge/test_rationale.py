import dataclasses

import jax
import numpy as np
import pytest
import yaml

from rlaif_jax.judge import store
from rlaif_jax.judge.score import judge_pairs, plan_judging
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import MeshConfig, make_mesh
from tests.helpers import full_logits
from tests.judge.conftest import LONG, PAIRS, judge_with

TEMPLATE = {
    "instruction": "Which reply is better?",
    "comparison": "Q: {prompt}\n1: {response_1}\n2: {response_2}\n",
    "verdict": "\nSo, ",
    "reasoning": {"cue": "Because", "stop": ["oo", "?"]},
    "choices": ["first", "second one"],
    "examples": [],
}
LIMIT = 10


@pytest.fixture(scope="module")
def reasoning(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("reasoning") / "template.yaml"
    path.write_text(yaml.safe_dump(TEMPLATE))
    rationale = dataclasses.replace(config.rationale, max_new_tokens=LIMIT)
    return judge_with(config, template=str(path), chain_of_thought=True, rationale=rationale)


def score(judge, pairs, first_pair=0):
    return judge_pairs(judge, pairs, plan_judging(judge, pairs), first_pair, lambda prompts: None)


def by_hand(judge, text):
    """A greedy rationale and the choices' log-odds after it, each token by a full forward pass of everything before."""
    model = LanguageModel(judge.scorer.model.config, scan_layers=False)

    def logits(tokens):
        return full_logits(model, judge.scorer.params, np.array([tokens], np.int32))[0]

    def encode(text):
        return judge.tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens, written = encode(text), []
    while len(written) < LIMIT:
        written.append(int(logits(tokens + written)[-1].argmax()))
        said = judge.tokenizer.decode(written)
        if any(stop in said for stop in TEMPLATE["reasoning"]["stop"]):
            break
        if written[-1] == judge.tokenizer.eos_token_id:
            written.pop()
            break
    before = tokens + written + encode(TEMPLATE["verdict"])
    scores = []
    for choice in map(encode, TEMPLATE["choices"]):
        logprobs = jax.nn.log_softmax(logits(before + choice)[len(before) - 1 : -1])
        scores.append(logprobs[np.arange(len(choice)), choice].sum())
    return judge.tokenizer.decode(written), scores[0] - scores[1]


def test_the_choice_is_scored_after_the_judges_own_rationale(reasoning):
    for pair, judgement in zip(PAIRS, score(reasoning, PAIRS), strict=True):
        forward, reverse = (by_hand(reasoning, text) for text in reasoning.prompts(pair))
        assert forward[0].startswith(judgement.rationale_forward)
        assert reverse[0].startswith(judgement.rationale_reversed)
        assert not any(stop in judgement.rationale_forward for stop in TEMPLATE["reasoning"]["stop"])
        expected = 1 / (1 + np.exp(-forward[1])), 1 / (1 + np.exp(reverse[1]))
        np.testing.assert_allclose((judgement.prob_a_forward, judgement.prob_a_reversed), expected, atol=1e-4)


def test_a_prompt_without_room_for_a_rationale_has_no_label(reasoning):
    (judgement,) = score(reasoning, [dataclasses.replace(LONG, prompt="word " * 2030)])
    assert (judgement.status, judgement.prob_a, judgement.rationale_forward) == ("too_long", None, None)


def test_rationales_are_kept_in_the_label_file_and_replayed_with_their_own_randomness(reasoning, tmp_path):
    warm = dataclasses.replace(reasoning.reasoner.sampler.sampling, temperature=1.0)
    sampler = dataclasses.replace(reasoning.reasoner.sampler, sampling=warm)
    judge = dataclasses.replace(reasoning, reasoner=dataclasses.replace(reasoning.reasoner, sampler=sampler))
    pairs = [PAIRS[0]] * 3
    table = store.label(judge, pairs, tmp_path, "label")
    rationales = table["rationale_forward"].to_pylist() + table["rationale_reversed"].to_pylist()
    assert len(set(rationales)) == len(rationales)
    stored, fresh = store.replay(judge, table, 2)
    assert store.same_label(stored, fresh)
    assert not store.same_label(stored | {"rationale_forward": "?"}, fresh)


def test_a_judge_on_eight_devices_reasons_alike(reasoning):
    expected = score(reasoning, PAIRS)
    mesh = make_mesh(MeshConfig(data=1, fsdp=8, tensor=1, replicated=()))
    with jax.set_mesh(mesh):
        sharded = score(judge_with(reasoning.config, Placement(mesh)), PAIRS)
    for one, eight in zip(expected, sharded, strict=True):
        assert one.rationale_forward == eight.rationale_forward
        assert one.prob_a == pytest.approx(eight.prob_a, abs=1e-5)
