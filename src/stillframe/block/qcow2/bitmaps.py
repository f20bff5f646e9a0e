"""The persistent bitmaps of an image: which there are, and where they lie, so that a check counts them.

stillframe does not keep them up to date. Before the disk's content changes for the first time, each is marked as in use, as
QEMU marks them while it has an image open: what they say is not to be relied on then, and they can be removed.

header extension   bitmaps 4, reserved 4, directory length 8, directory offset 8
directory entry    table offset 8, table entries 4, flags 4, type 1, granularity 1, name length 2, extra length 4,
                   extra data, name, padding to 8
table entry        bits 55..9 host offset of a cluster of the bitmap
"""

import struct
from collections.abc import Iterator

from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.layout import BITMAPS_CONSISTENT, EXTENSION_BITMAPS, OFFSET_MASK
from stillframe.errors import ImageCorrupt

_EXTENSION = struct.Struct(">IIQQ")
_ENTRY = struct.Struct(">QIIBBHI")
_FLAGS_AT = 12
_IN_USE, _AUTO = 1, 2
_MAX_BITMAPS = 65535
_MAX_DIRECTORY_BYTES = _MAX_BITMAPS * 1104
_MAX_TABLE_BYTES = 64 << 20


def bitmap_ranges(image: Image) -> Iterator[tuple[int, int]]:
    """Offset and length of the directory, and of each bitmap's table and clusters.

    :raise ImageCorrupt: the directory is out of bounds.
    """
    data = image.header.extension(EXTENSION_BITMAPS)
    if data is None:
        return
    if len(data) < _EXTENSION.size:
        raise ImageCorrupt("bitmaps_ext: Invalid extension length")
    count, _reserved, length, offset = _EXTENSION.unpack_from(data)
    if count > _MAX_BITMAPS or length > _MAX_DIRECTORY_BYTES or offset + length > image.file.size:
        raise ImageCorrupt("bitmaps_ext: the bitmap directory is out of bounds")
    yield offset, length
    import numpy as np

    directory = image.file.read(offset, length)
    at = 0
    # More than the file holds can only be the same bytes named again and again.
    table_bytes_left, clusters_left = image.file.size, image.header.clusters_for(image.file.size)
    for _ in range(count):
        if at + _ENTRY.size > length:
            raise ImageCorrupt("The bitmap directory ends too early")
        table, entries, _flags, _type, _granularity, name, extra = _ENTRY.unpack_from(directory, at)
        at += -(-(_ENTRY.size + extra + name) // 8) * 8
        if entries * 8 > _MAX_TABLE_BYTES or table + entries * 8 > image.file.size:
            raise ImageCorrupt("A bitmap's table is out of bounds")
        table_bytes_left -= entries * 8
        if table_bytes_left < 0:
            raise ImageCorrupt("The tables of the bitmaps overlap")
        yield table, entries * 8
        words = np.frombuffer(image.file.read(table, entries * 8), ">u8") & np.uint64(OFFSET_MASK)
        hosts = words[words != 0].tolist()
        clusters_left -= len(hosts)
        if clusters_left < 0:
            raise ImageCorrupt("The clusters of the bitmaps overlap")
        for host in hosts:
            yield host, image.cluster_size


def _entries(image: Image) -> Iterator[tuple[int, int, int, str]]:
    """Of each bitmap: where its entry lies in the file, flags, granularity in bits, name.

    :raise ImageCorrupt: the directory is out of bounds.
    """
    offset, length = next(bitmap_ranges(image), (0, 0))
    directory = image.file.read(offset, length)
    at = 0
    while at + _ENTRY.size <= length:
        _table, _size, flags, _type, granularity, name, extra = _ENTRY.unpack_from(directory, at)
        start = at + _ENTRY.size + extra
        yield offset + at, flags, granularity, directory[start : start + name].decode("utf-8", "replace")
        at += -(-(_ENTRY.size + extra + name) // 8) * 8


def bitmaps_json(image: Image) -> list[dict[str, object]]:
    """The bitmaps as QEMU describes them (Qcow2BitmapInfo of the QAPI schema).

    :raise ImageCorrupt: the directory is out of bounds.
    """
    return [
        {
            "flags": ["in-use"] * bool(flags & _IN_USE) + ["auto"] * bool(flags & _AUTO),
            "name": name,
            "granularity": 1 << granularity if granularity < 64 else 0,
        }
        for _, flags, granularity, name in _entries(image)
    ]


def _refuse_on_metadata(image: Image) -> None:
    """:raise ImageCorrupt: the directory lies where other metadata does, and may not be written."""
    offset, length = next(bitmap_ranges(image), (0, 0))
    first = offset >> image.header.cluster_bits
    count = (offset + length - 1 >> image.header.cluster_bits) + 1 - first
    if length and image.metadata.overlap(first, count) is not None:
        raise ImageCorrupt("bitmaps_ext: the bitmap directory overlaps with other metadata")


def mark_in_use(image: Image) -> None:
    """Say, durably, that no bitmap is to be relied on. Lock held.

    Where their directory cannot be read, the header's promise that they are consistent is taken back.

    :raise IOFailed: it may not be said.
    """
    try:
        _refuse_on_metadata(image)
        for at, flags, _granularity, _name in _entries(image):
            if not flags & _IN_USE:
                image.file.write(at + _FLAGS_AT, struct.pack(">I", flags | _IN_USE))
    except ImageCorrupt:
        image.set_features(autoclear=image.header.autoclear & ~BITMAPS_CONSISTENT)
    else:
        image.file.flush()
    image.has_current_bitmaps = False
