"""Summarisation of Reddit posts (TL;DR), the paper's first task.

    python -m rlaif_jax.main --config=configs/tldr.py:rlaif --workdir=runs/tldr          # one GPU node or more
    python -m rlaif_jax.main --config=configs/tldr.py:smoke --workdir=runs/tldr_smoke  # a CPU, minutes

Arms: see configs/tasks.py. `smoke` reads tldr_posts_{train,test}.jsonl.gz and tldr_comparisons_human.jsonl.gz in
`--config.data.root` (default: data).
"""

from configs.parts import source
from configs.tasks import task

_POST = dict(subreddit="subreddit", title="title", post="post")
_PAIR = _POST | dict(response_a="summary_0", response_b="summary_1", choice="choice", group="subreddit")
_PAIR |= dict(human_confidence="confidence", generator_a="policy_0", generator_b="policy_1")
_HUB_PAIR = dict(subreddit="info.subreddit", title="info.title", post="info.post", choice="choice")
_HUB_PAIR |= dict(response_a="summaries.0.text", response_b="summaries.1.text", group="info.subreddit")
_HUB_PAIR |= dict(
    human_confidence="extra.confidence", generator_a="summaries.0.policy", generator_b="summaries.1.policy"
)


def get_config(arm: str = "rlaif"):
    """The config of an arm."""
    human = "tldr_comparisons_human.jsonl.gz"
    local = dict(
        demonstrations=source("jsonl", "tldr_posts_train.jsonl.gz", reply="summary", **_POST),
        train_prompts=source("jsonl", "tldr_posts_train.jsonl.gz", **_POST),
        evaluation_prompts=source("jsonl", "tldr_posts_test.jsonl.gz", **_POST),
        comparisons=source("jsonl", human, split="valid1", **_PAIR),
        evaluation_comparisons=source("jsonl", human, split="valid2", **_PAIR),
    )
    pairs = "openai/summarize_from_feedback"
    hub = dict(
        demonstrations=source("datasets", "trl-lib/tldr", split="train", prompt="prompt", reply="completion"),
        train_prompts=source("datasets", "trl-lib/tldr", split="train", prompt="prompt"),
        evaluation_prompts=source("datasets", "trl-lib/tldr", split="validation", limit=1000, prompt="prompt"),
        comparisons=source("datasets", pairs, "comparisons", "train", **_HUB_PAIR),
        evaluation_comparisons=source("datasets", pairs, "comparisons", "validation", limit=3000, **_HUB_PAIR),
    )
    return task(arm, "tldr", "summary", local, hub, reward_model_batch_size=128)
