"""What the three operations on snapshots make of the tables, as `Change`s (block/node.py) over a shadow switch.

    create  the snapshot takes the frozen L2 tables as they are; the active side gets copies of those in which a cluster
            loses COPIED, and shares the others
    revert  the active side shares the snapshot's L2 tables, or gets copies where they carry COPIED
    delete  the active side gets copies of the L2 tables in which a cluster is the image's own again

A refcount counts paths: a cluster under a shared L2 table has one reference from each tree that leads through it.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from enum import Enum

import numpy as np
import numpy.typing as npt

from stillframe.block.node import Change, GroupKind, GroupMark, GroupStage, SnapshotRecord
from stillframe.block.qcow2.image import Image, World
from stillframe.block.qcow2.layout import MAX_L1_BYTES
from stillframe.block.qcow2.lineage import pack_lineage
from stillframe.block.qcow2.marks import IDENTITY_BYTES, Mark, identity
from stillframe.block.qcow2.pending import Pending
from stillframe.block.qcow2.shadow import (
    U_COMPRESSED,
    U_COPIED,
    U_OFFSET,
    Entries,
    Shadow,
    clusters_of,
    l1_words,
    pack_words,
    read_tables,
)
from stillframe.block.qcow2.snapshot_table import (
    MAX_SNAPSHOTS,
    SnapshotEntry,
    check_l1_place,
    next_id,
    pack_extra,
)
from stillframe.block.qcow2.unfinished import write_mark
from stillframe.block.qcow2.wholly import wholly
from stillframe.errors import ImageCorrupt, InUse, InvalidRequest, LimitReached, Unsupported

_ALL_ALLOCATED = 0x00000000FFFFFFFF
"""The second word of an extended L2 entry whose 32 parts all have data."""


class Stage(Enum):
    """How far a change has come."""

    PREPARED = "prepared"
    COMMITTED = "committed"
    OVER = "over"


class SwitchChange:
    """A `Change`: a shadow that is durable, and the switch to it."""

    def __init__(self, shadow: Shadow, new: World, pending: Pending | None = None) -> None:
        self._image = shadow.image
        self._shadow = shadow
        self._old = shadow.old
        self._new = new
        self._pending = pending
        self._shown: bytes | None = None
        self._stage = Stage.PREPARED
        self._lease: list[tuple[int, int]] = []
        self._mark: Mark | None = None
        self._at_commit: Mark | None = None
        self._barred = False

    @property
    def image_name(self) -> str:
        """See `Change`."""
        return os.path.basename(self._image.file.node.info().filename)

    def mark(self, mark: GroupMark) -> None:
        """See `Change`: durable at the return. :raise LimitReached: the header has no room; nothing has changed."""
        image = self._image
        snapshot, before, after = bytes(IDENTITY_BYTES), b"", b""
        if mark.kind is GroupKind.LOAD:
            before, after = self._old.header.pack_world(), self._new.header.pack_world()
        else:
            there = {identity(entry) for entry in self._old.snapshots}
            (snapshot,) = there ^ {identity(entry) for entry in self._new.snapshots}
        self._mark = Mark(mark, snapshot, before, after)
        self._barred = mark.kind is GroupKind.LOAD
        try:
            write_mark(image, self._mark, barred=self._barred)
        except LimitReached:
            self._mark = None
            raise
        image.found_mark = None
        if mark.decides:
            self.carry(self._staged(GroupStage.COMMITTED), barred=self._barred)

    def show(self, snapshot: bytes) -> None:
        """Once it is finished, the disk is what the snapshot of this id shows."""
        self._shown = snapshot

    def carry(self, mark: Mark, *, barred: bool) -> None:
        """Before `commit`: this mark goes into the header with the switch."""
        self._at_commit, self._barred = mark, barred

    def settle(self) -> None:
        """See `Change`: durable at the return."""
        if self._mark is None:
            return
        stage = GroupStage.SETTLED
        if self._mark.group.decides:
            present = self._image.sector.mark
            stage = present.group.stage if present else GroupStage.UNDER_WAY
        # Also where the mark could not be written: it may be in the file all the same.
        write_mark(self._image, self._staged(stage), barred=False)

    def unmark(self) -> None:
        """See `Change`: durable at the return, unless the image was settled."""
        if self._mark is not None:
            image = self._image
            is_settled = image.sector.mark is not None and image.sector.mark.group.stage is GroupStage.SETTLED
            write_mark(image, None, barred=False, flush=not is_settled)
            self._mark = self._at_commit = None

    def _staged(self, stage: GroupStage) -> Mark:
        mark = self._mark
        if mark is None:
            raise InUse("The change of the image's snapshots carries no mark")
        return replace(mark, group=replace(mark.group, stage=stage))

    def commit(self) -> None:
        """See `Change`. After an error the old world is in force, or not known to be and the image takes no writes."""
        if self._stage is not Stage.PREPARED:
            raise InUse("This change of the image's snapshots was committed or given up before")
        image = self._image
        image.gate.hold_writes()
        image.switch_world(self._new, self._at_commit, barred=self._barred)
        self._stage = Stage.COMMITTED
        with image.gate.lock:
            self._lease = image.refcounts.take_lease()
            image.forget_tables()

    def finish(self) -> None:
        """See `Change`; for a second time, nothing."""
        if self._stage is not Stage.COMMITTED:
            return
        image = self._image
        freed: list[tuple[int, int]] = []
        try:
            # First: whatever goes wrong from here on, nobody may give the state of a snapshot back that is on the list.
            if self._pending is not None:
                with image.gate.lock:
                    self._pending.end()
                    self._pending.release_state()
            self._note_what_is_shown()
            freed = self._shadow.freed()
            image.gate.let_writes_go()
            with image.gate.lock:
                image.gate.wait_until_quiet()
                for first, count in freed:
                    image.refcounts.hold(first, count)
        finally:
            self._over()
        self._punch(freed)

    def _note_what_is_shown(self) -> None:
        image = self._image
        with image.gate.lock:
            if self._pending is not None and image.shows is self._pending:
                image.shows = self._new.snapshots[-1].id
            elif self._shown is not None:
                image.shows = self._shown
            elif image.shows not in {entry.id for entry in self._new.snapshots}:
                image.shows = None

    def _punch(self, freed: list[tuple[int, int]]) -> None:
        """Give space back while the guest goes on, which can take long: nothing of it is handed out before."""
        image = self._image
        bits = image.header.cluster_bits
        try:
            for first, count in freed:
                image.file.discard(first << bits, count << bits)
        finally:
            with image.gate.lock:
                for first, count in freed:
                    image.refcounts.unreserve(first, count)

    def roll_back(self) -> None:
        """See `Change`; before a commit it is `abandon`, for a second time nothing."""
        self.abandon()

    def abandon(self) -> None:
        """See `Change`; for a second time, nothing.

        A commit that was interrupted may have switched all the same: then this is `roll_back`.
        """
        if self._stage is Stage.OVER:
            return
        try:
            wholly(self._bring_back)(self._image)
            if not self._image.is_in_doubt:
                self._shadow.give_back()
        finally:
            self._over()
        if self._pending is not None:
            self._pending.abandon()

    def _bring_back(self, image: Image) -> None:
        """The old world is in force again."""
        is_in_force = image.header.pack_world() == self._new.header.pack_world()
        if is_in_force or image.is_in_doubt:
            # In doubt: a commit has failed, and putting the old world back, too: perhaps it can be done now.
            self._restore()
        if is_in_force:
            with image.gate.lock:
                image.forget_tables()
                for first, count in self._lease:
                    image.refcounts.give_back(first, count)

    def suspend(self) -> None:
        """See `Change`; before a commit it is `abandon`, for a second time nothing."""
        if self._stage is not Stage.COMMITTED:
            self.abandon()
            return
        image = self._image
        image.leave_in_doubt(self._old)
        with image.gate.lock:
            image.forget_tables()
        self._over()
        if self._pending is not None:
            self._pending.abandon()

    def _restore(self) -> None:
        # Where the switch took a word of the mark with it, the way back takes the word before it.
        self._image.restore_world(self._old, self._mark if self._at_commit else None, barred=self._barred)

    def _over(self) -> None:
        self._stage = Stage.OVER
        if not self._image.is_in_doubt:
            # Otherwise both worlds may be in force: nothing of either is handed out any more.
            self._shadow.give_up()
        self._image.gate.end_switch()


def _switch(image: Image, build: Callable[[Shadow], World], pending: Pending | None = None) -> SwitchChange:
    """Build a new world inside a switch; on an error nothing has changed."""
    image.refuse_if_broken()
    image.flush()
    image.gate.begin_switch()
    shadow = None
    try:
        image.settle_all()
        shadow = Shadow(image)
        return SwitchChange(shadow, build(shadow), pending)
    except BaseException:
        try:
            if shadow is not None:
                shadow.give_back()
        finally:
            image.gate.end_switch()
        raise


def switch_now(image: Image, build: Callable[[Shadow], World]) -> None:
    """A change that stands alone: prepared, committed and finished, or nothing."""
    change = _switch(image, build)
    try:
        change.commit()
    except BaseException:
        change.abandon()
        raise
    change.finish()


def prepare_create(image: Image, pending: Pending, record: SnapshotRecord) -> Change:
    """See `PendingSnapshot.prepare`."""
    name = record.name.encode("utf-8", "surrogateescape")
    if len(name) > 255:
        raise InvalidRequest(f"The snapshot name has {len(name)} bytes, 255 are allowed")
    old = image.world
    size = old.header.size
    if len(old.snapshots) >= MAX_SNAPSHOTS:
        raise LimitReached(f"An image holds at most {MAX_SNAPSHOTS} snapshots")
    extra = pack_extra(
        pending.state_size, size, record.icount, pack_lineage(record.lineage) if record.lineage else b""
    )

    def build(shadow: Shadow) -> World:
        l1_size = image.header.l1_entries_for(size)
        active = l1_words(image.world.l1)
        _release_tree(shadow, active[l1_size:])
        snapshot = l1_words(pending.frozen_l1)[:l1_size] & ~U_COPIED
        new_active = _share_with_snapshot(shadow, pending, active[:l1_size])
        state = _place_state(shadow, pending)
        snapshot = np.concatenate((snapshot, state))
        if len(snapshot) * 8 > MAX_L1_BYTES:
            raise LimitReached("The machine state does not fit into the snapshot's L1 table")
        entry = SnapshotEntry(
            l1_offset=shadow.place(pack_words(snapshot)),
            l1_size=len(snapshot),
            id=next_id(image.world.snapshots),
            name=name,
            date_sec=record.date_sec,
            date_nsec=record.date_nsec,
            vm_clock_ns=record.vm_clock_ns,
            state_size_32=0,
            extra=extra,
        )
        kept = tuple(entry.completed(size) for entry in image.world.snapshots)
        return shadow.world(l1=pack_words(new_active), snapshots=(*kept, entry))

    return _switch(image, build, pending)


def _share_with_snapshot(shadow: Shadow, pending: Pending, active: Entries) -> Entries:
    """The active L1 once the snapshot has taken the frozen tree."""
    image = shadow.image
    bits = image.header.cluster_bits
    new = active.copy()
    used = np.flatnonzero(active & U_OFFSET)
    for which, tables in read_tables(image, active[used] & U_OFFSET):
        indices = used[which]
        words = tables[..., 0]
        fresh = np.zeros(words.shape, np.bool_)
        is_fresh = np.zeros(len(tables), np.bool_)
        for row, l1_index in enumerate(indices.tolist()):
            flags = pending.fresh_flags(l1_index)
            if flags is not None:
                is_fresh[row] = True
                fresh[row] = np.frombuffer(flags, np.bool_)
        shadow.add(clusters_of(words[~fresh], bits), +1)
        shared, changed = _without_copied(tables, but=fresh)
        # A table of the snapshot's that needs no change is used by both; one of the active side's alone stays its own.
        both = ~is_fresh & ~changed
        shadow.add((active[indices[both]] & U_OFFSET).astype(np.int64) >> bits, +1)
        new[indices[both]] &= ~U_COPIED
        if changed.any():
            new[indices[changed]] = shadow.place_tables(shared) | U_COPIED
        replaced = is_fresh & changed
        shadow.add((active[indices[replaced]] & U_OFFSET).astype(np.int64) >> bits, -1)
    return new


def _place_state(shadow: Shadow, pending: Pending) -> Entries:
    """L2 tables over the state's clusters: their L1 entries."""
    header = shadow.image.header
    for first, count in pending.reserved:
        shadow.count_new(first, count)
    shared = np.frombuffer(pending.state_hosts, np.int64)[: pending.shared_clusters]
    shadow.add(shared[shared != 0], +1)
    hosts = np.frombuffer(pending.state_hosts, np.int64).astype(np.uint64) << np.uint64(header.cluster_bits)
    if not len(hosts):
        return np.zeros(0, np.uint64)
    rows = -(-len(hosts) // header.l2_entries)
    tables = np.zeros((rows * header.l2_entries, header.l2_entry_words), np.uint64)
    tables[: len(hosts), 0] = hosts
    if header.has_extended_l2:
        tables[: len(hosts), 1] = np.where(hosts != 0, np.uint64(_ALL_ALLOCATED), np.uint64(0))
    return shadow.place_tables(tables.reshape(rows, header.l2_entries, header.l2_entry_words))


def prepare_revert(image: Image, entry: SnapshotEntry) -> Change:
    """See `SnapshotStore.prepare_revert`."""
    _refuse_if_pending(image)
    if image.has_bitmaps:
        raise Unsupported("Device has active dirty bitmaps", remedy="Remove the bitmaps first.")
    header = image.header
    check_l1_place(entry, header)
    size = entry.disk_size(header.size)
    if size != header.size and header.version < 3:
        raise Unsupported("Can't resize a v2 image which has snapshots")
    l1_size = header.l1_entries_for(size)
    if l1_size * 8 > MAX_L1_BYTES:
        raise ImageCorrupt("Snapshot L1 table too large")

    def build(shadow: Shadow) -> World:
        words = np.zeros(l1_size, np.uint64)
        present = min(l1_size, entry.l1_size)
        words[:present] = l1_words(image.file.read(entry.l1_offset, present * 8))
        used = np.flatnonzero(words & U_OFFSET)
        words[:] &= U_OFFSET
        new = words.copy()
        bits = header.cluster_bits
        # Released first: what both trees share keeps the snapshot's own reference, and passes no limit on the way.
        _release_tree(shadow, l1_words(image.world.l1))
        for which, tables in read_tables(image, words[used]):
            indices = used[which]
            shadow.add(clusters_of(tables[..., 0], bits), +1)
            shared, changed = _without_copied(tables)
            shadow.add(words[indices[~changed]].astype(np.int64) >> bits, +1)
            if changed.any():
                new[indices[changed]] = shadow.place_tables(shared) | U_COPIED
        return shadow.world(l1=pack_words(new), snapshots=None, size=size)

    change = _switch(image, build)
    change.show(entry.id)
    return change


def prepare_delete(image: Image, entry: SnapshotEntry) -> SwitchChange:
    """See `SnapshotStore.prepare_delete`."""
    _refuse_if_pending(image)
    check_l1_place(entry, image.header)

    def build(shadow: Shadow) -> World:
        _release_tree(shadow, l1_words(image.file.read(entry.l1_offset, entry.l1_size * 8)))
        shadow.free_bytes(entry.l1_offset, entry.l1_size * 8)
        active = l1_words(image.world.l1)
        new = own_again(shadow, active)
        kept = tuple(
            other.completed(image.header.size) for other in image.world.snapshots if other is not entry
        )
        l1 = None if np.array_equal(new, active) else pack_words(new)
        return shadow.world(l1=l1, snapshots=kept)

    return _switch(image, build)


def own_again(shadow: Shadow, active: Entries) -> Entries:
    """The active L1 with COPIED wherever, and only where, the new world's refcount is one, or the cluster a data file's."""
    header = shadow.image.header
    bits = header.cluster_bits
    new = active.copy()
    used = np.flatnonzero(active & U_OFFSET)
    offsets = active & U_OFFSET
    for which, tables in read_tables(shadow.image, offsets[used]):
        indices = used[which]
        words = tables[..., 0]
        is_copied = (words & U_COPIED) != 0
        hosts = words & U_OFFSET
        plain = (hosts != 0) & ((words & U_COMPRESSED) == 0)
        if header.has_data_file:
            # There, COPIED alone makes offset 0 a place.
            is_own = plain | is_copied
        else:
            is_own = np.zeros(words.shape, np.bool_)
            is_own[plain] = shadow.counts_of(hosts[plain].astype(np.int64) >> bits) == 1
        wrong = is_own != is_copied
        changed = wrong.any(axis=1)
        words ^= np.where(wrong, U_COPIED, np.uint64(0))
        same = indices[~changed]
        counts = shadow.counts_of(offsets[same].astype(np.int64) >> bits)
        new[same] = offsets[same] | np.where(counts == 1, U_COPIED, np.uint64(0))
        if changed.any():
            shadow.add(offsets[indices[changed]].astype(np.int64) >> bits, -1)
            new[indices[changed]] = shadow.place_tables(tables[changed]) | U_COPIED
    return new


def _release_tree(shadow: Shadow, l1: Entries) -> None:
    """One path less to everything under these L1 entries, the L2 tables too."""
    bits = shadow.image.header.cluster_bits
    offsets = l1 & U_OFFSET
    offsets = offsets[offsets != 0]
    for which, tables in read_tables(shadow.image, offsets):
        shadow.add(clusters_of(tables[..., 0].reshape(-1), bits), -1)
        shadow.add(offsets[which].astype(np.int64) >> bits, -1)


def _without_copied(
    tables: Entries, *, but: npt.NDArray[np.bool_] | None = None
) -> tuple[Entries, npt.NDArray[np.bool_]]:
    """COPIED, which compressed entries never carry, cleared: the tables that this changes, and which they are.

    :param but: entries that keep it.
    """
    copied = (tables[..., 0] & U_COPIED) != 0
    if but is not None:
        copied &= ~but
    changed = copied.any(axis=1)
    cleared = tables[changed]
    cleared[..., 0] ^= np.where(copied[changed], U_COPIED, np.uint64(0))
    return cleared, changed


def _refuse_if_pending(image: Image) -> None:
    if image.pending is not None:
        raise InUse("A snapshot of the image is pending: commit or abandon it first")
