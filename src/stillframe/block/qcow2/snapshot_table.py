"""The snapshot table of a qcow2 image: entries of varying length, contiguous. All integers are big-endian.

    each entry begins at the next multiple of 8, counted from the table's start
    ┌───────────────────────────────────────────────────────────────────────┐
    │   0  L1 offset                 8 │  24  guest clock, ns             8 │
    │   8  L1 entries                4 │  32  state size, if it fits      4 │
    │  12  id length                 2 │  36  extra data length E         4 │
    │  14  name length               2 │  40  state size                  8 │
    │  16  date, seconds             4 │  48  disk size                   8 │
    │  20  date, nanoseconds         4 │  56  icount, all ones for none   8 │
    │  64  what else the extra data holds: our lineage record (lineage.py)  │
    │  40+E  id, then name; no terminators                                  │
    └───────────────────────────────────────────────────────────────────────┘

Version 3 demands E >= 16; we write 24 and more. What we do not know in the extra data is kept as it is.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace

from stillframe.block.node import SnapshotInfo
from stillframe.block.qcow2.layout import MAX_L1_BYTES, Header, aligned
from stillframe.block.qcow2.lineage import unpack_lineage
from stillframe.errors import ImageCorrupt, LimitReached

MAX_SNAPSHOTS = 65536
MAX_TABLE_BYTES = 64 << 20
MAX_EXTRA_BYTES = 1024
KNOWN_EXTRA_BYTES = 24
NO_ICOUNT = (1 << 64) - 1

_READ_AT_ONCE = 64 << 10
_FIXED = struct.Struct(">QIHHIIQII")
_EXTRA = struct.Struct(">QQQ")


@dataclass(frozen=True, slots=True)
class SnapshotEntry:
    """One entry. :param extra: the whole extra data, as it lies in the image."""

    l1_offset: int
    l1_size: int
    id: bytes
    name: bytes
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    state_size_32: int
    extra: bytes

    @property
    def state_size(self) -> int:
        """Bytes of machine state."""
        return _word(self.extra, 0, self.state_size_32)

    def disk_size(self, present: int) -> int:
        """Bytes of the disk. :param present: the image's own size, which an entry without one means."""
        return _word(self.extra, 8, present)

    @property
    def icount(self) -> int | None:
        """Instructions executed, where recorded."""
        value = _word(self.extra, 16, NO_ICOUNT)
        return None if value == NO_ICOUNT else value

    @property
    def is_complete(self) -> bool:
        """Whether it holds what version 3 demands."""
        return len(self.extra) >= 16

    def info(self, present_size: int) -> SnapshotInfo:
        """What the layers above see."""
        return SnapshotInfo(
            id=self.id.decode("utf-8", "surrogateescape"),
            name=self.name.decode("utf-8", "surrogateescape"),
            state_size=self.state_size,
            date_sec=self.date_sec,
            date_nsec=self.date_nsec,
            vm_clock_ns=self.vm_clock_ns,
            icount=self.icount,
            disk_size=self.disk_size(present_size),
            lineage=unpack_lineage(self.extra[KNOWN_EXTRA_BYTES:]),
        )

    def completed(self, present_size: int) -> "SnapshotEntry":
        """The entry with all that we write: sizes and icount spelt out, the rest of the extra data kept."""
        if len(self.extra) >= KNOWN_EXTRA_BYTES:
            return self
        icount = NO_ICOUNT if self.icount is None else self.icount
        known = _EXTRA.pack(self.state_size, self.disk_size(present_size), icount)
        return replace(self, extra=known)


def pack_extra(state_size: int, disk_size: int, icount: int | None, record: bytes) -> bytes:
    """The extra data of a snapshot of ours. :param record: the lineage record."""
    extra = _EXTRA.pack(state_size, disk_size, NO_ICOUNT if icount is None else icount) + record
    if len(extra) > MAX_EXTRA_BYTES:
        raise LimitReached("The lineage record does not fit into the snapshot's extra data of 1024 bytes")
    return extra


def pack_table(entries: tuple[SnapshotEntry, ...]) -> bytes:
    """The table's bytes. :raise LimitReached: more than 65536 snapshots or 64 MiB."""
    if len(entries) > MAX_SNAPSHOTS:
        raise LimitReached(f"An image holds at most {MAX_SNAPSHOTS} snapshots")
    table = bytearray()
    for entry in entries:
        table += bytes(-len(table) % 8)
        size_32 = entry.state_size if entry.state_size < 1 << 32 else 0
        table += _FIXED.pack(
            entry.l1_offset,
            entry.l1_size,
            len(entry.id),
            len(entry.name),
            entry.date_sec & 0xFFFFFFFF,
            entry.date_nsec,
            entry.vm_clock_ns & NO_ICOUNT,
            size_32,
            len(entry.extra),
        )
        table += entry.extra + entry.id + entry.name
    if len(table) > MAX_TABLE_BYTES:
        raise LimitReached("Snapshot table is too big")
    return bytes(table)


def parse_table(header: Header, read: Callable[[int, int], bytes]) -> tuple[tuple[SnapshotEntry, ...], int]:
    """The entries of the table that the header names, and the table's length in bytes.

    :param read: bytes of the image file by offset and length; zeroes past its end, so that a count larger than what is
        there reads as empty entries, as in QEMU.
    :raise ImageCorrupt: out of bounds, in QEMU's words.
    """
    check_table_place(header)
    entries: list[SnapshotEntry] = []
    window, window_at, at = b"", 0, 0

    def take(length: int) -> bytes:
        nonlocal window, window_at, at
        if at + length > MAX_TABLE_BYTES:
            raise ImageCorrupt("Snapshot table is too big")
        if at < window_at or at + length > window_at + len(window):
            window_at = at
            window = read(header.snapshots_offset + at, max(length, _READ_AT_ONCE))
        start = at - window_at
        at += length
        return window[start : start + length]

    for index in range(header.snapshot_count):
        at += -at % 8
        l1_offset, l1_size, id_length, name_length, sec, nsec, clock, size_32, extra = _FIXED.unpack(
            take(_FIXED.size)
        )
        if extra > MAX_EXTRA_BYTES:
            raise ImageCorrupt(
                f"Too much extra metadata in snapshot table entry {index}",
                remedy="You can force-remove this extra metadata with qemu-img check -r all, on a copy of the image: "
                "where there are persistent bitmaps that drops every snapshot",
            )
        body = take(extra + id_length + name_length)
        entries.append(
            SnapshotEntry(
                l1_offset=l1_offset,
                l1_size=l1_size,
                id=body[extra : extra + id_length],
                name=body[extra + id_length :],
                date_sec=sec,
                date_nsec=nsec,
                vm_clock_ns=clock,
                state_size_32=size_32,
                extra=body[:extra],
            )
        )
    return tuple(entries), at


def check_table_place(header: Header) -> None:
    """:raise ImageCorrupt: the header's count or offset is out of bounds, in QEMU's words."""
    if header.snapshot_count > MAX_SNAPSHOTS:
        raise ImageCorrupt("Snapshot table too large")
    if header.snapshot_count and not aligned(header.snapshots_offset, header.cluster_size - 1):
        raise ImageCorrupt("Snapshot table offset invalid")


def check_l1_place(entry: SnapshotEntry, header: Header) -> None:
    """Before a snapshot's tables are followed.

    :raise ImageCorrupt: its L1 is out of bounds, in QEMU's words.
    """
    if entry.l1_size * 8 > MAX_L1_BYTES:
        raise ImageCorrupt("Snapshot L1 table too large")
    if entry.l1_size and not aligned(entry.l1_offset, header.cluster_size - 1):
        raise ImageCorrupt("Snapshot L1 table offset invalid")


def next_id(entries: tuple[SnapshotEntry, ...]) -> bytes:
    """One more than the largest numeric id."""
    taken = {entry.id for entry in entries}
    number = 1 + max((int(each) for each in taken if each.isdigit() and len(each) < 20), default=0)
    # Numbers near the end of 64 bits are left out above, and must not come twice all the same.
    while str(number).encode() in taken:
        number += 1
    return str(number).encode()


def _word(extra: bytes, at: int, absent: int) -> int:
    if len(extra) < at + 8:
        return absent
    return int.from_bytes(extra[at : at + 8], "big")
