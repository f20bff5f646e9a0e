"""Back to a snapshot nearby: only the pages that differ from the machine's present memory are read and written.

Nearby is the snapshot that the machine stands on, and the one whose stream that one continues. Which pages differ is known without
looking at them: what has changed since (machine/tracking.py), and what the two page indexes give different records.

Pages that were read once are kept, `CACHE_BYTES` at most: who goes back to one snapshot again and again, as tests and fuzzers do,
mostly needs the same ones.
"""

from collections.abc import Callable, Mapping
from uuid import UUID

import numpy as np
import numpy.typing as npt

from stillframe.machine.memory import GuestMemory, MemoryBlock
from stillframe.vmstate.page_index import Offsets, PageIndex
from stillframe.vmstate.ram import PAGE_SIZE, Addresses, Pages

CACHE_BYTES = 64 << 20

_GAP = 32 << 10
"""Bytes between two pages of a stream that are read along rather than asked for apart."""
_READ_AT_ONCE = 4 << 20
_BATCH = 256
"""Pages that are exchanged at once: a mebibyte, which the processor's cache holds."""
_FLUSHED_BEYOND = 64
"""Runs of pages after which all translated code is given up, instead of that of each run."""

Flags = Mapping[str, npt.NDArray[np.bool_]]


class PageCache:
    """Pages of one snapshot."""

    def __init__(self) -> None:
        self._snapshot: UUID | None = None
        self._slots: dict[str, npt.NDArray[np.int32]] = {}
        self._pages: Pages = np.empty((0, PAGE_SIZE), np.uint8)
        self._used = 0

    def use_for(self, snapshot: UUID, index: PageIndex) -> None:
        """Forget the pages of any other snapshot."""
        if self._snapshot != snapshot:
            self._snapshot = snapshot
            self._slots = {name: np.full(len(where), -1, np.int32) for name, where in index.offsets.items()}
            self._used = 0

    def slots(self, block: str, numbers: Addresses) -> npt.NDArray[np.int32]:
        """Where these pages are kept; -1 for those that are not."""
        return self._slots[block][numbers]

    def kept(self, slots: npt.NDArray[np.int32]) -> Pages:
        """A copy of what is kept there."""
        return self._pages[slots]

    def keep(self, block: str, numbers: Addresses, pages: Pages) -> None:
        """As many of them as there is room for."""
        if not len(self._pages):
            self._pages = np.empty((CACHE_BYTES // PAGE_SIZE, PAGE_SIZE), np.uint8)
        count = min(len(numbers), len(self._pages) - self._used)
        self._pages[self._used : self._used + count] = pages[:count]
        self._slots[block][numbers[:count]] = np.arange(self._used, self._used + count, dtype=np.int32)
        self._used += count


class NearbyMemory:
    """The pages of a snapshot that differ from a machine's, to be exchanged with them.

    :param index: of the snapshot. :param differing: pages that differ already at the ground, besides those that changed since.
    :param read: of the snapshot's stream, offset and length.
    :param cache: of this snapshot's pages; None where they are wanted once.
    """

    def __init__(
        self,
        memory: GuestMemory,
        index: PageIndex,
        differing: Flags,
        read: Callable[[int, int], bytes],
        cache: PageCache | None,
    ) -> None:
        self._memory = memory
        self._index = index
        self._differing = differing
        self._read = read
        self._cache = cache
        self._staged: list[tuple[MemoryBlock, Addresses, Pages]] = []

    @property
    def index(self) -> PageIndex:
        """The snapshot's."""
        return self._index

    def stage(self, changed: Flags) -> None:
        """Held: read what differs. :param changed: since the ground. :raise IOFailed: nothing has changed."""
        for block in self._memory:
            if block.size:
                numbers = np.flatnonzero(self._differing[block.name] | changed[block.name])
                self._staged.append((block, numbers, self._pages(block.name, numbers)))

    def _pages(self, block: str, numbers: Addresses) -> Pages:
        if self._cache is None:
            return read_pages(self._read, self._index.offsets[block][numbers])
        slots = self._cache.slots(block, numbers)
        known = slots >= 0
        if known.all():
            return self._cache.kept(slots)
        pages = np.empty((len(numbers), PAGE_SIZE), np.uint8)
        pages[known] = self._cache.kept(slots[known])
        missing = np.flatnonzero(~known)
        read = read_pages(self._read, self._index.offsets[block][numbers[missing]])
        pages[missing] = read
        self._cache.keep(block, numbers[missing], read)
        return pages

    def exchange(self) -> None:
        """Held: the machine gets these pages, and this gets the machine's. Done twice, all is as before."""
        room: Pages = np.empty((_BATCH, PAGE_SIZE), np.uint8)
        done: list[tuple[Pages, Addresses, Pages]] = []
        try:
            for block, numbers, pages in self._staged:
                guest: Pages = np.frombuffer(block.view, np.uint8).reshape(-1, PAGE_SIZE)
                for start in range(0, len(numbers), _BATCH):
                    here = slice(start, start + _BATCH)
                    _exchange(guest, numbers[here], pages[here], room)
                    done.append((guest, numbers[here], pages[here]))
        except BaseException:
            for batch in done:
                _exchange(*batch, room)
            raise
        finally:
            self._invalidate()

    def _invalidate(self) -> None:
        runs: list[tuple[int, int]] = []
        for block, numbers, _ in self._staged:
            cuts = np.flatnonzero(np.diff(numbers) != 1) + 1
            if len(runs) + len(cuts) >= _FLUSHED_BEYOND:
                self._memory.replaced()
                return
            for part in np.split(numbers, cuts) if len(numbers) else ():
                runs.append((block.base + int(part[0]) * PAGE_SIZE, len(part) * PAGE_SIZE))
        for address, length in runs:
            self._memory.invalidate(address, length)


def _exchange(guest: Pages, numbers: Addresses, pages: Pages, room: Pages) -> None:
    """These pages of the guest's with those; takes no memory. :param room: for at least as many."""
    old = room[: len(numbers)]
    np.take(guest, numbers, axis=0, out=old, mode="clip")
    guest[numbers] = pages
    pages[:] = old


def read_pages(read: Callable[[int, int], bytes], offsets: Offsets) -> Pages:
    """Pages of a stream, in the order of `offsets`; a negative one stands for zeroes."""
    pages = np.zeros((len(offsets), PAGE_SIZE), np.uint8)
    order = np.argsort(offsets, kind="stable")
    order = order[np.searchsorted(offsets[order], 0) :]
    where = offsets[order]
    start = 0
    # Where the next page is too far away to be read along.
    ends = [*(np.flatnonzero(np.diff(where) > _GAP + PAGE_SIZE) + 1).tolist(), len(order)]
    while start < len(order):
        end = ends[0]
        if int(where[end - 1]) - int(where[start]) > _READ_AT_ONCE:
            end = int(np.searchsorted(where, where[start] + _READ_AT_ONCE))
        else:
            ends.pop(0)
        base = int(where[start])
        if end == start + 1:
            pages[order[start]] = np.frombuffer(read(base, PAGE_SIZE), np.uint8)
            start = end
            continue
        piece = np.frombuffer(read(base, int(where[end - 1]) - base + PAGE_SIZE), np.uint8)
        view: Pages = np.lib.stride_tricks.sliding_window_view(piece, PAGE_SIZE)
        pages[order[start:end]] = view[where[start:end] - base]
        start = end
    return pages
