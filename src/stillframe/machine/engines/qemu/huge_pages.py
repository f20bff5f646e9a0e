"""A QEMU's guest memory put back into huge pages, before a save that has to protect all of it.

QEMU reads a byte of every page and then protects every page while its guest stands still: 512 times the work where a huge page has
become small ones. It becomes that in every save (the protection is taken off piece by piece) and in every load by page fault.

Linux does it for another process since 6.1, and tells which pages are small since 6.7; it wants CAP_SYS_NICE. Memory that QEMU
shares with others, or has from a file, is left as it is.
"""

import ctypes
import errno
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from stillframe.machine.folding import scattered
from stillframe.machine.libc import LIBC, last_error
from stillframe.machine.memory import HUGE_PAGE
from stillframe.machine.userfault import Pagemap

_PIDFD_OPEN: Final = 434
_PROCESS_MADVISE: Final = 440
_MADV_COLLAPSE: Final = 25
_HOPELESS: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.ESRCH, errno.ENOMEM})
"""What is true of every page: not allowed, not known, no process any more, no huge page left. Others: this one is in use."""

_ALTOGETHER: Final = 2.0
"""Seconds before one save, in which the guest runs; the next save goes on. A GiB takes 0.1, one that came page by page 0.5."""
_TOO_LONG: Final = 0.05
"""Seconds for one huge page, for which a guest that needs it waits: such a host has none to spare, and is asked no more."""

_MAPPING: Final = re.compile(rb"([0-9a-f]+)-([0-9a-f]+) (....) [0-9a-f]+ \S+ (\d+)")


class _Range(ctypes.Structure):
    """The kernel's iovec."""

    _fields_ = (("start", ctypes.c_size_t), ("length", ctypes.c_size_t))


def fold_other(pid: int, attend: Callable[[], None]) -> None:
    """Make the pause of the next save short.

    :param pid: a process of ours. :param attend: called now and then; what it raises ends this.
    :raise OSError: the kernel does not let us, or there is no such process any more; memory is what it was.
    """
    deadline = time.monotonic() + _ALTOGETHER
    # Python has a name for it only where it was built with headers that are new enough.
    process = LIBC.syscall(_PIDFD_OPEN, pid, 0)
    if process < 0:
        raise last_error()
    try:
        # Nothing yet: it is much work to find out where, for one who may not.
        _advise(process, None)
        for start, length in _wants_huge_pages(pid):
            for address in _worth(pid, start, length):
                attend()
                begun = time.monotonic()
                if begun > deadline:
                    return
                _advise(process, _Range(address, HUGE_PAGE))
                if time.monotonic() - begun > _TOO_LONG:
                    return
    finally:
        os.close(process)


def _worth(pid: int, start: int, length: int) -> list[int]:
    pagemap = Pagemap(pid)
    try:
        addresses, _ = scattered(start, length, pagemap)
    finally:
        pagemap.close()
    return addresses


def _wants_huge_pages(pid: int) -> Iterator[tuple[int, int]]:
    """Address and bytes of private data, from no file, that is to have huge pages: QEMU tells the kernel so of its RAM."""
    mapping: tuple[int, int] | None = None
    with Path(f"/proc/{pid}/smaps").open("rb") as lines:
        for line in lines:
            if found := _MAPPING.match(line):
                first, end = int(found[1], 16), int(found[2], 16)
                # Translated code is in such a mapping, too.
                mapping = (first, end) if found[3] == b"rw-p" and found[4] == b"0" else None
            elif mapping is not None and line.startswith(b"VmFlags:") and b" hg" in line:
                first = -(-mapping[0] // HUGE_PAGE) * HUGE_PAGE
                if (length := mapping[1] - first) >= HUGE_PAGE:
                    yield first, length


def _advise(process: int, where: _Range | None) -> None:
    """Have one huge page, if the kernel can; where None is given, only ask. :raise OSError: it need not be asked for another."""
    count = 0 if where is None else 1
    address = None if where is None else ctypes.byref(where)
    if LIBC.syscall(_PROCESS_MADVISE, process, address, count, _MADV_COLLAPSE, 0) < 0:
        error = last_error()
        if error.errno in _HOPELESS:
            raise error
