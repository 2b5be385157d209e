"""GGUF files of each family, as llama.cpp's converter writes them, hold what the Hugging Face folder does."""

import dataclasses
import json

import gguf
import numpy as np
import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.models.families import FAMILIES
from rlaif_jax.models.weights import open_weights
from tests.reference import families

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# Where a case differs from what the files can say: they leave out Gemma's scale and which of its layers see all.
CASES = {
    "llama2": ("llama", {}),
    "llama3": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {"query_pre_attn_scalar": 12}),
    "gemma3": ("gemma3", {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention"] * 4}),
}
F32, Q8_0, Q8_1 = (getattr(gguf.GGMLQuantizationType, name) for name in ("F32", "Q8_0", "Q8_1"))


def hf_config(case):
    return families.read(case)[0]["lm"]["config"] | CASES[case][1]


def write_metadata(writer, architecture, c):
    heads = c["num_attention_heads"]
    head_dim = c.get("head_dim") or c["hidden_size"] // heads
    ropes = c["rope_parameters"]
    rope = ropes.get("full_attention", ropes)
    writer.add_context_length(c["max_position_embeddings"])
    writer.add_embedding_length(c["hidden_size"])
    writer.add_block_count(c["num_hidden_layers"])
    writer.add_feed_forward_length(c["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(c["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    if "head_dim" in c:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(rope, head_dim))
    if architecture.startswith("gemma"):
        writer.add_sliding_window(c["sliding_window"])
    if architecture == "gemma2":
        writer.add_attn_logit_softcapping(c["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(c["final_logit_softcapping"])
    if "sliding_attention" in ropes:
        writer.add_rope_freq_base_swa(ropes["sliding_attention"]["rope_theta"])


def llama3_factors(rope, head_dim):
    """By what each frequency is divided, one at a time (Llama 3.1's reference code)."""
    old, low, high = (rope[x] for x in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * rope["rope_theta"] ** (i / head_dim)
        if wavelength < old / high:
            factors.append(1.0)
        elif wavelength > old / low:
            factors.append(rope["factor"])
        else:
            smooth = (old / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    assert len(set(factors)) > 2
    return np.float32(factors)


def converted(architecture, name, weight, c):
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = c["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
        return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)
    return weight + 1 if architecture.startswith("gemma") and name.endswith("norm.weight") else weight


def write_gguf(path, case, kind=F32, without="", leave_out_swa=False):
    """kind: of the matrices whose rows its blocks divide."""
    architecture, c = CASES[case][0], hf_config(case)
    if leave_out_swa:
        c = c | {"rope_parameters": c["rope_parameters"]["full_attention"]}
    writer = gguf.GGUFWriter(path, architecture)
    write_metadata(writer, architecture, c)
    number = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == architecture)
    names = gguf.get_tensor_name_map(number, c["num_hidden_layers"])
    block, size = gguf.GGML_QUANT_SIZES[kind]
    for name, weight in families.weights(case).items():
        if name == without:
            continue
        weight, theirs = converted(architecture, name, weight, c), names.get_name(name, (".weight", ".bias"))
        if weight.ndim == 1 or weight.shape[1] % block or kind == F32:
            writer.add_tensor(theirs, weight)
        elif kind == Q8_1:  # which gguf can't write
            writer.add_tensor(
                theirs, np.zeros((len(weight), weight.shape[1] // block * size), np.uint8), raw_dtype=kind
            )
        else:
            writer.add_tensor(theirs, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_weights(str(path))


def folder(path, case):
    families.write_folder(case, path)
    (path / "config.json").write_text(json.dumps(hf_config(case)))
    return open_weights(str(path))


def assert_same(a, b, **tolerance):
    """Of all weights and all fields of the config, whose numbers are float32 in a GGUF file."""
    for x, y in zip(*(dataclasses.asdict(each.config).items() for each in (a, b)), strict=True):
        assert x == y or np.isclose(x[1], y[1], rtol=1e-6), (x, y)
    family = FAMILIES[a.config.family]
    names = ["embedding", "final_norm/scale", *family.layer] + ["lm_head"] * (not a.config.tie_word_embeddings)
    for name in names:
        for i in range(a.config.num_hidden_layers if name in family.layer else 1):
            np.testing.assert_allclose(a.read(name, i), b.read(name, i), err_msg=name, **tolerance)


@pytest.mark.parametrize("case", CASES)
def test_a_file_is_the_model_of_the_folder_it_was_made_of(tmp_path, case):
    assert_same(write_gguf(tmp_path / "model.gguf", case), folder(tmp_path / "hf", case), atol=1e-6)


def test_quantised_matrices_are_close(tmp_path):
    quantised, whole = write_gguf(tmp_path / "model.gguf", "qwen3", Q8_0), folder(tmp_path / "hf", "qwen3")
    assert_same(quantised, whole, atol=0.01)
    assert not np.array_equal(quantised.read("up", 0), whole.read("up", 0))


def test_gemma_3_rotates_by_what_llama_cpp_knows_where_an_older_file_says_nothing(tmp_path):
    assert write_gguf(tmp_path / "a.gguf", "gemma3").config.rope_local_base_freq == 50
    assert write_gguf(tmp_path / "b.gguf", "gemma3", leave_out_swa=True).config.rope_local_base_freq == 10_000


LAYER_1 = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"without": LAYER_1}, r"lacks 1 tensors of its model, for example blk\.1\.ffn_up\.weight"),
        ({"kind": Q8_1}, "is quantised as Q8_1, which can't be read: take a file of Q4_K"),
    ],
)
def test_a_file_that_can_not_be_read_is_one_clear_line(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        write_gguf(tmp_path / "model.gguf", "qwen2", **arguments)
    assert "model.gguf" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_cut_short_is_one_clear_line(tmp_path):
    write_gguf(tmp_path / "whole.gguf", "qwen2")
    (tmp_path / "cut.gguf").write_bytes((tmp_path / "whole.gguf").read_bytes()[:-2000])
    with pytest.raises(UserError, match=r"cut\.gguf is not a readable GGUF file") as error:
        open_weights(str(tmp_path / "cut.gguf"))
    assert "\n" not in str(error.value)
