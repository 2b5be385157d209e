"""DPO, IPO and SLiC: losses of a pair's log-ratios, on hard or soft labels.

With h = log[policy(a) / reference(a)] - log[policy(b) / reference(b)], as all three are written by Guo et al. (arXiv
2402.04792, section 2).
"""

import jax
import jax.numpy as jnp


def dpo(h: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta h) (Rafailov et al., arXiv 2305.18290, equation 7)."""
    return -jax.nn.log_sigmoid(beta * h)


def ipo(h: jax.Array, beta: float) -> jax.Array:
    """(h - 1 / (2 beta))^2 (Azar et al., arXiv 2310.12036, equation 17)."""
    return (h - 1 / (2 * beta)) ** 2


def slic(h: jax.Array, beta: float) -> jax.Array:
    """max(0, 1 - beta h): SLiC's hinge (Zhao et al., arXiv 2305.10425), on log-ratios (RSO, arXiv 2309.06657)."""
    return jnp.maximum(0.0, 1 - beta * h)


LOSSES = {"dpo": dpo, "ipo": ipo, "slic": slic}


def preference_loss(
    h: jax.Array, prob_a: jax.Array, weight: jax.Array, loss: str, beta: float
) -> tuple[jax.Array, jax.Array]:
    """The expected loss under the label: prob_a loss(h) + (1 - prob_a) loss(-h).

    With prob_a of 0 or 1 it is the loss on a hard label, with prob_a of 1 - e or e conservative DPO. Its gradient is
    zero at beta h = logit(prob_a) for dpo, and at h = (2 prob_a - 1) / (2 beta) for ipo.

    Args:
      h: [batch] float32, nats.
      prob_a: [batch] float32 in [0, 1], the label's probability that response a is the better one.
      weight: [batch] float32, how much each pair counts.
      loss: a name in `LOSSES`.

    Returns (weighted sum over pairs, sum of weights).
    """
    each = LOSSES[loss]
    losses = prob_a * each(h, beta) + (1 - prob_a) * each(-h, beta)
    return jnp.sum(weight * losses), jnp.sum(weight)
