"""One self-contained HTML page on a run, finished or not: python -m rlaif_jax.report RUN"""

import sys

from etils import epath

from rlaif_jax.commands import run_command
from rlaif_jax.errors import UserError
from rlaif_jax.files import write_text
from rlaif_jax.reporting.page import render
from rlaif_jax.reporting.read import read_run

_USAGE = "usage: python -m rlaif_jax.report RUN"
_HELP = "  RUN   the --workdir of a run, or the folder of a sweep's cell; the page is RUN/report.html"


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    return run_command(argv, f"{__doc__}\n\n{_USAGE}\n\n{_HELP}", _main)


def _main(argv: list[str]) -> int:
    if len(argv) != 2 or argv[1].startswith("-"):
        raise UserError(_USAGE)
    print(write_report(epath.Path(argv[1])))
    return 0


def write_report(workdir: epath.Path) -> epath.Path:
    """Writes `workdir`/report.html and returns its path.

    Raises UserError for a folder that is no run or can't be written to, and for a damaged file.
    """
    page = workdir / "report.html"
    html = render(read_run(workdir))
    try:
        write_text(page, html)
    except OSError as error:
        raise UserError(f"{page} can't be written: {error.strerror or error}") from error
    return page


if __name__ == "__main__":
    sys.exit(main(sys.argv))
