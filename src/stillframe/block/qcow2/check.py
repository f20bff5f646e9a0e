"""Whether an image's tables agree with each other, counted as `qemu-img check` counts.

Every table is followed from the header; each path to a cluster is one reference. An L2 table that several L1 entries share
is read once and counted as often as they do.

Memory: 8 bytes a refcount of each block's range that holds a reference, at most 1 GiB of them.
"""

from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from stillframe.block.node import Node
from stillframe.block.qcow2.bitmaps import bitmap_ranges
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import (
    COMPRESSED,
    L1_RESERVED,
    L2_RESERVED,
    MAX_L1_BYTES,
    REFCOUNT_TABLE_RESERVED,
    aligned,
)
from stillframe.block.qcow2.shadow import (
    TABLES_AT_ONCE,
    U_COMPRESSED,
    U_COPIED,
    U_OFFSET,
    Entries,
    l1_words,
    packed_clusters,
)
from stillframe.block.qcow2.widths import Clusters, Counts, decode
from stillframe.errors import ImageCorrupt, LimitReached

COUNTS_AT_MOST = 1 << 27
MESSAGES_AT_MOST = 1000


@dataclass(slots=True)
class CheckResult:
    """What was found, by the names of QEMU's ImageCheck.

    :param messages: one line a finding, in QEMU's words, the first thousand.
    """

    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    fragmented_clusters: int = 0
    compressed_clusters: int = 0
    leaks: int = 0
    leaks_fixed: int = 0
    corruptions: int = 0
    corruptions_fixed: int = 0
    check_errors: int = 0
    messages: list[str] = field(default_factory=list)

    def as_qapi(self) -> dict[str, int]:
        """The numbers as `qemu-img check --output=json` prints them: zero ones left out, but `check-errors`."""
        names = [each.name for each in fields(self) if each.name != "messages"]
        return {
            name.replace("_", "-"): value
            for name in names
            if (value := int(getattr(self, name))) or name == "check_errors"
        }

    def corrupt(self, text: str, times: int = 1) -> None:
        """Note a corruption."""
        self.corruptions += times
        self._say(f"ERROR {text}")

    def leak(self, text: str) -> None:
        """Note a leaked cluster."""
        self.leaks += 1
        self._say(text)

    def _say(self, text: str) -> None:
        if len(self.messages) < MESSAGES_AT_MOST:
            self.messages.append(text)


def check(file: Node) -> CheckResult:
    """Check the image in an open node; nothing is written.

    :raise ImageCorrupt: too damaged to be looked at. :raise LimitReached: its tables claim too large a range.
    """
    return Walk(Image(file, None, read_only=True)).result


class Walk:
    """One walk through all tables of an image that nobody writes to meanwhile.

    `references` and `refcounts` hold, by index of refcount block, the references found and the refcounts of the file.
    """

    def __init__(self, image: Image) -> None:
        self.image = image
        self.result = CheckResult()
        self.references: dict[int, Counts] = {}
        self.refcounts: dict[int, Counts] = {}
        self._header = image.header
        self._bits = image.header.cluster_bits
        self._per_block = image.header.refcounts_in_block
        self._end = -(-image.file.size // image.cluster_size)
        self._walk_fixed_tables()
        self._walk_trees()
        self._compare()
        self._check_copied()

    # References.

    def _count(self, clusters: Clusters, times: Counts) -> None:
        """References to clusters, each so many times; those past the file's end are corruptions."""
        outside = clusters > self._end
        if outside.any():
            for cluster in clusters[outside].tolist():
                self.result.corrupt(
                    "counting reference for region exceeding the end of the file by one cluster or more: "
                    f"offset {cluster << self._bits:#x} size {self._header.cluster_size:#x}"
                )
            clusters, times = clusters[~outside], times[~outside]
        blocks = clusters // self._per_block
        for index in np.unique(blocks).tolist():
            of_block = blocks == index
            np.add.at(self._counts(index), clusters[of_block] - index * self._per_block, times[of_block])

    def _counts(self, index: int) -> Counts:
        block = self.references.get(index)
        if block is None:
            if (len(self.references) + 1) * self._per_block > COUNTS_AT_MOST:
                raise LimitReached(
                    "The image is too large, or too scattered, to be checked in 1 GiB of memory"
                )
            block = self.references[index] = np.zeros(self._per_block, np.int64)
        return block

    def _count_range(self, offset: int, length: int) -> None:
        if length:
            clusters = np.arange(
                offset >> self._bits, (offset + length - 1 >> self._bits) + 1, dtype=np.int64
            )
            self._count(clusters, np.ones(len(clusters), np.int64))

    def _walk_fixed_tables(self) -> None:
        header, world = self._header, self.image.world
        self._count_range(0, header.cluster_size)
        self._count_range(header.l1_offset, header.l1_size * 8)
        self._count_range(header.refcount_table_offset, len(world.refcount_table))
        self._count_range(header.snapshots_offset, world.snapshot_table_length)
        table = np.frombuffer(world.refcount_table, ">u8")
        for index in np.flatnonzero(table).tolist():
            offset = int(table[index])
            if offset & REFCOUNT_TABLE_RESERVED or not aligned(offset, header.cluster_size - 1):
                self.result.corrupt(
                    f"refcount block {index} is not cluster aligned; refcount table entry corrupted"
                )
            elif offset >= self.image.file.size:
                self.result.corrupt(f"refcount block {index} is outside image")
            else:
                self._count_range(offset, header.cluster_size)
                self._take_block(index, offset)
        if self.image.has_bitmaps:
            for offset, length in bitmap_ranges(self.image):
                self._count_range(offset, length)

    def _take_block(self, index: int, offset: int) -> None:
        block = decode(self.image.file.read(offset, self._header.cluster_size), self._header.refcount_order)
        if block.any():
            if (len(self.refcounts) + 1) * self._per_block > COUNTS_AT_MOST:
                raise LimitReached("The image is too large to be checked in 1 GiB of memory")
            self.refcounts[index] = block

    # Trees.

    def _walk_trees(self) -> None:
        image, header = self.image, self._header
        roots = [l1_words(image.world.l1)]
        for number, entry in enumerate(image.world.snapshots):
            name = entry.name.decode("utf-8", "replace")
            what = f"snapshot {entry.id.decode('utf-8', 'replace')} ({name})"
            if header.version >= 3 and not entry.is_complete:
                self.result.corrupt(f"snapshot table entry {number} is incomplete")
            if entry.l1_offset & (header.cluster_size - 1):
                self.result.corrupt(
                    f"{what} l1_offset={entry.l1_offset:#x}: L1 table is not cluster aligned; "
                    "snapshot table entry corrupted"
                )
            elif entry.l1_size * 8 > MAX_L1_BYTES:
                self.result.corrupt(
                    f"{what} l1_size={entry.l1_size:#x}: L1 table is too large; snapshot table entry corrupted"
                )
            else:
                self._count_range(entry.l1_offset, entry.l1_size * 8)
                roots.append(l1_words(image.file.read(entry.l1_offset, entry.l1_size * 8)))
        for root in roots:
            for word in root[(root & np.uint64(L1_RESERVED)) != 0].tolist():
                self.result.corrupt(f"found L1 entry with reserved bits set: {word:x}")
        offsets = np.concatenate(roots) & U_OFFSET
        offsets, times = np.unique(offsets[offsets != 0], return_counts=True)
        times = times.astype(np.int64)
        wrong = (offsets & np.uint64(header.cluster_size - 1)) != 0
        for offset in offsets[wrong].tolist():
            self.result.corrupt(f"l2_offset={offset:#x}: Table is not cluster aligned; L1 entry corrupted")
        offsets, times = offsets[~wrong], times[~wrong]
        self._count((offsets >> np.uint64(self._bits)).astype(np.int64), times)
        rows = max(1, TABLES_AT_ONCE // header.cluster_size)
        for start in range(0, len(offsets), rows):
            tables = self._tables(offsets[start : start + rows])
            self._count_tables(tables, times[start : start + rows])

    def _tables(self, offsets: Entries) -> Entries:
        size = self._header.cluster_size
        buffer = bytearray(len(offsets) * size)
        view = memoryview(buffer)
        breaks = (np.flatnonzero(np.diff(offsets.astype(np.int64)) != size) + 1).tolist()
        for a, b in zip([0, *breaks], [*breaks, len(offsets)], strict=True):
            self.image.file.readinto(int(offsets[a]), view[a * size : b * size])
        return np.frombuffer(buffer, ">u8").astype(np.uint64).reshape(len(offsets), -1)

    def _count_tables(self, tables: Entries, times: Counts) -> None:
        weights = np.broadcast_to(times[:, None], tables.shape)
        packed = (tables & U_COMPRESSED) != 0
        hosts = tables & U_OFFSET
        plain = ~packed & (hosts != 0)
        reserved = ~packed & ((tables & np.uint64(L2_RESERVED)) != 0)
        for word, count in zip(tables[reserved].tolist(), weights[reserved].tolist(), strict=True):
            self.result.corrupt(f"found l2 entry with reserved bits set: {word:x}", count)
        wrong = plain & ((hosts & np.uint64(self._header.cluster_size - 1)) != 0)
        for offset, count in zip(hosts[wrong].tolist(), weights[wrong].tolist(), strict=True):
            self.result.corrupt(
                f"offset={offset:x}: Cluster is not properly aligned; L2 entry corrupted.", count
            )
        if self._header.has_data_file:
            # Nothing counts the clusters of a data file, and it holds no compressed ones.
            for word, count in zip(tables[packed].tolist(), weights[packed].tolist(), strict=True):
                self.result.corrupt(
                    f"compressed cluster in an image with a data file: l2_entry={word:x}", count
                )
            return
        self._count((hosts[plain] >> np.uint64(self._bits)).astype(np.int64), weights[plain])
        # An unaligned cluster lies in two.
        self._count((hosts[wrong] >> np.uint64(self._bits)).astype(np.int64) + 1, weights[wrong])
        if packed.any():
            words, counts = tables[packed], weights[packed]
            for word, count in zip(
                words[(words & U_COPIED) != 0].tolist(), counts[(words & U_COPIED) != 0].tolist(), strict=True
            ):
                self.result.corrupt(
                    f"coffset={word & (COMPRESSED - 1):#x}: copied flag must never be set for compressed clusters",
                    count,
                )
            first, last = packed_clusters(words, self._bits)
            step = 0
            while (more := first + step <= last).any():
                self._count((first + step)[more], counts[more])
                step += 1

    # Refcounts against references.

    def _compare(self) -> None:
        highest = -1
        nothing = np.zeros(self._per_block, np.int64)
        for index in sorted(self.references.keys() | self.refcounts.keys()):
            found = self.references.get(index, nothing)
            said = self.refcounts.get(index, nothing)
            base = index * self._per_block
            # What is counted past the file's end takes no space: no leak, as in QEMU.
            inside = np.arange(base, base + self._per_block) < self._end
            said = np.where(inside | (found > 0), said, 0)
            used = np.flatnonzero((found > 0) | (said > 0))
            if len(used):
                highest = base + int(used[-1])
            for within in np.flatnonzero(found != said).tolist():
                text = f"cluster {base + within} refcount={said[within]} reference={found[within]}"
                if said[within] > found[within]:
                    self.result.leak(f"Leaked {text}")
                else:
                    self.result.corrupt(text)
        self.result.image_end_offset = (highest + 1) << self._bits

    def refcounts_of(self, clusters: Clusters) -> Counts:
        """What the file's refcount blocks say of these clusters."""
        found = np.zeros(len(clusters), np.int64)
        blocks = clusters // self._per_block
        for index in np.unique(blocks).tolist():
            block = self.refcounts.get(index)
            if block is not None:
                of_block = blocks == index
                found[of_block] = block[clusters[of_block] - index * self._per_block]
        return found

    # The active tree.

    def _check_copied(self) -> None:
        header, result = self._header, self.result
        result.total_clusters = header.clusters_for(header.size)
        active = l1_words(self.image.world.l1)
        inside = np.uint64(header.cluster_size - 1)
        used = np.flatnonzero(((active & U_OFFSET) != 0) & ((active & U_OFFSET & inside) == 0))
        offsets = active[used] & U_OFFSET
        counts = self.refcounts_of((offsets >> np.uint64(self._bits)).astype(np.int64))
        wrong = (counts == 1) != ((active[used] & U_COPIED) != 0)
        for number in np.flatnonzero(wrong).tolist():
            result.corrupt(
                f"OFLAG_COPIED L2 cluster: l1_index={used[number]} l1_entry={active[used[number]]:x} "
                f"refcount={counts[number]}"
            )
        rows = max(1, TABLES_AT_ONCE // header.cluster_size)
        for start in range(0, len(offsets), rows):
            for table in self._tables(offsets[start : start + rows]):
                self._check_table(table)

    def _check_table(self, table: Entries) -> None:
        result = self.result
        size = self._header.cluster_size
        packed = int(((table & U_COMPRESSED) != 0).sum())
        result.compressed_clusters += packed
        has_place = (table & U_OFFSET) != 0
        if self._header.has_data_file:
            # There, COPIED makes even offset 0 a place.
            has_place |= (table & U_COPIED) != 0
        plain = table[((table & U_COMPRESSED) == 0) & has_place]
        hosts = (plain & U_OFFSET).astype(np.int64)
        result.allocated_clusters += packed + len(plain)
        result.fragmented_clusters += packed + int((np.diff(hosts) != size).sum())
        is_counted = not self._header.has_data_file
        counts = self.refcounts_of(hosts >> self._bits) if is_counted else np.ones(len(hosts), np.int64)
        wrong: npt.NDArray[np.bool_] = (counts == 1) != ((plain & U_COPIED) != 0)
        for word, count in zip(plain[wrong].tolist(), counts[wrong].tolist(), strict=True):
            result.corrupt(f"OFLAG_COPIED data cluster: l2_entry={word:x} refcount={count}")


def refuse_if_unreadable(image: Image) -> None:
    """:raise ImageCorrupt: a table lies where it cannot be, so a repair would guess."""
    if image.header.l1_size and image.header.l1_offset >= image.file.size:
        raise ImageCorrupt("The active L1 table lies outside the image file")
