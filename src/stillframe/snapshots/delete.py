"""Deleting: a snapshot goes from every node that has it, or stays on all."""

from collections.abc import Sequence

from stillframe.block.node import GroupKind
from stillframe.snapshots.context import Context
from stillframe.snapshots.group import Step, all_or_none
from stillframe.snapshots.selection import Found


def delete(found: Sequence[Found], context: Context) -> None:
    """Take these snapshots off their images, in the order given; the guest does not notice.

    :raise Cancelled: nothing has changed. :raise Failed: storage; nothing has changed.
    """
    context.progress(0, 1)
    steps = [_step(each) for each in found]
    with all_or_none(steps, before_commit=context.point_of_no_return, kind=GroupKind.DELETE):
        pass
    context.progress(1, 1)


def _step(found: Found) -> Step:
    node, snapshot = found.node, found.snapshot
    return Step(
        node.name,
        lambda: node.store.prepare_delete(snapshot),
        f"Could not delete snapshot '{snapshot.name}' on '{node.called}'",
    )
