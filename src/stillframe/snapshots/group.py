"""All nodes or none: the snapshots of several images change as one.

    prepare   every image, in order            a failure: abandon all; nothing has changed
    commit    every image, in order            a failure: roll back those committed, abandon the others
    the body of the `with` block               a failure: roll back all
    finish    every image                      a failure leaks space, and is logged

The order of the images is the caller's: members before the node with the machine state for a save, which
makes that node's switch the commit of the group; that node first for a delete. What `Change` promises is in
block/node.py.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from stillframe.block.node import Change, PendingSnapshot, SnapshotRecord
from stillframe.errors import StillframeError
from stillframe.snapshots.context import told
from stillframe.snapshots.selection import SnapshotNode

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Step:
    """One image's part in the change of a group.

    :param failing: QEMU's words for a failure of this part, to which the cause is added.
    """

    node_name: str
    prepare: Callable[[], Change]
    failing: str


@contextmanager
def all_or_none(steps: Sequence[Step], before_commit: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Change every image, run the block with the change in force, then make it final.

    :param before_commit: called when all are prepared and none has changed; raises to give up.
    :raise StillframeError: nothing has changed; where an image could not be brought back, `left` names it.
    """
    waiting = list(steps)
    prepared: list[tuple[Step, Change]] = []
    committed: list[tuple[Step, Change]] = []
    try:
        while waiting:
            with told(waiting[0].failing):
                prepared.append((waiting[0], waiting[0].prepare()))
            del waiting[0]
        before_commit()
        while prepared:
            with told(prepared[0][0].failing):
                prepared[0][1].commit()
            # In both for an instant: to undo a change twice does no harm, and never would.
            committed.append(prepared[0])
            del prepared[0]
        yield
    except BaseException as error:
        undo = [(step.node_name, change.roll_back) for step, change in reversed(committed)]
        undo += [(step.node_name, change.abandon) for step, change in prepared]
        _give_back(error, undo)
        raise
    for step, change in committed:
        try:
            change.finish()
        except StillframeError as error:
            _log.warning("Node '%s' has lost space that nobody uses: %s", step.node_name, error)


class FrozenNodes:
    """Nodes whose content of one instant is on its way to become snapshots; made by `frozen_nodes`."""

    def __init__(self) -> None:
        self._pending: dict[str, PendingSnapshot] = {}

    def freeze(self, nodes: Sequence[SnapshotNode]) -> None:
        """Freeze all of them; the caller holds the guest and has let its requests end.

        :raise InUse: one has a pending snapshot already.
        """
        for node in nodes:
            self._pending[node.name] = node.store.freeze()

    def pending(self, node_name: str) -> PendingSnapshot:
        """The pending snapshot of a node, to be given its machine state."""
        return self._pending[node_name]

    def step(self, node_name: str, record: SnapshotRecord) -> Step:
        """The node's part in the commit of the group."""

        def prepare() -> Change:
            change = self._pending[node_name].prepare(record)
            del self._pending[node_name]
            return change

        return Step(node_name, prepare, f"Could not create snapshot '{record.name}' on '{node_name}'")

    @property
    def _unprepared(self) -> Mapping[str, PendingSnapshot]:
        return self._pending


@contextmanager
def frozen_nodes() -> Iterator[FrozenNodes]:
    """For as long as the block lasts; what has not been prepared at its end goes on as if never frozen."""
    frozen = FrozenNodes()
    try:
        yield frozen
    except BaseException as error:
        _give_back(error, [(name, pending.abandon) for name, pending in frozen._unprepared.items()])
        raise
    for name, pending in frozen._unprepared.items():
        with told(f"Could not give up the pending snapshot of '{name}'"):
            pending.abandon()


def _give_back(error: BaseException, undo: Sequence[tuple[str, Callable[[], None]]]) -> None:
    """Undo all that can be; what cannot is told with the error that was the reason."""
    for node_name, action in undo:
        try:
            action()
        except Exception as further:
            _log.error("Node '%s' could not be brought back to what it was: %s", node_name, further)
            text = f"Node '{node_name}' could not be brought back to what it was: {further}"
            if isinstance(error, StillframeError):
                error.left = f"{error.left}; {text}" if error.left else text
            else:
                error.add_note(text)
