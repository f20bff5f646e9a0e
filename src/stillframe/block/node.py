"""What a block node is: bytes behind a name, and, where its driver can, snapshots of them.

The block layer is synchronous: every call here may block on the host's storage and is made from a data-plane thread, never
from the control plane's loop. All offsets and lengths are in bytes. Every call may raise `IOFailed` (with the errno) and,
where the format's own tables are read, `ImageCorrupt`; a call that raised changed no byte that was flushed before.

A change of an image's snapshots is made in two steps, so that several images can change together:

    prepare   everything new is written to free clusters and flushed; the old world is whole and in force
    commit    one write of the header switches; flushed
    finish    what only the old world used is given back; a failure here leaks space and nothing else
    roll_back instead of finish: the header is switched back, the old world is in force again
    abandon   instead of commit: what was prepared is given back
    suspend   instead of roll_back: the old world is in force here, the file stays as it is, and takes no more writes
              until it is opened again

Where several images change, each carries a mark meanwhile, a note in its header by which a crash in the middle is
recognised and resolved:

    mark      after prepare: durable. The image that decides, first
    settle    before it is taken off: this image is as the operation left it, and waits for nothing; the one that decides
              still says what was decided
    unmark    the note is gone. The image that decides, after all others are settled; then these

Nobody calls these but `snapshots/group.py`, which drives a set of them as one, and `snapshots/recovery.py`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID

if TYPE_CHECKING:
    from stillframe.block.open_state import OpenState


class ExtentKind(Enum):
    """What lies behind a range of a node."""

    DATA = "data"
    ZERO = "zero"
    UNALLOCATED = "unallocated"


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file a node's bytes are in, for as long as the host runs.

    :param mount: of the mount that it was reached through; mounted again it is another. 0 where the host does not tell.
    """

    device: int
    inode: int
    mount: int


@dataclass(frozen=True, slots=True)
class Extent:
    """A range of a node whose bytes are all of one kind.

    :param host_offset: where the first byte lies in the image file; None where it has no place of its own.
    :param depth: 0 for this node itself, 1 for its backing node, and so on.
    """

    offset: int
    length: int
    kind: ExtentKind
    host_offset: int | None = None
    depth: int = 0
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class GroupMember:
    """One image of a group of snapshots made together.

    :param node_name: the node's name when the snapshot was made.
    :param snapshot: the UUID of that image's own snapshot.
    """

    node_name: str
    snapshot: UUID


@dataclass(frozen=True, slots=True)
class PageIndexPlace:
    """Where the page index of a snapshot's machine state lies in its state area, and what it must be.

    :param offset: of its first byte, behind the state. :param length: bytes.
    :param checksum: 16 bytes. :param stream: the same for a state and for those that continue it.
    :param ram_size: bytes of memory that it is about.
    """

    offset: int
    length: int
    checksum: bytes
    stream: UUID
    ram_size: int


@dataclass(frozen=True, slots=True)
class Lineage:
    """Where a snapshot comes from; kept with it in the image.

    :param snapshot: the snapshot's own UUID, never reused.
    :param parent: the snapshot that the machine stood on, where there was one.
    :param group: the UUID of the save that made it, the same on every image of that save.
    :param members: every image of the group; the first holds the machine state.
    :param description: a user's own words, at most 500 bytes of UTF-8.
    :param page_index: None where the state has none.
    """

    snapshot: UUID
    parent: UUID | None
    group: UUID
    members: tuple[GroupMember, ...] = ()
    description: str = ""
    page_index: PageIndexPlace | None = None


@dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot as an image lists it.

    :param id: decimal string, unique in its image.
    :param state_size: bytes of machine state; 0 for a disk-only snapshot.
    :param date_sec: wall clock, seconds since the epoch. :param date_nsec: and nanoseconds below one second.
    :param vm_clock_ns: the guest's clock at the snapshot.
    :param icount: instructions executed, where recorded.
    :param disk_size: the disk's size at the snapshot, bytes.
    :param lineage: None for a snapshot that stillframe did not make.
    """

    id: str
    name: str
    state_size: int
    date_sec: int
    date_nsec: int
    vm_clock_ns: int
    icount: int | None
    disk_size: int
    lineage: Lineage | None = None


@dataclass(frozen=True, slots=True)
class SnapshotRecord:
    """What a snapshot to be made is to be called, and what is to be remembered with it; see `SnapshotInfo`."""

    name: str
    date_sec: int
    date_nsec: int
    vm_clock_ns: int = 0
    icount: int | None = None
    lineage: Lineage | None = None


class GroupKind(Enum):
    """What is done to several images at once. SAVE: a snapshot is made. LOAD: they go back to one. DELETE: one is deleted."""

    SAVE = "save"
    LOAD = "load"
    DELETE = "delete"


class GroupStage(Enum):
    """How far an image has come, by its mark.

    UNDER_WAY: begun. COMMITTED: only on the image that decides, written with its switch: all images shall have the
    operation. SETTLED: this image is as the operation left it, and waits for nothing.
    """

    UNDER_WAY = 0
    COMMITTED = 1
    SETTLED = 2


@dataclass(frozen=True, slots=True)
class GroupMark:
    """What an image's header says of an operation over several images that it is, or was, part of.

    :param operation: the same on all of its images. :param images: how many they are.
    :param decides: whether this is the image whose stage says if all have the operation or none: the one with the
        machine state. :param decider: what that image is called, for people.
    """

    operation: UUID
    kind: GroupKind
    stage: GroupStage
    decides: bool
    images: int
    decider: str


class Change(Protocol):
    """A prepared change of one image's snapshots; the module's text gives the order of the calls."""

    @property
    def image_name(self) -> str:
        """What people call the image: its file, without directories."""
        ...

    def mark(self, mark: GroupMark) -> None: ...

    def commit(self) -> None: ...

    def roll_back(self) -> None: ...

    def finish(self) -> None: ...

    def abandon(self) -> None: ...

    def suspend(self) -> None: ...

    def settle(self) -> None: ...

    def unmark(self) -> None: ...


class PendingSnapshot(Protocol):
    """The content of a node frozen at an instant, not yet on the image's list.

    From `SnapshotStore.freeze` until the change that `prepare` returns has committed, no frozen cluster is overwritten, freed
    or punched; the node's own writes go elsewhere.
    """

    def write_state(self, offset: int, data: "bytes | bytearray | memoryview") -> None:
        """Put machine state at `offset` of the snapshot's own state area.

        :raise NoSpace: the snapshot can still be abandoned.
        """
        ...

    def share_state(self, parent: SnapshotInfo, length: int) -> None:
        """Let the state begin with the first `length` bytes of another snapshot's, before anything else is written.

        Whole clusters are used by both, and counted. What is written afterwards begins at `length`.

        :raise NotFound: there is no such snapshot. :raise Unsupported: its state cannot be shared; nothing has changed.
        """
        ...

    def write_page_index(self, data: bytes) -> int:
        """Put a page index behind the state, which is complete. :return: its offset. :raise NoSpace: as `write_state`."""
        ...

    def prepare(self, record: SnapshotRecord) -> Change:
        """Make everything durable except the switch; after this the state can no longer be written.

        :raise LimitReached: a refcount's width, the table's bounds.
        """
        ...

    def abandon(self) -> None:
        """Forget it: the node goes on as if `freeze` had not been called, and the state's space is given back."""
        ...


class SnapshotStore(Protocol):
    """What a driver with internal snapshots offers."""

    def snapshots(self) -> Sequence[SnapshotInfo]:
        """In the order of the image's table.

        Without one that an unfinished save or delete over several images may have left behind.
        """
        ...

    def freeze(self) -> PendingSnapshot:
        """Freeze the present content; no I/O, a cost that does not grow with the disk. The caller holds requests back.

        :raise InUse: another pending snapshot of this node has not been committed or abandoned.
        """
        ...

    def shows(self, snapshot: SnapshotInfo) -> bool:
        """Whether the node is known to be, byte for byte, what the snapshot shows, so that a revert has nothing to do."""
        ...

    def prepare_revert(self, snapshot: SnapshotInfo) -> Change:
        """Make this snapshot's content, and disk size, the node's own. The state area is not mapped.

        :raise NotFound: it is no longer there.
        """
        ...

    def prepare_delete(self, snapshot: SnapshotInfo) -> Change:
        """Take the snapshot off the list and give back what only it used. :raise NotFound: it is no longer there."""
        ...

    def read_state(self, snapshot: SnapshotInfo, offset: int, length: int) -> bytes:
        """Machine state of a snapshot; shorter than `length` only at its end."""
        ...

    def read_page_index(self, snapshot: SnapshotInfo) -> bytes | None:
        """The bytes that the snapshot's lineage calls its page index, unexamined; None without one, or if it is not there."""
        ...

    def open_state(self, snapshot: SnapshotInfo, length: int) -> "OpenState | None":
        """The first bytes of the machine state where they lie in a plain file; None where they do not, or not wholly.

        They stay there for as long as the snapshot is on the list.
        """
        ...

    def refuse_if_unmarkable(self) -> None:
        """Before an operation over several images is begun.

        :raise LimitReached: the header has no room for a mark. :raise InUse: it has one that is not resolved.
        """
        ...

    @property
    def unfinished(self) -> GroupMark | None:
        """The mark that was found when the image was opened, as long as it is there. None where there was none."""
        ...

    @property
    def is_withheld(self) -> bool:
        """Whether the content must not be used: a load of several images was interrupted, and not resolved yet."""
        ...

    def refuse_unless_resolvable(self, *, committed: bool) -> None:
        """:raise ImageCorrupt: the image is neither as it was before the operation nor as it is after it."""
        ...

    def resolve(self, *, committed: bool) -> None:
        """Give the image what the unfinished operation would have, or what it had before it.

        It is settled, unless it is the one that decides, which keeps its stage. Called again after an error it
        goes on.

        :param committed: what the image that decides says.
        """
        ...

    def unmark(self) -> None:
        """Take the mark off, durably; the image stays as it is."""
        ...


@dataclass(frozen=True, slots=True)
class ImageInfo:
    """What a node knows about its image, in QEMU's words (ImageInfo of the QAPI schema).

    :param dirty: None where the driver has no answer. :param format_specific: None where it has nothing to say; else its type
        and data.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None
    cluster_size: int | None = None
    encrypted: bool = False
    dirty: bool | None = False
    backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: tuple[SnapshotInfo, ...] = ()
    format_specific: Mapping[str, Any] | None = None
    children: tuple[tuple[str, "ImageInfo"], ...] = field(default=())


class Node(ABC):
    """A named source and sink of bytes.

    Reads beyond the end and writes beyond the end are refused (`InvalidRequest`); sizes need not be multiples of 512.

    :param node_name: unique in its graph.
    :param read_only: writes are refused with `Refused`.
    """

    driver: str

    def __init__(self, node_name: str, *, read_only: bool) -> None:
        self.node_name = node_name
        self.read_only = read_only

    @property
    @abstractmethod
    def size(self) -> int:
        """Bytes."""

    @property
    @abstractmethod
    def children(self) -> Mapping[str, "Node"]:
        """The nodes below by role: "file", "backing"."""

    @property
    def identity(self) -> FileIdentity | None:
        """Which regular file this node is; None for anything else. :raise IOFailed: the host does not tell."""
        return None

    @property
    def is_switching(self) -> bool:
        """Whether writes may have to wait for a change of the image's snapshots; a hint, true of the moment."""
        return False

    @abstractmethod
    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill the whole of `buffer` from `offset` on."""

    def read(self, offset: int, length: int) -> bytes:
        """`readinto` for callers without a buffer of their own."""
        buffer = bytearray(length)
        self.readinto(offset, memoryview(buffer))
        return bytes(buffer)

    @abstractmethod
    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Put `data` at `offset`; durable after the next `flush` that follows its return."""

    def write_durable(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """`write`, on stable storage at its return, as far as the file's end if need be.

        Nothing is said of what was written before: that is what makes it cheaper than `write` and `flush`.
        """
        self.write(offset, data)
        self.flush()

    @abstractmethod
    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        """Make a range read as zeroes. :param unmap: its space may be given back."""

    @abstractmethod
    def discard(self, offset: int, length: int) -> None:
        """A hint: the content of the range is no longer needed. What it reads as afterwards is not defined."""

    @abstractmethod
    def flush(self) -> None:
        """Returns when all writes that returned before are on stable storage."""

    @abstractmethod
    def truncate(self, size: int) -> None:
        """Set the size; new bytes read as zeroes."""

    @abstractmethod
    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        """The range as maximal runs, in order, covering it exactly."""

    @property
    @abstractmethod
    def snapshot_store(self) -> SnapshotStore | None:
        """None where the driver cannot keep snapshots."""

    def freeze_view(self) -> "Node | None":
        """The content of this instant as a node to be read and closed, while this one is written; the caller holds requests back.

        Until it is closed no snapshot of the image is made, deleted or applied. None where the driver cannot keep an instant.

        :raise InUse: an instant is kept already.
        """
        return None

    @abstractmethod
    def info(self) -> ImageInfo:
        """The image described."""

    @abstractmethod
    def close(self) -> None:
        """Flush, give up locks and descriptors. Closing twice is allowed; every other call after it is a mistake of ours."""
