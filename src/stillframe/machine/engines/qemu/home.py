"""A machine's directory, and the record in it for whoever takes the machine over when we are killed.

    DIRECTORY/             0700
      lock                 held by the stillframe that serves the machine
      record               0600, JSON: what was asked for, which QEMU it is, what it was to do; replaced as a whole
      disks                the exports' socket
      1/ 2/ …              a QEMU each (process.py)

A machine with a name has its directory where the name leads to. One without has it anywhere: nobody will look for it, there is no
record, and its QEMU ends with us; what is left of the directory then, the next machine without a name takes away.

Nothing here outlives the host: the record names the boot that it is of, so it needs no flush.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import msgspec

from stillframe.block.node import Node
from stillframe.block.qcow2 import Qcow2Node
from stillframe.errors import InUse, IOFailed, NotFound, Refused, io_failed
from stillframe.machine.engines.qemu.running import Found

_log = logging.getLogger(__name__)

VERSION: Final = 1
_TEMPORARY: Final = "stillframe."
_MOST_BYTES: Final = 1 << 20
_END_SECONDS: Final = 2.0
"""How long what is left of a killed process, as a child of it, may take to end."""


@dataclass(frozen=True, slots=True)
class ProcessNote:
    """A QEMU. :param directory: its number in the machine's. :param started: as `running.started_at`."""

    directory: int
    pid: int
    started: int


@dataclass(frozen=True, slots=True)
class NodeNote:
    """A disk that the guest may write.

    :param device: :param inode: of its file; 0 where it is none. :param number: that its header carries (block/qcow2/unflushed.py);
        0 where it has no room for one, as raw images and qcow2's version 2.
    """

    node_name: str
    device: int
    inode: int
    number: int


@dataclass(frozen=True, slots=True)
class LoadNote:
    """The image whose switch is the commit of a load. :param table: the host offset of its active L1 table before."""

    node_name: str
    table: int


@dataclass(frozen=True, slots=True)
class Record:
    """What is known of a machine.

    :param boot: of the host. :param words: of `stillframe run`. :param place: the directory that their paths are from.
    :param marked: whether the headers carry the numbers for certain; else they may carry none yet.
    :param process: the machine. :param successor: what a load would have in its place. :param load: see there.
    :param runs: whether the guest is to run where it is found standing still, because it was we who stopped it.
    :param filling: whether memory of the guest is still to come, which comes from us.
    """

    version: int
    boot: str
    words: tuple[str, ...]
    place: str
    nodes: tuple[NodeNote, ...] = ()
    marked: bool = False
    process: ProcessNote | None = None
    successor: ProcessNote | None = None
    load: LoadNote | None = None
    runs: bool = False
    filling: bool = False


class MachineHome:
    """Made by `temporary`, `named` or `found`; locked until `close`.

    :ivar path: the directory. :ivar record: None for a machine without a name.
    :ivar was_marked: `marked` of the record as it was found.
    :ivar stays: whether `close` leaves everything, since a QEMU lives on it that is not ours yet.
    """

    def __init__(self, path: Path, lock: int, record: Record | None, *, stays: bool = False) -> None:
        self.path = path
        self.record = record
        self.stays = stays
        self.was_marked = record is not None and record.marked
        self._lock: int | None = lock
        self._noting = threading.Lock()

    @classmethod
    def temporary(cls) -> "MachineHome":
        """For a machine without a name. Directories of those whose stillframe was killed are taken away first."""
        place = Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        _clear_abandoned(place)
        path = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=place))
        return cls(path, _locked(path, create=True), None)

    @classmethod
    def named(cls, path: Path, words: Sequence[str]) -> "MachineHome":
        """For a new machine. :param words: as of `Record`.

        :raise InUse: there is a machine of this name. :raise Refused: its QEMU is left, without a stillframe.
        """
        lock = _locked(path, create=True)
        try:
            former = _read(path)
            if former is not None and (living := living_of(former)):
                raise Refused(
                    f"A QEMU of the machine '{path.stem}' waits for its disks (process {living[0].pid})",
                    remedy=f"Go on with it: stillframe run --adopt {path.stem}. Or end it: kill -9 {living[0].pid}.",
                )
            _clear(path)
            home = cls(path, lock, Record(VERSION, _boot(), tuple(words), os.getcwd()))
            home.note()
        except BaseException:
            os.close(lock)
            raise
        return home

    @classmethod
    def found(cls, path: Path) -> "MachineHome":
        """Of a machine whose stillframe was killed.

        :raise NotFound: there is none. :raise InUse: its stillframe lives. :raise Refused: its record cannot be used.
        """
        lock = _locked(path, create=False)
        try:
            record = _read(path)
            if record is None:
                raise Refused(
                    f"The record of the machine '{path.stem}' is missing or damaged: {path / 'record'}",
                    remedy="Start the machine anew; a QEMU that is left of it gets no disks any more.",
                )
        except BaseException:
            os.close(lock)
            raise
        return cls(path, lock, record, stays=True)

    def note(self, **changes: Any) -> None:
        """Change the record, for all that comes. Without one, nothing. :raise IOFailed: it cannot be written."""
        if self.record is None:
            return
        # A client's `stop` and a job may come together.
        with self._noting:
            self.record = replace(self.record, **changes)
            new = self.path / "record.new"
            try:
                fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
                with os.fdopen(fd, "wb") as file:
                    file.write(msgspec.json.encode(self.record))
                new.replace(self.path / "record")
            except OSError as error:
                raise io_failed("Could not keep the record of the machine", error) from error

    def try_to_note(self, **changes: Any) -> None:
        """Where an old record does no harm that an error would not."""
        try:
            self.note(**changes)
        except IOFailed as error:
            _log.warning("%s", error)

    def forget_intent(self) -> None:
        """The guest does as its user wants it to. Where that fails, one that its user stops later is let go when it is adopted."""
        if self.record is not None and self.record.runs:
            self.try_to_note(runs=False)

    def begin_opening(self) -> None:
        """The images will be opened now, which takes the numbers out of their headers: none is expected of who is killed at it."""
        self.note(marked=False)

    def give_up(self, find: Callable[[str], Node | None]) -> None:
        """Not all images could be opened: those that were, and were right, will be closed, and have no number then."""
        if self.record is None:
            return
        notes = []
        for note in self.record.nodes:
            node = find(note.node_name)
            found = node.image.recovery if isinstance(node, Qcow2Node) else None
            is_right = found is not None and found.is_complete and found.number == note.number
            notes.append(replace(note, number=0) if is_right else note)
        self.try_to_note(nodes=tuple(notes), marked=self.was_marked)

    def mark_nodes(self, nodes: Sequence[Node]) -> None:
        """From now on it shows when somebody else has written to one of these. :raise IOFailed: a header could not be written."""
        if self.record is None:
            return
        writable = [node for node in nodes if not node.read_only]
        self.note(nodes=tuple(map(_node_note, writable)), marked=False)
        for node in writable:
            if isinstance(node, Qcow2Node):
                node.image.begin_record()
        self.note(marked=True)

    def clear_but(self, note: ProcessNote) -> None:
        """Take away the directories of all other QEMUs, which have ended."""
        for each in self.path.iterdir():
            if each.name.isdecimal() and each.name != str(note.directory):
                shutil.rmtree(each, ignore_errors=True)

    def close(self) -> None:
        """Take everything away, unless it `stays`; a second time, nothing."""
        if self._lock is None:
            return
        if not self.stays:
            shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)
        self._lock = None


def living_of(record: Record) -> list[Found]:
    """The QEMUs of a record that live, the machine first."""
    found = [open_process(note) for note in (record.process, record.successor) if note is not None]
    return [each for each in found if each is not None]


def open_process(note: ProcessNote) -> Found | None:
    """The process, if it is still that one and lives."""
    return Found.open(note.pid, note.started)


def identity_of(node: Node) -> tuple[int, int]:
    """Device and inode of the file that a node's bytes are in; zeroes where it is none."""
    while (identity := node.identity) is None and (file := node.children.get("file")) is not None:
        node = file
    return (identity.device, identity.inode) if identity is not None else (0, 0)


def _node_note(node: Node) -> NodeNote:
    record = node.image.mapping.record if isinstance(node, Qcow2Node) else None
    return NodeNote(node.node_name, *identity_of(node), record.number if record is not None else 0)


def _locked(path: Path, *, create: bool) -> int:
    """The lock in the directory, held. :raise InUse: :raise NotFound: :raise Refused: as those that call this."""
    deadline = time.monotonic() + _END_SECONDS
    while True:
        if create:
            with contextlib.suppress(FileExistsError):
                path.mkdir(mode=0o700)
        try:
            _refuse_others(path)
            fd = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except FileNotFoundError as error:
            if create and time.monotonic() < deadline:
                continue
            raise NotFound(
                f"There is no machine '{path.stem}' to be taken over",
                remedy="It has ended, or had no QEMU or no --name; start it anew.",
            ) from error
        except OSError as error:
            raise Refused(f"The directory '{path}' cannot be used: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                # Whoever had it may have taken the directory away meanwhile.
                if os.path.samestat(os.fstat(fd), os.stat(path / "lock", follow_symlinks=False)):
                    return fd
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(fd)
                raise InUse(
                    f"A stillframe serves the machine '{path.stem}'", remedy="Choose another name, or end it."
                ) from error
            time.sleep(0.02)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _refuse_others(path: Path) -> None:
    about = os.stat(path, follow_symlinks=False)
    if not stat.S_ISDIR(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
        raise Refused(f"'{path}' is not a directory of this user's alone")


def _read(path: Path) -> Record | None:
    """The record; None where there is none that can be used."""
    try:
        fd = os.open(path / "record", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    with os.fdopen(fd, "rb") as file:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_mode & 0o077:
            return None
        data = file.read(_MOST_BYTES + 1)
    try:
        record = msgspec.json.decode(data, type=Record)
    except msgspec.MsgspecError:
        return None
    return record if record.version == VERSION and record.boot == _boot() else None


def _clear(path: Path) -> None:
    """What is left of a machine whose QEMU has ended."""
    for each in path.iterdir():
        if each.is_dir() and not each.is_symlink():
            shutil.rmtree(each, ignore_errors=True)
        elif each.name != "lock":
            each.unlink(missing_ok=True)


def _clear_abandoned(place: Path) -> None:
    """Directories in which nobody holds the lock any more. One without a lock is just being made."""
    for path in place.glob(f"{_TEMPORARY}*"):
        with contextlib.suppress(OSError, Refused):
            _refuse_others(path)
            lock = os.open(path / "lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
            finally:
                os.close(lock)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
