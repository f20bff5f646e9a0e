"""A disk that forgets what is written to it and reads as zeroes: to measure with, and to fill a place."""

import time
from collections.abc import Iterator, Mapping

from stillframe.block.bounds import refuse_outside, refuse_read_only, refuse_write
from stillframe.block.node import Extent, ExtentKind, ImageInfo, Node, SnapshotStore
from stillframe.errors import InvalidRequest

DEFAULT_SIZE = 1 << 30
_NANOSECONDS = 1_000_000_000


class NullNode(Node):
    """Reads as zeroes, takes every write.

    :param size: bytes. :param latency_ns: how long each read, write and flush takes at least.
    :param read_zeroes: False says that nothing is known about the content, which is zeroes all the same.
    :raise InvalidRequest: a negative size or latency.
    """

    driver = "null-co"

    def __init__(
        self,
        node_name: str,
        *,
        read_only: bool = False,
        size: int = DEFAULT_SIZE,
        latency_ns: int = 0,
        read_zeroes: bool = False,
    ) -> None:
        super().__init__(node_name, read_only=read_only)
        if size < 0:
            raise InvalidRequest("size is invalid", remedy="Give a size in bytes, 0 or more.")
        if latency_ns < 0:
            raise InvalidRequest("latency-ns is invalid", remedy="Give nanoseconds, 0 or more.")
        self._size = size
        self._latency = latency_ns / _NANOSECONDS
        self._read_zeroes = read_zeroes

    @property
    def size(self) -> int:
        return self._size

    @property
    def children(self) -> Mapping[str, Node]:
        return {}

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        return None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        refuse_outside(self, offset, len(buffer), "read")
        self._take_time()
        buffer[:] = bytes(len(buffer))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        refuse_write(self, offset, memoryview(data).nbytes)
        self._take_time()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        refuse_write(self, offset, length)
        self._take_time()

    def discard(self, offset: int, length: int) -> None:
        refuse_write(self, offset, length)

    def flush(self) -> None:
        self._take_time()

    def truncate(self, size: int) -> None:
        refuse_read_only(self)
        if size < 0:
            raise InvalidRequest(f"Size {size} of '{self.node_name}' is out of range")
        self._size = size

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        refuse_outside(self, offset, length, "map")
        if length:
            yield Extent(offset, length, ExtentKind.ZERO if self._read_zeroes else ExtentKind.DATA)

    def info(self) -> ImageInfo:
        return ImageInfo(
            filename="null-co://", format="null-co", virtual_size=self._size, actual_size=0, dirty=None
        )

    def close(self) -> None:
        """Nothing is held."""

    def _take_time(self) -> None:
        if self._latency:
            time.sleep(self._latency)
