"""QEMU's image locks: one byte of the file for each permission, held with open-file-description locks.

    byte 100 + n   read-locked by whoever uses permission n
    byte 200 + n   read-locked by whoever does not share permission n
                   n: 0 consistent read, 1 write, 2 write unchanged, 3 resize

Whoever wants permission n looks whether anybody else holds 200 + n; whoever does not want to share it, 100 +
n. The own locks are taken before looking, so of two that come at the same time at least one sees the other.
The bytes lie inside the image and are never read or written for this.
"""

import errno
import fcntl
import struct

from stillframe.block.permissions import UNUSED, Permission, Permissions
from stillframe.errors import InUse, io_failed

_USED_BASE = 100
_UNSHARED_BASE = 200
_FLOCK = struct.Struct("@hhqqi4x")


class ImageLock:
    """The locks of one open file.

    :param fd: open for reading at least; closing it gives the locks up.
    :param filename: for the words of a refusal.
    """

    def __init__(self, fd: int, filename: str) -> None:
        self._fd = fd
        self._filename = filename
        self._held: frozenset[int] = frozenset()
        self.permissions = UNUSED

    def change(self, permissions: Permissions) -> None:
        """Hold exactly the locks that stand for `permissions`; on an error those from before are held.

        :raise InUse: another process, or another node of ours, has the file in a way that does not go
            together with it.
        :raise IOFailed: the file system refuses locks.
        """
        wanted = frozenset(_bytes_of(permissions))
        before = self._held
        try:
            for byte in sorted(wanted - before):
                self._set(fcntl.F_RDLCK, byte)
                self._held |= {byte}
            if wanted - before:
                self._refuse_conflict(permissions)
        except BaseException:
            self._release(self._held - before)
            raise
        self._release(self._held - wanted)
        self.permissions = permissions

    def _refuse_conflict(self, permissions: Permissions) -> None:
        for bit in permissions.uses:
            if self._held_elsewhere(_UNSHARED_BASE + _number(bit)):
                raise self._in_use(f'Failed to get "{bit.words}" lock')
        for bit in permissions.unshared:
            if self._held_elsewhere(_USED_BASE + _number(bit)):
                raise self._in_use(f'Failed to get shared "{bit.words}" lock')

    def _in_use(self, message: str) -> InUse:
        return InUse(message, remedy=f"Is another process using the image [{self._filename}]?")

    def _release(self, held: frozenset[int]) -> None:
        for byte in sorted(held):
            self._set(fcntl.F_UNLCK, byte)
            self._held -= {byte}

    def _set(self, kind: int, byte: int) -> None:
        request = _FLOCK.pack(kind, 0, byte, 1, 0)
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, request)
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise self._in_use(f"Failed to lock byte {byte}") from error
            raise io_failed(f"Could not lock '{self._filename}'", error) from error

    def _held_elsewhere(self, byte: int) -> bool:
        # Asked as a writer, so that the readers of others are in the way; the own ones never are.
        answer = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, byte, 1, 0))
        kind: int = _FLOCK.unpack(answer)[0]
        return kind != fcntl.F_UNLCK


def file_can_be_locked(fd: int) -> bool:
    """Whether the file system of an open file knows open-file-description locks."""
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, 0, 0, 0))
    except OSError:
        return False
    return True


def _number(bit: Permission) -> int:
    return bit.value.bit_length() - 1


def _bytes_of(permissions: Permissions) -> list[int]:
    return [_USED_BASE + _number(bit) for bit in permissions.uses] + [
        _UNSHARED_BASE + _number(bit) for bit in permissions.unshared
    ]
