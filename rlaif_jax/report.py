"""One self-contained HTML page on a run, finished or not: python -m rlaif_jax.report RUN"""

import sys
from collections.abc import Mapping

from etils import epath

from rlaif_jax.errors import UserError
from rlaif_jax.files import write_text
from rlaif_jax.reporting.page import render
from rlaif_jax.reporting.read import read_run

_USAGE = "usage: python -m rlaif_jax.report RUN"


def main(argv: list[str]) -> int:
    """The command; returns the exit status."""
    try:
        if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
            print(f"{__doc__}\n\n{_USAGE}\n\n  RUN   the --workdir of a run; the page is RUN/report.html")
            return 0
        if len(argv) != 2 or argv[1].startswith("-"):
            raise UserError(_USAGE)
        print(write_report(epath.Path(argv[1])))
    except UserError as error:
        print(f"rlaif_jax: {error}", file=sys.stderr)
        return 2
    return 0


def write_report(workdir: epath.Path, shared: Mapping[str, epath.Path] | None = None) -> epath.Path:
    """Writes `workdir`/report.html and returns its path; `shared` names the stages that are kept elsewhere.

    Raises UserError for a folder that is no run or is read-only, and for a damaged file.
    """
    page = workdir / "report.html"
    html = render(read_run(workdir, shared or {}))
    try:
        write_text(page, html)
    except OSError as error:
        raise UserError(f"{page} can't be written: {error.strerror or error}") from error
    return page


if __name__ == "__main__":
    sys.exit(main(sys.argv))
