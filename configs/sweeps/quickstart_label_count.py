"""Reward-model accuracy against the number of labels, on held-out labels and by the ground truth (quickstart).

    python -m rlaif_jax.sweep --config=configs/sweeps/quickstart_label_count.py --workdir=runs/sweeps

About 20 minutes on 2 CPU cores: each seed labels once, and its reward models are trained on the first labels of them.
Nothing is evaluated beyond the reward models.
"""

from ml_collections import config_dict

from configs import quickstart


def get_config(arm: str = "default") -> config_dict.ConfigDict:
    """The sweep, on an arm of the quickstart."""
    sweep = config_dict.ConfigDict()
    sweep.base = quickstart.get_config(arm)
    sweep.base.stages = ("sft", "label", "reward_model")
    sweep.base.label.pairs = 384
    sweep.base.reward_model.update(batch_size=16, validation_pairs=128, calibrate=False)
    arms = {f"labels_{count}": {"reward_model.train_pairs": count} for count in (16, 32, 64, 128, 256)}
    sweep.arms = config_dict.ConfigDict(arms, allow_dotted_keys=True, sort_keys=False)
    sweep.seeds = (0, 1, 2)
    sweep.baseline = "labels_256"
    sweep.figures = (
        "reward_model_accuracy/held_out",
        "reward_model_accuracy/held_out_ground_truth",
        "reward_model_calibration/ece",
        "reward_model_length_correlation",
    )
    return sweep
