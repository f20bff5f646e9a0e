"""What the guest does, kept from what QEMU says unasked, so that it is known while QEMU does not answer.

QEMU tells of each change by an event, before it answers the command that brought it about. In a pause of ours clients are shown
what the guest did before it, and do not hear of it: to them it runs on.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from stillframe.events import Event
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.machine.run_state import RunState

_OTHER_STATES: Final = {
    "postmigrate": RunState.PAUSED,
    "finish-migrate": RunState.SAVE_VM,
    "inmigrate": RunState.RESTORE_VM,
}
_STOPS_IN: Final = {
    "BLOCK_IO_ERROR": RunState.IO_ERROR,
    "WATCHDOG": RunState.WATCHDOG,
    "GUEST_PANICKED": RunState.GUEST_PANICKED,
    "SHUTDOWN": RunState.SHUTDOWN,
}
"""Events before a STOP, and the state that it is one into."""
_STOPPING: Final = frozenset({"stop", "pause", "poweroff"})
"""What such an event calls it, where the guest may go on as well."""


class LastKnown:
    """See the module's text. Any thread may call.

    :ivar stop_asked: whether a client's last word about it was to stop.
    :ivar stops_itself: QEMU may stop the guest by itself, for a save of ours.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._now = self._before = RunState.PRELAUNCH
        self._pauses = 0
        self._changes = 0
        self._suspended = False
        self._stops_in = RunState.PAUSED
        self.stop_asked = False
        self.stops_itself = False

    @property
    def state(self) -> RunState:
        """For clients."""
        with self._lock:
            return self._before if self._pauses else self._now

    @property
    def in_pause(self) -> bool:
        """Whether it is a pause of ours."""
        return self._pauses > 0

    @contextmanager
    def pause(self) -> Iterator[None]:
        """A block with a pause of ours."""
        with self._lock:
            if self._pauses == 0:
                self._before = self._now
            self._pauses += 1
        try:
            yield
        finally:
            with self._lock:
                self._pauses -= 1

    def ask(self, monitor: QemuMonitor, seconds: float) -> RunState:
        """What QEMU says, within so many seconds; kept, unless something has changed since it was asked. :raise PeerError:"""
        changes = self._changes
        word = monitor.execute("query-status", seconds=seconds)["status"]
        found = _OTHER_STATES.get(word) or RunState(word)
        with self._lock:
            # The end of a migration is ours, and nothing that lasts.
            if changes == self._changes and found is not RunState.SAVE_VM:
                self._now = found
        return found

    def another(self) -> None:
        """Another QEMU is the machine. Its guest stands still."""
        with self._lock:
            self._changes += 1
            self._now, self._stops_in, self._suspended = RunState.PAUSED, RunState.PAUSED, False

    def end(self, state: RunState) -> None:
        """No QEMU is the machine any more, which is shown in a pause of ours, too."""
        with self._lock:
            self._changes += 1
            self._now = self._before = state

    def stopped(self) -> None:
        """A client's command to stop was obeyed. QEMU says nothing of it where it had stopped the guest by itself."""
        with self._lock:
            if self._now is RunState.RUNNING:
                self._changes += 1
                self._now = RunState.PAUSED

    def hear(self, event: Event) -> bool:
        """An event of the machine's QEMU. :return: whether clients are to hear it."""
        with self._lock:
            by_itself = event.name == "STOP" and self.stops_itself and not self.stop_asked
            if self._pauses or not by_itself:
                # Else our pause comes yet, and what is shown in it is that the guest runs.
                self._follow(event)
            return not by_itself and not (self._pauses and event.name in ("STOP", "RESUME"))

    def _follow(self, event: Event) -> None:
        before = self._now
        match event.name:
            case "STOP":
                self._now, self._stops_in = self._stops_in, RunState.PAUSED
            case "RESUME":
                self._now = RunState.SUSPENDED if self._suspended else RunState.RUNNING
                self._stops_in = RunState.PAUSED
            case "SUSPEND":
                self._now, self._suspended = RunState.SUSPENDED, True
            case "WAKEUP":
                self._suspended = False
                if before is RunState.SUSPENDED:
                    self._now = RunState.RUNNING
            case "RESET":
                self._suspended = False
                if before is not RunState.RUNNING:
                    self._now = RunState.PRELAUNCH
            case name if name in _STOPS_IN and event.data.get("action", "stop") in _STOPPING:
                self._stops_in = _STOPS_IN[name]
        self._changes += self._now is not before
