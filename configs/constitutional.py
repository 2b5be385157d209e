"""Constitutional AI from red-team prompts to RL (Bai et al., arXiv 2212.08073): SFT, critique and revision, SFT on the
revisions, labels under principles, a reward model, RL, evaluation. docs/constitution_sl.md says what each step keeps.

    python -m rlaif_jax.main --config=configs/constitutional.py --workdir=runs/constitutional  # one GPU
    python -m rlaif_jax.main --config=configs/constitutional.py:smoke --workdir=runs/cai_smoke  # a CPU, minutes
    python -m rlaif_jax.main --config=configs/constitutional.py:hh,smoke --workdir=runs/cai_hh --config.data.root=DIR

Arms, one or more words with commas between them: default, SmolLM2-135M-Instruct as policy, reviser and judge on the
embedded corpus with its red-team requests; hh, on prompts of HH-RLHF instead, at the scale of configs/tasks.py; cot,
the judge writes a rationale before it answers, and what is learned of its labels is held between 40 and 60 % (section
4.1); smoke, a small policy from scratch on a fraction of either. hh reads hh_prompts_{harmless,helpful}.jsonl.gz (the
first turns of harmless-base and helpful-base), hh_helpful_train.jsonl.gz and hh_{harmless,helpful}_test.jsonl.gz in
`config.data.root`.
"""

from ml_collections import config_dict

from configs import quickstart, smollm2
from configs.parts import constitutional, optimizer, source
from configs.tasks import task

ARMS = ("default", "hh", "cot", "smoke")


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The config of an arm."""
    words = arm.split(",")
    if unknown := [word for word in words if word not in ARMS]:
        raise ValueError(f"unknown arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    config = _hh("smoke" in words) if "hh" in words else _embedded("smoke" in words)
    if "cot" in words:
        config.judge.prompt.chain_of_thought = True
        config.preferences.update(hard=False, clamp=0.1)  # from 40 to 60 %, as in the paper
    return config


def _embedded(smoke: bool) -> config_dict.ConfigDict:
    if smoke:
        return quickstart.get_config("constitutional,smoke")
    config = smollm2.get_config("constitutional")
    config.critique.update(prompts=512, dtype="bfloat16", commit_every=128)
    config.critique.sampler.update(slots=128, refill=32)
    config.sl_cai.optimizer.learning_rate = config.sft.optimizer.learning_rate
    return config


def _hh(smoke: bool) -> config_dict.ConfigDict:
    sources = dict(
        demonstrations=source("jsonl", "hh_helpful_train.jsonl.gz", prompt="prompt", reply="chosen"),
        train_prompts=source("jsonl", "hh_prompts_*.jsonl.gz", prompt="prompt"),
        red_team_prompts=source("jsonl", "hh_prompts_harmless.jsonl.gz", prompt="prompt"),
        evaluation_prompts=source("jsonl", "hh_*_test.jsonl.gz", prompt="prompt", group="subset"),
        # People say what is helpful, a constitution what is harmless (Bai et al., section 4.1).
        comparisons=source(
            "jsonl", "hh_helpful_train.jsonl.gz", prompt="prompt", response_a="chosen", response_b="rejected"
        ),
        evaluation_comparisons=source(),
    )
    config = task("smoke" if smoke else "rlaif", "dialogue", "harmless", sources, sources, reward_model_batch_size=32)
    constitutional(config)
    config.label.update(source="both", audit_pairs=0)
    config.constitution.file = "assistant"
    config.judge.prompt.template = "constitution"
    config.label.principles = "draw"
    config.critique.update(template="dialogue", shots=3)
    for kind in ("harmless", "helpful"):  # the axes of the frontier
        config.evaluation[f"{kind}_prompt"].update(template=kind, chat=config.judge.prompt.get_ref("chat"))
    config.evaluation.red_team_groups = ("harmless-base/test",)
    config.evaluation.rated_revisions = 4 if smoke else 500
    if smoke:
        # A quarter of the replies and three demonstrations to each fill a batch of as many rows, which 8 devices need.
        config.sft.packing = False
        config.critique.update(prompts=8, rounds=1, max_new_tokens=64, max_failure_rate=0.75)
        config.sl_cai.update(steps=4, checkpoint_every=2, helpful_share=0.75)
        return config
    # As many labels of the judge as there are comparisons of people, 3,491 less those that do not fit; three epochs.
    config.label.pairs = 3_400
    config.reward_model.steps = 3 * (2 * 3_400 - config.reward_model.validation_pairs) // 32
    # Four revisions of every prompt, as in the paper, at temperature 1. Of the 3,491 demonstrations about 2,750 fit the
    # policy: a quarter of the examples where no more than 2,000 prompts are revised (a quarter in the paper, too).
    config.critique.update(prompts=2_000, rounds=4, max_new_tokens=192, dtype="bfloat16", commit_every=1024)
    config.critique.revision_sampling.temperature = 1.0
    config.critique.sampler.update(slots=128, refill=16, chunk=16, prompt_buckets=4, bucket_multiple=64)
    # About two epochs: of these shorter examples a row takes six or so.
    config.sl_cai.update(steps=60, batch_size=64, max_skipped_updates=10, checkpoint_every=20, helpful_share=0.25)
    config.sl_cai.optimizer = optimizer(1e-5, schedule="constant", warmup_steps=0, weight_decay=0.0)
    return config
