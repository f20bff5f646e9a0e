"""The lineage record: where a snapshot comes from, kept in its extra data behind the 24 bytes that QEMU knows.

    ┌──────────────────────────────────────────────────────────────────┐
    │   0  magic "SFRM"      4 │   8  the snapshot's UUID          16  │
    │   4  version, 1        2 │  24  its parent's, zeroes = none  16  │
    │   6  bytes of it all   2 │  40  its group's                  16  │
    │  56  items: kind 2, length 2, data                               │
    └──────────────────────────────────────────────────────────────────┘
    item 1  a member: UUID of that image's snapshot 16, node-name; in order, the first holds the machine state
    item 2  the description, UTF-8, at most 500 bytes
    item 3  the page index, in the state area: offset 8, length 8, checksum 16, stream UUID 16, RAM size 8

All integers are big-endian. A reader skips the items that it does not know, and what lies behind the record. A version
above 1 keeps the first 56 bytes and the form of the items.
"""

import struct
from uuid import UUID

from stillframe.block.node import GroupMember, Lineage, PageIndexPlace
from stillframe.errors import InvalidRequest, LimitReached

MAX_RECORD_BYTES = 1000
MAX_DESCRIPTION_BYTES = 500
ITEM_MEMBER, ITEM_DESCRIPTION, ITEM_PAGE_INDEX = 1, 2, 3

_MAGIC = b"SFRM"
_FIXED = struct.Struct(">4sHH16s16s16s")
_ITEM = struct.Struct(">HH")
_PAGE_INDEX = struct.Struct(">QQ16s16sQ")
_NONE = bytes(16)


def pack_lineage(lineage: Lineage) -> bytes:
    """The record's bytes.

    :raise InvalidRequest: the description is longer than 500 bytes.
    :raise LimitReached: more members than the record holds; 18 with the longest node-names.
    """
    description = lineage.description.encode()
    if len(description) > MAX_DESCRIPTION_BYTES:
        raise InvalidRequest(
            f"The description has {len(description)} bytes, {MAX_DESCRIPTION_BYTES} are allowed"
        )
    items = [_item(ITEM_MEMBER, m.snapshot.bytes + m.node_name.encode()) for m in lineage.members]
    if description:
        items.append(_item(ITEM_DESCRIPTION, description))
    if (place := lineage.page_index) is not None:
        packed = _PAGE_INDEX.pack(
            place.offset, place.length, place.checksum, place.stream.bytes, place.ram_size
        )
        items.append(_item(ITEM_PAGE_INDEX, packed))
    length = _FIXED.size + sum(map(len, items))
    if length > MAX_RECORD_BYTES:
        raise LimitReached(
            f"The names of {len(lineage.members)} nodes and the description take {length} bytes of the lineage "
            f"record, which has {MAX_RECORD_BYTES}",
            remedy="Use shorter node-names, a shorter description, or fewer nodes in one snapshot.",
        )
    parent = lineage.parent.bytes if lineage.parent else _NONE
    return _FIXED.pack(_MAGIC, 1, length, lineage.snapshot.bytes, parent, lineage.group.bytes) + b"".join(
        items
    )


def unpack_lineage(data: bytes) -> Lineage | None:
    """The record at the start of `data`; None where there is none, or it is damaged."""
    if len(data) < _FIXED.size:
        return None
    magic, version, length, snapshot, parent, group = _FIXED.unpack_from(data)
    if magic != _MAGIC or version < 1 or not _FIXED.size <= length <= len(data):
        return None
    members: list[GroupMember] = []
    description = ""
    page_index: PageIndexPlace | None = None
    at = _FIXED.size
    while at + _ITEM.size <= length:
        kind, size = _ITEM.unpack_from(data, at)
        at += _ITEM.size
        if at + size > length:
            return None
        body = data[at : at + size]
        at += size
        if kind == ITEM_MEMBER and size >= 16:
            members.append(GroupMember(body[16:].decode("utf-8", "replace"), UUID(bytes=body[:16])))
        elif kind == ITEM_DESCRIPTION:
            description = body.decode("utf-8", "replace")
        elif kind == ITEM_PAGE_INDEX and size >= _PAGE_INDEX.size:
            offset, extent, checksum, stream, ram_size = _PAGE_INDEX.unpack_from(body)
            page_index = PageIndexPlace(offset, extent, checksum, UUID(bytes=stream), ram_size)
    return Lineage(
        snapshot=UUID(bytes=snapshot),
        parent=None if parent == _NONE else UUID(bytes=parent),
        group=UUID(bytes=group),
        members=tuple(members),
        description=description,
        page_index=page_index,
    )


def _item(kind: int, data: bytes) -> bytes:
    return _ITEM.pack(kind, len(data)) + data
