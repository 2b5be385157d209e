"""First replies against revisions, and SL-CAI against RL-CAI, by the ground truth of the embedded red-team requests.

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_constitutional.py --workdir=runs/sweeps

`sl_cai` is evaluated after SFT on the revisions; `rl_cai` goes on from it with labels under principles, a reward model
and PPO; `rl_cai_soft` learns the judge's probabilities, not which side they are on. About half an hour on 2 CPU cores.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config(arm: str = "constitutional") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    arms = {"sl_cai": {"stages": ("sft", "critique", "sl_cai", "eval")}, "rl_cai": {}}
    arms |= {"rl_cai_soft": {"preferences.hard": False}}
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "sl_cai"
    revised = ("first", "revision_1", "revision_2")
    sweep.figures = (
        *(f"critique_{grade}/{reply}" for grade in ("good", "harmless") for reply in revised),
        *(f"ground_truth_good/{policy}" for policy in ("sft", "policy")),
        *(f"ground_truth_good_red_team/{policy}" for policy in ("sft", "policy")),
        *(f"ground_truth_harmless_red_team/{policy}" for policy in ("sft", "policy")),
        *(f"ground_truth_answers_prompt_safe/{policy}" for policy in ("sft", "policy")),
        "refusal_rate/policy",
        "win_rate/policy_vs_sft",
        "kl/policy_vs_sft",
    )
    return sweep
