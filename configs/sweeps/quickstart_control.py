"""The quickstart beside its negative control, a judge whose weights are shuffled, over three seeds.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_control.py --workdir=runs/sweeps

About 30 minutes on 2 CPU cores. What the labels owe to the judge shows in the difference: without a judge that knows
something, nothing improves.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep; `arm` is the quickstart's."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    sweep.arms = config_dict.ConfigDict(
        {"judge": {}, "shuffled_judge": {"judge.shuffle_weights": True}}, allow_dotted_keys=True, sort_keys=False
    )
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "shuffled_judge"
    sweep.figures = (
        "win_rate/rl_vs_sft",
        "judge_agreement/ground_truth",
        "ground_truth_good/sft",
        "ground_truth_good/rl",
        "distinct_2/sft",
        "distinct_2/rl",
        "kl/rl_vs_sft",
    )
    return sweep
