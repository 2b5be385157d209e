"""What the commands share: their flags, their exit status, and the folder that they write to."""

import contextlib
import os
import pathlib
import platform
import re
import sys
import traceback
from collections.abc import Callable, Iterator

import jax
import xxhash
from absl import flags
from etils import epath
from ml_collections import config_flags

from rlaif_jax.errors import AGAIN, NotYet, Stopped, UserError
from rlaif_jax.parallel import processes


def run_command(argv: list[str], help_text: str, body: Callable[[list[str]], int]) -> int:
    """`body(argv)` as a command: returns the exit status, and says in one line why it ended early."""
    keep_compiled_programs()
    try:
        if any(argument in ("--help", "-h", "-help") for argument in argv[1:]):
            print(help_text)
            return 0
        argv, flags_of_processes = processes.take_flags(argv)
        processes.start(processes.place_from(flags_of_processes, os.environ))
        with _ending_together():
            return body(argv)
    except UserError as error:
        print(f"rlaif_jax: {error}", file=sys.stderr)
        return _status(error)
    except Stopped:
        if processes.first():
            print(f"rlaif_jax: SIGTERM to {processes.who_was_stopped()}: all is saved; the same command goes on from "
                  "here", file=sys.stderr)  # fmt: skip
        return AGAIN
    except KeyboardInterrupt:
        print("rlaif_jax: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


@contextlib.contextmanager
def _ending_together() -> Iterator[None]:
    """Where one of several processes fails, ends it and all others at once."""
    try:
        yield
    except Stopped:
        raise
    except BaseException as error:
        if processes.count() == 1:
            raise
        if isinstance(error, UserError):
            processes.fail(_status(error), str(error))
        if isinstance(error, KeyboardInterrupt):
            processes.fail(130, "interrupted; the same command goes on from here")
        # Where a collective fails, a process is gone as a rule. JAX raises that as errors of several classes.
        broken = re.match(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED)\b", str(error))
        processes.fail(1, "".join(traceback.format_exception(error)), wait=bool(broken))


def _status(error: UserError) -> int:
    return AGAIN if isinstance(error, NotYet) else 2


def keep_compiled_programs() -> None:
    """Keeps what XLA compiles for the next run, unless JAX_COMPILATION_CACHE_DIR says where, or is empty for nowhere.

    A program compiled for one CPU may not run on another, so machines that share a home have folders of their own.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    described = pathlib.Path("/proc/cpuinfo")
    lines = described.read_text().splitlines() if described.exists() else []
    features = {line for line in lines if line.lower().startswith(("flags", "features"))}
    machine = xxhash.xxh3_64_hexdigest("\n".join([platform.machine(), *sorted(features)]).encode())
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(home / "rlaif_jax" / f"compiled-{machine}"))


def open_folder(workdir: str) -> epath.Path:
    """The folder of --workdir, which need not exist. Raises UserError where it can't be one."""
    if set(workdir) & set("*?[]"):
        raise UserError(f"--workdir={workdir} must not hold any of * ? [ ]")  # Orbax would read it as a pattern
    if not workdir:
        raise UserError("--workdir is empty: name a folder")
    folder = epath.Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--workdir={workdir} is a file, not a folder")
    return folder


def parse_plain(argv: list[str], usage: str, values: flags.FlagValues) -> flags.FlagValues:
    """The flags that the caller has defined in `values`, of a command without a config.

    Raises UserError for a flag that does not exist or has the wrong type.
    """
    try:
        rest = values(argv)
    except flags.Error as error:
        raise UserError(f"{' '.join(str(error).split())}. {usage}") from error
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}. {usage}")
    return values


def parse_flags(
    argv: list[str], usage: str, values: flags.FlagValues, default_config: str | None = None
) -> flags.FlagValues:
    """--config, --workdir and the flags that the caller has defined in `values`.

    --config and --workdir are needed, but for a command that has a default config and writes nothing.

    Raises UserError for a flag or a config field that does not exist or has the wrong type.
    """
    config_flags.DEFINE_config_file("config", default_config, "", flag_values=values, sys_argv=argv)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    try:
        rest = values(argv)
        config = values.config
        if config is None or (values.workdir is None and default_config is None):
            raise UserError(usage)
        if len(rest) > 1:
            raise UserError(f"unexpected argument {rest[1]!r}")
        config.to_dict()  # a config file that could not be loaded raises at its first use
    except UserError:
        raise
    except (AttributeError, KeyError) as error:
        raise UserError(_unknown_field(argv, str(error))) from error
    except Exception as error:  # a config file is the user's code, and absl passes on whatever it raises
        message = str(error) or repr(error)
        if "Traceback" in message:  # ml_collections puts the config file's whole traceback in its message
            message = "the config file failed: " + message.strip().splitlines()[-1]
        raise UserError(" ".join(message.split())) from error
    return values


def _unknown_field(argv: list[str], message: str) -> str:
    """ml_collections' message with the whole path of the field: it names one part alone."""
    name, near = re.search(r"\w+", message), re.search(r'Did you mean "(\w+)"', message)
    paths = (argument.split("=")[0].removeprefix("--") for argument in argv[1:])
    found = [path for path in paths if path.startswith("config.") and name and name[0] in path.split(".")]
    if not found:
        return " ".join(message.split())
    hint = f"did you mean {near[1]}?" if near else "see rlaif_jax/config.py for the fields"
    return f"unknown config field {' or '.join(found)}: {hint}"
