"""An image's refcounts made to agree with what its tables refer to, by the shadow switch: all at once or not at all.

The tables that map a disk are taken as they are. What is repaired is what can be derived from them: refcounts, and the COPIED
flags of the active tree. Snapshots that lack what version 3 demands get it spelt out: the sizes that they are read with.
"""

from typing import Literal

import numpy as np

from stillframe.block.node import Node
from stillframe.block.qcow2.changes import own_again, switch_now
from stillframe.block.qcow2.check import CheckResult, Walk, refuse_if_unreadable
from stillframe.block.qcow2.image import Image, World
from stillframe.block.qcow2.layout import CORRUPT, DIRTY, MAX_OFFSET, REFCOUNT_TABLE_RESERVED
from stillframe.block.qcow2.shadow import Shadow, l1_words, pack_words
from stillframe.block.qcow2.snapshot_table import SnapshotEntry
from stillframe.block.qcow2.unfinished import refuse_if_withheld
from stillframe.block.qcow2.widths import runs_of

What = Literal["leaks", "all"]


def repair(file: Node, what: What) -> CheckResult:
    """Repair the image in an open, writable node.

    :param what: "leaks" gives back clusters that nobody refers to; "all" also raises refcounts that are too low, and completes
        entries of the snapshot table.
    :return: what a second check found, and how much was repaired before it.
    :raise ImageCorrupt: too damaged to be repaired; nothing was written.
    :raise InUse: it is part of a load that was interrupted.
    """
    image = Image(file, None, read_only=False, is_repair=True)
    # Both worlds of an interrupted load count their own references; only one of them would be repaired.
    refuse_if_withheld(image)
    result = repair_open(image, what)
    marks = image.header.incompatible & (CORRUPT | DIRTY)
    if marks and not result.corruptions and not result.check_errors:
        image.set_features(incompatible=image.header.incompatible & ~marks)
    image.close()
    return result


def repair_open(image: Image, what: What) -> CheckResult:
    """`repair` for an image that is open and that nobody else uses."""
    refuse_if_unreadable(image)
    first = Walk(image)
    if not first.result.leaks and not first.result.corruptions:
        return first.result
    _forget_impossible_blocks(image)
    held = _hold_uncounted(image, first)
    per_block = image.header.refcounts_in_block

    def build(shadow: Shadow) -> World:
        for index in sorted(first.references.keys() | first.refcounts.keys()):
            if index not in first.references and index * per_block * image.cluster_size >= image.file.size:
                # What is counted past the file's end takes no space.
                continue
            nothing = np.zeros(image.header.refcounts_in_block, np.int64)
            found = first.references.get(index, nothing).astype(np.int64)
            said = first.refcounts.get(index, nothing).astype(np.int64)
            shadow.set_counts(index, found if what == "all" else np.minimum(found, said))
        active = l1_words(image.world.l1)
        new = own_again(shadow, active)
        return shadow.world(
            l1=None if np.array_equal(new, active) else pack_words(new),
            snapshots=_completed(image.world) if what == "all" else None,
        )

    try:
        switch_now(image, build)
    finally:
        with image.gate.lock:
            for run in held:
                image.refcounts.unreserve(*run)
    second = Walk(image).result
    second.leaks_fixed = max(0, first.result.leaks - second.leaks)
    second.corruptions_fixed = max(0, first.result.corruptions - second.corruptions)
    second.messages = first.result.messages
    return second


def _completed(world: World) -> tuple[SnapshotEntry, ...] | None:
    """The snapshots, with the sizes that version 3 demands; None where they have them."""
    if world.header.version < 3 or all(entry.is_complete for entry in world.snapshots):
        return None
    return tuple(entry.completed(world.header.size) for entry in world.snapshots)


def _forget_impossible_blocks(image: Image) -> None:
    """Entries of the refcount table that point where no block can be, or where another's is, count as no block."""
    words = np.frombuffer(bytes(image.world.refcount_table), ">u8").astype(np.uint64)
    inside = np.uint64(REFCOUNT_TABLE_RESERVED | (image.cluster_size - 1))
    possible = ((words & inside) == 0) & (words < np.uint64(min(image.file.size, MAX_OFFSET)))
    first = np.zeros(len(words), np.bool_)
    first[np.unique(words, return_index=True)[1]] = True
    image.world.refcount_table[:] = np.where(possible & first, words, np.uint64(0)).astype(">u8").tobytes()


def _hold_uncounted(image: Image, walk: Walk) -> list[tuple[int, int]]:
    """Clusters in use of which the refcount says they are free must not be taken for the new tables."""
    held: list[tuple[int, int]] = []
    per_block = image.header.refcounts_in_block
    for index, found in walk.references.items():
        said = walk.refcounts.get(index)
        uncounted = found > 0 if said is None else (found > 0) & (said == 0)
        held += runs_of(np.flatnonzero(uncounted) + index * per_block)
    with image.gate.lock:
        for run in held:
            image.refcounts.hold(*run)
    return held
