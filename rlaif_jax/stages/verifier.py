"""A function of the user's own that scores responses: found before any work, and held to what it must return."""

import importlib
import traceback
from collections.abc import Callable, Sequence

import numpy as np

from rlaif_jax.errors import UserError

# (prompts, responses) -> one number a response; None or NaN where there is none to be had.
Verifier = Callable[[Sequence[str], Sequence[str]], Sequence[float | None]]


def find_verifier(name: str, group: str) -> Verifier:
    """The function of "module:function", which the config `group` names.

    Raises UserError where there is none, or its module can't be imported.
    """
    field = f"config.{group}.verifier_function={name!r}"
    module, separator, function = name.partition(":")
    if not (module and separator and function):
        raise UserError(f"{field} must be ground_truth or module:function")
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ModuleNotFoundError as error:
        raise UserError(f"{field}: {error}; put the folder of the module on PYTHONPATH") from error
    except Exception as error:
        raise UserError(f"{field}: the module can't be imported: {_said(error)}") from error
    if not callable(found):
        raise UserError(f"{field}: the module {module} has no function {function}")
    return found


def verified(
    verifier: Verifier, name: str, group: str, prompts: Sequence[str], responses: Sequence[str]
) -> list[float]:
    """What a verifier makes of each response, NaN where it has no number.

    Raises UserError where it raises anything, or returns anything but a number or None for each response; it says
    that the config `group` has `name` as the verifier's.
    """
    field = f"config.{group}.verifier_function={name!r}"
    try:
        values = list(verifier(list(prompts), list(responses)))
    except Exception as error:
        raise UserError(f"{field} failed on {len(responses)} responses: {_said(error)}") from error
    if len(values) != len(responses):
        raise UserError(f"{field} returned {len(values)} numbers for {len(responses)} responses")
    return [_number(value, row, field) for row, value in enumerate(values)]


def _number(value, row: int, field: str) -> float:
    if value is None:
        return np.nan
    if not isinstance(value, str | bytes):
        try:
            return float(value)
        except Exception:  # of any class: it is the user's
            pass
    raise UserError(f"{field} returned {value!r:.80} for response {row}: it must be a number, or None")


def _said(error: Exception) -> str:
    """An error on one line, with where it was raised."""
    *_, last = traceback.extract_tb(error.__traceback__)
    return f"{type(error).__name__}: {' '.join(str(error).split())} ({last.filename}:{last.lineno})"
