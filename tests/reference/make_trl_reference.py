"""Makes trl_losses.npz, TRL's preference losses on random pairs, for tests without PyTorch to compare with.

Every figure comes from TRL's own trainers (their methods, on stub trainers), none from rlaif_jax:

    python3 -m venv /tmp/trl
    /tmp/trl/bin/pip install torch==2.13.0 trl==0.19.1 transformers==4.53.3 accelerate==1.8.1 datasets==3.6.0 numpy
    /tmp/trl/bin/python tests/reference/make_trl_reference.py

How TRL 0.19.1 stands to the papers, with delta = (policy - ref of chosen) - (policy - ref of rejected), in nats:

- sigmoid with label_smoothing e is -(1 - e) log sigmoid(beta delta) - e log sigmoid(-beta delta): conservative DPO
  (Mitchell's note, 2023), so e = 0.2 is a soft label of 0.8. Robust DPO (arXiv 2403.00409) has + at the second term
  and divides by 1 - 2 e; TRL calls that one "robust".
- ipo is (delta - 1 / (2 beta))^2, equation 17 of arXiv 2310.12036 with beta for tau, and not scaled by beta. But TRL
  divides each log-prob by its response's number of tokens before dpo_loss, where the paper sums over tokens. dpo_loss
  itself, which is what ran here, takes log-probs as they come.
- hinge is max(0, 1 - beta delta), the hinge-norm loss of RSO (arXiv 2309.06657, gamma for beta). SLiC-HF (arXiv
  2305.10425) has max(0, margin - log policy(chosen) + log policy(rejected)): no reference, and a regulariser beside it.
  TRL's is that of margin 1 / beta times beta, on log-ratios to the reference. At beta 0.002 no pair here is clipped.
- The rewards are beta (policy - ref) and detached, whatever the loss.
- Losses are means over pairs. RewardTrainer's is -log sigmoid(chosen - rejected - margin) (arXiv 2307.09288, equation
  2), plus center_rewards_coefficient times the mean of (chosen + rejected)^2 (arXiv 2312.09244): the square of the
  sum, not of the mean of the two. Rewards are [pairs] here, as the margin is. In training TRL has rewards of
  [pairs, 1] and a margin of [pairs], which broadcast to [pairs, pairs]: every pair gets every margin.
"""

import pathlib
from types import SimpleNamespace

import numpy as np

FOLDER = pathlib.Path(__file__).parent
PAIRS = 16

# Prefix of the arrays' names: loss_type, beta, label_smoothing of DPOTrainer.
DPO_CASES = {
    "sigmoid": ("sigmoid", 0.1, 0.0),
    "sigmoid_smoothed": ("sigmoid", 0.1, 0.2),
    "ipo": ("ipo", 0.1, 0.0),
    "ipo_beta_1": ("ipo", 1.0, 0.0),
    "hinge": ("hinge", 0.1, 0.0),
    "hinge_beta_0.002": ("hinge", 0.002, 0.0),
}
# Prefix: whether there is a margin, center_rewards_coefficient of RewardTrainer.
REWARD_CASES = {"reward": (False, None), "reward_margin": (True, None), "reward_centered": (False, 0.01)}


def inputs():
    """[PAIRS] float32 each: log-probs of policy and reference, rewards, margins."""
    rng = np.random.default_rng(0)
    arrays = {f"ref_{side}_logps": rng.normal(-60, 15, PAIRS) for side in ("chosen", "rejected")}
    for side in ("chosen", "rejected"):
        arrays[f"policy_{side}_logps"] = arrays[f"ref_{side}_logps"] + rng.normal(0, 5, PAIRS)
    arrays |= {f"{side}_reward": rng.normal(0, 2, PAIRS) for side in ("chosen", "rejected")}
    arrays["margin"] = rng.uniform(0, 3, PAIRS)
    return {name: array.astype(np.float32) for name, array in arrays.items()}


def dpo_reference(arrays, loss_type, beta, label_smoothing):
    """[PAIRS] each: DPOTrainer's losses, its rewards, the gradient of the mean loss by policy_chosen_logps."""
    import torch
    from trl import DPOTrainer

    trainer = SimpleNamespace(
        loss_type=loss_type,
        beta=beta,
        label_smoothing=label_smoothing,
        reference_free=False,
        f_divergence_type="reverse_kl",
        accelerator=SimpleNamespace(device="cpu"),
    )
    names = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")
    logps = [torch.tensor(arrays[name]) for name in names]
    logps[0].requires_grad_()
    losses, chosen, rejected = DPOTrainer.dpo_loss(trainer, *logps)
    losses.mean().backward()
    return {
        "losses": losses.detach().numpy(),
        "chosen_rewards": chosen.numpy(),
        "rejected_rewards": rejected.numpy(),
        "gradient_policy_chosen_logps": logps[0].grad.numpy(),
    }


def reward_reference(arrays, has_margin, center_rewards_coefficient):
    """RewardTrainer's mean loss, [], and its gradients by both rewards, [PAIRS]; the model's output is its input."""
    import torch
    from trl import RewardTrainer

    trainer = SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=center_rewards_coefficient))
    chosen, rejected = (torch.tensor(arrays[f"{side}_reward"], requires_grad=True) for side in ("chosen", "rejected"))
    batch = {
        "input_ids_chosen": chosen,
        "input_ids_rejected": rejected,
        "attention_mask_chosen": None,
        "attention_mask_rejected": None,
    }
    if has_margin:
        batch["margin"] = torch.tensor(arrays["margin"])
    loss = RewardTrainer.compute_loss(trainer, lambda input_ids, **_: {"logits": input_ids}, batch)
    loss.backward()
    return {
        "loss": loss.detach().numpy(),
        "gradient_chosen_reward": chosen.grad.numpy(),
        "gradient_rejected_reward": rejected.grad.numpy(),
    }


def losses_reference():
    """The inputs by their names, and every case's arrays under its prefix and an underscore."""
    arrays = inputs()
    cases = {prefix: dpo_reference(arrays, *case) for prefix, case in DPO_CASES.items()}
    cases |= {prefix: reward_reference(arrays, *case) for prefix, case in REWARD_CASES.items()}
    return arrays | {f"{prefix}_{name}": array for prefix, case in cases.items() for name, array in case.items()}


if __name__ == "__main__":
    np.savez_compressed(FOLDER / "trl_losses.npz", **losses_reference())
