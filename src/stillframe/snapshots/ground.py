"""The ground: the snapshot that a machine stands on, and what of its memory has changed since.

A machine stands on the snapshot that it was last saved to or loaded from. The next save continues that one's stream, if it can:
the older stream's page records stay where they are, shared by both snapshots, and only what changed is written behind them.
Whether it can is asked anew each time (`Ground.base`); where it cannot, a whole stream is written, and the job says why.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from uuid import UUID

from stillframe.block.node import PageIndexPlace, SnapshotInfo
from stillframe.errors import Corrupt, StillframeError, io_failed
from stillframe.machine.folding import fold
from stillframe.machine.machine import Machine
from stillframe.machine.memory import GuestMemory
from stillframe.machine.tracking import Changes, TakenPages, Tracking, track
from stillframe.snapshots.rewind import Flags, NearbyMemory, PageCache
from stillframe.snapshots.selection import SnapshotNode
from stillframe.vmstate.page_index import PageIndex, unpack_page_index
from stillframe.vmstate.ram import RamBlock

_log = logging.getLogger(__name__)

STALE_AT_MOST = 0.5
"""A stream of which more than this part is records that are no longer in force is not continued, if nothing else is asked for."""


@dataclass(frozen=True, slots=True)
class Base:
    """A snapshot whose stream can be continued.

    :param index: where its pages lie. :param stream: the UUID that its continuations share.
    """

    snapshot: SnapshotInfo
    index: PageIndex
    stream: UUID


class Ground:
    """Of one machine; its methods are called by one snapshot operation at a time.

    :param track: makes what finds the changes in a memory, at a boundary. :raise OSError: from it, it cannot.
    :param stale_at_most: the part of a stream that may be out of force where it is continued.
    :ivar snapshot: the UUID of the snapshot that the machine stands on; None before the first, and after a load of one that
        stillframe did not make.
    """

    def __init__(
        self,
        machine: Machine,
        track: Callable[[GuestMemory], Tracking] = track,
        stale_at_most: float = STALE_AT_MOST,
    ) -> None:
        self._machine = machine
        self._track = track
        self._stale_at_most = stale_at_most
        self._tracking: Tracking | None = None
        self._index: PageIndex | None = None
        self._cache = PageCache()
        self._lifted: Changes | None = None
        self.snapshot: UUID | None = None

    def prepare(self) -> None:
        """Before the pause of a save, and for its shortness: changes are counted, and memory is in huge pages.

        :raise IOFailed: as `take`.
        """
        with self._known():
            fold(self._machine.memory, self._watched(), self._machine.at_boundary)

    def _watched(self) -> Tracking:
        if self._tracking is None:
            # Until now nobody watched: this is the first instant that changes can be counted from.
            self.snapshot = None
            self._tracking = self._track(self._machine.memory)
        return self._tracking

    def take(self) -> Changes:
        """Held: what has changed; given back to `stand` or `put_back`. What changes from here on is counted apart.

        :raise IOFailed: the host does not tell; the machine stands on nothing from here on.
        """
        with self._known():
            return self._watched().take()

    def changed(self) -> Flags:
        """Held, after `nearby` has found a way: the pages that changed, which goes on counting them. :raise IOFailed: as `take`."""
        with self._known():
            return self.tracking.changed()

    @contextmanager
    def _known(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            # What was found and not told is lost: the machine stands on nothing that is known.
            self.close()
            if isinstance(error, OSError):
                raise io_failed("Could not find out what has changed in memory", error) from error
            raise

    def stand(self, snapshot: UUID, index: PageIndex | None, changes: Changes) -> None:
        """The save that took `changes` is committed. :param index: where its pages lie."""
        self.tracking.stand(changes)
        self.snapshot, self._index = snapshot, index

    def put_back(self, changes: Changes) -> None:
        """The save that took `changes` came to nothing."""
        self.tracking.put_back(changes)

    def lift(self) -> None:
        """Held: watch the memory no more, for whoever else wants to; then `set_down`, or `stand_here`."""
        if self._tracking is not None and not self._tracking.reads_memory:
            self._lifted = self.take()
            self._tracking.close()
            self._tracking = None

    def set_down(self) -> None:
        """Held: the memory is what it was at `lift`, and is watched again."""
        if self._lifted is not None:
            self._tracking = self._track(self._machine.memory)
            self._tracking.put_back(self._lifted)
            self._lifted = None

    def stand_here(
        self, snapshot: UUID | None, index: PageIndex | None = None, changed: Flags | None = None
    ) -> None:
        """Held, at the end of a load: the machine is what this snapshot shows.

        :param index: where its pages lie, if known. :param changed: the pages that are something else by now.
        """
        # Until it is done the machine stands on nothing: what had changed since the former ground is not counted any more.
        self.snapshot = self._index = self._lifted = None
        try:
            if self._tracking is None:
                self._tracking = self._track(self._machine.memory)
            self._tracking.stand_here()
        except OSError as error:
            # The load is done all the same; the next save is a whole one.
            _log.warning("What changes in memory from here on is not known: %s", error.strerror)
            self.close()
            return
        if changed is not None:
            self._tracking.put_back(TakenPages(changed))
        self.snapshot, self._index = snapshot, index

    @property
    def tracking(self) -> Tracking:
        """What finds the changes. :raise RuntimeError: nothing was taken yet."""
        if self._tracking is None:
            raise RuntimeError("Nothing was taken")
        return self._tracking

    def close(self) -> None:
        """Watch no more."""
        if self._tracking is not None:
            self._tracking.close()
            self._tracking = None
        self._lifted = None
        self.snapshot = None

    def nearby(self, node: SnapshotNode, snapshot: SnapshotInfo) -> NearbyMemory | None:
        """The way back to a snapshot with the machine state on `node`, if it is so near that not all of it is to be read.

        That is the snapshot that the machine stands on, and the one that this continues.
        """
        lineage = snapshot.lineage
        if self._tracking is None or self._tracking.reads_memory or self.snapshot is None:
            return None
        if lineage is None or lineage.page_index is None:
            return None
        blocks = [RamBlock(block.name, block.size) for block in self._machine.memory]
        ours = next((s for s in node.store.snapshots() if _identity(s) == self.snapshot), None)
        if ours is None or ours.lineage is None or ours.lineage.page_index is None:
            return None
        is_parent = (
            ours.lineage.parent == lineage.snapshot
            and ours.lineage.page_index.stream == lineage.page_index.stream
        )
        if self.snapshot != lineage.snapshot and not is_parent:
            return None
        try:
            index = self._index_of(node, ours, ours.lineage.page_index, blocks)
            there = index
            if is_parent:
                there = read_page_index(node, snapshot, lineage.page_index, blocks)
        except Corrupt as error:
            _log.info("The whole machine state is read: the page index cannot be used: %s", error.message)
            return None
        differing = {name: index.offsets[name] != there.offsets[name] for name in index.offsets}
        self._cache.use_for(lineage.snapshot, there)
        return NearbyMemory(
            self._machine.memory, there, differing, partial(node.store.read_state, snapshot), self._cache
        )

    def _index_of(
        self, node: SnapshotNode, snapshot: SnapshotInfo, place: PageIndexPlace, blocks: Sequence[RamBlock]
    ) -> PageIndex:
        """The ground's own, remembered."""
        if self._index is None or self._index.blocks != tuple(blocks):
            self._index = read_page_index(node, snapshot, place, blocks)
        return self._index

    def base(self, node: SnapshotNode, blocks: Sequence[RamBlock]) -> tuple[Base | None, str]:
        """The snapshot on `node` whose stream a save of these blocks of memory can continue; else why there is none."""
        return find_base(node, self.snapshot, blocks, self._index_of, self._stale_at_most)


ReadIndex = Callable[[SnapshotNode, SnapshotInfo, PageIndexPlace, Sequence[RamBlock]], PageIndex]
"""As `read_page_index`, which it may remember."""


def find_base(
    node: SnapshotNode,
    standing: UUID | None,
    blocks: Sequence[RamBlock],
    read_index: ReadIndex,
    stale_at_most: float,
) -> tuple[Base | None, str]:
    """The snapshot that a machine stands on, if its stream can be continued.

    :param stale_at_most: the part of it that may be out of force. :return: it, or None and why not.
    """
    if standing is None:
        return None, "the machine stands on no snapshot whose pages are known"
    parent = next((s for s in node.store.snapshots() if _identity(s) == standing), None)
    if parent is None or parent.lineage is None:
        return None, f"node '{node.name}' does not have the snapshot that the machine stands on"
    place = parent.lineage.page_index
    if place is None:
        return None, f"snapshot '{parent.name}' has no page index"
    if place.ram_size != sum(block.length for block in blocks):
        return None, f"snapshot '{parent.name}' is of another size of memory"
    try:
        index = read_index(node, parent, place, blocks)
    except StillframeError as error:
        return None, f"the page index of snapshot '{parent.name}' cannot be used: {error.message}"
    if index.record_bytes - index.live_bytes > stale_at_most * index.record_bytes:
        part = f"{100 * stale_at_most:g} %"
        return None, f"more than {part} of the records in the state of '{parent.name}' are out of force"
    return Base(parent, index, place.stream), ""


def read_page_index(
    node: SnapshotNode, snapshot: SnapshotInfo, place: PageIndexPlace, blocks: Sequence[RamBlock]
) -> PageIndex:
    """The page index of a snapshot, examined. :raise Corrupt: it is damaged, or of another memory. :raise Failed: storage."""
    data = node.store.read_page_index(snapshot)
    if data is None or page_index_checksum(data) != place.checksum:
        raise Corrupt("its bytes are not those that were written")
    return unpack_page_index(data, snapshot.state_size, blocks)


def page_index_checksum(data: bytes) -> bytes:
    """16 bytes."""
    return hashlib.blake2b(data, digest_size=16).digest()


def _identity(snapshot: SnapshotInfo) -> UUID | None:
    return snapshot.lineage.snapshot if snapshot.lineage else None
