"""The snapshots of an image, as the layers above see them: `SnapshotStore` of block/node.py."""

from collections.abc import Sequence

from stillframe.block.node import Change, GroupMark, SnapshotInfo
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.marks import identity
from stillframe.block.qcow2.pending import Pending, freeze
from stillframe.block.qcow2.snapshot_table import SnapshotEntry, check_l1_place
from stillframe.block.qcow2.unfinished import (
    doubtful_snapshot,
    refuse_if_unmarkable,
    refuse_unless_resolvable,
    resolve,
)
from stillframe.errors import NotFound


class Snapshots:
    """See `SnapshotStore`. A read-only image lists and reads."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._l1_of: tuple[tuple[SnapshotEntry, ...], SnapshotEntry, bytearray] | None = None

    def snapshots(self) -> Sequence[SnapshotInfo]:
        """See `SnapshotStore`."""
        size = self._image.header.size
        doubtful = doubtful_snapshot(self._image)
        return tuple(
            entry.info(size)
            for entry in self._image.world.snapshots
            if doubtful is None or identity(entry) != doubtful
        )

    def freeze(self) -> Pending:
        """See `SnapshotStore`."""
        self._image.refuse_if_withheld()
        return freeze(self._image)

    def prepare_revert(self, snapshot: SnapshotInfo) -> Change:
        """See `SnapshotStore`.

        :raise Unsupported: dirty bitmaps, or a version 2 image of another size.
        :raise InUse: a snapshot is pending, or another change is not finished.
        """
        from stillframe.block.qcow2.changes import prepare_revert

        self._image.refuse_if_withheld()
        return prepare_revert(self._image, self._find(snapshot))

    def prepare_delete(self, snapshot: SnapshotInfo) -> Change:
        """See `SnapshotStore`. :raise InUse: a snapshot is pending, or another change is not finished."""
        from stillframe.block.qcow2.changes import prepare_delete

        self._image.refuse_if_withheld()
        return prepare_delete(self._image, self._find(snapshot))

    def read_state(self, snapshot: SnapshotInfo, offset: int, length: int) -> bytes:
        """See `SnapshotStore`."""
        image = self._image
        entry = self._find(snapshot)
        length = max(0, min(length, entry.state_size - offset))
        start = image.header.l1_entries_for(entry.disk_size(image.header.size)) * image.header.l2_span
        buffer = bytearray(length)
        image.read_tree(self._l1(entry), start + offset, memoryview(buffer))
        return bytes(buffer)

    # A mark that was found.

    def refuse_if_unmarkable(self) -> None:
        """See `SnapshotStore`."""
        refuse_if_unmarkable(self._image)

    @property
    def unfinished(self) -> GroupMark | None:
        """See `SnapshotStore`."""
        image = self._image
        return image.sector.mark.group if image.found_mark and image.sector.mark else None

    @property
    def is_withheld(self) -> bool:
        """See `SnapshotStore`."""
        return self._image.is_withheld

    def refuse_unless_resolvable(self, *, committed: bool) -> None:
        """See `SnapshotStore`."""
        refuse_unless_resolvable(self._image, committed=committed)

    def resolve(self, *, committed: bool) -> None:
        """See `SnapshotStore`."""
        resolve(self._image, committed=committed)

    def unmark(self) -> None:
        """See `SnapshotStore`."""
        self._image.write_mark(None, barred=False)

    def l1_of(self, snapshot: SnapshotInfo) -> bytearray:
        """The snapshot's L1 table. :raise NotFound: it is no longer there. :raise ImageCorrupt: it cannot be there."""
        return self._l1(self._find(snapshot))

    def _l1(self, entry: SnapshotEntry) -> bytearray:
        """A snapshot's L1; the last one is remembered, for as long as the list stays what it is."""
        known, listed = self._l1_of, self._image.world.snapshots
        if known is None or known[0] is not listed or known[1] is not entry:
            check_l1_place(entry, self._image.header)
            l1 = self._image.file.read(entry.l1_offset, entry.l1_size * 8)
            known = self._l1_of = (listed, entry, l1)
        return known[2]

    def _find(self, snapshot: SnapshotInfo) -> SnapshotEntry:
        size = self._image.header.size
        for entry in self._image.world.snapshots:
            info = entry.info(size)
            if (info.id, info.name) == (snapshot.id, snapshot.name):
                return entry
        raise NotFound(f"Can't find the snapshot '{snapshot.name}'")
