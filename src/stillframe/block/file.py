"""Files and block devices as nodes: the only room that touches descriptors, and the durability, of images.

All I/O is positioned (`preadv`, `pwrite`), so any number of threads may use one node at a time. `flush` is
`fdatasync`; a flush that failed once fails for ever, since the kernel may have dropped what it could not
write and would report success next. `write_durable` is `pwritev2` with RWF_DSYNC, and its failures are flushes'.
"""

import contextlib
import errno
import os
import secrets
import stat
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Literal, Self

from stillframe.block.bounds import refuse_outside, refuse_read_only, refuse_write
from stillframe.block.locks import ImageLock, file_can_be_locked
from stillframe.block.node import Extent, ExtentKind, FileIdentity, ImageInfo, Node, SnapshotStore
from stillframe.block.permissions import FORMAT_READER, FORMAT_WRITER, UNUSED, Permissions
from stillframe.errors import (
    AlreadyExists,
    InvalidRequest,
    IOFailed,
    NotFound,
    Refused,
    StillframeError,
    Unsupported,
    io_failed,
)

Locking = Literal["on", "off", "auto"]

_FALLOC_KEEP_SIZE = 0x01
_FALLOC_PUNCH_HOLE = 0x02
_FALLOC_ZERO_RANGE = 0x10
_NOT_DONE_BY_THIS_STORAGE = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENOTTY})
_WRITTEN_AT_ONCE = 1 << 20
_WRITE_THROUGH: int | None = getattr(os, "RWF_DSYNC", None)
_MAX_OFFSET = (1 << 63) - 1
_REFUSED_OPENS = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENAMETOOLONG})


class FileNode(Node):
    """A regular file or a block device.

    :param filename: its path; kept as given, for messages and `info`.
    :param locking: "auto" takes QEMU's image locks where the file system has them, "on" refuses to go on
        without, "off" takes none and lets others write: only for reading what may change meanwhile.
    :param auto_read_only: open read-only where writing is not permitted, instead of refusing.
    :param discard: False ignores `discard`, and keeps the space of `write_zeroes`.
    :param permissions: what the locks are to say; None for a format that has the file to itself. Later:
        `set_permissions`.
    :raise NotFound: no such file.
    :raise Refused: not permitted, a directory, or not a file with positions.
    :raise InUse: somebody else's locks.
    """

    driver = "file"

    def __init__(
        self,
        node_name: str,
        filename: str,
        *,
        read_only: bool = False,
        auto_read_only: bool = False,
        locking: Locking = "auto",
        discard: bool = True,
        permissions: Permissions | None = None,
    ) -> None:
        fd, read_only = _open_existing(filename, read_only, auto_read_only)
        self._take(node_name, filename, fd, read_only, locking, discard, permissions)

    @classmethod
    def create(
        cls, node_name: str, filename: str, *, replace: bool = False, locking: Locking = "auto"
    ) -> Self:
        """A new, empty file, opened for writing, with its name made durable.

        :param replace: take over an existing file of that name, and empty it, instead of refusing.
        :raise AlreadyExists: there is one. :raise InUse: and somebody has it open.
        """
        try:
            mode = os.O_CREAT if replace else os.O_CREAT | os.O_EXCL
            fd = os.open(filename, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | mode, 0o644)
        except FileExistsError as error:
            raise _exists_already(filename) from error
        except OSError as error:
            raise _open_failed(filename, error, "Could not create") from error
        node = cls.__new__(cls)
        node._take(node_name, filename, fd, False, locking, True, None)
        try:
            if node.driver == "file":
                node.truncate(0)
                _sync_directory(filename)
        except BaseException:
            node.close()
            raise
        return node

    def _take(
        self,
        node_name: str,
        filename: str,
        fd: int,
        read_only: bool,
        locking: Locking,
        discard: bool,
        permissions: Permissions | None,
    ) -> None:
        super().__init__(node_name, read_only=read_only)
        self.filename = filename
        self._fd = fd
        self._discard = discard
        self._flush_error: int | None = None
        self._resize_lock = threading.Lock()
        self._lock: ImageLock | None = None
        try:
            self.driver = _driver_for(filename, os.fstat(fd).st_mode)
            os.set_blocking(fd, True)
            self._size = os.lseek(fd, 0, os.SEEK_END)
            if locking == "on" and not file_can_be_locked(fd):
                raise Unsupported(
                    f"The file system of '{filename}' has no locks",
                    remedy="Ask for locking=off, and keep other users of the image away.",
                )
            if locking != "off" and file_can_be_locked(fd):
                self._lock = ImageLock(fd, filename)
                if permissions is None:
                    permissions = FORMAT_READER if read_only else FORMAT_WRITER
                self._lock.change(permissions)
        except StillframeError:
            self._give_up()
            raise
        except OSError as error:
            self._give_up()
            raise _open_failed(filename, error) from error

    @property
    def size(self) -> int:
        return self._size

    @property
    def children(self) -> Mapping[str, Node]:
        return {}

    @property
    def snapshot_store(self) -> SnapshotStore | None:
        return None

    @property
    def identity(self) -> FileIdentity | None:
        if self.driver != "file":
            return None
        about = os.fstat(self._fd)
        return FileIdentity(about.st_dev, about.st_ino, _mount_of(self._fd))

    @property
    def permissions(self) -> Permissions:
        """What the locks say at present; `UNUSED` where none are taken."""
        return self._lock.permissions if self._lock else UNUSED

    def set_permissions(self, permissions: Permissions) -> None:
        """Change the image locks; on an error they are as before. :raise InUse: somebody else's locks."""
        if self._lock is not None:
            self._lock.change(permissions)

    def readinto(self, offset: int, buffer: memoryview) -> None:
        refuse_outside(self, offset, len(buffer), "read")
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(self._fd, [buffer[done:]], offset + done)
                if count == 0:
                    raise OSError(errno.EIO, "the file is shorter than it was")
                done += count
        except OSError as error:
            raise io_failed(f"Could not read from '{self.filename}'", error) from error

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        refuse_write(self, offset, len(rest))
        try:
            while rest:
                count = os.pwrite(self._fd, rest, offset)
                rest = rest[count:]
                offset += count
        except OSError as error:
            raise self._write_failed(error) from error

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        rest = memoryview(data).cast("B")
        # Once as an ordinary write: what fails for want of space then is known not to have failed in the storage.
        self.write(offset, rest)
        if _WRITE_THROUGH is None:
            self.flush()
            return
        self._refuse_after_failed_flush()
        try:
            while rest:
                count = os.pwritev(self._fd, [rest], offset, _WRITE_THROUGH)
                rest = rest[count:]
                offset += count
        except OSError as error:
            if error.errno in _NOT_DONE_BY_THIS_STORAGE:
                self.flush()
                return
            self._flush_error = error.errno or errno.EIO
            raise self._flush_failed(error) from error

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        refuse_write(self, offset, length)
        if length == 0:
            return
        try:
            if unmap and self._discard and self._fallocate(_FALLOC_PUNCH_HOLE, offset, length):
                return
            if self._fallocate(_FALLOC_ZERO_RANGE, offset, length):
                return
            zeroes = memoryview(bytes(min(length, _WRITTEN_AT_ONCE)))
            for position in range(offset, offset + length, len(zeroes)):
                self.write(position, zeroes[: offset + length - position])
        except OSError as error:
            raise self._write_failed(error) from error

    def discard(self, offset: int, length: int) -> None:
        refuse_write(self, offset, length)
        if length == 0 or not self._discard:
            return
        try:
            self._fallocate(_FALLOC_PUNCH_HOLE, offset, length)
        except OSError as error:
            raise self._write_failed(error) from error

    def flush(self) -> None:
        if self.read_only:
            return
        self._refuse_after_failed_flush()
        try:
            os.fdatasync(self._fd)
        except OSError as error:
            self._flush_error = error.errno or errno.EIO
            raise self._flush_failed(error) from error

    def truncate(self, size: int) -> None:
        refuse_read_only(self)
        if self.driver != "file":
            raise Unsupported(f"The size of the device '{self.filename}' cannot be changed")
        if not 0 <= size <= _MAX_OFFSET:
            raise InvalidRequest(f"Size {size} of '{self.filename}' is out of range")
        with self._resize_lock:
            try:
                os.ftruncate(self._fd, size)
            except OSError as error:
                raise io_failed(f"Could not resize '{self.filename}'", error) from error
            self._size = size

    def reserve(self, offset: int, length: int) -> None:
        """Take space for a range, which reads as before; the file grows to its end if it is shorter.

        :raise NoSpace: there is not so much.
        """
        refuse_read_only(self)
        if length <= 0:
            return
        with self._resize_lock:
            try:
                os.posix_fallocate(self._fd, offset, length)
            except OSError as error:
                raise self._write_failed(error) from error
            self._size = max(self._size, offset + length)

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        refuse_outside(self, offset, length, "map")
        end = offset + length
        while offset < end:
            kind, run_end = self._run_at(offset)
            run_end = min(run_end, end)
            yield Extent(offset, run_end - offset, kind, host_offset=offset)
            offset = run_end

    def info(self) -> ImageInfo:
        return ImageInfo(
            filename=self.filename,
            format=self.driver,
            virtual_size=self._size,
            actual_size=os.fstat(self._fd).st_blocks * 512,
            format_specific={"type": "file", "data": {}} if self.driver == "file" else None,
        )

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            self.flush()
        finally:
            self._give_up()

    def open_again(self) -> int:
        """Another descriptor of the file, for reading, without the locks of this one; the caller closes it.

        :raise IOFailed: the host gives none.
        """
        try:
            return os.open(f"/proc/self/fd/{self._fd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise io_failed(f"Could not open '{self.filename}' again", error) from error

    def _give_up(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _run_at(self, offset: int) -> tuple[ExtentKind, int]:
        """What is at `offset`, and where that ends."""
        try:
            data = os.lseek(self._fd, offset, os.SEEK_DATA)
            if data > offset:
                return ExtentKind.ZERO, data
            return ExtentKind.DATA, os.lseek(self._fd, offset, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return ExtentKind.ZERO, self._size
            if error.errno in _NOT_DONE_BY_THIS_STORAGE:
                return ExtentKind.DATA, self._size
            raise io_failed(f"Could not read from '{self.filename}'", error) from error

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        """Whether the storage can do it; then it is done."""
        try:
            _fallocate_call()(self._fd, mode | _FALLOC_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno in _NOT_DONE_BY_THIS_STORAGE:
                return False
            raise
        return True

    def _refuse_after_failed_flush(self) -> None:
        if self._flush_error is not None:
            raise self._flush_failed(OSError(self._flush_error, os.strerror(self._flush_error)))

    def _write_failed(self, error: OSError) -> IOFailed:
        return io_failed(f"Could not write to '{self.filename}'", error)

    def _flush_failed(self, error: OSError) -> IOFailed:
        return io_failed(f"Could not flush '{self.filename}'", error)


class _Unflushed(FileNode):
    """One that nobody can know yet: it is flushed once, when it is whole."""

    def flush(self) -> None:
        """Put off until `make_durable`."""

    def make_durable(self) -> None:
        """The flush that was put off."""
        super().flush()

    def take_rights_of(self, other: FileNode) -> None:
        """Owner, as far as we may give it away, and mode."""
        found = os.fstat(other._fd)
        with contextlib.suppress(PermissionError):
            os.fchown(self._fd, found.st_uid, found.st_gid)
        os.fchmod(self._fd, stat.S_IMODE(found.st_mode))


@contextmanager
def file_beside(node_name: str, filename: str, *, replace: bool = False) -> Iterator[FileNode]:
    """A new file to be filled; once the block has ended it is made durable and takes the name.

    Until then it lies beside that name, with ".unfinished-" and some digits behind. Whatever ends the block early removes it,
    and what had the name before stays as it is; what kills the process leaves it.

    :param replace: take the name, the owner and the mode of an existing file. :raise AlreadyExists: there is one.
    :raise InUse: it is in use. :raise Unsupported: it is a device.
    """
    final = os.path.realpath(filename)
    with contextlib.ExitStack() as stack:
        before: FileNode | None = None
        if os.path.lexists(final):
            if not replace:
                raise _exists_already(filename)
            # Its locks are held until it is replaced: nobody can have it open.
            before = FileNode("replaced", final)
            stack.callback(before.close)
            if before.driver != "file":
                raise Unsupported(f"'{filename}' is a device, which cannot be replaced")
        file = _Unflushed.create(node_name, f"{final}.unfinished-{secrets.token_hex(4)}")
        try:
            yield file
            if before is not None:
                file.take_rights_of(before)
            file.make_durable()
            file.close()
            _put_in_place(file.filename, final, filename, replace)
        except BaseException:
            file.close()
            with contextlib.suppress(OSError):
                os.unlink(file.filename)
            raise


def _put_in_place(made: str, final: str, filename: str, replace: bool) -> None:
    try:
        if replace:
            os.replace(made, final)
        else:
            _rename_to_new(made, final, filename)
    except OSError as error:
        raise io_failed(f"Could not create '{filename}'", error) from error
    _sync_directory(final)


def _rename_to_new(made: str, final: str, filename: str) -> None:
    """Unlike a rename, a link does not replace what somebody else has put there meanwhile."""
    try:
        os.link(made, final)
    except FileExistsError as error:
        raise _exists_already(filename) from error
    except OSError:
        # A file system without links.
        if os.path.lexists(final):
            raise _exists_already(filename) from None
        os.rename(made, final)
    else:
        os.unlink(made)


def _exists_already(filename: str) -> AlreadyExists:
    return AlreadyExists(
        f"'{filename}' exists already", remedy="Choose another name, or remove that file first."
    )


def remove_file(filename: str) -> None:
    """Take a file's name away, durably; for one that was made by `FileNode.create` and not finished.

    :raise IOFailed: it is still there.
    """
    try:
        os.unlink(filename)
    except OSError as error:
        raise io_failed(f"Could not remove '{filename}'", error) from error
    _sync_directory(filename)


def same_file(first: str, second: str) -> bool:
    """Whether two paths lead to one existing file or device."""
    try:
        return os.path.samefile(first, second)
    except (OSError, ValueError):
        # ValueError: a name that no file can have.
        return False


def _open_existing(filename: str, read_only: bool, auto_read_only: bool) -> tuple[int, bool]:
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    try:
        # Looked at first, since opening a device can do things; O_NONBLOCK, should it be a FIFO by then.
        _driver_for(filename, os.stat(filename).st_mode)
        if not read_only:
            try:
                return os.open(filename, os.O_RDWR | flags), False
            except OSError as error:
                if not auto_read_only or error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                    raise
        return os.open(filename, os.O_RDONLY | flags), True
    except ValueError as error:
        raise InvalidRequest(f"Could not open {filename!r}: {error}") from error
    except OSError as error:
        raise _open_failed(filename, error) from error


def _driver_for(filename: str, mode: int) -> str:
    if stat.S_ISREG(mode):
        return "file"
    if stat.S_ISBLK(mode):
        return "host_device"
    if stat.S_ISDIR(mode):
        raise InvalidRequest(f"Could not open '{filename}': Is a directory")
    raise InvalidRequest(f"Could not open '{filename}': Neither a regular file nor a block device")


def _open_failed(filename: str, error: OSError, doing: str = "Could not open") -> StillframeError:
    text = f"{doing} '{filename}': {os.strerror(error.errno or errno.EIO)}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return NotFound(text, remedy="Check the path; relative ones start at the working directory.")
    if error.errno == errno.EISDIR:
        return InvalidRequest(text)
    if error.errno in _REFUSED_OPENS:
        return Refused(text, remedy="Check the permissions of the file and of the directories above it.")
    return io_failed(f"{doing} '{filename}'", error)


def _sync_directory(filename: str) -> None:
    try:
        fd = os.open(os.path.dirname(filename) or ".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        # A directory that may be written and not read cannot be synced; the file itself still is.
        return
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NOT_DONE_BY_THIS_STORAGE:
            raise io_failed(f"Could not flush the directory of '{filename}'", error) from error
    finally:
        os.close(fd)


def _mount_of(fd: int) -> int:
    """The number of the mount through which a file was opened; never that of an earlier one where the kernel (6.8) tells."""
    import ctypes

    call = getattr(ctypes.CDLL(None, use_errno=True), "statx", None)
    found = bytearray(256)
    empty_path, number, unique = 0x1000, 0x1000, 0x4000
    for wanted in (unique, number):
        buffer = (ctypes.c_char * len(found)).from_buffer(found)
        is_told = call is not None and call(fd, b"", empty_path, wanted, buffer) == 0
        if is_told and int.from_bytes(found[0:4], sys.byteorder) & wanted:
            return int.from_bytes(found[144:152], sys.byteorder)
    return 0


@cache
def _fallocate_call() -> Callable[[int, int, int, int], None]:
    # ctypes is slow to import, and an image that is only looked at never needs it.
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    call = libc.fallocate64 if hasattr(libc, "fallocate64") else libc.fallocate
    call.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
    call.restype = ctypes.c_int

    def fallocate(fd: int, mode: int, offset: int, length: int) -> None:
        while call(fd, mode, offset, length) != 0:
            number = ctypes.get_errno()
            if number != errno.EINTR:
                raise OSError(number, os.strerror(number))

    return fallocate
