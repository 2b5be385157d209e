"""The quickstart without policy gradients, beside PPO: DPO, IPO, SLiC, online DPO, best-of-n, an ensemble's worst case.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_preferences.py --workdir=runs/sweeps

About 45 minutes on 2 CPU cores: each seed's SFT policy and labels are made once. In the table "policy" is what an arm
trains. The paired differences are from PPO, seed by seed.
"""

from ml_collections import config_dict

from configs import quickstart
from configs.sweeps.parts import changes


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    names = ("ppo", "dpo", "ipo", "slic", "online_dpo", "best_of_n", "ensemble")
    arms = {name: changes(quickstart, arm, name) for name in names}
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "ppo"
    sweep.figures = (
        "win_rate/policy_vs_sft",
        "ground_truth_good/policy",
        "ground_truth_good/sft",
        "kl/policy_vs_sft",
        "distinct_2/policy",
        "response_length/policy",
    )
    return sweep
