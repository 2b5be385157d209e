"""What the labels' form does to the final policy of the quickstart: soft or hard, one order or both, a quarter wrong.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_labels.py --workdir=runs/sweeps

About 35 minutes on 2 CPU cores: each seed's SFT policy and labels are made once and serve every arm. The table has the
paired differences from the quickstart's own labels, seed by seed.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    arms = {
        "soft_both_orders": {},
        "hard": {"preferences.hard": True},
        "one_order": {"preferences.order": "forward"},
        "noise_0.25": {"preferences.noise_rate": 0.25},
    }
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "soft_both_orders"
    sweep.figures = (
        "ground_truth_good/rl",
        "win_rate/rl_vs_sft",
        "reward_model_accuracy/ground_truth",
        "kl/rl_vs_sft",
        "distinct_2/rl",
    )
    return sweep
