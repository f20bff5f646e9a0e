"""Which pages of guest memory changed since an instant.

    kernel   write-protection that the kernel lifts by itself and remembers (userfaultfd, asynchronous; PAGEMAP_SCAN): asking
             costs under a millisecond a GiB, a first store to a page some microseconds
    hashes   a hash of every page, kept from one instant to the next: the pages are read and hashed at every save. Its key is
             random, so that a guest cannot aim at two pages with one hash

A `Tracking` has one *ground*: the instant since which changes are asked for, a snapshot's. A save takes what has changed at its
own instant; whether that becomes the ground is known when the save has ended:

    since = tracking.take()       held: what has changed since the ground; later changes are counted apart
    tracking.stand(since)         the save is committed: its instant is the ground
    tracking.put_back(since)      it is not: the ground stays, and what was taken counts as changed again
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from stillframe.machine.frozen import FrozenMemory
from stillframe.machine.memory import HUGE_PAGE, PAGE_SIZE, GuestMemory, MemoryBlock, collapse
from stillframe.machine.userfault import (
    FEATURE_WP_ASYNC,
    FEATURE_WP_UNPOPULATED,
    MODE_WRITE_PROTECT,
    Pagemap,
    Userfaultfd,
)

PageNumbers = npt.NDArray[np.int64]
"""Ascending numbers of pages in their block."""

HashName = Literal["xxh3", "blake3"]

_DIGEST_BYTES = 16
_HASHED_AT_ONCE = 1 << 20
"""Bytes between two readings, each of which lets other threads have the interpreter."""


class Changes(ABC):
    """What a save has taken: the pages that changed between the ground and the save's instant."""

    @property
    def flags(self) -> "Mapping[str, npt.NDArray[np.bool_]] | None":
        """One a page, by the block's name; None where only reading the memory can tell."""
        return None

    @abstractmethod
    def pages(self, block: MemoryBlock, memory: FrozenMemory) -> PageNumbers:
        """Of one block. :param memory: the save's, by which a hash can be told. :raise IOFailed: see `FrozenMemory`."""


class Tracking(ABC):
    """See the module's text. `take` is called at a boundary; all calls come from one thread at a time."""

    how: str
    """"kernel", or the hash's name."""
    why: str
    """For hashes: why it is not the kernel; may be empty."""
    reads_memory: bool
    """Whether changes can be told only by reading all of the memory."""

    @abstractmethod
    def take(self) -> Changes: ...

    def changed(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        """At a boundary: what has changed since the ground, one flag a page; it still counts as changed.

        :raise RuntimeError: where only reading the memory can tell.
        """
        raise RuntimeError("What has changed is known only to a save")

    @abstractmethod
    def stand(self, changes: Changes) -> None: ...

    @abstractmethod
    def put_back(self, changes: Changes) -> None: ...

    @abstractmethod
    def stand_here(self) -> None:
        """The ground is this instant, after a load. Where only a save can tell, all pages count as changed until then."""

    def fold(self, block: MemoryBlock, offset: int) -> bool:
        """At a boundary: the small pages of `HUGE_PAGE` bytes become one; what has changed stays known.

        :return: whether they did. :raise OSError: and what has changed may not be known.
        """
        return collapse(block.host_address + offset)

    @abstractmethod
    def close(self) -> None:
        """Track no more; a second time, nothing."""


class TakenPages(Changes):
    """Pages that are known to have changed. :param flags: one a page, for some of the blocks."""

    def __init__(self, flags: Mapping[str, npt.NDArray[np.bool_]]) -> None:
        self._flags = flags

    @property
    def flags(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        return self._flags

    def pages(self, block: MemoryBlock, memory: FrozenMemory) -> PageNumbers:
        return np.flatnonzero(self._flags[block.name])


class KernelTracking(Tracking):
    """The kernel remembers. The ground is the moment of construction, at a boundary.

    :raise OSError: it cannot, or we may not ask it.
    """

    how = "kernel"
    why = ""
    reads_memory = False

    def __init__(self, memory: GuestMemory) -> None:
        self._blocks: Sequence[MemoryBlock] = [block for block in memory if block.size]
        self._pagemap = Pagemap()
        try:
            self._faults = Userfaultfd(FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)
        except OSError:
            self._pagemap.close()
            raise
        try:
            for block in self._blocks:
                self._faults.register(block.host_address, block.size, MODE_WRITE_PROTECT)
                self._pagemap.take_written(block.host_address, block.size)
        except OSError:
            self.close()
            raise
        self._changed = self._none()

    def _none(self) -> dict[str, npt.NDArray[np.bool_]]:
        return {block.name: np.zeros(block.size // PAGE_SIZE, np.bool_) for block in self._blocks}

    def _gather(self) -> None:
        for block in self._blocks:
            self._pagemap.mark_written(self._changed[block.name], block.host_address)

    def take(self) -> Changes:
        self._gather()
        taken, self._changed = self._changed, self._none()
        return TakenPages(taken)

    def changed(self) -> Mapping[str, npt.NDArray[np.bool_]]:
        for block in self._blocks:
            self._pagemap.see_written(self._changed[block.name], block.host_address)
        return self._changed

    def stand(self, changes: Changes) -> None:
        """What was counted apart since `take` is what has changed since the new ground."""

    def put_back(self, changes: Changes) -> None:
        if isinstance(changes, TakenPages):
            for name, flags in changes.flags.items():
                self._changed[name] |= flags

    def stand_here(self) -> None:
        self._gather()
        self._changed = self._none()

    def fold(self, block: MemoryBlock, offset: int) -> bool:
        address = block.host_address + offset
        first = offset // PAGE_SIZE
        self._pagemap.mark_written(self._changed[block.name][first : first + HUGE_PAGE // PAGE_SIZE], address)
        # The kernel puts no pages together that are protected.
        self._faults.unprotect(address, HUGE_PAGE)
        try:
            return super().fold(block, offset)
        finally:
            self._pagemap.take_written(address, HUGE_PAGE)

    def close(self) -> None:
        self._faults.close()
        self._pagemap.close()


class _Hashed(Changes):
    """What is found out by reading the save's memory, once."""

    def __init__(self, tracking: "HashTracking") -> None:
        self._tracking = tracking
        self.digests: dict[str, npt.NDArray[np.void]] = {}

    def pages(self, block: MemoryBlock, memory: FrozenMemory) -> PageNumbers:
        found = self.digests[block.name] = self._tracking.digests(block, memory)
        ground = self._tracking.ground.get(block.name)
        return np.arange(len(found)) if ground is None else np.flatnonzero(found != ground)


class HashTracking(Tracking):
    """Hashes of all pages; 16 bytes a page. There is no ground before the first save: all pages have changed.

    A call for each page, since a hash of many at once says which changed only where few did, and reading them costs as much. The
    interpreter is held for one piece at a time.

    :param algorithm: "xxh3", fast, keyed by a random secret; "blake3" for a guest that one has to fear.
    :param why: it is not the kernel that tells.
    """

    reads_memory = True

    def __init__(self, algorithm: HashName = "xxh3", why: str = "") -> None:
        self.how = algorithm
        self.why = why
        self.ground: Mapping[str, npt.NDArray[np.void]] = {}
        self._hash = _keyed_hash(algorithm)

    def digests(self, block: MemoryBlock, memory: FrozenMemory) -> npt.NDArray[np.void]:
        """One of 16 bytes for each page of a block."""
        one, found = self._hash, bytearray()
        buffer = memoryview(bytearray(min(_HASHED_AT_ONCE, block.size)))
        for start in range(0, block.size, max(1, len(buffer))):
            part = buffer[: block.size - start]
            memory.readinto(block, start, part)
            found += b"".join([one(part[page : page + PAGE_SIZE]) for page in range(0, len(part), PAGE_SIZE)])
        return np.frombuffer(bytes(found), np.dtype((np.void, _DIGEST_BYTES)))

    def take(self) -> Changes:
        return _Hashed(self)

    def stand(self, changes: Changes) -> None:
        if isinstance(changes, _Hashed):
            self.ground = changes.digests

    def put_back(self, changes: Changes) -> None:
        """The ground's hashes are as they were."""

    def stand_here(self) -> None:
        self.ground = {}

    def close(self) -> None:
        self.ground = {}


def _keyed_hash(algorithm: HashName) -> Callable[[memoryview], bytes]:
    """A hash of 16 bytes that nobody can know beforehand."""
    if algorithm == "blake3":
        from blake3 import blake3

        key = os.urandom(blake3.key_size)
        return lambda data: blake3(data, key=key).digest(_DIGEST_BYTES)
    from xxhash import xxh3_128_digest

    seed = int.from_bytes(os.urandom(8), "big")
    return lambda data: xxh3_128_digest(data, seed)


def track(memory: GuestMemory, algorithm: HashName = "xxh3") -> Tracking:
    """The way to find changes that this host has; the ground is this instant, at a boundary.

    :param algorithm: of the hashes that are used where the kernel does not remember.
    """
    try:
        return KernelTracking(memory)
    except OSError as error:
        return HashTracking(algorithm, f"the kernel does not tell what changes: {error.strerror}")
