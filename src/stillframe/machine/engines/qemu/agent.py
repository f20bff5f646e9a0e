"""QEMU's guest agent: a program in the guest that freezes its file systems and sets its clock, spoken with through a port of ours.

The port is a socket in QEMU's private directory, where QEMU listens. Each conversation begins with a byte that no JSON holds and
`guest-sync-delimited`: what an earlier one left behind is skipped. An agent that is not there says nothing, so every wait has an
end.
"""

import contextlib
import itertools
import json
import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from stillframe.errors import NotFound, PeerError
from stillframe.sockets import connected_unix_socket

_log = logging.getLogger(__name__)

_DELIMITER: Final = b"\xff"
_GREETING_SECONDS: Final = 5.0
"""For an agent to say that it is there."""
_FREEZE_SECONDS: Final = 20.0
"""It writes back what is not on the disks yet."""
_THAW_SECONDS: Final = 30.0
_numbers = itertools.count(int(time.time()))


class GuestAgent:
    """One conversation. :param path: of the port's socket. :raise PeerError: nobody answers there."""

    def __init__(self, path: Path) -> None:
        try:
            self._socket = connected_unix_socket(path)
        except (PeerError, NotFound) as error:
            raise PeerError(f"The guest agent's port cannot be reached: {error}") from error
        self._lines = b""
        try:
            self._greet()
        except BaseException:
            self.close()
            raise

    def _greet(self) -> None:
        number = next(_numbers)
        deadline = time.monotonic() + _GREETING_SECONDS
        request = json.dumps({"execute": "guest-sync-delimited", "arguments": {"id": number}}).encode()
        self._send(_DELIMITER + request + b"\n", deadline)
        while True:
            # What stands before the last delimiter belongs to others.
            line = self._line(deadline).rpartition(_DELIMITER)[2]
            with contextlib.suppress(ValueError):
                if json.loads(line).get("return") == number:
                    return

    def _send(self, data: bytes, deadline: float) -> None:
        try:
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            self._socket.sendall(data)
        except OSError as error:
            raise PeerError(f"The guest agent does not answer: {error}") from error

    def _line(self, deadline: float) -> bytes:
        while b"\n" not in self._lines:
            try:
                self._socket.settimeout(max(0.01, deadline - time.monotonic()))
                data = self._socket.recv(4096)
            except TimeoutError:
                raise PeerError(
                    "The guest agent does not answer", remedy="Does it run in the guest?"
                ) from None
            except OSError as error:
                raise PeerError(f"The guest agent's port was closed: {error}") from error
            if not data:
                raise PeerError("The guest agent's port was closed")
            self._lines += data
        line, _, self._lines = self._lines.partition(b"\n")
        return line

    def execute(self, command: str, seconds: float, **arguments: Any) -> Any:
        """What the agent answers. :raise PeerError: it says no, in its words, or nothing in that time."""
        deadline = time.monotonic() + seconds
        request = {"execute": command, "arguments": arguments} if arguments else {"execute": command}
        self._send(json.dumps(request).encode() + b"\n", deadline)
        try:
            answer = json.loads(self._line(deadline))
        except ValueError as error:
            raise PeerError(f"The guest agent's answer to '{command}' is not JSON") from error
        if "error" in answer:
            raise PeerError(f"The guest agent refused '{command}': {answer['error'].get('desc')}")
        return answer.get("return")

    def freeze(self) -> int:
        """Freeze all file systems; how many they are. :raise PeerError: it could not; some may be frozen."""
        return int(self.execute("guest-fsfreeze-freeze", _FREEZE_SECONDS))

    def thaw(self) -> int:
        """Let them be written to again; how many were frozen. :raise PeerError:"""
        return int(self.execute("guest-fsfreeze-thaw", _THAW_SECONDS))

    def set_time(self) -> None:
        """Give the guest the host's time. :raise PeerError:"""
        self.execute("guest-set-time", _GREETING_SECONDS, time=time.time_ns())

    def close(self) -> None:
        """End the conversation."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()


@contextlib.contextmanager
def agent_at(path: Path) -> Iterator[GuestAgent]:
    """A conversation for as long as the block lasts. :raise PeerError:"""
    agent = GuestAgent(path)
    try:
        yield agent
    finally:
        agent.close()


def thaw(path: Path, runs: Callable[[], bool]) -> None:
    """Whatever came before: nothing stays frozen, tried for half a minute while the guest runs.

    :raise PeerError: the agent has not said that it thawed.
    """
    deadline = time.monotonic() + _THAW_SECONDS
    while True:
        try:
            with agent_at(path) as agent:
                agent.thaw()
            return
        except PeerError:
            if time.monotonic() > deadline or not runs():
                raise
            time.sleep(0.1)


def wake(path: Path) -> None:
    """After a load: thaw what the snapshot has frozen, and set the clock. An agent that does not answer is told to the log."""
    try:
        with agent_at(path) as agent:
            agent.thaw()
            agent.set_time()
    except PeerError as error:
        _log.warning("The guest's clock is not set after the load: %s", error)
