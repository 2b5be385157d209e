"""A panel of three prompts of a tiny judge, as a user runs it: what it writes, and what is learned from it."""

import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from absl import flags
from etils import epath

from rlaif_jax import audit, export
from rlaif_jax.commands import parse_flags
from rlaif_jax.config import override, parse
from rlaif_jax.data import embedded
from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.panel import combine
from rlaif_jax.files import write_json, write_parquet
from rlaif_jax.judge import store
from rlaif_jax.main import main
from rlaif_jax.stages import panel
from rlaif_jax.stages.evaluate import _is_training_judge
from rlaif_jax.stages.pipeline import is_done, stage_inputs
from rlaif_jax.stages.preferences import read_preferences
from rlaif_jax.stages.run import open_run
from tests.tiny_judge import tiny_run_flags, write_judge

MEMBERS = ["four_examples", "rating", "six_examples"]


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    return write_judge(tmp_path_factory.mktemp("judge") / "other.gguf", seed=1)


def flags_of(judge, other, workdir):
    flags = tiny_run_flags(judge, workdir)[1:]
    return ["--config=configs/quickstart.py:panel", *flags, f"--config.panel.judges.four_examples.weights={other}"]


def begin(workdir, flags):
    """What the label stage reads: candidates, and the record of an SFT stage that need not run."""
    run = opened((workdir, flags))
    write_json(run.record("sft"), {"done": True, "config": stage_inputs(run, "sft")})
    corpus = embedded.generate(run.config.data.embedded, 0)
    replies = [item.reply for item in corpus.demonstrations[:32]]
    pairs = {"prompt": [item.prompt.text for item in corpus.demonstrations[:16]]}
    pairs |= {"response_a": replies[:16], "response_b": replies[16:], "ended_a": [True] * 16, "ended_b": [True] * 16}
    write_parquet(run.folder("label") / "candidates.parquet", pa.table(pairs))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, judge, other):
    workdir = tmp_path_factory.mktemp("panel") / "run"
    flags = flags_of(judge, other, workdir)
    begin(workdir, flags)
    assert main(["main", *flags, "--stages=label"]) == 0
    return workdir, flags


@pytest.fixture
def begun(judge, other, tmp_path):
    """A run that has not labelled, and the flags that do."""
    flags = flags_of(judge, other, tmp_path / "run")
    begin(tmp_path / "run", flags)
    return tmp_path / "run", [*flags, "--stages=label"]


def opened(finished):
    options = parse_flags(["main", *finished[1]], "", flags.FlagValues())
    return open_run(parse(options.config.to_dict()), epath.Path(finished[0]))


@pytest.fixture(scope="module")
def run(finished):
    return opened(finished)


def changed(run, **changes):
    changes = {name.replace("__", "."): value for name, value in changes.items()}
    return dataclasses.replace(run, config=override(run.config, changes))


def rows_of(folder):
    return pq.read_table(folder / "preferences.parquet").to_pylist()


def test_the_label_is_what_the_members_say_together(finished):
    label = finished[0] / "label"
    members = {name: rows_of(label / "panel" / name) for name in MEMBERS}
    rows = rows_of(label)
    assert len(rows) == 16
    for i, row in enumerate(rows):
        said = {name: members[name][i]["prob_a"] for name in MEMBERS}
        assert row["prob_a_members"] == said
        assert row["prompt"] == members["rating"][i]["prompt"]
        assert row["status"] == "ok" and len(set(said.values())) == 3
        assert row["prob_a"] == pytest.approx(np.mean(list(said.values())))
        assert row["disagreement"] == pytest.approx(np.var(list(said.values())))
        assert row["judge"] == "panel: four_examples, rating, six_examples"
        assert row["prob_a_forward"] is None  # ratings have no orders
        assert row["tokens_forward"] == sum(members[name][i]["tokens_forward"] for name in MEMBERS)
    manifest = json.loads((label / "manifest.json").read_text())
    hashes = {name: manifest["members"][name]["judge_hash"] for name in MEMBERS}
    assert hashes["rating"] == hashes["six_examples"] != hashes["four_examples"]
    assert manifest["rows"] == 16 and manifest["status"] == {"ok": 16}


def test_the_audit_has_the_members_and_the_commands_read_it(finished, tmp_path, capfd):
    figures = json.loads((finished[0] / "label" / "audit.json").read_text())
    assert {f"panel_without/{name}/alpha/votes" for name in MEMBERS} <= set(figures)
    assert figures["panel_alpha/prob_a"]["n"] == 16 and "panel_member/rating/ground_truth" in figures
    assert "the panel without rating" in (finished[0] / "label" / "audit.html").read_text()
    assert audit.main(["audit", f"--workdir={finished[0]}", f"--out={tmp_path}", "--next=3", "--resamples=20"]) == 0
    assert "panel_member/rating/with_others" in capfd.readouterr().out
    table = pq.read_table(finished[0] / "label" / "preferences.parquet").drop_columns("combine")
    pq.write_table(table, tmp_path / "broken.parquet")
    assert audit.main(["audit", f"--labels={tmp_path / 'broken.parquet'}"]) == 2
    assert "row 0: prob_a_members and combine must be as a panel writes them" in capfd.readouterr().err
    assert export.main(["export", f"--workdir={finished[0]}", "--stage=label", f"--out={tmp_path / 'set'}"]) == 0
    assert "labelled by a panel of AI judges" in (tmp_path / "set" / "README.md").read_text()


def test_a_row_is_replayed_by_member(finished, capfd):
    assert main(["main", *finished[1], "--replay=four_examples/3"]) == 0
    assert "same label" in capfd.readouterr().out
    for rows in ("3", "five/3"):
        assert main(["main", *finished[1], f"--replay={rows}"]) == 2
        error = capfd.readouterr().err
        assert "label/panel/NAME" in error and "--replay=NAME/3" in error and "six_examples" in error


def test_members_with_orders_have_a_mean_of_each(finished):
    folders = {name: epath.Path(finished[0]) / "label" / "panel" / name for name in ("four_examples", "six_examples")}
    rows = panel._combined(folders, {}, "mean").to_pylist()
    each = [rows_of(folder) for folder in folders.values()]
    for i, row in enumerate(rows):
        for order in ("forward", "reversed"):
            assert row[f"prob_a_{order}"] == pytest.approx(np.mean([rows[i][f"prob_a_{order}"] for rows in each]))


NOTHING = {"status": "too_long"} | dict.fromkeys(("prob_a", "prob_a_forward", "prob_a_reversed", "answer_mass"))


def edited(source, folder, name, changes):
    """A copy of a member's labels with other values in some rows."""
    rows = rows_of(source)
    for row, values in changes.items():
        rows[row] |= values
    (folder / name).mkdir(parents=True)
    schema = pq.read_schema(source / "preferences.parquet")
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / name / "preferences.parquet")
    return epath.Path(folder / name)


def test_a_pair_that_most_members_could_not_score_has_no_label_and_one_that_few_could_not_has(finished, tmp_path):
    same = NOTHING | {"status": "identical", "response_b": rows_of(finished[0] / "label")[2]["response_a"]}
    lost = {
        "four_examples": {0: NOTHING, 1: NOTHING, 2: same},
        "rating": {1: NOTHING, 2: same},
        "six_examples": {2: same},
    }
    folders = {name: edited(finished[0] / "label" / "panel" / name, tmp_path, name, lost[name]) for name in MEMBERS}
    rows = panel._combined(folders, {}, "minimum").to_pylist()
    assert [row["status"] for row in rows[:4]] == ["ok", "panel_unscored", "identical", "ok"]
    some = [rows[0]["prob_a_members"][name] for name in MEMBERS[1:]]
    assert rows[0]["prob_a_members"]["four_examples"] is None
    assert rows[0]["prob_a"] == pytest.approx(combine(np.array(some)[:, None], "minimum")[0])
    for row in rows[1:3]:
        assert row["prob_a"] is row["disagreement"] is row["vote_entropy"] is None
    assert rows[1]["prob_a_members"]["six_examples"] is not None


def test_a_panel_of_which_too_much_is_unscored_stops_the_stage(finished, run, tmp_path, monkeypatch):
    monkeypatch.setattr(panel, "_label_by_member", lambda *_: None)
    for i, name in enumerate(MEMBERS):
        own = edited(finished[0] / "label" / "panel" / name, tmp_path / "panel", name, {5: NOTHING} if i else {})
        shutil.copy(finished[0] / "label" / "panel" / name / "manifest.json", own)
    with pytest.raises(UserError, match=r"6\.2%.*'panel_unscored': 1.*max_failure_rate=0\.02"):
        panel.label_by_panel(run, [], epath.Path(tmp_path), "label")
    panel.label_by_panel(changed(run, judge__max_failure_rate=0.1), [], epath.Path(tmp_path), "label")
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == {"ok": 15, "panel_unscored": 1}


@pytest.mark.slow
def test_a_killed_panel_goes_on_with_two_workers_and_ends_as_an_undisturbed_one(finished, begun, monkeypatch, capfd):
    loaded, load = [], panel.load_judge

    def dying(config, *rest):
        loaded.append(config.prompt.method)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return load(config, *rest)

    monkeypatch.setattr(panel, "load_judge", dying)
    assert main(["main", *begun[1]]) == 130
    first = {path: path.stat().st_mtime_ns for path in (begun[0] / "label" / "panel").glob("*/shards/*")}
    assert len(first) == 4 and loaded == ["pairwise", "rating"]
    assert [main(["main", *begun[1], f"--worker={i}/2"]) for i in (1, 0)] == [0, 0]
    assert capfd.readouterr().out.count("this worker is done") == 1
    assert {path: path.stat().st_mtime_ns for path in first} == first
    for name in ("preferences.parquet", "manifest.json", "audit.json", "audit.html"):
        assert (begun[0] / "label" / name).read_bytes() == (finished[0] / "label" / name).read_bytes()


@pytest.mark.slow
def test_a_label_file_that_is_gone_is_put_together_again(finished):
    file = finished[0] / "label" / "preferences.parquet"
    run, before = opened(finished), file.read_bytes()
    assert is_done(run, "label")
    file.unlink()
    assert not is_done(run, "label")
    assert main(["main", *finished[1], "--stages=label"]) == 0
    assert file.read_bytes() == before


def test_pairs_on_which_the_panel_disagrees_count_less_or_not_at_all(finished, run, capfd):
    rows = rows_of(finished[0] / "label")
    variance = np.array([row["disagreement"] for row in rows])
    plain = read_preferences(run)
    assert plain["weight"] == [1.0] * 16 and plain["prob_a"] == [row["prob_a"] for row in rows]
    weighted = read_preferences(changed(run, panel__disagreement="weight"))
    np.testing.assert_allclose(weighted["weight"], 1 - 4 * variance)
    assert weighted["prob_a"] == plain["prob_a"]
    limit = float(np.median(variance))
    kept = read_preferences(changed(run, panel__disagreement="filter", panel__max_disagreement=limit))
    assert kept["prob_a"] == [row["prob_a"] for row in rows if row["disagreement"] <= limit]
    assert kept["weight"] == [1.0] * len(kept["prob_a"]) and 0 < len(kept["prob_a"]) < 16
    assert f"labels: {16 - len(kept['prob_a'])} of 16 left out" in capfd.readouterr().out


def test_labels_of_people_beside_those_of_a_panel_count_whole(finished, run, tmp_path):
    shutil.copytree(finished[0] / "label", tmp_path / "label")
    comparison = {"prompt": "Hi!", "response_a": "a", "response_b": "b", "prob_a": 1.0}
    people = epath.Path(tmp_path) / "label" / "people"
    write_parquet(people / "preferences.parquet", store.human_table([comparison] * 3))
    write_parquet(people / "candidates.parquet", pa.table({"ended_a": [True] * 3, "ended_b": [True] * 3}))
    copy = dataclasses.replace(run, workdir=epath.Path(tmp_path))
    found = read_preferences(changed(copy, panel__disagreement="weight", label__source="both"))
    weights = {prompt: [w for p, w in zip(found["prompt"], found["weight"], strict=True) if (p == "Hi!") is prompt]
               for prompt in (True, False)}  # fmt: skip
    assert weights[True] == [1.0] * 3 and len(weights[False]) == 16 and max(weights[False]) < 1


def test_stages_depend_on_what_of_the_panel_they_use(run):
    def differs(stage, **changes):
        return stage_inputs(run, stage) != stage_inputs(changed(run, **changes), stage)

    weighted = {"panel__disagreement": "weight"}
    assert [differs(stage, **weighted) for stage in ("sft", "label", "reward_model")] == [False, False, True]
    assert differs("label", panel__combine="majority") and differs("label", panel__judges__rating__dtype="bfloat16")
    assert not differs("sft", panel__judges__rating__dtype="bfloat16")
    assert not any(differs("label", **{f"panel__judges__rating__{field}": value}) for field, value in (
        ("batch_tokens", 64), ("max_failure_rate", 0.5), ("cache", "x"), ("buckets", 1)))  # fmt: skip
    alone = changed(run, panel__judges={})
    assert stage_inputs(alone, "label") == stage_inputs(changed(alone, panel__combine="majority"), "label")
    assert stage_inputs(run, "label")["panel.judges.rating.prompt.hash"]


def test_a_judge_that_evaluates_is_a_training_judge_if_any_member_has_its_weights(finished, run, judge, other):
    for weights in (judge, other):
        member = next(m for m in json.loads((finished[0] / "label" / "manifest.json").read_text())["members"].values()
                      if m["judge"] == weights)  # fmt: skip
        assert _is_training_judge(run, {"judge": weights, "judge_hash": member["judge_hash"]})
    assert not _is_training_judge(run, {"judge": "larger.gguf", "judge_hash": "x"})


BAD = {
    "weights without a panel": (
        ["--config=configs/quickstart.py", "--config.panel.disagreement=weight"],
        "panel.disagreement=weight needs judges in panel.judges",
    ),
    "nobody to combine": (
        ["--config=configs/quickstart.py", "--config.panel.combine=majority"],
        "panel.combine=majority needs judges in panel.judges",
    ),
    "no such rule": (["--config.panel.combine=median"], "panel.combine='median' must be one of mean"),
    "a limit that no variance reaches": (["--config.panel.max_disagreement=0.3"], "from 0 to 0.25"),
    "an order that ratings have not": (["--config.preferences.order=forward"], "judges.rating.prompt.method=rating"),
    "labels of people alone": (["--config.label.source=human"], "panel.judges would label nothing"),
    "a member's field": (["--config.panel.judges.rating.batch_tokens=0"], "panel.judges.rating.batch_tokens=0"),
    "a member's weights": (["--config.panel.judges.rating.weights=/no.gguf"], "panel.judges.rating.weights"),
    "a member's length": (["--config.panel.judges.rating.max_length=9999"], "panel.judges.rating.max_length=9999"),
    "a member's template": (["--config.panel.judges.rating.prompt.template=no"], "panel.judges.rating.prompt.template"),
    "a member's samples": (["--config.panel.judges.rating.rationale.samples=2"], "rating.rationale.samples=2"),
    "no such member": (["--config.panel.judges.ratings.dtype=float32"], "panel.judges.ratings.dtype"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_panel_that_can_not_label_is_one_clear_line_before_any_work(judge, tmp_path, capfd, case):
    flags, words = BAD[case]
    config = [] if flags[0].startswith("--config=") else ["--config=configs/quickstart.py:panel"]
    assert main(["main", *config, *flags, *tiny_run_flags(judge, tmp_path)[1:]]) == 2
    error = capfd.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "sft").exists()
