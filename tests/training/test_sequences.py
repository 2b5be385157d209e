import jax
import numpy as np

from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.training.sequences import response_logprobs, response_rewards, response_values
from tests.helpers import EOS, full_logits, random_params, random_sequences, tiny

LANGUAGE, SCALAR = LanguageModel(tiny()), ScalarModel(tiny())
PARAMS, SCALAR_PARAMS = random_params(LANGUAGE), random_params(SCALAR)
SEQUENCES = random_sequences(0, 4)
LENGTH = SEQUENCES.prompts.shape[1] + SEQUENCES.responses.shape[1]


def unpadded_rows():
    """Each row's tokens from position 0 on, with the slices of prompt and response."""
    for row in range(len(SEQUENCES.prompts)):
        prompt = SEQUENCES.prompts[row][SEQUENCES.prompt_mask[row]]
        response = SEQUENCES.responses[row][SEQUENCES.response_mask[row]]
        tokens = np.concatenate([prompt, response])
        yield row, np.pad(tokens, (0, LENGTH - len(tokens)))[None], len(prompt), len(response)


def test_logprobs_are_of_the_response_tokens_given_what_stands_before():
    logprobs = jax.jit(response_logprobs, static_argnums=(0, 3))(LANGUAGE, PARAMS, SEQUENCES, 0.5)
    for row, tokens, start, count in unpadded_rows():
        logits = full_logits(LANGUAGE, PARAMS, tokens)[0, start - 1 : start + count - 1] / 0.5
        log_probs = np.asarray(jax.nn.log_softmax(logits))
        assert SEQUENCES.responses[row, count - 1] == EOS
        chosen = log_probs[np.arange(count), SEQUENCES.responses[row, :count]]
        np.testing.assert_allclose(logprobs[row, :count], chosen, atol=1e-4)
    assert not np.asarray(logprobs)[~SEQUENCES.response_mask].any()


def test_values_stand_before_each_response_token_and_the_reward_at_the_last():
    values, rewards, scores = jax.jit(
        lambda params, texts: (
            response_values(SCALAR, params, SEQUENCES),
            response_rewards(SCALAR, params, SEQUENCES),
            SCALAR.apply({"params": params}, texts, texts * 0 + 1),
        )
    )(SCALAR_PARAMS, np.concatenate([tokens for _, tokens, _, _ in unpadded_rows()]))
    for row, _, start, count in unpadded_rows():
        np.testing.assert_allclose(values[row, :count], scores[row, start - 1 : start + count - 1], atol=1e-4)
        np.testing.assert_allclose(rewards[row], scores[row, start + count - 1], atol=1e-4)
    assert not np.asarray(values)[~SEQUENCES.response_mask].any()
