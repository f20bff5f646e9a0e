"""Nodes around a node: one that forwards, one that records what is made durable and when, one that fails on
request.

The crash tests build the states that a power cut can leave from a `RecordingNode`'s log; the error tests let
a `FaultyNode` fail at each changing call in turn.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from errno import EIO

from stillframe.block.node import Extent, FileIdentity, ImageInfo, Node, SnapshotStore
from stillframe.errors import io_failed


class ForwardingNode(Node):
    """Hands every call to `inner`, and stands where it stood."""

    def __init__(self, inner: Node) -> None:
        super().__init__(inner.node_name, read_only=inner.read_only)
        self.inner = inner
        self.driver = inner.driver

    @property
    def size(self) -> int:
        return self.inner.size

    @property
    def children(self) -> Mapping[str, Node]:
        return self.inner.children

    @property
    def identity(self) -> FileIdentity | None:
        return self.inner.identity

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        return self.inner.snapshot_store

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self.inner.readinto(offset, buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.inner.write(offset, data)

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self.inner.write_durable(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.inner.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self.inner.discard(offset, length)

    def flush(self) -> None:
        self.inner.flush()

    def truncate(self, size: int) -> None:
        self.inner.truncate(size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        return self.inner.extents(offset, length)

    def info(self) -> ImageInfo:
        return self.inner.info()

    def close(self) -> None:
        self.inner.close()


@dataclass(frozen=True, slots=True)
class Write:
    """:param is_durable: from `write_durable`: by its return it was, unlike what was written before."""

    offset: int
    data: bytes
    file: int = 0
    is_durable: bool = field(default=False, kw_only=True)


@dataclass(frozen=True, slots=True)
class Zeroes:
    """From `write_zeroes`: reads as zeroes afterwards."""

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Punch:
    """From `discard`: may read as anything afterwards; a file reads as zeroes."""

    offset: int
    length: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Truncate:
    size: int
    file: int = 0


@dataclass(frozen=True, slots=True)
class Flush:
    """Logged when it has returned; it makes durable what was done to its file, and to no other."""

    file: int = 0


@dataclass(frozen=True, slots=True)
class Mark:
    """No change, but a word of whoever drives the nodes: from here on this is true."""

    what: object


Change = Write | Zeroes | Punch | Truncate
Step = Change | Flush | Mark


class Log:
    """What was done to any number of files, in one order.

    :ivar steps: since the beginning; clear it to start anew.
    """

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.order = threading.Lock()

    def mark(self, what: object) -> None:
        """Note a word between two steps."""
        with self.order:
            self.steps.append(Mark(what))


class RecordingNode(ForwardingNode):
    """Logs every change, in the order of return.

    :param journal: where; None for a log of its own. :param file: the number of this file in it.
    """

    def __init__(self, inner: Node, journal: Log | None = None, file: int = 0) -> None:
        super().__init__(inner)
        self.journal = Log() if journal is None else journal
        self.file = file

    @property
    def log(self) -> list[Step]:
        """The steps of the log, to be read or cleared."""
        return self.journal.steps

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self.journal.order:
            super().write(offset, data)
            self.log.append(Write(offset, bytes(data), self.file))

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        with self.journal.order:
            super().write_durable(offset, data)
            self.log.append(Write(offset, bytes(data), self.file, is_durable=True))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        with self.journal.order:
            super().write_zeroes(offset, length, unmap=unmap)
            self.log.append(Zeroes(offset, length, self.file))

    def discard(self, offset: int, length: int) -> None:
        with self.journal.order:
            super().discard(offset, length)
            self.log.append(Punch(offset, length, self.file))

    def truncate(self, size: int) -> None:
        with self.journal.order:
            super().truncate(size)
            self.log.append(Truncate(size, self.file))

    def flush(self) -> None:
        with self.journal.order:
            super().flush()
            self.log.append(Flush(self.file))


def apply(image: bytearray, step: Step) -> None:
    """What a step does to the bytes of a file."""
    match step:
        case Write(offset, data):
            if len(image) < offset + len(data):
                image.extend(bytes(offset + len(data) - len(image)))
            image[offset : offset + len(data)] = data
        case Zeroes(offset, length) | Punch(offset, length):
            image[offset : offset + length] = bytes(min(length, max(0, len(image) - offset)))
        case Truncate(size) if size < len(image):
            del image[size:]
        case Truncate(size):
            image.extend(bytes(size - len(image)))


class FaultyNode(ForwardingNode):
    """Fails at the changing call number `fail_at` (writes, durable ones too, zeroes, discards, truncates, flushes; from 0),
    before doing it.

    :param forever: all calls from that one on fail, as on a disk that died; else the one alone, as on a full
        one made room on. :ivar calls: changing calls until now; run once with `fail_at=None` to learn how
        many there are.
    """

    def __init__(self, inner: Node, fail_at: int | None, errno: int, *, forever: bool = False) -> None:
        super().__init__(inner)
        self.fail_at = fail_at
        self.errno = errno
        self.forever = forever
        self.calls = 0
        self._count = threading.Lock()

    def _step(self, doing: str) -> None:
        with self._count:
            number = self.calls
            self.calls += 1
        if self.fail_at is None or number < self.fail_at:
            return
        if number == self.fail_at or self.forever:
            error = OSError(self.errno, os.strerror(self.errno))
            raise io_failed(f"Could not {doing} '{self.node_name}'", error) from error

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._step("write to")
        super().write(offset, data)

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._step("flush")
        super().write_durable(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._step("write to")
        super().write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        self._step("discard in")
        super().discard(offset, length)

    def truncate(self, size: int) -> None:
        self._step("resize")
        super().truncate(size)

    def flush(self) -> None:
        self._step("flush")
        super().flush()


class UnreadableNode(ForwardingNode):
    """Fails at the read number `fail_at` (from 0), and at that one alone.

    :ivar calls: reads until now.
    """

    def __init__(self, inner: Node, fail_at: int | None) -> None:
        super().__init__(inner)
        self.fail_at = fail_at
        self.calls = 0
        self._count = threading.Lock()

    def readinto(self, offset: int, buffer: memoryview) -> None:
        with self._count:
            number = self.calls
            self.calls += 1
        if number == self.fail_at:
            error = OSError(EIO, os.strerror(EIO))
            raise io_failed(f"Could not read from '{self.node_name}'", error) from error
        super().readinto(offset, buffer)
