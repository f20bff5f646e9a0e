"""The death of the process that writes an image, in memory: the file as it stood at some instant, and the record with it."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from block.faults import ForwardingNode, Punch, Step, Truncate, Write
from block.faults import apply as apply_step
from qcow2.images import take
from qcow2.memory import MemoryNode
from stillframe.block.node import FileIdentity
from stillframe.block.qcow2 import Qcow2Node, create_image

_inodes = itertools.count(1)


class IdentifiedNode(MemoryNode):
    """A file in memory for which there is a record, as there is for a real one."""

    def __init__(self, data: bytes | bytearray, inode: int | None = None) -> None:
        super().__init__(data)
        self.inode = next(_inodes) if inode is None else inode

    @property
    def identity(self) -> FileIdentity:
        return FileIdentity(1, self.inode, 2)


def shared_image(cluster_size: int = 4096, clusters: int = 16) -> bytes:
    """A disk whose every cluster is full, and shared with a snapshot: each write replaces content."""
    file = MemoryNode()
    create_image(file, clusters * cluster_size, cluster_size=cluster_size)  # type: ignore[arg-type]
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * node.size)
    take(node, "first")
    node.close()
    return bytes(file.data)


@dataclass(frozen=True)
class Instant:
    """What the death of the process leaves: the file's bytes, its inode, and the record's bytes, None for none."""

    image: bytes = field(repr=False)
    inode: int
    record: bytes | None = field(repr=False)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))


class Shelf:
    """A shared memory of the tests' own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir(parents=True)

    def record_of(self, inode: int) -> Path:
        found = list(self.path.glob(f"stillframe-*/1-{inode:x}.unflushed"))
        return (
            found[0] if found else next(self.path.glob("stillframe-*"), self.path) / f"1-{inode:x}.unflushed"
        )

    def read(self, inode: int) -> bytes | None:
        """The record's bytes as far as they say something."""
        path = self.record_of(inode)
        if not path.exists():
            return None
        with path.open("rb") as file:
            first = file.read(4096)
            count = int.from_bytes(first[4088:4092], sys.byteorder)
            return first + file.read(count * 64)

    def write(self, inode: int, data: bytes | None) -> None:
        """Let a record stand there that nobody holds."""
        path = self.record_of(inode)
        path.unlink(missing_ok=True)
        if data is not None:
            size = 4096 + (64 << 15)
            path.touch(mode=0o600)
            with path.open("r+b") as file:
                file.truncate(size)
                file.write(data)


class Watched:
    """An image in memory that can be killed at every change of its file, and at every acknowledgement.

    :ivar during_flush: what another of the guest's requests does while the file's next flush is under way.
    """

    def __init__(self, image: bytes, shelf: Shelf, inode: int | None = None) -> None:
        self.shelf = shelf
        self.file = IdentifiedNode(image, inode)
        self.during_flush: Callable[[], None] | None = None
        self.number = 0
        self._start = bytes(image)
        self._log: list[tuple[int, Step | None, bytes | None]] = []
        self.node = Qcow2Node("node", _WatchedNode(self.file, self))

    def mark(self) -> None:
        """Something begins or was acknowledged."""
        self.number += 1
        self.note(None)

    def note(self, step: Step | None) -> None:
        """What was done to the file last."""
        self._log.append((self.number, step, self.shelf.read(self.file.inode)))

    def now(self) -> Instant:
        """The present one."""
        return Instant(bytes(self.file.data), self.file.inode, self.shelf.read(self.file.inode))

    def instants(
        self, chosen: Callable[[int, int], bool] = lambda place, number: True
    ) -> Iterator[tuple[int, Instant]]:
        """Those chosen by their place and number, with the number that `mark` had set before."""
        state = bytearray(self._start)
        for place, (number, step, record) in enumerate(self._log):
            if step is not None:
                apply_step(state, step)
            if chosen(place, number):
                yield number, Instant(bytes(state), self.file.inode, record)


class _WatchedNode(ForwardingNode):
    def __init__(self, inner: IdentifiedNode, watched: Watched) -> None:
        super().__init__(inner)
        self._watched = watched

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self._watched.note(Write(offset, bytes(data)))

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self._watched.note(Punch(offset, length))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self._watched.note(Truncate(size))

    def flush(self) -> None:
        super().flush()
        work, self._watched.during_flush = self._watched.during_flush, None
        if work is not None:
            work()


@contextmanager
def reopened(instant: Instant, shelf: Shelf) -> Iterator[Qcow2Node]:
    """The image, opened for writing by whoever comes next; closed at the end."""
    shelf.write(instant.inode, instant.record)
    node = Qcow2Node("node", IdentifiedNode(instant.image, instant.inode))
    try:
        yield node
    finally:
        node.close()


def killed_while_reopening(instant: Instant, shelf: Shelf) -> Iterator[Instant]:
    """Who comes next is killed as well, after each change of the file that the opening makes."""
    shelf.write(instant.inode, instant.record)
    watched = Watched(instant.image, shelf, instant.inode)
    yield from (each for _, each in watched.instants())
