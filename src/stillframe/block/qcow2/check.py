"""Whether an image's tables agree with each other, counted as `qemu-img check` counts.

Every table is followed from the header; each path to a cluster is one reference. An L2 table that several L1 entries share
is read once and counted as often as they do. Clusters of a data file have no refcounts, and are not counted.

Memory, at most `MEMORY_AT_MOST` in all: of each refcount block that holds anything, a refcount as wide as the image's for every
cluster, and one byte for its references (8 in blocks where a cluster has more than 255); 16 bytes for each L2 table. With refcounts
of 16 bits and clusters of 64 KiB that is enough for images of 20 TiB.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields

import numpy as np
import numpy.typing as npt

from stillframe.block.node import Node
from stillframe.block.qcow2.bitmaps import bitmap_ranges
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import (
    L1_RESERVED,
    L2_RESERVED,
    MAX_L1_BYTES,
    MAX_OFFSET,
    REFCOUNT_TABLE_RESERVED,
    ZERO,
)
from stillframe.block.qcow2.shadow import (
    TABLES_AT_ONCE,
    U_COMPRESSED,
    U_COPIED,
    U_OFFSET,
    Entries,
    as_tables,
    l1_words,
    packed_clusters,
)
from stillframe.block.qcow2.widths import (
    Clusters,
    Counts,
    Narrow,
    by_block,
    compact,
    decode_narrow,
    is_repeating,
)
from stillframe.errors import ImageCorrupt, LimitReached

MEMORY_AT_MOST = 1 << 30
MESSAGES_AT_MOST = 1000

_L1_ENTRIES_AT_ONCE = 1 << 22
_U_LOW = np.uint64(0xFFFFFFFF)


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
        """Note a corruption. :param text: the whole line."""
        self.corruptions += times
        self.say(text)

    def corrupt_each(self, words: Entries | Clusters, text: Callable[[int], str], times: int = 1) -> None:
        """Note a corruption for each of many. :param text: makes the whole line of one."""
        self.corruptions += len(words) * times
        for word in words[: self.room].tolist():
            self.say(text(word))

    @property
    def room(self) -> int:
        """How many messages more are kept."""
        return MESSAGES_AT_MOST - len(self.messages)

    def say(self, text: str) -> None:
        """Keep a message, while there is room."""
        if self.room > 0:
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
        self.references: dict[int, Narrow] = {}
        self.refcounts: dict[int, Narrow] = {}
        self._header = image.header
        self._bits = image.header.cluster_bits
        self._per_block = image.header.refcounts_in_block
        self._end = -(-image.file.size // image.cluster_size)
        self._rows = max(1, TABLES_AT_ONCE // image.cluster_size)
        self._memory = 0
        self._walk_fixed_tables()
        self._walk_trees()
        self._compare()
        self._check_copied()

    def _take_memory(self, size: int) -> None:
        self._memory += size
        if self._memory > MEMORY_AT_MOST:
            raise LimitReached(
                f"The image is too large, or too scattered, to be checked in {MEMORY_AT_MOST >> 20} MiB of memory"
            )

    # References.

    def _count(self, clusters: Clusters, times: int = 1) -> None:
        """References to clusters, each so many times; those past the file's end are corruptions."""
        outside = clusters > self._end
        if outside.any():
            self.result.corrupt_each(
                clusters[outside],
                lambda cluster: (
                    "ERROR: counting reference for region exceeding the end of the file by one cluster or more: "
                    f"offset {cluster << self._bits:#x} size {self._header.cluster_size:#x}"
                ),
            )
            clusters = clusters[~outside]
        for index, _, within in by_block(clusters, self._per_block):
            self._count_in_block(index, within, times)

    def _count_in_block(self, index: int, within: Clusters, times: int) -> None:
        counts = self.references.get(index)
        if counts is None:
            self._take_memory(self._per_block)
            counts = self.references[index] = np.zeros(self._per_block, np.uint8)
        place: slice | Clusters = slice(None)
        if is_repeating(within):
            more = np.bincount(within, minlength=self._per_block) * times
            wide: Counts = counts + more
        else:
            place = compact(within)
            wide = counts[place].astype(np.int64) + times
        if counts.dtype != np.int64 and int(wide.max()) > 255:
            self._take_memory(7 * self._per_block)
            counts = self.references[index] = counts.astype(np.int64)
        counts[place] = wide

    def _count_range(self, offset: int, length: int, times: int = 1) -> None:
        if length:
            first, last = offset >> self._bits, offset + length - 1 >> self._bits
            self._count(np.arange(first, last + 1, dtype=np.int64), times)

    def _walk_fixed_tables(self) -> None:
        header, world = self._header, self.image.world
        self._count_range(0, header.cluster_size)
        self._count_range(header.l1_offset, header.l1_size * 8)
        self._count_range(header.refcount_table_offset, len(world.refcount_table))
        self._count_range(header.snapshots_offset, world.snapshot_table_length)
        self._walk_refcount_table()
        if self.image.has_bitmaps:
            for offset, length in bitmap_ranges(self.image):
                self._count_range(offset, length)

    def _walk_refcount_table(self) -> None:
        """Count the refcount blocks, and read each of them once, however often the table names it."""
        header, table = self._header, np.frombuffer(self.image.world.refcount_table, ">u8")
        indices = np.flatnonzero(table)
        offsets = table[indices].astype(np.uint64)
        reserved = (offsets & np.uint64(REFCOUNT_TABLE_RESERVED)) != 0
        unaligned = ((offsets & np.uint64(header.cluster_size - 1)) != 0) | (offsets >= np.uint64(MAX_OFFSET))
        unaligned &= ~reserved
        outside = ~reserved & ~unaligned & (offsets >= np.uint64(self.image.file.size))
        self.result.corrupt_each(
            indices[reserved], lambda index: f"ERROR refcount table entry {index} has reserved bits set"
        )
        self.result.corrupt_each(
            indices[unaligned],
            lambda index: (
                f"ERROR refcount block {index} is not cluster aligned; refcount table entry corrupted"
            ),
        )
        self.result.corrupt_each(
            indices[outside], lambda index: f"ERROR refcount block {index} is outside image"
        )
        whole = ~reserved & ~unaligned & ~outside
        self._count(np.sort(offsets[whole] >> np.uint64(self._bits)).astype(np.int64))
        # One that is named again counts nothing past the file's end.
        first = np.zeros(len(offsets), np.bool_)
        first[np.unique(offsets, return_index=True)[1]] = True
        whole &= first | (indices * self._per_block < self._end)
        taken: dict[int, Narrow | None] = {}
        for index, offset in zip(indices[whole].tolist(), offsets[whole].tolist(), strict=True):
            if offset not in taken:
                taken[offset] = self._read_block(offset)
            block = taken[offset]
            if block is not None:
                self.refcounts[index] = block

    def _read_block(self, offset: int) -> Narrow | None:
        """The refcounts of a block; None for zeroes alone."""
        data = self.image.file.read(offset, self._header.cluster_size)
        block = decode_narrow(data, self._header.refcount_order)
        if not block.any():
            return None
        self._take_memory(block.nbytes)
        return block

    # Trees.

    def _walk_trees(self) -> None:
        offsets, times = self._l2_tables()
        wrong = (offsets & np.uint64(self._header.cluster_size - 1)) != 0
        self.result.corrupt_each(
            offsets[wrong],
            lambda offset: f"ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted",
        )
        offsets, times = offsets[~wrong], times[~wrong]
        for start in range(0, len(offsets), self._rows):
            end = start + self._rows
            tables = self._tables(offsets[start:end])
            # Those that are shared as often are counted together.
            for often in np.unique(times[start:end]).tolist():
                alike = times[start:end] == often
                clusters = (offsets[start:end][alike] >> np.uint64(self._bits)).astype(np.int64)
                self._count(clusters, often)
                self._count_tables(tables if alike.all() else tables[alike], often)

    def _l2_tables(self) -> tuple[Entries, Counts]:
        """The offsets of all L2 tables, ascending, and how many L1 entries lead to each."""
        offsets, times = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        waiting: list[tuple[Entries, int]] = []
        for root, often in self._roots():
            reserved = root[(root & np.uint64(L1_RESERVED)) != 0]
            self.result.corrupt_each(
                reserved, lambda word: f"ERROR found L1 entry with reserved bits set: {word:x}", often
            )
            found = root & U_OFFSET
            waiting.append((found[found != 0], often))
            if sum(len(part) for part, _ in waiting) > _L1_ENTRIES_AT_ONCE:
                offsets, times = _merged(offsets, times, waiting)
                waiting = []
        offsets, times = _merged(offsets, times, waiting)
        self._take_memory(offsets.nbytes + times.nbytes)
        return offsets, times

    def _roots(self) -> Iterator[tuple[Entries, int]]:
        """Every L1 table, and how many times it is used."""
        image, header = self.image, self._header
        yield l1_words(image.world.l1), 1
        used: dict[tuple[int, int], int] = {}
        if header.has_data_file and image.world.snapshots:
            self.result.corrupt(f"ERROR {len(image.world.snapshots)} snapshots in image with data file")
        for number, entry in enumerate(image.world.snapshots):
            name = entry.name.decode("utf-8", "replace")
            what = f"ERROR snapshot {entry.id.decode('utf-8', 'replace')} ({name})"
            if header.version >= 3 and not entry.is_complete:
                self.result.corrupt(f"ERROR snapshot table entry {number} is incomplete")
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
                place = (entry.l1_offset, entry.l1_size)
                used[place] = used.get(place, 0) + 1
        if sum(l1_size * 8 for _, l1_size in used) > image.file.size:
            # They overlap, and reading them all could take for ever.
            self.result.check_errors += 1
            self.result.corrupt("ERROR the L1 tables of the snapshots are larger than the file: not followed")
            return
        for (l1_offset, l1_size), often in used.items():
            self._count_range(l1_offset, l1_size * 8, often)
            yield l1_words(image.file.read(l1_offset, l1_size * 8)), often

    def _tables(self, offsets: Entries) -> Entries:
        size = self._header.cluster_size
        buffer = bytearray(len(offsets) * size)
        view = memoryview(buffer)
        breaks = (np.flatnonzero(np.diff(offsets.astype(np.int64)) != size) + 1).tolist()
        for a, b in zip([0, *breaks], [*breaks, len(offsets)], strict=True):
            self.image.file.readinto(int(offsets[a]), view[a * size : b * size])
        return as_tables(buffer, self._header)

    def _count_tables(self, tables: Entries, times: int) -> None:
        """What the entries of L2 tables refer to. An entry that is wrong in itself refers to nothing."""
        result = self.result
        words = tables[..., 0]
        packed = (words & U_COMPRESSED) != 0
        if packed.any():
            self._count_packed(tables, packed, times)
        hosts = words & U_OFFSET
        reserved = ~packed & ((words & np.uint64(L2_RESERVED)) != 0)
        if reserved.any():
            result.corrupt_each(
                words[reserved], lambda word: f"ERROR found l2 entry with reserved bits set: {word:x}", times
            )
        if self._header.has_extended_l2:
            self._check_parts(tables, packed, times)
        plain = ~packed & (hosts != 0)
        wrong = plain & ((hosts & np.uint64(self._header.cluster_size - 1)) != 0)
        is_preallocated = self._is_zero(tables)
        for which, kind in ((wrong & ~is_preallocated, "Data"), (wrong & is_preallocated, "Preallocated")):
            result.corrupt_each(
                hosts[which],
                lambda offset, kind=kind: (  # type: ignore[misc]
                    f"ERROR offset={offset:x}: {kind} cluster is not properly aligned; L2 entry corrupted."
                ),
                times,
            )
        if self._header.has_data_file:
            return
        self._count((hosts[plain] >> np.uint64(self._bits)).astype(np.int64), times)
        # An unaligned cluster lies in two.
        self._count((hosts[wrong] >> np.uint64(self._bits)).astype(np.int64) + 1, times)

    def _is_zero(self, tables: Entries) -> npt.NDArray[np.bool_]:
        """Which entries read as zeroes as a whole."""
        word, wanted = tables[..., 0] & np.uint64(ZERO), np.uint64(ZERO)
        if self._header.has_extended_l2:
            word, wanted = tables[..., 1], _U_LOW << np.uint64(32)
        found: npt.NDArray[np.bool_] = word == wanted
        return found

    def _is_allocated(self, words: Entries) -> npt.NDArray[np.bool_]:
        """Which entries have a place: in a data file at its very beginning, too."""
        place = U_OFFSET | U_COPIED if self._header.has_data_file else U_OFFSET
        found: npt.NDArray[np.bool_] = ((words & place) != 0) & ((words & U_COMPRESSED) == 0)
        return found

    def _check_parts(self, tables: Entries, packed: npt.NDArray[np.bool_], times: int) -> None:
        """The second words of extended entries."""
        words, parts = tables[..., 0], tables[..., 1]
        here = self._is_allocated(words)
        both = here & ((parts >> np.uint64(32)) & parts & _U_LOW != 0)
        self.result.corrupt_each(
            words[both] & U_OFFSET,
            lambda offset: (
                f"ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation bitmap"
            ),
            times,
        )
        nowhere = ~packed & ~here & (parts & _U_LOW != 0)
        if nowhere.any():
            count = int(nowhere.sum()) * times
            self.result.corrupt("ERROR: Unallocated cluster has non-zero subcluster allocation map", count)

    def _count_packed(self, tables: Entries, packed: npt.NDArray[np.bool_], times: int) -> None:
        words = tables[..., 0][packed]
        copied = words[(words & U_COPIED) != 0]
        self.result.corrupt_each(
            copied,
            lambda word: (
                f"ERROR: coffset={word & _offset_mask(self._bits):#x}: copied flag must never be set for compressed clusters"
            ),
            times,
        )
        where = np.nonzero(packed)[1]
        impossible = ""
        is_wrong = np.zeros(len(words), np.bool_)
        if self._header.has_data_file:
            impossible, is_wrong = "with data file", np.ones(len(words), np.bool_)
        elif self._header.has_extended_l2:
            impossible = "with non-zero subcluster allocation bitmap"
            is_wrong = tables[..., 1][packed] != 0
        if is_wrong.any():
            numbers = np.flatnonzero(is_wrong)
            self.result.corrupt_each(
                numbers,
                lambda number: (
                    f"ERROR compressed cluster {where[number]} {impossible}, entry={words[number] & ~U_COPIED:#x}"
                ),
                times,
            )
            words = words[~is_wrong]
        if not len(words):
            return
        first, last = packed_clusters(words, self._bits)
        step = 0
        while (more := first + step <= last).any():
            self._count((first + step)[more], times)
            step += 1

    # Refcounts against references.

    def _compare(self) -> None:
        result = self.result
        highest = -1
        nothing = np.zeros(self._per_block, np.uint8)
        for index in sorted(self.references.keys() | self.refcounts.keys()):
            found = self.references.get(index, nothing)
            said = self.refcounts.get(index, nothing)
            base = index * self._per_block
            if base >= self._end and index not in self.references:
                continue
            if base + self._per_block > self._end:
                # What is counted past the file's end takes no space: no leak, as in QEMU.
                inside = np.arange(base, base + self._per_block) < self._end
                said = np.where(inside | (found > 0), said, said.dtype.type(0))
            used = np.flatnonzero((found > 0) | (said > 0))
            if len(used):
                highest = base + int(used[-1])
            wrong = np.flatnonzero(found != said)
            leaked = said[wrong] > found[wrong]
            result.leaks += int(leaked.sum())
            result.corruptions += int((~leaked).sum())
            for within, is_leak in zip(wrong[: result.room].tolist(), leaked.tolist(), strict=False):
                result.say(
                    f"{'Leaked' if is_leak else 'ERROR'} cluster {base + within} "
                    f"refcount={said[within]} reference={found[within]}"
                )
        result.image_end_offset = (highest + 1) << self._bits

    def refcounts_of(self, clusters: Clusters) -> Counts:
        """What the file's refcount blocks say of these clusters."""
        found = np.zeros(len(clusters), np.int64)
        for index, which, within in by_block(clusters, self._per_block):
            block = self.refcounts.get(index)
            if block is not None:
                found[which] = block[within]
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
        result.corrupt_each(
            np.flatnonzero(wrong),
            lambda number: (
                f"ERROR OFLAG_COPIED L2 cluster: l1_index={used[number]} l1_entry={active[used[number]]:x} "
                f"refcount={counts[number]}"
            ),
        )
        offsets, times = np.unique(offsets, return_counts=True)
        for start in range(0, len(offsets), self._rows):
            end = start + self._rows
            tables = self._tables(offsets[start:end])
            for often in np.unique(times[start:end]).tolist():
                alike = times[start:end] == often
                self._check_active(tables if alike.all() else tables[alike], often)

    def _check_active(self, tables: Entries, times: int) -> None:
        """Count what is allocated, and hold COPIED against the refcounts, of tables in force, each used so many times."""
        header, result = self._header, self.result
        words = tables[..., 0]
        if not header.has_data_file:
            whole = tables[..., 1] == 0 if header.has_extended_l2 else True
            packed = int((((words & U_COMPRESSED) != 0) & whole).sum())
            result.compressed_clusters += packed * times
            result.allocated_clusters += packed * times
            result.fragmented_clusters += packed * times
        here = self._is_allocated(words)
        plain = words[here]
        hosts = (plain & U_OFFSET).astype(np.int64)
        result.allocated_clusters += len(plain) * times
        apart = np.diff(hosts) != header.cluster_size
        if len(words) > 1:
            apart &= np.diff(np.nonzero(here)[0]) == 0
        result.fragmented_clusters += int(apart.sum()) * times
        # Nothing counts the clusters of a data file: they are the image's own.
        is_counted = not header.has_data_file
        counts = self.refcounts_of(hosts >> self._bits) if is_counted else np.ones(len(hosts), np.int64)
        wrong = np.flatnonzero((counts == 1) != ((plain & U_COPIED) != 0))
        result.corrupt_each(
            wrong,
            lambda number: (
                f"ERROR OFLAG_COPIED data cluster: l2_entry={plain[number]:x} refcount={counts[number]}"
            ),
            times,
        )


def _offset_mask(bits: int) -> int:
    """Of a compressed entry."""
    return (1 << 70 - bits) - 1


def _merged(offsets: Entries, times: Counts, more: list[tuple[Entries, int]]) -> tuple[Entries, Counts]:
    """Distinct offsets, ascending, with how often they occur in all."""
    joined = np.concatenate([offsets, *(part for part, _ in more)])
    weights = np.concatenate([times, *(np.full(len(part), often, np.int64) for part, often in more)])
    distinct, where = np.unique(joined, return_inverse=True)
    sums = np.zeros(len(distinct), np.int64)
    np.add.at(sums, where, weights)
    return distinct, sums


def refuse_if_unreadable(image: Image) -> None:
    """:raise ImageCorrupt: a table lies where it cannot be, so a repair would guess."""
    if image.header.l1_size and image.header.l1_offset >= image.file.size:
        raise ImageCorrupt("The active L1 table lies outside the image file")
