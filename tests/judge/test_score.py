import dataclasses

import jax
import numpy as np
import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.judge.score import Pair, judge_pairs
from tests.helpers import full_logits
from tests.judge.conftest import LONG, PAIRS, judge_with


def score(judge, pairs):
    return judge_pairs(judge, pairs, lambda prompts: None)


def full_prompt_log_odds(judge, pair: Pair, reverse: bool) -> float:
    """One prompt as a user would write it: the whole text, one uncached forward pass."""
    first, second = (pair.response_b, pair.response_a) if reverse else (pair.response_a, pair.response_b)
    template = judge.template
    # The preamble ends with a newline, before which byte-level BPE always splits.
    texts = (template.preamble, template.suffix(pair.prompt, first, second))
    tokens = [token for text in texts for token in judge.tokenizer(text, add_special_tokens=False)["input_ids"]]
    logits = full_logits(judge.model, judge.params, np.array([tokens], np.int32))[0, -1]
    answers = [judge.tokenizer(choice, add_special_tokens=False)["input_ids"][0] for choice in template.choices]
    return float(logits[answers[0]] - logits[answers[1]])


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
    preamble = judge.prefix.key.shape[2]
    short_judge = dataclasses.replace(judge, config=dataclasses.replace(config, max_length=preamble + 60))
    identical = Pair("x", "same", "same")
    judgements = score(short_judge, [LONG, identical, PAIRS[2]])
    assert [j.status for j in judgements] == ["too_long", "identical", "ok"]
    assert [j.prob_a is None for j in judgements] == [True, True, False]

    broken = dataclasses.replace(judge, params=jax.tree.map(lambda x: x * np.nan, judge.params))
    assert score(broken, PAIRS[:1])[0].status == "not_finite"
    assert score(broken, PAIRS[:1])[0].prob_a is None


def test_shuffled_weights_give_other_labels(judge, config):
    shuffled = judge_with(config, shuffle_weights=True)
    assert shuffled.provenance["judge"] == judge.provenance["judge"] + " (shuffled)"
    assert score(shuffled, PAIRS)[0].prob_a_forward != pytest.approx(score(judge, PAIRS)[0].prob_a_forward, abs=1e-4)


def test_a_choice_of_several_tokens_is_refused(config, tmp_path):
    path = tmp_path / "long_choice.yaml"
    path.write_text(
        'instruction: ""\ncomparison: "{prompt}{response_1}{response_2}"\n'
        'choices: [" unbelievably", " good"]\nexamples: []\n'
    )
    with pytest.raises(UserError, match="unbelievably"):
        judge_with(config, template=str(path))


def test_a_preamble_that_fills_the_context_is_refused(config):
    with pytest.raises(UserError, match=r"judge\.max_length=20"):
        judge_with(config, max_length=20)
