"""The one exception that the commands turn into a single line on stderr and a non-zero exit status."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Bad usage or bad input. The message names the thing and the remedy, on one line."""


@contextlib.contextmanager
def blame(field: str) -> Iterator[None]:
    """Puts the config field before the message of a UserError or ValueError raised inside."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise UserError(f"config.{field}: {error}") from error
