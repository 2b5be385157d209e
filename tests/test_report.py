"""The report of a run: its verdict, and a page that stands alone whatever the models wrote."""

import base64
import hashlib
import html
import json
import re
import shutil
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.evaluation.principles import principle_audit
from rlaif_jax.report import main, write_report
from rlaif_jax.reporting import read as reading
from rlaif_jax.reporting.calibration import calibrate
from rlaif_jax.reporting.checks import run_checks
from rlaif_jax.reporting.read import read_run
from rlaif_jax.reporting.verdict import judge
from rlaif_jax.stages import pipeline
from tests.helpers import STAGES
from tests.report_run import HOSTILE, figure, figures, write, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(run):
    return write_report(epath.Path(run)).read_text()


class Page(HTMLParser):
    """The elements, the attributes and the visible text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.elements: list[tuple[str, dict]] = []
        self.text, self._raw = "", None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._raw = None

    def handle_data(self, data):
        if not self._raw:
            self.text += data.replace("\N{NO-BREAK SPACE}", " ")


def read(folder):
    return read_run(epath.Path(folder))


def verdict_on(tmp_path, results, **config):
    return judge(read(write_run(tmp_path, results, {f"judge.{name}": value for name, value in config.items()})))


WIN, TIE, LOSS = figure(0.8, 0.72, 0.88), figure(0.55, 0.45, 0.65), figure(0.2, 0.12, 0.28)
GOOD, SAME, BAD = figure(0.6, 0.5, 0.69), figure(0.33, 0.24, 0.43), figure(0.05, 0.01, 0.1)
VERDICTS = {
    "win": (WIN, GOOD, "good", "RL improved the replies", "80% [72, 88] of held-out prompts, n = 96"),
    "win unconfirmed": (WIN, SAME, "mixed", "does not confirm", "does not confirm it: 30% [22, 40] of the SFT"),
    "gamed judge": (WIN, BAD, "bad", "got worse", "The ground truth differs"),
    "loss": (LOSS, BAD, "bad", "RL made the replies worse", "interval lies below 50%"),
    "loss unconfirmed": (LOSS, SAME, "bad", "prefers the SFT replies", "that may be chance"),
    "inconclusive": (TIE, SAME, "unclear", "No difference between RL and SFT is shown", "interval holds 50%"),
    "no ground truth": (WIN, None, "good", "The judge prefers the RL replies", "has no ground truth"),
    "nothing scored": (figure(None, None, None, 0), GOOD, "open", "No verdict", "none of the evaluation pairs"),
}


@pytest.mark.parametrize("case", VERDICTS)
def test_the_verdict_says_what_the_figures_say(case, tmp_path):
    win, good, tone, heading, sentence = VERDICTS[case]
    changes = {"win_rate/rl_vs_sft": win, "ground_truth_good/rl": good}
    verdict = verdict_on(tmp_path, figures(**changes))
    assert verdict.tone == tone and heading in verdict.heading
    assert sentence in " ".join(verdict.sentences).replace("\N{NO-BREAK SPACE}", " ")


@pytest.mark.parametrize(
    ("good", "tone", "heading"),
    [(SAME, "unclear", "nothing improved, as it should be"), (GOOD, "bad", "The negative control failed")],
)
def test_a_negative_control_passes_where_nothing_improves(good, tone, heading, tmp_path):
    results = figures(**{"win_rate/rl_vs_sft": TIE, "ground_truth_good/rl": good})
    verdict = verdict_on(tmp_path, results, shuffle_weights=True)
    assert verdict.tone == tone and heading in verdict.heading


def test_an_interval_that_touches_one_half_decides_nothing(tmp_path):
    touching = figure(0.6, 0.5, 0.7)
    assert (
        verdict_on(tmp_path, figures(**{"win_rate/rl_vs_sft": touching, "ground_truth_good/rl": SAME})).tone
        == "unclear"
    )


def test_an_alarm_qualifies_the_verdict(tmp_path):
    verdict = verdict_on(tmp_path, figures(**{"distinct_2/rl": figure(0.2, 0.18, 0.22)}))
    assert verdict.tone == "mixed" and verdict.heading == "RL improved the replies, with an alarm"


def levels(folder):
    return {check.name: check.level for check in run_checks(read(folder))}


def test_a_sound_run_raises_no_alarm(run):
    found = levels(run)
    assert found.pop("Independent judge") == "note"
    assert set(found.values()) == {"ok"}


ALARMS = {
    "Diversity": {"distinct_2/rl": figure(0.31 * 0.79, 0.2, 0.3)},
    "Repetition": {"most_common_reply/rl": figure(6 / 96, 0.05, 0.08)},
    "Length": {"response_length/rl": figure(30, 29, 31)},
}


@pytest.mark.parametrize("name", ALARMS)
def test_each_alarm_is_raised_alone(name, tmp_path):
    found = levels(write_run(tmp_path, figures(**ALARMS[name])))
    assert [check for check, level in found.items() if level == "alarm"] == [name]


def test_one_reply_given_once_is_no_repetition(tmp_path):
    assert (
        levels(write_run(tmp_path, figures(**{"most_common_reply/rl": figure(1 / 8, 0.1, 0.2, 8)})))["Repetition"]
        == "ok"
    )


def test_a_reward_model_at_chance_raises_an_alarm(tmp_path):
    file = write_run(tmp_path) / "reward_model" / "normalisation.json"
    sound = {"mean": 0, "std": 1, "n": 96, "scale": 0.9, "validation_loss": 0.66, "validation_pairs": 48}
    for change, level in (
        ({"validation_accuracy": 0.875}, "ok"),
        ({"validation_accuracy": 0.6}, "alarm"),  # 29 of 48: the interval holds a half
        ({"validation_accuracy": 0.875, "scale": 0.001}, "alarm"),
        ({"validation_pairs": 0}, "open"),
    ):
        write(file, sound | change)
        assert levels(tmp_path)["Reward model"] == level, change


def test_pairs_that_could_not_be_scored_are_named(tmp_path):
    file = write_run(tmp_path) / "label" / "manifest.json"
    for failed, level in ((1, "note"), (3, "alarm")):  # of 100, where 2 in a hundred are allowed
        write(file, {"rows": 100, "status": {"ok": 90 - failed, "identical": 10, "too_long": failed}})
        check = next(check for check in run_checks(read(tmp_path)) if check.name == "Labels")
        assert check.level == level and f"{failed} too_long" in check.text and "10 pairs" in check.text


def test_a_judge_that_is_right_beyond_its_probabilities_is_less_sure_than_it_could_be(page):
    rows = [{"prompt": "", "response_a": a, "response_b": b, "status": "ok", "prob_a": 0.6 if a == "good" else 0.4}
            for a, b in [("good", "bad"), ("bad", "good")] * 20 + [("good", "good")] * 5]  # fmt: skip
    found = calibrate(rows, lambda prompt, reply: reply == "good")
    assert found.n == 40 and found.accuracy["mean"] == 1 and found.confidence == pytest.approx(0.6)
    assert found.bins[0].probability == pytest.approx(0.4) and found.bins[0].good["mean"] == 0
    assert found.bins[-1].probability == pytest.approx(0.6) and found.bins[-1].good["mean"] == 1
    assert "it is less sure than it could be" in page


def test_the_page_stands_alone(page):
    parsed = Page(page)
    for tag, attributes in parsed.elements:
        assert tag not in ("img", "iframe", "object", "embed", "base", "audio", "video"), tag
        assert "src" not in attributes
        href = attributes.get("href")
        assert href is None or href == "data:," or href.startswith("#"), href
        assert not any(name.startswith("on") for name in attributes), attributes
    assert not re.search(r"url\((?!#)|@import", page)
    assert not re.search(r"https?:", page)
    assert page.isascii() and len(page) < 1_000_000


def test_what_a_model_wrote_is_text(page):
    parsed = Page(page)
    assert parsed.text.count(HOSTILE) == 8 + 1  # both replies to every other of 8 prompts, and one prompt
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 1 == [tag for tag, _ in parsed.elements].count("script")
    assert "alert" not in scripts[0]
    policy = next(a["content"] for _, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy


def test_a_path_is_text_too(tmp_path):
    folder = tmp_path / "<b>run"
    folder.mkdir()
    write(folder / "config.json", {"config": {"seed": 0, "x.y": HOSTILE}})
    page = write_report(epath.Path(folder)).read_text()
    assert "b" not in [tag for tag, _ in Page(page).elements] and "script" not in [t for t, _ in Page(page).elements]


def test_ids_are_unique(page):
    ids = [attributes["id"] for _, attributes in Page(page).elements if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_the_same_run_makes_the_same_page(run, page):
    assert write_report(epath.Path(run)).read_text() == page


def test_the_stages_are_those_of_the_pipeline():
    assert tuple(pipeline.STAGES) == (*reading.STAGES, "rounds")  # whose figure the page shows by itself


@pytest.mark.parametrize("done", [0, 2, 4])
def test_a_partial_run_says_what_is_missing(done, run, tmp_path):
    shutil.copy(run / "config.json", tmp_path)
    for stage in STAGES[:done]:
        shutil.copytree(run / stage, tmp_path / stage)
    text = Page(write_report(epath.Path(tmp_path)).read_text()).text
    assert "No verdict yet" in text
    for stage in STAGES:
        assert (f"The {stage} stage has not run" in text) == (stage in STAGES[done:]), stage
    assert f"--workdir={tmp_path} --stages={','.join(STAGES[done:])}" in text


def test_a_page_of_a_run_with_rounds_says_how_far_the_next_one_is_and_what_goes_on_with_it(tmp_path):
    run = write_run(tmp_path / "run", config={"rounds": 2})
    for stage, done in {"label": True, "reward_model": False}.items():
        write(run / "round2" / stage / "stage.json", {"done": done, "config": {}})
    text = Page(write_report(epath.Path(run)).read_text()).text
    states = "Labels done, Reward model unfinished, RL not run, Evaluation not run"
    assert f"Round 2 of 2: {states}. What follows is of round 1." in text
    assert f"python -m rlaif_jax.main --config=configs/NAME.py --workdir={run}\n" in text
    for stage in ("label", "reward_model", "rl", "eval"):
        write(run / "round2" / stage / "stage.json", {"done": True, "config": {}})
    assert "The comparison of the rounds: not run." in Page(write_report(epath.Path(run)).read_text()).text
    write(run / "rounds" / "stage.json", {"done": True, "config": {}})
    assert "goes on with it" not in Page(write_report(epath.Path(run)).read_text()).text


def test_a_stage_that_was_stopped_is_unfinished(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "eval")
    write(tmp_path / "rl" / "stage.json", {"done": False})
    metrics = tmp_path / "rl" / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])  # in the middle of a line
    text = Page(write_report(epath.Path(tmp_path)).read_text()).text
    assert re.search(r"RL unfinished\s+.\s+11 steps", text)


def test_a_run_without_ground_truth_says_so(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    results = {name: value for name, value in figures().items() if "ground_truth" not in name}
    write(tmp_path / "eval" / "results.json", results | {"reward_model_accuracy/experts": figure(0.7, 0.6, 0.8)})
    write(tmp_path / "label" / "audit.json", {"first_slot_rate": figure(0.4, 0.3, 0.5)})
    parsed = Page(write_report(epath.Path(tmp_path)).read_text())
    assert "This run has no ground truth" in parsed.text and "no reliability diagram" in parsed.text
    assert "reward_model_accuracy/experts" in parsed.text and "good replies (ground truth)" not in parsed.text
    assert not any("badge" in (attributes.get("class") or "") for _, attributes in parsed.elements)


def test_a_judge_that_names_one_slot_whatever_is_in_it_is_noted(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    audit = json.loads((tmp_path / "label" / "audit.json").read_text())
    for share, noted in ((0.96, True), (0.5, False)):
        write(tmp_path / "label" / "audit.json", audit | {"same_slot_in_both_orders": figure(share, share, share)})
        text = Page(write_report(epath.Path(tmp_path)).read_text()).text
        assert ("names the same slot in both orders on 96% of the pairs" in text) == noted


def test_labels_by_people_have_no_judge_to_calibrate(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "label" / "audit.json").unlink()
    write(tmp_path / "label" / "manifest.json", {"judge": "human", "rows": 40, "status": {"ok": 40}})
    results = {name: value for name, value in figures().items() if "ground_truth" not in name}
    write(tmp_path / "eval" / "results.json", results | {"judge_agreement/human": figure(0.7, 0.6, 0.8)})
    text = Page(write_report(epath.Path(tmp_path)).read_text()).text
    assert "are comparisons by people" in text and "Reliability" not in text
    assert "sides with the reply that people prefer on 70% [60, 80] of 96 such pairs" in text


def test_a_cell_of_a_sweep_reads_the_stages_that_it_shares(run, page, tmp_path):
    cell = tmp_path / "cells" / "arm" / run.name
    shutil.copytree(run, cell)
    (cell / "sft").rename(tmp_path / "shared")
    assert read(cell).stages["sft"] == "not run"
    write(cell / "cell.json", {"stages": {"sft": "shared"}})
    assert write_report(epath.Path(cell)).read_text() == page


DAMAGE = {
    "eval/results.json": lambda data: data[:50],
    "label/audit.json": lambda data: b"[]",
    "reward_model/normalisation.json": lambda data: b"3",
    "eval/samples.parquet": lambda data: data[:100],
    "label/preferences.parquet": lambda data: b"",
    "rl/metrics.jsonl": lambda data: data.replace(b"}", b"", 1),
    "label/manifest.json": lambda data: b"{}",
    "reward_model/metrics.jsonl": lambda data: b"\xff\n" + data,
    "sft/metrics.jsonl": lambda data: b"[1]\n" + data,
    "config.json": lambda data: b"{",
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named_on_one_line(name, run, tmp_path, capfd):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).write_bytes(DAMAGE[name]((tmp_path / name).read_bytes()))
    assert main(["report", str(tmp_path)]) == 2
    message = capfd.readouterr().err
    assert len(message.splitlines()) == 1 and name in message and "is damaged" in message


def test_a_folder_that_takes_no_page_is_named(run, tmp_path, capfd):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    (tmp_path / "report.html").unlink(missing_ok=True)
    (tmp_path / "report.html").mkdir()
    assert main(["report", str(tmp_path)]) == 2
    assert "can't be written" in capfd.readouterr().err


def test_a_figure_without_its_interval_is_damage(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    write(tmp_path / "eval" / "results.json", {"win_rate/rl_vs_sft": {"mean": 0.5}})
    with pytest.raises(UserError, match="win_rate/rl_vs_sft is no figure"):
        read(tmp_path)


@pytest.mark.parametrize("arguments", [[], ["--all"], ["a", "b"], ["/nowhere"]])
def test_bad_usage_is_one_line(arguments, capfd):
    assert main(["report", *arguments]) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_the_command_prints_the_path_of_the_page(run, capfd):
    assert main(["report", str(run)]) == 0
    assert capfd.readouterr().out.strip() == str(run / "report.html")
    assert main(["report", "--help"]) == 0 and "RUN/report.html" in html.unescape(capfd.readouterr().out)


def test_principles_have_a_section_curves_and_a_link_to_the_audit(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    file = tmp_path / "label" / "preferences.parquet"
    rows = [row | {"principle": "kind" if i % 2 else "fair", "principle_text": f"Choose {HOSTILE}"}
            for i, row in enumerate(pq.read_table(file).to_pylist())]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), file)
    found = principle_audit(pq.read_table(file).to_pydict(), 20, 0, ("kind", "fair", "idle"))
    found |= {"principle_alpha/votes": figure(0.31, 0.2, 0.4), "people/principle_use/kind": figure(0.5, 0.4, 0.6)}
    write(tmp_path / "label" / "audit.json", found | {"first_slot_rate": figure(0.4, 0.3, 0.5)})
    (tmp_path / "label" / "audit.html").write_text("")
    lines = [{"step": i, "reward/mean": 0.1, "reward/principle/kind": 0.2, "reward/principle_share/kind": 0.7}
             for i in range(3)]  # fmt: skip
    (tmp_path / "rl" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = Page(write_report(epath.Path(tmp_path)).read_text())
    assert "principle_" not in page.text.replace("reward/principle_share/kind", "")
    assert {"href": "label/audit.html"} in [attributes for _, attributes in page.elements]
    for words in ("By principle", "For and against", "reward/principle/kind", f"kind: Choose {HOSTILE}", "idle"):
        assert words in page.text, words
    assert page.text.count("Row ") == 8  # those that each of two principles is surest of, for either response
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and [tag for tag, _ in page.elements].count("script") == 1


def test_a_policy_between_has_a_column_and_harmlessness_a_section(run, tmp_path):
    shutil.copytree(run, tmp_path, dirs_exist_ok=True)
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"] |= {"stages": ["sft", "critique", "sl_cai", *STAGES[1:]], "sl_cai.helpful_share": 0.5}
    record["config"] |= {"rl.steps": 12, "rl.keep_every": 8}
    write(tmp_path / "config.json", record)
    means = {"sft": 0.1, "sl_cai": 0.55, "rl@8": 0.6, "rl": 0.7, "first": -0.2, "revision_1": 0.3}
    results = {
        f"{side}_rating/{name}": figure(mean, mean - 0.1, mean + 0.1, n)
        for name, mean in means.items()
        for side, n in (("helpful", 80), ("harmless", 16))
    }
    results |= {name.replace("/sft", "/sl_cai"): value for name, value in figures().items() if name.endswith("/sft")}
    results |= {name.replace("/rl", "/rl@8"): value for name, value in figures().items() if name.endswith("/rl")}
    results |= {"win_rate/rl_vs_sl_cai": figure(0.66, 0.6, 0.7), "kl/rl@8_vs_sft": figure(0.5, 0.4, 0.6)}
    write(tmp_path / "eval" / "results.json", figures() | results)
    revised = {"critique_harmless/first": figure(0.2, 0.1, 0.3), "critique_harmless/revision_1": figure(0.8, 0.7, 0.9)}
    revised |= {name.replace("harmless", "answers_prompt"): value for name, value in revised.items()}
    steps = {"revision_1": (0.25, 0.5, 24), "revision_2": (0.125, 0.75, 24)}
    by_principle = {"_by_principle/kind": (0.3125, 0.625, 48), "_by_principle/idle": (None, None, 0)}
    for name, (failed, changed, n) in ({f"/{name}": step for name, step in steps.items()} | by_principle).items():
        for what, mean in (("failed", failed), ("changed", changed)):
            revised[f"critique_{what}{name}"] = figure(mean, mean and 0.1, mean and 0.9, n)
    write(tmp_path / "critique" / "results.json", revised)
    counts = {"sl_cai_revisions": 30, "sl_cai_demonstrations": 10, "sl_cai_helpful_share": 0.25}
    write(tmp_path / "sl_cai" / "results.json", counts)
    (tmp_path / "sl_cai" / "metrics.jsonl").write_text('{"step": 0, "loss": 1.0}\n')
    text = Page(write_report(epath.Path(tmp_path)).read_text()).text
    for words in (
        "judged win rate, RL over SL-CAI",
        "SL-CAI and RL improved the replies",
        "Since SL-CAI: RL replies are preferred to SL-CAI replies on 66% [60, 70].",
        "1 step on 30 revisions and 10 demonstrations (25%, of 50% asked for)",
        "Over revisions, on red-team prompts, by the judge's rating",
        "Over training, by the judge's rating",
        "Over revisions, on red-team prompts, by the ground truth",
    ):
        assert words in text, words
    assert "critique_" not in text and "/revision_1" not in text
    assert re.search(r"RL, iteration 8\s*0.600 \[0.500, 0.700\]\s*80\s*0.600 \[0.500, 0.700\]\s*16", text)
    assert "rl@8" not in text  # a point of the frontier alone
    assert re.search(r"Round\s*Failed\s*Changed\s*n\s*1\s*25% \[10, 90\]\s*50% \[10, 90\]\s*24", text)
    assert re.search(r"kind\s*31% \[10, 90\]\s*62% \[10, 90\]\s*48\s*idle\s*-\s*-\s*0", text)
    assert re.search(r"RL\s*0.700 \[0.600, 0.800\]\s*80\s*0.700 \[0.600, 0.800\]\s*16", text)
    assert re.search(r"SFT\s*SL-CAI\s*RL\s*Change", text)
