import dataclasses

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml

from rlaif_jax.errors import UserError
from rlaif_jax.judge import store
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import answer_pairs, judge_pairs, plan_judging
from rlaif_jax.models.parameters import Placement
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import make_mesh
from tests.helpers import axes, eight_device_mesh, full_logits
from tests.judge.conftest import LONG, PAIRS, judge_with

TEMPLATE = {
    "preambles": {"base": "Which reply is better?"},
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
    prompt = {"template": str(path), "chain_of_thought": True, "shots": 0}
    return judge_with(config, prompt=prompt, rationale=rationale)


def by_hand(judge, text):
    """A greedy rationale and the choices' log-odds after it, each token by a full forward pass of everything before."""
    model = LanguageModel(judge.scorer.model.config, scan_layers=False)

    def logits(tokens):
        return full_logits(model, judge.scorer.params, np.array([tokens], np.int32))[0]

    def encode(text):
        return judge.tokenizer(text, add_special_tokens=False)["input_ids"]

    stops, verdict = judge.template.reasoning.stop, judge.template.questions[0]
    tokens, written = encode(text), []
    while len(written) < LIMIT:
        written.append(int(logits(tokens + written)[-1].argmax()))
        said = judge.tokenizer.decode(written)
        if any(stop in said for stop in stops):
            verdict = verdict.removeprefix(next((stop for stop in stops if said.endswith(stop)), ""))
            break
        if written[-1] == judge.tokenizer.eos_token_id:
            written.pop()
            break
    before = tokens + written + encode(verdict)
    scores = []
    for choice in map(encode, TEMPLATE["choices"]):
        logprobs = jax.nn.log_softmax(logits(before + choice)[len(before) - 1 : -1])
        scores.append(logprobs[np.arange(len(choice)), choice].sum())
    return judge.tokenizer.decode(written), scores[0] - scores[1]


def test_the_choice_is_scored_after_the_judges_own_rationale(reasoning):
    for pair, judgement in zip(PAIRS, judge_pairs(reasoning, PAIRS), strict=True):
        forward, reverse = (by_hand(reasoning, prompt.text) for prompt in reasoning.template.asked(pair))
        assert forward[0].startswith(judgement.rationale_forward[0])
        assert reverse[0].startswith(judgement.rationale_reversed[0])
        assert not any(stop in judgement.rationale_forward[0] for stop in TEMPLATE["reasoning"]["stop"])
        expected = 1 / (1 + np.exp(-forward[1])), 1 / (1 + np.exp(reverse[1]))
        np.testing.assert_allclose(
            (judgement.verdict.prob_a_forward, judgement.verdict.prob_a_reversed), expected, atol=1e-4
        )


def test_a_question_follows_a_stop_text_that_it_begins_with_once(reasoning, config, tmp_path):
    (said, _) = by_hand(reasoning, reasoning.template.asked(PAIRS[0])[0].text)
    stop = said[-4:]
    changes = {"verdict": stop + "So, ", "reasoning": {"cue": "Because", "stop": ["never", stop]}}
    path = tmp_path / "template.yaml"
    path.write_text(yaml.safe_dump(TEMPLATE | changes))
    prompt = {"template": str(path), "chain_of_thought": True, "shots": 0}
    judge = judge_with(config, prompt=prompt, rationale=reasoning.config.rationale)
    (judgement,) = judge_pairs(judge, PAIRS[:1])
    rationale, log_odds = by_hand(judge, judge.template.asked(PAIRS[0])[0].text)
    assert rationale.endswith(stop) and judgement.rationale_forward[0] == rationale[: rationale.index(stop)]
    assert judgement.verdict.prob_a_forward == pytest.approx(1 / (1 + np.exp(-log_odds)), abs=1e-4)


def test_a_prompt_without_room_for_a_rationale_has_no_label(reasoning):
    (judgement,) = judge_pairs(reasoning, [dataclasses.replace(LONG, prompt="word " * 2030)])
    assert (judgement.status, judgement.verdict, judgement.rationale_forward) == ("too_long", None, None)


def test_rationales_are_kept_in_the_label_file_and_replayed_with_their_own_randomness(reasoning, tmp_path):
    warm = dataclasses.replace(reasoning.reasoner.sampler.sampling, temperature=1.0)
    sampler = dataclasses.replace(reasoning.reasoner.sampler, sampling=warm)
    judge = dataclasses.replace(reasoning, reasoner=dataclasses.replace(reasoning.reasoner, sampler=sampler))
    pairs = [PAIRS[0]] * 3
    assert store.label(judge, pairs, tmp_path, "label")
    table = pq.read_table(tmp_path / "preferences.parquet")
    rationales = [text for side in ("forward", "reversed") for (text,) in table[f"rationale_{side}"].to_pylist()]
    assert len(set(rationales)) == len(rationales) == 6
    stored, fresh = store.replay(judge, table, 2)
    assert store.same_label(stored, fresh)
    assert not store.same_label(stored | {"rationale_forward": ["?"]}, fresh)


def test_a_judge_on_eight_devices_reasons_alike(reasoning):
    expected = judge_pairs(reasoning, PAIRS)
    with jax.set_mesh(eight_device_mesh()):  # of the stage that asks
        sharded = judge_pairs(judge_with(reasoning.config, Placement(make_mesh(axes(fsdp=8)))), PAIRS)
    for one, eight in zip(expected, sharded, strict=True):
        assert one.rationale_forward == eight.rationale_forward
        assert one.verdict.prob_a == pytest.approx(eight.verdict.prob_a, abs=1e-5)


def test_verdicts_do_not_depend_on_how_often_the_host_looks(reasoning):
    # Replies of different ages, in a ring of slots that goes on turning after some of them have ended.
    pairs = [Pair(f"Hello number {i}, how do I bake?", f"Bake {i} it.", f"No {i * i} way.") for i in range(8)]

    def logprobs(chunk):
        sampling = dataclasses.replace(reasoning.config.rationale.sampling, temperature=8.0)
        sampler = dataclasses.replace(reasoning.config.rationale.sampler, slots=4, refill=1, chunk=chunk)
        rationale = dataclasses.replace(reasoning.config.rationale, sampling=sampling, sampler=sampler)
        judge = judge_with(dataclasses.replace(reasoning.config, rationale=rationale))
        return answer_pairs(judge, pairs, plan_judging(judge, pairs), range(8), lambda prompts: None).logprobs

    np.testing.assert_allclose(logprobs(4), logprobs(1), atol=1e-4)


def test_several_rationales_are_averaged_and_kept(reasoning, tmp_path):
    sampling = dataclasses.replace(reasoning.config.rationale.sampling, temperature=1.0)
    rationale = dataclasses.replace(reasoning.config.rationale, samples=3, sampling=sampling)
    judge = judge_with(dataclasses.replace(reasoning.config, rationale=rationale))
    answers = answer_pairs(judge, PAIRS, plan_judging(judge, PAIRS), range(len(PAIRS)), lambda prompts: None)
    assert answers.logprobs.shape == (len(PAIRS), 2, 3, 1, 2)
    for i, judgement in enumerate(judge_pairs(judge, PAIRS)):
        assert len(set(judgement.rationale_forward)) == len(judgement.rationale_forward) == 3
        first = np.exp(answers.logprobs[i, 0, :, 0])
        np.testing.assert_allclose(judgement.verdict.prob_a_forward, (first[:, 0] / first.sum(1)).mean(), atol=1e-6)


def test_a_judge_without_room_for_its_rationales_is_refused(reasoning):
    rationale = dataclasses.replace(reasoning.config.rationale, max_new_tokens=3000)
    with pytest.raises(UserError, match=r"rationale\.max_new_tokens.*max_length=2048"):
        judge_with(dataclasses.replace(reasoning.config, rationale=rationale))
