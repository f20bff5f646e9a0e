"""A file in memory, for tests that build thousands of images."""

from collections.abc import Iterator, Mapping

from stillframe.block.node import Extent, ExtentKind, ImageInfo, Node, SnapshotStore


class MemoryNode(Node):
    """Bytes behind the protocol of a file; flush does nothing, a discarded range reads as zeroes."""

    driver = "file"

    def __init__(self, data: bytes | bytearray = b"", *, read_only: bool = False) -> None:
        super().__init__("memory", read_only=read_only)
        self.data = bytearray(data)

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def children(self) -> Mapping[str, Node]:
        return {}

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        return None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        assert 0 <= offset <= len(self.data) - len(buffer)
        buffer[:] = self.data[offset : offset + len(buffer)]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert 0 <= offset <= len(self.data) - len(data)
        self.data[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def flush(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        if size < len(self.data):
            del self.data[size:]
        else:
            self.data.extend(bytes(size - len(self.data)))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, ExtentKind.DATA, host_offset=offset)

    def info(self) -> ImageInfo:
        return ImageInfo("memory", "file", len(self.data), len(self.data))

    def close(self) -> None:
        pass
