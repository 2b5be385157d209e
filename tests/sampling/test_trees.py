import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.sampling.buckets import length_buckets
from rlaif_jax.sampling.trees import Scorer, grow, score_trees, sum_by_choice
from tests.helpers import eight_devices, full_logits, one_device, random_params, tiny

MODEL = LanguageModel(tiny())
PARAMS = random_params(MODEL)
CHOICES = [(5,), (6, 7), (6, 8, 9)]
PROMPTS = st.lists(st.lists(st.integers(2, 4), min_size=1, max_size=6), min_size=1, max_size=4)


def rebuilt(tree, index):
    """The tokens that the one at `index` sees, itself included."""
    return [tree.tokens[i] for i in range(index + 1) if tree.ends[i] > index]


@settings(deadline=None)
@given(PROMPTS)
def test_every_question_sees_its_own_prompt_and_choice_and_nothing_else(prompts):
    tree = grow(prompts, CHOICES)
    expected = [
        ([*prompt, *choice[:i]], choice[i]) for prompt in prompts for choice in CHOICES for i in range(len(choice))
    ]
    found = [(rebuilt(tree, after), token) for after, token in zip(tree.asked_after, tree.asked_token, strict=True)]
    assert found == expected
    for i, position in enumerate(tree.positions):
        assert position == len(rebuilt(tree, i)) - 1


@given(PROMPTS)
def test_no_beginning_is_laid_out_twice(prompts):
    tree = grow(prompts, CHOICES)
    beginnings = [tuple(rebuilt(tree, i)) for i in range(len(tree))]
    assert len(set(beginnings)) == len(beginnings)


def direct(prompt, choice):
    tokens = np.array([[*prompt, *choice]], np.int32)
    logprobs = jax.nn.log_softmax(full_logits(MODEL, PARAMS, tokens)[0])
    return sum(logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(choice))


@pytest.mark.parametrize("placement", [one_device, eight_devices])
@pytest.mark.parametrize("prefixed", [False, True])
def test_scores_equal_those_of_each_text_by_itself(placement, prefixed):
    rng = np.random.default_rng(0)
    trunks = [rng.integers(2, 64, rng.integers(1, 9)).tolist() for _ in range(5)]
    groups = [[trunk + rng.integers(2, 64, 3).tolist() for _ in range(rng.integers(1, 4))] for trunk in trunks]
    trees = [grow(group, CHOICES) for group in groups]
    shared, prefix = [11, 12, 13] if prefixed else [], None
    with jax.set_mesh(placement().mesh):
        if prefixed:
            tokens = np.array([shared], np.int32)
            _, prefix = MODEL.apply({"params": PARAMS}, tokens, np.ones_like(tokens), keep_keys=True)
        scorer = Scorer(MODEL, PARAMS, placement(), prefix, batch_tokens=64)
        buckets = length_buckets([len(tree) for tree in trees], 2, 4)
        asked = max(len(tree.asked_token) for tree in trees)
        scores = dict(score_trees(scorer, trees, buckets, asked))
    assert sorted(scores) == list(range(5))
    for i, group in enumerate(groups):
        found = sum_by_choice(scores[i], len(group), CHOICES)
        expected = [[direct(shared + prompt, choice) for choice in CHOICES] for prompt in group]
        np.testing.assert_allclose(found, expected, atol=1e-4)
