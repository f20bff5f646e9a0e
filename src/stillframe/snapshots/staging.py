"""The memory of a snapshot, read in full while the guest still runs on its own; and the exchange of the
two."""

import mmap
from collections.abc import Sequence

import numpy as np

from stillframe.errors import Refused, StateMismatch
from stillframe.machine.memory import GuestMemory, MemoryBlock
from stillframe.vmstate.ram import PAGE_SIZE, Addresses, Pages, RamBlock

_BATCH = 256
"""Pages of one step of the exchange: a mebibyte."""


class _StagedBlock:
    """The bytes of one block; zero pages take no memory."""

    def __init__(self, block: MemoryBlock) -> None:
        self.block = block
        count = block.size // PAGE_SIZE
        self.pages: Pages = np.frombuffer(_anonymous(block.size), np.uint8).reshape(count, PAGE_SIZE)
        self.filled = np.zeros(count, np.bool_)

    def put(self, numbers: Addresses, pages: Pages) -> None:
        first, count = int(numbers[0]), len(numbers)
        if int(numbers[-1]) - first == count - 1 and (np.diff(numbers) == 1).all():
            self.pages[first : first + count] = pages
            self.filled[first : first + count] = True
        else:
            # Of a repeated index numpy keeps the last value, as the stream demands.
            self.pages[numbers] = pages
            self.filled[numbers] = True

    def clear(self, numbers: Addresses) -> None:
        again = numbers[self.filled[numbers]]
        self.pages[again] = 0
        self.filled[again] = False

    def exchange(self, start: int) -> None:
        """A batch of pages, from `start` on."""
        guest: Pages = np.frombuffer(self.block.view, np.uint8).reshape(-1, PAGE_SIZE)
        here = slice(start, start + _BATCH)
        old = guest[here].copy()
        old_filled = np.bitwise_or.reduce(old.view(np.uint64), axis=1) != 0
        either = old_filled | self.filled[here]
        if not either.any():
            return
        if either.all():
            guest[here] = self.pages[here]
            self.pages[here] = old
        else:
            touched = np.flatnonzero(either) + start
            # Both copies before the first byte changes: for want of memory, it is all of the batch or nothing.
            new, old = self.pages[touched], old[either]
            guest[touched] = new
            self.pages[touched] = old
        self.filled[here] = old_filled


class StagedMemory:
    """A visitor of a stream's page records that gathers them for a machine.

    :param memory: of the machine; it is not changed before `exchange`.
    """

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._staged: dict[str, _StagedBlock] = {}

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        """Compare the stream's memory with the machine's. :raise StateMismatch: they differ, by name and
        size."""
        ours = {block.name: block for block in self._memory}
        for block in blocks:
            here = ours.pop(block.name, None)
            if here is None:
                raise StateMismatch(
                    f'Unknown ramblock "{block.name}", cannot accept migration',
                    section="ram",
                    field=block.name,
                )
            if here.size != block.length:
                remedy = f"Start the machine with --memory {block.length >> 20}M." if here.is_ram else None
                raise StateMismatch(
                    f"Size mismatch: {block.name}: {block.length:#x} != {here.size:#x}",
                    section="ram",
                    field=block.name,
                    remedy=remedy,
                )
            try:
                self._staged[block.name] = _StagedBlock(here)
            except OSError as error:
                raise Refused(
                    f"The host gives no {here.size >> 20} MiB of memory to load '{block.name}' into: "
                    f"{error.strerror}"
                ) from error
        for name in ours:
            raise StateMismatch(
                f"The machine state has no memory block '{name}', which this machine has",
                section="ram",
                field=name,
            )

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        self._staged[block.name].put(addresses // PAGE_SIZE, pages)

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        self._staged[block.name].clear(addresses // PAGE_SIZE)

    def exchange(self) -> None:
        """Held: the machine gets this memory, and this gets the machine's. Done twice, all is as before.

        After an error all is as before, too.
        """
        done: list[tuple[_StagedBlock, int]] = []
        try:
            for staged in self._staged.values():
                for start in range(0, len(staged.filled), _BATCH):
                    staged.exchange(start)
                    done.append((staged, start))
        except BaseException:
            for staged, start in done:
                staged.exchange(start)
            raise
        finally:
            self._memory.replaced()


def _anonymous(size: int) -> mmap.mmap:
    return mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
