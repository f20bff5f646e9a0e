"""userfaultfd and PAGEMAP_SCAN, as far as memory of ours needs them: the only room that knows their numbers.

    Userfaultfd    ranges of our address space of which the kernel tells who touches them
    Pagemap        which pages of a range were written since they were last protected

Every privilege is tried, the larger first: /dev/userfaultfd, the system call, the system call for user mode only. The last works
for any user, and covers what threads of ours do to memory themselves; a system call into a missing page then fails (EFAULT).
"""

import ctypes
import errno
import fcntl
import os
import platform
import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from stillframe.machine.libc import LIBC, last_error
from stillframe.machine.memory import PAGE_SIZE

_SYSTEM_CALL = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
_USER_MODE_ONLY = 1
_DEVICE_NEW = 0xAA00
_API_NUMBER = 0xAA
_API = 0xC018AA3F
_REGISTER = 0xC020AA00
_WAKE = 0x8010AA02
_COPY = 0xC028AA03
_ZEROPAGE = 0xC020AA04
_WRITE_PROTECT = 0xC018AA06
_PAGEMAP_SCAN = 0xC0606610
_COPY_WRITE_PROTECTED = 2
_EVENT_PAGEFAULT = 0x12
_MESSAGE = struct.Struct("=B7xQQ8x")
_MESSAGES_AT_ONCE = 64

FEATURE_WP_UNPOPULATED = 1 << 13
FEATURE_WP_ASYNC = 1 << 15

MODE_MISSING, MODE_WRITE_PROTECT = 1, 2

_PAGE_IS_WRITTEN, _PAGE_IS_PRESENT, _PAGE_IS_SWAPPED = 1 << 1, 1 << 3, 1 << 4
_PAGE_IS_ZERO, _PAGE_IS_HUGE = 1 << 5, 1 << 6
_SCAN_WRITE_PROTECT, _SCAN_CHECK_ASYNC = 1, 2
_RANGES_AT_ONCE = 4096

Ranges = npt.NDArray[np.uint64]
"""Shape (n, 2): first address and the one behind the last."""


class _Copy(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copied", ctypes.c_int64),
    )


class _Zero(ctypes.Structure):
    _fields_ = (
        ("address", ctypes.c_uint64),
        ("length", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("copied", ctypes.c_int64),
    )


_ioctl = LIBC.ioctl
_ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)


class Userfaultfd:
    """One descriptor. :param features: that the kernel must have. :raise OSError: it has not, or we may not."""

    def __init__(self, features: int) -> None:
        self.fd = -1
        last = OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        for fd in _ways():
            if isinstance(fd, OSError):
                last = fd
                continue
            try:
                fcntl.ioctl(fd, _API, bytearray(struct.pack("=QQQ", _API_NUMBER, features, 0)))
            except OSError as error:
                os.close(fd)
                last = error
                continue
            self.fd = fd
            return
        raise last

    def register(self, start: int, length: int, mode: int) -> None:
        """Watch a range of whole pages. :raise OSError: somebody does already, or it is not ours."""
        fcntl.ioctl(self.fd, _REGISTER, bytearray(struct.pack("=QQQQ", start, length, mode, 0)))

    def unprotect(self, start: int, length: int) -> None:
        """Let whole pages of a watched range be written without a note of it, until `Pagemap.take_written`."""
        fcntl.ioctl(self.fd, _WRITE_PROTECT, bytearray(struct.pack("=QQQ", start, length, 0)))

    def faults(self) -> list[int]:
        """The addresses that threads wait for, each for a missing page; empty if none does now."""
        try:
            data = os.read(self.fd, _MESSAGES_AT_ONCE * _MESSAGE.size)
        except BlockingIOError:
            return []
        return [address for event, _, address in _MESSAGE.iter_unpack(data) if event == _EVENT_PAGEFAULT]

    def fill(self, address: int, source: int, length: int) -> None:
        """Make missing pages these, write-protected, and wake who waits for them; pages that are there stay what they are.

        :param source: address of the bytes, in this process. :raise OSError: the memory is gone, or no longer watched.
        """
        done = 0
        while done < length:
            asked = _Copy(address + done, source + done, length - done, _COPY_WRITE_PROTECTED, 0)
            done += self._filled(_COPY, asked, address + done)

    def fill_with_zeroes(self, address: int, length: int) -> None:
        """`fill` with zeroes, which take no memory."""
        done = 0
        while done < length:
            asked = _Zero(address + done, length - done, 0, 0)
            done += self._filled(_ZEROPAGE, asked, address + done)

    def _filled(self, request: int, asked: "_Copy | _Zero", address: int) -> int:
        """:return: bytes to go on behind."""
        result = _ioctl(self.fd, request, ctypes.byref(asked))
        code = ctypes.get_errno()
        count = int(asked.copied)
        if count > 0:
            return count
        if result == 0:
            return int(asked.length)
        if count == -errno.EEXIST or code == errno.EEXIST:
            fcntl.ioctl(self.fd, _WAKE, struct.pack("=QQ", address, PAGE_SIZE))
            return PAGE_SIZE
        if code == errno.EAGAIN:
            return 0
        raise OSError(code, os.strerror(code))

    def close(self) -> None:
        """Watch nothing any more; a second time, nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _ways() -> "Iterator[int | OSError]":
    """Descriptors, the larger privilege first, and what stands against one."""
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            yield fcntl.ioctl(device, _DEVICE_NEW, os.O_CLOEXEC | os.O_NONBLOCK)
        finally:
            os.close(device)
    except OSError as error:
        yield error
    number = _SYSTEM_CALL.get(platform.machine())
    if number is None:
        return
    for flags in (0, _USER_MODE_ONLY):
        fd = LIBC.syscall(number, os.O_CLOEXEC | os.O_NONBLOCK | flags)
        yield fd if fd >= 0 else last_error()


class _ScanArguments(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "size",
            "flags",
            "start",
            "end",
            "walk_end",
            "vec",
            "vec_len",
            "max_pages",
            "category_inverted",
            "category_mask",
            "category_anyof_mask",
            "return_mask",
        )
    )


class Pagemap:
    """The page tables of a process, asked.

    :param pid: ours if left out; of another, nothing about writes is to be asked. :raise OSError: the kernel does not show them.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._fd = os.open(f"/proc/{'self' if pid is None else pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        self._found = (ctypes.c_uint64 * (3 * _RANGES_AT_ONCE))()

    def take_written(self, start: int, length: int, *, filled: bool = False) -> Ranges:
        """What was written in a range since it was last asked for, and from here on it is asked for anew: in one step.

        The range is registered with `FEATURE_WP_ASYNC`. The first time, everything that was ever touched.

        :param filled: leave out what is still zero because nothing was ever put there.
        :raise OSError: the kernel knows no such question (before Linux 6.7).
        """
        return self._scan(
            start,
            length,
            flags=_SCAN_WRITE_PROTECT | _SCAN_CHECK_ASYNC,
            category_inverted=_PAGE_IS_ZERO if filled else 0,
            category_mask=_PAGE_IS_WRITTEN | (_PAGE_IS_ZERO if filled else 0),
            category_anyof_mask=_PAGE_IS_PRESENT | _PAGE_IS_SWAPPED if filled else 0,
            return_mask=_PAGE_IS_WRITTEN,
        )

    def _scan(self, start: int, length: int, **how: int) -> Ranges:
        """:param how: the kernel's fields of that name."""
        end = start + length
        parts: list[Ranges] = []
        while start < end:
            asked = _ScanArguments(
                size=ctypes.sizeof(_ScanArguments),
                start=start,
                end=end,
                vec=ctypes.addressof(self._found),
                vec_len=_RANGES_AT_ONCE,
                **how,
            )
            count = fcntl.ioctl(self._fd, _PAGEMAP_SCAN, asked)
            found = np.frombuffer(memoryview(self._found).cast("B"), np.uint64, 3 * count)
            parts.append(found.reshape(-1, 3)[:, :2].copy())
            start = int(asked.walk_end)
        return np.concatenate(parts) if parts else np.zeros((0, 2), np.uint64)

    def mark_written(self, flags: npt.NDArray[np.bool_], start: int, *, filled: bool = False) -> None:
        """`take_written` of as many pages as there are flags: each that was written gets its flag, no flag goes."""
        _mark(flags, start, self.take_written(start, len(flags) * PAGE_SIZE, filled=filled))

    def see_written(self, flags: npt.NDArray[np.bool_], start: int) -> None:
        """`mark_written`, but what was written stays so: the next one finds it again."""
        found = self._scan(
            start,
            len(flags) * PAGE_SIZE,
            flags=_SCAN_CHECK_ASYNC,
            category_mask=_PAGE_IS_WRITTEN,
            return_mask=_PAGE_IS_WRITTEN,
        )
        _mark(flags, start, found)

    def mark_small(self, flags: npt.NDArray[np.bool_], start: int) -> None:
        """Each page that has memory of its own and is no part of a huge one gets its flag. :raise OSError: as `take_written`."""
        found = self._scan(
            start,
            len(flags) * PAGE_SIZE,
            category_inverted=_PAGE_IS_HUGE | _PAGE_IS_ZERO,
            category_mask=_PAGE_IS_PRESENT | _PAGE_IS_HUGE | _PAGE_IS_ZERO,
            return_mask=_PAGE_IS_PRESENT,
        )
        _mark(flags, start, found)

    def close(self) -> None:
        """Ask no more; a second time, nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _mark(flags: npt.NDArray[np.bool_], start: int, ranges: Ranges) -> None:
    """:param flags: one a page from `start` on, which is all that the ranges may hold."""
    pages = ((ranges - np.uint64(start)) // np.uint64(PAGE_SIZE)).astype(np.int64)
    edges = np.zeros(len(flags) + 1, np.int8)
    edges[pages[:, 0]] += 1
    edges[pages[:, 1]] -= 1
    flags |= np.cumsum(edges[:-1], dtype=np.int8) != 0
