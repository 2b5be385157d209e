"""How far the KL penalty holds the quickstart's policy back: three coefficients, three seeds.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_kl.py --workdir=runs/sweeps

Each seed's SFT policy, labels and reward model are made once and serve every arm: 27 stages instead of 45. Arms of the
quickstart are arms here: `quickstart_kl.py:smoke` shows that everything runs.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)  # what every cell starts from; --config.base.FIELD=VALUE overrides it
    arms = {f"kl_{kl}": {"rl.kl.coef": kl} for kl in (0.02, 0.1, 0.5)}  # name -> fields of base, by their path
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "kl_0.1"  # the quickstart's own
    sweep.figures = ("ground_truth_good/rl", "win_rate/rl_vs_sft", "kl/rl_vs_sft", "distinct_2/rl")
    return sweep
