import pytest

from rlaif_jax.judge.__main__ import main
from tests.tiny_judge import write_judge


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    path = write_judge(tmp_path_factory.mktemp("judge") / "judge.gguf")
    return [f"--config.judge.weights={path}", "--config.judge.bucket_multiple=64"]


def run(judge, *arguments):
    return main(["judge", *judge, *arguments])


def probabilities(out):
    return [float(line.split("│")[2]) for line in out.splitlines() if "first  " in line or "both sides" in line]


def test_both_orders_are_shown_with_their_exact_prompts(judge, capfd):
    assert run(judge, "--prompt=Is it <b>[bold]?", "--a=Scrub it.", "--b=Get lost.") == 0
    out = capfd.readouterr().out
    assert "Question: Is it <b>[bold]?\nFirst reply: Scrub it.\nSecond reply: Get lost.\nThe second reply is" in out
    assert "First reply: Get lost.\nSecond reply: Scrub it." in out
    forward, backward, both = probabilities(out)
    assert both == pytest.approx((forward + backward) / 2, abs=1e-4)
    assert run(judge, "--prompt=Is it <b>[bold]?", "--a=Get lost.", "--b=Scrub it.") == 0
    assert probabilities(capfd.readouterr().out)[2] == pytest.approx(1 - both, abs=1e-4)


def test_what_is_not_scored_says_why(judge, capfd):
    assert run(judge, "--prompt=x", "--a=y", "--b=y") == 1
    assert "not scored: identical" in capfd.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--prompt=x", "--a=y"], ["--prompt=x", "--a=y", "--b= "]])
def test_a_missing_text_is_bad_usage(judge, capfd, arguments):
    assert run(judge, *arguments) == 2
    assert "usage: python -m rlaif_jax.judge" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--principle=kind"], "everyday_requests does not ask for a principle"),
        (["--config=configs/quickstart.py:constitutional", "--principle=kin"], "--principle=kin must be one of"),
        (["--config=configs/quickstart.py:constitutional"], "--principle is needed: one of does-no-harm, honest"),
        (
            [
                "--config=configs/quickstart.py:constitutional",
                "--config.constitution.tags=('privacy',)",
                "--principle=kind",
            ],
            "--principle=kind must be one of private",
        ),
    ],
)
def test_a_principle_goes_with_a_template_that_asks_for_one(capfd, arguments, words):
    assert run([], *arguments, "--prompt=x", "--a=y", "--b=z") == 2
    assert words in capfd.readouterr().err
