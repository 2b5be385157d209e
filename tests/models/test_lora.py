"""Adapters: as part of the tree, merged, of PEFT (tests/reference/families), and on several devices."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlaif_jax.errors import UserError
from rlaif_jax.models.lora import TARGETS, LoraConfig, abstract_trained, init_adapter, joined, start, whole_params
from rlaif_jax.models.parameters import (
    abstract_parameters,
    decoding_model,
    decoding_parameters,
    merged,
    place_parameters,
)
from rlaif_jax.models.peft import with_adapter, write_adapter
from rlaif_jax.models.transformer import LanguageModel, ScalarModel
from rlaif_jax.models.weights import load_parameters, open_weights
from tests.helpers import (
    apply,
    assert_trees_close,
    eight_devices,
    full_logits,
    one_device,
    random_params,
    random_tokens,
    tiny,
)
from tests.reference import families, make_families_reference

LORA = LoraConfig(rank=4, alpha=8.0, targets=TARGETS, stages=())
MODEL = LanguageModel(tiny(lora_scale=LORA.scale, num_key_value_heads=4))
PARAMS = random_params(MODEL)
TOKENS = random_tokens(0, 4, 8)


def random_adapter(model=MODEL, seed=1):
    """One that changes something: a new one does not."""
    shapes, rng = abstract_trained(model, one_device(), LORA), np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), shapes)


def hidden(params, model=MODEL):
    return np.asarray(apply(model, params, TOKENS, np.ones_like(TOKENS))[0])


def test_a_new_adapter_changes_nothing():
    adapter = init_adapter(MODEL, LORA, jax.random.key(0), one_device())
    assert np.array_equal(hidden(joined(PARAMS, adapter)), hidden(PARAMS))
    for pair in adapter["decoder"]["layers"]["lora"].values():
        assert np.ptp(pair["a"]) > 0
        assert not np.any(pair["b"])


def test_merged_equals_unmerged_as_a_whole_and_to_decode_with():
    whole = joined(PARAMS, random_adapter())
    assert np.abs(hidden(whole) - hidden(PARAMS)).max() > 0.1
    without = merged(whole, LORA.scale)
    assert jax.tree.structure(without) == jax.tree.structure(PARAMS)
    np.testing.assert_allclose(hidden(without), hidden(whole), atol=2e-5)
    decoder = decoding_parameters(MODEL, whole, one_device())
    np.testing.assert_allclose(hidden(decoder, decoding_model(MODEL)), hidden(whole), atol=2e-5)


def test_members_side_by_side_are_merged_each_with_its_own():
    adapters = [random_adapter(seed=seed) for seed in (1, 2)]
    stacked = whole_params(PARAMS, jax.tree.map(lambda *x: np.stack(x), *adapters), LORA.scale, members=2)
    for i, adapter in enumerate(adapters):
        one = jax.tree.map(lambda x, i=i: x[i], stacked)
        assert_trees_close(one, merged(joined(PARAMS, adapter), LORA.scale), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_each_target_is_adapted_by_the_product_of_its_matrices(target):
    pair = random_adapter()["decoder"]["layers"]["lora"][target]
    whole = merged(joined(PARAMS, {"decoder": {"layers": {"lora": {target: pair}}}}), LORA.scale)
    weight, before = (np.asarray(x["decoder"]["layers"][target][1]) for x in (whole, PARAMS))
    inputs = 2 if target == "output" else 1
    expected = LORA.alpha / LORA.rank * np.tensordot(pair["a"][1], pair["b"][1], 1)
    assert pair["a"].shape[1:-1] == before.shape[:inputs]
    np.testing.assert_allclose(weight - before, expected, atol=1e-5)


def test_a_reward_model_trains_its_head_and_its_adapter_alone():
    model, placement = ScalarModel(MODEL.config), one_device()
    params = random_params(model)
    begin = start(model, LORA, lambda: params, jax.random.key(0), placement)
    trained = begin.trained()
    assert set(trained) == {"kernel", "bias", "decoder"}
    assert list(trained["decoder"]["layers"]) == ["lora"]
    assert begin.frozen == {"decoder": params["decoder"]}
    assert jax.tree.structure(trained) == jax.tree.structure(abstract_trained(model, placement, LORA))


def test_gradients_of_an_adapter_are_those_through_merged_weights():
    adapter = random_adapter()

    def loss(params):
        return jnp.sum(MODEL.apply({"params": params}, TOKENS, jnp.ones_like(TOKENS))[0] ** 3)

    apart = jax.jit(jax.grad(lambda adapter: loss(joined(PARAMS, adapter))))(adapter)
    through = jax.jit(jax.grad(lambda adapter: loss(merged(joined(PARAMS, adapter), LORA.scale))))(adapter)
    assert_trees_close(apart, through, rtol=1e-3, atol=1e-3)


def test_an_adapter_is_the_same_on_eight_devices():
    placement, whole = eight_devices(), joined(PARAMS, random_adapter())
    shardings = jax.tree.map(lambda x: x.sharding, abstract_trained(MODEL, placement, LORA))
    with jax.set_mesh(placement.mesh):
        params = place_parameters(MODEL, PARAMS, placement)
        sharded = joined(params, jax.device_put(random_adapter(), shardings))
        np.testing.assert_allclose(hidden(sharded), hidden(whole), atol=2e-5)
    query = shardings["decoder"]["layers"]["lora"]["query"]
    assert query["a"].spec[1] == "fsdp"  # split as its weight: along the width, and along the heads
    assert query["b"].spec[2] == "tensor"


def loaded(weights):
    model = LanguageModel(weights.config)
    return model, load_parameters(weights, abstract_parameters(model, one_device()))


@pytest.mark.parametrize("case", families.ADAPTED)
def test_an_adapter_that_peft_wrote_gives_the_same_logits(case, tmp_path):
    families.write_folder(case, tmp_path / "base")
    families.write_adapter(case, tmp_path / "adapter")
    weights, expected = open_weights(str(tmp_path / "base")), families.read(case)[1]
    adapted = with_adapter(weights, str(tmp_path / "adapter"))
    logits = full_logits(*loaded(adapted), expected["tokens"])
    np.testing.assert_allclose(logits, expected["adapter_logits"], atol=1e-4)
    assert np.abs(logits - expected["logits"]).max() > 0.01
    assert len(adapted.files) == len(weights.files) + 2  # so that its hash tells another adapter


def test_an_adapter_that_we_write_is_one_that_we_read(tmp_path):
    families.write_folder("llama3", tmp_path / "base")
    weights = open_weights(str(tmp_path / "base"))
    model, params = loaded(weights)
    adapter = random_adapter(model)
    write_adapter(adapter["decoder"]["layers"]["lora"], model.config, LORA, "base", tmp_path)
    _, read = loaded(with_adapter(weights, str(tmp_path)))
    assert_trees_close(read, merged(joined(params, adapter), LORA.scale), rtol=1e-5, atol=1e-6)


@pytest.mark.peer
def test_peft_reads_an_adapter_that_we_write(tmp_path):
    families.write_folder("llama3", tmp_path / "base")
    model, params = loaded(open_weights(str(tmp_path / "base")))
    adapter = random_adapter(model)
    (tmp_path / "adapter").mkdir()
    write_adapter(adapter["decoder"]["layers"]["lora"], model.config, LORA, "base", tmp_path / "adapter")
    tokens = families.read("llama3")[1]["tokens"]
    theirs = make_families_reference.logits_of_adapter(tmp_path / "base", tmp_path / "adapter", tokens)
    ours = full_logits(model, merged(joined(params, adapter), LORA.scale), tokens)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_peft_has_no_adapter_of_a_part_of_a_fused_tensor(tmp_path):
    with pytest.raises(UserError, match="without --adapter"):
        write_adapter({}, tiny(family="gpt2"), LORA, "base", tmp_path)


BAD = {
    "no folder": (lambda folder: None, "no adapter of PEFT"),
    "no JSON": (lambda folder: (folder / "adapter_config.json").write_text("{"), "can't be read"),
    "another method": (lambda folder: change(folder, peft_type="IA3"), "IA3"),
    "dora": (lambda folder: change(folder, use_dora=True), "use_dora"),
    "cut": (lambda folder: cut(folder / "adapter_model.safetensors"), "can't be read"),
}


def change(folder, **fields):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def cut(file):
    file.write_bytes(file.read_bytes()[:-10])


@pytest.mark.parametrize("name", BAD)
def test_a_bad_adapter_is_one_clear_line(name, tmp_path):
    families.write_folder("llama3", tmp_path / "base")
    folder, (spoil, words) = tmp_path / "adapter", BAD[name]
    if name != "no folder":
        families.write_adapter("llama3", folder)
    spoil(folder)
    with pytest.raises(UserError, match=words) as error:
        with_adapter(open_weights(str(tmp_path / "base")), str(folder))
    assert "\n" not in str(error.value)


def test_an_adapter_of_another_model_is_one_clear_line(tmp_path):
    families.write_folder("gpt2", tmp_path / "base")
    families.write_adapter("llama3", tmp_path / "adapter")
    with pytest.raises(UserError, match=r"gpt2.* does not have"):
        with_adapter(open_weights(str(tmp_path / "base")), str(tmp_path / "adapter"))
