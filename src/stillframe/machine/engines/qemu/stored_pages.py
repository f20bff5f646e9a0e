"""Pages of a stored stream, made into sections of RAM that QEMU takes: in bulk, and in any order.

A section is `02 u32 section_id`, records, end record, footer (vmstate/layout.py, vmstate/ram.py). Its first record names the block.
Of the stream only what the page index points to is read: large stretches, from which the pages are gathered by numpy.
"""

import struct
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from stillframe.errors import StreamCorrupt
from stillframe.vmstate import layout
from stillframe.vmstate.page_index import Offsets, PageIndex
from stillframe.vmstate.ram import (
    CONTINUE,
    EOS,
    PAGE,
    PAGE_RECORD,
    PAGE_SIZE,
    ZERO,
    ZERO_RECORD,
    Addresses,
    RamBlock,
)

DATA_PAGES = 128
"""Pages with bytes of one section at most."""
ZERO_PAGES = 512
"""Zero pages of one section at most; QEMU is as busy with them as with the above."""

_GAP = 16 << 10
"""Bytes of the stream that are read rather than jumped over."""
_WORD = 8
_FRONT = 512
"""Room for what stands before the first page: the section's head, its record's word, the block's name."""
_BACK = 64

Bytes = npt.NDArray[np.uint8]


class StoredPages:
    """Makes sections in one buffer, of half a mebibyte, which the next section overwrites. For one thread at a time.

    :param section_id: of RAM. :param index: of the stream.
    :param read: bytes of the stream, from an offset, so many.
    """

    def __init__(self, section_id: int, index: PageIndex, read: Callable[[int, int], bytes]) -> None:
        self._index = index
        self._read = read
        self._begin = layout.mark(layout.PART, section_id)
        self._end = struct.pack(">Q", EOS) + layout.mark(layout.FOOTER, section_id)
        self._room = bytearray(_FRONT + DATA_PAGES * PAGE_RECORD + ZERO_PAGES * ZERO_RECORD + _BACK)
        self._bytes = np.frombuffer(self._room, np.uint8)

    def pieces(self, block: RamBlock, pages: Addresses) -> list[Addresses]:
        """The pages in portions for `section`: those that have bytes as these lie in the stream, then the zero pages."""
        offsets = self._index.offsets[block.name][pages]
        data = pages[offsets >= 0]
        data = data[np.argsort(offsets[offsets >= 0], kind="stable")]
        zero = pages[offsets < 0]
        return _cut(data, DATA_PAGES) + _cut(zero, ZERO_PAGES)

    def stored(self, block: RamBlock, pages: Addresses) -> int:
        """How many of the pages have bytes."""
        return int((self._index.offsets[block.name][pages] >= 0).sum())

    def section(self, block: RamBlock, pages: Addresses) -> memoryview:
        """One section: those of the pages that have bytes in the order given, then the zero pages.

        :param pages: numbers, one at least, each once; of either kind no more than the limits above.
        :return: valid until the next call.
        :raise StreamCorrupt: the stream has no record of a page where the index says. What `read` raises is passed on.
        """
        offsets = self._index.offsets[block.name][pages]
        stored = offsets >= 0
        data, zero = pages[stored], pages[~stored]
        named = block.name.encode()
        named = bytes((len(named),)) + named
        at = _FRONT
        if len(data):
            head = self._begin + struct.pack(">Q", int(data[0]) * PAGE_SIZE | PAGE) + named
            end = at + len(data) * PAGE_RECORD
            self._gather(data, offsets[stored], named, self._bytes[at:end].reshape(-1, PAGE_RECORD))
            # The first record's word gives way to the head, which ends where the page begins.
            start = at + _WORD - len(head)
            self._room[start : at + _WORD] = head
            at = end
        else:
            head = self._begin + struct.pack(">Q", int(zero[0]) * PAGE_SIZE | ZERO) + named + b"\0"
            start = at - len(head)
            self._room[start:at] = head
            zero = zero[1:]
        end = at + len(zero) * ZERO_RECORD
        records = self._bytes[at:end].reshape(-1, ZERO_RECORD)
        records[:, :_WORD] = _words(zero, ZERO | CONTINUE)
        records[:, _WORD] = 0
        at = end + len(self._end)
        self._room[end:at] = self._end
        return memoryview(self._room)[start:at]

    def _gather(self, pages: Addresses, offsets: Offsets, named: bytes, records: Bytes) -> None:
        """Fill in the records of pages. :param named: the block's name as in a record."""
        records[:, :_WORD] = words = _words(pages, PAGE | CONTINUE)
        order = np.argsort(offsets, kind="stable")
        ascending = offsets[order]
        cuts = np.flatnonzero(np.diff(ascending) > PAGE_SIZE + _GAP) + 1
        for rows in np.split(order, cuts):
            first, last = int(offsets[rows[0]]), int(offsets[rows[-1]])
            start = first - _WORD
            length = last + PAGE_SIZE - start
            stretch: Bytes = np.frombuffer(self._read(start, length) if start >= 0 else b"", np.uint8)
            if len(stretch) != length:
                raise StreamCorrupt(
                    f"The machine state has no {length} bytes at byte {start}, where its page index points"
                )
            where = offsets[rows] - first
            records[rows, _WORD:] = _windows(stretch[_WORD:], PAGE_SIZE)[where]
            other = (_windows(stretch, _WORD)[where] != words[rows]).any(axis=1)
            for row in rows[other].tolist():
                before = struct.pack(">Q", int(pages[row]) * PAGE_SIZE | PAGE) + named
                at = int(offsets[row]) - first
                if stretch[at : at + _WORD].tobytes() != before[-_WORD:]:
                    raise StreamCorrupt(
                        f"The machine state has no record of page {int(pages[row]) * PAGE_SIZE:#x} at byte "
                        f"{int(offsets[row])}, where its page index says"
                    )


def _cut(pages: Addresses, most: int) -> list[Addresses]:
    return [pages[at : at + most] for at in range(0, len(pages), most)]


def _words(pages: Addresses, flags: int) -> Bytes:
    """The records' first eight bytes: uint8 (n, 8)."""
    return (pages * PAGE_SIZE | flags).astype(">u8").view(np.uint8).reshape(-1, _WORD)


def _windows(data: Bytes, length: int) -> Bytes:
    """Every place in `data`, as the row of `length` bytes that begins there; a view."""
    return np.lib.stride_tricks.sliding_window_view(data, length)
