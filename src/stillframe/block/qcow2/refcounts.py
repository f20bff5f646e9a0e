"""How often each host cluster is referenced, and which are free.

    refcount table ──► refcount blocks ──► one refcount a host cluster; no block means zeroes

On disk, at every instant, a refcount is at least the number of references that the file holds to its cluster. Three rules
keep that without a flush for each write:

    lease     guest data and L2 tables get clusters out of a lease: refcounts of one, raised in bulk and durable before the
              first of them is handed out, in a file that is durably long enough. What a crash leaves of a lease is a leak.
    drop      a reference that was taken out of a table is counted down only after a flush has made that durable, and when
              nobody who looked it up before is still at it (`settle`)
    reserve   clusters that no table in force points to (a pending snapshot's state, tables not yet switched to) are
              only marked in memory; a crash leaves nothing

All calls are made with the image's lock held, which some give up while they flush.
"""

import contextlib
import struct
from array import array
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stillframe.block.qcow2.layout import (
    MAX_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    REFCOUNT_TABLE_RESERVED,
    aligned,
)
from stillframe.block.qcow2.widths import Clusters, Counts, by_block, decode, encode, runs_of, split_run
from stillframe.errors import ImageCorrupt, IOFailed, LimitReached

if TYPE_CHECKING:
    from stillframe.block.qcow2.image import Image

CACHE_BYTES = 64 << 20  # Of refcount blocks as 64-bit numbers; at least one is kept, of 128 MiB at most.
FIRST_LEASE_BYTES = 2 << 20
LARGEST_LEASE_BYTES = 128 << 20
LEASE_GROWTH = 8
GROWN_AHEAD = 3
"""The file's length grows for so many leases more."""
RUNS_IN_LEASE = 64
DROPPED_AT_MOST = 1 << 16
"""Dropped clusters after which a flush of our own is due."""

_WRITTEN_THROUGH_AT_MOST = 4
"""Parts of a lease that are made durable one by one; more of them with one flush of the file."""

ClusterRun = tuple[int, int]
"""First host cluster, and how many."""

Written = tuple[int, bytes]
"""Host offset and bytes of a write."""


class Refcounts:
    """The refcounts of one open, writable image."""

    def __init__(self, image: "Image") -> None:
        self._image = image
        header = image.world.header
        self._order = header.refcount_order
        self._bits = header.cluster_bits
        self._per_block = header.refcounts_in_block
        self._blocks: OrderedDict[int, Counts] = OrderedDict()
        self._reserved: dict[int, npt.NDArray[np.bool_]] = {}
        self._lease: list[ClusterRun] = []
        self._first_lease = self._lease_clusters = max(16, FIRST_LEASE_BYTES >> self._bits)
        self._leasing = False
        self._unlinked: list[int] = []
        self._dropped = array("q")
        self._dropped_stamp = 0
        self._search_from = 1
        self.packed_end = 0
        """Where the next compressed data goes, inside a cluster that holds some (packing.py); 0 for nowhere."""

    @property
    def per_block(self) -> int:
        """Refcounts of one block."""
        return self._per_block

    # Reading.

    def block_offset(self, index: int) -> int:
        """Where a refcount block lies; 0 where there is none. :raise ImageCorrupt: it cannot lie there."""
        table = self._image.world.refcount_table
        if index * 8 >= len(table):
            return 0
        offset: int = struct.unpack_from(">Q", table, index * 8)[0]
        if offset and (
            offset & REFCOUNT_TABLE_RESERVED
            or not aligned(offset, (1 << self._bits) - 1)
            or offset >= self._image.file.size
        ):
            raise ImageCorrupt(f"Refblock offset {offset:#x} unaligned or outside the image file")
        return offset

    def block(self, index: int) -> Counts | None:
        """The refcounts of a block, as the file holds them; not to be changed by the caller."""
        block = self._blocks.get(index)
        if block is not None:
            self._blocks.move_to_end(index)
            return block
        offset = self.block_offset(index)
        if not offset:
            return None
        block = decode(self._image.file.read(offset, 1 << self._bits), self._order)
        self._remember(index, block)
        return block

    def count(self, cluster: int) -> int:
        """The refcount of one cluster."""
        index, within = divmod(cluster, self._per_block)
        block = self.block(index)
        return 0 if block is None else int(block[within])

    def _remember(self, index: int, block: Counts) -> None:
        self._blocks[index] = block
        while len(self._blocks) > max(1, CACHE_BYTES // (8 * self._per_block)):
            self._blocks.popitem(last=False)

    def _store(self, index: int, first: int, end: int) -> Written:
        """Write refcounts `first` to `end` of a cached block through; on an error the block is read anew."""
        block = self._blocks[index]
        octet = max(1, 8 >> self._order)
        first -= first % octet
        end += -end % octet
        data = encode(block[first:end], self._order)
        offset = self.block_offset(index) + (first << self._order >> 3)
        try:
            self._image.file.write(offset, data)
        except BaseException:
            self._blocks.pop(index, None)
            raise
        return offset, data

    # Finding room.

    def find(self, wanted: int, least: int, start: int | None = None) -> ClusterRun:
        """Free clusters next to each other: at least `least`, at most `wanted`.

        :raise LimitReached: the format's end.
        """
        at = self._search_from if start is None else start
        run_first, run = at, 0
        while run < wanted:
            if at >= MAX_OFFSET >> self._bits:
                if run >= least:
                    break
                raise LimitReached("The image file has reached the largest size that qcow2 allows")
            index, within = divmod(at, self._per_block)
            free = self._free_in(index)
            if free is None:
                run += self._per_block - within
            else:
                used = np.flatnonzero(~free[within:])
                lengths = np.diff(used, prepend=-1, append=self._per_block - within) - 1
                if not run:
                    run_first = at
                run += int(lengths[0])
                if len(used):
                    if run >= least:
                        break
                    inner = np.flatnonzero(lengths[1:-1] >= least)
                    if len(inner):
                        which = int(inner[0])
                        run_first, run = at + int(used[which]) + 1, int(lengths[which + 1])
                        break
                    run_first, run = at + int(used[-1]) + 1, int(lengths[-1])
            at += self._per_block - within
        # A refcount of zero proves nothing in an image that was damaged, or made to do damage.
        self._image.refuse_overlap(run_first, min(run, wanted))
        return run_first, min(run, wanted)

    def _free_in(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Which clusters of a block are free; None for all."""
        block = self.block(index)
        reserved = self._reserved.get(index)
        if block is None:
            return None if reserved is None else ~reserved
        free: npt.NDArray[np.bool_] = block == 0
        if reserved is not None:
            free &= ~reserved
        return free

    def reserve(self, wanted: int, least: int = 1) -> ClusterRun:
        """Mark free clusters in memory; see `unreserve`. :raise LimitReached: the format's end."""
        first, count = self.find(wanted, least)
        self._mark(first, count, True)
        if least == 1:
            self._search_from = first + count
        return first, count

    def unreserve(self, first: int, count: int) -> None:
        """The opposite of `reserve`; the refcounts on disk decide again."""
        self._mark(first, count, False)
        self._search_from = min(self._search_from, max(1, first))

    def hold(self, first: int, count: int) -> None:
        """`reserve` for given clusters, which a repair must keep whatever their refcounts say."""
        self._mark(first, count, True)

    def _mark(self, first: int, count: int, state: bool) -> None:
        for index, start, end in split_run(first, count, self._per_block):
            marks = self._reserved.get(index)
            if marks is None:
                marks = self._reserved[index] = np.zeros(self._per_block, np.bool_)
            marks[start:end] = state
            if not state and not marks.any():
                del self._reserved[index]

    # The lease.

    def allocate(self, wanted: int) -> ClusterRun:
        """Clusters with a durable refcount of one, contiguous, at most `wanted` and at least one.

        Gives up the lock where the lease must be extended.

        :raise LimitReached: the format's end, or a full refcount table.
        """
        gate = self._image.gate
        while not self._lease:
            if self._leasing:
                gate.wait()
                continue
            self._leasing = True
            try:
                self._extend_lease(wanted)
            finally:
                self._leasing = False
                gate.tell()
        which = next((i for i, (_, count) in enumerate(self._lease) if count >= wanted), 0)
        first, count = self._lease[which]
        taken = min(count, wanted)
        if taken == count:
            del self._lease[which]
        else:
            self._lease[which] = (first + taken, count - taken)
        return first, taken

    def give_back(self, first: int, count: int) -> None:
        """Allocated clusters that nothing was made to point to."""
        for number, (start, further) in enumerate(self._lease):
            if start == first + count:
                self._lease[number] = (first, count + further)
                return
        self._lease.append((first, count))

    def _extend_lease(self, wanted: int) -> None:
        image = self._image
        wanted = max(wanted, self._lease_clusters)
        self._lease_clusters = min(
            LEASE_GROWTH * self._lease_clusters, max(16, LARGEST_LEASE_BYTES >> self._bits)
        )
        found = self._find_for_lease(wanted)
        last_block = max(first + count - 1 for first, count in found) // self._per_block
        try:
            if last_block * 8 >= len(image.world.refcount_table):
                try:
                    self._grow_table(last_block + 1)
                except LimitReached:
                    self._keep_counted(found)
                    if not found:
                        raise
            leased, created, written = self._raise_to_one(found)
            with image.gate.released():
                # An entry may reach the disk before the new length of the file does, and must not point past its end.
                # Further than this lease, so that not each of them must wait for it.
                end = max(first + count for first, count in found)
                image.file.grow_durably(end << self._bits, ahead=GROWN_AHEAD * wanted << self._bits)
            self._make_durable(written)
            if created:
                # The blocks are durable, and count themselves, before the table points to them.
                self._make_durable(self._link_blocks(created))
        except BaseException:
            for first, count in found:
                self.unreserve(first, count)
            for cluster in self._unlinked:
                self.hold(cluster, 1)
            raise
        for first, count in found:
            self._mark(first, count, False)
        self._lease.extend(leased)

    def _make_durable(self, written: list[Written]) -> None:
        """What was just written reaches the storage, without all that the guest has written meanwhile if they are few.

        Gives up the lock for that, where nobody else can have changed a part of the same bytes since.
        """
        image = self._image
        if len(written) > _WRITTEN_THROUGH_AT_MOST or self._order < 3:
            with image.gate.released():
                image.file.flush()
            return
        with image.gate.released():
            for offset, data in written:
                image.file.write_durable(offset, data)

    def _find_for_lease(self, wanted: int) -> list[ClusterRun]:
        found: list[ClusterRun] = []
        while wanted > 0 and len(found) < RUNS_IN_LEASE:
            try:
                found.append(self.reserve(wanted))
            except LimitReached:
                if not found:
                    raise
                break
            wanted -= found[-1][1]
        return found

    def _keep_counted(self, found: list[ClusterRun]) -> None:
        """Of reserved runs, keep those that the refcount table as it is can count."""
        end = len(self._image.world.refcount_table) // 8 * self._per_block
        for at in range(len(found) - 1, -1, -1):
            first, count = found[at]
            kept = max(0, min(count, end - first))
            if kept < count:
                self.unreserve(first + kept, count - kept)
            if kept:
                found[at] = (first, kept)
            else:
                del found[at]

    def _raise_to_one(
        self, found: list[ClusterRun]
    ) -> tuple[list[ClusterRun], list[ClusterRun], list[Written]]:
        """Write refcounts of one for reserved runs, and blocks for them where there are none.

        :return: what is left to be leased; the new blocks, as index and cluster; what was written.
        """
        leased: list[ClusterRun] = []
        written: list[Written] = []
        created: dict[int, tuple[int, Counts]] = {}
        for index, start, end in (part for run in found for part in split_run(*run, self._per_block)):
            base = index * self._per_block
            block = self.block(index)
            if block is not None:
                block[start:end] = 1
                written.append(self._store(index, start, end))
            elif index in created:
                created[index][1][start:end] = 1
            else:
                block = np.zeros(self._per_block, np.int64)
                block[start:end] = 1
                created[index] = (base + start, block)
                start += 1
            if end > start:
                leased.append((base + start, end - start))
        for cluster, block in created.values():
            data = encode(block, self._order)
            self._image.file.write(cluster << self._bits, data)
            written.append((cluster << self._bits, data))
        return leased, [(index, cluster) for index, (cluster, _) in created.items()], written

    def _link_blocks(self, created: list[tuple[int, int]]) -> list[Written]:
        """Write the refcount table's entries of new blocks: index and cluster, ascending."""
        world = self._image.world
        written: list[Written] = []
        for index, cluster in created:
            entry = struct.pack(">Q", cluster << self._bits)
            offset = world.header.refcount_table_offset + index * 8
            try:
                self._image.file.write(offset, entry)
            except BaseException:
                # The file may name the block all the same: it is not used for anything else, and the entry is taken back.
                self._unlinked.append(cluster)
                with contextlib.suppress(IOFailed):
                    self._image.file.write(offset, bytes(8))
                raise
            written.append((offset, entry))
            world.refcount_table[index * 8 : index * 8 + 8] = entry
            self._image.note_metadata(cluster, "refcount block")
        return written

    def _grow_table(self, blocks: int) -> None:
        """A longer refcount table, behind all that the present one covers, with the blocks that count it."""
        image = self._image
        world = image.world
        old = world.header
        covered = len(world.refcount_table) // 8
        entries = max(blocks, min(covered * 3 // 2, MAX_REFCOUNT_TABLE_BYTES // 8))
        clusters = blocks_needed = 0
        while True:
            clusters = old.clusters_for(entries * 8)
            start, _ = self.find(
                clusters + blocks_needed, clusters + blocks_needed, covered * self._per_block
            )
            end = start + clusters + blocks_needed
            spanned = range(start // self._per_block, (end - 1) // self._per_block + 1)
            if len(spanned) <= blocks_needed and spanned[-1] < entries:
                break
            blocks_needed = max(blocks_needed, len(spanned))
            entries = max(entries, spanned[-1] + 1)
        if clusters << self._bits > MAX_REFCOUNT_TABLE_BYTES:
            raise LimitReached("The refcount table of the image has reached its largest size of 8 MiB")
        table = bytearray(clusters << self._bits)
        table[: len(world.refcount_table)] = world.refcount_table
        for number, index in enumerate(spanned):
            base = index * self._per_block
            block = np.zeros(self._per_block, np.int64)
            block[max(0, start - base) : max(0, end - base)] = 1
            place = start + clusters + number
            image.file.write(place << self._bits, encode(block, self._order))
            struct.pack_into(">Q", table, index * 8, place << self._bits)
        image.file.write(start << self._bits, table)
        image.file.flush()
        header = replace(old, refcount_table_offset=start << self._bits, refcount_table_clusters=clusters)
        image.switch_world(replace(world, header=header, refcount_table=table))
        self._lower(
            np.arange(old.refcount_table_clusters, dtype=np.int64) + (old.refcount_table_offset >> self._bits)
        )

    def take_lease(self) -> list[ClusterRun]:
        """The lease, which is over: whoever takes it counts it down, or puts it back with `give_back`."""
        lease, self._lease = self._lease, []
        return lease

    def return_lease(self) -> None:
        """Count down what of the lease was not used."""
        for first, count in self.take_lease():
            self._lower(np.arange(first, first + count, dtype=np.int64))

    def end_of_used(self) -> int:
        """The host offset behind the last cluster that is in use."""
        table = np.frombuffer(self._image.world.refcount_table, ">u8")
        for index in np.flatnonzero(table)[::-1].tolist():
            block = self.block(index)
            if block is not None and block.any():
                last = int(np.flatnonzero(block)[-1])
                return int(index * self._per_block + last + 1) << self._bits
        return 1 << self._bits

    # Dropping references.

    def drop(self, clusters: Iterable[int]) -> None:
        """References to these clusters were taken out of a table that was written."""
        clusters = list(clusters)
        if self.packed_end >> self._bits in clusters:
            self.packed_end = 0
        self._dropped.extend(clusters)
        self._dropped_stamp = self._image.gate.stamp()

    @property
    def has_many_dropped(self) -> bool:
        """Whether a flush of our own is due."""
        return len(self._dropped) >= DROPPED_AT_MOST

    def take_dropped(self) -> Clusters | None:
        """What can be counted down once a flush that begins now has ended; None for nothing."""
        if not self._dropped or not self._image.gate.quiet_since(self._dropped_stamp):
            return None
        taken = np.array(self._dropped, np.int64)
        self._dropped = array("q")
        return taken

    def put_back_dropped(self, clusters: Clusters) -> None:
        """The flush, or what was to follow it, did not come about."""
        self._dropped.frombytes(clusters.tobytes())

    def settle(self, dropped: Clusters) -> None:
        """Count dropped references down, durable as they are, and give the space of what nobody uses now back.

        Gives up the lock for that: what is on its way to zero is not free before.

        :raise ImageCorrupt: there were more references than the refcounts say.
        """
        clusters, times = np.unique(dropped, return_counts=True)
        present = (
            np.array([self.count(c) for c in clusters.tolist()])
            if len(clusters) < 64
            else self.counts_of(clusters)
        )
        unused = runs_of(clusters[present == times])
        with self._image.gate.released():
            for first, count in unused:
                self._image.file.discard(first << self._bits, count << self._bits)
        self._lower(clusters, times)

    def counts_of(self, clusters: Clusters) -> Counts:
        """The refcounts of these clusters, as the file holds them."""
        found = np.zeros(len(clusters), np.int64)
        for index, which, within in by_block(clusters, self._per_block):
            block = self.block(index)
            if block is not None:
                found[which] = block[within]
        return found

    def add_references(self, times: dict[int, int]) -> None:
        """Count clusters in use so many times more; the references are written after a flush that follows this.

        The caller has seen to the refcounts' width.
        """
        blocks: dict[int, list[int]] = {}
        for cluster in times:
            blocks.setdefault(cluster // self._per_block, []).append(cluster)
        for index, clusters in blocks.items():
            block = self.block(index)
            if block is None or any(not block[each % self._per_block] for each in clusters):
                raise ImageCorrupt(
                    f"Clusters {clusters[0]} to {clusters[-1]} are in use and not counted",
                    remedy="Run `stillframe image check --repair all` on the image.",
                )
            within = [each % self._per_block for each in clusters]
            block[within] += [times[each] for each in clusters]
            self._store(index, min(within), max(within) + 1)

    def _lower(self, clusters: Clusters, times: Counts | None = None) -> None:
        """Count down, one block after the other. Those after one that fails wait for the next flush.

        Those of the block itself are leaked: it is not known what the file holds, and nothing may be counted down twice.
        """
        if times is None:
            times = np.ones(len(clusters), np.int64)
        parts = list(by_block(clusters, self._per_block))
        try:
            while parts:
                index, which, within = parts.pop(0)
                self._lower_in_block(index, clusters[which], within, times[which])
        except BaseException:
            for _, which, _ in parts:
                self.put_back_dropped(np.repeat(clusters[which], times[which]))
            raise

    def _lower_in_block(self, index: int, clusters: Clusters, within: Clusters, times: Counts) -> None:
        block = self.block(index)
        if block is None or (block[within] < times).any():
            raise ImageCorrupt(
                f"A refcount of clusters {int(clusters[0])} to {int(clusters[-1])} is lower than the references "
                "that were dropped",
                remedy="Run `stillframe image check --repair all` on the image.",
            )
        block[within] -= times
        self._store(index, int(within.min()), int(within.max()) + 1)
        for cluster in clusters[block[within] == 0].tolist():
            self._image.forget_cluster(cluster)
            self._search_from = min(self._search_from, cluster)

    # Switching tables.

    def forget_all(self) -> None:
        """The tables were switched: what was read of them is void; reservations stay."""
        self._blocks.clear()
        self._search_from = 1
        self.packed_end = 0
        self._lease_clusters = self._first_lease
