"""Progress bars with rate and time left, of the process that reports."""

import sys
from collections.abc import Iterable

from tqdm import tqdm

from rlaif_jax.parallel import processes


def warn(text: str) -> None:
    """Says something on stderr, once for all processes."""
    if processes.first():
        print(f"rlaif_jax: {text}", file=sys.stderr, flush=True)


def progress(items: Iterable | None, description: str, *, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar on stderr with rate and ETA; redrawn rarely where stderr is a file."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(
        items,
        desc=f"{description:>14}",
        total=total,
        initial=initial,
        unit=unit,
        mininterval=interval,
        disable=not processes.first(),
    )
