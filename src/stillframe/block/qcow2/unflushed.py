"""The record of mapping changes that an image's file does not hold yet, in shared memory: the death of the process leaves it.

An L2 entry that replaces content waits for the next flush (mapping.py: `defer`), since at a power cut it may not be older than
its data. A process that is killed must not lose it all the same: the write was acknowledged. So each such change stands here
before it is acknowledged, and whoever opens the image for writing next replays it (replay.py).

    /dev/shm/stillframe-<uid>/<device>-<inode>.unflushed        directory 0700, file 0600; integers in the machine's own order

       0  magic "SFUF" 4   version 4   entry's bytes 4   capacity, entries 4   ┐
      16  number 4   path's length 4   boot id 16                              │ written once
      40  device 8   inode 8   mount 8                                         │
      64  path of the image, at most 3900 bytes                                ┘
    4088  state 8: void 63 │ epoch 32..62 │ entries 0..31                       one store of a word
    4096  entries, 64 bytes each
          ┌───────────────────────────────────────────────────────────────────────────────────────────┐
          │  0  epoch 4   place in the log 4   kind 4   index in the table 4   table's host offset 8   │
          │ 24  the L2 entry before 16   and after 16, as on disk; one word, or two of an extended one  │
          │ 56  CRC-32 of these 56 bytes, begun with that of bytes 0..63, 4   zero 4                   │
          └───────────────────────────────────────────────────────────────────────────────────────────┘

    kind   1 ENTRY   an L2 entry changes        2 FORGET   the cluster is no table any more: what was said of it is void
           3 WORLD   header bytes 24..71 are, or are about to be, those of which "after" is the digest

Bits 32 to 63 of the image's autoclear features hold the record's number, from before its first entry on until the image is
closed. Every other program that opens the image for writing clears bits that it does not know, and this voids the record; a
copy of the image that is put back carries the number of another time. An epoch begins with the world in force and ends, by one
store, when the file holds everything; 0 entries are an image whose file is whole. A *void* record says that something is
lost: after a flush that failed, no entry's data can be trusted.

The number in the header and no such record mean a power cut, or a process that had no shared memory: what was not flushed is lost.
"""

import contextlib
import fcntl
import mmap
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from zlib import crc32

from stillframe.block.node import FileIdentity, Node
from stillframe.errors import Refused, StillframeError

SHARED_MEMORY = "/dev/shm"

CAPACITY = 1 << 15
"""Entries of one record: 2 MiB."""

STALE_SECONDS = 24 * 3600
"""How long a record is kept whose image is not where it was."""

_END_SECONDS = 2.0
"""How long what is left of a killed process, as a child just forked, may take to end."""

_MAGIC = b"SFUF"
_VERSION = 1
_HEADER_BYTES = 4096
_STATE_AT = 4088
_ENTRY_BYTES = 64
_MAX_PATH = 3900
_VOID = 1 << 63
_FIRST = struct.Struct("=4sIIIII16sQQQ")
_STATE = struct.Struct("=Q")
_ENTRY = struct.Struct("=IIIIQ16s16s")
_OPEN_FLAGS = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_CRC = struct.Struct("=I4x")


class Kind(IntEnum):
    """What an entry of the log says."""

    ENTRY = 1
    FORGET = 2
    WORLD = 3


_ENTRY_KIND = int(Kind.ENTRY)


@dataclass(frozen=True, slots=True)
class Change:
    """An entry of the log. `before` and `after` are as long as an L2 entry, of a world 16 bytes."""

    kind: Kind
    table: int
    index: int
    before: bytes
    after: bytes


def digest(world: bytes) -> bytes:
    """16 bytes for header bytes 24..71."""
    import xxhash

    return xxhash.xxh3_128_digest(world)


class Record:
    """The record of one image that is open for writing; made in shared memory when the first entry comes.

    Every call but `void` is made with the image's lock held. Where there is no shared memory for us, the number in the header
    is all there is: whoever opens the image after us knows then that something may be lost.

    :param node: the image's file.
    :param entry_bytes: of one L2 entry: 8, or 16 for an extended one.
    :param announce: makes the header carry this number, and returns the world in force.
    :ivar number: by which the image's header speaks of it; never 0.
    """

    def __init__(self, node: Node, entry_bytes: int, announce: Callable[[int], bytes]) -> None:
        self._node = node
        self._entry_bytes = entry_bytes
        self._announce = announce
        self.number = int.from_bytes(os.urandom(4), "big") | 1
        self._file: _RecordFile | None = None
        self._is_tried = False
        self._changing = threading.Lock()
        self._is_void = False
        self._count = 0
        self._epoch = 1
        self._tables: set[int] = set()
        self._map: mmap.mmap
        self._seed: int

    def covers(self, table: int) -> bool:
        """Whether the log speaks of this table, so that every change of it must be told."""
        return table in self._tables

    def begin(self) -> None:
        """Have the header speak of it before there is an entry: whoever else writes the image takes that away."""
        if not self._count and not self._is_void and self._begin():
            self.reset()

    def has_room(self, count: int) -> bool:
        """Whether so many entries fit."""
        return self._file is None or self._count + count + 2 <= CAPACITY

    @property
    def is_half_full(self) -> bool:
        """Whether a flush is due, after which the log begins anew."""
        return self._count > CAPACITY // 2

    def append(self, table: int, index: int, before: bytes, after: bytes) -> None:
        """Note consecutive L2 entries of a table, as on disk; they stand here at the return. There is room.

        :raise IOFailed: the image's header could not be written; nothing was noted.
        """
        if self._is_void or not (self._count or self._begin()):
            return
        self._tables.add(table)
        size = self._entry_bytes
        with self._changing:
            for at in range(0, len(after), size):
                self._put(_ENTRY_KIND, table, index, before[at : at + size], after[at : at + size])
                index += 1
            self._store_state()

    def forget(self, table: int) -> None:
        """A cluster that the log speaks of is no table any more. There is room."""
        self._add(Kind.FORGET, table, b"")
        self._tables.discard(table)

    def note_world(self, world: bytes) -> None:
        """Header bytes 24..71 are about to become these."""
        if self._count:
            self._add(Kind.WORLD, 0, digest(world))

    def reset(self) -> None:
        """The file holds everything."""
        with self._changing:
            if self._count or self._is_void:
                self._is_void = False
                self._count = 0
                self._epoch = (self._epoch + 1) & 0x7FFFFFFF
                self._tables.clear()
                self._store_state()

    def void(self) -> None:
        """A flush has failed: what waited for it cannot be replayed. Until `reset`."""
        with self._changing:
            if self._count:
                self._is_void = True
                self._store_state()

    def close(self, *, is_whole: bool) -> None:
        """The image is closed.

        :param is_whole: its file holds everything and its header no number any more; else the record stays.
        """
        if self._file is not None:
            self._file.close(remove=is_whole)
            self._file = None
        self._is_tried = True

    def _begin(self) -> bool:
        """Make it so that the first entry can be added: whether it can."""
        if not self._is_tried:
            try:
                self._file = _RecordFile.create(self._node, self.number)
            except (StillframeError, OSError) as error:
                import logging

                logging.getLogger(__name__).warning(
                    "%s: what the guest has not flushed is lost if this process is killed: %s",
                    self._node.info().filename,
                    error,
                )
            self._is_tried = True
        world = self._announce(self.number)
        if self._file is None:
            return False
        self._map, self._seed = self._file.map, self._file.seed
        self._file.touch()
        self._add(Kind.WORLD, 0, digest(world))
        return True

    def _add(self, kind: Kind, table: int, after: bytes) -> None:
        if self._file is None or self._is_void:
            return
        with self._changing:
            self._put(kind, table, 0, b"", after)
            self._store_state()

    def _put(self, kind: int, table: int, index: int, before: bytes, after: bytes) -> None:
        """Write one entry, which counts with the next `_store_state`. There is a file, and it is not void."""
        number = self._count
        if number == CAPACITY:
            self._is_void = True
            return
        data = _ENTRY.pack(self._epoch, number, kind, index, table, before, after)
        at = _HEADER_BYTES + number * _ENTRY_BYTES
        self._map[at : at + _ENTRY_BYTES] = data + _CRC.pack(crc32(data, self._seed))
        self._count = number + 1

    def _store_state(self) -> None:
        if self._file is not None:
            _STATE.pack_into(
                self._map, _STATE_AT, self._epoch << 32 | self._count | (_VOID if self._is_void else 0)
            )


class FoundRecord:
    """What somebody who is gone has left; locked until `close`."""

    def __init__(self, file: "_RecordFile", entry_bytes: int) -> None:
        self._file = file
        self._entry_bytes = entry_bytes

    @property
    def held_something(self) -> bool:
        """Whether there were entries, or it is void."""
        (word,) = _STATE.unpack_from(self._file.map, _STATE_AT)
        return bool(word & (_VOID | 0xFFFFFFFF))

    def changes(self) -> list[Change]:
        """The log, in order. :raise Refused: it is void or damaged."""
        (word,) = _STATE.unpack_from(self._file.map, _STATE_AT)
        if word & _VOID:
            raise Refused("The record of unflushed writes is void, after a flush that failed")
        count, epoch = word & 0xFFFFFFFF, word >> 32
        if count > CAPACITY:
            raise Refused("The record of unflushed writes is damaged")
        return [self._change(epoch, number) for number in range(count)]

    def _change(self, epoch: int, number: int) -> Change:
        at = _HEADER_BYTES + number * _ENTRY_BYTES
        data = self._file.map[at : at + _ENTRY.size]
        (crc,) = _CRC.unpack_from(self._file.map, at + _ENTRY.size)
        found = _ENTRY.unpack(data)
        if crc != crc32(data, self._file.seed) or found[:2] != (epoch, number):
            raise Refused("The record of unflushed writes is damaged")
        _, _, kind, index, table, before, after = found
        try:
            kind = Kind(kind)
        except ValueError as error:
            raise Refused("The record of unflushed writes is damaged") from error
        if kind is Kind.ENTRY:
            before, after = before[: self._entry_bytes], after[: self._entry_bytes]
        return Change(kind, table, index, before, after)

    def empty(self) -> None:
        """The image's file holds everything."""
        _STATE.pack_into(self._file.map, _STATE_AT, 0)

    def close(self, *, remove: bool) -> None:
        """Let go of it. :param remove: it has been dealt with."""
        self._file.close(remove=remove)


def find(node: Node, number: int, entry_bytes: int) -> FoundRecord:
    """The record with this number of an image.

    :param node: the image's file.
    :raise Refused: there is none that can be used, and why.
    """
    identity = node.identity
    if identity is None:
        raise Refused("The image is not in a regular file, so there is no record of unflushed writes")
    try:
        file = _RecordFile.open(identity)
    except OSError as error:
        raise Refused(f"There is no record of unflushed writes to be had: {error.strerror}") from error
    if file.about() != (number, identity):
        file.close(remove=False)
        raise Refused("The record of unflushed writes is another one's")
    return FoundRecord(file, entry_bytes)


def is_waiting(node: Node, number: int, *, seconds: float) -> bool:
    """Whether the record with this number of an image holds anything, which whoever only reads the image does not see.

    :param node: the image's file. :param seconds: how long to wait for what is left of a killed process.
    """
    identity = node.identity
    if identity is None:
        return False
    try:
        found = _RecordFile.open(identity, seconds)
    except (StillframeError, OSError):
        return False
    (word,) = _STATE.unpack_from(found.map, _STATE_AT)
    is_ours = found.about() == (number, identity)
    found.close(remove=False)
    return is_ours and bool(word & 0xFFFFFFFF) and not word & _VOID


def remove_voided(node: Node) -> bool:
    """Remove the record of an image whose header does not speak of one: whether it held something.

    :param node: the image's file, open for writing.
    """
    try:
        if not os.listdir(_directory_path()):
            return False
        identity = node.identity
        file = _RecordFile.open(identity) if identity is not None else None
    except (StillframeError, OSError):
        return False
    if file is None:
        return False
    is_of_it = file.about()[1] == identity
    found = FoundRecord(file, 8)
    held = is_of_it and found.held_something
    found.close(remove=True)
    return held


class _RecordFile:
    """A record's file, mapped and locked, so that others see whether its maker lives."""

    def __init__(self, fd: int, name: str) -> None:
        self.name = name
        self._fd = fd
        self.map = mmap.mmap(fd, _HEADER_BYTES + CAPACITY * _ENTRY_BYTES)
        # A mapping holds the lock, too, and a forked child may outlive us for a while.
        self.map.madvise(mmap.MADV_DONTFORK)
        self._first = _FIRST.unpack_from(self.map)
        self.seed = crc32(self.map[: _FIRST.size])

    @classmethod
    def create(cls, node: Node, number: int) -> "_RecordFile":
        """A new, empty record; one that somebody else has left is thrown away.

        :raise Refused: not possible here, and why. :raise OSError: as from the host.
        """
        identity = node.identity
        if identity is None:
            raise Refused("the image is not in a regular file")
        encoded = os.fsencode(os.path.abspath(node.info().filename))
        if len(encoded) > _MAX_PATH:
            raise Refused("its path is too long")
        with _directory(create=True) as directory:
            _sweep(directory)
            name = _name(identity)
            _remove_stale(directory, name)
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(name, flags, 0o600, dir_fd=directory)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Really there, since a page that cannot be had later would end the process.
                os.posix_fallocate(fd, 0, _HEADER_BYTES + CAPACITY * _ENTRY_BYTES)
                first = _FIRST.pack(
                    _MAGIC,
                    _VERSION,
                    _ENTRY_BYTES,
                    CAPACITY,
                    number,
                    len(encoded),
                    _boot_id(),
                    identity.device,
                    identity.inode,
                    identity.mount,
                )
                os.pwrite(fd, first + encoded, 0)
                return cls(fd, name)
            except BaseException:
                os.close(fd)
                os.unlink(name, dir_fd=directory)
                raise

    @classmethod
    def open(cls, identity: FileIdentity, seconds: float = _END_SECONDS) -> "_RecordFile":
        """:param seconds: as of `take`. :raise Refused: as there. :raise OSError: there is none."""
        name = _name(identity)
        with _directory(create=False) as directory:
            return cls.take(os.open(name, _OPEN_FLAGS, dir_fd=directory), name, seconds)

    @classmethod
    def take(cls, fd: int, name: str, seconds: float = 0.0) -> "_RecordFile":
        """A record that is there. :param seconds: how long to wait for whoever uses it.

        :raise Refused: it is somebody else's, in use, or none. :raise OSError: as from the host.
        """
        try:
            about = os.fstat(fd)
            if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
                raise Refused("The record of unflushed writes is not ours alone")
            if about.st_size != _HEADER_BYTES + CAPACITY * _ENTRY_BYTES:
                raise Refused("The record of unflushed writes has another size")
            if not _lock(fd, seconds):
                raise Refused("The record of unflushed writes is in use by another process")
            file = cls(fd, name)
        except BaseException:
            os.close(fd)
            raise
        if file._first[:4] != (_MAGIC, _VERSION, _ENTRY_BYTES, CAPACITY):
            file.close(remove=False)
            raise Refused("The record of unflushed writes has another form")
        if file._first[6] != _boot_id():
            file.close(remove=False)
            raise Refused("The record of unflushed writes is from before the host was started")
        return file

    def about(self) -> tuple[int, FileIdentity]:
        """Number, and the image's file."""
        return self._first[4], FileIdentity(*self._first[7:10])

    def path(self) -> str:
        """Where the image was."""
        length = min(self._first[5], _MAX_PATH)
        return os.fsdecode(self.map[_FIRST.size : _FIRST.size + length])

    def touch(self) -> None:
        """It is in use; writes through the mapping do not tell."""
        os.utime(self._fd)

    def close(self, *, remove: bool) -> None:
        """:param remove: take its name away, unless it is another's by now."""
        if remove:
            with contextlib.suppress(OSError, Refused), _directory(create=False) as directory:
                there = os.stat(self.name, dir_fd=directory, follow_symlinks=False)
                if os.path.samestat(there, os.fstat(self._fd)):
                    os.unlink(self.name, dir_fd=directory)
        self.map.close()
        os.close(self._fd)


@contextlib.contextmanager
def _directory(*, create: bool) -> Iterator[int]:
    """The records' directory, open.

    :raise Refused: it is not ours alone. :raise OSError: it cannot be had.
    """
    path = _directory_path()
    if create:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700)
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        about = os.fstat(fd)
        if about.st_uid != os.geteuid() or about.st_mode & 0o077:
            raise Refused(f"'{path}' is not this user's alone")
        yield fd
    finally:
        os.close(fd)


def _directory_path() -> str:
    return f"{SHARED_MEMORY}/stillframe-{os.geteuid()}"


def _name(identity: FileIdentity) -> str:
    return f"{identity.device:x}-{identity.inode:x}.unflushed"


def _lock(fd: int, seconds: float) -> bool:
    """Lock a record, and wait so long for that: whether it is ours."""
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.01)


def _boot_id() -> bytes:
    """:raise OSError: the host does not tell."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))[:16].ljust(16, b"\0")


def _remove_stale(directory: int, name: str) -> None:
    """What stands where a new record is to go is of no use: the image's header does not speak of it.

    :raise Refused: somebody who lives uses it. :raise OSError: it cannot be removed.
    """
    try:
        fd = os.open(name, _OPEN_FLAGS, dir_fd=directory)
    except FileNotFoundError:
        return
    except OSError:
        os.unlink(name, dir_fd=directory)
        return
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(name, dir_fd=directory)
    except BlockingIOError as error:
        raise Refused("another process writes the image") from error
    finally:
        os.close(fd)


def _sweep(directory: int) -> None:
    """Remove records that nobody uses and whose image is gone, or not where it was, for a day."""
    for name in os.listdir(directory):
        with contextlib.suppress(OSError, Refused):
            about = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if not name.endswith(".unflushed") or time.time() - about.st_mtime < STALE_SECONDS:
                continue
            fd = os.open(name, _OPEN_FLAGS, dir_fd=directory)
            file = _RecordFile.take(fd, name)
            _, identity = file.about()
            try:
                image = os.stat(file.path())
                is_stale = (image.st_dev, image.st_ino) != (identity.device, identity.inode)
            except OSError:
                is_stale = True
            file.close(remove=False)
            if is_stale:
                os.unlink(name, dir_fd=directory)
