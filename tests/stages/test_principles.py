"""Labels under a constitution, as a user makes them with a tiny judge: one principle a pair, or all of them."""

import dataclasses
import json
import shutil
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from etils import epath

from rlaif_jax import audit, export
from rlaif_jax.errors import UserError
from rlaif_jax.files import read_json, read_json_lines, write_json, write_parquet
from rlaif_jax.judge import __main__ as judge_command
from rlaif_jax.judge import store
from rlaif_jax.judge.constitution import draw, load_constitution
from rlaif_jax.judge.prompts import Pair
from rlaif_jax.main import main
from rlaif_jax.stages import evaluate, panel, rounds
from rlaif_jax.stages.preferences import clamped, read_preferences
from rlaif_jax.stages.principles import combined, comparison_principles, draws
from rlaif_jax.stages.reward_model import _rows_by_member, check_labels_by_principle, load_reward_model
from rlaif_jax.stages.run import Run
from tests.stages.test_panel import begin, changed, opened, rows_of
from tests.tiny_judge import tiny_run_flags, write_judge

PRINCIPLES = [
    {"id": "kind", "comparison": "Choose the kinder response.", "weight": 3},
    {"id": "honest", "comparison": "Choose the response that is more honest.", "weight": 1},
    {"id": "unused", "comparison": "Choose the longer response.", "weight": 0},
    {"id": "silent", "critique": "Say what is wrong.", "revision": "Rewrite it."},
]


@pytest.fixture(scope="module")
def flags_of(tmp_path_factory):
    """workdir, how -> the flags of a run under the constitution; and those of another file of principles."""
    folder = tmp_path_factory.mktemp("judge")
    judge, file = write_judge(folder / "judge.gguf"), folder / "own.yaml"
    file.write_text(yaml.safe_dump({"principles": PRINCIPLES}))

    def flags(workdir, how, *more):
        return [
            *tiny_run_flags(judge, workdir),
            f"--config.label.principles={how}",
            f"--config.constitution.file={file}",
            "--config.judge.prompt.template=everyday_principles",
            "--config.judge.pairs_per_tree=2",
            *more,
        ]

    return flags


@pytest.fixture(scope="module")
def finished(tmp_path_factory, flags_of):
    """how -> workdir and flags of a run that has labelled that way."""
    found = {}
    for how in ("draw", "ensemble"):
        workdir = tmp_path_factory.mktemp(how) / "run"
        flags = flags_of(workdir, how)
        begin(workdir, flags)
        assert main(["main", *flags, "--stages=label"]) == 0
        found[how] = workdir, flags
    return found


def test_each_pair_is_judged_under_the_principle_that_its_row_draws_and_every_label_names_it(finished, capfd):
    workdir, flags = finished["draw"]
    run, rows = opened(finished["draw"]), rows_of(workdir / "label")
    constitution = load_constitution(run.config.constitution.file)
    drawn = draw(constitution.principles[:2], run.order_seed("principles"), range(16))
    assert [row["principle"] for row in rows] == [principle.id for principle in drawn]
    assert {"kind", "honest"} == {row["principle"] for row in rows}
    assert all(row["principle_text"] == principle.comparison for row, principle in zip(rows, drawn, strict=True))
    manifest = json.loads((workdir / "label" / "manifest.json").read_text())
    assert (manifest["constitution"], manifest["constitution_digest"]) == ("own", constitution.digest)
    assert main(["main", *flags, "--replay=any:4"]) == 0
    assert "Principle: Choose the" in capfd.readouterr().out
    assert export.main(["export", f"--workdir={workdir}", "--stage=label", f"--out={workdir / 'set'}"]) == 0
    exported = pq.read_table(workdir / "set" / "data" / "train.parquet").to_pylist()
    assert all(row["principle"] == drawn[row["row"]].id for row in exported)
    assert "under one principle a pair (column `principle`) of the constitution own" in (
        workdir / "set" / "README.md").read_text()  # fmt: skip
    figures = json.loads((workdir / "label" / "audit.json").read_text())
    used = {name: figures[f"principle_use/{name}"]["mean"] for name in ("kind", "honest")}
    assert used == {name: np.mean([row["principle"] == name for row in rows]) for name in used}
    assert not any(name.startswith(("principle_agreement", "principle_alpha")) for name in figures)


def test_an_ensemble_keeps_what_each_principle_says_and_learns_their_mean_by_weight(finished):
    workdir, _ = finished["ensemble"]
    rows, each = rows_of(workdir / "label"), rows_of(workdir / "label" / "principles")
    assert [row["principle"] for row in each] == ["kind", "honest"] * 16 and len(rows) == 16
    drawn = {
        (row["prompt"], row["response_a"], row["principle"]): row for row in rows_of(finished["draw"][0] / "label")
    }
    for i, row in enumerate(rows):
        kind, honest = each[2 * i : 2 * i + 2]
        assert row["row"] == i and row["principle"] is None
        assert row["prob_a_principles"] == {"kind": kind["prob_a"], "honest": honest["prob_a"]}
        for column in ("prob_a", "prob_a_forward", "prob_a_reversed", "answer_mass"):
            assert row[column] == pytest.approx(0.75 * kind[column] + 0.25 * honest[column])
        assert row["disagreement"] == pytest.approx(np.var([kind["prob_a"], honest["prob_a"]]))
        for one in (kind, honest):  # read together with the other principle, or by itself: the same
            alone = drawn.get((one["prompt"], one["response_a"], one["principle"]))
            assert alone is None or alone["prob_a"] == pytest.approx(one["prob_a"], abs=1e-4)
            assert alone is None or alone["hash_forward"] == one["hash_forward"]
    assert sum(kind["prob_a"] != honest["prob_a"] for kind, honest in zip(each[::2], each[1::2], strict=True)) > 8


def test_an_ensemble_of_one_principle_is_that_principle(finished):
    each = pq.read_table(finished["ensemble"][0] / "label" / "principles" / "preferences.parquet")
    one = each.take(np.arange(0, 32, 2))
    failed = one.to_pylist()
    failed[3] |= dict.fromkeys(("prob_a", "prob_a_forward", "prob_a_reversed", "answer_mass")) | {"status": "too_long"}
    one = pa.Table.from_pylist(failed, schema=store.SCHEMA)
    kind = load_constitution(opened(finished["draw"]).config.constitution.file).principles[0]
    found = combined(one, [dataclasses.replace(kind, weight=0.3)])
    for column in ("prompt", "response_a", "prob_a", "prob_a_forward", "prob_a_reversed", "answer_mass", "status"):
        assert found[column].to_pylist() == one[column].to_pylist()


def test_a_pair_has_a_label_where_most_of_the_weight_scored_it(finished):
    constitution = load_constitution(opened(finished["draw"]).config.constitution.file)
    rows = rows_of(finished["ensemble"][0] / "label" / "principles")
    lost = {"prob_a": None, "status": "too_long"}
    rows[0] |= lost  # the heavier of two
    rows[3] |= lost  # the lighter
    found = combined(pa.Table.from_pylist(rows, schema=store.SCHEMA), constitution.principles[:2]).to_pylist()
    assert (found[0]["status"], found[0]["prob_a"]) == ("too_long", None)
    assert found[1]["status"] == "ok" and found[1]["prob_a"] == pytest.approx(rows[2]["prob_a"])


def test_the_audit_of_an_ensemble_has_each_principle_and_how_far_they_agree(finished, tmp_path, capfd):
    workdir, flags = finished["ensemble"]
    figures = json.loads((workdir / "label" / "audit.json").read_text())
    each = rows_of(workdir / "label" / "principles")
    for i, name in enumerate(("kind", "honest")):
        prob_a = np.array([row["prob_a"] for row in each[i::2]])
        assert figures[f"principle_use/{name}"]["mean"] == 1
        assert figures[f"principle_decisiveness/{name}"]["mean"] == pytest.approx(np.mean(abs(2 * prob_a - 1)))
        assert figures[f"principle_share_a/{name}"]["mean"] == np.mean(prob_a > 0.5)
        assert f"principle_first_slot/{name}" in figures and f"principle_ground_truth/{name}" in figures
    assert "principle_agreement/kind/honest" in figures and figures["principle_alpha/votes"]["n"] == 16
    text = (workdir / "label" / "audit.html").read_text()
    assert "Choose the kinder response." in text and "Where they differ most" in text and "By principle" in text
    assert audit.main(["audit", f"--workdir={workdir}", f"--out={tmp_path}", "--resamples=20"]) == 0
    assert "principle_decisiveness/kind" in capfd.readouterr().out
    assert main(["main", *flags, "--replay=principles/5"]) == 0
    assert main(["main", *flags, "--replay=5"]) == 2
    assert "--replay=principles/5" in capfd.readouterr().err


@pytest.mark.slow
def test_a_kill_between_shards_and_workers_come_to_the_same_labels(finished, flags_of, tmp_path, monkeypatch):
    flags = [*flags_of(tmp_path / "run", "ensemble"), "--stages=label"]
    begin(tmp_path / "run", flags[:-1])
    judge, calls = store.judge_pairs, []

    def dying(*arguments, **more):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return judge(*arguments, **more)

    monkeypatch.setattr(store, "judge_pairs", dying)
    assert main(["main", *flags]) == 130
    own = tmp_path / "run" / "label" / "principles"
    first = {path: path.stat().st_mtime_ns for path in own.glob("shards/*")}
    assert len(first) == 2 and not (own / "preferences.parquet").exists()
    assert [main(["main", *flags, f"--worker={i}/2"]) for i in (1, 0)] == [0, 0]
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for name in ("preferences.parquet", "manifest.json", "audit.json"):
        assert (tmp_path / "run" / "label" / name).read_bytes() == (
            finished["ensemble"][0] / "label" / name).read_bytes()  # fmt: skip


def test_a_member_for_each_principle_reads_what_that_principle_says(finished):
    changes = {"reward_model__by_principle": True, "reward_model__members": 2, "preferences__clamp": 0.01}
    rows = rows_of(finished["ensemble"][0] / "label" / "principles")
    table = read_preferences(changed(opened(finished["ensemble"]), **changes))
    assert table["principle"] == ["kind", "honest"] * 16 and len(table["ended_a"]) == 32
    assert [table["prompt"], table["response_a"]] == [[row[name] for row in rows] for name in ("prompt", "response_a")]
    np.testing.assert_allclose(table["prob_a"], clamped(np.array([row["prob_a"] for row in rows]), 0.01))
    run = changed(opened(finished["draw"]), **changes)
    table = read_preferences(run)
    table["principle"][0] = None  # a label of people
    members = _rows_by_member(run, table, range(12))
    for name, chosen in zip(("kind", "honest"), members, strict=True):
        assert chosen == [row for row in range(12) if row == 0 or table["principle"][row] == name]


def test_people_and_principles_are_mixed_by_pair(finished):
    """Sisters of a label that is held out would else be trained on."""
    run = opened(finished["ensemble"])
    people = run.folder("label") / "people"
    changes = {"reward_model__by_principle": True, "label__source": "both"}
    rows = rows_of(finished["ensemble"][0] / "label")
    write_parquet(people / "candidates.parquet", pq.read_table(run.folder("label") / "candidates.parquet"))
    texts = [{name: row[name] for name in ("prompt", "response_a", "response_b")} for row in rows]
    write_parquet(people / "preferences.parquet", store.human_table([row | {"prob_a": 1.0} for row in texts]))
    table = read_preferences(changed(run, **changes))
    assert table["pair"] == sorted(table["pair"]) and len(table["pair"]) == 48 and max(table["pair"]) == 31
    by_pair = {}
    for pair, principle, prompt in zip(table["pair"], table["principle"], table["prompt"], strict=True):
        by_pair.setdefault(pair, []).append((principle, prompt))
    for found in by_pair.values():
        assert [name for name, _ in found] in (["kind", "honest"], [None]) and len({prompt for _, prompt in found}) == 1
    assert [len(found) for found in by_pair.values()] != [2] * 16 + [1] * 16  # mixed
    one_each = read_preferences(changed(run, label__source="both"))
    assert one_each["pair"] == list(range(32))
    shutil.rmtree(people)


@pytest.mark.slow
def test_rl_logs_the_reward_of_each_principle_and_its_share(flags_of, tmp_path):
    more = {"by_principle": True, "members": 2, "calibrate": False, "steps": 2, "checkpoint_every": 2}
    flags = flags_of(tmp_path / "run", "ensemble", *(f"--config.reward_model.{key}={x}" for key, x in more.items()))
    flags += ["--config.rl.steps=2", "--config.sft.steps=2", "--stages=sft,label,reward_model,rl"]
    assert main(["main", *flags]) == 0
    for line in read_json_lines(epath.Path(tmp_path) / "run" / "rl" / "metrics.jsonl"):
        names = ("kind", "honest")
        assert sum(line[f"reward/principle_share/{name}"] for name in names) == pytest.approx(1, abs=1e-4)
        means = [line[f"reward/principle/{name}"] for name in names]
        normalisation = read_json(epath.Path(tmp_path) / "run" / "reward_model" / "normalisation.json")
        offset = normalisation["mean"]
        assert normalisation["principles"] == {"kind": 3, "honest": 1} and normalisation["validation_pairs"] == 4
        assert np.array([0.75, 0.25]) @ means - offset == pytest.approx(line["reward/mean"], abs=1e-4)


@pytest.mark.slow
def test_a_judge_can_explain_itself_under_a_principle(flags_of, tmp_path):
    flags = flags_of(tmp_path / "run", "draw", "--config.judge.prompt.template=constitution")
    flags += ["--config.judge.prompt.chain_of_thought=True", "--config.judge.rationale.max_new_tokens=4"]
    flags += ["--config.judge.prompt.shots=2"]
    begin(tmp_path / "run", flags)
    assert main(["main", *flags, "--stages=label"]) == 0
    rows = rows_of(tmp_path / "run" / "label")
    assert all(row["status"] == "ok" and row["rationale_forward"] and row["principle"] for row in rows)


def test_the_command_judges_one_pair_under_a_principle(flags_of, tmp_path, capfd):
    flags = [flag for flag in flags_of(tmp_path, "draw") if not flag.startswith("--workdir")]
    texts = ["--prompt=Hi!", "--a=Scrub it.", "--b=Get lost."]
    assert judge_command.main(["judge", *flags, *texts, "--principle=honest"]) == 0
    assert "Principle: Choose the response that is more honest." in capfd.readouterr().out
    for wrong, said in ((["--principle=silent"], "must be"), ([], "is needed:")):
        assert judge_command.main(["judge", *flags, *texts, *wrong]) == 2
        assert f"{said} one of kind, honest, unused" in capfd.readouterr().err


def test_the_labels_of_each_principle_are_counted_before_they_are_made(finished):
    changes = {"reward_model__by_principle": True, "reward_model__members": 2, "reward_model__batch_size": 1}
    run = changed(opened(finished["draw"]), **changes)
    check_labels_by_principle(run)
    drawn = [row["principle"] for row in rows_of(finished["draw"][0] / "label")][:12]  # the last 4 are held out
    count = drawn.count("honest")
    check_labels_by_principle(changed(run, reward_model__batch_size=count))
    wrong = changed(run, reward_model__batch_size=count + 1)
    with pytest.raises(UserError, match=f"the principle honest has {count} labels to learn from, fewer than a batch"):
        check_labels_by_principle(wrong)
    check_labels_by_principle(changed(wrong, label__principles="ensemble"))
    check_labels_by_principle(changed(wrong, label__source="both"))  # every member learns those of people


def test_a_trained_reward_model_keeps_its_principles(finished, tmp_path, monkeypatch):
    """The file of the constitution may have changed since, or be gone."""
    changes = {"reward_model__by_principle": True, "reward_model__members": 2, "constitution__file": "gone.yaml"}
    run = dataclasses.replace(changed(opened(finished["draw"]), **changes), workdir=epath.Path(tmp_path))
    monkeypatch.setattr(Run, "trained_params", lambda self, *arguments: {})
    file, kept = run.folder("reward_model") / "normalisation.json", {"mean": 0.5, "scale": 2.0, "member_means": [1, 2]}
    write_json(file, kept | {"principles": {"kind": 3.0, "honest": 1.0}})
    found = load_reward_model(run)
    assert found.principles == ("kind", "honest")
    np.testing.assert_allclose(found.weights, [0.75, 0.25])
    write_json(file, kept)
    with pytest.raises(UserError, match="without the principles of its members"):
        load_reward_model(run)


def test_evaluation_draws_the_same_principles_in_every_round_and_names_those_left_out_once(
    finished, tmp_path, monkeypatch, capfd
):
    run, table = opened(finished["draw"]), pq.read_table(finished["draw"][0] / "label" / "preferences.parquet")
    run, drawn = dataclasses.replace(run, workdir=epath.Path(tmp_path)), table["principle"].to_pylist()
    pairs = [Pair(row["prompt"], row["response_a"], row["response_b"]) for row in table.to_pylist()]
    asked = []

    def label(judge, pairs, *more):
        asked.append([pair.principle for pair in pairs])
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "label", label)
    judge = types.SimpleNamespace(template=types.SimpleNamespace(by_principle=True))
    for module in (panel, evaluate):
        monkeypatch.setattr(module, "load_judge", lambda *arguments: judge)
    for number in (1, 2):
        evaluation = run.in_round(number)
        write_parquet(evaluation.folder("eval") / "preferences.parquet", table)
        judged = evaluate._labeller(evaluation)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                judged(pairs, evaluation.folder("eval"), "evaluate")
        assert capfd.readouterr().out == "eval: principles never drawn: weight 0: unused; no comparison: silent\n"
        with pytest.raises(KeyboardInterrupt):
            rounds._proxy(run, number, comparison_principles(run, "rounds"))
        capfd.readouterr()
    assert asked == [drawn] * 6
    assert draws(run.in_round(2)) != draws(run)  # the labels of each round draw anew


BAD = {
    "too few labels of a principle": (
        ["--config.reward_model.by_principle=True", "--config.reward_model.members=2"],
        "the principle honest has",
    ),
    "no constitution": (["--config.constitution.file="], "label.principles=draw needs constitution.file"),
    "no such file": (["--config.constitution.file=asistant"], "did you mean assistant"),
    "no such tag": (["--config.constitution.tags=('kind',)"], "has the tag 'kind': known are none"),
    "a judge that is not asked": (["--config.judge.prompt.template=everyday_requests"], "has no {principle}"),
    "a judge that is asked without": (["--config.label.principles=none"], "set label.principles to draw"),
    "no such way": (["--config.label.principles=all"], "label.principles='all' must be none, draw or ensemble"),
    "members that are not those of the principles": (
        ["--config.reward_model.by_principle=True"],
        "reward_model.members=1 must be 2 with by_principle, one for each principle",
    ),
    "members by principle without": (
        [
            "--config.reward_model.by_principle=True",
            "--config.label.principles=none",
            "--config.constitution.file=",
            "--config.judge.prompt.template=everyday_requests",
        ],
        "needs labels by principle",
    ),
    "a clamp of hard labels": (["--config.preferences.clamp=0.1", "--config.preferences.hard=True"], "unset one"),
    "a clamp that is none": (["--config.preferences.clamp=0.5"], "preferences.clamp=0.5 must be from 0 to below 0.5"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_can_not_be_judged_under_is_one_clear_line_before_any_work(flags_of, tmp_path, capfd, case):
    flags, words = BAD[case]
    assert main(["main", *flags_of(tmp_path / "run", "draw"), *flags]) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_clamped_labels_are_in_range_and_do_not_depend_on_the_order():
    prob_a = np.random.default_rng(0).uniform(0, 1, 1000)
    for width in (0.1, 0.25, 0.3):
        found = clamped(prob_a, width)
        assert np.all((found >= 0.5 - width) & (found <= 0.5 + width))
        np.testing.assert_allclose(clamped(1 - prob_a, width), 1 - found, rtol=0, atol=1e-15)
        inside = abs(prob_a - 0.5) < width
        np.testing.assert_allclose(found[inside], prob_a[inside], rtol=0, atol=1e-15)
    assert clamped(prob_a, 0.0) is prob_a
