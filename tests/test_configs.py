import pytest

from configs import hh_harmless, hh_helpful, quickstart, scitldr, smollm2, tasks, tldr
from rlaif_jax.config import parse
from rlaif_jax.config_checks import check, check_decoder
from rlaif_jax.judge.prompts import load_template

TASKS = {"tldr": tldr, "hh_helpful": hh_helpful, "hh_harmless": hh_harmless, "scitldr": scitldr}
CONFIGS = [(module, f"{arm}{scale}") for module in (quickstart, smollm2) for arm in quickstart.ARMS for scale in (
    "", ",smoke")]  # fmt: skip
CONFIGS += [(tldr, f"{algorithm}{arm}") for algorithm in tasks.ALGORITHMS for arm in ("", ",drlaif", ",smoke")]
CONFIGS += [
    (module, f"{arm}{scale}{source}")
    for module in TASKS.values()
    for arm in tasks.ARMS
    for scale in ("", ",smoke")
    for source in ("", ",local", ",hub")
    if not (module is scitldr and arm in ("rlhf", "combined"))
]


@pytest.mark.parametrize(("module", "arm"), CONFIGS, ids=lambda x: getattr(x, "__name__", x))
def test_every_arm_of_every_config_is_valid(module, arm):
    config = parse(module.get_config(arm).to_dict())
    check(config, devices=1)
    check_decoder(config.policy.model, 0)
    assert load_template(config.judge.prompt).choices


@pytest.mark.parametrize("arm", ["rlaif", "smoke"])
def test_arms_change_what_they_say(arm):
    plain = tldr.get_config(arm)
    assert tldr.get_config(f"rlhf,{arm}").label.source == "human" != plain.label.source
    assert tldr.get_config(f"combined,{arm}").label.source == "both"
    assert tldr.get_config(f"base_prompt,{arm}").judge.prompt.preamble == "base" != plain.judge.prompt.preamble
    assert tldr.get_config(f"reasoning,{arm}").judge.prompt.chain_of_thought is not plain.judge.prompt.chain_of_thought
    for method in ("axes", "rating"):
        assert tldr.get_config(f"{method},{arm}").judge.prompt.method == method != plain.judge.prompt.method
    assert tldr.get_config(f"one_order,{arm}").preferences.order == "forward" != plain.preferences.order
    assert tldr.get_config(f"hard,{arm}").preferences.hard is not plain.preferences.hard
    shared = tldr.get_config(f"self,{arm}")
    shared.policy.weights = "other.gguf"
    assert shared.judge.weights == "other.gguf"


def test_an_unknown_word_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"'smok'.*rlhf.*smoke"):
        tldr.get_config("rlhf,smok")
