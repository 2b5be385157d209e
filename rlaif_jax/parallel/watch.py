"""Watches over the processes of a run: one that fails, dies or hangs ends the others at once, with a line naming it.

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
from typing import NoReturn

from rlaif_jax.errors import AGAIN

_BEAT_SECONDS = 0.5
_LOST_SECONDS = 8.0  # without a beat; compiling and waiting for devices leave the beating thread alone
_SUSPECTED_SECONDS = 2.5  # the same once a collective has failed, which only happens when somebody is gone
_TOLD_SECONDS = 2.0  # in which the others are to have heard of an end
_BEATS, _NEWS, _CALLS, _HOSTS = "watch/beats/", "watch/news/", "watch/calls/", "watch/hosts/"


class Watch:
    """The watch of one process. `begin` starts its threads."""

    def __init__(self, client, coordinator: str, index: int, count: int):
        """client: of the coordination service, which runs in process 0 at `coordinator`."""
        self._client, self._coordinator, self.index, self.count = client, coordinator, index, count
        self._answered = time.monotonic()  # when the service did last
        self._lock = threading.Lock()  # between the count of stop points and the choice of the one to stop at
        self._calls, self._stop_at, self._stopped = 0, 0, ""
        self._asked, self._over = threading.Event(), threading.Event()
        self._beats: dict[int, tuple[str, float]] = {}  # of each process the last one, and when it was new
        self._patience = _LOST_SECONDS
        self._hosts: dict[int, str] = {}

    def begin(self) -> None:
        """Tells the others where this process runs, and starts to watch."""
        self._client.key_value_set(f"{_HOSTS}{self.index}", socket.gethostname())
        self._client.wait_at_barrier("watch/begin", 60_000)
        found = self._client.key_value_dir_get(_HOSTS)
        self._hosts = {int(key.removeprefix(_HOSTS)): host for key, host in found}
        self._beats = dict.fromkeys(range(self.count), ("", time.monotonic()))  # one may die before its first
        self._explain_abort()
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
        if wait:
            self._patience = _SUSPECTED_SECONDS
            time.sleep(_LOST_SECONDS + _TOLD_SECONDS)
        self._over.set()
        if self.index == 0 or status == 1:  # the rest process 0 says for the others
            print(f"rlaif_jax: {message}", file=sys.stderr, flush=True)
        self._tell("left", {"status": status, "message": message.strip().splitlines()[-1]})
        self._exit(status)

    def _name(self, index: int) -> str:
        return f"process {index} of {self.count} ({self._hosts.get(index, '?')})"

    def _tell(self, kind: str, value) -> None:
        self._client.key_value_set(f"{_NEWS}{kind}/{self.index}", json.dumps(value), allow_overwrite=True)

    def _beat(self) -> None:
        """Says that this process lives, and hears of the others."""
        number = 0
        while not self._over.wait(_BEAT_SECONDS):
            number += 1
            try:
                self._client.key_value_set(f"{_BEATS}{self.index}", str(number), allow_overwrite=True)
                if self._asked.is_set() and not self._stopped:
                    self._tell("stop", True)
                news = self._client.key_value_dir_get(_NEWS)
                if self.index == 0:
                    self._find_lost()
            except Exception:  # the service is gone or will not answer: `_guard` sees to it
                continue
            self._answered = time.monotonic()
            self._hear(news)

    def _hear(self, news) -> None:
        for key, value in news:
            kind, index = key.removeprefix(_NEWS).split("/")
            if kind == "left" and int(index) != self.index:
                left = json.loads(value)
                self._leave(left["status"], f"{self._name(int(index))} has stopped: {left['message']}")
            if kind == "lost" and int(index) != self.index:
                self._leave(AGAIN, f"{self._name(int(index))} does not answer any more: it died or hangs")
            if kind == "stop" and not self._stopped:
                self._stopped = self._name(int(index))
                self._agree_to_stop()

    def _agree_to_stop(self) -> None:
        """The next stop point that no process has reached; the main thread reaches none meanwhile."""
        with self._lock:
            self._client.key_value_set(f"{_CALLS}{self.index}", str(self._calls))
            while len(calls := self._client.key_value_dir_get(_CALLS)) < self.count and not self._over.is_set():
                time.sleep(_BEAT_SECONDS / 10)
            self._stop_at = 1 + max(int(number) for _, number in calls)

    def _find_lost(self) -> None:
        """Process 0 tells of those whose beat has not changed."""
        now = time.monotonic()
        for key, beat in self._client.key_value_dir_get(_BEATS):
            index = int(key.removeprefix(_BEATS))
            if self._beats[index][0] != beat:
                self._beats[index] = (beat, now)
        for index, (_, since) in self._beats.items():
            if now - since > self._patience:
                self._client.key_value_set(f"{_NEWS}lost/{index}", "true", allow_overwrite=True)

    def _guard(self) -> None:
        """Ends this process where process 0 does not answer any more."""
        while not self._over.wait(_BEAT_SECONDS):
            if time.monotonic() - self._answered > _LOST_SECONDS:
                self._leave(AGAIN, f"{self._name(0)} does not answer any more: it died or hangs", tell=False)

    def _leave(self, status: int, reason: str, tell: bool = True) -> NoReturn:
        """Ends this process for the sake of another one; at once, for the main thread may wait for ever."""
        again = "; the same command goes on from what is saved" if status == AGAIN else ""
        print(f"rlaif_jax: {reason}{again}", file=sys.stderr, flush=True)
        if tell:
            self._exit(status)
        os._exit(status)

    def _exit(self, status: int) -> NoReturn:
        try:
            self._tell("heard", True)
            deadline = time.monotonic() + _TOLD_SECONDS
            # The service goes with process 0, so that it is the last.
            while self.index == 0 and time.monotonic() < deadline and self._heard() < self.count:
                time.sleep(_BEAT_SECONDS / 10)
        finally:
            os._exit(status)

    def _heard(self) -> int:
        return len(self._client.key_value_dir_get(f"{_NEWS}heard/"))

    def _explain_abort(self) -> None:
        """JAX's client aborts the process at once when the service is gone; then this is the last word."""
        if self.index == 0:
            return

        def aborted(number):
            if not self._service_listens():
                self._leave(AGAIN, f"{self._name(0)} is gone", tell=False)
            signal.signal(signal.SIGABRT, signal.SIG_DFL)

        self._aborted = ctypes.CFUNCTYPE(None, ctypes.c_int)(aborted)  # kept: C holds no reference
        ctypes.CDLL(None).signal(signal.SIGABRT, self._aborted)

    def _service_listens(self) -> bool:
        host, _, port = self._coordinator.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        except OSError:
            return False
        return True
