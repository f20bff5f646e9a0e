"""An image that was found with the mark of an operation over several images, and what becomes of it.

    save     under way: the snapshot goes        committed: it stays
    load     under way: the world before         committed: the world after, which is in force
    delete   under way: the snapshot stays       committed: it goes

The image's own part is one write of the header each time, which settles the mark with it; done twice, the second time
finds nothing to do. What the group decides is found in snapshots/recovery.py.
"""

import uuid
from dataclasses import replace

from stillframe.block.node import GroupKind, GroupMark, GroupStage
from stillframe.block.qcow2.image import Image, said
from stillframe.block.qcow2.marks import IDENTITY_BYTES, MAX_DECIDER_BYTES, WORLD_BYTES, Mark, identity
from stillframe.block.qcow2.snapshot_table import SnapshotEntry
from stillframe.errors import ImageCorrupt, InUse, IOFailed, LimitReached


def write_mark(
    image: Image, mark: Mark | None, *, barred: bool, world: bytes | None = None, flush: bool = True
) -> None:
    """Put another mark into the header, or none. The parameters are those of `FirstSector.write_mark`.

    :raise LimitReached: there is no room for it. :raise IOFailed: it may be there; the image takes no more writes.
    """
    try:
        try:
            image.sector.write_mark(mark, barred=barred, world=world, flush=flush)
        except IOFailed:
            # Once more, as in `Image.restore_world`.
            image.sector.write_mark(mark, barred=barred, world=world, flush=flush)
    except LimitReached:
        raise
    except BaseException as error:
        image.mark_failure = f"The header of the image could not be written ({said(error)})"
        image.broken = image.broken or image.mark_failure
        raise
    if image.broken is image.mark_failure:
        image.broken = None


def refuse_if_withheld(image: Image) -> None:
    """:raise InUse: the content may be that before or after an interrupted load, unlike its group's."""
    if image.is_withheld:
        raise InUse(
            "The image is part of a load of several images that was interrupted",
            remedy="Open all images of the group together, or run `stillframe image recover` on them.",
        )


def doubtful_snapshot(image: Image) -> bytes | None:
    """The `identity` of a snapshot that may be a leftover, as long as the deciding image has not been asked."""
    mark = image.sector.mark
    if mark is None or mark.group.decides or mark.group.stage is not GroupStage.UNDER_WAY:
        return None
    return None if mark.group.kind is GroupKind.LOAD else mark.snapshot


def refuse_if_unmarkable(image: Image) -> None:
    """See `SnapshotStore`."""
    image.refuse_if_broken()
    mark = image.sector.mark
    if image.sector.has_foreign_mark:
        raise InUse(
            "The image is part of an operation over several images that a later version of stillframe began",
            remedy="Use that version to finish it.",
        )
    if image.found_mark is not None and mark is not None and mark.group.stage is not GroupStage.SETTLED:
        group = mark.group
        what = f"an unfinished {group.kind.value} of {group.images} images"
        raise InUse(
            f"The image decides on {what}, and not all of them have been opened since"
            if group.decides
            else f"The image is part of {what}, which '{group.decider}' decides",
            remedy="Open all of them together, or run `stillframe image recover` on them.",
        )
    largest = GroupMark(
        uuid.UUID(int=0), GroupKind.LOAD, GroupStage.UNDER_WAY, True, 1, "x" * MAX_DECIDER_BYTES
    )
    world = bytes(WORLD_BYTES)
    image.sector.refuse_without_room(Mark(largest, bytes(IDENTITY_BYTES), world, world))


def refuse_unless_resolvable(image: Image, *, committed: bool) -> None:
    """See `SnapshotStore`. An image that nobody barred is free to have changed since."""
    mark = image.sector.mark
    if mark is None or mark.group.kind is not GroupKind.LOAD or not image.sector.is_barred:
        return
    present = image.header.pack_world()
    # The deciding image switches last, and every member before it.
    expected = {mark.after} if committed else {mark.before}
    if not committed and not mark.group.decides:
        expected.add(mark.after)
    if present not in expected:
        raise ImageCorrupt(
            f"The image is neither as it was before the unfinished load of {mark.group.images} images nor as it "
            "is after it",
            remedy="`stillframe image recover --forget` leaves it as it is.",
        )


def resolve(image: Image, *, committed: bool) -> None:
    """See `SnapshotStore`.

    :raise ImageCorrupt: see `refuse_unless_resolvable`; nothing was written. :raise IOFailed: to be tried again.
    """
    mark = image.sector.mark
    if mark is None or mark.group.stage is GroupStage.SETTLED:
        return
    refuse_unless_resolvable(image, committed=committed)
    stage = mark.group.stage if mark.group.decides else GroupStage.SETTLED
    end = replace(mark, group=replace(mark.group, stage=stage))
    is_load = mark.group.kind is GroupKind.LOAD
    if is_load and image.sector.is_barred and not committed and image.header.pack_world() != mark.before:
        _return_to(image, mark.before, end)
        return
    leftover = (
        _leftover(image, mark) if not is_load and committed == (mark.group.kind is GroupKind.DELETE) else None
    )
    if leftover is not None:
        _delete(image, leftover, end)
    elif end != mark or image.sector.is_barred:
        write_mark(image, end, barred=False)


def _leftover(image: Image, mark: Mark) -> SnapshotEntry | None:
    return next((entry for entry in image.world.snapshots if identity(entry) == mark.snapshot), None)


def _return_to(image: Image, before: bytes, end: Mark) -> None:
    """The world before the load, of which nothing was given away: that begins after the group's last switch."""
    world = image.tables_of(image.header.with_world(before))
    write_mark(image, end, barred=False, world=before)
    with image.gate.lock:
        image.world = world
        image.forget_tables()


def _delete(image: Image, entry: SnapshotEntry, end: Mark) -> None:
    from stillframe.block.qcow2.changes import prepare_delete

    change = prepare_delete(image, entry)
    try:
        change.carry(end, barred=False)
        change.commit()
    except BaseException:
        change.abandon()
        raise
    change.finish()
