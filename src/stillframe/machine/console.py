"""The other end of the guest's serial port: a terminal, a socket, a file, or a test.

A console never stops the guest: output that nobody takes is dropped once a bounded buffer is full, and input that the guest does
not take stays in a bounded buffer, behind which its source waits.
"""

import contextlib
import fcntl
import os
import select
import socket
import threading
import tty
from collections.abc import Callable
from io import FileIO
from pathlib import Path

from stillframe.errors import Refused, io_failed
from stillframe.sockets import SocketFile, listening_unix_socket, local_name

_INPUT_LIMIT = 64 << 10
_OUTPUT_LIMIT = 4 << 20
_CHUNK = 64 << 10
_LOOK_SECONDS = 0.2
"""How often a pseudo terminal that nobody has opened is looked at."""


class Console:
    """The base: drops output, and has the input that `feed` is given."""

    def __init__(self) -> None:
        self.on_input: Callable[[], None] = lambda: None
        """Called from any thread when there is something to `take`."""
        self._input = bytearray()
        self._room = threading.Condition()
        self._closed = False

    @property
    def filename(self) -> str:
        """What is at the other end, as QEMU names character devices."""
        return "null"

    def write(self, data: bytes) -> None:
        """Characters from the guest; returns at once."""

    def feed(self, data: bytes) -> None:
        """Characters for the guest. Waits while the buffer is full, until the guest takes some or the console is closed."""
        with self._room:
            while len(self._input) >= _INPUT_LIMIT and not self._closed:
                self._room.wait()
            self._input += data
        self.on_input()

    def take(self, limit: int) -> bytes:
        """At most `limit` characters of the input; never waits."""
        with self._room:
            taken = bytes(self._input[:limit])
            del self._input[:limit]
            self._room.notify_all()
        return taken

    def close(self) -> None:
        """Give up threads and descriptors; twice is allowed."""
        with self._room:
            self._closed = True
            self._room.notify_all()


class MemoryConsole(Console):
    """Keeps what the guest writes; for tests and programs."""

    def __init__(self) -> None:
        super().__init__()
        self.output = bytearray()
        self._written = threading.Condition()

    def write(self, data: bytes) -> None:
        with self._written:
            self.output += data
            self._written.notify_all()

    def wait_for(self, text: bytes, *, start: int = 0, timeout: float = 30.0) -> int:
        """Wait until `text` stands in the output from `start` on; the position after it.

        :raise TimeoutError: with the end of the output, when it does not come.
        """

        def position() -> int:
            found = self.output.find(text, start)
            return found + len(text) if found >= 0 else -1

        with self._written:
            if not self._written.wait_for(lambda: position() >= 0, timeout):
                raise TimeoutError(f"{text!r} did not come; the output ends {bytes(self.output[-400:])!r}")
            return position()


class _ThreadedConsole(Console):
    """Output through a thread of its own and a bounded buffer."""

    def __init__(self) -> None:
        super().__init__()
        self._output = bytearray()
        self._pending = threading.Condition()
        self._writer = threading.Thread(target=self._write_loop, name="console-output", daemon=True)
        self._writer.start()

    def write(self, data: bytes) -> None:
        with self._pending:
            if len(self._output) < _OUTPUT_LIMIT:
                self._output += data
                self._pending.notify_all()

    def _write_loop(self) -> None:
        while True:
            with self._pending:
                while not self._output and not self._closed:
                    self._pending.wait()
                if not self._output:
                    return
                chunk = bytes(self._output[:_CHUNK])
                del self._output[:_CHUNK]
            self._put(chunk)

    def _put(self, data: bytes) -> None:
        raise NotImplementedError

    def close(self) -> None:
        super().close()
        with self._pending:
            self._pending.notify_all()
        self._writer.join(1.0)


class LogConsole(_ThreadedConsole):
    """Appends to a file; no input.

    :param where: its path, or a descriptor of a file or a pipe, which is the console's from then on.
    :raise IOFailed: the file cannot be opened.
    """

    def __init__(self, where: Path | int) -> None:
        try:
            if isinstance(where, int):
                # Whoever opened it may have chosen not to append, and not to wait.
                flags = fcntl.fcntl(where, fcntl.F_GETFL)
                fcntl.fcntl(where, fcntl.F_SETFL, (flags | os.O_APPEND) & ~os.O_NONBLOCK)
                os.set_inheritable(where, False)
            # Of a descriptor "a" would look for the end, which a pipe has not.
            self._file = FileIO(where, "w" if isinstance(where, int) else "a")
        except OSError as error:
            name = f"fd:{where}" if isinstance(where, int) else where
            raise io_failed(f"Could not open the console's log '{name}'", error) from error
        super().__init__()

    @property
    def filename(self) -> str:
        """As of the base."""
        return "file"

    def _put(self, data: bytes) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._file.write(data)

    def close(self) -> None:
        super().close()
        self._file.close()


class StdioConsole(_ThreadedConsole):
    """The process's standard input and output. :param descriptors: input and output."""

    def __init__(self, descriptors: tuple[int, int] = (0, 1)) -> None:
        self._in, self._out = descriptors
        self._wake_read, self._wake_write = os.pipe()
        super().__init__()
        self._reader = threading.Thread(target=self._read_loop, name="console-input", daemon=True)
        self._reader.start()

    @property
    def filename(self) -> str:
        """As of the base."""
        return "stdio"

    def _put(self, data: bytes) -> None:
        rest = memoryview(data)
        while rest and self._has_reader():
            _, writable, _ = select.select([], [self._out], [], 0.5)
            if writable:
                try:
                    rest = rest[os.write(self._out, rest[:512]) :]
                except OSError:
                    return
            elif self._closed:
                # The guest's last words wait for a reader, but not for ever.
                return

    def _has_reader(self) -> bool:
        """Whether there is anybody to write to."""
        return True

    def _read_loop(self) -> None:
        while not self._closed:
            readable, _, _ = select.select([self._in, self._wake_read], [], [])
            if self._wake_read in readable:
                return
            try:
                data = os.read(self._in, 4096)
            except OSError:
                return
            if not data:
                return
            self.feed(data)

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        os.write(self._wake_write, b"x")
        self._reader.join(1.0)
        os.close(self._wake_read)
        os.close(self._wake_write)


class PtyConsole(StdioConsole):
    """A pseudo terminal, for one program after the other to open. While none has, output is dropped."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        tty.setraw(slave)
        self._path = os.ttyname(slave)
        os.close(slave)
        super().__init__((self._master, self._master))

    @property
    def filename(self) -> str:
        """As of the base; what a program opens follows "pty:"."""
        return f"pty:{self._path}"

    def _has_reader(self) -> bool:
        hang_up = select.poll()
        hang_up.register(self._master, 0)
        return not hang_up.poll(0)

    def _read_loop(self) -> None:
        while not self._closed:
            sources = [self._master, self._wake_read] if self._has_reader() else [self._wake_read]
            # Nothing tells when somebody opens the other end.
            readable, _, _ = select.select(sources, [], [], _LOOK_SECONDS)
            if self._master in readable:
                # The other end was closed meanwhile.
                with contextlib.suppress(OSError):
                    self.feed(os.read(self._master, 4096))

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        os.close(self._master)


class SocketConsole(_ThreadedConsole):
    """A unix socket of its user's alone, or one that this process was given; one client at a time, the next one waits in line.

    :param where: a path, or the descriptor of a socket.
    :raise Refused: it cannot be had, as `listening_unix_socket` says.
    """

    def __init__(self, where: Path | int) -> None:
        self._client: socket.socket | None = None
        self._file: SocketFile | None = None
        if isinstance(where, int):
            try:
                self._server = socket.socket(fileno=where)
                self._server.set_inheritable(False)
                self._server.setblocking(True)
                self._server.listen()
            except OSError as error:
                raise Refused(f"Could not listen at 'fd:{where}': {error.strerror}") from error
        else:
            self._server, self._file = listening_unix_socket(where)
        self._name = f"unix:{where}" if isinstance(where, Path) else local_name(self._server)
        super().__init__()
        self._acceptor = threading.Thread(target=self._serve, name="console-socket", daemon=True)
        self._acceptor.start()

    @property
    def filename(self) -> str:
        """As of the base."""
        return f"{'' if self._client else 'disconnected:'}{self._name},server=on"

    def _put(self, data: bytes) -> None:
        client = self._client
        if client is not None:
            with contextlib.suppress(OSError):
                client.sendall(data)

    def _serve(self) -> None:
        while not self._closed:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            self._client = client
            with client, contextlib.suppress(OSError):
                while data := client.recv(4096):
                    self.feed(data)
            self._client = None

    def close(self) -> None:
        if self._closed:
            return
        super().close()
        for end in (self._client, self._server):
            if end is not None:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)
        self._server.close()
        if self._file is not None:
            self._file.remove()
        self._acceptor.join(1.0)
