"""Judges one pair in both orders: python -m rlaif_jax.judge --prompt=TEXT --a=REPLY --b=REPLY [--config=FILE[:ARM]]"""

import sys

from absl import flags
from etils import epath

from rlaif_jax.commands import parse_flags, run_command
from rlaif_jax.config import Config, parse
from rlaif_jax.data.layouts import is_unicode
from rlaif_jax.errors import UserError
from rlaif_jax.judge.constitution import load_constitution, tagged
from rlaif_jax.judge.prompts import Pair, load_template
from rlaif_jax.judge.score import judge_pairs, load_judge
from rlaif_jax.stages.run import open_run, with_seed
from rlaif_jax.summary import print_judgement

_USAGE = "usage: python -m rlaif_jax.judge --prompt=TEXT --a=REPLY --b=REPLY [--config=configs/NAME.py[:ARM]]"
_HELP = """  --config.judge.FIELD=VALUE  overrides a field, e.g. --config.judge.prompt.shots=0
  --principle=ID              of config.constitution.file, for a judge that is asked for one

Prints the exact prompts, and the probability that reply a is the better one."""


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    values = flags.FlagValues()
    for name in ("prompt", "a", "b", "principle"):
        flags.DEFINE_string(name, None, "", flag_values=values)
    options = parse_flags(argv, _USAGE, values, default_config="configs/quickstart.py")
    texts = (options.prompt, options.a, options.b)
    if not all(text and text.strip() for text in texts):
        raise UserError(_USAGE)
    if not all(map(is_unicode, texts)):
        raise UserError("--prompt, --a and --b must be texts in UTF-8")
    run = open_run(with_seed(parse(options.config.to_dict()), None), epath.Path("."))
    pair = _pair(run.config, texts, options.principle)
    judge = load_judge(run.config.judge, run.config.seed, run.judge_placement)
    (judgement,) = judge_pairs(judge, [pair])
    print_judgement(judge, pair, judgement)
    return 0 if judgement.status == "ok" else 1


def _pair(config: Config, texts: tuple[str, str, str], principle: str | None) -> Pair:
    """The pair, under the principle with this id if the judge asks for one. Raises UserError where they do not fit."""
    if not load_template(config.judge.prompt).by_principle:
        if principle is not None:
            raise UserError(f"--principle: judge template {config.judge.prompt.template} does not ask for a principle")
        return Pair(*texts)
    principles = tagged(load_constitution(config.constitution.file), config.constitution.tags)
    known = {each.id: each.comparison for each in principles if each.comparison}
    if principle not in known:
        given = "--principle is needed:" if principle is None else f"--principle={principle} must be"
        raise UserError(f"{given} one of {', '.join(known)}")
    return Pair(*texts, principle, known[principle])


if __name__ == "__main__":
    sys.exit(main(sys.argv))
