"""Every family of decoders against transformers (tests/reference/families), and against itself."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.losses.logprobs import token_logprobs
from rlaif_jax.models.layouts import in_our_layout
from rlaif_jax.models.parameters import abstract_parameters
from rlaif_jax.models.transformer import LanguageModel, next_token_logits, unembedding
from rlaif_jax.models.weights import load_parameters, open_weights
from tests.helpers import one_device
from tests.reference import families

ATTENTION = {"gpt2": "transformer.h.1.attn.c_attn.weight"}


def loaded(folder):
    weights = open_weights(str(folder))
    model = LanguageModel(weights.config)
    return model, load_parameters(weights, abstract_parameters(model, one_device()))


@pytest.fixture(scope="module", params=families.CASES)
def case(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    families.write_folder(request.param, folder)
    return families.read(request.param)[1], *loaded(folder)


def test_logits_and_gradients_equal_those_of_transformers(case):
    expected, model, params = case
    tokens = expected["tokens"]

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def loss(params):
        hidden, _ = model.apply({"params": params}, tokens, jnp.ones_like(tokens))
        cap = model.config.final_logit_softcapping
        logprobs = token_logprobs(hidden[:, :-1], unembedding(params), tokens[:, 1:], cap=cap)
        return -jnp.sum(logprobs), next_token_logits(model, params, hidden)

    (value, logits), gradient = loss(params)
    np.testing.assert_allclose(logits, expected["logits"], atol=1e-4)
    np.testing.assert_allclose(value, expected["loss"], rtol=1e-5)
    for full, of_tensor in expected.items():
        if full.startswith("gradient."):
            check_gradient(full.removeprefix("gradient."), gradient["decoder"], of_tensor, model.config)


def check_gradient(tensor, decoder, expected, config):
    if "embed" in tensor or "wte" in tensor:
        found = {"embedding": decoder["embedding"]}
    else:
        parts = ("query", "key", "value") if "q_proj" not in tensor else ("query",)
        found = {part: decoder["layers"][part][1] for part in parts}
    for name, ours in found.items():
        np.testing.assert_allclose(ours, in_our_layout(name, expected, config), rtol=1e-3, atol=2e-4)
