import dataclasses

import jax
import numpy as np
import pytest

from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import judge_pairs, plan_judging
from tests.judge.conftest import judge_with

LIMIT = 8


@pytest.mark.slow
def test_a_thousand_prompts_of_mixed_lengths_take_few_compiled_programs(config):
    rng = np.random.default_rng(0)
    texts = [("word " * int(n)).strip() for n in np.minimum(rng.lognormal(3, 1, 500), 300) + 1]
    pairs = [Pair(text, f"{text[: i % 40]} yes", f"{text[: i % 30]} no") for i, text in enumerate(texts)]
    judge = judge_with(dataclasses.replace(config, buckets=6, batch_tokens=4096, bucket_multiple=16))
    compiled = []

    def count(event, seconds, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        plan = plan_judging(judge, pairs)
        judgements = [
            judgement
            for start in range(0, len(pairs), 50)  # a shard at a time, as a job does
            for judgement in judge_pairs(
                judge, pairs[start : start + 50], plan, range(start, start + 50), lambda prompts: None
            )
        ]
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
    assert {judgement.status for judgement in judgements} == {"ok"}
    assert len({judgement.tokens_forward for judgement in judgements}) > 100
    assert 1 <= len(compiled) <= LIMIT
