"""Harmless replies in a dialogue (HH-RLHF), the paper's third task.

    python -m rlaif_jax.main --config=configs/hh_harmless.py:rlaif --workdir=runs/hh_harmless  # one GPU node or more
    python -m rlaif_jax.main --config=configs/hh_harmless.py:smoke --workdir=runs/hh_harmless_smoke  # a CPU, minutes

Arms: see configs/tasks.py. `smoke` reads hh_harmless_{train,test}.jsonl.gz in `--config.data.root` (default: data).
"""

from configs.parts import source
from configs.tasks import task

_PAIR = dict(prompt="prompt", response_a="chosen", response_b="rejected")
# Whole dialogues: what both share is the prompt.
_HUB_PAIR = dict(response_a="chosen", response_b="rejected")


def get_config(arm: str = "rlaif"):
    """The config of an arm."""
    local = dict(
        demonstrations=source("jsonl", "hh_harmless_train.jsonl.gz", prompt="prompt", reply="chosen"),
        train_prompts=source("jsonl", "hh_harmless_train.jsonl.gz", prompt="prompt"),
        evaluation_prompts=source("jsonl", "hh_harmless_test.jsonl.gz", prompt="prompt"),
        comparisons=source("jsonl", "hh_harmless_train.jsonl.gz", **_PAIR),
        evaluation_comparisons=source("jsonl", "hh_harmless_test.jsonl.gz", **_PAIR),
    )
    path = "Anthropic/hh-rlhf/harmless-base"
    hub = dict(
        demonstrations=source("datasets", path, split="train", reply="chosen", **_HUB_PAIR),
        train_prompts=source("datasets", path, split="train", **_HUB_PAIR),
        evaluation_prompts=source("datasets", path, split="test", limit=1000, **_HUB_PAIR),
        comparisons=source("datasets", path, split="train", **_HUB_PAIR),
        evaluation_comparisons=source("datasets", path, split="test", limit=1000, **_HUB_PAIR),
    )
    config = task(arm, "dialogue", "harmless", local, hub, reward_model_batch_size=32)
    config.evaluation.harmless_prompt.update(template="harmless", chat=config.judge.prompt.get_ref("chat"))
    return config
