"""The quickstart's real judge: what it can tell apart, and that nothing of it survives shuffled weights."""

import dataclasses

import numpy as np
import pytest

from rlaif_jax.data import embedded
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import judge_pairs, load_judge
from rlaif_jax.models.parameters import Placement
from tests.helpers import one_device_mesh, quickstart_config

pytestmark = pytest.mark.slow


def polite_against_rude(count):
    """Pairs whose responses differ in manners alone, the polite one first."""
    demonstrations = embedded.generate(quickstart_config().data.embedded, seed=0).demonstrations
    answers = [d for d in demonstrations if d.answers]
    polite, rude = [d for d in answers if d.polite], {d.prompt.topic: d for d in answers if not d.polite}
    chosen = [d for d in polite if d.prompt.topic in rude][:count]
    return [Pair(d.prompt.text, d.reply, rude[d.prompt.topic].reply) for d in chosen]


@pytest.mark.parametrize("shuffled", [False, True])
def test_it_prefers_good_manners_unless_its_weights_are_shuffled(shuffled):
    config = dataclasses.replace(quickstart_config().judge, shuffle_weights=shuffled)
    judge = load_judge(config, 0, Placement(one_device_mesh()))
    pairs = polite_against_rude(16)
    assert len(pairs) == 16
    prob = np.array([judgement.verdict.prob_a for judgement in judge_pairs(judge, pairs)])
    if shuffled:
        assert 4 <= (prob > 0.5).sum() <= 12
    else:
        assert (prob > 0.5).sum() >= 14
        assert prob.mean() > 0.55
