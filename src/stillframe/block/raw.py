"""The raw format: the bytes of the child as they are, or a window of them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from stillframe.block.bounds import refuse_outside, refuse_read_only, refuse_write
from stillframe.block.node import Extent, ImageInfo, Node, SnapshotStore
from stillframe.errors import InvalidRequest, Unsupported

_SECTOR = 512


class RawNode(Node):
    """Shows `file` from `offset` on.

    :param size: the length of the window, a multiple of 512; None reaches to the child's end, and moves with
        it.
    :param discard: False ignores `discard`, and keeps the space of `write_zeroes`.
    :raise InvalidRequest: the window does not lie in the child.
    """

    driver = "raw"

    def __init__(
        self,
        node_name: str,
        file: Node,
        *,
        read_only: bool = False,
        offset: int = 0,
        size: int | None = None,
        discard: bool = True,
    ) -> None:
        super().__init__(node_name, read_only=read_only)
        if offset > file.size:
            raise InvalidRequest(
                f"Offset ({offset}) cannot be greater than size of the containing file ({file.size})"
            )
        if size is not None and offset + size > file.size:
            raise InvalidRequest(
                f"The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the "
                f" actual size of the containing file ({file.size})"
            )
        if size is not None and size % _SECTOR:
            raise InvalidRequest(f"Specified size is not multiple of {_SECTOR}")
        self._file = file
        self._offset = offset
        self._size = size
        self._discard = discard

    @property
    def size(self) -> int:
        if self._size is not None:
            return self._size
        return max(0, self._file.size - self._offset)

    @property
    def children(self) -> Mapping[str, Node]:
        return {"file": self._file}

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        """The child's, as QEMU does it for a node that has nothing below it but one other."""
        return self._file.snapshot_store

    @property
    def is_switching(self) -> bool:
        return self._file.is_switching

    def readinto(self, offset: int, buffer: memoryview) -> None:
        refuse_outside(self, offset, len(buffer), "read")
        self._file.readinto(self._offset + offset, buffer)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        refuse_write(self, offset, memoryview(data).nbytes)
        self._file.write(self._offset + offset, data)

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        refuse_write(self, offset, memoryview(data).nbytes)
        self._file.write_durable(self._offset + offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        refuse_write(self, offset, length)
        self._file.write_zeroes(self._offset + offset, length, unmap=unmap and self._discard)

    def discard(self, offset: int, length: int) -> None:
        refuse_write(self, offset, length)
        if self._discard:
            self._file.discard(self._offset + offset, length)

    def flush(self) -> None:
        self._file.flush()

    def truncate(self, size: int) -> None:
        refuse_read_only(self)
        if self._size is not None:
            raise Unsupported("Cannot resize fixed-size raw disks")
        if size < 0:
            raise InvalidRequest(f"Size {size} of '{self.node_name}' is out of range")
        self._file.truncate(self._offset + size)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        refuse_outside(self, offset, length, "map")
        for extent in self._file.extents(self._offset + offset, length):
            yield replace(extent, offset=extent.offset - self._offset)

    def info(self) -> ImageInfo:
        file = self._file.info()
        return ImageInfo(
            filename=file.filename,
            format="raw",
            virtual_size=self.size,
            actual_size=file.actual_size,
            cluster_size=file.cluster_size,
            dirty=file.dirty,
            snapshots=file.snapshots,
            children=(("file", file),),
        )

    def close(self) -> None:
        """Nothing is held here; the child is closed by whoever opened it."""
