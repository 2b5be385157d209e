import dataclasses

import jax
import numpy as np
import pytest
import yaml

from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import answer_pairs, judge_pairs, plan_judging, rate
from tests.helpers import full_logits
from tests.judge.conftest import LONG, PAIRS, judge_with


def full_prompt_log_odds(judge, pair: Pair, reverse: bool) -> float:
    """One prompt as a user would write it: the whole text, one uncached forward pass."""
    tokens = judge.tokenizer(judge.template.asked(pair)[reverse].text, add_special_tokens=False)["input_ids"]
    scores = []
    for choice in judge.template.choices:
        answer = judge.tokenizer(choice, add_special_tokens=False)["input_ids"]
        logits = full_logits(judge.scorer.model, judge.scorer.params, np.array([tokens + answer], np.int32))[0]
        logprobs = jax.nn.log_softmax(logits[len(tokens) - 1 : -1])
        scores.append(logprobs[np.arange(len(answer)), answer].sum())
    return float(scores[0] - scores[1])


def test_scores_equal_a_plain_forward_pass_of_each_whole_prompt(judge):
    for pair, judgement in zip(PAIRS, judge_pairs(judge, PAIRS), strict=True):
        forward, backward = (full_prompt_log_odds(judge, pair, reverse) for reverse in (False, True))
        expected = 1 / (1 + np.exp(-forward)), 1 / (1 + np.exp(backward))
        np.testing.assert_allclose(
            (judgement.verdict.prob_a_forward, judgement.verdict.prob_a_reversed), expected, atol=1e-5
        )
        np.testing.assert_allclose(judgement.verdict.prob_a, np.mean(expected), atol=1e-5)


def test_swapping_the_responses_swaps_the_label(judge):
    swapped = [Pair(pair.prompt, pair.response_b, pair.response_a) for pair in PAIRS]
    for one, other in zip(judge_pairs(judge, PAIRS), judge_pairs(judge, swapped), strict=True):
        assert one.verdict.prob_a + other.verdict.prob_a == pytest.approx(1, abs=1e-6)
        assert one.verdict.prob_a_forward == pytest.approx(1 - other.verdict.prob_a_reversed, abs=1e-6)


def test_a_label_does_not_depend_on_its_batch(judge):
    for i, alone in enumerate(judge_pairs(judge, [pair])[0] for pair in PAIRS):
        together = judge_pairs(judge, PAIRS)[i]
        assert alone.verdict.prob_a == pytest.approx(together.verdict.prob_a, abs=1e-6)
        assert alone.hash_forward == together.hash_forward


def test_what_cannot_be_scored_has_a_status_and_no_label(judge, config):
    short_judge = dataclasses.replace(judge, config=dataclasses.replace(config, max_length=len(judge.preamble) + 60))
    identical = Pair("x", "same", "same")
    judgements = judge_pairs(short_judge, [LONG, identical, PAIRS[2]])
    assert [j.status for j in judgements] == ["too_long", "identical", "ok"]
    assert [j.verdict is None for j in judgements] == [True, True, False]

    params = jax.tree.map(lambda x: x * np.nan, judge.scorer.params)
    broken = dataclasses.replace(judge, scorer=dataclasses.replace(judge.scorer, params=params))
    assert judge_pairs(broken, PAIRS[:1])[0].status == "not_finite"
    assert judge_pairs(broken, PAIRS[:1])[0].verdict is None


def test_shuffled_weights_give_other_labels(judge, config):
    shuffled = judge_with(config, shuffle_weights=True)
    assert shuffled.provenance["judge"] == judge.provenance["judge"] + " (shuffled)"
    assert judge_pairs(shuffled, PAIRS)[0].verdict.prob_a_forward != pytest.approx(
        judge_pairs(judge, PAIRS)[0].verdict.prob_a_forward, abs=1e-4
    )


def test_choices_of_several_tokens_score_as_whole_texts(config, tmp_path):
    path = tmp_path / "long_choice.yaml"
    path.write_text(
        'preambles: {base: "Which?"}\ncomparison: "{prompt} {response_1} or {response_2}"\nverdict: ": "\n'
        'choices: [" unbelievably", " good"]\nexamples: []\n'
    )
    judge = judge_with(config, prompt={"template": str(path), "shots": 0})
    assert len(judge.choices[0]) > 2
    for pair, judgement in zip(PAIRS, judge_pairs(judge, PAIRS), strict=True):
        forward = full_prompt_log_odds(judge, pair, False)
        np.testing.assert_allclose(judgement.verdict.prob_a_forward, 1 / (1 + np.exp(-forward)), atol=1e-5)


def test_pairs_of_one_prompt_read_it_together_and_score_as_apart(judge, config):
    pairs = [Pair(PAIRS[1].prompt, a, b) for a, b in (("Yes.", "No."), ("Yes.", "The old town."), ("No.", "Hm."))]
    together = dataclasses.replace(judge, config=dataclasses.replace(config, pairs_per_tree=2))
    for one, other in zip(judge_pairs(judge, pairs), judge_pairs(together, pairs), strict=True):
        assert one.verdict.prob_a == pytest.approx(other.verdict.prob_a, abs=1e-6)


def test_what_can_not_be_scored_parts_no_group_of_pairs(judge, config):
    together = dataclasses.replace(judge, config=dataclasses.replace(config, pairs_per_tree=4))
    pairs = [Pair("Hi!", "a", "b"), Pair("Ho!", "same", "same"), Pair("Hi!", "c", "d")]
    judgements = judge_pairs(together, pairs)
    assert [judgement.status for judgement in judgements] == ["ok", "identical", "ok"]
    for i in (0, 2):
        assert judgements[i].verdict.prob_a == pytest.approx(judge_pairs(judge, [pairs[i]])[0].verdict.prob_a, abs=1e-6)


METHODS = {
    "preambles": {"base": "Which?"},
    "comparison": "{prompt}: {response_1} or {response_2}?",
    "verdict": " ",
    "choices": ["good", "bad"],
    "examples": [],
    "axes": {"true": " Truer:", "short": " Shorter:"},
    "rating": {"preamble": "Rate.", "item": "{prompt}: {response}", "verdict": " ", "scores": ["1", "2", "10"]},
}


def logprob(judge, prompt, choice):
    """Of a text after a prompt, by one full forward pass."""
    tokens, answer = (judge.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, choice))
    logits = full_logits(judge.scorer.model, judge.scorer.params, np.array([tokens + answer], np.int32))[0]
    return float(jax.nn.log_softmax(logits[len(tokens) - 1 : -1])[np.arange(len(answer)), answer].sum())


def test_axes_and_ratings_equal_a_plain_forward_pass_of_each_prompt(config, tmp_path):
    path = tmp_path / "methods.yaml"
    path.write_text(yaml.safe_dump(METHODS, sort_keys=False))
    for method, questions, choices in (("axes", 2, ("good", "bad")), ("rating", 1, ("1", "2", "10"))):
        judge = judge_with(config, prompt={"template": str(path), "shots": 0, "method": method})
        plan = plan_judging(judge, PAIRS)
        answers = answer_pairs(judge, PAIRS, plan, range(len(PAIRS)), lambda prompts: None)
        for i, pair in enumerate(PAIRS):
            expected = [[logprob(judge, prompt.text, c) for c in choices] for prompt in judge.template.asked(pair)]
            np.testing.assert_allclose(
                answers.logprobs[i, :, 0], np.reshape(expected, (2, questions, len(choices))), atol=1e-4
            )
        found = judge_pairs(judge, PAIRS)[0].verdict
        assert (len(found.prob_a_axes or ()), found.rating_a is None) == ((2, True) if method == "axes" else (0, False))


def test_a_chat_scores_as_its_whole_text(config):
    judge = judge_with(config, prompt={"chat": True})
    assert "<|end|><|assistant|>The second reply is" in judge.template.asked(PAIRS[0])[0].text
    forward = full_prompt_log_odds(judge, PAIRS[0], False)
    found = judge_pairs(judge, PAIRS)[0].verdict.prob_a_forward
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-forward)), atol=1e-5)


def test_a_preamble_that_fills_the_context_is_refused(config):
    with pytest.raises(UserError, match=r"judge\.max_length=20"):
        judge_with(config, max_length=20)


def test_a_rating_is_the_same_alone_and_in_a_pair_and_nan_where_there_is_none(config, tmp_path):
    path = tmp_path / "methods.yaml"
    path.write_text(yaml.safe_dump(METHODS))
    judge = judge_with(config, prompt={"template": str(path), "shots": 0, "method": "rating"})
    pairs = [*PAIRS, LONG]
    prompts, responses = [pair.prompt for pair in pairs], [pair.response_a for pair in pairs]
    ratings = rate(judge, [*prompts, "x" * 5000], [*responses, "y"])
    for judgement, rating in zip(judge_pairs(judge, pairs), ratings, strict=False):
        assert judgement.verdict.rating_a == pytest.approx(rating, abs=1e-6)
    assert np.isnan(ratings[-1]) and np.all(np.abs(ratings[:-1]) <= 1)
