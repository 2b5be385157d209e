"""Hugging Face folders, written and read again; transformers reads them in tests marked `peer`."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from rlaif_jax.data import tokenizers
from rlaif_jax.data.encoding import decode_responses, encode_prompts
from rlaif_jax.errors import UserError
from rlaif_jax.models.huggingface import read_config
from rlaif_jax.models.huggingface_export import SHARD_BYTES, huggingface_config, write_weights
from rlaif_jax.models.parameters import abstract_parameters, decoding_model, decoding_parameters
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.sampling.distribution import SamplingConfig
from rlaif_jax.sampling.generate import generate
from rlaif_jax.sampling.stopping import make_stopping
from tests.helpers import eight_devices, one_device, random_params, tiny
from tests.reference import families

SCALAR = {"lm": False, "score": True}
# What differs with the version of transformers, and two older names of what layer_types says.
NOT_COMPARED = {"transformers_version", "dtype", "_sliding_window_pattern", "sliding_window_pattern"}
TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def parameters_of(path, scalar=False, placement=None):
    """The config and, without the bias that a folder has no place for, the parameters of a folder."""
    weights = open_weights(str(path))
    model = (ScalarModel if scalar else LanguageModel)(weights.config)
    abstract = abstract_parameters(model, placement or one_device())
    return weights.config, load_parameters(weights, {name: x for name, x in abstract.items() if name != "bias"})


def written(folder, config, parameters, dtype="float32", scalar=False, limit=SHARD_BYTES, **fields):
    folder.mkdir()
    huggingface_config(config, dtype, scalar, **fields).save_pretrained(str(folder))
    write_weights(epath.Path(folder), config, parameters, dtype, limit)
    return folder


@pytest.fixture(scope="module", params=[(case, part) for case in families.CASES for part in SCALAR], ids="-".join)
def original(request, tmp_path_factory):
    case, part = request.param
    folder = tmp_path_factory.mktemp(f"{case}-{part}") / "original"
    families.write_folder(case, folder, part)
    return case, part, folder, *parameters_of(folder, SCALAR[part])


def test_a_folder_is_what_transformers_saves_to_the_bit(original, tmp_path):
    case, part, folder, config, parameters = original
    found = written(tmp_path / "found", config, parameters, scalar=SCALAR[part])
    tensors, expected = load_file(found / "model.safetensors"), load_file(folder / "model.safetensors")
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype
        np.testing.assert_array_equal(tensors[name], tensor)
    assert {name: list(tensor.shape) for name, tensor in tensors.items()} == families.read(case)[0][part]["tensors"]
    again = parameters_of(found, SCALAR[part])
    assert again[0] == config
    jax.tree.map(np.testing.assert_array_equal, again[1], parameters)


def test_a_config_is_what_transformers_saves(original, tmp_path):
    case, part, _, config, _ = original
    expected = families.read(case)[0][part]["config"]
    tokens = {name: expected[name] for name in TOKENS}
    huggingface_config(config, "bfloat16", SCALAR[part], **tokens).save_pretrained(str(tmp_path))
    found = json.loads((tmp_path / "config.json").read_text())
    assert found["dtype"] == "bfloat16"
    assert {name: x for name, x in found.items() if name not in NOT_COMPARED} == {
        name: x for name, x in expected.items() if name not in NOT_COMPARED
    }


@pytest.mark.parametrize("case", ["gpt_neox", "llama3"])
def test_shards_in_bfloat16_from_eight_devices_are_the_checkpoint_to_the_bit(case, tmp_path):
    folder = tmp_path / "original"
    families.write_folder(case, folder)
    tensors = {name: x.astype(ml_dtypes.bfloat16) for name, x in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    placement = dataclasses.replace(eight_devices(), replicated=("kv_heads", "heads", "vocab", "embed", "mlp"))
    config, parameters = parameters_of(folder, placement=placement)
    limit = 6000
    found = written(tmp_path / "found", config, parameters, "bfloat16", limit=limit)
    index = json.loads((found / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in found.glob("*.safetensors"))
    assert len(files) > 2 and files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    seen = {}
    for file in files:
        of_file = load_file(found / file)
        assert sum(x.nbytes for x in of_file.values()) <= limit or len(of_file) == 1
        assert {name for name, where in index["weight_map"].items() if where == file} == of_file.keys()
        seen |= of_file
    assert seen.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(seen[name].view(np.uint16), tensor.view(np.uint16))
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    jax.tree.map(np.testing.assert_array_equal, parameters_of(found)[1], jax.device_get(parameters))


def test_values_beyond_a_dtype_are_an_error(tmp_path):
    config, parameters = tiny(), random_params(LanguageModel(tiny()))
    parameters["decoder"]["layers"]["gate"][1, 3, 4] = 1e5
    write_weights(epath.Path(tmp_path), config, parameters, "bfloat16")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.gate_proj\.weight.*not finite in float16"):
        write_weights(epath.Path(tmp_path), config, parameters, "float16")


# What the decoder can do in any family, and transformers in some alone.
NOT_THERE = {
    "no_rope_layers": {"no_rope_layers": (1,)},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "sliding_window": {"sliding_window": 4},
    "full_attention_layers": {"family": "mistral", "sliding_window": 4, "full_attention_layers": (1,)},
    "attn_logit_softcapping": {"attn_logit_softcapping": 3.0},
    "head_dim": {"family": "gpt2", "head_dim": 12, "num_key_value_heads": 4},
    "num_key_value_heads": {"family": "gpt_neox"},
}


@pytest.mark.parametrize("field", NOT_THERE)
def test_what_transformers_has_no_place_for_is_an_error(field):
    with pytest.raises(UserError, match=rf"^{field}=.* can't be written"):
        huggingface_config(tiny(**NOT_THERE[field]), "float32", scalar=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "qwen2", "head_dim": 12},
        {"family": "qwen3", "sliding_window": 4, "full_attention_layers": (0,)},
        {"family": "gemma3", "sliding_window": 4, "rope_local_base_freq": 50.0, "query_pre_attn_scalar": 7.0},
        {"family": "gpt2", "num_key_value_heads": 4},
    ],
)
def test_a_model_from_scratch_is_read_as_it_was_written(changes, tmp_path):
    config = tiny(**changes)
    parameters = random_params(LanguageModel(config))
    found, again = parameters_of(written(tmp_path / "found", config, parameters))
    ignored = {"rope_theta"} if changes["family"] == "gpt2" else set()
    fields = {field.name for field in dataclasses.fields(config)} - ignored
    assert {name: getattr(found, name) for name in fields} == {name: getattr(config, name) for name in fields}
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), parameters)
    assert read_config(epath.Path(tmp_path / "found")).tie_word_embeddings


@pytest.mark.peer
def test_transformers_computes_with_a_written_folder_what_it_does_with_its_own(original, tmp_path):
    from tests.reference import make_families_reference as live

    case, part, _, config, parameters = original
    arrays = families.read(case)[1]
    expected = families.read(case)[0][part]["config"]
    folder = tmp_path / "found"
    written(folder, config, parameters, scalar=SCALAR[part], pad_token_id=expected["pad_token_id"])
    if part == "lm":
        found, wanted = live.logits_of_folder(folder, arrays["tokens"]), arrays["logits"]
    else:
        found, wanted = live.score_of_folder(folder, arrays["score_tokens"]), arrays["score_logits"]
    np.testing.assert_allclose(found, wanted, atol=1e-4)


@pytest.mark.slow
def test_smollm2_is_read_as_it_was_written_and_speaks(smollm2, smollm2_tokenizer, tmp_path):
    model, parameters = smollm2
    folder = written(tmp_path / "found", model.config, parameters)
    smollm2_tokenizer.save_pretrained(str(folder))
    config, again = parameters_of(folder)
    assert config == model.config
    jax.tree.map(np.testing.assert_array_equal, again, parameters)
    tokenizer = tokenizers.from_weights(str(folder))
    prompts, mask = encode_prompts(tokenizer, ["What is the capital of France?"], 40)
    samples = generate(
        decoding_model(LanguageModel(config)),
        decoding_parameters(LanguageModel(config), again, one_device()),
        prompts,
        mask,
        jax.random.key(0),
        np.zeros(1, np.int32),
        make_stopping(tokenizer),
        max_new_tokens=12,
        sampling=SamplingConfig(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0),
        cache_dtype="float32",
    ).samples
    assert "Paris" in decode_responses(tokenizer, samples.tokens, samples.mask)[0]
