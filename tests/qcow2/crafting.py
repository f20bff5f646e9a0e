"""Images that no ordinary sequence of operations makes: counts near their ends, tables of any content."""

import struct
from collections.abc import Iterable
from pathlib import Path

from qcow2.images import opened
from stillframe.block.qcow2.changes import switch_now
from stillframe.block.qcow2.layout import parse_header
from stillframe.block.qcow2.snapshot_table import SnapshotEntry, pack_extra


def set_refcount(path: Path, cluster: int, value: int) -> None:
    """Make a refcount say something; for widths of whole bytes."""
    data = path.read_bytes()
    header = parse_header(data[: 1 << 21])
    index, within = divmod(cluster, header.refcounts_in_block)
    (block,) = struct.unpack_from(">Q", data, header.refcount_table_offset + index * 8)
    octets = header.refcount_bits // 8
    with path.open("r+b") as file:
        file.seek(block + within * octets)
        file.write(value.to_bytes(octets, "big"))


def entry(number: int, name: bytes, *, extra: bytes | None = None, **fields: int | bytes) -> SnapshotEntry:
    """A snapshot of an empty disk, without a table of its own."""
    words: dict[str, int | bytes] = {
        "l1_offset": 0,
        "l1_size": 0,
        "id": str(number).encode(),
        "date_sec": 1,
        "date_nsec": 0,
        "vm_clock_ns": 0,
        "state_size_32": 0,
    }
    return SnapshotEntry(
        name=name, extra=pack_extra(0, 512, None, b"") if extra is None else extra, **(words | fields)
    )


def list_snapshots(path: Path, entries: Iterable[SnapshotEntry]) -> None:
    """Make these an image's snapshots, counted as they must be."""
    with opened(path) as node:
        listed = tuple(entries)
        switch_now(node.image, lambda shadow: shadow.world(l1=None, snapshots=listed))
