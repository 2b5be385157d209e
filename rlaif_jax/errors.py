"""The one exception that the commands turn into a single line on stderr and a non-zero exit status."""

import contextlib
import errno
from collections.abc import Iterator

# The exit status of a command that was stopped, or whose peers were, and goes on if it is given again (EX_TEMPFAIL).
AGAIN = 75


class UserError(Exception):
    """Bad usage or bad input. The message names the thing and the remedy, on one line."""


class NotYet(UserError):
    """What another try may mend: the exit status is AGAIN."""


class Stopped(BaseException):
    """SIGTERM was sent, and everything is saved. Like KeyboardInterrupt nothing that goes wrong, so none to catch."""


@contextlib.contextmanager
def blame(field: str) -> Iterator[None]:
    """Puts the config field before the message of a UserError or ValueError raised inside."""
    try:
        yield
    except (UserError, ValueError) as error:
        raise UserError(f"config.{field}: {error}") from error


@contextlib.contextmanager
def room_in(folder) -> Iterator[None]:
    """Turns what a full disk raises inside into a UserError that names the folder being written."""
    try:
        yield
    except Exception as error:
        if not _disk_full(error):
            raise
        raise UserError(
            f"no space left on the disk of {folder}: free some, then the same command goes on from what is saved"
        ) from error


def _disk_full(error: BaseException | None) -> bool:
    """Whether a full disk or quota is the error or behind it; Orbax's C++ part says so in words alone."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "ENOSPC" in str(error) or "No space left on device" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
