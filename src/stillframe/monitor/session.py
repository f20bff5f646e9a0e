"""One client of a monitor: greeting, negotiation, then commands one at a time, with events in between.

Until a command is answered nothing more is read, and nothing is read either while what was answered has not
been taken: a client that does not read its replies stops itself, and loses its connection when it has taken nothing of them for
long. Events cannot wait like that; a client with too much of them unread loses its connection.

A client that has negotiated `oob` is read from while a command is at work:

    messages ──▶ exec-oob ────────────────────▶ answered at once
        └──────▶ anything else ──▶ queue of 8 ──▶ answered in order

With the queue full nothing more is read, out-of-band commands neither: as in QEMU a client that wants them heard has fewer
than that outstanding.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from enum import Enum
from typing import Any, Final

import msgspec

from stillframe import __version__
from stillframe.errors import CommandNotFound, InvalidRequest, StillframeError
from stillframe.events import Event
from stillframe.monitor import wire
from stillframe.monitor.host import Host
from stillframe.monitor.schema import COMMANDS, Command, Structure
from stillframe.monitor.streams import Stream
from stillframe.monitor.tokens import JSONError
from stillframe.monitor.visitor import check_arguments

_log = logging.getLogger(__name__)

MAX_UNSENT_BYTES: Final = 8 << 20
"""Of events; the reply that a client has asked for does not count."""
DEAF_SECONDS: Final = 60.0
MAX_QUEUED: Final = 8
"""Requests that wait behind the one at work, of a client with `oob`; QEMU's number."""

_BREATH_MESSAGES: Final = 16

Runner = Callable[[Callable[[], Any]], Awaitable[Any]]
"""Runs a function on a thread that may block, and waits for it."""


class QMPCapability(Enum):
    """What a client can have switched on; `oob`: commands that overtake others."""

    OOB = "oob"


class VersionTriple(Structure):
    """:param major: :param minor: :param micro: the version of QEMU whose words are spoken."""

    major: int
    minor: int
    micro: int


class VersionInfo(Structure):
    """A program's version.

    :param qemu: the version of QEMU whose words are spoken; clients key their behaviour on it.
    :param package: who really speaks: "stillframe-" and its version.
    """

    qemu: VersionTriple
    package: str


_CAPABILITIES: Final = [each.value for each in QMPCapability]
_END: Final = object()

VERSION: Final = VersionInfo(VersionTriple(10, 0, 13), f"stillframe-{__version__}")


def event_message(event: Event) -> bytes:
    """An event as it goes over the wire."""
    seconds, rest = divmod(event.time_ns, 1_000_000_000)
    message: dict[str, Any] = {
        "timestamp": {"seconds": seconds, "microseconds": rest // 1000},
        "event": event.name,
    }
    if event.data:
        message["data"] = msgspec.to_builtins(dict(event.data))
    return wire.encode(message)


class Session:
    """See the module's text. Lives on the control plane's loop.

    :param run_blocking: where commands are run.
    :param who: for the log.
    :param on_tcp: a web page can make its reader's browser send anything to a TCP port of the host, in the
        body of a request whose head would be forgiven here: a client that begins as HTTP does is not listened
        to.
    """

    def __init__(
        self, host: Host, stream: Stream, run_blocking: Runner, who: str, *, on_tcp: bool = False
    ) -> None:
        self._on_tcp = on_tcp
        self._host = host
        self._stream = stream
        self._run_blocking = run_blocking
        self._who = who
        self._negotiated = False
        self._has_oob = False
        self._owed = 0

    def greet(self) -> None:
        """Say who speaks."""
        greeting = {"QMP": {"version": msgspec.to_builtins(VERSION), "capabilities": _CAPABILITIES}}
        self._stream.write(wire.encode(greeting))

    async def run(self) -> None:
        """Serve the client until it goes, or the machine ends."""
        messages = self._messages()
        async for message in messages:
            await self._serve(message)
            if self._host.over:
                return
            if self._has_oob:
                await self._run_with_oob(messages)
                return

    async def _run_with_oob(self, messages: AsyncIterator[Any]) -> None:
        waiting: asyncio.Queue[Any] = asyncio.Queue()
        room = asyncio.Semaphore(MAX_QUEUED)
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._read_ahead(messages, waiting, room))
            while (message := await waiting.get()) is not _END:
                room.release()
                await self._serve(message)
                if self._host.over:
                    reading.cancel()
                    return

    async def _read_ahead(
        self, messages: AsyncIterator[Any], waiting: "asyncio.Queue[Any]", room: asyncio.Semaphore
    ) -> None:
        try:
            await room.acquire()
            async for message in messages:
                if _is_oob(message):
                    await self._serve(message)
                else:
                    waiting.put_nowait(message)
                    await room.acquire()
        finally:
            # What was asked before the client went is still done.
            waiting.put_nowait(_END)

    async def _messages(self) -> AsyncIterator[Any]:
        """What the client sends: values, and a `JSONError` for each error in its text."""
        decoder = wire.Decoder()
        heard = 0
        while data := await self._stream.read():
            if self._on_tcp and not heard and data[:1].isupper():
                _log.warning("%s speaks HTTP: connection closed", self._who)
                return
            for message in decoder.feed(data):
                heard += 1
                yield message
                if heard % _BREATH_MESSAGES == 0:
                    await asyncio.sleep(0)
            # Neither reading nor draining need to wait: without this a flood of one client's would keep the
            # others waiting.
            await asyncio.sleep(0)

    async def _serve(self, message: Any) -> None:
        reply = wire.encode(await self._answer(message))
        self._owed += len(reply)
        self._stream.write(reply)
        if self._stream.unsent:
            await self._stream.drain_or_close(DEAF_SECONDS, self._who)
        self._owed -= len(reply)

    async def finish(self, seconds: float) -> None:
        """Close once everything was taken, or `seconds` have passed."""
        await self._stream.finish(seconds, self._who)

    def tell(self, message: bytes) -> None:
        """Send an event, as `event_message` made it, if the client is ready for events."""
        if not self._negotiated:
            return
        if self._stream.unsent - self._owed > MAX_UNSENT_BYTES:
            _log.warning("%s does not read its events: connection closed", self._who)
            self._stream.close()
            return
        self._stream.write(message)

    # Commands

    async def _answer(self, message: Any) -> dict[str, Any]:
        identity = {"id": message["id"]} if isinstance(message, dict) and "id" in message else {}
        try:
            return {"return": await self._execute(message), **identity}
        except StillframeError as error:
            refusal = {"class": error.qmp_class, "desc": str(error)}
        except Exception as error:
            _log.exception("a command failed in a way that nobody foresaw")
            refusal = {"class": "GenericError", "desc": f"{type(error).__name__}: {error}"}
        return {"error": refusal, **identity}

    async def _execute(self, message: Any) -> Any:
        if isinstance(message, JSONError):
            raise message
        name, arguments, is_oob = _request(message, has_oob=self._has_oob)
        other = self._host.machine.other_monitor
        if self._negotiated and other is not None and not is_oob and _is_of_program(name):
            return await self._run_blocking(lambda: other.execute(name, arguments))
        command = self._find(name)
        if is_oob and not command.allow_oob:
            raise InvalidRequest(f"The command {name} does not support OOB")
        given = check_arguments(command.arguments, arguments) if command.checked else arguments
        first = self if command.of_session else self._host
        parameters = (first, given) if command.takes_arguments else (first,)
        if command.of_session or (command.on_loop and other is None):
            # Whoever else runs the guest may take his time to say how it does.
            return _builtins(command.function(*parameters))
        return await self._run_blocking(lambda: _builtins(command.function(*parameters)))

    def _find(self, name: str) -> Command:
        command = COMMANDS.get(name)
        if not self._negotiated and name != "qmp_capabilities":
            raise CommandNotFound("Expecting capabilities negotiation with 'qmp_capabilities'")
        if command is None:
            raise CommandNotFound(f"The command {name} has not been found")
        return command

    def negotiate(self, wanted: list[QMPCapability]) -> None:
        """The client has chosen: from now on it may give commands, and hears of events.

        :raise CommandNotFound: it has chosen before.
        """
        if self._negotiated:
            raise CommandNotFound("Capabilities negotiation is already complete, command ignored")
        self._negotiated = True
        self._has_oob = QMPCapability.OOB in wanted


def _builtins(result: Any) -> Any:
    return {} if result is None else msgspec.to_builtins(result)


def _is_of_program(name: str) -> bool:
    """Whether a command is for whoever else runs the guest, if somebody does."""
    command = COMMANDS.get(name)
    return command is None or command.of_program


def _is_oob(message: Any) -> bool:
    return isinstance(message, dict) and "exec-oob" in message and "execute" not in message


def _request(message: Any, *, has_oob: bool) -> tuple[str, Mapping[str, Any], bool]:
    """A command's name and arguments, and whether it is to be executed out of band.

    :param has_oob: that was negotiated.
    :raise InvalidRequest: the message is not a request; members are looked at in the order of QEMU's
        dictionary.
    """
    if not isinstance(message, dict):
        raise InvalidRequest("QMP input must be a JSON object")
    chosen: str | None = None
    for name in wire.members_in_order(message):
        value = message[name]
        if name == "execute" or (name == "exec-oob" and has_oob):
            if not isinstance(value, str):
                raise InvalidRequest(f"QMP input member '{name}' must be a string")
            if chosen is not None:
                raise InvalidRequest(f"QMP input member '{name}' clashes with '{chosen}'")
            chosen = name
        elif name == "arguments":
            if not isinstance(value, dict):
                raise InvalidRequest("QMP input member 'arguments' must be an object")
        elif name != "id":
            raise InvalidRequest(f"QMP input member '{name}' is unexpected")
    if chosen is None:
        raise InvalidRequest("QMP input lacks member 'execute'")
    return message[chosen], message.get("arguments", {}), chosen == "exec-oob"
