"""The mark: what an image's header says of an unfinished operation over several images. A header extension of ours.

    type 0x53464d4b "SFMK"
    ┌────────────────────────────────────────────────────────────────────────────────────┐
    │   0  version, 1          1 │   8  UUID of the operation                        16  │
    │   1  kind                1 │  24  this image's snapshot, `identity`            16  │
    │   2  stage               1 │  40  header bytes 24..71 before the load          48 ┐│
    │   3  flags               1 │  88  and after it                                 48 ┘│ a load's alone
    │   4  images              2 │   n  what the deciding image is called, UTF-8         │
    │   6  length of that name 2 │                                                       │
    └────────────────────────────────────────────────────────────────────────────────────┘
    kind   1 save, 2 load, 3 delete       stage  0 under way, 1 committed, 2 settled
    flags  1 this image decides, 2 the table of feature names made room for the mark

It lies in the first sector with all other extensions, so that one write puts it there or takes it away, together with a
switch where need be (first_sector.py). QEMU keeps extensions that it does not know.

While a load is under way its images carry the incompatible feature bit 62 as well, set and cleared by the same writes:
other programs refuse them. Version 2 has no feature bits; there the version number is 0x53460002 meanwhile.
"""

import hashlib
import struct
from dataclasses import dataclass
from uuid import UUID

from stillframe.block.node import GroupKind, GroupMark, GroupStage
from stillframe.block.qcow2.snapshot_table import SnapshotEntry

EXTENSION_MARK = 0x53464D4B
IDENTITY_BYTES = 16
WORLD_BYTES = 48
MAX_DECIDER_BYTES = 64

_FIXED = struct.Struct(">BBBBHH16s16s")
_KINDS = {GroupKind.SAVE: 1, GroupKind.LOAD: 2, GroupKind.DELETE: 3}
_DECIDES, _NAMES_DROPPED = 1, 2


@dataclass(frozen=True, slots=True)
class Mark:
    """:param snapshot: the `identity` of the snapshot that the operation makes or deletes here; zeroes for a load.
    :param before, after: the world before the load and after it, as `Header.pack_world` gives it; else empty.
    :param names_dropped: the table of feature names is to come back with the end of the mark.
    """

    group: GroupMark
    snapshot: bytes = bytes(IDENTITY_BYTES)
    before: bytes = b""
    after: bytes = b""
    names_dropped: bool = False


def identity(entry: SnapshotEntry) -> bytes:
    """Sixteen bytes that tell a snapshot from all others of its image, earlier ones of the same name too."""
    fixed = struct.pack(">HIIQ", len(entry.id), entry.date_sec, entry.date_nsec, entry.vm_clock_ns)
    return hashlib.sha256(fixed + entry.id + entry.name).digest()[:IDENTITY_BYTES]


def pack_mark(mark: Mark) -> bytes:
    """The extension's data. The decider's name is cut to 64 bytes."""
    group = mark.group
    name = group.decider.encode("utf-8", "replace")[:MAX_DECIDER_BYTES]
    flags = (_DECIDES if group.decides else 0) | (_NAMES_DROPPED if mark.names_dropped else 0)
    fixed = _FIXED.pack(
        1,
        _KINDS[group.kind],
        group.stage.value,
        flags,
        group.images,
        len(name),
        group.operation.bytes,
        mark.snapshot,
    )
    return fixed + mark.before + mark.after + name


def unpack_mark(data: bytes) -> Mark | None:
    """The mark in an extension's data; None where it is damaged, or of a later version."""
    if len(data) < _FIXED.size:
        return None
    version, kind_number, stage, flags, images, name_length, operation, snapshot = _FIXED.unpack_from(data)
    kind = next((each for each, number in _KINDS.items() if number == kind_number), None)
    if version != 1 or kind is None or stage not in (each.value for each in GroupStage):
        return None
    at = _FIXED.size
    worlds = 2 * WORLD_BYTES if kind is GroupKind.LOAD else 0
    if len(data) != at + worlds + name_length:
        return None
    before, after = (
        (data[at : at + WORLD_BYTES], data[at + WORLD_BYTES : at + worlds]) if worlds else (b"", b"")
    )
    return Mark(
        GroupMark(
            operation=UUID(bytes=operation),
            kind=kind,
            stage=GroupStage(stage),
            decides=bool(flags & _DECIDES),
            images=images,
            decider=data[at + worlds :].decode("utf-8", "replace"),
        ),
        snapshot=snapshot,
        before=before,
        after=after,
        names_dropped=bool(flags & _NAMES_DROPPED),
    )
