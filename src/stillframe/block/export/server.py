"""Where clients connect: one listening socket, its connections, and a bound to them."""

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import Final

from stillframe.block.export.connection import Connection
from stillframe.block.export.export import Export
from stillframe.block.export.handshake import Exports
from stillframe.errors import InUse, InvalidRequest, Refused
from stillframe.sockets import SocketFile

_log = logging.getLogger(__name__)

MAXIMUM_CONNECTIONS: Final = 1000
"""However many are asked for."""
DEFAULT_CONNECTIONS: Final = 100
HANDSHAKE_SECONDS: Final = 10.0


class NbdServer:
    """Serves `exports` at one place until it is closed.

    :param listener: bound and listening, and this object's from now on. :param file: the socket's, where it has one.
    :param maximum: clients at a time; further ones wait to be accepted. 0 for as many as there can be.
    :param handshake_seconds: how long a client may take to say what it wants.
    """

    def __init__(
        self,
        listener: socket.socket,
        exports: Exports,
        *,
        file: SocketFile | None = None,
        maximum: int = DEFAULT_CONNECTIONS,
        handshake_seconds: float = HANDSHAKE_SECONDS,
    ) -> None:
        self._listener = listener
        self._exports = exports
        self._file = file
        self._maximum = min(maximum or MAXIMUM_CONNECTIONS, MAXIMUM_CONNECTIONS)
        self._handshake_seconds = handshake_seconds
        self._changed = threading.Condition()
        self._connections: set[Connection] = set()
        self._is_closed = False
        self._thread = threading.Thread(target=self._accept, name="nbd-accept", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int] | str:
        """Host and port, or the path."""
        name = self._listener.getsockname()
        return name if isinstance(name, str) else (name[0], name[1])

    def connected(self, export: Export) -> Sequence[Connection]:
        """The clients of an export."""
        with self._changed:
            return [
                each for each in self._connections if each.agreed is not None and each.agreed.export is export
            ]

    def disconnect(self, export: Export) -> None:
        """End an export's connections, and wait until they have: their requests in flight end with their I/O."""
        while found := self.connected(export):
            for each in found:
                each.end()
            with self._changed:
                while not self._connections.isdisjoint(found):
                    self._changed.wait()

    def close(self) -> None:
        """Listen no longer, end every connection and wait for it; the socket's file is gone at the return."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        if self._file is not None:
            self._file.remove()
        with contextlib.suppress(OSError):
            # It is what wakes the thread in `accept`.
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        with self._changed:
            for each in self._connections:
                each.end()
            self._changed.wait_for(lambda: not self._connections)

    def _accept(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_closed or len(self._connections) < self._maximum)
                if self._is_closed:
                    return
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if self._is_closed:
                    return
                # The host is short of descriptors or memory: clients wait until it has some again.
                _log.warning("The NBD server could not accept a client: %s", error)
                time.sleep(0.1)
                continue
            self._welcome(sock)

    def _welcome(self, sock: socket.socket) -> None:
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection = Connection(sock, self._exports, self._ended, handshake_seconds=self._handshake_seconds)
        with self._changed:
            self._connections.add(connection)
        try:
            connection.start()
        except RuntimeError:
            _log.warning("The NBD server has no thread left for a client")
            sock.close()
            self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        with self._changed:
            self._connections.discard(connection)
            self._changed.notify_all()


def listen_tcp(host: str, port: str) -> socket.socket:
    """A TCP port. Whoever reaches it can use every export: there is no authentication.

    :param port: its number or name; 0 for any that is free.
    :raise InvalidRequest: no host is named. :raise InUse: the port is taken. :raise Refused: it cannot be had.
    """
    if not host:
        raise InvalidRequest(
            "An NBD server on all addresses must be asked for by name",
            remedy="Say 127.0.0.1, or 0.0.0.0 if everybody who reaches this host may use the exports.",
        )
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise Refused(f"address resolution failed for {host}:{port}: {reason}") from error
    family, kind, protocol, _, address = found[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(64)
    except OSError as error:
        listener.close()
        raise InUse(f"Failed to find an available port: {error.strerror}") from error
    return listener
