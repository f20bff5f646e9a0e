"""QEMU's own monitor, as one client of it: ours, and the only one.

Commands may be given by several threads; each waits for its own answer. Events, and the end of the connection, are told on the
thread that reads. The library qemu.qmp is not used here: it wants an event loop, and what calls this are plain threads in the
pause of a save.
"""

import itertools
import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Final

import msgspec

from stillframe.errors import InvalidRequest, PeerError
from stillframe.events import Event

_log = logging.getLogger(__name__)

DEFAULT_SECONDS: Final = 60.0
"""For an answer: QEMU's main thread may be busy with a flush, and is given up on only then."""

STOPPED_BY_US: Final = frozenset({"paused", "finish-migrate", "postmigrate"})
"""Run states of a guest that ran until we or a migration of ours stopped it. In others it stopped by itself: it must not go on."""

_MAXIMUM_LINE: Final = 64 << 20
"""Bytes; QEMU's longest answer, its schema, has a quarter of a mebibyte."""


class QemuMonitor:
    """A negotiated connection.

    :param connection: to QEMU's monitor socket; closed with this.
    :param on_event: told of every event, in order. :param on_end: called once, when QEMU has closed the connection.
    :param deadline: of the monotonic clock, by when it must have greeted; None waits for the connection's end.
    :raise PeerError: what answers is no monitor, or nothing does.
    """

    def __init__(
        self,
        connection: socket.socket,
        on_event: Callable[[Event], None],
        on_end: Callable[[], None] = lambda: None,
        deadline: float | None = None,
    ) -> None:
        self._socket = connection
        self._on_event = on_event
        self._on_end = on_end
        self._sending = threading.Lock()
        self._answered = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._waiting: set[int] = set()
        self._given_up: set[int] = set()
        self._ids = itertools.count()
        self._ended = False
        self._lines = connection.makefile("rb")
        if deadline is not None:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
        greeting = self._message()
        connection.settimeout(None)
        if greeting is None or "QMP" not in greeting:
            self._socket.close()
            raise PeerError("QEMU's monitor did not greet as one", remedy="See what QEMU printed.")
        found = greeting["QMP"]["version"]["qemu"]
        self.version: tuple[int, int, int] = (found["major"], found["minor"], found["micro"])
        """Of QEMU."""
        self._reader = threading.Thread(target=self._read, name="qemu-monitor", daemon=True)
        self._reader.start()
        self.execute("qmp_capabilities")

    def execute(
        self, command: str, arguments: Mapping[str, Any] | None = None, *, seconds: float = DEFAULT_SECONDS
    ) -> Any:
        """Run a command; what it returns.

        :param seconds: to wait for the answer; the end of QEMU ends the wait, too.
        :raise InvalidRequest: the arguments cannot be sent: a number that is infinite, or depth without end.
        :raise PeerError: QEMU says no, in its words and with its class; or it does not answer, or is gone.
        """
        number = next(self._ids)
        request: dict[str, Any] = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = arguments
        try:
            line = json.dumps(request, allow_nan=False).encode() + b"\n"
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(
                f"The arguments of '{command}' cannot be written as JSON: {error}"
            ) from error
        with self._answered:
            self._waiting.add(number)
        try:
            self._send(command, line)
            with self._answered:
                there = self._answered.wait_for(lambda: number in self._answers or self._ended, seconds)
                answer = self._answers.pop(number, None)
                if not there:
                    self._given_up.add(number)
        finally:
            with self._answered:
                self._waiting.discard(number)
                self._answers.pop(number, None)
        if answer is None:
            if there:
                raise PeerError(f"QEMU ended before it answered '{command}'")
            raise PeerError(f"QEMU has not answered '{command}' in {seconds:g} seconds")
        refusal = answer.get("error")
        if refusal is not None:
            raise PeerError(str(refusal.get("desc")), error_class=str(refusal.get("class", "GenericError")))
        return answer.get("return")

    def set_capabilities(self, **wanted: bool) -> None:
        """Switch capabilities of migrations on and off, `postcopy_ram` for "postcopy-ram", and their events on.

        :raise PeerError: QEMU has one of them not, or not together with the others; none has changed.
        """
        every = {"events": True, **wanted}
        self.execute(
            "migrate-set-capabilities",
            {
                "capabilities": [
                    {"capability": name.replace("_", "-"), "state": state} for name, state in every.items()
                ]
            },
        )

    def _send(self, command: str, line: bytes) -> None:
        try:
            with self._sending:
                self._socket.sendall(line)
        except OSError as error:
            raise PeerError(f"QEMU is gone, and did not get '{command}': {error.strerror}") from error

    @property
    def owes_an_answer(self) -> bool:
        """Whether something was given up on that QEMU has still to answer. Until then it answers nothing else."""
        return bool(self._given_up)

    @property
    def ended(self) -> bool:
        """Whether QEMU has closed the connection."""
        return self._ended

    def _message(self) -> dict[str, Any] | None:
        try:
            line = self._lines.readline(_MAXIMUM_LINE)
        except OSError:
            return None
        if not line:
            return None
        try:
            found = msgspec.json.decode(line)
        except msgspec.DecodeError:
            found = None
        if not isinstance(found, dict):
            raise PeerError(f"QEMU's monitor said something else than a message: {line[:80]!r}")
        return found

    def _read(self) -> None:
        try:
            while (message := self._message()) is not None:
                if "event" in message:
                    self._tell(message)
                else:
                    self._answer(message)
        except PeerError as error:
            _log.error("%s", error)
        finally:
            with self._answered:
                self._ended = True
                self._answered.notify_all()
            self._on_end()

    def _answer(self, message: dict[str, Any]) -> None:
        with self._answered:
            self._given_up.discard(message.get("id", -1))
            if message.get("id") in self._waiting:
                self._answers[message["id"]] = message
                self._answered.notify_all()

    def _tell(self, message: dict[str, Any]) -> None:
        stamp = message.get("timestamp", {})
        time_ns = stamp.get("seconds", 0) * 1_000_000_000 + stamp.get("microseconds", 0) * 1000
        try:
            self._on_event(Event(message["event"], message.get("data", {}), time_ns))
        except Exception:
            # One event that could not be told must not end the connection.
            _log.exception("an event of QEMU's could not be told: %s", message["event"])

    def close(self) -> None:
        """End the connection; QEMU goes on. A second time, nothing."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return
        if threading.current_thread() is not self._reader:
            self._reader.join()
        self._socket.close()


def let_run(monitor: QemuMonitor, seconds: float) -> None:
    """`cont`. A migration says that it is completed a moment before QEMU has finalized it, and until then does not let a guest run.

    :param seconds: for which that is waited for. :raise PeerError: QEMU does not let it run, or is gone.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            monitor.execute("cont")
            return
        except PeerError:
            silent = monitor.ended or monitor.owes_an_answer
            state = None if silent else monitor.execute("query-status")["status"]
            if state not in ("finish-migrate", "postmigrate") or time.monotonic() > deadline:
                raise
        time.sleep(0.002)


def asked(error: PeerError) -> InvalidRequest:
    """QEMU's refusal, as one of ours: for a command that a client gave and QEMU answers."""
    refusal = InvalidRequest(str(error))
    refusal.qmp_class = error.error_class  # type: ignore[misc]
    return refusal
