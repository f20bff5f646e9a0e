"""Nodes served in this process, and qemu-nbd beside it."""

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from block.faults import ForwardingNode
from export.client import PATIENCE
from peers import peer
from stillframe.block.export.export import Export
from stillframe.block.export.exports import ExportRequest, NodeExports
from stillframe.block.export.server import NbdServer
from stillframe.block.graph import BlockGraph
from stillframe.events import EventBus
from stillframe.sockets import listening_unix_socket


class Table:
    """Exports without a graph, of nodes that tests make."""

    def __init__(self, *exports: Export) -> None:
        self._exports = exports

    def find(self, name: str) -> Export | None:
        return next((each for each in self._exports if each.name == name), None)

    def listed(self) -> Sequence[Export]:
        return self._exports


@contextmanager
def serving(
    path: Path, *exports: Export, maximum: int = 100, seconds: float = PATIENCE
) -> Iterator[NbdServer]:
    """These exports at a socket."""
    sock, file = listening_unix_socket(path)
    server = NbdServer(sock, Table(*exports), file=file, maximum=maximum, handshake_seconds=seconds)
    try:
        yield server
    finally:
        for export in exports:
            export.close()
        server.close()


@contextmanager
def ours(
    path: Path, image: Path, driver: str = "qcow2", *, writable: bool = False, snapshot: str | None = None
) -> Iterator[tuple[str, NodeExports, BlockGraph]]:
    """An image as the export "", at a socket; its address for qemu-img, and what holds it."""
    graph = BlockGraph()
    exports = NodeExports(graph, EventBus())
    try:
        file = {"driver": "file", "filename": str(image)}
        graph.blockdev_add({"driver": driver, "node-name": "n", "read-only": not writable, "file": file})
        exports.start(lambda: listening_unix_socket(path))
        exports.add(ExportRequest("e", "n", "", writable=writable, snapshot=snapshot))
        yield url(path), exports, graph
    finally:
        exports.close()
        graph.close()


@contextmanager
def theirs(path: Path, image: Path, driver: str = "qcow2", *, writable: bool = False) -> Iterator[str]:
    """The same by qemu-nbd."""
    words = [peer("qemu-nbd"), "-f", driver, "-t", "-e", "4", "-k", str(path), str(image)]
    process = subprocess.Popen([*words, *([] if writable else ["-r"])])
    try:
        deadline = time.monotonic() + PATIENCE
        while not path.exists():
            assert process.poll() is None, "qemu-nbd has ended"
            assert time.monotonic() < deadline, "qemu-nbd does not listen"
            time.sleep(0.01)
        yield url(path)
    finally:
        process.terminate()
        process.wait()


def url(path: Path) -> str:
    return f"nbd+unix:///?socket={path}"


class Failing(ForwardingNode):
    """Raises `error`, where there is one, at every request."""

    error: BaseException | None = None

    def _fail(self) -> None:
        if self.error is not None:
            raise self.error

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._fail()
        super().readinto(offset, buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._fail()
        super().write(offset, data)

    def flush(self) -> None:
        self._fail()
        super().flush()

    def discard(self, offset: int, length: int) -> None:
        self._fail()
        super().discard(offset, length)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._fail()
        super().write_zeroes(offset, length, unmap=unmap)
