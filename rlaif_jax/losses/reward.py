"""The Bradley-Terry reward-model loss on soft labels."""

import jax
import jax.numpy as jnp


def bradley_terry_loss(
    reward_a: jax.Array, reward_b: jax.Array, prob_a: jax.Array, weight: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy between the label and sigmoid(reward_a - reward_b) (Lee et al., arXiv 2309.00267, section 2.2).

    With prob_a of 0 or 1 it is the usual -log sigmoid(chosen - rejected); at reward_a - reward_b =
    logit(prob_a) its gradient is zero.

    Args:
      reward_a, reward_b: [batch] float32, the rewards of the two responses of a pair.
      prob_a: [batch] float32 in [0, 1], the label's probability that response a is the better one.
      weight: [batch] float32 in [0, 1], how much each pair counts.

    Returns (weighted sum over pairs in nats, sum of the weights).
    """
    difference = reward_a - reward_b
    loss = -prob_a * jax.nn.log_sigmoid(difference) - (1 - prob_a) * jax.nn.log_sigmoid(-difference)
    return jnp.sum(weight * loss), jnp.sum(weight)
