"""The first serial port of a QEMU guest, between QEMU's socket and the user's console, which outlives any one QEMU."""

import contextlib
import socket
import threading

from stillframe.machine.console import Console

_CHUNK = 4096


class SerialRelay:
    """Carries characters both ways, for one QEMU at a time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._socket: socket.socket | None = None
        self._wake = threading.Condition()
        self._something = False
        self._closed = False
        console.on_input = self._has_input
        self._writer = threading.Thread(target=self._to_guest, name="serial-input", daemon=True)
        self._writer.start()

    def _has_input(self) -> None:
        with self._wake:
            self._something = True
            self._wake.notify_all()

    def attach(self, connection: socket.socket) -> None:
        """From now on the port is this one; the former is let go."""
        former, self._socket = self._socket, connection
        if former is not None:
            _shut(former)
        threading.Thread(
            target=self._from_guest, args=(connection,), name="serial-output", daemon=True
        ).start()
        self._has_input()

    def _from_guest(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := connection.recv(_CHUNK):
                self._console.write(data)
        connection.close()

    def _to_guest(self) -> None:
        """Ends with `close`. Characters that meet no guest are dropped, as on a line that nobody listens at."""
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._something or self._closed)
                if self._closed:
                    return
                self._something = False
            connection = self._socket
            while connection is not None and (data := self._console.take(_CHUNK)):
                with contextlib.suppress(OSError):
                    connection.sendall(data)

    def close(self) -> None:
        """Let go of both ends; the console itself is its owner's to close."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._socket is not None:
            _shut(self._socket)
        self._writer.join(1.0)


def _shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
