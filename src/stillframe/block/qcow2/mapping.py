"""Where the bytes of a disk lie: the L1 and L2 tables, read through one bounded cache.

Every change of a table goes through to the file at once (`store`), so the cache never holds what the file does not, and can
forget any table at any time. What makes that safe against a power cut is the order that the writers keep:

    an entry is written only when what it points to is durable in every respect but guest data: the refcount of the
    cluster (refcounts.py leases clusters durably before they are handed out), and for an L1 entry the table itself
"""

import struct
from collections import OrderedDict

from stillframe.block.qcow2.image_file import ImageFile
from stillframe.block.qcow2.layout import COMPRESSED, COPIED, MAX_OFFSET, OFFSET_MASK, ZERO, Header
from stillframe.errors import ImageCorrupt

CACHE_BYTES = 32 << 20
"""Bytes of L2 tables kept; of the largest clusters at least two tables."""

UNALLOCATED, ZEROES, DATA, PACKED = range(4)

Run = tuple[int, int, int]
"""Kind, length in bytes, and where it begins: the host offset of DATA and of zeroes that have a place (0 for those that
have none), the whole L2 entry of PACKED, of which a run is at most one cluster."""


class Mapping:
    """Looks offsets up in trees of tables. Every call is made with the image's lock held."""

    def __init__(self, file: ImageFile, header: Header) -> None:
        self._file = file
        self._version = header.version
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._span = header.l2_span
        self._span_bits = header.cluster_bits * 2 - 3
        self._entries = header.l2_entries
        self._cache: OrderedDict[int, bytearray] = OrderedDict()
        self._cached_at_most = max(2, CACHE_BYTES // header.cluster_size)

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
        while len(self._cache) > self._cached_at_most:
            self._cache.popitem(last=False)

    def forget(self, offset: int) -> None:
        """A cluster is no table any more."""
        self._cache.pop(offset, None)

    def forget_all(self) -> None:
        """The tables were switched."""
        self._cache.clear()

    def entries(self, table_offset: int, index: int, count: int) -> tuple[int, ...]:
        """Entries of an L2 table as numbers."""
        return struct.unpack_from(f">{count}Q", self.table(table_offset), index * 8)

    def store(self, table_offset: int, index: int, entries: list[int]) -> None:
        """Write entries of an L2 table through to the file.

        On an error the table is read anew the next time: what the file then holds of the entries, old or new, is true.
        """
        data = struct.pack(f">{len(entries)}Q", *entries)
        table = self.table(table_offset)
        try:
            self._file.write(table_offset + index * 8, data)
        except BaseException:
            self.forget(table_offset)
            raise
        table[index * 8 : index * 8 + len(data)] = data

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
            for entry in struct.unpack_from(f">{count}Q", table, index * 8):
                part = min(size - within, stop - offset)
                host = entry & OFFSET_MASK
                if entry & COMPRESSED:
                    found.append((PACKED, part, entry))
                elif entry & ZERO:
                    self.check(entry)
                    _extend(found, ZEROES, part, host + within if host else 0)
                elif host:
                    self.check(entry)
                    _extend(found, DATA, part, host + within)
                else:
                    _extend(found, UNALLOCATED, part, 0)
                offset += part
                within = 0
        return found

    def check(self, entry: int) -> None:
        """:raise ImageCorrupt: the L2 entry is none of this format, in QEMU's words."""
        if entry & COMPRESSED:
            return
        if entry & OFFSET_MASK & (self._cluster_size - 1):
            raise ImageCorrupt(
                f"Cluster allocation offset {entry & OFFSET_MASK:#x} unaligned (L2 entry {entry:#x})"
            )
        if entry & ZERO and self._version < 3:
            raise ImageCorrupt(f"Zero cluster entry found in pre-v3 image (L2 entry {entry:#x})")


def l1_entry(l1: bytes | bytearray, index: int) -> int:
    """An entry of an L1 table as a number; 0 beyond its end."""
    return int.from_bytes(l1[index * 8 : index * 8 + 8], "big")


def owned(entry: int) -> bool:
    """Whether the entry's cluster is used by nobody else, and is no compressed data."""
    return bool(entry & COPIED) and not entry & COMPRESSED


def packed_place(entry: int, cluster_bits: int) -> tuple[int, int]:
    """Where the compressed data of an entry lies: host offset, and bytes up to the end of its last sector."""
    bits = 70 - cluster_bits
    offset = entry & ((1 << bits) - 1)
    sectors = ((entry & (COMPRESSED - 1)) >> bits) + 1
    return offset, sectors * 512 - (offset & 511)


def host_clusters(entry: int, cluster_bits: int) -> range:
    """The host clusters that an L2 entry counts as references to.

    :raise ImageCorrupt: it points beyond the format's end.
    """
    if entry & COMPRESSED:
        offset, length = packed_place(entry, cluster_bits)
        if offset >= MAX_OFFSET:
            raise ImageCorrupt(f"Compressed data at {offset:#x} lies beyond the format's end")
        return range(offset >> cluster_bits, (offset + length - 1 >> cluster_bits) + 1)
    host = (entry & OFFSET_MASK) >> cluster_bits
    return range(host, host + 1) if host else range(0)


def _extend(found: list[Run], kind: int, length: int, host: int) -> None:
    if found:
        last_kind, last_length, last_host = found[-1]
        if last_kind == kind and (host == last_host + last_length if last_host else not host):
            found[-1] = (kind, last_length + length, last_host)
            return
    found.append((kind, length, host))
