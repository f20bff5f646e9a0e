"""The shadow switch: a new world is built beside the one in force, and one write of the header puts it there.

    before   new L1, L2 and snapshot tables, new refcount blocks and a new refcount table go to free clusters; flush
    switch   header bytes 24..71 in one write, inside one sector; flush
    after    what only the old world used is free

Each world's refcounts count exactly that world's references: the clusters of the new tables are free in the old world, those
of the replaced tables are free in the new one. So a crash at any instant leaves neither a leak nor a refcount that is too
low, and switching back is the same write with the old bytes, as long as nothing the old world used was handed out again.

Memory: 16 bytes for each refcount of the blocks that change.
"""

import struct
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from stillframe.block.qcow2.image import Image, World
from stillframe.block.qcow2.layout import (
    COMPRESSED,
    COPIED,
    MAX_OFFSET,
    MAX_REFCOUNT_TABLE_BYTES,
    OFFSET_MASK,
    Header,
)
from stillframe.block.qcow2.snapshot_table import SnapshotEntry, pack_table
from stillframe.block.qcow2.widths import (
    Clusters,
    Counts,
    by_block,
    compact,
    encode,
    is_repeating,
    largest,
    runs_of,
)
from stillframe.errors import ImageCorrupt, LimitReached

if TYPE_CHECKING:
    from stillframe.block.qcow2.refcounts import ClusterRun

Entries = npt.NDArray[np.uint64]

TABLES_AT_ONCE = 4 << 20
"""Bytes of L2 tables that are read, changed and written at a time."""

U_COPIED = np.uint64(COPIED)
U_COMPRESSED = np.uint64(COMPRESSED)
U_OFFSET = np.uint64(OFFSET_MASK)


class Shadow:
    """A new world in the making. Made and used inside a switch, so no mapping or refcount changes meanwhile."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.old = image.world
        self._header = image.world.header
        self._bits = self._header.cluster_bits
        self._per_block = self._header.refcounts_in_block
        self._largest = largest(self._header.refcount_order)
        self._counts: dict[int, Counts] = {}
        self._before: dict[int, Counts] = {}
        self.reserved: list[ClusterRun] = []

    # Counting.

    def _block(self, index: int) -> Counts:
        block = self._counts.get(index)
        if block is None:
            with self.image.gate.lock:
                found = self.image.refcounts.block(index)
            before = np.zeros(self._per_block, np.int64) if found is None else found.copy()
            self._before[index] = before
            block = self._counts[index] = before.copy()
        return block

    def add(self, clusters: Clusters, change: int) -> None:
        """One more reference, or one less, to each of these clusters, which are referenced in the old world.

        :raise ImageCorrupt: one is not, by its refcount.
        :raise LimitReached: more references than the refcount's width holds.
        """
        for index, which, within in by_block(clusters, self._per_block):
            block = self._block(index)
            if is_repeating(within):
                unused = block[within] <= 0
                np.add.at(block, within, change)
                counts = block[within]
            else:
                place = compact(within)
                unused = block[place] <= 0
                counts = block[place] + change
                block[place] = counts
            if unused.any() or (change < 0 and int(counts.min()) < 0):
                cluster = int(clusters[which][unused | (counts < 0)][0])
                raise ImageCorrupt(
                    f"Cluster {cluster} is referenced more often than its refcount says",
                    remedy="Run `stillframe image check --repair all` on the image.",
                )
            if change > 0 and int(counts.max()) > self._largest:
                raise LimitReached(
                    f"A cluster would be shared more often than refcounts of {self._header.refcount_bits} bits can count",
                    remedy="Delete a snapshot, or convert the image to one with wider refcounts.",
                )

    def add_run(self, first: int, count: int, change: int) -> None:
        """`add` for clusters next to each other."""
        self.add(np.arange(first, first + count, dtype=np.int64), change)

    def free_bytes(self, offset: int, length: int) -> None:
        """The clusters of a table that the new world does not use."""
        if length:
            self.add_run(offset >> self._bits, self._header.clusters_for(length), -1)

    def count_new(self, first: int, count: int) -> None:
        """Reserved clusters are used by the new world, once."""
        end = first + count
        while first < end:
            index, within = divmod(first, self._per_block)
            stop = min(self._per_block, within + end - first)
            self._block(index)[within:stop] = 1
            first += stop - within

    def counts_of(self, clusters: Clusters) -> Counts:
        """The new world's refcounts of these clusters."""
        found = np.zeros(len(clusters), np.int64)
        for index, which, within in by_block(clusters, self._per_block):
            found[which] = self._block(index)[within]
        return found

    def set_counts(self, index: int, counts: Counts) -> None:
        """All the refcounts of a block, for a repair. :raise LimitReached: wider than the image's."""
        if len(counts) and int(counts.max()) > self._largest:
            raise LimitReached("A cluster is referenced more often than the image's refcounts can count")
        self._block(index)[:] = counts

    def freed(self) -> "list[ClusterRun]":
        """What the old world uses and the new one does not."""
        runs: list[ClusterRun] = []
        for index, counts in sorted(self._counts.items()):
            gone = np.flatnonzero((self._before[index] > 0) & (counts == 0))
            runs += runs_of(gone + index * self._per_block)
        return runs

    # New tables.

    def allocate(self, count: int) -> int:
        """Contiguous clusters for the new world: the first of them."""
        with self.image.gate.lock:
            first, _ = self.image.refcounts.reserve(count, count)
        self.reserved.append((first, count))
        self.count_new(first, count)
        return first

    def place(self, data: "bytes | bytearray | memoryview") -> int:
        """Write a table to clusters of its own: its host offset; 0 for an empty one."""
        if not len(data):
            return 0
        count = self._header.clusters_for(len(data))
        offset = self.allocate(count) << self._bits
        self.image.file.write(offset, data)
        padding = (count << self._bits) - len(data)
        if padding:
            self.image.file.write(offset + len(data), bytes(padding))
        return offset

    def place_tables(self, tables: Entries) -> npt.NDArray[np.uint64]:
        """Write whole L2 tables next to each other: their host offsets."""
        first = self.allocate(len(tables))
        self.image.file.write(first << self._bits, memoryview(tables.astype(">u8").tobytes()))
        return (np.arange(first, first + len(tables), dtype=np.uint64)) << np.uint64(self._bits)

    # The switch.

    def world(
        self, *, l1: bytearray | None, snapshots: tuple[SnapshotEntry, ...] | None, size: int | None = None
    ) -> World:
        """Write what is left, flush, and return the new world, durable but for the header.

        :param l1: the active L1; None for the old one. :param snapshots: the list; None for the old one.
        :param size: the disk's; None for the old one.
        """
        old = self.old
        header = self._header
        if l1 is not None:
            self.free_bytes(header.l1_offset, header.l1_size * 8)
            header = replace(header, l1_offset=self.place(l1), l1_size=len(l1) // 8)
        length = old.snapshot_table_length
        if snapshots is not None:
            table = pack_table(snapshots)
            self.free_bytes(header.snapshots_offset, length if old.snapshots else 0)
            header = replace(header, snapshots_offset=self.place(table), snapshot_count=len(snapshots))
            length = len(table)
        if size is not None:
            header = replace(header, size=size)
        header, refcount_table = self._place_refcounts(header)
        self.image.file.flush()
        return World(
            header=header,
            l1=old.l1 if l1 is None else l1,
            refcount_table=refcount_table,
            snapshots=old.snapshots if snapshots is None else snapshots,
            snapshot_table_length=length,
        )

    def _place_refcounts(self, header: Header) -> tuple[Header, bytearray]:
        """New refcount blocks and a new table; both count themselves, so this goes round until nothing changes."""
        with self.image.gate.lock:
            lease = self.image.refcounts.take_lease()
            for first, count in lease:
                self.image.refcounts.give_back(first, count)
        for first, count in lease:
            self.add_run(first, count, -1)
        self.free_bytes(header.refcount_table_offset, len(self.old.refcount_table))
        placed: dict[int, int] = {}
        table_first = table_clusters = 0
        while True:
            new = [i for i in sorted(self._counts) if i not in placed and self._is_changed(i)]
            for index in new:
                with self.image.gate.lock:
                    offset = self.image.refcounts.block_offset(index)
                self.free_bytes(offset, header.cluster_size if offset else 0)
            if new:
                first = self.allocate(len(new))
                placed |= {index: first + number for number, index in enumerate(new)}
            entries = max(len(self.old.refcount_table) // 8, max(self._counts, default=0) + 1)
            if entries * 8 > table_clusters << self._bits:
                if table_clusters:
                    self.count_free(table_first, table_clusters)
                if entries * 8 > len(self.old.refcount_table):
                    roomy = max(entries + 2, len(self.old.refcount_table) // 8 * 3 // 2)
                    entries = max(entries, min(roomy, MAX_REFCOUNT_TABLE_BYTES // 8))
                table_clusters = header.clusters_for(entries * 8)
                if table_clusters << self._bits > MAX_REFCOUNT_TABLE_BYTES:
                    raise LimitReached(
                        "The refcount table of the image has reached its largest size of 8 MiB"
                    )
                table_first = self.allocate(table_clusters)
            elif not new:
                break
        table = bytearray(table_clusters << self._bits)
        table[: len(self.old.refcount_table)] = self.old.refcount_table
        for index, cluster in placed.items():
            self.image.file.write(cluster << self._bits, encode(self._counts[index], header.refcount_order))
            struct.pack_into(">Q", table, index * 8, cluster << self._bits)
        self.image.file.write(table_first << self._bits, table)
        header = replace(
            header, refcount_table_offset=table_first << self._bits, refcount_table_clusters=table_clusters
        )
        return header, table

    def _is_changed(self, index: int) -> bool:
        return not np.array_equal(self._counts[index], self._before[index])

    def count_free(self, first: int, count: int) -> None:
        """The new world does not use these clusters after all."""
        end = first + count
        while first < end:
            index, within = divmod(first, self._per_block)
            stop = min(self._per_block, within + end - first)
            self._block(index)[within:stop] = 0
            first += stop - within

    def give_back(self) -> None:
        """The new world is not wanted: its space goes back to the storage, too. Nothing in force points to it."""
        for first, count in self.reserved:
            self.image.file.discard(first << self._bits, count << self._bits)
        self.give_up()

    def give_up(self) -> None:
        """The new world is not wanted, or in force: what was reserved for it is ordinary again."""
        with self.image.gate.lock:
            for first, count in self.reserved:
                self.image.refcounts.unreserve(first, count)
        self.reserved = []


def l1_words(l1: bytes | bytearray) -> Entries:
    """An L1 table as numbers."""
    return np.frombuffer(bytes(l1), ">u8").astype(np.uint64)


def pack_words(words: Entries) -> bytearray:
    """The opposite of `l1_words`."""
    return bytearray(words.astype(">u8").tobytes())


def read_tables(image: Image, offsets: Entries) -> Iterator[tuple[slice, Entries]]:
    """L2 tables, some at a time: which of `offsets`, and their words, by table, entry and word of the entry.

    :raise ImageCorrupt: no table can be at one of these offsets.
    """
    size = image.cluster_size
    wrong = (offsets & np.uint64(size - 1) != 0) | (offsets == 0) | (offsets >= np.uint64(image.file.size))
    if wrong.any():
        raise ImageCorrupt(
            f"L2 table offset {int(offsets[wrong][0]):#x} is not the start of a cluster inside the image file",
            remedy="Run `stillframe image check` on the image.",
        )
    if len(offsets) * size > max(image.file.size + size, TABLES_AT_ONCE):
        # Named again and again: following them all could take for ever.
        raise ImageCorrupt(
            "An L1 table names more L2 tables than the image file holds",
            remedy="Run `stillframe image check` on the image.",
        )
    at_once = max(1, TABLES_AT_ONCE // size)
    for start in range(0, len(offsets), at_once):
        part = offsets[start : start + at_once]
        buffer = bytearray(len(part) * size)
        view = memoryview(buffer)
        breaks = (np.flatnonzero(np.diff(part.astype(np.int64)) != size) + 1).tolist()
        for a, b in zip([0, *breaks], [*breaks, len(part)], strict=True):
            image.file.readinto(int(part[a]), view[a * size : b * size])
        yield slice(start, start + len(part)), as_tables(buffer, image.header)


def as_tables(data: bytearray, header: Header) -> Entries:
    """The bytes of L2 tables as words, by table, entry and word of the entry."""
    return np.frombuffer(data, ">u8").astype(np.uint64).reshape(-1, header.l2_entries, header.l2_entry_words)


def clusters_of(entries: Entries, bits: int) -> Clusters:
    """The host clusters that L2 entries, by their first words, count as references to, with repeats.

    :raise ImageCorrupt: a host offset that is not a cluster's start, or beyond the format's end.
    """
    packed = (entries & U_COMPRESSED) != 0
    hosts = entries[~packed] & U_OFFSET
    hosts = hosts[hosts != 0]
    if (hosts & np.uint64((1 << bits) - 1)).any():
        raise ImageCorrupt("A cluster's allocation offset is unaligned")
    clusters: Clusters = (hosts >> np.uint64(bits)).astype(np.int64)
    if packed.any():
        clusters = np.concatenate((clusters, _clusters_of_packed(entries[packed], bits)))
    return clusters


def packed_clusters(entries: Entries, bits: int) -> tuple[Clusters, Clusters]:
    """The first and the last host cluster of the compressed data of each entry."""
    offset_bits = 70 - bits
    offsets = entries & np.uint64((1 << offset_bits) - 1)
    sectors = ((entries & np.uint64(COMPRESSED - 1)) >> np.uint64(offset_bits)) + np.uint64(1)
    ends = (offsets & ~np.uint64(511)) + sectors * np.uint64(512) - np.uint64(1)
    first: Clusters = (offsets >> np.uint64(bits)).astype(np.int64)
    last: Clusters = (ends >> np.uint64(bits)).astype(np.int64)
    return first, last


def _clusters_of_packed(entries: Entries, bits: int) -> Clusters:
    first, last = packed_clusters(entries, bits)
    if len(first) and int(first.max()) >= MAX_OFFSET >> bits:
        raise ImageCorrupt("Compressed data lies beyond the format's end")
    parts = [first]
    step = 1
    while (more := first + step <= last).any():
        parts.append((first + step)[more])
        step += 1
    return np.concatenate(parts)
