"""Three rounds of DPO on labels of the policy itself, of a judge of its size that never changes, and of a panel.

    python -m rlaif_jax.sweep --config=configs/sweeps/smollm2_rounds.py --workdir=runs/sweeps
    python -m rlaif_jax.rounds runs/sweeps --out=runs/sweeps/rounds.svg

SmolLM2 is the policy. `self` labels each round's pairs with the very weights that made them; `same_size` with those
that SFT began with; `panel` is the mean of three prompts of these. What evaluates is always the judge of `same_size`
(its training judge, then), beside the ground truth, on which nothing is trained. About 40 minutes on 2 CPU
cores a seed.
"""

from ml_collections import config_dict

from configs import smollm2
from configs.sweeps.parts import changes


def get_config(arm: str = "dpo,rounds") -> config_dict.ConfigDict:
    """The sweep, on an arm of the config."""
    sweep = config_dict.ConfigDict()
    sweep.base = smollm2.get_config(arm)
    sweep.base.policy.model.update(dtype="float32", remat="products")  # what a CPU is quickest with
    sweep.base.policy.update(max_prompt_length=56, max_response_length=32)
    sweep.base.judge.dtype = "float32"
    sweep.base.data.embedded.update(evaluation_combinations=48, evaluation_unseen_templates=16)
    sweep.base.sft.update(steps=60, batch_size=4, checkpoint_every=60)
    sweep.base.sft.optimizer.learning_rate = 2e-4  # few steps, after which most replies are like the demonstrations
    sweep.base.sampler.update(slots=48, refill=16)
    sweep.base.evaluation.update(batch_size=64, commit_every=64)
    sweep.base.label.pairs = 64
    # Hard labels, as in self-rewarding: a soft one of this judge is within 0.05 of a half, and asks for little.
    sweep.base.preferences.hard = True
    sweep.base.preference.update(steps=8, batch_size=8, checkpoint_every=8)
    sweep.base.preference.optimizer.update(learning_rate=5e-5, warmup_steps=1)
    names = {"self": "self_judge", "same_size": "", "panel": "panel"}
    sweep.arms = config_dict.ConfigDict(
        {name: changes(smollm2, arm, other) if other else {} for name, other in names.items()},
        allow_dotted_keys=True,
        sort_keys=False,
    )
    sweep.seeds = (0,)
    sweep.baseline = "same_size"
    sweep.figures = (
        "ground_truth_good/round1",
        "ground_truth_good/round3",
        "win_rate/round3_vs_sft",
        "distinct_2/round3",
        "entropy/round3",
        "kl/round3_vs_sft",
    )
    return sweep
