"""One-sentence summaries of scientific papers (SciTLDR): an expert domain with its own rubric.

    python -m rlaif_jax.main --config=configs/scitldr.py:rlaif --workdir=runs/scitldr  # one GPU or more
    python -m rlaif_jax.main --config=configs/scitldr.py:smoke --workdir=runs/scitldr_smoke  # a CPU, minutes

Arms: see configs/tasks.py; there are no human comparisons, so no rlhf. `smoke` reads scitldr.jsonl.gz in
`--config.data.root` (default: data).
"""

from configs.parts import source
from configs.tasks import task

_PAPER = dict(title="title", source="source")


def get_config(arm: str = "rlaif"):
    """The config of an arm."""
    local = dict(
        demonstrations=source("jsonl", "scitldr.jsonl.gz", split="train", reply="summaries", **_PAPER),
        train_prompts=source("jsonl", "scitldr.jsonl.gz", split="train", **_PAPER),
        evaluation_prompts=source("jsonl", "scitldr.jsonl.gz", split="test", **_PAPER),
    )
    hub = dict(
        demonstrations=source("datasets", "allenai/scitldr", "Abstract", "train", source="source", reply="target"),
        train_prompts=source("datasets", "allenai/scitldr", "Abstract", "train", source="source"),
        evaluation_prompts=source("datasets", "allenai/scitldr", "Abstract", "test", source="source"),
    )
    config = task(arm, "abstract", "expert_summary", local, hub, reward_model_batch_size=32)
    if "smoke" not in arm.split(","):  # 2,000 papers, not 100,000 posts
        config.sft.steps, config.label.pairs, config.reward_model.steps, config.rl.steps = 50, 4_000, 375, 500
        config.reward_model.validation_pairs = 256
    return config
