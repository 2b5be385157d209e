"""Progress bars with rate and time left."""

import sys
from collections.abc import Iterable

from tqdm import tqdm


def progress(items: Iterable | None, description: str, *, total: int, unit: str, initial: int = 0) -> tqdm:
    """A bar on stderr with rate and ETA; redrawn rarely where stderr is a file."""
    interval = 0.2 if sys.stderr.isatty() else 10
    return tqdm(items, desc=f"{description:>14}", total=total, initial=initial, unit=unit, mininterval=interval)
