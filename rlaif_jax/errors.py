"""The one exception that the commands turn into a single line on stderr and a non-zero exit status."""


class UserError(Exception):
    """Bad usage or bad input. The message names the thing and the remedy, on one line."""
