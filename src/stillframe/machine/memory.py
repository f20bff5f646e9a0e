"""Guest memory: RAM and flash as named blocks, and the one place through which devices write RAM.

    guest-physical            host
    0x20000000  virt.flash0   one anonymous private mapping each, at `MemoryBlock.host_address`
    0x22000000  virt.flash1
    0x80000000  riscv_virt_board.ram

A store of the guest goes straight into the mapping. Whatever else changes a block calls `GuestMemory.write` (a device, at a
boundary), or fills the blocks' views and then calls `replaced` (a load): both tell the engine that translated code may be
stale, and `before_write` hears of every range before it changes.
"""

import contextlib
import ctypes
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from stillframe.machine.libc import LIBC, last_error

PAGE_SIZE = 4096

HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_MADV_COLLAPSE = 25
_madvise = LIBC.madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


@dataclass(frozen=True, slots=True, eq=False)
class MemoryBlock:
    """A contiguous piece of guest memory with a name, as QEMU's RAMBlock.

    :param name: as in the machine-state stream. :param base: its guest-physical address. :param size: bytes, whole pages.
    :param view: all of its bytes, writable. :param host_address: of the first byte, aligned to a huge page.
    :param is_ram: devices and the guest may write anywhere in it; false for flash, whose device decides.
    """

    name: str
    base: int
    size: int
    is_ram: bool
    view: memoryview = field(repr=False)
    host_address: int = field(repr=False)

    @classmethod
    def allocate(cls, name: str, base: int, size: int, *, is_ram: bool) -> "MemoryBlock":
        """Map `size` bytes of zeroes; no memory is used before it is touched."""
        mapping, offset, address = aligned_mapping(size)
        # Fewer page tables: what a fork copies while the guest stands still (frozen.py). A kernel without them ignores it.
        with contextlib.suppress(OSError):
            mapping.madvise(_MADV_HUGEPAGE)
        return cls(name, base, size, is_ram, memoryview(mapping)[offset : offset + size], address)


def aligned_mapping(size: int) -> tuple[mmap.mmap, int, int]:
    """Room for `size` bytes that begins where a huge page does, and takes no memory before it is touched.

    :return: the mapping, where in it the room begins, and the host's address of that. :raise OSError: there is none.
    """
    mapping = mmap.mmap(
        -1,
        size + HUGE_PAGE,
        flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000),
    )
    start = ctypes.addressof(ctypes.c_uint8.from_buffer(mapping))
    offset = -start % HUGE_PAGE
    return mapping, offset, start + offset


def advise(address: int, length: int, advice: int) -> None:
    """madvise. :param address: of the host. :raise OSError: the kernel does not do it."""
    if _madvise(address, length, advice):
        raise last_error()


def collapse(address: int) -> bool:
    """Put the small pages of `HUGE_PAGE` bytes into one huge page; their content stays. :return: whether the host did."""
    try:
        advise(address, HUGE_PAGE, _MADV_COLLAPSE)
    except OSError:
        return False
    return True


class GuestMemory:
    """The blocks of one machine, by guest-physical address."""

    def __init__(self, blocks: tuple[MemoryBlock, ...] = ()) -> None:
        self.blocks = blocks
        self.before_write: Callable[[MemoryBlock, int, int], None] | None = None
        """Called with block, offset and length before a device changes RAM; write tracking hangs here."""
        self.is_whole: Callable[[], bool] = lambda: True
        """Whether what was read until now is what the memory holds; not, where memory that is still to come can come no more."""
        self.invalidate: Callable[[int, int], None] = lambda address, length: None
        """Set by the engine: translated code of this guest-physical range is stale."""
        self.invalidate_all: Callable[[], None] = lambda: None
        """Set by the engine: all translated code and address translations are stale."""

    @property
    def size(self) -> int:
        """Bytes of RAM; flash does not count."""
        return sum(block.size for block in self.blocks if block.is_ram)

    def __iter__(self) -> Iterator[MemoryBlock]:
        return iter(self.blocks)

    def block(self, name: str) -> MemoryBlock | None:
        """The block of that name."""
        return next((block for block in self.blocks if block.name == name), None)

    def _locate(self, address: int, length: int) -> tuple[MemoryBlock, int] | None:
        for block in self.blocks:
            offset = address - block.base
            if block.is_ram and offset >= 0 and length >= 0 and offset + length <= block.size:
                return block, offset
        return None

    def view(self, address: int, length: int) -> memoryview | None:
        """RAM bytes to look at, not to change; None where the range is not wholly RAM."""
        place = self._locate(address, length)
        if place is None:
            return None
        block, offset = place
        return block.view[offset : offset + length]

    def read(self, address: int, length: int) -> bytes | None:
        """A copy of RAM bytes; None where the range is not wholly RAM."""
        view = self.view(address, length)
        return None if view is None else bytes(view)

    def write(self, address: int, data: bytes | bytearray | memoryview) -> bool:
        """Change RAM as a device does. Only at a boundary, or inside the guest's own access to a device.

        :return: False where the range is not wholly RAM; nothing was written.
        """
        place = self._locate(address, len(data))
        if place is None:
            return False
        block, offset = place
        if self.before_write is not None:
            self.before_write(block, offset, len(data))
        block.view[offset : offset + len(data)] = data
        self.invalidate(address, len(data))
        return True

    def replaced(self) -> None:
        """The bytes of whole blocks were exchanged through their views, as a load does."""
        self.invalidate_all()
