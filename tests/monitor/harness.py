"""A machine without a processor behind a real monitor on a real socket, and a client that sends bytes and
reads lines.
"""

import asyncio
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from stillframe.block.graph import BlockGraph
from stillframe.events import EventBus
from stillframe.jobs import Jobs
from stillframe.machine.build import MachineConfig, build_machine
from stillframe.monitor.addresses import Address, UnixAddress, connected_socket
from stillframe.monitor.host import Host
from stillframe.monitor.server import MonitorServer

PATIENCE = 20.0
"""Seconds after which a test gives up on the other side; nothing is measured with it."""


class Lines:
    """The other end of a connection: bytes out, lines in.

    :param noisy: the other end prints things of its own in between, as QEMU does on standard output.
    """

    def __init__(self, read_from: int, write_to: int, *, noisy: bool = False) -> None:
        self._noisy = noisy
        self._read_from = read_from
        self._write_to = write_to
        self._buffer = b""

    def send(self, data: bytes | str | dict[str, Any]) -> None:
        if isinstance(data, dict):
            data = json.dumps(data)
        view = memoryview(data if isinstance(data, bytes) else data.encode())
        deadline = time.monotonic() + PATIENCE
        while view:
            assert select.select([], [self._write_to], [], max(0, deadline - time.monotonic()))[1], (
                "not taken"
            )
            view = view[os.write(self._write_to, view) :]

    def line(self) -> bytes:
        """The next line, its end included; what there was before the end of the connection otherwise."""
        while b"\n" not in self._buffer:
            assert select.select([self._read_from], [], [], PATIENCE)[0], (
                f"nothing came after {self._buffer!r}"
            )
            data = os.read(self._read_from, 1 << 16)
            if not data:
                break
            self._buffer += data
        line, end, self._buffer = self._buffer.partition(b"\n")
        return line + end

    def message(self) -> dict[str, Any]:
        line = self.line()
        while self._noisy and line and not line.startswith(b"{"):
            line = self.line()
        assert line, "the connection ended"
        return json.loads(line)

    def until(self, *members: str) -> dict[str, Any]:
        """The next message that has one of these members."""
        while True:
            message = self.message()
            if any(member in message for member in members):
                return message

    def execute(self, command: str, **arguments: Any) -> Any:
        """What a command returns, or its error object; events in between are dropped."""
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        self.send({"execute": command, **({"arguments": names} if names else {})})
        reply = self.until("return", "error")
        return reply["return"] if "return" in reply else reply["error"]

    def hmp(self, line: str) -> str:
        return self.execute("human-monitor-command", command_line=line)

    def negotiate(self) -> Self:
        assert "QMP" in self.message()
        assert self.execute("qmp_capabilities") == {}
        return self

    def answers(self, data: bytes) -> list[bytes]:
        """All lines that come of some input, whatever it leaves the parser in; a request after it marks the
        end.
        """
        mark = f"mark-{id(data)}-{time.monotonic_ns()}"
        request = {"execute": "query-name", "id": mark}
        # A control character ends what is open in the lexer and the parser, with an error of its own.
        self.send(data + b"\n\x01\n" + json.dumps(request).encode() + b"\n")
        lines = []
        while True:
            line = self.line()
            assert line, "the connection ended"
            if mark.encode() in line:
                return lines
            lines.append(line)


class Client(Lines):
    """On a socket."""

    def __init__(self, address: Address) -> None:
        self.socket = connected_socket(address)
        super().__init__(self.socket.fileno(), self.socket.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class Served:
    """A host and its monitors, on a loop of its own thread."""

    def __init__(self, name: str | None = None, *, running: bool = True) -> None:
        self.events = EventBus()
        machine = build_machine(MachineConfig(name=name, board="none"), self.events)
        self.host = Host(machine=machine, graph=BlockGraph(), jobs=Jobs(self.events), events=self.events)
        machine.start(paused=not running)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.server: MonitorServer = self.call(self._server())

    async def _server(self) -> MonitorServer:
        return MonitorServer(self.host)

    def call(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(PATIENCE)

    def listen(self, address: Address, **options: Any) -> Address:
        return self.call(self.server.listen(address, **options))

    def on_loop(self, function: Any) -> Any:
        """Call a function on the loop's thread."""

        async def call() -> Any:
            return function()

        return self.call(call())

    def close(self) -> None:
        self.host.end()
        self.call(self.server.close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()
        self.host.graph.close()
        self.host.machine.close()


@contextmanager
def served(
    path: Path, name: str | None = None, *, running: bool = True
) -> Iterator[tuple[Served, UnixAddress]]:
    """A monitor at `path`."""
    server = Served(name, running=running)
    try:
        address = UnixAddress(path)
        server.listen(address)
        yield server, address
    finally:
        server.close()


@contextmanager
def qemu(program: str, *arguments: str) -> Iterator[Lines]:
    """A real QEMU's monitor on its standard input and output."""
    process = subprocess.Popen(
        [program, "-machine", "none", "-nodefaults", "-display", "none", "-qmp", "stdio", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        yield Lines(process.stdout.fileno(), process.stdin.fileno(), noisy=True)
    finally:
        with suppress(OSError):
            process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]
