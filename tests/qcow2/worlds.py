"""What may be found in images after a crash, and who says so: the model that every crash state is held against.

    Disk       what the last flush left, and the writes issued since. Each 512-byte sector holds what the flush left there
               with any of the later writes done to it, in their order; so a write that was flushed cannot be missing, and
               nothing but a write can change a sector.
    Image      a disk, and the snapshots by name: exactly these, each with exactly its content and state
    World      the images of a scene together
    MayHold    the worlds that may be found; one, but while an operation is on its way: then that before and that after it

A `Witness` does the work on the open images, and writes a `MayHold` into the recorder's log whenever it changes: before a
write is issued, when a flush has returned, around an operation. So at every step of the log it is known what a crash may cost.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

from block.faults import Log
from stillframe.block.node import Node
from stillframe.block.qcow2 import Qcow2Node

SECTOR = 512


@dataclass(frozen=True)
class Disk:
    """A guest's disk.

    :param flushed: its bytes at the last flush. :param since: offset and data of each write issued later, in order.
    """

    flushed: bytes
    since: tuple[tuple[int, bytes], ...] = ()

    @cached_property
    def present(self) -> bytes:
        """As the guest sees it: every write done."""
        disk = bytearray(self.flushed)
        for offset, data in self.since:
            disk[offset : offset + len(data)] = data
        return bytes(disk)

    @cached_property
    def _sectors(self) -> dict[int, set[bytes]]:
        """All that each sector written to since may hold."""
        found: dict[int, set[bytes]] = {}
        for offset, data in self.since:
            for sector in range(offset // SECTOR, (offset + len(data) - 1) // SECTOR + 1):
                start = sector * SECTOR
                held = found.setdefault(sector, {self.flushed[start : start + SECTOR]})
                first, end = max(start, offset), min(start + SECTOR, offset + len(data))
                part = data[first - offset : end - offset]
                held |= {old[: first - start] + part + old[end - start :] for old in held}
        return found

    def may_read(self, disk: bytes) -> bool:
        """Whether a crash may leave these bytes."""
        if disk in (self.flushed, self.present):
            return True
        if len(disk) != len(self.flushed):
            return False
        at = 0
        for sector in sorted(self._sectors):
            start = sector * SECTOR
            if disk[at:start] != self.flushed[at:start]:
                return False
            at = start + SECTOR
            if disk[start:at] not in self._sectors[sector]:
                return False
        return disk[at:] == self.flushed[at:]


Snapshot = tuple[bytes, bytes]
"""A disk, and machine state."""


@dataclass(frozen=True)
class Content:
    """What an image holds: the disk's bytes, and each snapshot's disk and state by name."""

    disk: bytes
    snapshots: Mapping[str, Snapshot]


@dataclass(frozen=True)
class Image:
    """What an image may hold."""

    disk: Disk
    snapshots: Mapping[str, Snapshot]

    def may_be(self, content: Content) -> bool:
        """Whether this is a content that a crash may leave."""
        return content.snapshots == self.snapshots and self.disk.may_read(content.disk)


World = tuple[Image, ...]
MayHold = tuple[World, ...]


def allowed(may_hold: MayHold, found: Sequence[Content]) -> bool:
    """Whether the images together are one of the worlds: each as it is there, not one from here and one from there."""
    return any(
        all(image.may_be(content) for image, content in zip(world, found, strict=True)) for world in may_hold
    )


class Witness:
    """Works on images that are recorded, and says at each step what may be found.

    :param files: as recorded; :param start: what they hold.
    :param open_images: opens the nodes of the scene over them; done when the first of them is asked for.
    """

    def __init__(
        self,
        files: Sequence[Node],
        log: Log,
        start: Sequence[Content],
        open_images: Callable[[Sequence[Node]], Sequence[Qcow2Node]],
    ) -> None:
        self.files = files
        self._log = log
        self._open_images = open_images
        self._nodes: Sequence[Qcow2Node] | None = None
        self.may_hold: MayHold = ()
        self._say((tuple(Image(Disk(each.disk), each.snapshots) for each in start),))

    @property
    def nodes(self) -> Sequence[Qcow2Node]:
        """The images, open for writing."""
        if self._nodes is None:
            self._nodes = self._open_images(self.files)
        return self._nodes

    @property
    def is_open(self) -> bool:
        """Whether the images were opened, and not closed."""
        return self._nodes is not None

    def open_again(self) -> None:
        """The images were closed: open them anew."""
        self._nodes = None

    @property
    def node(self) -> Qcow2Node:
        """The first of them, which the calls below are about."""
        return self.nodes[0]

    @property
    def cluster(self) -> int:
        """Its cluster size."""
        return self.node.image.cluster_size

    def _say(self, may_hold: MayHold) -> None:
        self.may_hold = may_hold
        self._log.mark(may_hold)

    # A guest.

    def write(self, offset: int, data: bytes, image: int = 0) -> None:
        self._issue(offset, data, image)
        self.nodes[image].write(offset, data)

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True, image: int = 0) -> None:
        self._issue(offset, bytes(length), image)
        self.nodes[image].write_zeroes(offset, length, unmap=unmap)

    def discard(self, offset: int, length: int, image: int = 0) -> None:
        """Of whole clusters, which read as zeroes afterwards."""
        self._issue(offset, bytes(length), image)
        self.nodes[image].discard(offset, length)

    def flush(self, image: int = 0) -> None:
        self.nodes[image].flush()
        self._say(tuple(_with(world, image, disk=Disk(world[image].disk.present)) for world in self.may_hold))

    def _issue(self, offset: int, data: bytes, image: int) -> None:
        self._say(
            tuple(
                _with(world, image, disk=replace(disk, since=(*disk.since, (offset, data))))
                for world in self.may_hold
                for disk in (world[image].disk,)
            )
        )

    # Operations.

    @contextmanager
    def becoming(self, change: Callable[[World], World]) -> Iterator[None]:
        """During the block either world may be found; after it, the new one."""
        before = self.may_hold
        after = tuple(map(change, before))
        self._say(before + after)
        yield
        self._say(after)

    @contextmanager
    def perhaps(self, change: Callable[[World], World]) -> Iterator[None]:
        """During the block either world may be found; after it, the old one."""
        before = self.may_hold
        self._say(before + tuple(map(change, before)))
        yield
        self._say(before)

    def present(self, image: int = 0) -> bytes:
        """The guest's disk, as it reads now."""
        return self.may_hold[0][image].disk.present

    def snapshot_of(self, name: str, image: int = 0) -> Snapshot:
        return self.may_hold[0][image].snapshots[name]


def _with(world: World, image: int, **fields: object) -> World:
    return (*world[:image], replace(world[image], **fields), *world[image + 1 :])  # type: ignore[arg-type]


def with_snapshot(name: str, snapshot: Snapshot, image: int = 0) -> Callable[[World], World]:
    """One more snapshot."""
    return lambda world: _with(world, image, snapshots={**world[image].snapshots, name: snapshot})


def without_snapshot(name: str, image: int = 0) -> Callable[[World], World]:
    """One less."""

    def change(world: World) -> World:
        kept = {each: snapshot for each, snapshot in world[image].snapshots.items() if each != name}
        return _with(world, image, snapshots=kept)

    return change


def with_disk(disk: bytes, image: int = 0) -> Callable[[World], World]:
    """The disk has other content, or another size, durably."""
    return lambda world: _with(world, image, disk=Disk(disk))
