import jax
import numpy as np

from rlaif_jax.losses.sft import completion_loss

LOGPROBS = -np.random.default_rng(0).exponential(size=(3, 7)).astype(np.float32)
MASK = np.arange(7) < np.array([[2], [0], [7]])


def test_it_is_the_negative_log_likelihood_of_the_completion():
    total, weight = completion_loss(LOGPROBS, MASK)
    np.testing.assert_allclose(total, -LOGPROBS[MASK].sum(), rtol=1e-6)
    assert weight == 9


def test_its_gradient_is_minus_one_on_the_mask_and_zero_off_it():
    assert np.array_equal(jax.grad(lambda x: completion_loss(x, MASK)[0])(LOGPROBS), -MASK.astype(np.float32))
