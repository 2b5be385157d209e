"""A flaw planted in one of four reward models: what reaches the policy by how they are put together (quickstart).

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_flaw.py --workdir=runs/sweeps

In the flawed one, replies of at most 80 characters win over longer ones, as few of the SFT policy's replies are, and
fewer good ones. `single` is that reward model alone, `clean` one without the flaw. Neither a KL penalty nor calibration
stands between the flaw and the policy; the ground truth is logged beside the proxy, and evaluated.

Fixed before the run: seeds 0 to 4, 96 held-out prompts each, the figures below. The question is whether the share of
good replies of each arm differs from that of `single`, by its paired interval over seeds (Student t). About 70
minutes on 2 CPU cores.
"""

from ml_collections import config_dict

from configs import quickstart

MEMBERS = 4


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    sweep.base.reward_model.update(calibrate=False, flaw_pattern=".{0,80}", flawed_members=1)
    sweep.base.rl.kl.coef = 0.0
    sweep.base.rl.gold.verifier = 1.0
    arms = {"single": {}, "clean": {"reward_model.flaw_pattern": "", "reward_model.flawed_members": 0}}
    for name, how in {"mean": "mean", "worst_case": "min", "uncertainty": "uncertainty", "weights": "weights"}.items():
        arms[name] = {"reward_model.members": MEMBERS, "reward_model.combine": how}
    arms["uncertainty"]["reward_model.uncertainty_coef"] = 0.5
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2, 3, 4)
    sweep.baseline = "single"
    sweep.figures = (
        "ground_truth_good/policy",
        "ground_truth_good/sft",
        "response_length/policy",
        "win_rate/policy_vs_sft",
        "kl/policy_vs_sft",
        "reward_model_accuracy/held_out_ground_truth",
    )
    return sweep
