"""A child node as qcow2 sees it: bytes past its end are zeroes, and writes make it grow."""

import contextlib
import errno
import os
import threading
from collections.abc import Callable

from stillframe.block.node import Node
from stillframe.errors import IOFailed, Unsupported, io_failed


class ImageFile:
    """The file under an image: that of its tables, or that of guest data where it has one of its own.

    :param node: the child, open; whoever opened it closes it.
    :ivar on_failed_flush: called when what was written before may be lost.
    """

    def __init__(self, node: Node) -> None:
        self.node = node
        self._growing = threading.Lock()
        self._written = node.size
        self.on_failed_flush: Callable[[], None] | None = None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.node.size

    def is_untouched(self, offset: int) -> bool:
        """Whether nothing was ever written from `offset` on, so that it is known to read as zeroes."""
        return offset >= self._written

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the buffer; what lies past the end reads as zeroes."""
        there = max(0, min(len(buffer), self.node.size - offset))
        if there:
            self.node.readinto(offset, buffer[:there])
        if there < len(buffer):
            buffer[there:] = bytes(len(buffer) - there)

    def read(self, offset: int, length: int) -> bytearray:
        """`readinto` for callers without a buffer of their own."""
        buffer = bytearray(length)
        there = max(0, min(length, self.node.size - offset))
        if there:
            self.node.readinto(offset, memoryview(buffer)[:there])
        return buffer

    def write(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        """Write, growing the file as far as it takes; `data` is a buffer of bytes."""
        end = offset + len(data)
        if end > self._written:
            self._grow_to(end)
        self.node.write(offset, data)

    def write_durable(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        """`write`, durable at its return whatever was written before; see `Node.write_durable`."""
        self._grow_to(offset + len(data))
        self._durably(offset, data)

    def _durably(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        try:
            self.node.write_durable(offset, data)
        except BaseException:
            if self.on_failed_flush is not None:
                self.on_failed_flush()
            raise

    def grow_durably(self, size: int, *, ahead: int) -> None:
        """Make the file at least this large, durably, for what is to be written later.

        A device keeps its size, and refuses the write when it comes.

        :param ahead: bytes more, if it must grow.
        """
        if size > self.node.size and self.node.driver != "host_device":
            size += ahead
            self.grow(size)
            # A byte of zero, which says nothing new, but that the file reaches to it.
            self._durably(size - 1, b"\0")

    def _grow_to(self, end: int) -> None:
        if end > self.node.size:
            self.grow(end)
        with self._growing:
            self._written = max(self._written, end)

    def grow(self, size: int) -> None:
        """Make the file at least this large; the new bytes are zeroes. :raise NoSpace: a device has its size."""
        with self._growing:
            if size > self.node.size and self.node.driver == "host_device":
                full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                raise io_failed(f"Could not write to node '{self.node.node_name}'", full) from full
            if size > self.node.size:
                self.node.truncate(size)

    def shrink(self, size: int) -> None:
        """Give back what lies behind `size`, where the storage can be made smaller."""
        with self._growing, contextlib.suppress(Unsupported):
            if size < self.node.size:
                self.node.truncate(size)
                self._written = size

    def write_zeroes(self, offset: int, length: int, *, unmap: bool) -> None:
        """Make a range read as zeroes. :param unmap: its space may be given back."""
        length = min(length, self.node.size - offset)
        if length > 0:
            self.node.write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int) -> None:
        """Give back the space of a range, as far as it exists.

        A hint: where the storage fails at it, the space stays with the file, and its clusters can be used again all the same.
        """
        length = min(length, self.node.size - offset)
        if length > 0:
            with contextlib.suppress(IOFailed):
                self.node.discard(offset, length)

    def flush(self) -> None:
        """See `Node.flush`."""
        try:
            self.node.flush()
        except BaseException:
            if self.on_failed_flush is not None:
                self.on_failed_flush()
            raise
