import dataclasses

import jax
import numpy as np
import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.judge.score import Pair, judge_pairs, plan_judging
from tests.helpers import full_logits
from tests.judge.conftest import LONG, PAIRS, judge_with


def score(judge, pairs):
    return judge_pairs(judge, pairs, plan_judging(judge, pairs), 0, lambda prompts: None)


def full_prompt_log_odds(judge, pair: Pair, reverse: bool) -> float:
    """One prompt as a user would write it: the whole text, one uncached forward pass."""
    tokens = judge.tokenizer(judge.prompts(pair)[reverse], add_special_tokens=False)["input_ids"]
    scores = []
    for choice in judge.template.choices:
        answer = judge.tokenizer(choice, add_special_tokens=False)["input_ids"]
        logits = full_logits(judge.scorer.model, judge.scorer.params, np.array([tokens + answer], np.int32))[0]
        logprobs = jax.nn.log_softmax(logits[len(tokens) - 1 : -1])
        scores.append(logprobs[np.arange(len(answer)), answer].sum())
    return float(scores[0] - scores[1])


def test_scores_equal_a_plain_forward_pass_of_each_whole_prompt(judge):
    for pair, judgement in zip(PAIRS, score(judge, PAIRS), strict=True):
        forward, backward = (full_prompt_log_odds(judge, pair, reverse) for reverse in (False, True))
        expected = 1 / (1 + np.exp(-forward)), 1 / (1 + np.exp(backward))
        np.testing.assert_allclose((judgement.prob_a_forward, judgement.prob_a_reversed), expected, atol=1e-5)
        np.testing.assert_allclose(judgement.prob_a, np.mean(expected), atol=1e-5)


def test_swapping_the_responses_swaps_the_label(judge):
    swapped = [Pair(pair.prompt, pair.response_b, pair.response_a) for pair in PAIRS]
    for one, other in zip(score(judge, PAIRS), score(judge, swapped), strict=True):
        assert one.prob_a + other.prob_a == pytest.approx(1, abs=1e-6)
        assert one.prob_a_forward == pytest.approx(1 - other.prob_a_reversed, abs=1e-6)


def test_a_label_does_not_depend_on_its_batch(judge):
    for i, alone in enumerate(score(judge, [pair])[0] for pair in PAIRS):
        together = score(judge, PAIRS)[i]
        assert alone.prob_a == pytest.approx(together.prob_a, abs=1e-6)
        assert alone.hash_forward == together.hash_forward


def test_what_cannot_be_scored_has_a_status_and_no_label(judge, config):
    short_judge = dataclasses.replace(judge, config=dataclasses.replace(config, max_length=len(judge.preamble) + 60))
    identical = Pair("x", "same", "same")
    judgements = score(short_judge, [LONG, identical, PAIRS[2]])
    assert [j.status for j in judgements] == ["too_long", "identical", "ok"]
    assert [j.prob_a is None for j in judgements] == [True, True, False]

    params = jax.tree.map(lambda x: x * np.nan, judge.scorer.params)
    broken = dataclasses.replace(judge, scorer=dataclasses.replace(judge.scorer, params=params))
    assert score(broken, PAIRS[:1])[0].status == "not_finite"
    assert score(broken, PAIRS[:1])[0].prob_a is None


def test_shuffled_weights_give_other_labels(judge, config):
    shuffled = judge_with(config, shuffle_weights=True)
    assert shuffled.provenance["judge"] == judge.provenance["judge"] + " (shuffled)"
    assert score(shuffled, PAIRS)[0].prob_a_forward != pytest.approx(score(judge, PAIRS)[0].prob_a_forward, abs=1e-4)


def test_choices_of_several_tokens_score_as_whole_texts(config, tmp_path):
    path = tmp_path / "long_choice.yaml"
    path.write_text(
        'instruction: "Which?"\ncomparison: "{prompt} {response_1} or {response_2}"\nverdict: ": "\n'
        'choices: [" unbelievably", " good"]\nexamples: []\n'
    )
    judge = judge_with(config, template=str(path))
    assert len(judge.choices[0]) > 2
    for pair, judgement in zip(PAIRS, score(judge, PAIRS), strict=True):
        forward = full_prompt_log_odds(judge, pair, False)
        np.testing.assert_allclose(judgement.prob_a_forward, 1 / (1 + np.exp(-forward)), atol=1e-5)


def test_pairs_of_one_prompt_read_it_together_and_score_as_apart(judge, config):
    pairs = [Pair(PAIRS[1].prompt, a, b) for a, b in (("Yes.", "No."), ("Yes.", "The old town."), ("No.", "Hm."))]
    together = dataclasses.replace(judge, config=dataclasses.replace(config, pairs_per_tree=2))
    for one, other in zip(score(judge, pairs), score(together, pairs), strict=True):
        assert one.prob_a == pytest.approx(other.prob_a, abs=1e-6)


def test_a_preamble_that_fills_the_context_is_refused(config):
    with pytest.raises(UserError, match=r"judge\.max_length=20"):
        judge_with(config, max_length=20)
