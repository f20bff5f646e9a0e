"""The page index: where in a stream each page's record in force lies.

It stands behind the stream, from the next cluster boundary on, and is found through the lineage record alone: a stream without
one is parsed. All integers are big-endian.

    ┌──────────────────────────────────────────────────────────────────────────┐
    │  0  magic "SFPI"          4 │  16  end of the last PART in the stream  8  │
    │  4  version, 1            4 │  24  bytes of page records before it     8  │
    │  8  blocks                4 │  32  blocks, one after the other            │
    │ 12  reserved, 0           4 │                                             │
    └──────────────────────────────────────────────────────────────────────────┘
    block   u8 n  name[n]  u64 bytes  u32 runs, then the runs
    run     u32 first page  u32 pages  u64 offset in the stream of the first page's bytes; all ones: zero pages

Runs ascend and do not overlap. The records of a run follow each other in the stream, `PAGE_RECORD` bytes apart. A page in no run
has no record, and is zero. "End of the last PART" is where the next PART of a longer stream may begin; what lies before it is
what a child takes over from its parent.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillframe.errors import StreamCorrupt
from stillframe.vmstate.ram import PAGE_RECORD, PAGE_SIZE, RamBlock

ZERO_PAGE = -1
"""As an offset: the record says that the page is zero."""
NO_RECORD = -2
"""As an offset: there is no record, so the page is zero."""

Offsets = npt.NDArray[np.int64]
"""One a page of a block: where its bytes stand in the stream, or one of the two above."""

_MAGIC = b"SFPI"
_HEAD = struct.Struct(">4sIIIQQ")
_BLOCK = struct.Struct(">QI")
_RUN = np.dtype([("first", ">u4"), ("count", ">u4"), ("offset", ">u8")])
_ZERO_RUN = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class PageIndex:
    """An index, unpacked.

    :param blocks: in the stream's order. :param offsets: by the block's name.
    :param parts_end: offset in the stream behind the last PART.
    :param record_bytes: of all page records, those in force and the others.
    """

    blocks: tuple[RamBlock, ...]
    offsets: Mapping[str, Offsets]
    parts_end: int
    record_bytes: int

    @property
    def live_bytes(self) -> int:
        """Of the records in force that hold a page's bytes."""
        return sum(int((offsets >= 0).sum()) for offsets in self.offsets.values()) * PAGE_RECORD

    @classmethod
    def of(cls, blocks: Sequence[RamBlock]) -> "PageIndex":
        """Of a stream without page records."""
        offsets = {block.name: np.full(block.length // PAGE_SIZE, NO_RECORD, np.int64) for block in blocks}
        return cls(tuple(blocks), offsets, 0, 0)


def pack_page_index(index: PageIndex) -> bytes:
    """Its bytes; see the module's text."""
    packed = bytearray(_HEAD.pack(_MAGIC, 1, len(index.blocks), 0, index.parts_end, index.record_bytes))
    for block in index.blocks:
        runs = _runs(index.offsets[block.name])
        name = block.name.encode()
        packed += bytes((len(name),)) + name + _BLOCK.pack(block.length, len(runs)) + runs.tobytes()
    return bytes(packed)


def _runs(offsets: Offsets) -> npt.NDArray[np.void]:
    pages = np.flatnonzero(offsets != NO_RECORD)
    found = offsets[pages]
    if not len(pages):
        return np.zeros(0, _RUN)
    follows = np.diff(pages) == 1
    steps = np.diff(found)
    same = (found[1:] == ZERO_PAGE) & (found[:-1] == ZERO_PAGE)
    joined = follows & (same | ((steps == PAGE_RECORD) & (found[:-1] != ZERO_PAGE)))
    starts = np.concatenate(([0], np.flatnonzero(~joined) + 1))
    runs = np.zeros(len(starts), _RUN)
    runs["first"] = pages[starts]
    runs["count"] = np.diff(np.concatenate((starts, [len(pages)])))
    runs["offset"] = found[starts].astype(np.uint64)
    return runs


def unpack_page_index(data: bytes, stream_size: int, expected: Sequence[RamBlock]) -> PageIndex:
    """The opposite of `pack_page_index`; nothing in `data` is trusted.

    :param stream_size: bytes of the stream that it belongs to. :param expected: the blocks that it must be of.
    :raise StreamCorrupt: it is of other blocks, is none, or points out of the stream. What it says of pages has not been compared
        with the stream.
    """
    if len(data) < _HEAD.size:
        raise StreamCorrupt("The page index ends too early")
    magic, version, count, _, parts_end, record_bytes = _HEAD.unpack_from(data)
    if magic != _MAGIC or version != 1:
        raise StreamCorrupt(f"No page index of a version that is known (version {version})")
    if count != len(expected) or parts_end > stream_size or record_bytes > stream_size:
        raise StreamCorrupt("The page index contradicts its stream")
    offsets: dict[str, Offsets] = {}
    at = _HEAD.size
    for block in expected:
        if at + 1 > len(data) or at + 1 + data[at] + _BLOCK.size > len(data):
            raise StreamCorrupt("The page index ends too early")
        name = data[at + 1 : at + 1 + data[at]].decode("utf-8", "replace")
        at += 1 + data[at]
        length, runs = _BLOCK.unpack_from(data, at)
        at += _BLOCK.size
        if (name, length) != (block.name, block.length):
            raise StreamCorrupt(f"The page index is of a block '{name}' of {length} bytes")
        if at + runs * _RUN.itemsize > len(data):
            raise StreamCorrupt("The page index ends too early")
        table = np.frombuffer(data, _RUN, runs, at)
        at += runs * _RUN.itemsize
        offsets[name] = _expanded(table, length // PAGE_SIZE, stream_size, name)
    return PageIndex(tuple(expected), offsets, parts_end, record_bytes)


def _expanded(runs: npt.NDArray[np.void], pages: int, stream_size: int, name: str) -> Offsets:
    first, count = runs["first"].astype(np.int64), runs["count"].astype(np.int64)
    zero = runs["offset"] == np.uint64(_ZERO_RUN)
    beyond = runs["offset"] > np.uint64(stream_size)
    where = np.where(zero | beyond, 0, runs["offset"]).astype(np.int64)
    ends = first + count
    if len(runs) and (
        (count == 0).any()
        or int(ends.max()) > pages
        or (first[1:] < ends[:-1]).any()
        or (beyond & ~zero).any()
        or (where + (count - 1) * PAGE_RECORD + PAGE_SIZE > stream_size)[~zero].any()
    ):
        raise StreamCorrupt(f"The page index of '{name}' points out of the block or the stream")
    found = np.full(pages, NO_RECORD, np.int64)
    total = int(count.sum())
    if total:
        within = np.arange(total) - np.repeat(np.cumsum(count) - count, count)
        page = np.repeat(first, count) + within
        found[page] = np.where(
            np.repeat(zero, count), ZERO_PAGE, np.repeat(where, count) + within * PAGE_RECORD
        )
    return found
