"""The quickstart by other algorithms: PPO, REINFORCE, RLOO, GRPO and direct RLAIF from the same SFT policies.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_algorithms.py --workdir=runs/sweeps

About 50 minutes on 2 CPU cores: each seed's SFT policy, labels and reward model are made once; direct RLAIF needs
neither labels nor reward model. `lagged` is PPO on rollouts of the policy one iteration before, with truncated
importance weights. The table has the paired differences from PPO, seed by seed.
"""

from ml_collections import config_dict

from configs import quickstart
from configs.sweeps.parts import changes


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    arms = {name: changes(quickstart, arm, name) for name in ("ppo", "reinforce", "rloo", "grpo", "drlaif")}
    arms["lagged"] = {"rl.rollout_lag": 1, "rl.importance_cap": 2.0}
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "ppo"
    sweep.figures = (
        "win_rate/rl_vs_sft",
        "ground_truth_good/rl",
        "ground_truth_good/sft",
        "kl/rl_vs_sft",
        "distinct_2/rl",
        "response_length/rl",
    )
    return sweep
