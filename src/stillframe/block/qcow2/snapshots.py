"""The snapshots of an image, as the layers above see them: `SnapshotStore` of block/node.py."""

from collections.abc import Sequence

from stillframe.block.node import Change, GroupMark, SnapshotInfo
from stillframe.block.open_state import OpenState
from stillframe.block.qcow2.image import Image
from stillframe.block.qcow2.marks import identity
from stillframe.block.qcow2.pending import Pending, freeze
from stillframe.block.qcow2.snapshot_table import SnapshotEntry
from stillframe.block.qcow2.state_area import StateArea, find
from stillframe.block.qcow2.unfinished import (
    doubtful_snapshot,
    refuse_if_unmarkable,
    refuse_if_withheld,
    refuse_unless_resolvable,
    resolve,
    write_mark,
)
from stillframe.errors import InUse


class Snapshots:
    """See `SnapshotStore`. A read-only image lists and reads."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._last_area: tuple[tuple[SnapshotEntry, ...], SnapshotInfo, StateArea] | None = None
        self._viewed: list[SnapshotInfo] = []

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
        refuse_if_withheld(self._image)
        return freeze(self._image)

    def shows(self, snapshot: SnapshotInfo) -> bool:
        """See `SnapshotStore`."""
        image = self._image
        with image.gate.lock:
            return image.shows == find(image, snapshot).id

    def prepare_revert(self, snapshot: SnapshotInfo) -> Change:
        """See `SnapshotStore`.

        :raise Unsupported: dirty bitmaps, or a version 2 image of another size.
        :raise InUse: a snapshot is pending, another change is not finished, or a snapshot is read as a disk of its own.
        """
        from stillframe.block.qcow2.changes import prepare_revert

        refuse_if_withheld(self._image)
        self._refuse_if_viewed(self._viewed)
        return prepare_revert(self._image, self._find(snapshot))

    def prepare_delete(self, snapshot: SnapshotInfo) -> Change:
        """See `SnapshotStore`. :raise InUse: a snapshot is pending, another change is not finished, or it is read."""
        from stillframe.block.qcow2.changes import prepare_delete

        refuse_if_withheld(self._image)
        self._refuse_if_viewed([each for each in self._viewed if each.id == snapshot.id])
        return prepare_delete(self._image, self._find(snapshot))

    def read_state(self, snapshot: SnapshotInfo, offset: int, length: int) -> bytes:
        """See `SnapshotStore`."""
        return self._area(snapshot).read(offset, length)

    # Snapshots that are read as disks of their own.

    def begin_view(self, snapshot: SnapshotInfo) -> bytearray:
        """The snapshot's L1 table, to be read until `end_view`: meanwhile it is not deleted.

        :raise NotFound: it is no longer there. :raise ImageCorrupt: it cannot be there.
        """
        l1 = self.l1_of(snapshot)
        self._viewed.append(snapshot)
        return l1

    def end_view(self, snapshot: SnapshotInfo) -> None:
        """The opposite of one `begin_view`."""
        self._viewed.remove(snapshot)

    def _refuse_if_viewed(self, viewed: Sequence[SnapshotInfo]) -> None:
        if viewed:
            raise InUse(
                f"Snapshot '{viewed[0].name}' is in use", remedy="Remove the export that reads it first."
            )

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
        write_mark(self._image, None, barred=False)

    def l1_of(self, snapshot: SnapshotInfo) -> bytearray:
        """The snapshot's L1 table. :raise NotFound: it is no longer there. :raise ImageCorrupt: it cannot be there."""
        return self._area(snapshot).l1

    def read_page_index(self, snapshot: SnapshotInfo) -> bytes | None:
        """See `SnapshotStore`."""
        return self._area(snapshot).read_page_index()

    def open_state(self, snapshot: SnapshotInfo, length: int) -> OpenState | None:
        """See `SnapshotStore`."""
        return self._area(snapshot).open(length)

    def _area(self, snapshot: SnapshotInfo) -> StateArea:
        """Of a snapshot; the last one is remembered, for as long as the list stays what it is."""
        listed = self._image.world.snapshots
        known = self._last_area
        if known is None or known[0] is not listed or known[1] is not snapshot:
            known = self._last_area = (listed, snapshot, StateArea(self._image, snapshot))
        return known[2]

    def _find(self, snapshot: SnapshotInfo) -> SnapshotEntry:
        return find(self._image, snapshot)
