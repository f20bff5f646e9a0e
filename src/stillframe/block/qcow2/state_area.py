"""The machine state of a snapshot that is on the list: the part of its tree behind the disk.

    0                          disk size, rounded up        + state size     next cluster
    │ the disk at the snapshot │ the state, a stream         │               │ the page index, where there is one │

Byte 0 of the area is the first that the first L1 entry behind the disk maps.
"""

from array import array

from stillframe.block.file import FileNode
from stillframe.block.node import SnapshotInfo
from stillframe.block.open_state import OpenState
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.mapping import DATA, PACKED
from stillframe.block.qcow2.snapshot_table import SnapshotEntry, check_l1_place
from stillframe.errors import NotFound, Unsupported

MAX_PAGE_INDEX_BYTES = 256 << 20
"""More is not read, whatever an image says: 16 million runs of pages."""


class StateArea:
    """One snapshot's.

    :raise NotFound: the snapshot is not on the image's list. :raise ImageCorrupt: its L1 cannot lie where it is said to.
    """

    def __init__(self, image: Image, snapshot: SnapshotInfo) -> None:
        self._image = image
        self.entry = find(image, snapshot)
        self._lineage = self.entry.info(image.header.size).lineage
        check_l1_place(self.entry, image.header)
        self.l1 = image.file.read(self.entry.l1_offset, self.entry.l1_size * 8)
        first = image.header.l1_entries_for(self.entry.disk_size(image.header.size))
        self._start = first * image.header.l2_span
        self._size = max(0, self.entry.l1_size - first) * image.header.l2_span

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of the state; shorter than `length` only at its end."""
        return self._read(offset, max(0, min(length, self.entry.state_size - offset)))

    def read_page_index(self) -> bytes | None:
        """What the lineage calls the page index, unexamined; None without one, or if it cannot be where it is said to be."""
        place = self._lineage.page_index if self._lineage else None
        if (
            place is None
            or place.offset < self.entry.state_size
            or not 0 < place.length <= MAX_PAGE_INDEX_BYTES
            or place.offset + place.length > self._size
        ):
            return None
        return self._read(place.offset, place.length)

    def clusters(self, length: int) -> "array[int]":
        """The host cluster of each of the first clusters, as many as `length` bytes fill wholly; 0 where nothing is mapped.

        :raise Unsupported: one is compressed, or not mapped as a whole.
        """
        image = self._image
        bits = image.header.cluster_bits
        whole = min(length, self.entry.state_size) >> bits << bits
        found = array("q")
        if not whole:
            return found
        with image.gate.lock:
            runs = image.mapping.runs(self.l1, self._start, whole)
        for kind, size, host in runs:
            is_data = kind == DATA
            if kind == PACKED or size & ((1 << bits) - 1) or (is_data and host & ((1 << bits) - 1)):
                raise Unsupported("The machine state is in clusters that two snapshots cannot share")
            count = size >> bits
            found.extend(range(host >> bits, (host >> bits) + count) if is_data else [0] * count)
        return found

    def open(self, length: int) -> OpenState | None:
        """See `SnapshotStore.open_state`. Not in a plain file: beneath another format or protocol, compressed, or not mapped."""
        file = self._image.reader.data.node
        # What stands between us and a plain file may change what is read.
        if type(file) is not FileNode:
            return None
        bits = self._image.header.cluster_bits
        length = min(length, self.entry.state_size)
        with self._image.gate.lock:
            runs = self._image.mapping.runs(self.l1, self._start, length)
        found = array("q")
        for kind, size, host in runs:
            if kind != DATA or host & ((1 << bits) - 1):
                return None
            found.extend(range(host, host + size, 1 << bits))
        if len(found) != -(-length >> bits):
            return None
        return OpenState(file.open_again(), bits, found)

    def _read(self, offset: int, length: int) -> bytes:
        buffer = bytearray(length)
        self._image.read_tree(self.l1, self._start + offset, memoryview(buffer))
        return bytes(buffer)


def find(image: Image, snapshot: SnapshotInfo) -> SnapshotEntry:
    """The entry of a snapshot. :raise NotFound: it is no longer there."""
    size = image.world.header.size
    for entry in image.world.snapshots:
        info = entry.info(size)
        if (info.id, info.name) == (snapshot.id, snapshot.name):
            return entry
    raise NotFound(f"Can't find the snapshot '{snapshot.name}'")
