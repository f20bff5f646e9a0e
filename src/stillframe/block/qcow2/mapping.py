"""Where the bytes of a disk lie: the L1 and L2 tables, read through one bounded cache.

What keeps the file whole at a power cut is the order in which entries are written:

    store   an entry goes to the file at once. It may: the refcount of the cluster that it points to is durable (refcounts.py
            leases clusters durably before it hands them out), for an L1 entry the table is, too; and should the data not
            be, the cluster reads as zeroes, as the guest's bytes did before.
    defer   an entry that replaces content waits until the new cluster's data is durable: else a cut could cost what was
            flushed long ago. It goes to the file in the next flush; until then the cached table holds it, and the record in
            shared memory (unflushed.py), for the case that the process is killed. Of tables that the record speaks of it is
            told every further change, before the file.
"""

import contextlib
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.l2_entry import L2Format, ones
from stillframe.block.qcow2.layout import COMPRESSED, OFFSET_MASK, ZERO, Header
from stillframe.errors import ImageCorrupt, IOFailed

if TYPE_CHECKING:
    from stillframe.block.qcow2.unflushed import Record

CACHE_BYTES = 32 << 20
"""Bytes of L2 tables kept; of the largest clusters at least two tables."""

UNALLOCATED, ZEROES, DATA, PACKED = range(4)

_NOT_ZERO = re.compile(rb"[^\0]")

Deferred = dict[int, dict[int, int]]
"""Entries by table offset and index."""

DEFERRED_AT_MOST = 1 << 15
"""Deferred entries after which a flush of our own is due."""

Run = tuple[int, int, int]
"""Kind, length in bytes, and where it begins: the host offset of DATA and of zeroes that have a place (0 for those that
have none), the L2 entry of PACKED, of which a run is at most one cluster."""


class Mapping:
    """Looks offsets up in trees of tables. Every call is made with the image's lock held.

    :ivar l2: how entries are read and made.
    """

    def __init__(self, file: ImageFile, header: Header) -> None:
        self._file = file
        self.l2 = L2Format(header)
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._span_bits = header.l2_span.bit_length() - 1
        self._entries = header.l2_entries
        self._cache: OrderedDict[int, bytearray] = OrderedDict()
        self._cached_at_most = max(2, CACHE_BYTES // header.cluster_size)
        self._deferred: Deferred = {}
        self.record: Record | None = None
        self.flush: Callable[[], None] = file.flush

    def table(self, offset: int) -> bytearray:
        """The L2 table at a host offset.

        :raise ImageCorrupt: no table can be there.
        """
        table = self._cache.get(offset)
        if table is not None:
            self._cache.move_to_end(offset)
            return table
        if offset & (self._cluster_size - 1) or not 0 < offset < self._file.size:
            raise ImageCorrupt(
                f"L2 table offset {offset:#x} is not the start of a cluster inside the image file",
                remedy="Run `stillframe image check` on the image.",
            )
        table = self._file.read(offset, self._cluster_size)
        self.remember(offset, table)
        return table

    def remember(self, offset: int, table: bytearray) -> None:
        """Put a table that the file holds into the cache."""
        self._cache[offset] = table
        self._cache.move_to_end(offset)
        if len(self._cache) > self._cached_at_most:
            oldest = next((each for each in self._cache if each not in self._deferred), offset)
            if oldest != offset:
                del self._cache[oldest]

    def forget(self, offset: int) -> None:
        """A cluster is no table any more."""
        self._cache.pop(offset, None)
        self._deferred.pop(offset, None)
        record = self._record_of(offset, 1)
        if record is not None:
            record.forget(offset)

    def forget_all(self) -> None:
        """The tables were switched, after all that was deferred had been written."""
        self._cache.clear()
        self._deferred.clear()
        self._reset_record()

    def entries(self, table_offset: int, index: int, count: int) -> tuple[int, ...]:
        """Entries of an L2 table as numbers; see l2_entry.py."""
        return self.l2.unpack(self.table(table_offset), index, count)

    def store(self, table_offset: int, index: int, entries: list[int]) -> None:
        """Write entries of an L2 table through to the file.

        On an error the file may hold the old or the new ones until the next flush, which writes the old ones; both lead to
        clusters that are counted, as long as the caller gives none of them to others.
        """
        data = self.l2.pack(entries)
        at = index * self.l2.entry_size
        table = self.table(table_offset)
        place = slice(at, at + len(data))
        before = bytes(table[place])
        record = self._record_of(table_offset, 2 * len(entries))
        if record is not None:
            record.append(table_offset, index, before, data)
        try:
            self._file.write(table_offset + at, data)
        except BaseException:
            self._write_again(table_offset, index, data, before)
            raise
        table[place] = data
        deferred = self._deferred.get(table_offset)
        if deferred is not None:
            for number in range(index, index + len(entries)):
                deferred.pop(number, None)

    def _write_again(self, table_offset: int, index: int, data: bytes, before: bytes) -> None:
        """The file may hold `data` after a write that failed: the next flush brings back what was there before.

        Until then what the guest writes to the old place would else be lost with it.
        """
        old = self.l2.unpack(before, 0, len(before) // self.l2.entry_size)
        deferred = self._deferred.setdefault(table_offset, {})
        deferred.update(zip(range(index, index + len(old)), old, strict=True))
        if self.record is not None and self.record.has_room(2 * len(old)):
            with contextlib.suppress(IOFailed):
                self.record.append(table_offset, index, data, before)

    def defer(self, table_offset: int, index: int, entries: list[int]) -> None:
        """Change entries of an L2 table here and in the record, and in the file with the next flush.

        :raise IOFailed: they could not be noted; nothing has changed.
        """
        table = self.table(table_offset)
        data = self.l2.pack(entries)
        place = slice(index * self.l2.entry_size, index * self.l2.entry_size + len(data))
        if self.record is not None:
            if not self._has_room(len(entries)):
                # All data is durable by now, so that there is nothing to wait for.
                self.store(table_offset, index, entries)
                return
            self.record.append(table_offset, index, bytes(table[place]), data)
        table[place] = data
        deferred = self._deferred.setdefault(table_offset, {})
        deferred.update(zip(range(index, index + len(entries)), entries, strict=True))

    @property
    def has_many_deferred(self) -> bool:
        """Whether a flush of our own is due."""
        return (
            (self.record is not None and self.record.is_half_full)
            or len(self._deferred) > self._cached_at_most // 2
            or sum(map(len, self._deferred.values())) > DEFERRED_AT_MOST
        )

    def deferred(self) -> Deferred:
        """What was deferred until now: for `write_deferred`, after a flush."""
        return {table: dict(entries) for table, entries in self._deferred.items() if entries}

    def write_deferred(self, durable: Deferred) -> None:
        """Write entries whose clusters' data is durable by now, but those that were changed again since.

        On an error what was not written stays deferred.
        """
        for table_offset, entries in durable.items():
            present = self._deferred.get(table_offset)
            if present is None:
                continue
            still = sorted(index for index, entry in entries.items() if present.get(index) == entry)
            for first, count in _consecutive(still):
                data = self.l2.pack([entries[first + number] for number in range(count)])
                self._file.write(table_offset + first * self.l2.entry_size, data)
                for number in range(count):
                    del present[first + number]
            if not present:
                del self._deferred[table_offset]
        self._reset_record()

    def void_record(self) -> None:
        """A flush has failed: what waited for it is not to be replayed."""
        if self.record is not None:
            self.record.void()

    def _reset_record(self) -> None:
        if self.record is not None and not any(self._deferred.values()):
            self.record.reset()

    def _has_room(self, count: int) -> bool:
        """Whether the record takes so many more entries; where it did not, the file holds everything now."""
        if self.record is None or self.record.has_room(count):
            return True
        self.flush()
        self.write_deferred(self.deferred())
        return False

    def _record_of(self, table_offset: int, count: int) -> "Record | None":
        """The record, if it is to be told of changes of this table; there is room for so many."""
        record = self.record
        if record is None or not record.covers(table_offset) or not self._has_room(count):
            return None
        return record

    def runs(self, l1: bytes | bytearray, offset: int, length: int) -> list[Run]:
        """A range of a tree, as runs that lie contiguously, in order, covering it exactly.

        :param l1: the tree's L1; what lies beyond it is unallocated.
        :raise ImageCorrupt: an entry contradicts the format.
        """
        found: list[Run] = []
        end = offset + length
        size = self._cluster_size
        while offset < end:
            l1_index = offset >> self._span_bits
            stop = min(end, (l1_index + 1) << self._span_bits)
            table_offset = l1_entry(l1, l1_index) & OFFSET_MASK
            if not table_offset:
                _extend(found, UNALLOCATED, stop - offset, 0)
                offset = stop
                continue
            table = self.table(table_offset)
            index = (offset >> self._cluster_bits) & (self._entries - 1)
            within = offset & (size - 1)
            count = (within + stop - offset + size - 1) >> self._cluster_bits
            entries = self.l2.unpack(table, index, count)
            if not self.l2.is_plain:
                self._extend_by_subclusters(found, entries, offset, stop)
                offset = stop
                continue
            if not entries[0] & (COMPRESSED | ZERO) and self.l2.is_row(entries):
                _extend(found, DATA, stop - offset, (entries[0] & OFFSET_MASK) + within)
                offset = stop
                continue
            for entry in entries:
                part = min(size - within, stop - offset)
                host = entry & OFFSET_MASK
                if entry & COMPRESSED:
                    found.append((PACKED, part, entry))
                elif entry & ZERO:
                    self.l2.check(entry)
                    _extend(found, ZEROES, part, host + within if host else 0)
                elif host:
                    if host & (size - 1):
                        self.l2.check(entry)
                    _extend(found, DATA, part, host + within)
                else:
                    _extend(found, UNALLOCATED, part, 0)
                offset += part
                within = 0
        return found

    def _extend_by_subclusters(
        self, found: list[Run], entries: tuple[int, ...], offset: int, stop: int
    ) -> None:
        """`runs` from `offset` to `stop`, which these entries cover, for entries of any kind."""
        l2, size, bits = self.l2, self._cluster_size, self.l2.subcluster_bits
        for entry in entries:
            cluster, at = divmod(offset, size)
            end = min(size, at + stop - offset)
            offset += end - at
            l2.check(entry, cluster)
            if entry & COMPRESSED:
                found.append((PACKED, end - at, entry))
                continue
            host = entry & OFFSET_MASK
            allocated, zero = l2.allocated(entry), l2.zero(entry)
            while at < end:
                number = at >> bits
                if allocated >> number & 1:
                    kind, mask, where = DATA, allocated, host + at
                elif zero >> number & 1:
                    kind, mask, where = ZEROES, zero, host + at if host else 0
                else:
                    kind, mask, where = UNALLOCATED, l2.every & ~(allocated | zero), 0
                part = min(end, number + ones(mask >> number) << bits) - at
                _extend(found, kind, part, where)
                at += part


def l1_entry(l1: bytes | bytearray, index: int) -> int:
    """An entry of an L1 table as a number; 0 beyond its end."""
    return int.from_bytes(l1[index * 8 : index * 8 + 8], "big")


def empty_entries(l1: bytes | bytearray, index: int) -> int:
    """How many entries from this one on lead to no L2 table, so that a disk of exbibytes is empty in one step."""
    if l1_entry(l1, index) & OFFSET_MASK:
        return 0
    used = _NOT_ZERO.search(l1, (index + 1) * 8)
    return (used.start() // 8 if used else max(index + 1, len(l1) // 8)) - index


def _extend(found: list[Run], kind: int, length: int, host: int) -> None:
    if found:
        last_kind, last_length, last_host = found[-1]
        if last_kind == kind and (host == last_host + last_length if last_host or kind == DATA else not host):
            found[-1] = (kind, last_length + length, last_host)
            return
    found.append((kind, length, host))


def _consecutive(numbers: list[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as runs: first and count."""
    start = 0
    for at in range(1, len(numbers) + 1):
        if at == len(numbers) or numbers[at] != numbers[at - 1] + 1:
            yield numbers[start], at - start
            start = at
