"""The RAM section: page records, written and read in bulk.

    block list   u64 total | MEM_SIZE, then u8 n, name[n], u64 length for each block; they sum to total
    zero page    u64 offset | ZERO    name?  u8 0             9 bytes with CONTINUE
    page         u64 offset | PAGE    name?  page[4096]       4104 bytes with CONTINUE
    end          u64 EOS                                      ends the payload of START, PART and END

`name` is u8 n, name[n]; with CONTINUE it is missing, and the record belongs to the block of the record
before, also across PARTs. The block list stands in START. Where a page has several records the last one
counts. A page without a record reads as zeroes.

Runs of records of one kind lie at a fixed stride: they are built, and taken apart, as numpy arrays over the
stream's own bytes. So that there are long runs whatever the memory holds, the zero pages of each mebibyte
follow its other pages.
"""

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from stillframe.vmstate.transfer import StateSink, StateSource

PAGE_SIZE = 4096

ZERO = 0x02
MEM_SIZE = 0x04
PAGE = 0x08
EOS = 0x10
CONTINUE = 0x20
MULTIFD_FLUSH = 0x200
FLAGS = PAGE_SIZE - 1
_WORD = struct.Struct(">Q")

ZERO_RECORD = 9
PAGE_RECORD = 8 + PAGE_SIZE
BATCH = 256
"""Pages of one step of the writer: a mebibyte."""

_OTHER_RECORDS = {0x40: "XBZRLE", 0x80: "RDMA", 0x100: "compressed page"}
_MAXIMUM_BLOCKS = 256
_MAXIMUM_MEMORY = 1 << 56

Addresses = npt.NDArray[np.int64]
Pages = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of memory as the stream lists it. :param length: bytes, whole pages."""

    name: str
    length: int


class PageVisitor(Protocol):
    """Told of every page record in the order of the stream, in batches. It may refuse the blocks before any
    page comes."""

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        """The block list. :raise StateMismatch: this machine's memory is another."""
        ...

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        """Records of pages.

        :param addresses: int64 (n,), in the block, possibly with repetitions: the last one counts.
        :param pages: uint8 (n, 4096), a view that is valid during the call.
        :param offset: of the first record's page in the stream; the others follow at a stride of
            `PAGE_RECORD`. -1 if they lie apart.
        """
        ...

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        """Records of zero pages; `addresses` as above."""
        ...


class PageMap:
    """A visitor that remembers where each record's page lies; memory in proportion to the records, not to
    what they claim."""

    ZERO = -1

    def __init__(self) -> None:
        self._found: dict[str, list[tuple[Addresses, Addresses]]] = {}

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        self._found = {block.name: [] for block in blocks}

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        offsets = offset + PAGE_RECORD * np.arange(len(addresses), dtype=np.int64)
        self._found[block.name].append((addresses.copy(), offsets))

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        self._found[block.name].append((addresses.copy(), np.full(len(addresses), self.ZERO, np.int64)))

    def latest(self, block: str) -> tuple[Addresses, Addresses]:
        """The addresses that have a record, ascending, and for each the stream offset of its last page, or
        `ZERO`."""
        parts = self._found[block]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        addresses = np.concatenate([part[0] for part in parts])
        offsets = np.concatenate([part[1] for part in parts])
        latest_first, where = np.unique(addresses[::-1], return_index=True)
        return latest_first, offsets[::-1][where]


class RamWriter:
    """Writes the payloads of one RAM section.

    :param sink: where the stream goes; the caller writes section heads and footers.
    :param wrote_records: told of every run of records: the block, the addresses of its pages, and the offset in the stream of
        the first one's bytes, the others following at a stride of `PAGE_RECORD`; None for zero pages.
    """

    def __init__(
        self,
        sink: StateSink,
        wrote_records: Callable[[RamBlock, Addresses, int | None], None] = lambda block, addresses, offset: (
            None
        ),
    ) -> None:
        self._sink = sink
        self._wrote_records = wrote_records

    def block_list(self, blocks: Sequence[RamBlock]) -> None:
        """The payload of START, but for the end record."""
        self._sink.write(struct.pack(">Q", sum(block.length for block in blocks) | MEM_SIZE))
        for block in blocks:
            self._sink.write(_name(block) + struct.pack(">Q", block.length))

    def pages(
        self, block: RamBlock, readinto: Callable[[int, memoryview], None], wrote: Callable[[int], None]
    ) -> None:
        """Records of a whole block, for the payload of a PART.

        :param readinto: fills a buffer with the block's bytes from an offset on.
        :param wrote: called after each batch with the bytes of memory it covered; raises to end the writing.
        """
        count = block.length // PAGE_SIZE
        buffer = memoryview(bytearray(min(BATCH, count) * PAGE_SIZE))
        for start in range(0, count, BATCH):
            numbers = np.arange(start, min(start + BATCH, count), dtype=np.int64)
            part = buffer[: len(numbers) * PAGE_SIZE]
            readinto(start * PAGE_SIZE, part)
            self.batch(block, numbers, _pages(part), named=start == 0)
            wrote(len(part))

    def some_pages(
        self,
        block: RamBlock,
        numbers: Addresses,
        readinto: Callable[[int, memoryview], None],
        wrote: Callable[[int], None],
    ) -> None:
        """`pages` for some of a block. :param numbers: of the pages, ascending."""
        buffer = memoryview(bytearray(min(BATCH, len(numbers)) * PAGE_SIZE))
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            part = buffer[: len(batch) * PAGE_SIZE]
            cuts = (np.flatnonzero(np.diff(batch) != 1) + 1).tolist()
            for first, end in zip([0, *cuts], [*cuts, len(batch)], strict=True):
                readinto(int(batch[first]) * PAGE_SIZE, part[first * PAGE_SIZE : end * PAGE_SIZE])
            self.batch(block, batch, _pages(part), named=start == 0)
            wrote(len(part))

    def batch(self, block: RamBlock, numbers: Addresses, batch: Pages, *, named: bool) -> None:
        """Records of up to `BATCH` pages, for the payload of a PART: zero ones after the others.

        :param numbers: of the pages. :param batch: uint8 (n, 4096). :param named: the first record names the block, as it
            must where the record before is of another.
        """
        addresses = numbers * PAGE_SIZE
        filled = np.bitwise_or.reduce(batch.view(np.uint64), axis=1) != 0
        if named:
            self._named(block, addresses[:1], batch[0], zero=not filled[0])
            batch, addresses, filled = batch[1:], addresses[1:], filled[1:]
        if filled.all():
            self._data_run(block, addresses, batch)
        else:
            self._data_run(block, addresses[filled], batch[filled])
            self._zero_run(block, addresses[~filled])

    def zeroes(self, block: RamBlock, numbers: Addresses, *, named: bool) -> None:
        """Records of up to `BATCH` zero pages; see `batch`."""
        addresses = numbers * PAGE_SIZE
        if named and len(addresses):
            self._sink.write(struct.pack(">Q", int(addresses[0]) | ZERO) + _name(block))
            self._wrote_records(block, addresses[:1], None)
            self._sink.write(b"\0")
            addresses = addresses[1:]
        self._zero_run(block, addresses)

    def end(self) -> None:
        """The end record of a START, PART or END."""
        self._sink.write(struct.pack(">Q", EOS))

    def _named(self, block: RamBlock, address: Addresses, page: Pages, *, zero: bool) -> None:
        """The record of one page that names the block."""
        self._sink.write(struct.pack(">Q", int(address[0]) | (ZERO if zero else PAGE)) + _name(block))
        self._wrote_records(block, address, None if zero else self._sink.offset)
        self._sink.write(b"\0" if zero else page.tobytes())

    def _data_run(self, block: RamBlock, addresses: Addresses, pages: Pages) -> None:
        count = len(addresses)
        if count:
            self._wrote_records(block, addresses, self._sink.offset + 8)
            records = np.frombuffer(self._sink.room(count * PAGE_RECORD), np.uint8).reshape(
                count, PAGE_RECORD
            )
            records[:, :8] = _words(addresses | (PAGE | CONTINUE))
            records[:, 8:] = pages

    def _zero_run(self, block: RamBlock, addresses: Addresses) -> None:
        count = len(addresses)
        if count:
            self._wrote_records(block, addresses, None)
            records = np.frombuffer(self._sink.room(count * ZERO_RECORD), np.uint8).reshape(
                count, ZERO_RECORD
            )
            records[:, :8] = _words(addresses | (ZERO | CONTINUE))
            records[:, 8] = 0


class RamReader:
    """Reads the payloads of one RAM section and tells the visitor of what they hold.

    :param blocks: of a section whose START has been read elsewhere.
    :param together: zero pages that lie between others do not part them: the visitor is told of up to a transfer's pages at once, a
        copy of them, and with no offset.
    """

    def __init__(
        self,
        source: StateSource,
        visitor: PageVisitor,
        blocks: Sequence[RamBlock] | None = None,
        *,
        together: bool = False,
    ) -> None:
        self._together = together
        self._source = source
        self._visitor = visitor
        self._blocks: dict[str, RamBlock] = {block.name: block for block in blocks or ()}
        self._listed = blocks is not None
        self._block: RamBlock | None = None

    @property
    def block_list(self) -> tuple[RamBlock, ...]:
        """The blocks, once START has been read."""
        return tuple(self._blocks.values())

    def payload(self) -> None:
        """One payload, to its end record.

        :raise StreamCorrupt: it holds what it must not. :raise StateMismatch: the visitor refused the blocks.
        """
        source = self._source
        while True:
            word = source.u64()
            flags = word & FLAGS
            kind = flags & ~CONTINUE
            if kind in (PAGE, ZERO):
                self._record(word, flags)
            elif flags == EOS:
                return
            elif flags == MEM_SIZE:
                self._read_block_list(word & ~FLAGS)
            elif flags != MULTIFD_FLUSH:
                raise self._unknown(flags)

    def _unknown(self, flags: int) -> Exception:
        for flag, what in _OTHER_RECORDS.items():
            if flags & flag:
                return self._source.corrupt(f"A {what} record, which savevm does not write")
        return self._source.corrupt(f"Unknown combination of migration flags: {flags:#x}")

    def _read_block_list(self, total: int) -> None:
        source = self._source
        if self._listed:
            raise source.corrupt("A second list of memory blocks")
        self._listed = True
        if total > _MAXIMUM_MEMORY:
            raise source.corrupt(f"{total} bytes of memory")
        while total:
            name = source.text(source.u8(), "a memory block")
            length = source.u64()
            if length == 0 or length % PAGE_SIZE or length > total:
                raise source.corrupt(f"Memory block '{name}' has {length} bytes of the remaining {total}")
            if name in self._blocks or len(self._blocks) == _MAXIMUM_BLOCKS:
                raise source.corrupt(f"One memory block too many: '{name}'")
            self._blocks[name] = RamBlock(name, length)
            total -= length
        self._visitor.blocks(self.block_list)

    def _record(self, word: int, flags: int) -> None:
        """One record whose word has been read, and with it all that follow it regularly."""
        source = self._source
        if not flags & CONTINUE:
            name = source.text(source.u8(), "a memory block")
            self._block = self._blocks.get(name)
            if self._block is None:
                raise source.corrupt(f"Unknown memory block '{name}'")
        block = self._block
        if block is None:
            raise source.corrupt("A page before any memory block was named")
        address = word & ~FLAGS
        if address >= block.length:
            raise source.corrupt(f"Page {address:#x} is beyond the end of memory block '{block.name}'")
        addresses = np.array([address], np.int64)
        if flags & PAGE:
            offset = source.offset
            page = np.frombuffer(source.take(PAGE_SIZE), np.uint8).reshape(1, PAGE_SIZE)
            self._visitor.pages(block, addresses, page, offset)
            self._mixed_runs(block) if self._together else self._page_runs(block)
        else:
            if fill := source.u8():
                raise source.corrupt(f"Found a zero page with value {fill}")
            self._visitor.zeroes(block, addresses)
            self._mixed_runs(block) if self._together else self._zero_runs(block)

    def _run(
        self, block: RamBlock, kind: int, size: int, most: int
    ) -> tuple[Addresses, memoryview, bool] | None:
        """The records at hand, `most` at most, up to the first that is not of `kind`; None if that is the
        next one.

        :return: their addresses, the bytes from the first on, and whether there may be more.
        """
        window = self._source.window(size)
        count = min(len(window) // size, most)
        if count == 0:
            return None
        words: npt.NDArray[np.uint64] = np.ndarray((count,), ">u8", window, strides=(size,)).astype(np.uint64)
        regular = ((words & np.uint64(FLAGS)) == kind | CONTINUE) & (words < np.uint64(block.length))
        more = bool(regular.all())
        if not more:
            words = words[: int(regular.argmin())]
            if len(words) == 0:
                return None
        return (words & np.uint64(~FLAGS & (1 << 64) - 1)).astype(np.int64), window, more

    def _page_runs(self, block: RamBlock) -> None:
        most = 1
        while (run := self._run(block, PAGE, PAGE_RECORD, most)) is not None:
            addresses, window, more = run
            count = len(addresses)
            pages: Pages = np.ndarray((count, PAGE_SIZE), np.uint8, window, 8, (PAGE_RECORD, 1))
            self._visitor.pages(block, addresses, pages, self._source.offset + 8)
            self._source.skip(count * PAGE_RECORD)
            if not more:
                return
            most *= 4

    def _mixed_runs(self, block: RamBlock) -> None:
        """Records of both kinds, up to the first that is irregular."""
        while taken := self._mixed_run(block):
            self._source.skip(taken)

    def _mixed_run(self, block: RamBlock) -> int:
        """Those at hand, of pages that differ from each other: of one that comes twice the order counts. :return: their bytes."""
        window = self._source.window(ZERO_RECORD)
        if len(window) < PAGE_RECORD and _word(window) & FLAGS == PAGE | CONTINUE:
            window = self._source.window(PAGE_RECORD)
        places: dict[int, int] = {}
        at, end = 0, len(window)
        while at + ZERO_RECORD <= end:
            word = _word(window, at)
            address, flags = word & ~FLAGS, word & FLAGS
            if address >= block.length or address in places:
                break
            if flags == PAGE | CONTINUE and at + PAGE_RECORD <= end:
                places[address] = at + 8
                at += PAGE_RECORD
            elif flags == ZERO | CONTINUE and not window[at + 8]:
                places[address] = -1
                at += ZERO_RECORD
            else:
                break
        if at:
            addresses = np.fromiter(places.keys(), np.int64, len(places))
            where = np.fromiter(places.values(), np.int64, len(places))
            filled = where >= 0
            if filled.any():
                every = np.lib.stride_tricks.sliding_window_view(np.frombuffer(window, np.uint8), PAGE_SIZE)
                self._visitor.pages(block, addresses[filled], every[where[filled]], -1)
            if not filled.all():
                self._visitor.zeroes(block, addresses[~filled])
        return at

    def _zero_runs(self, block: RamBlock) -> None:
        most = 1
        while (run := self._run(block, ZERO, ZERO_RECORD, most)) is not None:
            addresses, window, more = run
            count = len(addresses)
            fills = np.ndarray((count,), np.uint8, window, 8, (ZERO_RECORD,))
            if fills.any():
                raise self._source.corrupt(f"Found a zero page with value {int(fills.max())}")
            self._visitor.zeroes(block, addresses)
            self._source.skip(count * ZERO_RECORD)
            if not more:
                return
            most *= 4


def _pages(data: memoryview) -> Pages:
    return np.frombuffer(data, np.uint8).reshape(-1, PAGE_SIZE)


def _name(block: RamBlock) -> bytes:
    name = block.name.encode()
    return bytes((len(name),)) + name


def _word(data: memoryview, at: int = 0) -> int:
    """The eight bytes there; 0 where there are fewer."""
    found: int = _WORD.unpack_from(data, at)[0] if len(data) >= at + 8 else 0
    return found


def _words(values: Addresses) -> Pages:
    """Eight big-endian bytes a value: uint8 (n, 8)."""
    return values.astype(">u8").view(np.uint8).reshape(-1, 8)
