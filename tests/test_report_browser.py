"""The report in a browser: no error, no request, no overflow, and nothing that a model wrote is run."""

import pytest
from etils import epath

from rlaif_jax.report import write_report
from tests.chromium import Chromium, find_chromium
from tests.report_run import HOSTILE, write_run

pytestmark = [
    pytest.mark.browser,
    pytest.mark.slow,
    pytest.mark.skipif(find_chromium() is None, reason="needs Chromium"),
]
LONG = "w" * 400  # a word that nothing can break


@pytest.fixture(scope="module")
def chromium(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("run"), hostile=HOSTILE)
    return write_report(epath.Path(folder))


def test_a_page_that_misbehaves_is_noticed(chromium, tmp_path):
    bad = tmp_path / "bad.html"
    bad.write_text("<img src='http://example.invalid/x.png'><script>window.ran = 1; undefined_name()</script>")
    chromium.open(bad, 375)
    assert len(chromium.errors) == 2 and len(chromium.requests) == 2
    assert chromium.evaluate("window.ran") == 1


@pytest.mark.parametrize("width", [1280, 375])
def test_it_logs_no_error_asks_for_nothing_and_fits(chromium, page, width):
    chromium.open(page, width)
    assert chromium.errors == []
    assert chromium.requests == [page.as_uri()]
    assert chromium.evaluate("window.innerWidth") == width
    assert chromium.evaluate("document.documentElement.scrollWidth") <= width
    assert chromium.evaluate("document.querySelectorAll('svg').length") > 10


def test_words_without_end_do_not_widen_the_page(chromium, tmp_path):
    page = write_report(epath.Path(write_run(tmp_path, hostile=LONG)))
    chromium.open(page, 375)
    assert chromium.evaluate("document.documentElement.scrollWidth") == 375


def test_what_a_model_wrote_shows_as_text(chromium, page):
    chromium.open(page, 1280)
    assert HOSTILE in chromium.evaluate("document.body.innerText")
    assert chromium.evaluate("document.images.length") == 0
    assert chromium.evaluate("document.scripts.length") == 1


def test_the_filters_choose_replies(chromium, page):
    chromium.open(page, 1280)
    choose = """(name, value) => {
        const field = document.getElementById("filters").elements[name];
        field.value = value;
        field.dispatchEvent(new Event("input", {bubbles: true}));
        const cards = [...document.querySelectorAll(".sample")];
        return [cards.filter((card) => card.offsetHeight > 0).length, document.getElementById("shown").textContent];
    }"""
    assert chromium.evaluate(f"({choose})('outcome', '')") == [8, "8 of 8"]
    assert chromium.evaluate(f"({choose})('outcome', 'policy')") == [4, "4 of 8"]
    assert chromium.evaluate(f"({choose})('truth', 'policy')") == [4, "4 of 8"]
    assert chromium.evaluate(f"({choose})('query', 'onerror=ALERT')") == [0, "0 of 8"]
    assert chromium.evaluate(f"({choose})('truth', '')") == [0, "0 of 8"]
    assert chromium.evaluate(f"({choose})('outcome', '')") == [4, "4 of 8"]
    assert chromium.evaluate(f"({choose})('outcome', 'none')") == [4, "4 of 8"]


def test_dark_mode_has_its_own_colours(chromium, page):
    colour = "getComputedStyle(document.body).backgroundColor"
    chromium.open(page, 375)
    light = chromium.evaluate(colour)
    chromium.open(page, 375, dark=True)
    assert chromium.evaluate(colour) != light
