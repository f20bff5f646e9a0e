"""Operations over several images that were interrupted, by a crash or the death of a process: found by their marks,
and brought to an end.

    the image that decides says     save                        load                       delete
    under way: none has it          the snapshots go            back to the disks before   the snapshots stay
    committed: all have it          the snapshots stay          the snapshot's disks stay  the snapshots go

Each image's part is one write of its header, which settles it (block/qcow2/unfinished.py). The mark of the image that decides
goes after the last of the others is settled; where some are not here it stays, as the word that they wait for. Without that
image nothing is done. So a crash in here is one more crash to recover from, and doing it again does nothing.

Marks are put on one after the other, the deciding image's first. So where that one says "under way", images without a mark may be
those of it that were not reached: as many as are wanting are taken for these. Where others were meant, they are found
later without an image that decides, and undone with `forget`.

Only marks that were found when an image was opened count: those of an operation at work in this process are its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from stillframe.block.graph import BlockGraph
from stillframe.block.node import GroupKind, GroupMark, GroupStage, Node
from stillframe.errors import Corrupt, InUse, NotFound, StillframeError
from stillframe.snapshots.context import told
from stillframe.snapshots.selection import SnapshotNode


@dataclass(frozen=True, slots=True)
class Recovered:
    """What was found of one interrupted operation, and what has become of it.

    :param mark: as one of its images carried it. :param nodes: the images that carried one, by node-name.
    :param committed: what was decided; None while the image that decides is not here.
    :param missing: images that are not here, or are read-only, and may wait for that word.
    :param problem: why it is not at its end; None where all images here are settled.
    """

    mark: GroupMark
    nodes: tuple[str, ...]
    committed: bool | None
    missing: int = 0
    problem: StillframeError | None = None

    def __str__(self) -> str:
        what = f"the interrupted {self.mark.kind.value} of {self.mark.images} images"
        here = ", ".join(f"'{name}'" for name in self.nodes)
        if self.problem is not None:
            return f"{what} is not resolved on {here}: {self.problem}"
        done = "completed" if self.committed else "undone"
        rest = f"; {self.missing} more of its images may wait for this" if self.missing else ""
        return f"{what} was {done} on {here}{rest}"


def snapshot_nodes(nodes: Sequence[Node]) -> tuple[SnapshotNode, ...]:
    """Those that keep snapshots, each image once, read-only ones too."""
    found: list[SnapshotNode] = []
    for node in nodes:
        store = node.snapshot_store
        if store is not None and all(store is not other.store for other in found):
            found.append(SnapshotNode(node, store))
    return tuple(found)


def recover(nodes: Sequence[SnapshotNode]) -> list[Recovered]:
    """Bring every interrupted operation on these images to its end, as far as they suffice for it.

    The caller sees to it that no operation of this process is at work on them.

    :return: one for each operation that there was, or is, anything to do for.
    """
    marked: dict[UUID, list[tuple[SnapshotNode, GroupMark]]] = {}
    for node in nodes:
        mark = node.store.unfinished
        if mark is not None:
            marked.setdefault(mark.operation, []).append((node, mark))
    found: list[Recovered] = []
    for operation, images in marked.items():
        if all(mark.stage is GroupStage.SETTLED for _, mark in images):
            continue
        unmarked = [node for node in nodes if _may_be_unmarked(node, operation)]
        found.append(_recover_one(images, len(unmarked)))
    return found


def recover_graph(graph: BlockGraph) -> list[Recovered]:
    """`recover` for all nodes of a graph."""
    return recover(snapshot_nodes(graph.nodes()))


def refuse_withheld(nodes: Sequence[SnapshotNode], results: Sequence[Recovered]) -> None:
    """Before a guest runs on these nodes.

    :param results: of `recover` for them.
    :raise StillframeError: one of them is in the middle of a load, and why it could not be brought out of it.
    """
    for node in nodes:
        if not node.store.is_withheld:
            continue
        for result in results:
            if node.name in result.nodes and result.problem is not None:
                raise result.problem
        raise InUse(
            f"Node '{node.name}' is part of a load of several images that was interrupted",
            remedy="Run `stillframe image recover` on all of them.",
        )


def forget(node: SnapshotNode) -> str | None:
    """Take an image out of an operation that cannot be resolved any more, without a loss: a load is undone, of which the
    snapshot is still there; the snapshot of a save or a delete is listed again.

    :return: what was done, in words; None where there was nothing to forget.
    :raise StillframeError: storage; to be tried again.
    """
    store = node.store
    mark = store.unfinished
    if mark is None:
        return None
    done = "left as it is"
    if mark.kind is not GroupKind.LOAD:
        done = "its snapshot is listed"
    elif store.is_withheld:
        try:
            store.resolve(committed=False)
            done = "the disk is what it was before the load; the snapshot is still there to be applied"
        except Corrupt:
            # It is neither as before nor as after: nobody knows better than what is in force.
            done = "the disk is left as it is"
    store.unmark()
    return f"the {mark.kind.value} of {mark.images} images is forgotten: {done}"


def _may_be_unmarked(node: SnapshotNode, operation: UUID) -> bool:
    """Whether this can be an image of the operation that its marks had not reached."""
    mark = node.store.unfinished
    is_free = mark is None or (mark.operation != operation and mark.stage is GroupStage.SETTLED)
    return is_free and not node.node.read_only


def _recover_one(images: Sequence[tuple[SnapshotNode, GroupMark]], unmarked: int) -> Recovered:
    """:param unmarked: how many images are here that it may not have reached."""
    names = tuple(node.name for node, _ in images)
    deciders = [(node, mark) for node, mark in images if mark.decides]
    if len(deciders) != 1 or len(images) > images[0][1].images:
        return Recovered(images[0][1], names, None, problem=_undecided(images, len(deciders)))
    decider, mark = deciders[0]
    committed = mark.stage is GroupStage.COMMITTED
    members = [node for node, other in images if not other.decides and not node.node.read_only]
    missing = max(0, mark.images - 1 - len(members) - (0 if committed else unmarked))
    try:
        if decider.node.read_only:
            raise InUse(
                f"Node '{decider.name}' is read-only, and the {mark.kind.value} that it decides was interrupted",
                remedy="Open it writable once, or run `stillframe image recover` on the images.",
            )
        # All are looked at before the first is touched: one that has changed by other hands stops the rest.
        for node in (decider, *members):
            with told(f"Node '{node.name}'"):
                node.store.refuse_unless_resolvable(committed=committed)
        for node in members:
            with told(f"Node '{node.name}'"):
                node.store.resolve(committed=committed)
        with told(f"Node '{decider.name}'"):
            if missing:
                decider.store.resolve(committed=committed)
            else:
                decider.store.unmark()
        for node in () if missing else members:
            with told(f"Node '{node.name}'"):
                node.store.unmark()
    except StillframeError as problem:
        return Recovered(mark, names, committed, missing, problem)
    return Recovered(mark, names, committed, missing)


def _undecided(images: Sequence[tuple[SnapshotNode, GroupMark]], deciders: int) -> StillframeError:
    mark = images[0][1]
    if not deciders:
        return NotFound(
            f"The image '{mark.decider}', which decides, is not here",
            remedy="Open it together with these, or run `stillframe image recover` on all of them; if it is gone "
            "for good, with --forget.",
        )
    return InUse(
        "There are more images here than it had, or several that decide: one is a copy of another",
        remedy="Open either the images themselves or their copies.",
    )
