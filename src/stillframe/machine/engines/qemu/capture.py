"""The state of a QEMU guest at one instant, taken as a migration stream.

    background   QEMU tracks writes, and the guest goes on as soon as it does; the stream's first page record is the proof that it
                 does (an event that says so can come too early). The pause is the setup.
    precopy      where QEMU may not track writes: memory is sent while the guest runs, and what changed meanwhile in the pause
    stopped      the guest stands still for all of it: one that its user paused on a QEMU before 8, or the last resort

Which one it was, and why not the one before, is in `Capture.how` and `why`. After each of them, and after each failure, the guest
runs if it ran before.

A QEMU before 8 must never lose its reader in a background snapshot: its guest would stand still for good. There a stream that
nobody wants any more is read to its end and thrown away.

A guest that stood still before stays in QEMU's state "postmigrate" after the last two, out of which postmigrate.py brings it.
"""

import contextlib
import errno
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, Protocol

from stillframe.errors import IOFailed, PeerError, StreamCorrupt, io_failed
from stillframe.events import Event
from stillframe.machine.engines.qemu.huge_pages import fold_other
from stillframe.machine.engines.qemu.keeper import Keeper
from stillframe.machine.engines.qemu.monitor import STOPPED_BY_US, QemuMonitor
from stillframe.machine.engines.qemu.postmigrate import leave_postmigrate
from stillframe.machine.engines.qemu.spool import Spool
from stillframe.sockets import listening_unix_socket
from stillframe.vmstate import layout
from stillframe.vmstate.relayed import RelayedHead, read_head
from stillframe.vmstate.transfer import StateSource

_log = logging.getLogger(__name__)

How = Literal["background", "precopy", "stopped"]

ENDLESS: Final = 1 << 62
"""Bytes: the size of a stream whose end is not known."""

_BANDWIDTH: Final = 100 << 30
_SETUP_SECONDS: Final = 60.0
_DOWNTIME_MS: Final = 100
"""QEMU stops the guest itself when it expects to need no longer for the rest."""
_PASSES: Final = 5
"""Over the guest's memory, after which one that changes it faster than that has to wait for the rest."""
_ATTENTION_SECONDS: Final = 0.1
_RESUME_SECONDS: Final = 10.0
_OVER: Final = frozenset({"completed", "failed", "cancelled"})


class Pause:
    """A stop of ours. :param ran: whether the guest ran before, and shall again.

    :ivar ends_itself: QEMU lets the guest go on by itself, and must not be told to.
    """

    def __init__(self, *, ran: bool) -> None:
        self.ran = ran
        self.ends_itself = False

    def wait_for_itself(self, runs: Callable[[], bool]) -> None:
        """Until it runs, if QEMU does that by itself; not for ever."""
        deadline = time.monotonic() + _RESUME_SECONDS
        while self.ends_itself and not runs() and time.monotonic() < deadline:
            time.sleep(0.002)


@dataclass(frozen=True, slots=True)
class Instant:
    """What is to be done while the guest stands still.

    :param work: called in the pause. :param others_at_rest: a block around it, in which nobody but the guest changes a disk.
    """

    work: Callable[[], None]
    others_at_rest: Callable[[], AbstractContextManager[object]]

    @contextmanager
    def coming(self) -> Iterator[Callable[[], None]]:
        """A block for the pause, which begins before it: waiting for the others is no part of it. They go on after the call.

        :return: does the work.
        """
        with ExitStack() as others:
            others.enter_context(self.others_at_rest())

            def happen() -> None:
                self.work()
                others.close()

            yield happen


class Guest(Protocol):
    """The guest, as far as a capture stops it."""

    def paused(self, stop: Callable[[], None] | None = None) -> AbstractContextManager[Pause]:
        """A block in which it stands still, stopped by the command or by what is given."""
        ...

    def runs(self) -> bool:
        """Whether it runs."""
        ...

    def stop_asked(self) -> bool:
        """Whether a client's last word about that was to stop."""
        ...

    def stopping_itself(self) -> AbstractContextManager[None]:
        """In the block QEMU may stop it by itself, of which clients do not hear."""
        ...


class MigrationStatus:
    """What QEMU's MIGRATION events say of the migration that is under way.

    :ivar passes: how often it has begun to go over the guest's memory.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._status = "none"
        self.passes = 0

    def begin(self) -> None:
        """A new one: nothing that was said counts."""
        with self._changed:
            self._status = "none"
            self.passes = 0

    def hear(self, event: Event) -> None:
        """A MIGRATION event, or MIGRATION_PASS."""
        with self._changed:
            if event.name == "MIGRATION":
                self._status = str(event.data.get("status"))
            else:
                self.passes = int(event.data.get("pass", 0))
            self._changed.notify_all()

    def end(self) -> None:
        """QEMU is gone: whatever was under way has failed."""
        with self._changed:
            self._status = "failed"
            self._changed.notify_all()

    @property
    def now(self) -> str:
        """In QEMU's words; "none" before the first."""
        return self._status

    @property
    def over(self) -> bool:
        """Whether it has ended, in any way."""
        return self._status in _OVER

    def wait_for(self, wanted: str, seconds: float) -> bool:
        """Whether that status, or the end, has come within that time."""
        with self._changed:
            return self._changed.wait_for(lambda: self._status == wanted or self.over, seconds)

    def wait_until_over(self, seconds: float | None = None) -> bool:
        """Whether it has ended, in any way, within that time. QEMU's own end is one."""
        with self._changed:
            return self._changed.wait_for(lambda: self.over, seconds)


class Capture:
    """A stream on its way; made by `captured`.

    :ivar how: :ivar why: see the module's text. :ivar head: the stream's beginning, which has been read.
    :ivar not_quiesced: as `control.CapturedState`.
    """

    def __init__(self, spool: Spool, monitor: QemuMonitor, status: MigrationStatus) -> None:
        self._spool = spool
        self._monitor = monitor
        self._status = status
        self.how: How = "background"
        self.why = ""
        self.not_quiesced = ""
        self.head: RelayedHead

    def read_head(self) -> None:
        """Wait for the stream's beginning. :raise IOFailed: QEMU failed, in its words."""
        source = StateSource(self._spool.read, ENDLESS, transfer=1)
        try:
            self.head = read_head(source)
        except StreamCorrupt:
            if self._status.over or self._spool.ended:
                raise self.failure() from None
            raise
        self._begin = source.offset

    def wait_for_tracking(self) -> None:
        """Until the first page record, which QEMU sends when it tracks writes. :raise IOFailed: QEMU failed."""
        deadline = time.monotonic() + _SETUP_SECONDS
        while not self._spool.has(self._begin + 1, 0.05):
            if self._status.over or time.monotonic() > deadline:
                raise self.failure()
        if self._spool.read(self._begin, 1) != bytes((layout.PART,)):
            raise self.failure()

    def source(self) -> StateSource:
        """The stream behind its head; to be read once."""
        source = StateSource(self._read, ENDLESS)
        source.seek(self._begin)
        return source

    def _read(self, offset: int, length: int) -> bytes:
        """:raise IOFailed: the stream ended before its end."""
        data = self._spool.read(offset, length)
        if len(data) < length:
            self.refuse_unless_completed(_SETUP_SECONDS)
        return data

    def refuse_unless_completed(self, seconds: float | None = None) -> None:
        """Wait for the migration's end, for that long at most. :raise IOFailed: it did not end well."""
        self._status.wait_until_over(seconds)
        if self._status.now != "completed":
            raise self.failure()

    def rest(self, offset: int, most: int) -> bytes:
        """Everything from `offset` to the stream's end, once QEMU says that it is complete.

        :raise IOFailed: it is not. :raise StreamCorrupt: there are more than `most` bytes.
        """
        data = self._spool.read(offset, most + 1)
        if len(data) > most:
            raise StreamCorrupt(f"QEMU's device state has more than {most} bytes")
        self.refuse_unless_completed(_SETUP_SECONDS)
        return data

    def failure(self) -> IOFailed:
        """What QEMU says of a stream that did not come."""
        try:
            found = self._monitor.execute("query-migrate")
            why = found.get("error-desc") or f"its status is '{found.get('status')}'"
        except PeerError as error:
            why = str(error)
        return IOFailed(f"QEMU has not given its state: {why}", errno=errno.EIO)

    def end(self, *, may_cancel: bool) -> None:
        """Nobody reads on: bring the migration to its end, if it has none."""
        if self._status.now == "none" or self._status.over:
            return
        self._spool.throw_away()
        if may_cancel:
            with contextlib.suppress(PeerError):
                self._monitor.execute("migrate_cancel")
        # Before 8 there is no other way than to let it finish.
        if not self._status.wait_until_over(_SETUP_SECONDS if may_cancel else None):
            _log.error(
                "QEMU has not ended a migration that was cancelled: its status is '%s'", self._status.now
            )


class Capturing:
    """How one QEMU is asked for its state.

    :param pid: its process. :param directory: its own. :param words: that the user gave it.
    """

    def __init__(
        self,
        monitor: QemuMonitor,
        pid: int,
        directory: Path,
        status: MigrationStatus,
        guest: Guest,
        words: Sequence[str] = (),
    ) -> None:
        self._monitor = monitor
        self._pid = pid
        self._directory = directory
        self._path = directory / "migration"
        self._status = status
        self._guest = guest
        self._words = words
        self._modern = monitor.version >= (8, 0, 0)

    def how(self, state: str) -> tuple[How, str]:
        """Which way it will be, and why not the better one; asks QEMU. :param state: the run state, in its word."""
        found = self._may_be(state)
        if found[0] == "background":
            try:
                self._enable("background_snapshot")
            except PeerError as error:
                why = f"QEMU may not track what its guest writes: {error}"
                return ("precopy" if state == "running" else "stopped"), why
        return found

    def _may_be(self, state: str) -> tuple[How, str]:
        """`how`, as far as the run state alone decides it."""
        if state != "running" and not self._modern:
            return "stopped", "a QEMU before 8 would let a paused guest run"
        if state not in ("running", "paused"):
            # QEMU ends itself: from "prelaunch", for one, there is no way to "paused" in its table of run states.
            return "stopped", f"QEMU would not survive another way in its run state '{state}'"
        return "background", ""

    def _enable(self, wanted: str = "") -> None:
        """Have this capability alone, of those that the ways differ in."""
        self._monitor.set_capabilities(
            # One that took its state by page fault can do so no more, and the two do not go together.
            postcopy_ram=False,
            background_snapshot=wanted == "background_snapshot",
            pause_before_switchover=wanted == "pause_before_switchover",
        )

    @contextmanager
    def captured(
        self,
        instant: Instant,
        refuse_if_cancelled: Callable[[], None],
        quiesced: Callable[[], AbstractContextManager[str]],
    ) -> Iterator[Capture]:
        """The guest's state of one instant, for as long as the block lasts; the guest goes on before it begins.

        :param instant: when none of the guest's requests is in flight.
        :param refuse_if_cancelled: called in what goes before the pause; raises to end it.
        :param quiesced: a block in which the guest's file systems are frozen, or why they are not.
        :raise Failed: QEMU does not give it; the guest goes on.
        """
        self._status.begin()
        how, why = self.how(self._state())
        self._monitor.execute(
            "migrate-set-parameters", {"max-bandwidth": _BANDWIDTH, "downtime-limit": _DOWNTIME_MS}
        )
        if how == "background":
            try:
                fold_other(self._pid, refuse_if_cancelled)
            except OSError as error:
                _log.info("QEMU's memory stays in small pages: %s", error.strerror)
        listener, file = listening_unix_socket(self._path)
        try:
            outlives_us = how == "background" and not self._modern
            spool = Spool(listener, Keeper(listener) if outlives_us else None)
        except OSError as error:
            listener.close()
            file.remove()
            raise io_failed(
                "Could not start the process that reads on if this one is killed", error
            ) from error
        capture = Capture(spool, self._monitor, self._status)
        capture.how, capture.why = how, why
        if why:
            _log.warning("The guest may stand still for longer (%s): %s", how, why)
        try:
            with quiesced() as capture.not_quiesced:
                if how == "background":
                    self._background(capture, instant)
                elif how == "precopy":
                    self._precopy(capture, instant, refuse_if_cancelled)
                else:
                    self._stopped(capture, instant)
            yield capture
        finally:
            try:
                capture.end(may_cancel=self._modern or capture.how != "background")
            finally:
                spool.close()
                file.remove()

    def _migrate(self) -> None:
        self._monitor.execute("migrate", {"uri": f"unix:{self._path}"})

    def _background(self, capture: Capture, instant: Instant) -> None:
        with instant.coming() as happen, self._guest.paused() as pause:
            # The guest may have stopped since, or been stopped: QEMU would let it run then, or end itself.
            capture.how, capture.why = self._may_be("running" if pause.ran else self._state())
            if capture.how == "background":
                try:
                    happen()
                    self._migrate()
                    pause.ends_itself = not self._modern
                    capture.read_head()
                    capture.wait_for_tracking()
                except BaseException:
                    # It must be over before the guest goes on, if QEMU has not let it by then.
                    pause.ends_itself = False
                    capture.end(may_cancel=self._modern)
                    raise
                return
        self._stopped(capture, instant)

    def _state(self) -> str:
        return str(self._monitor.execute("query-status")["status"])

    def _shall_run(self, *, ran: bool) -> bool:
        """Whether a guest that ran has stopped for us alone, if at all."""
        return ran and not self._guest.stop_asked() and self._state() in {"running", *STOPPED_BY_US}

    def _precopy(self, capture: Capture, instant: Instant, refuse_if_cancelled: Callable[[], None]) -> None:
        shall_run = False

        def switch_over() -> None:
            nonlocal shall_run
            # Not what it is later: QEMU may have stopped it before we looked.
            shall_run = self._shall_run(ran=ran)
            self._monitor.execute("stop")
            self._status.wait_for("pre-switchover", _SETUP_SECONDS)
            if self._status.now != "pre-switchover":
                raise capture.failure()

        ran = self._guest.runs()
        self._enable("pause_before_switchover")
        with self._guest.stopping_itself(), ExitStack() as others:
            try:
                self._migrate()
                while not self._status.wait_for("pre-switchover", _ATTENTION_SECONDS):
                    refuse_if_cancelled()
                    if self._status.passes > _PASSES:
                        capture.why += "; the guest changes its memory faster than it can be sent"
                        break
                happen = others.enter_context(instant.coming())
            except BaseException:
                self._give_up(capture, ran=ran)
                raise
            with self._guest.paused(switch_over) as pause:
                pause.ran = shall_run
                try:
                    happen()
                    self._monitor.execute("migrate-continue", {"state": "pre-switchover"})
                    self._complete(capture)
                except BaseException:
                    capture.end(may_cancel=True)
                    raise

    def _give_up(self, capture: Capture, *, ran: bool) -> None:
        """Before our pause: QEMU may be about to stop the guest, or have stopped it."""
        with self._guest.paused(lambda: capture.end(may_cancel=True)) as pause:
            pause.ran = self._shall_run(ran=ran)

    def _stopped(self, capture: Capture, instant: Instant) -> None:
        self._enable()
        with instant.coming() as happen, self._guest.paused():
            if self._state() == "postmigrate":
                leave_postmigrate(self._monitor, self._directory, self._words)
            try:
                happen()
                self._migrate()
                self._complete(capture)
            except BaseException:
                capture.end(may_cancel=True)
                raise

    def _complete(self, capture: Capture) -> None:
        """Wait for the stream's end; QEMU's end ends the wait. :raise IOFailed:"""
        capture.refuse_unless_completed()
        capture.read_head()
