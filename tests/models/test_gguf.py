import gguf as gguf_format
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.data.encoding import decode_responses, encode_prompts
from rlaif_jax.errors import UserError
from rlaif_jax.losses.logprobs import token_logprobs
from rlaif_jax.models.parameters import abstract_parameters, decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel, ModelConfig, unembedding
from rlaif_jax.models.weights import load_parameters, open_weights, resolve
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import make_stopping
from tests.conftest import SMOLLM2
from tests.helpers import apply, full_logits, one_device
from tests.reference import make_llama_reference as reference


@pytest.fixture(scope="module", params=["committed", pytest.param("live", marks=pytest.mark.peer)])
def smollm2_reference(request):
    if request.param == "live":
        return reference.smollm2_reference(str(resolve(SMOLLM2)))
    return np.load(reference.FOLDER / "smollm2.npz")


@pytest.fixture(scope="module", params=["committed", pytest.param("live", marks=pytest.mark.peer)])
def tiny_reference(request):
    return reference.tiny_reference() if request.param == "live" else np.load(reference.FOLDER / "tiny_llama.npz")


def test_smollm2_equals_transformers(smollm2, smollm2_reference):
    model, params = smollm2
    tokens = [smollm2_reference[f"tokens_{i}"] for i in range(len(reference.TEXTS))]
    length = max(map(len, tokens))
    batch = np.stack([np.pad(row, (0, length - len(row))) for row in tokens])
    segments = np.stack([np.arange(length) < len(row) for row in tokens]).astype(np.int32)
    hidden, _ = apply(model, params, batch, segments)
    logprobs = token_logprobs(hidden[:, :-1], unembedding(params), batch[:, 1:])
    vocabulary = np.asarray(unembedding(params))[:, smollm2_reference["vocabulary"]]
    for i, row in enumerate(tokens):
        logits = np.asarray(hidden[i, : len(row)]) @ vocabulary
        np.testing.assert_allclose(logits, smollm2_reference[f"logits_{i}"], atol=3e-4)
        np.testing.assert_allclose(logprobs[i, : len(row) - 1], smollm2_reference[f"logprobs_{i}"], atol=1e-4)


def write_gguf(path, weights):
    """The random Llama as llama.cpp's converter writes it: rows of q and k as interleaved rotary pairs."""
    config = reference.TINY
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    writer = gguf_format.GGUFWriter(path, "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["attn_q"])
    writer.add_head_count_kv(heads["attn_k"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(reference.TINY_ROPE_THETA)
    names = {
        "token_embd": "model.embed_tokens",
        "output": "lm_head",
        "output_norm": "model.norm",
        **{
            f"blk.{i}.{name}": f"model.layers.{i}.{hf}"
            for i in range(config["num_hidden_layers"])
            for name, hf in reference.GGUF_TO_HF.items()
        },
    }
    for name, hf in names.items():
        weight = np.asarray(weights[f"{hf}.weight"], np.float32)
        part = name.split(".")[-1]
        if part in heads:
            weight = weight.reshape(heads[part], 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def loaded(path, shuffle_seed=None):
    weights = open_weights(str(path))
    abstract = abstract_parameters(LanguageModel(weights.config), one_device())
    return weights.config, load_parameters(weights, abstract, shuffle_seed=shuffle_seed)


def test_a_small_untied_grouped_query_llama_equals_transformers(tmp_path, tiny_reference):
    write_gguf(tmp_path / "tiny.gguf", tiny_reference)
    config, params = loaded(tmp_path / "tiny.gguf")
    expected = reference.TINY | {"rms_norm_eps": float(np.float32(reference.TINY["rms_norm_eps"]))}
    assert config == ModelConfig(**expected, rope_theta=reference.TINY_ROPE_THETA)
    model, tokens = LanguageModel(config), tiny_reference["tokens"]
    np.testing.assert_allclose(full_logits(model, params, tokens), tiny_reference["logits"], atol=2e-5)

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        hidden, _ = model.apply({"params": params}, tokens, jnp.ones_like(tokens))
        return -jnp.sum(token_logprobs(hidden[:, :-1], unembedding(params), tokens[:, 1:]))

    loss, gradient = loss_and_gradient(params)
    decoder = gradient["decoder"]
    query = np.asarray(decoder["layers"]["query"][1]).transpose(1, 2, 0).reshape(-1, config.hidden_size)
    np.testing.assert_allclose(loss, tiny_reference["loss"], rtol=1e-5)
    np.testing.assert_allclose(decoder["embedding"], tiny_reference["gradient_embedding"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(query, tiny_reference["gradient_query_1"], rtol=1e-4, atol=1e-4)


def test_shuffled_weights_have_the_same_values_in_another_order(tmp_path, tiny_reference):
    write_gguf(tmp_path / "tiny.gguf", tiny_reference)
    plain, shuffled, again = (loaded(tmp_path / "tiny.gguf", seed)[1] for seed in (None, 1, 1))

    def check(path, a, b, c):
        name = jax.tree_util.keystr(path)
        assert a.shape == b.shape, name
        assert np.array_equal(np.sort(a, axis=None), np.sort(b, axis=None)), name
        assert np.array_equal(a, b) == name.endswith("norm']['scale']"), name
        assert np.array_equal(b, c), name

    jax.tree_util.tree_map_with_path(check, plain, shuffled, again)


def bad_files(folder):
    (folder / "text.gguf").write_text("not a model\n" * 100)
    (folder / "empty.gguf").write_bytes(b"")
    (folder / "cut.gguf").write_bytes(resolve(SMOLLM2).read_bytes()[:5000])
    writer = gguf_format.GGUFWriter(folder / "other.gguf", "gpt2")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ("{}/missing.gguf", "missing.gguf"),
        ("{}", "no config.json"),
        ("package:no_such_package", "no_such_package"),
        ("package:numpy", "numpy"),
        ("package:numpy.no_such_module", "no_such_module"),
        ("package:six", "six"),
        ("package:no_such_package.module", "no_such_package"),
        ("{}/text.gguf", "text.gguf"),
        ("{}/empty.gguf", "empty.gguf"),
        ("{}/cut.gguf", "cut.gguf"),
        ("{}/other.gguf", "gpt2"),
    ],
)
def test_a_bad_model_is_one_clear_line(tmp_path, path, named):
    bad_files(tmp_path)
    with pytest.raises(UserError, match=named) as error:
        open_weights(path.format(tmp_path))
    assert "\n" not in str(error.value)


def test_smollm2_knows_the_capital_of_france(smollm2, smollm2_tokenizer):
    model, params = smollm2
    prompts, mask = encode_prompts(smollm2_tokenizer, ["What is the capital of France?"], 40)
    samples = generate(
        decoding_model(model),
        decoding_parameters(model, params, one_device()),
        prompts,
        mask,
        jax.random.key(0),
        np.zeros(1, np.int32),
        make_stopping(smollm2_tokenizer),
        max_new_tokens=12,
        sampling=SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0),
        cache_dtype="float32",
    ).samples
    assert "Paris" in decode_responses(smollm2_tokenizer, samples.tokens, samples.mask)[0]
