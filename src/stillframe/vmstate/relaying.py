"""A stream of another program on its way into a state area: its own bytes as they are, its pages as ours.

    what comes   head, RAM's START   PARTs and END: pages, some twice     device sections, EOF, description
    what goes    the same bytes      one PART: pages not in the parent    the same bytes
                 or a parent's       (a page that changed twice, twice)

The head and the device sections are what only that program understands. The pages are put into records that this module knows
the places of, so that the stream gets a page index, and can be continued as one of ours is. A page is left out if the parent's
record in force holds the same bytes, which are compared one by one: no hash can be deceived, and nothing needs to be remembered
from one save to the next. The stream stays one that the other program reads: of a page's records the last one counts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stillframe.errors import StreamCorrupt
from stillframe.vmstate import layout
from stillframe.vmstate.page_index import Offsets, PageIndex
from stillframe.vmstate.ram import (
    BATCH,
    PAGE_RECORD,
    PAGE_SIZE,
    Addresses,
    Pages,
    RamBlock,
    RamReader,
    RamWriter,
)
from stillframe.vmstate.relayed import RelayedHead
from stillframe.vmstate.stream import Records
from stillframe.vmstate.transfer import StateSink, StateSource

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class RelayBase:
    """A stream that another begins with.

    :param index: where its pages lie. :param read: its bytes, from an offset on, so many.
    """

    index: PageIndex
    read: Callable[[int, int], bytes]


def relay_memory(
    source: StateSource,
    head: RelayedHead,
    sink: StateSink,
    base: RelayBase | None = None,
    took: Callable[[int], None] = lambda length: None,
) -> PageIndex:
    """Everything up to the end of RAM's section.

    :param source: behind the head. :param sink: at the beginning; with a base, at `base.index.parts_end`.
    :param took: called with the bytes of memory that came since its last call; raises to end.
    :return: where the pages lie. The sink stands behind RAM's END, `source` too.
    :raise StreamCorrupt: it is no such stream.
    """
    if base is None:
        sink.write(head.head)
        sink.write(head.ram_start)
    records = Records(PageIndex.of(head.blocks) if base is None else base.index)
    ram = RamWriter(sink, records.note)
    sink.write(layout.mark(layout.PART, head.ram_section_id))
    relay = _Relay(ram, records, base, took)
    reader = RamReader(source, relay, head.blocks, together=True)
    while not _section(source, reader, head.ram_section_id):
        pass
    ram.end()
    sink.write(layout.mark(layout.FOOTER, head.ram_section_id))
    index = records.index(sink.offset)
    sink.write(layout.mark(layout.END, head.ram_section_id))
    ram.end()
    sink.write(layout.mark(layout.FOOTER, head.ram_section_id))
    return index


def _section(source: StateSource, reader: RamReader, section_id: int) -> bool:
    """One section, unless it is a device's. :return: whether memory has ended."""
    source.section = f"the section after byte {source.offset}"
    kind = source.u8()
    if kind == layout.COMMAND:
        # What it says is for a wire; 7.2 would refuse it in a file.
        source.take(2)
        source.take(int.from_bytes(source.take(2), "big"))
        return False
    if kind == layout.FULL:
        # A background snapshot's memory has no END: its devices were saved before.
        source.seek(source.offset - 1)
        return True
    if kind not in (layout.PART, layout.END) or source.u32() != section_id:
        raise source.corrupt(f"Section type {kind} among those of memory")
    reader.payload()
    if source.u8() != layout.FOOTER or source.u32() != section_id:
        raise source.corrupt("Missing section footer for ram")
    return kind == layout.END


class _Relay:
    """A visitor of the pages that come, which writes those that are news."""

    def __init__(
        self, ram: RamWriter, records: Records, base: RelayBase | None, took: Callable[[int], None]
    ) -> None:
        self._ram = ram
        self._records = records
        self._base = base
        self._took = took
        self._named: RamBlock | None = None

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        raise StreamCorrupt("The machine state lists its memory twice")

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        for start in range(0, len(addresses), BATCH):
            numbers = addresses[start : start + BATCH] // PAGE_SIZE
            batch = pages[start : start + BATCH]
            news = self._news(block, numbers, batch)
            if news.all():
                self._write(block, numbers, batch)
            elif news.any():
                self._write(block, numbers[news], batch[news])
            self._took(len(numbers) * PAGE_SIZE)

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        numbers = addresses // PAGE_SIZE
        if self._base is not None:
            where = self._records.offsets(block)[numbers]
            numbers = numbers[where >= 0]
        for start in range(0, len(numbers), BATCH):
            self._ram.zeroes(block, numbers[start : start + BATCH], named=self._names(block))
        self._took(len(addresses) * PAGE_SIZE)

    def _write(self, block: RamBlock, numbers: Addresses, pages: Pages) -> None:
        self._ram.batch(block, numbers, pages, named=self._names(block))

    def _names(self, block: RamBlock) -> bool:
        """Whether the next record has to say which block it is of."""
        named = self._named is not block
        self._named = block
        return named

    def _news(self, block: RamBlock, numbers: Addresses, pages: Pages) -> Flags:
        """For each page, whether the record in force says something else, or was written just now."""
        news = np.ones(len(numbers), np.bool_)
        base = self._base
        if base is None:
            return news
        where = self._records.offsets(block)[numbers]
        # One that came before in this stream has a record behind the base's end: it is written again, whatever it says.
        old = np.flatnonzero((where >= 0) & (where < base.index.parts_end))
        if not len(old):
            return news
        cuts = np.flatnonzero((np.diff(old) != 1) | (np.diff(where[old]) != PAGE_RECORD)) + 1
        for run in np.split(old, cuts):
            news[run] = ~_same(base, where[run], pages[run[0] : run[-1] + 1])
        return news


def _same(base: RelayBase, where: Offsets, pages: Pages) -> Flags:
    """Whether each page is what the base holds in records that follow each other."""
    first, count = int(where[0]), len(where)
    length = (count - 1) * PAGE_RECORD + PAGE_SIZE
    data = base.read(first, length)
    if len(data) < length:
        return np.zeros(count, np.bool_)
    theirs = np.ndarray((count, PAGE_SIZE // 8), np.uint64, data, strides=(PAGE_RECORD, 8))
    found: Flags = (theirs == pages.view(np.uint64)).all(axis=1)
    return found
