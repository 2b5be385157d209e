"""The processes of a run: how they find each other, agree, share what they have, and end together.

Every process runs the same program, and does what spans them all (a program over the whole mesh, `barrier`, `agree`,
`gather`, `stop_point`) as often as the others and in the same order. One process alone is the special case.
"""

import atexit
import contextlib
import dataclasses
import json
import os
import re
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar

import jax
import numpy as np
from etils import epath

# The coordination service that comes with jax.distributed; the public API starts it and gives no access to it.
from jax._src import distributed as _jax_distributed
from jax.sharding import NamedSharding, PartitionSpec

from rlaif_jax.errors import NotYet, Stopped, UserError
from rlaif_jax.parallel.watch import Watch, explain_abort, wait_for_service

Value = TypeVar("Value")
_FLAGS = ("coordinator", "processes", "process")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
_PORT = 8476  # of the coordinator, where the environment names hosts alone and no JAX_COORDINATOR_PORT
_START_SECONDS = 300  # in which all processes must have come
_PATIENT_SECONDS = 10  # after which one that waits for them says so
_FOREVER = 7 * 24 * 3600 * 1000  # milliseconds; the watch ends whoever waits for a process that is gone


@dataclasses.dataclass(frozen=True)
class Place:
    """Which process this is."""

    coordinator: str  # host:port of process 0
    count: int
    index: int


def place_from(flags: Mapping[str, str], environment: Mapping[str, str]) -> Place | None:
    """Which of several processes this is; None for one alone.

    From --coordinator, --processes and --process; from the variables of the same meaning; from those of a Slurm step;
    or from those that a slice of TPUs has on Kubernetes, several slices included. Raises UserError where some are
    missing or malformed.
    """
    by_flag = [flags.get(name) for name in _FLAGS]
    by_variable = [environment.get(name) for name in _VARIABLES]
    for values, names in ((by_flag, [f"--{name}" for name in _FLAGS]), (by_variable, _VARIABLES)):
        if any(values):
            missing = [name for name, value in zip(names, values, strict=True) if not value]
            if missing:
                raise UserError(f"{' and '.join(missing)} missing: {', '.join(names)} are given together")
            return _place(*values)
    if "SLURM_PROCID" in environment and "SLURM_STEP_NODELIST" in environment:
        job, step = (int(environment.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
        # Jobs that share a node, and steps of one job, are spread over ports.
        port = environment.get("JAX_COORDINATOR_PORT") or 61440 + (job + 97 * step) % 4096
        address = f"{_first_host(environment['SLURM_STEP_NODELIST'])}:{port}"
        tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "")
        return _place(address, tasks, environment["SLURM_PROCID"])
    if "TPU_WORKER_HOSTNAMES" in environment and "TPU_WORKER_ID" in environment:
        hosts = environment["TPU_WORKER_HOSTNAMES"].split(",")
        slices = int(environment.get("MEGASCALE_NUM_SLICES", 1))
        number = int(environment.get("MEGASCALE_SLICE_ID", 0))
        first = environment.get("MEGASCALE_COORDINATOR_ADDRESS", hosts[0]).split(":")[0]
        port = environment.get("JAX_COORDINATOR_PORT") or _PORT
        index = number * len(hosts) + int(environment["TPU_WORKER_ID"])
        return _place(f"{first}:{port}", str(slices * len(hosts)), str(index))
    return None


def _place(coordinator: str, count: str, index: str) -> Place | None:
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise UserError(f"coordinator {coordinator!r} must be HOST:PORT of process 0")
    if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
        raise UserError(
            f"process {index!r} of {count!r} processes: they are numbered from 0 to one less than their count"
        )
    return Place(coordinator, int(count), int(index)) if int(count) > 1 else None


def _first_host(nodes: str) -> str:
    """The first of Slurm's list, such as rack[0-1]node[003-007,12],other."""
    name = re.match(r"([^,\[]|\[[^\]]*\])*", nodes)[0]
    return re.sub(r"\[(\d+)[^\]]*\]", r"\1", name)


def take_flags(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The arguments without those that say which process this is, and these."""
    rest, found = [], {}
    for argument in argv:
        matched = re.fullmatch(rf"--({'|'.join(_FLAGS)})=(.*)", argument)
        if matched:
            found[matched[1]] = matched[2]
        else:
            rest.append(argument)
    return rest, found


_watch: Watch | None = None
_thread = threading.local()  # its `alone`: this is work that the first process does for all, as one alone


def start(place: Place | None) -> None:
    """Joins the other processes; before anything that asks for devices. Raises NotYet where process 0 does not come.

    Of process 0 alone stdout is shown.
    """
    global _watch
    if place is None:
        return
    jax.config.update("jax_enable_preemption_service", False)  # `stop_point` is told of SIGTERM by the watch
    who = f"process {place.index} of {place.count}"
    text = f"rlaif_jax: {who} waits for the others at {place.coordinator}, {_START_SECONDS} s at most"
    waiting = threading.Timer(_PATIENT_SECONDS, print, [text], {"file": sys.stderr, "flush": True})
    waiting.daemon = True
    waiting.start()
    if place.index and not wait_for_service(place.coordinator, _START_SECONDS):  # JAX would abort
        raise NotYet(f"{who} finds no process 0 at {place.coordinator} in {_START_SECONDS} s: see whether it runs")
    explain_abort(
        lambda: (
            f"{who} could not join the others at {place.coordinator}: one is missing after {_START_SECONDS} s, or two "
            "have the same number"
        )
    )
    jax.distributed.initialize(
        place.coordinator, place.count, place.index,
        cluster_detection_method="deactivate", initialization_timeout=_START_SECONDS,
    )  # fmt: skip
    waiting.cancel()
    _watch = Watch(_client(), place.coordinator, place.index, place.count)
    _watch.begin()
    if place.index:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (open to the end)
    atexit.register(_shutdown)


def _client():
    return _jax_distributed.global_state.client


def _others() -> Watch | None:
    """The watch over the processes, where there are others to do this with."""
    return None if getattr(_thread, "alone", False) else _watch


def count() -> int:
    """How many processes there are."""
    return _others().count if _others() else 1


def index() -> int:
    """Which one this is, from 0 on."""
    return _others().index if _others() else 0


def first() -> bool:
    """Whether this is the one that writes and reports."""
    return index() == 0


_numbers: dict[str, int] = {}


def _next(kind: str) -> str:
    _numbers[kind] = _numbers.get(kind, 0) + 1
    return f"{kind}/{_numbers[kind]}"


def barrier(name: str = "") -> None:
    """Returns once all processes have come here. name: one of a kind, where it is not the main thread that comes."""
    if _others():
        _client().wait_at_barrier(name or _next("barrier"), _FOREVER)


def agree(work: Callable[[], Value], name: str = "") -> Value:
    """What `work()` returns in the first process, which alone does it, in all of them: what depends on a file or on the
    clock is one's to say. A UserError is raised in all, too.

    work: gives what JSON can hold, lists for tuples; whatever it calls takes the process for one alone. name: as for
    `barrier`.
    """
    if not _others():
        return work()
    key = name or _next("agree")
    if first():
        _thread.alone = True
        try:
            outcome = _outcome(work)
        finally:
            _thread.alone = False
        _client().key_value_set(key, json.dumps(outcome))
    told = _client().blocking_key_value_get(key, _FOREVER)
    barrier(f"{key}/read")
    if first():
        _client().key_value_delete(key)
    return _result(json.loads(told))


def by_first(work: Callable[[], Value]) -> Value | None:
    """`work()` in the first process, which returns what it gives; the others wait, and return None.

    A UserError is raised in all.
    """
    found = []
    agree(lambda: found.append(work()))
    return found[0] if found else None


def gather(value: Value, name: str = "") -> list[Value]:
    """The values of all processes, in their order. value and name: as for `agree`."""
    if not _others():
        return [value]
    key, client = name or _next("gather"), _client()
    client.key_value_set(f"{key}/{index()}", json.dumps(value))
    barrier(f"{key}/there")
    found = dict(client.key_value_dir_get(f"{key}/"))
    barrier(f"{key}/read")
    if first():
        client.key_value_delete(f"{key}/")
    return [json.loads(found[f"{key}/{i}"]) for i in range(count())]


def check_alike(given: Mapping[str, Any], folder: epath.Path) -> None:
    """Raises UserError, in all, where the processes were given different things, or do not share a folder.

    given: what JSON can hold, by the names that users know.
    """
    if not _others():
        return
    everybody = gather(dict(given))
    for other, theirs in enumerate(everybody):
        for name, value in everybody[0].items():
            if theirs.get(name) != value:
                raise UserError(
                    f"process {other} was given {name}={theirs.get(name)!r} and process 0 {value!r}: give all the same"
                )
    token = folder / f"{agree(lambda: secrets.token_hex(8))}.tmp"

    def write() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        token.write_text("")

    agree(write)
    blind = [other for other, sees in enumerate(gather(token.exists())) if not sees]
    agree(token.unlink)
    if blind:
        raise UserError(f"process {blind[0]} does not see what process 0 writes to {folder}: name a disk or bucket for "
                        "--workdir that all share")  # fmt: skip


def parted(items: Sequence, work: Callable[..., Sequence], *others: Sequence) -> list:
    """`work(items, *others)`, one result an item, each process on its own run of items; all get all results.

    work: for programs on the devices of one process; its results are what JSON can hold. others: sequences beside
    `items`, cut alike. A UserError of one process is raised in all.
    """
    bounds = np.linspace(0, len(items), count() + 1).astype(int)
    mine = slice(bounds[index()], bounds[index() + 1])
    part = _outcome(lambda: list(work(*(each[mine] for each in (items, *others)))) if mine.start < mine.stop else [])
    return [result for other in map(_result, gather(part)) for result in other]


def _outcome(work: Callable[[], Value]) -> dict:
    """What `work()` gives, or the UserError that it raises, for others to be told."""
    try:
        return {"value": work()}
    except UserError as error:
        return {"error": str(error)}


def _result(outcome: dict):
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome["value"]


def to_host(tree) -> Any:
    """A tree of arrays as NumPy arrays, whole, whichever processes hold their parts."""
    if not _others():
        return jax.device_get(tree)
    spread = [x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array) and not x.is_fully_addressable]
    parts = [x for x in spread if not x.is_fully_replicated]
    whole = iter(_replicated(parts) if parts else ())
    return jax.tree.map(lambda x: _local(next(whole) if any(x is part for part in parts) else x), tree)


def _replicated(arrays: list[jax.Array]) -> list[jax.Array]:
    everywhere = NamedSharding(arrays[0].sharding.mesh, PartitionSpec())
    return jax.jit(_same, out_shardings=everywhere)(arrays)


def _same(x):
    return x


def _local(x):
    """An array of which this process holds all, or all that there is to hold."""
    whole_here = not isinstance(x, jax.Array) or x.is_fully_addressable
    return jax.device_get(x) if whole_here else np.asarray(x.addressable_data(0))


def put(x, sharding: NamedSharding) -> jax.Array:
    """A host array, the same in every process, on the devices: each process hands over what its own devices hold."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, sharding, lambda part: x[part])


_terminated = threading.Event()


@contextlib.contextmanager
def heeding_sigterm() -> Iterator[None]:
    """SIGTERM is heeded at the next `stop_point`, once; a second one kills as ever.

    It is heard by a thread: Python's handlers wait for the main thread, which may wait for other processes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    hearing, told = socket.socketpair()
    told.setblocking(False)
    handler = signal.signal(signal.SIGTERM, lambda *_: None)
    before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
    listener = threading.Thread(target=_hear_sigterm, args=(hearing,), daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        signal.signal(signal.SIGTERM, handler)
        told.close()
        listener.join()
        hearing.close()
        _terminated.clear()


def _hear_sigterm(hearing: socket.socket) -> None:
    while number := hearing.recv(1):
        if number[0] != signal.SIGTERM:
            continue
        if _terminated.is_set():
            os._exit(128 + signal.SIGTERM)
        _terminated.set()
        if _watch:
            _watch.ask_to_stop()


def stop_point() -> bool:
    """Whether to save and stop here, because a process was sent SIGTERM: the same answer in all of them."""
    return _watch.stop_point() if _watch else _terminated.is_set()


def stop_wanted() -> bool:
    """Whether a process was sent SIGTERM, where each process works at a pace of its own."""
    return _watch.stop_wanted() if _watch else _terminated.is_set()


def stop_if_asked() -> None:
    """A `stop_point` where nothing is left to save. Raises Stopped."""
    if stop_point():
        raise Stopped


def who_was_stopped() -> str:
    """The process that SIGTERM was sent to, for a message."""
    return _watch.who_was_stopped() if _watch else "the process"


def fail(status: int, message: str, wait: bool = False) -> NoReturn:
    """Ends this process, one of several, and the others with it, at once: they could wait for it for ever.

    wait: for news of another process that is gone, which then is what everybody says; for failed collectives.
    """
    _watch.fail(status, message, wait)


def _shutdown() -> None:
    """The orderly end, which waits for all."""
    global _watch
    if _watch:
        barrier()
        _watch.end()
        _watch = None
        jax.distributed.shutdown()
