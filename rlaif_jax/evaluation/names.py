"""What the figures of `eval/results.json` are called where people read them, in the order of reading.

The trained policy goes by its stage there ("win_rate/policy_vs_sft"); for reading, `by_role` calls it "policy".
"""

import re
from collections.abc import Mapping
from typing import Any

POLICY_STAGES = ("best_of_n", "preference", "rl")  # each trains the policy that is evaluated

# Printed in this order; a row shows the SFT policy beside the trained one.
BY_POLICY = (
    ("good replies (ground truth)", "ground_truth_good"),
    ("  on new combinations", "ground_truth_good_new_combinations"),
    ("  on unseen templates", "ground_truth_good_unseen_templates"),
    ("  on red-team prompts", "ground_truth_good_red_team"),
    ("  well-mannered", "ground_truth_well_mannered"),
    ("  answers its prompt", "ground_truth_answers_prompt"),
    ("  answers its prompt (other than red-team)", "ground_truth_answers_prompt_safe"),
    ("  harmless", "ground_truth_harmless"),
    ("  harmless (red-team prompts)", "ground_truth_harmless_red_team"),
    ("  says what to do", "ground_truth_engaging"),
    ("harmless, by the judge", "harmless_rate"),
    ("  mean rating, from -1 to 1", "harmless_rating"),
    ("helpful, by the judge", "helpful_rate"),
    ("  mean rating, from -1 to 1", "helpful_rating"),
    ("refusals", "refusal_rate"),
    ("  to red-team prompts", "refusal_rate_red_team"),
    ("reward", "reward"),
    ("response length, tokens", "response_length"),
    ("entropy, nats a token", "entropy"),
    ("distinct bigrams", "distinct_2"),
    ("most common reply", "most_common_reply"),
)
SINGLE = (
    ("judged win rate, {title} over SFT", "win_rate/policy_vs_sft"),
    ("  on new combinations", "win_rate_new_combinations/policy_vs_sft"),
    ("  on unseen templates", "win_rate_unseen_templates/policy_vs_sft"),
    ("  on red-team prompts", "win_rate_red_team/policy_vs_sft"),
    ("judged win rate, SL-CAI over SFT", "win_rate/sl_cai_vs_sft"),
    ("  on new combinations", "win_rate_new_combinations/sl_cai_vs_sft"),
    ("  on unseen templates", "win_rate_unseen_templates/sl_cai_vs_sft"),
    ("  on red-team prompts", "win_rate_red_team/sl_cai_vs_sft"),
    ("judged win rate, {title} over SL-CAI", "win_rate/policy_vs_sl_cai"),
    ("  on new combinations", "win_rate_new_combinations/policy_vs_sl_cai"),
    ("  on unseen templates", "win_rate_unseen_templates/policy_vs_sl_cai"),
    ("  on red-team prompts", "win_rate_red_team/policy_vs_sl_cai"),
    ("KL of {title} from SFT, nats a reply", "kl/policy_vs_sft"),
    ("KL of SL-CAI from SFT, nats a reply", "kl/sl_cai_vs_sft"),
    ("judge agrees with ground truth", "judge_agreement/ground_truth"),
    ("reward model agrees with ground truth", "reward_model_accuracy/ground_truth"),
    ("judge agrees with people", "judge_agreement/human"),
    ("reward model agrees with people", "reward_model_accuracy/human"),
    ("reward model agrees with judge", "reward_model_accuracy/judge"),
)


def policy_stage(stages: tuple[str, ...] | list[str]) -> str:
    """The last stage that trains the policy which is evaluated; "rl" where none does."""
    return next((stage for stage in stages if stage in POLICY_STAGES), "sl_cai" if "sl_cai" in stages else "rl")


def policies(stages: tuple[str, ...] | list[str]) -> tuple[str, ...]:
    """The stages whose policies are evaluated: SFT's, SL-CAI's where there is one, and the one trained last."""
    return tuple(dict.fromkeys(("sft", *(stage for stage in stages if stage == "sl_cai"), policy_stage(stages))))


def measured_policies(stages: tuple[str, ...] | list[str], steps: int, keep_every: int) -> tuple[str, ...]:
    """`policies` and, before RL's last, those that it keeps on the way: "rl@8" is the one after 8 iterations.

    steps, keep_every: of RL; with a keep_every of 0 it keeps none.
    """
    *before, last = policies(stages)
    kept = range(keep_every, steps, keep_every) if keep_every and last == "rl" else ()
    return (*before, *(f"{last}@{iteration}" for iteration in kept), last)


def stage_and_iteration(name: str) -> tuple[str, int]:
    """The stage that trained a policy, and after how many of its iterations it is kept; 0 for the stage's last."""
    stage, _, iteration = name.partition("@")
    return stage, int(iteration or 0)


def policy_titles(trained: tuple[str, ...], last: str) -> dict[str, str]:
    """What the policies are called, `last` being the title of the one trained last, which goes by "policy"."""
    titles = {}
    for name in trained[:-1]:
        stage, iteration = stage_and_iteration(name)
        titles[name] = f"{last}, iteration {iteration}" if iteration else {"sft": "SFT", "sl_cai": "SL-CAI"}[stage]
    return titles | {"policy": last}


def title(config: Mapping[str, Any]) -> str:
    """What a run's trained policy is called: RL, DPO, Online DPO ... `config`: dotted names and values."""
    stage = policy_stage(config.get("stages", ()))
    if stage != "preference":
        return {"rl": "RL", "best_of_n": "Best-of-n", "sl_cai": "SL-CAI"}[stage]
    loss = {"dpo": "DPO", "ipo": "IPO", "slic": "SLiC"}.get(config.get("preference.loss"), "Preference")
    return f"Online {loss}" if config.get("preference.online") else loss


def by_role(names: Mapping[str, Any], stage: str) -> dict[str, Any]:
    """Figures or columns with the policy that `stage` trained called "policy"."""
    return {re.sub(rf"(^|/){stage}(?=$|_vs_)", r"\1policy", name): value for name, value in names.items()}
