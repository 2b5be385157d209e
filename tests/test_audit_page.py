"""The page of an audit: what is in it, and that texts of others stay text."""

import html
import re

import numpy as np
import pytest

from rlaif_jax.evaluation.audit import audit
from rlaif_jax.evaluation.budget import label_next
from rlaif_jax.evaluation.panel import panel_audit
from rlaif_jax.reporting.audit_page import render_audit

N = 40


@pytest.fixture(scope="module")
def columns():
    rng = np.random.default_rng(0)
    prob_a = rng.uniform(0.05, 0.95, N)
    return {
        "status": ["ok"] * (N - 1) + ["too_long"],
        "judge": ["tiny"] * N,
        "template": ["summary:base,0-shot"] * N,
        "prompt": [f"<script>alert({i})</script> \N{CJK UNIFIED IDEOGRAPH-4E2D}" for i in range(N)],
        "response_a": ["- a list" if i % 2 else "text" for i in range(N)],
        "response_b": ["longer text" for _ in range(N)],
        "prob_a": [*prob_a[:-1].tolist(), None],
        "prob_a_forward": [*prob_a[:-1].tolist(), None],
        "prob_a_reversed": [*np.roll(prob_a, 1)[:-1].tolist(), None],
        "prob_a_axes": [None] * N,
        "answer_mass": [0.3] * N,
        "human": [*(rng.random(N - 4) < prob_a[:-4]).astype(float).tolist(), None, None, None, None],
        "group": ["left" if i % 2 else "right" for i in range(N)],
    }


def page(columns, by=()):
    return render_audit("A & B", columns, audit(columns, 50, 0, by))


def test_it_shows_every_figure_and_both_charts(columns):
    text = page(columns, ("group",))
    for words in ("sides with people", "Cohen", "same slot", "prefers the longer reply", "Brier", "group=left"):
        assert words in html.unescape(text)
    assert text.count("<svg") == 2
    assert "At an agreement of" in text and "Row 39: too_long" in text


def test_it_holds_no_code_and_asks_for_nothing_outside(columns):
    text = page(columns)
    assert text.isascii() and "<script" not in text and "A &amp; B" in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)
    assert "default-src 'none'" in text


def test_without_people_it_says_what_is_missing(columns):
    text = page({name: values for name, values in columns.items() if name != "human"})
    assert "nothing to calibrate against" in text and text.count("<svg") == 1
    assert "takes at most" in " ".join(text.split())


def test_a_file_without_a_label_has_a_page(columns):
    failed = columns | dict.fromkeys(("prob_a", "prob_a_forward", "prob_a_reversed"), [None] * N)
    assert "No pair has a label." in page(failed | {"status": ["too_long"] * N})


def test_a_panel_is_shown_with_and_without_each_member(columns):
    assert "each member adds" not in page(columns)
    said = [{name: value and abs(value - i / 9) for i, name in enumerate(("careful", "<b>", "third"))}
            for value in columns["prob_a"]]  # fmt: skip
    columns = columns | {"prob_a_members": said, "combine": ["mean"] * N}
    figures = audit(columns, 50, 0) | panel_audit(columns, 50, 0)
    text = render_audit("A & B", columns, figures)
    table = text[text.index("each member adds") : text.index('id="confidence"')]
    assert table.count("<tr>") == 1 + 1 + 2 * 3 and "&lt;b&gt; alone" in table and "the panel without careful" in table
    assert "sides with people" in table and "alpha, votes" in table and "good reply" not in table
    alpha = figures["panel_without/third/alpha/votes"]["mean"]
    assert f"{alpha:.3f}".replace("-", "\N{MINUS SIGN}") in html.unescape(table)
    first = said[label_next(columns, 2)[1]]  # after the one that could not be scored
    assert f"A is better with {first['careful']:.2f} by careful, {first['<b>']:.2f} by <b>" in html.unescape(text)
    assert "panel_member" not in text and "panel_without" not in text
