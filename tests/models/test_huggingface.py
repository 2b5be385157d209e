"""Hugging Face folders: what they may look like, where their bytes go, and what is said of bad ones."""

import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rlaif_jax.data import tokenizers
from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.layouts import in_our_layout
from rlaif_jax.models.parameters import Placement, abstract_parameters, in_layers, parameter_name
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.models.weights import load_parameters, open_weights
from rlaif_jax.parallel.mesh import make_mesh
from tests.helpers import axes, one_device
from tests.reference import families

LAYER_1 = "model.layers.1.mlp.up_proj.weight"


def opened(folder, case="llama3", shards=1, change=None):
    """The folder of a case, changed."""
    families.write_folder(case, folder, shards=shards)
    if change is not None:
        change(folder)
    return open_weights(str(folder))


def config(**fields):
    """A change of config.json; a field of `...` is taken out."""

    def change(folder):
        file = folder / "config.json"
        found = json.loads(file.read_text()) | fields
        file.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))

    return change


def tensors(change):
    """A change of the arrays by their names, in place."""

    def rewrite(folder):
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors")

    return rewrite


def renamed(change):
    """Every tensor by another name."""

    def rename(found):
        for name in list(found):
            found[change(name)] = found.pop(name)

    return tensors(rename)


def contents(weights):
    """All that `read` gives."""
    family = FAMILIES[weights.config.family]
    whole = [name for name in family.whole if name not in ("layers", "lm_head", "kernel")]
    numbers = range(weights.config.num_hidden_layers)
    found = {name: np.array(weights.read(name, 0)) for name in whole}
    return found | {f"{name} {i}": np.array(weights.read(name, i)) for name in family.layer for i in numbers}


def assert_same(a, b):
    assert a.config == b.config
    np.testing.assert_equal(contents(a), contents(b))


@pytest.mark.parametrize("case", ["llama3", "gpt2"])
def test_shards_and_one_file_hold_the_same(tmp_path, case):
    assert_same(opened(tmp_path / "a", case), opened(tmp_path / "b", case, shards=3))


def as_on_the_hub(found):
    """GPT-2's names there begin with nothing, and each layer has the causal mask that old versions saved."""
    for name in list(found):
        found[name.removeprefix("transformer.")] = found.pop(name)
    for i in range(2):
        found[f"h.{i}.attn.bias"] = np.tril(np.ones((1, 1, 64, 64), np.uint8))
        found[f"h.{i}.attn.masked_bias"] = np.float32([-1e4])


def test_gpt2_as_it_is_on_the_hub(tmp_path):
    assert_same(opened(tmp_path / "a", "gpt2"), opened(tmp_path / "b", "gpt2", change=tensors(as_on_the_hub)))


LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
OLD = {
    "llama3": {"rope_theta": 100.0, "rope_scaling": {"rope_type": "llama3", **LLAMA3_ROPE}, "torch_dtype": "float32"},
    "mistral": {"rope_theta": 100.0, "rope_scaling": None, "torch_dtype": "bfloat16"},
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 100.0},
    "gemma3": {
        "rope_theta": 500.0,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "layer_types": ...,
    },
}


@pytest.mark.parametrize("case", OLD)
def test_configs_of_older_versions(tmp_path, case):
    old = config(**OLD[case], rope_parameters=..., dtype=...)
    assert_same(opened(tmp_path / "a", case), opened(tmp_path / "b", case, change=old))


def with_images(beginning):
    def change(folder):
        text = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma3", "text_config": text}))
        renamed(lambda name: beginning + name.removeprefix("model."))(folder)
        tensors(lambda found: found.update({"vision_tower.patch.weight": np.ones((2, 2), np.float32)}))(folder)

    return change


@pytest.mark.parametrize("beginning", ["language_model.model.", "model.language_model."])
def test_the_text_of_a_gemma_3_that_sees_images(tmp_path, beginning):
    assert_same(opened(tmp_path / "a", "gemma3"), opened(tmp_path / "b", "gemma3", change=with_images(beginning)))


class Recorder:
    """An array that says how much of it was read."""

    def __init__(self, array, log):
        self.array, self.log = array, log

    def __getitem__(self, index):
        part = self.array[index]
        self.log.append(part.size)
        return part


def test_each_device_reads_its_own_slices_and_gets_the_weights(tmp_path):
    weights, logs = opened(tmp_path, "llama3"), {}
    model = LanguageModel(weights.config)
    abstract = abstract_parameters(model, Placement(make_mesh(axes(fsdp=8))))
    read = lambda name, i: Recorder(weights.read(name, i), logs.setdefault((name, i), []))  # noqa: E731
    params = load_parameters(weights._replace(read=read), abstract)
    saved = families.weights("llama3")

    def check(path, x, abstract):
        name = parameter_name(path)
        theirs = FAMILIES["llama"].layer.get(name) or FAMILIES["llama"].whole[name]
        layers = range(2) if in_layers(path) else [None]
        names = [theirs if i is None else f"model.layers.{i}.{theirs}" for i in layers]
        expected = [in_our_layout(name, saved[each], weights.config) for each in names]
        assert np.array_equal(x, np.stack(expected) if in_layers(path) else expected[0])
        assert x.sharding.is_equivalent_to(abstract.sharding, x.ndim)
        for i, part in zip(layers, expected, strict=True):
            assert logs[name, i or 0] == [part.size // 8] * 8  # the width is split over all devices, in every weight

    jax.tree_util.tree_map_with_path(check, params, abstract)


def in_bfloat16(found):
    for name in found:
        found[name] = found[name].astype(ml_dtypes.bfloat16)


def test_bfloat16_on_disk_is_float32_of_the_same_value_or_bfloat16_where_asked(tmp_path):
    weights = opened(tmp_path, "qwen3", change=tensors(in_bfloat16))
    abstract = abstract_parameters(LanguageModel(weights.config), one_device())
    expected = weights.read("up", 1)
    for dtype in ("float32", "bfloat16"):
        layers = load_parameters(weights, abstract, dtype)["decoder"]["layers"]
        assert layers["up"].dtype == dtype
        assert layers["query_norm"]["scale"].dtype == np.float32
        assert np.array_equal(np.asarray(layers["up"][1], np.float32), expected.astype(np.float32))


def test_shuffled_weights_have_the_same_values_in_another_order_on_any_mesh(tmp_path):
    weights = opened(tmp_path, "llama3")
    model = LanguageModel(weights.config)
    one, many = (
        load_parameters(weights, abstract_parameters(model, placement), shuffle_seed=1)
        for placement in (one_device(), Placement(make_mesh(axes(fsdp=4, tensor=2))))
    )
    jax.tree.map(np.testing.assert_array_equal, one, many)
    for i in range(2):
        plain, shuffled = weights.read("up", i), one["decoder"]["layers"]["up"][i]
        assert np.array_equal(np.sort(plain, axis=None), np.sort(shuffled, axis=None))
        assert not np.array_equal(plain, shuffled)
    assert not np.array_equal(*np.argsort(one["decoder"]["layers"]["up"].reshape(2, -1), axis=1))


def without(name):
    return lambda folder: (folder / name).unlink()


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def with_eight_bits(folder):
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header[LAYER_1] |= {"dtype": "F8_E4M3", "shape": [48, 4 * 32]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def rope(kind, **fields):
    return config(rope_parameters={"rope_type": kind, "rope_theta": 100.0, **fields})


YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
INDEX = "model.safetensors.index.json"
BAD = {
    "cut": (cut, r"model\.safetensors is damaged or incomplete .*: download it again"),
    "only a pickle": (pickled, r"pytorch_model\.bin, a pickle file.*save them as safetensors"),
    "no weights": (without("model.safetensors"), "no model.safetensors and no .*: download"),
    "no config": (without("config.json"), "has no config.json"),
    "no JSON": (written("config.json", "{nope"), r"config\.json can't be read: JSONDecodeError"),
    "a list": (written("config.json", "[1]"), r"config\.json can't be read"),
    "unknown family": (config(model_type="mamba"), "family 'mamba'; the known ones are gemma2, .*, smollm3"),
    "no family": (config(model_type=None), "family None; the known ones"),
    "null": (config(hidden_size=None), "config.json .*hidden_size.* expected int, got NoneType"),
    "text": (config(num_attention_heads="4"), "config.json .*num_attention_heads.* expected int, got str"),
    "null in rope": (config(rope_parameters={"rope_type": "default", "rope_theta": None}), "rope_theta=None, which"),
    "null factor": (rope("linear", factor=None), "factor=None, which must be a number"),
    "heads": (config(num_key_value_heads=3), "num_attention_heads=4, which must be a multiple of .*=3"),
    "no layers": (config(num_hidden_layers=0), "num_hidden_layers=0, which must be a whole number, and positive"),
    "yarn": (YARN, "rope_type='yarn'; supported are default, linear, llama3"),
    "biases": (config(attention_bias=True), "attention_bias=True, which the decoder of llama does not"),
    "activation": (config(hidden_act="relu"), "hidden_act='relu'"),
    "quantised": (config(quantization_config={"quant_method": "x"}), "quantization_config=..., which"),
    "missing": (tensors(lambda found: found.pop(LAYER_1)), f"lacks 1 of the tensors .*{LAYER_1}: take"),
    "extra": (tensors(lambda found: found.update(lora=found[LAYER_1])), "has no place: lora; take"),
    "more layers": (config(num_hidden_layers=3), r"lacks 9 of .* such as model\.layers\.2"),
    "shape": (
        tensors(lambda found: found.update({LAYER_1: found[LAYER_1][1:].copy()})),
        rf"{LAYER_1} of shape \[47, 32\] does not fit config\.json",
    ),
    "dimensions": (tensors(lambda found: found.update({LAYER_1: found[LAYER_1][0].copy()})), r"shape \[32\] does not"),
    "dtype": (with_eight_bits, f"{LAYER_1} is of dtype F8_E4M3; known are F32, .*: save it as BF16"),
    "untied": (
        tensors(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"] + 1})),
        "ties the embeddings, but lm_head.weight differs .*: set tie_word_embeddings to false",
    ),
    "index no JSON": (written(INDEX, "{"), rf"{INDEX} can't be read: JSONDecodeError"),
    "index without map": (written(INDEX, "{}"), rf"{INDEX} can't be read: KeyError"),
    "index of nulls": (written(INDEX, '{"weight_map": {"a": null}}'), rf"{INDEX} can't be read"),
    "index a list": (written(INDEX, "[]"), rf"{INDEX} can't be read"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_bad_folder_is_one_clear_line(tmp_path, change, message):
    with pytest.raises(UserError, match=message) as error:
        opened(tmp_path, change=change)
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_shard_is_one_clear_line(tmp_path):
    missing = "model-00002-of-00003.safetensors"
    with pytest.raises(UserError, match=f"{missing} is missing, which .*{INDEX} names: download it again"):
        opened(tmp_path, shards=3, change=without(missing))


@pytest.mark.parametrize(
    ("case", "fields", "named"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ("gemma3", {"layer_types": ["chunked_attention"] * 4}, "layer_types="),
        ("smollm3", {"no_rope_layers": [1]}, r"no_rope_layers=\[1\]"),
        ("mistral", {"sliding_window": "4"}, "sliding_window"),
    ],
)
def test_what_the_decoder_does_not_have_is_one_clear_line(tmp_path, case, fields, named):
    with pytest.raises(UserError, match=named) as error:
        opened(tmp_path, case, change=config(**fields))
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_more_tokens_than_the_embedding_has_rows_is_one_clear_line(tmp_path):
    opened(tmp_path)
    tokenizers.train(["a few words"], 300).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"has \d+ tokens, more than the 64 rows of the embedding: take the tokenizer"):
        tokenizers.from_weights(str(tmp_path))
