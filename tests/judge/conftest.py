import dataclasses

import pytest

from rlaif_jax.judge.prompts import Pair
from rlaif_jax.judge.score import load_judge
from rlaif_jax.models.parameters import Placement
from tests.helpers import one_device_mesh, quickstart_config
from tests.tiny_judge import write_judge

PAIRS = [
    Pair("How do I clean my oven?", "Scrub it.", "Get lost."),
    Pair("What should I see in Oslo? It is for tomorrow.", "The museums in Oslo, and the old town on foot.", "No."),
    Pair("Hi!", "a", "b"),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")
    return dataclasses.replace(
        quickstart_config().judge, weights=path, batch_tokens=512, buckets=2, bucket_multiple=8, shard_size=2
    )


LONG = Pair("x", "word " * 400, "b")


def judge_with(config, placement=None, prompt=None, **changes):
    """A judge of `config` with changes, those of its prompt in a mapping of their own."""
    changes["prompt"] = dataclasses.replace(config.prompt, **(prompt or {}))
    return load_judge(dataclasses.replace(config, **changes), 0, placement or Placement(one_device_mesh()))


@pytest.fixture(scope="module")
def judge(config):
    return judge_with(config)
