"""Watches over the processes of a run: one that fails, dies or freezes ends the others at once, with a line naming it.

JAX's own heartbeats take 100 s, leave a hung collective waiting, and end a process without a word of who is gone.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

from rlaif_jax.errors import AGAIN

_BEAT_SECONDS = 0.5
_LOST_SECONDS = 8.0  # without a beat; compiling and waiting for devices leave the beating thread alone
_TOLD_SECONDS = 2.0  # in which the others are to have heard of an end
_BEATS, _NEWS, _CALLS, _HOSTS = "watch/beats/", "watch/news/", "watch/calls/", "watch/hosts/"
_AGAIN = "; the same command goes on from what is saved"


class Watch:
    """The watch of one process. `begin` starts its threads."""

    def __init__(self, client, coordinator: str, index: int, count: int):
        """client: of the coordination service, which runs in process 0 at `coordinator`."""
        self._client, self._coordinator, self.index, self.count = client, coordinator, index, count
        self._answered = time.monotonic()  # when the service did last
        self._lock = threading.Lock()  # between the count of stop points and the choice of the one to stop at
        self._calls, self._stop_at, self._stopped = 0, 0, ""
        self._asked, self._leaving, self._over = threading.Event(), threading.Event(), threading.Event()
        self._number = 0  # of this process's beat
        self._beats: dict[int, tuple[str, float]] = {}  # of each process watched the last one, and when it was new
        self._hosts: dict[int, str] = {}

    def begin(self) -> None:
        """Tells the others where this process runs, and starts to watch."""
        self._client.key_value_set(f"{_HOSTS}{self.index}", socket.gethostname())
        self._client.wait_at_barrier("watch/begin", 60_000)
        found = self._client.key_value_dir_get(_HOSTS)
        self._hosts = {int(key.removeprefix(_HOSTS)): host for key, host in found}
        # Process 0 watches all, and the others it. One may die before its first beat.
        watched = range(1, self.count) if self.index == 0 else [0]
        self._beats = dict.fromkeys(watched, ("", time.monotonic()))
        explain_abort(self._why_aborted)
        for work in (self._beat, self._guard):
            threading.Thread(target=work, daemon=True).start()

    def end(self) -> None:
        """Stops watching, once all processes are done."""
        self._over.set()

    def stop_point(self) -> bool:
        """Counts, and says whether this is the point that all processes stop at."""
        with self._lock:
            self._calls += 1
            return bool(self._stop_at) and self._calls >= self._stop_at

    def stop_wanted(self) -> bool:
        """Whether a process was asked to stop."""
        return bool(self._stopped)

    def who_was_stopped(self) -> str:
        """The process that was."""
        return self._stopped

    def ask_to_stop(self) -> None:
        """Has all processes stop at one and the same point, soon."""
        self._asked.set()

    def fail(self, status: int, message: str, wait: bool) -> NoReturn:
        """See `processes.fail`."""
        if wait and self._leaving.wait(_LOST_SECONDS + _TOLD_SECONDS):
            self._over.wait()  # for the thread that is ending this process
        self._over.set()
        if self.index == 0 or status == 1:  # the rest process 0 says for the others
            print(f"rlaif_jax: {message}", file=sys.stderr, flush=True)
        self._exit(status, {"status": status, "message": message.strip().splitlines()[-1]})

    def _name(self, index: int) -> str:
        return f"process {index} of {self.count} ({self._hosts.get(index, '?')})"

    def _set(self, key: str, value: str) -> None:
        self._client.key_value_set(key, value, allow_overwrite=True)

    def _beat(self) -> None:
        """Says that this process lives, and hears of the others."""
        while not self._over.wait(_BEAT_SECONDS):
            try:
                self._live()
                if self._asked.is_set() and not self._stopped:
                    self._set(f"{_NEWS}stop/{self.index}", "true")
                self._find_lost()
                self._hear(self._client.key_value_dir_get(_NEWS))
            except Exception:  # the service is gone or will not answer: `_guard` sees to it
                continue

    def _live(self) -> None:
        self._number += 1
        self._set(f"{_BEATS}{self.index}", str(self._number))
        self._answered = time.monotonic()

    def _hear(self, news) -> None:
        for key, value in news:
            kind, index = key.removeprefix(_NEWS).split("/")
            if kind == "left" and int(index) != self.index:
                left = json.loads(value)
                self._leave(left["status"], f"{self._name(int(index))} has stopped: {left['message']}")
            if kind == "lost" and int(index) != self.index:
                self._leave(AGAIN, self._lost(int(index)))
            if kind == "stop" and not self._stopped:
                self._agree_to_stop()
                self._stopped = self._name(int(index))

    def _lost(self, index: int) -> str:
        return f"{self._name(index)} does not answer any more: it died or hangs{_AGAIN}"

    def _agree_to_stop(self) -> None:
        """The next stop point that no process has reached; the main thread reaches none meanwhile."""
        with self._lock:
            self._set(f"{_CALLS}{self.index}", str(self._calls))
            while len(calls := self._client.key_value_dir_get(_CALLS)) < self.count and not self._over.is_set():
                self._live()
                self._find_lost()
                time.sleep(_BEAT_SECONDS / 10)
            self._stop_at = 1 + max(int(number) for _, number in calls)

    def _find_lost(self) -> None:
        """Tells of those whose beat has not changed."""
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get(_BEATS):
            index = int(key.removeprefix(_BEATS))
            if index in self._beats and self._beats[index][0] != beat:
                self._beats[index] = (beat, now)
        for index, (_, since) in self._beats.items():
            if now - since > _LOST_SECONDS:
                self._set(f"{_NEWS}lost/{index}", "true")

    def _guard(self) -> None:
        """Ends this process where the service, in process 0, does not answer any more."""
        while True:
            began = time.monotonic()
            if self._over.wait(_BEAT_SECONDS):
                return
            now = time.monotonic()
            if now - began > 4 * _BEAT_SECONDS:  # nobody could run here: the beating thread is to have its turn
                self._answered = now
            if now - self._answered > _LOST_SECONDS:
                _say(self._lost(0))
                os._exit(AGAIN)  # nobody is left to be told

    def _leave(self, status: int, reason: str) -> NoReturn:
        """Ends this process for the sake of another one; at once, for the main thread may wait for ever."""
        self._leaving.set()
        _say(reason)
        self._exit(status)

    def _exit(self, status: int, left: dict | None = None) -> NoReturn:
        try:
            if left:
                self._set(f"{_NEWS}left/{self.index}", json.dumps(left))
            self._set(f"{_NEWS}heard/{self.index}", "true")
            deadline = time.monotonic() + _TOLD_SECONDS
            # The service goes with process 0, so that it is the last.
            while self.index == 0 and time.monotonic() < deadline and self._deaf():
                time.sleep(_BEAT_SECONDS / 10)
        finally:
            os._exit(status)

    def _deaf(self) -> int:
        """How many have not heard of an end, and still could."""
        kinds = [key.removeprefix(_NEWS).split("/")[0] for key, _ in self._client.key_value_dir_get(_NEWS)]
        return self.count - kinds.count("heard") - kinds.count("lost")

    def _why_aborted(self) -> str:
        """JAX's client aborts the process at once when the service is gone; "" where it is not."""
        gone = self.index and not wait_for_service(self._coordinator, 0)
        return f"{self._name(0)} is gone{_AGAIN}" if gone else ""


def _say(text: str) -> None:
    print(f"rlaif_jax: {text}", file=sys.stderr, flush=True)


def wait_for_service(coordinator: str, seconds: float) -> bool:
    """Whether somebody listens at host:port, now or within so many seconds."""
    host, _, port = coordinator.rpartition(":")
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
            return True
        except OSError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_BEAT_SECONDS / 5)


_explain = []  # kept, for C holds no reference


def explain_abort(reason: Callable[[], str]) -> None:
    """Has an abort of this process, which is how JAX's client ends it, say why and exit with AGAIN.

    reason: "" for one that has another cause, and stays an abort.
    """

    def aborted(number):
        if text := reason():
            _say(text)
            os._exit(AGAIN)
        signal.signal(signal.SIGABRT, signal.SIG_DFL)

    _explain.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted))
    ctypes.CDLL(None).signal(signal.SIGABRT, _explain[-1])
