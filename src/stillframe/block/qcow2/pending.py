"""A snapshot that is frozen and not yet on the image's list, and the machine state that is written for it.

`freeze` notes the active L1 and nothing else. From then on a table or cluster is *fresh* if it was allocated since; what is
not fresh is the snapshot's: writes to it go to new clusters, and what they replace is not dropped.

The state goes to clusters that are reserved in memory alone. Nothing in the file points to them before the switch, so
abandoning it, or a crash, leaves nothing behind. It becomes the part of the snapshot's tree behind the disk, beginning
with the first L1 entry that the disk does not need.
"""

import threading
from array import array
from typing import TYPE_CHECKING

from stillframe.block.node import Change, SnapshotInfo, SnapshotRecord
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.l2_entry import lead_apart
from stillframe.block.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from stillframe.block.qcow2.mapping import l1_entry
from stillframe.block.qcow2.state_area import StateArea
from stillframe.errors import InUse, LimitReached, Unsupported

if TYPE_CHECKING:
    from stillframe.block.qcow2.refcounts import ClusterRun

_RESERVED_FIRST = 1 << 20
_RESERVED_AT_ONCE = 16 << 20
_CONTIGUOUS = 16
_ZEROES = bytes(2 << 20)


class Pending:
    """See `PendingSnapshot` in block/node.py. State is written by one thread at a time."""

    def __init__(self, image: Image) -> None:
        """Lock held, no writer in flight."""
        self._image = image
        self._fresh: dict[int, bytearray] = {}
        self._frozen_l1: bytes | bytearray = image.world.l1
        self._is_over = self._is_prepared = False
        self._writing = threading.Lock()
        self._hosts = array("q")
        self._reserved: list[ClusterRun] = []
        self._ahead: ClusterRun = (0, 0)
        self._reserve_bytes = _RESERVED_FIRST
        self.state_size = 0
        self.shared_clusters = 0
        """How many clusters of the state, from its first on, are another snapshot's, too."""

    # What is frozen. Lock held.

    @property
    def frozen_l1(self) -> bytes | bytearray:
        """The active L1 at the freeze."""
        return self._frozen_l1

    def keep_frozen_l1(self) -> None:
        """The active L1 is about to change in place."""
        if self._frozen_l1 is self._image.world.l1:
            self._frozen_l1 = bytes(self._frozen_l1)

    def is_fresh_table(self, l1_index: int) -> bool:
        """Whether the active L2 table there was allocated since the freeze."""
        return l1_index in self._fresh

    def note_fresh_table(self, l1_index: int) -> None:
        """It was allocated now; what it points to is still the snapshot's."""
        self._fresh[l1_index] = bytearray(self._image.header.l2_entries)

    def is_fresh(self, l1_index: int, index: int) -> bool:
        """Whether what this L2 entry points to was allocated since the freeze."""
        flags = self._fresh.get(l1_index)
        return flags is not None and bool(flags[index])

    def note_fresh(self, l1_index: int, index: int, count: int) -> None:
        """Entries of a fresh table point to new clusters."""
        self._fresh[l1_index][index : index + count] = b"\1" * count

    def fresh_flags(self, l1_index: int) -> bytes | bytearray | None:
        """One byte an entry, 1 for fresh; None where the whole table is the snapshot's."""
        return self._fresh.get(l1_index)

    # The state.

    @property
    def state_hosts(self) -> "array[int]":
        """The host cluster of each cluster of state; 0 where nothing was written."""
        return self._hosts

    @property
    def reserved(self) -> "list[ClusterRun]":
        """The reserved clusters that hold state, as they were reserved."""
        return self._reserved

    def write_state(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        """See `PendingSnapshot`. :raise LimitReached: more state than an L1 table can map."""
        with self._writing:
            self._refuse_if_over()
            view = memoryview(data).cast("B")
            self._write(offset, view)
            self.state_size = max(self.state_size, offset + len(view))

    def share_state(self, parent: SnapshotInfo, length: int) -> None:
        """See `PendingSnapshot`."""
        with self._writing:
            self._refuse_if_over()
            if self._hosts:
                raise InUse("The pending snapshot has state already")
            area = StateArea(self._image, parent)
            shared = area.clusters(length)
            self._refuse_without_room(shared)
            whole = len(shared) << self._image.header.cluster_bits
            rest = area.read(whole, length - whole)
            if whole + len(rest) != length:
                raise Unsupported(f"The machine state of '{parent.name}' has less than {length} bytes")
            self._hosts, self.shared_clusters = shared, len(shared)
            self._write(whole, memoryview(rest))
            self.state_size = length

    def _refuse_without_room(self, shared: "array[int]") -> None:
        import numpy as np

        from stillframe.block.qcow2.widths import largest

        clusters = np.unique(np.frombuffer(shared, np.int64)) if shared else np.zeros(0, np.int64)
        with self._image.gate.lock:
            counts = self._image.refcounts.counts_of(clusters[clusters != 0])
        if len(counts) and int(counts.max()) >= largest(self._image.header.refcount_order):
            raise Unsupported("The machine state is shared as often as the image's refcounts can count")

    def write_page_index(self, data: bytes) -> int:
        """See `PendingSnapshot`."""
        size = self._image.header.cluster_size
        with self._writing:
            self._refuse_if_over()
            offset = -(-self.state_size // size) * size
            self._write(offset, memoryview(data))
            return offset

    def _write(self, offset: int, view: memoryview) -> None:
        header = self._image.header
        size = header.cluster_size
        end = offset + len(view)
        if (header.l1_entries_for(header.size) + header.l1_entries_for(end)) * 8 > MAX_L1_BYTES:
            raise LimitReached(f"Machine state of {end} bytes does not fit into the image's L1 table")
        if offset // size < self.shared_clusters:
            raise InUse("This part of the state is another snapshot's, too")
        while view:
            index, within = divmod(offset, size)
            host, length = self._place(index, within, len(view))
            self._image.data.write(host + within, view[:length])
            offset += length
            view = view[length:]

    def _place(self, index: int, within: int, length: int) -> tuple[int, int]:
        """Where a cluster of state lies, allocated if need be, and how many bytes go there contiguously."""
        hosts = self._hosts
        bits = self._image.header.cluster_bits
        size = 1 << bits
        wanted = (within + length + size - 1) >> bits
        if index < len(hosts) and hosts[index]:
            count = 1
            first = hosts[index]
            while count < wanted and index + count < len(hosts) and hosts[index + count] == first + count:
                count += 1
        else:
            free = 1
            while free < wanted and (index + free >= len(hosts) or not hosts[index + free]):
                free += 1
            first, count = self._reserve(free)
            if index + count > len(hosts):
                hosts.frombytes(bytes(8 * (index + count - len(hosts))))
            hosts[index : index + count] = array("q", range(first, first + count))
            self._clear_around(first, count, within, length)
        return first << bits, min(length, (count << bits) - within)

    def _clear_around(self, first: int, count: int, within: int, length: int) -> None:
        """What a new run of clusters holds besides the data that is about to be written reads as zeroes."""
        file = self._image.data
        bits = self._image.header.cluster_bits
        start, end = first << bits, first + count << bits
        if file.is_untouched(start):
            file.grow(end)
            return
        if within:
            file.write(start, _ZEROES[:within])
        written = start + within + length
        if written < end:
            file.write(written, _ZEROES[: end - written])

    def _reserve(self, wanted: int) -> "ClusterRun":
        first, count = self._ahead
        if not count:
            most = max(wanted, self._reserve_bytes >> self._image.header.cluster_bits)
            self._reserve_bytes = min(2 * self._reserve_bytes, _RESERVED_AT_ONCE)
            with self._image.gate.lock:
                self._image.refuse_if_broken()
                first, count = self._image.refcounts.reserve(most, min(wanted, _CONTIGUOUS))
        taken = min(count, wanted)
        self._ahead = (first + taken, count - taken)
        if self._reserved and sum(self._reserved[-1]) == first:
            self._reserved[-1] = (self._reserved[-1][0], self._reserved[-1][1] + taken)
        else:
            self._reserved.append((first, taken))
        return first, taken

    # The end.

    def prepare(self, record: SnapshotRecord) -> Change:
        """See `PendingSnapshot`."""
        from stillframe.block.qcow2.changes import prepare_create

        with self._writing:
            self._refuse_if_over()
            self.return_ahead()
            change = prepare_create(self._image, self, record)
            self._is_prepared = True
            return change

    def return_ahead(self) -> None:
        """Reserved clusters that hold no state are free again."""
        first, count = self._ahead
        self._ahead = (0, 0)
        if count:
            with self._image.gate.lock:
                self._image.refcounts.unreserve(first, count)

    def abandon(self) -> None:
        """See `PendingSnapshot`; for a second time, nothing."""
        if self._is_over:
            return
        self.return_ahead()
        with self._image.gate.drained():
            self.end()
            self._drop_replaced()
        self._give_state_back()

    def end(self) -> None:
        """The switch has made it a snapshot, or it is abandoned. Lock held."""
        self._is_over = True
        if self._image.pending is self:
            self._image.pending = None

    def release_state(self) -> None:
        """The refcounts on disk alone say whether the state's clusters are free. Lock held."""
        for first, count in self._reserved:
            self._image.refcounts.unreserve(first, count)
        self._reserved = []

    def _drop_replaced(self) -> None:
        """Nobody uses now what writes replaced since the freeze. Lock held.

        It is found by comparing the frozen tables, which are as they were, with those in force.
        """
        image = self._image
        if image.broken or not self._fresh:
            return
        bits = image.header.cluster_bits
        count = image.header.l2_entries
        for l1_index in self._fresh:
            frozen = l1_entry(self._frozen_l1, l1_index) & OFFSET_MASK
            if not frozen:
                continue
            present = l1_entry(image.world.l1, l1_index) & OFFSET_MASK
            old = image.mapping.entries(frozen, 0, count)
            new = image.mapping.entries(present, 0, count) if present else (0,) * count
            dropped = [frozen >> bits]
            for before, after in zip(old, new, strict=True):
                if lead_apart(before, after):
                    dropped += image.l2.counted(before)
            image.drop(dropped)

    def _give_state_back(self) -> None:
        image = self._image
        bits = image.header.cluster_bits
        if image.is_in_doubt:
            # The file may list the snapshot all the same.
            return
        try:
            for first, count in self._reserved:
                image.file.discard(first << bits, count << bits)
        finally:
            with image.gate.lock:
                self.release_state()

    def _refuse_if_over(self) -> None:
        if self._is_over or self._is_prepared:
            raise InUse("The pending snapshot was prepared, committed or abandoned")


def freeze(image: Image) -> Pending:
    """Freeze the active tree. :raise InUse: another pending snapshot of the image is not over."""
    with image.gate.drained():
        image.refuse_if_broken()
        if image.pending is not None or image.gate.is_switching:
            raise InUse(
                "Another pending snapshot of the image has not been committed or abandoned",
                remedy="Wait for the job that saves or copies the disk, or cancel it.",
            )
        image.pending = image.shows = pending = Pending(image)
        return pending
