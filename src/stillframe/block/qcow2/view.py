"""A snapshot's disk as a node of its own, to be read while the image is."""

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Never

from stillframe.block.bounds import refuse_outside
from stillframe.block.node import Extent, ImageInfo, Node, SnapshotStore
from stillframe.errors import Refused

if TYPE_CHECKING:
    from stillframe.block.qcow2.node import Qcow2Node


class SnapshotView(Node):
    """What the guest saw at a snapshot, with what lies below the image, which stays its owner's.

    :param node: the image; the snapshot must not be deleted, nor another be applied, until this is closed.
    :param l1: the snapshot's. :param size: the disk's, then. :param closed: called once, at the first `close`.
    """

    driver = "qcow2"

    def __init__(
        self, node: "Qcow2Node", l1: bytes | bytearray, size: int, closed: Callable[[], None]
    ) -> None:
        super().__init__(node.node_name, read_only=True)
        self._node = node
        self._l1 = l1
        self._size = size
        self._closed: Callable[[], None] | None = closed

    @property
    def size(self) -> int:
        return self._size

    @property
    def children(self) -> Mapping[str, Node]:
        return self._node.children

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        return None

    def readinto(self, offset: int, buffer: memoryview) -> None:
        refuse_outside(self, offset, len(buffer), "read")
        self._node.image.read_tree(self._l1, offset, buffer, below=self.children.get("backing"))

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        refuse_outside(self, offset, length, "map")
        return self._node.tree_extents(self._l1, offset, length)

    def info(self) -> ImageInfo:
        return self._node.info()

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._refuse()

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._refuse()

    def discard(self, offset: int, length: int) -> None:
        self._refuse()

    def truncate(self, size: int) -> None:
        self._refuse()

    def flush(self) -> None:
        """Nothing is ever written."""

    def close(self) -> None:
        """The snapshot may be deleted again."""
        closed, self._closed = self._closed, None
        if closed is not None:
            closed()

    def _refuse(self) -> Never:
        raise Refused(f"A snapshot of '{self.node_name}' cannot be written")
