"""Guest memory of one instant, readable while the guest goes on.

    forked   a child process is forked at the instant and does nothing: its address space is the copy, made by the kernel page
             by page as the guest writes. We read it with process_vm_readv. The pause is the copying of the page tables, a
             store of the guest that meets a page for the first time takes microseconds, and no thread of ours serves it.
    copied   where that is not to be had (no memory promised for a second process, a sandbox without process_vm_readv), all
             bytes are copied during the pause. `FrozenMemory.how` and `why` say which it was.

Beyond the guest's own memory, forked needs what the guest writes before the copy is closed, copied needs all that is not zero.
The child holds no descriptor but one end of a pipe, and ends when that closes: with the copy, or with us, however we die. That it
has let go of all others (an image's locks among them) is waited for at the first read, when the guest runs again.
"""

import ctypes
import errno
import logging
import mmap
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from stillframe.errors import IOFailed, Refused
from stillframe.machine.child import fork_child, wait_for_child
from stillframe.machine.libc import LIBC
from stillframe.machine.memory import GuestMemory, MemoryBlock

_log = logging.getLogger(__name__)

How = Literal["forked", "copied"]

_COPIED_AT_ONCE = 1 << 20
_ZEROES = bytes(_COPIED_AT_ONCE)


class FrozenMemory(ABC):
    """All blocks of a machine's memory as they were at one instant.

    :ivar how: which way it is kept. :ivar why: for a copied one, why it is not forked.
    """

    how: How
    why: str = ""

    @abstractmethod
    def readinto(self, block: MemoryBlock, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the block's bytes from `offset` on; for one thread at a time.

        :raise IOFailed: what held the copy is gone.
        """

    @abstractmethod
    def release(self) -> None:
        """Nothing more will be read: begin to give it back, which `close` ends. A second time, nothing."""

    @abstractmethod
    def close(self) -> None:
        """Give it back; a second time, nothing."""


class _Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class ForkedMemory(FrozenMemory):
    """A child process as the copy. Made at a boundary, when no device is at work on memory.

    :raise OSError: the host does not fork, or does not let us read the child.
    """

    how: How = "forked"

    def __init__(self, memory: GuestMemory) -> None:
        self._readv = _process_vm_readv()
        reader, self._writer = os.pipe()
        self._let_go, held = os.pipe()
        try:
            self._pid = fork_child(lambda: _sleep(reader), (reader,))
        except BaseException:
            os.close(self._writer)
            os.close(self._let_go)
            raise
        finally:
            os.close(reader)
            os.close(held)
        try:
            probe = memoryview(bytearray(8))
            for block in memory:
                self._read(block.host_address, probe[: block.size])
        except BaseException:
            self.close()
            raise

    def readinto(self, block: MemoryBlock, offset: int, buffer: memoryview) -> None:
        if not 0 <= offset <= block.size - len(buffer):
            raise ValueError(f"{len(buffer)} bytes at {offset} lie outside of memory block '{block.name}'")
        self._wait_until_let_go()
        try:
            self._read(block.host_address + offset, buffer)
        except OSError as error:
            raise IOFailed(
                f"The process that keeps the memory of the instant of the snapshot is gone: {error.strerror}",
                errno=error.errno or errno.EIO,
                remedy="See whether the host ran out of memory (dmesg), then save again.",
            ) from error

    def _wait_until_let_go(self) -> None:
        """Ends with the child's closing of what it inherited, or with its death."""
        if self._let_go >= 0:
            os.read(self._let_go, 1)
            os.close(self._let_go)
            self._let_go = -1

    def _read(self, address: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            here = ctypes.addressof(ctypes.c_char.from_buffer(buffer, done))
            local, remote = _Iovec(here, len(buffer) - done), _Iovec(address + done, len(buffer) - done)
            count = self._readv(self._pid, ctypes.byref(local), 1, ctypes.byref(remote), 1, 0)
            if count <= 0:
                code = ctypes.get_errno() if count else errno.EFAULT
                raise OSError(code, os.strerror(code))
            done += count

    def release(self) -> None:
        if self._writer < 0:
            return
        os.close(self._writer)
        self._writer = -1

    def close(self) -> None:
        if self._pid < 0:
            return
        self.release()
        self._wait_until_let_go()
        wait_for_child(self._pid)
        self._pid = -1


class CopiedMemory(FrozenMemory):
    """A copy in our own memory; zeroes take none of it.

    :param why: what stands against forking. :raise Refused: the host has no room for the copy.
    """

    how: How = "copied"

    def __init__(self, memory: GuestMemory, why: str) -> None:
        self.why = why
        self._copies: dict[str, mmap.mmap] = {}
        for block in memory:
            if block.size == 0:
                continue
            try:
                copy = mmap.mmap(-1, block.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except OSError as error:
                raise Refused(
                    f"The host gives no {block.size >> 20} MiB for a copy of '{block.name}': {error.strerror}"
                ) from error
            self._copies[block.name] = copy
            for start in range(0, block.size, _COPIED_AT_ONCE):
                part = block.view[start : start + _COPIED_AT_ONCE]
                if part != _ZEROES[: len(part)]:
                    copy[start : start + len(part)] = part

    def readinto(self, block: MemoryBlock, offset: int, buffer: memoryview) -> None:
        buffer[:] = memoryview(self._copies[block.name])[offset : offset + len(buffer)]

    def release(self) -> None:
        self._copies.clear()

    def close(self) -> None:
        self.release()


@contextmanager
def frozen(memory: GuestMemory) -> Iterator["Freezer"]:
    """Room for a copy that ends with the block; `Freezer.freeze` makes it."""
    freezer = Freezer(memory)
    try:
        yield freezer
    finally:
        freezer.close()


class Freezer:
    """Made by `frozen`."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self._frozen: FrozenMemory | None = None

    @property
    def copy(self) -> FrozenMemory:
        """What `freeze` made. :raise RuntimeError: it was not called."""
        if self._frozen is None:
            raise RuntimeError("The memory has not been frozen")
        return self._frozen

    def freeze(self) -> FrozenMemory:
        """Take the copy; the caller holds the machine.

        :raise Refused: the host has no memory for one. Nothing has changed.
        """
        self._frozen = freeze(self._memory)
        return self._frozen

    def release(self) -> None:
        """See `FrozenMemory`: a process takes tens of milliseconds to end, in which the caller does something else."""
        self.copy.release()

    def close(self) -> None:
        """Give the copy back."""
        if self._frozen is not None:
            self._frozen.close()


def freeze(memory: GuestMemory) -> FrozenMemory:
    """A copy of this instant, the cheaper way that the host has; the caller holds the machine, and closes the copy."""
    try:
        return ForkedMemory(memory)
    except OSError as error:
        why = f"no second process can hold the memory ({error.strerror})"
    _log.warning("The guest stands still while its memory is copied: %s", why)
    return CopiedMemory(memory, why)


def _process_vm_readv() -> "ctypes._NamedFuncPointer":
    try:
        function = LIBC.process_vm_readv
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    function.restype = ctypes.c_ssize_t
    return function


def _sleep(reader: int) -> None:
    """In the child: until the other end closes."""
    os.read(reader, 1)
