"""Which host clusters hold metadata, so that nothing is ever written over it, whatever an image's tables claim.

Kept as sorted numbers, 9 bytes an L2 table or refcount block, and one range for every other table: an image that claims
millions of them, or the same ones many times over, costs neither more memory nor more time than it has tables.
"""

from array import array
from bisect import bisect_left, insort
from typing import TYPE_CHECKING

from stillframe.block.qcow2.layout import MAX_L1_BYTES, OFFSET_MASK
from stillframe.errors import ImageCorrupt

if TYPE_CHECKING:
    from stillframe.block.qcow2.image import World

ACTIVE_L2 = "active L2 table"

_KINDS = ("refcount block", ACTIVE_L2, "another L2 table")
"""Of single clusters; the first counts where a cluster is claimed twice."""


class Metadata:
    """The metadata of one world, noted once and kept up to date. Lock held."""

    def __init__(self, world: "World") -> None:
        import numpy as np

        header = world.header
        bits = header.cluster_bits
        tables = [
            (0, header.cluster_size, "qcow2_header"),
            (header.l1_offset, header.l1_size * 8, "active L1 table"),
            (header.refcount_table_offset, len(world.refcount_table), "refcount table"),
            (header.snapshots_offset, world.snapshot_table_length, "snapshot table"),
        ]
        tables += [
            (entry.l1_offset, entry.l1_size * 8, "inactive L1 table")
            for entry in world.snapshots
            if entry.l1_size * 8 <= MAX_L1_BYTES
        ]
        self._tables = [
            (offset >> bits, (offset + length - 1 >> bits) + 1, what)
            for offset, length, what in tables
            if length
        ]
        ranges = sorted((first, end) for first, end, _ in self._tables)
        self._firsts = array("q", [first for first, _ in ranges])
        # Of all tables that begin no later: the furthest end. Tables may overlap.
        self._ends = array("q", np.maximum.accumulate([end for _, end in ranges]).tolist())
        self._note_singles(world, bits)

    def _note_singles(self, world: "World", bits: int) -> None:
        """Refcount blocks and active L2 tables."""
        import numpy as np

        shift = np.uint64(bits)
        blocks = np.frombuffer(world.refcount_table, ">u8")
        blocks = np.unique(blocks[blocks != 0] >> shift)
        tables = (np.frombuffer(world.l1, ">u8") & np.uint64(OFFSET_MASK)) >> shift
        tables, times = np.unique(tables[tables != 0], return_counts=True)
        clusters = np.concatenate((blocks, tables)).astype(np.int64)
        kinds = np.concatenate((np.zeros(len(blocks), np.uint8), np.where(times == 1, 1, 2).astype(np.uint8)))
        clusters, which = np.unique(clusters, return_index=True)
        self._clusters = array("q", clusters.tobytes())
        self._kinds = bytearray(kinds[which].tobytes())

    def what(self, cluster: int) -> str | None:
        """What a host cluster holds; None for no metadata."""
        return self.overlap(cluster, 1)

    def overlap(self, first: int, count: int) -> str | None:
        """What the first metadata among these clusters is; None for none."""
        end = first + count
        at = bisect_left(self._firsts, end)
        if at and self._ends[at - 1] > first:
            return next(what for start, stop, what in self._tables if start < end and stop > first)
        at = bisect_left(self._clusters, first)
        if at < len(self._clusters) and self._clusters[at] < end:
            return _KINDS[self._kinds[at]]
        return None

    def note(self, cluster: int, what: str) -> None:
        """A cluster became a refcount block or an L2 table."""
        self.forget(cluster)
        at = bisect_left(self._clusters, cluster)
        insort(self._clusters, cluster)
        self._kinds.insert(at, _KINDS.index(what))

    def forget(self, cluster: int, *what: str) -> None:
        """A cluster is no refcount block and no L2 table any more. :param what: only if it is one of these."""
        at = bisect_left(self._clusters, cluster)
        if at < len(self._clusters) and self._clusters[at] == cluster:
            if what and _KINDS[self._kinds[at]] not in what:
                return
            del self._clusters[at], self._kinds[at]


def refuse_shared_blocks(world: "World") -> None:
    """:raise ImageCorrupt: two entries of the refcount table name one block, which then counts nothing."""
    import numpy as np

    blocks = np.frombuffer(world.refcount_table, ">u8")
    blocks = blocks[blocks != 0]
    if len(np.unique(blocks)) < len(blocks):
        raise ImageCorrupt(
            "The refcount table names one refcount block twice",
            remedy="Run `stillframe image check --repair all` on the image.",
        )
