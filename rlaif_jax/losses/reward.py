"""The Bradley-Terry reward-model loss on soft labels, and what several reward models come to."""

import jax
import jax.numpy as jnp


def bradley_terry_loss(
    reward_a: jax.Array,
    reward_b: jax.Array,
    prob_a: jax.Array,
    weight: jax.Array,
    margin: float = 0.0,
    centring: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy between the label and sigmoid(reward_a - reward_b) (Lee et al., arXiv 2309.00267, section 2.2).

    With prob_a of 0 or 1 it is the usual -log sigmoid(chosen - rejected); at reward_a - reward_b =
    logit(prob_a) its gradient is zero, where there is no margin.

    Args:
      reward_a, reward_b: [batch] float32, the rewards of the two responses of a pair.
      prob_a: [batch] float32 in [0, 1], the label's probability that response a is the better one.
      weight: [batch] float32 in [0, 1], how much each pair counts.
      margin: by how much the better response is to lead where the label is sure; in proportion to |2 prob_a - 1|
        elsewhere (Touvron et al., arXiv 2307.09288, equation 2, whose margins are of ratings).
      centring: coefficient of (reward_a + reward_b)^2, which fixes the offset that comparisons leave free
        (Eisenstein et al., arXiv 2312.09244, section 2).

    Returns (weighted sum over pairs in nats, sum of the weights).
    """
    difference, lead = reward_a - reward_b, margin * jnp.abs(2 * prob_a - 1)
    loss = -prob_a * jax.nn.log_sigmoid(difference - lead) - (1 - prob_a) * jax.nn.log_sigmoid(-difference - lead)
    loss += centring * (reward_a + reward_b) ** 2
    return jnp.sum(weight * loss), jnp.sum(weight)


COMBINATIONS = ("mean", "min", "uncertainty", "weights")


def combine(rewards: jax.Array, how: str, uncertainty_coef: float, weights: jax.Array | None = None) -> jax.Array:
    """The reward that members come to, of which each is centred on the same responses.

    "mean"; "min", the worst case; "uncertainty", the mean less `uncertainty_coef` times the population variance
    (Coste et al., arXiv 2310.02743, section 3.2). Of "weights" (WARM: Rame et al., arXiv 2401.12187) there is one
    member, the average of the parameters.

    rewards: [members, batch] float32. weights: [members] float32 with sum 1, for a "mean" in which members count
    differently. Returns [batch].
    """
    if how == "min":
        return jnp.min(rewards, axis=0)
    if how == "uncertainty":
        return jnp.mean(rewards, axis=0) - uncertainty_coef * jnp.var(rewards, axis=0)
    return jnp.mean(rewards, axis=0) if weights is None else weights @ rewards
