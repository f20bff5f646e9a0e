"""Guest memory put back into huge pages, before a fork has to copy what maps each small one.

The kernel maps a huge page as 512 small ones as soon as one of them is written that is protected (tracking.py) or kept for a save
(frozen.py), and pages that came one by one (arriving.py) are small from the start. A fork copies an entry for each, and the guest
stands still for it. So while the guest still runs its pages are put together again, some at each boundary. On a shared host of two
cores, memory that was written all over:

    memory     a fork, small pages     huge pages    putting together, all of it    the longest of 2 MiB
    192 MiB    4.5 ms                  0.75 ms       27 ms                          5 ms (median 0.17)
    800 MiB    13 ms                   0.96 ms       76 ms                          5 ms (median 0.17)
"""

import logging
import time
from collections.abc import Callable
from functools import partial

import numpy as np

from stillframe.machine.memory import HUGE_PAGE, PAGE_SIZE, GuestMemory, MemoryBlock
from stillframe.machine.tracking import Tracking
from stillframe.machine.userfault import Pagemap

_log = logging.getLogger(__name__)

_AT_LEAST = HUGE_PAGE // PAGE_SIZE // 2
"""Small pages that have to be there: a huge page takes the memory of all 512."""
CHEAP_PAGES = 64 << 10
"""Small pages that a fork copies in 4 ms: a guest with no more is left in peace, and its save is not made longer."""
_AT_ONCE = 0.001
"""Seconds of one boundary."""
_ALTOGETHER = 0.5
"""Seconds that the guest stands still for it, 1 ms at a time, before one save; the next save goes on. Pages that came from a file
take 1 ms each huge page, five times as long as those that were huge before: after a lazy load of 800 MiB it was 0.43 s, and the
fork took 4 ms instead of 20."""
_TOO_LONG = 0.02
"""Seconds for one huge page: a host that needs as long has none to spare, and is asked no more."""


def fold(
    memory: GuestMemory,
    tracking: Tracking,
    at_boundary: Callable[[Callable[[], float | None]], float | None],
    cheap: int = CHEAP_PAGES,
) -> None:
    """Make the next fork cheap; a host without huge pages, or without any left, leaves all as it is.

    :param tracking: what watches `memory`; it forgets nothing. :param at_boundary: calls while the guest stands still.
    :param cheap: small pages up to which nothing is done.
    :raise OSError: from `tracking`; what has changed may not be known.
    """
    try:
        pagemap = Pagemap()
    except OSError:
        return
    try:
        try:
            found = [(block, *scattered(block.host_address, block.size, pagemap)) for block in memory]
        except OSError as error:
            _log.info("Memory stays in small pages: %s", error.strerror)
            return
        if sum(count for _, _, count in found) <= cheap:
            return
        left = _ALTOGETHER
        for block, addresses, _ in found:
            while addresses and left > 0:
                took = at_boundary(partial(_some, block, addresses, tracking))
                if took is None:
                    return
                left -= took
    finally:
        pagemap.close()


def scattered(start: int, length: int, pagemap: Pagemap) -> tuple[list[int], int]:
    """Addresses at which a huge page is worth its while, and how many small ones they would replace.

    :param start: where such a page may begin; an address of the pagemap's process. :param length: bytes from there on.
    :raise OSError: the kernel does not tell.
    """
    whole = length - length % HUGE_PAGE
    small = np.zeros(whole // PAGE_SIZE, np.bool_)
    pagemap.mark_small(small, start)
    counts = small.reshape(-1, HUGE_PAGE // PAGE_SIZE).sum(axis=1)
    worth = np.flatnonzero(counts >= _AT_LEAST)
    return (start + worth * HUGE_PAGE).tolist(), int(counts[worth].sum())


def _some(block: MemoryBlock, addresses: list[int], tracking: Tracking) -> float | None:
    """At a boundary: as many as there is time for. :return: seconds that it took; None where it is not worth going on."""
    begun = before = time.monotonic()
    while addresses and before - begun < _AT_ONCE:
        done = tracking.fold(block, addresses.pop() - block.host_address)
        after = time.monotonic()
        if not done or after - before > _TOO_LONG:
            return None
        before = after
    return before - begun
