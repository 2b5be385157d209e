import jax
import pytest

from configs import constitutional, hh_harmless, hh_helpful, presets, quickstart, scitldr, smollm2, tasks, tldr
from rlaif_jax.config import flatten, override, parse
from rlaif_jax.config_checks import check, check_decoder
from rlaif_jax.data.prepare import load
from rlaif_jax.errors import UserError
from rlaif_jax.judge.prompts import load_template
from rlaif_jax.main import main
from rlaif_jax.models.parameters import Placement, abstract_parameters
from rlaif_jax.models.shapes import model_config
from rlaif_jax.models.transformer import LanguageModel
from rlaif_jax.parallel.mesh import JUDGE_RULES, make_mesh
from tests.helpers import Chip, one_device, one_device_mesh

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
CONFIGS += [
    (constitutional, arm)
    for arm in ("default", "smoke", "hh", "hh,smoke", "cot", "cot,smoke", "hh,cot", "hh,cot,smoke")
]


@pytest.mark.parametrize(("module", "arm"), CONFIGS, ids=lambda x: getattr(x, "__name__", x))
def test_every_arm_of_every_config_is_valid(module, arm):
    config = parse(module.get_config(arm).to_dict())
    check(config, one_device_mesh(), one_device_mesh())
    check_decoder(config.policy.model, 0)
    assert all(load_template(judge.prompt).choices for judge in config.judges.values())


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


@pytest.mark.parametrize("other", ["rl", "dpo", "online_dpo", "best_of_n", "drlaif"])
def test_constitutional_comes_before_what_another_arm_trains(other):
    alone = quickstart.get_config("default" if other == "rl" else other).stages
    both = quickstart.get_config("constitutional" if other == "rl" else f"constitutional,{other}").stages
    assert both == ("sft", "critique", "sl_cai", *alone[1:])


@pytest.mark.parametrize("words", ["dpo,ipo", "dpo,best_of_n", "rloo,grpo", "reinforce,dpo", "drlaif,dpo"])
@pytest.mark.parametrize("module", [quickstart, smollm2, tldr], ids=lambda module: module.__name__)
def test_words_that_train_the_policy_in_different_ways_are_refused(module, words):
    first, second = words.split(",")
    with pytest.raises(ValueError, match=rf"'({first}|{second})' and '({first}|{second})' train the policy in diff"):
        module.get_config(words)


def test_nothing_rates_under_a_principle():
    with pytest.raises(ValueError, match="'constitutional' and 'panel' do not go together"):
        quickstart.get_config("panel,constitutional")


@pytest.mark.parametrize(
    ("module", "size", "machine"), [(tldr, *name) for name in presets.PRESETS] + [(smollm2, "8b", "v5e")]
)
def test_a_preset_fits_its_machine(module, size, machine):
    devices, local = {"1b": 64, "8b": 256, "70b": 512}[size], 8 if machine == "gpu" else 4
    slices = 2 if machine == "v5e" else 1
    config = parse(module.get_config(f"{size},{machine}").to_dict())
    config = override(config, {"mesh.slices": slices, "mesh.data": slices})
    placement = Placement(make_mesh(config.mesh, [Chip(i, i * slices // devices) for i in range(devices)]))
    judges = Placement(make_mesh(config.mesh.judge, [Chip(i) for i in range(local)]))
    check(config, placement.mesh, judges.mesh)
    policy, judge = (LanguageModel(model_config(weights)) for weights in (config.policy.weights, config.judge.weights))
    placement.parameters(policy)
    judges.parameters(judge, JUDGE_RULES)


def test_slices_are_set_in_one_place():
    config = tldr.get_config("8b,v5e")
    config.mesh.slices = 2
    assert parse(config.to_dict()).mesh.data == 2


@pytest.mark.parametrize(
    ("arm", "words"), [("8b", "go together"), ("v5p", "go together"), ("70b,v5e", "no room .* v5e: .* gpu, v5p")]
)
def test_half_a_preset_is_an_error(arm, words):
    with pytest.raises(ValueError, match=words):
        tldr.get_config(arm)


@pytest.mark.parametrize(
    ("name", "millions"), [("llama-3.2-1b", 1236), ("llama-3.1-8b", 8030), ("llama-3.1-70b", 70554)]
)
def test_a_shape_has_as_many_parameters_as_published(name, millions):
    model = LanguageModel(model_config(f"shape:{name}"))
    shapes = jax.tree.leaves(abstract_parameters(model, one_device()))
    assert round(sum(x.size for x in shapes) / 1e6) == millions


def test_a_shape_without_weights_can_not_be_run(tmp_path, capfd):
    flags = ["--config=configs/tldr.py:1b,v5p", f"--workdir={tmp_path}"]
    assert main(["main", *flags]) == 2
    line = "config.policy.weights: shape:llama-3.2-1b has no weights, and only python -m rlaif_jax.plan takes a shape"
    assert line in capfd.readouterr().err
    assert main(["main", *flags, "--config.policy.weights=shape:llama-9"]) == 2
    assert "unknown shape 'llama-9'; the shapes are llama-3.2-1b" in capfd.readouterr().err


@pytest.mark.parametrize("words", ["drlaif,grpo", "dpo,dpo", "best_of_n,ensemble", "dpo,rounds,panel,smoke"])
def test_words_that_go_together_are_not(words):
    check(parse(quickstart.get_config(words).to_dict()), one_device_mesh(), one_device_mesh())


@pytest.mark.parametrize(("scale", "kept"), [("", ("rl@8", "rl@16")), (",smoke", ("rl@2",))])
def test_constitutional_measures_policies_along_rl(scale, kept):
    config = parse(quickstart.get_config(f"constitutional{scale}").to_dict())
    assert config.measured_policies == ("sft", "sl_cai", *kept, "rl")
    assert parse(quickstart.get_config(f"default{scale}").to_dict()).measured_policies == ("sft", "rl")


def test_an_unknown_word_names_those_that_there_are():
    with pytest.raises(ValueError, match=r"'smok'.*rlhf.*smoke"):
        tldr.get_config("rlhf,smok")


@pytest.mark.parametrize(("module", "arm"), [(quickstart, "panel"), (tldr, "panel,smoke"), (tldr, "panel,reasoning")])
def test_the_prompts_of_a_panel_differ_and_the_rest_follows_the_judge(module, arm):
    config = module.get_config(arm)
    config.judge.weights, config.judge.rationale.max_new_tokens = "other.gguf", 7
    config.panel.judges.rating.batch_tokens = 5
    members = parse(config.to_dict()).panel.judges
    assert len({load_template(member.prompt).digest for member in members.values()}) == 3
    assert {(member.weights, member.rationale.max_new_tokens) for member in members.values()} == {("other.gguf", 7)}
    assert members["rating"].batch_tokens == 5 not in {config.judge.batch_tokens, members[min(members)].batch_tokens}


def test_a_group_with_names_of_ones_own_is_read_flattened_and_changed_by_them():
    config = parse(quickstart.get_config("panel").to_dict())
    flat = flatten(config)
    assert flat["panel.judges.rating.prompt.shots"] == 0 and "panel.judges" not in flat
    assert flatten(parse(quickstart.get_config().to_dict()))["panel.judges"] == {}
    shots = override(config, {"panel.judges.six_examples.prompt.shots": 5}).panel.judges
    assert shots["six_examples"].prompt.shots == 5 and shots["rating"] == config.panel.judges["rating"]
    assert override(config, {"panel.judges": {}}).panel.judges == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"panel.judges.ratin.dtype": "float32"}, "did you mean panel.judges.rating.dtype"),
        ({"panel.judges": {"one": {"weights": "x"}}}, "config.panel.judges.one.prompt is missing"),
        ({"panel.judges.rating.prompt.shots": "six"}, "config.panel.judges.rating.prompt.shots must be of type int"),
        ({"panel.judges": ("one",)}, "config.panel.judges must map names to groups"),
    ],
)
def test_what_is_wrong_in_such_a_group_is_named(changes, words):
    with pytest.raises(UserError, match=words):
        override(parse(quickstart.get_config("panel").to_dict()), changes)


@pytest.mark.parametrize("arm", ["default", "smoke", "hh", "hh,smoke"])
def test_labels_after_a_chain_of_thought_are_held_near_a_half(arm):
    plain, reasoned = (parse(constitutional.get_config(words).to_dict()) for words in (arm, f"cot,{arm}"))
    assert (plain.judge.prompt.chain_of_thought, plain.preferences.clamp) == (False, 0.0)
    assert (reasoned.judge.prompt.chain_of_thought, reasoned.preferences.clamp) == (True, 0.1)
    template = load_template(reasoned.judge.prompt)
    assert template.by_principle and template.preamble.count(template.reasoning.cue) == reasoned.judge.prompt.shots


@pytest.mark.parametrize("arm", ["hh", "hh,smoke"])
def test_evaluation_on_real_dialogues_has_red_team_prompts_and_others(real_data, arm):
    config = override(parse(constitutional.get_config(arm).to_dict()), {"data.root": str(real_data)})
    rows, _ = load(config.data, "evaluation_prompts", config.seed)
    red_team = [row.values["group"] in config.evaluation.red_team_groups for row in rows]
    assert 0.2 < sum(red_team) / len(rows) < 0.8
    assert len(rows) == (config.data.evaluation_prompts.limit or 325 + 807)


@pytest.mark.parametrize("arm", ["hh", "hh,smoke"])
def test_people_have_made_as_many_comparisons_as_the_judge_is_to_make(real_data, arm):
    config = override(parse(constitutional.get_config(arm).to_dict()), {"data.root": str(real_data)})
    assert config.label.source == "both"
    assert config.label.pairs <= len(load(config.data, "comparisons", config.seed)[0])


def test_red_team_prompts_that_are_not_there_are_one_line_that_names_them(tmp_path, capfd):
    flags = [f"--config.data.root={tmp_path}", f"--workdir={tmp_path}/run"]
    assert main(["main", "--config=configs/constitutional.py:hh", *flags]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and str(tmp_path) in error and "config.data.root" in error
