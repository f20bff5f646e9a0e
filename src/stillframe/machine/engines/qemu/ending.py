"""The end of a machine whose guest a QEMU runs: why it came, once, and whether there is to be another QEMU instead.

a client said quit, the guest powered itself off      QEMU told why, or we know; it ends with status 0
QEMU died                                             nobody asked: `failure` has its last words, and what is to be done
                                                      about it was chosen at the start
"""

import threading
import time
from typing import Final

from stillframe.events import Event, EventBus
from stillframe.machine.engines.qemu.process import QemuProcess
from stillframe.machine.machine import Shutdown
from stillframe.machine.run_state import RunState

_NOBODY_ASKED: Final = frozenset({"host-signal", "host-error"})
_RESTARTS_AT_MOST: Final = 3
_RESTART_SECONDS: Final = 60.0


class Ending:
    """Of one machine; any thread may call.

    :param restart: a QEMU that dies is started anew, three times a minute.
    :ivar shutdown: why it ended, once it has. :ivar failure: why QEMU did, where nobody asked it to.
    :ivar run_state: of a machine that has ended.
    """

    def __init__(self, events: EventBus, *, restart: bool) -> None:
        self._events = events
        self._restart = restart
        self._restarts: list[float] = []
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._told: Shutdown | None = None
        self.shutdown: Shutdown | None = None
        self.failure: str | None = None
        self.run_state = RunState.SHUTDOWN

    def hear(self, event: Event) -> None:
        """QEMU says why it is about to end; it may stay all the same: -no-shutdown."""
        self._told = Shutdown(bool(event.data.get("guest")), str(event.data.get("reason")))

    def ask(self, reason: str) -> None:
        """The machine is to end, whatever QEMU says."""
        with self._lock:
            if self.shutdown is None:
                self.shutdown = Shutdown(guest=False, reason=reason)
                self._events.emit("SHUTDOWN", guest=False, reason=reason)
        self._over.set()

    def wants_another(self, process: QemuProcess) -> bool:
        """Whether there is to be another in the place of this one, which has ended; each time counts."""
        with self._lock:
            if not self._restart or not self._has_failed(process):
                return False
            now = time.monotonic()
            self._restarts = [each for each in self._restarts if now - each < _RESTART_SECONDS]
            if len(self._restarts) >= _RESTARTS_AT_MOST:
                return False
            self._restarts.append(now)
            self._told = None
            return True

    def _has_failed(self, process: QemuProcess) -> bool:
        asked_for = self._told is not None and self._told.reason not in _NOBODY_ASKED
        return self.shutdown is None and (not asked_for or bool(process.exit_status))

    def come(self, process: QemuProcess) -> None:
        """QEMU has ended, and the machine with it."""
        with self._lock:
            if self.shutdown is None:
                if self._has_failed(process):
                    words = process.last_words or "it said nothing"
                    self.failure = f"QEMU ended with {process.exit_text}: {words}"
                    self.run_state = RunState.INTERNAL_ERROR
                self.shutdown = self._told or Shutdown(guest=False, reason="host-error")
                if self._told is None:
                    self._events.emit("SHUTDOWN", guest=False, reason="host-error")
        self._over.set()

    def wait(self, timeout: float | None) -> None:
        """For the end, or as many seconds."""
        self._over.wait(timeout)
