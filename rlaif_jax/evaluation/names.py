"""What the figures of `eval/results.json` are called where people read them, in the order of reading."""

# Printed in this order; a row shows the SFT policy beside the RL policy.
BY_POLICY = (
    ("good replies (ground truth)", "ground_truth_good"),
    ("  on new combinations", "ground_truth_good_new_combinations"),
    ("  on unseen templates", "ground_truth_good_unseen_templates"),
    ("  well-mannered", "ground_truth_well_mannered"),
    ("  answers its prompt", "ground_truth_answers_prompt"),
    ("reward", "reward"),
    ("response length, tokens", "response_length"),
    ("distinct bigrams", "distinct_2"),
    ("most common reply", "most_common_reply"),
)
SINGLE = (
    ("judged win rate, RL over SFT", "win_rate/rl_vs_sft"),
    ("  on new combinations", "win_rate_new_combinations/rl_vs_sft"),
    ("  on unseen templates", "win_rate_unseen_templates/rl_vs_sft"),
    ("KL of RL from SFT, nats a reply", "kl/rl_vs_sft"),
    ("judge agrees with ground truth", "judge_agreement/ground_truth"),
    ("reward model agrees with ground truth", "reward_model_accuracy/ground_truth"),
    ("judge agrees with people", "judge_agreement/human"),
    ("reward model agrees with people", "reward_model_accuracy/human"),
    ("reward model agrees with judge", "reward_model_accuracy/judge"),
)
