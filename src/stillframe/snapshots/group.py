"""All nodes or none: the snapshots of several images change as one, whatever fails and whenever the host dies.

    prepare   every image, in order            a failure: abandon all; nothing has changed
    mark      the image that decides, then the others
    commit    every image, in order            a failure: roll back those committed, abandon the others
    the body of the `with` block               a failure: roll back all
    settle    every image but the one that decides; then its mark goes, then theirs
    finish    every image                      a failure leaks space, and is logged

One image *decides*: the one with the machine state. Its switch writes into its mark that all images shall have the
operation, so that one sector's write is the commit of the group. It switches last for a save and a load, so all others have
the operation by then; it switches first for a delete, so that a snapshot without its machine state is only ever a leftover.
At every instant between, some image carries a mark, and the one that decides carries one whenever any other does that is not
settled. recovery.py brings what a crash leaves to an end. An image alone needs no mark: its own switch is all or nothing.

Each mark, and its end, costs a flush: for n > 1 images 2 n more than the images need one by one. What `Change` promises is in
block/node.py.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from uuid import uuid4

from stillframe.block.node import (
    Change,
    GroupKind,
    GroupMark,
    GroupStage,
    PendingSnapshot,
    SnapshotRecord,
)
from stillframe.errors import InvalidRequest, StillframeError
from stillframe.snapshots.context import add_left, told
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


Prepared = tuple[Step, Change]


@contextmanager
def all_or_none(
    steps: Sequence[Step],
    before_commit: Callable[[], None] = lambda: None,
    *,
    kind: GroupKind | None = None,
) -> Iterator[None]:
    """Change every image, run the block with the change in force, then make it final.

    :param before_commit: called when all are prepared and none has changed; raises to give up.
    :param kind: what is done, where there are several: the first image decides on a delete, else the last.
    :raise StillframeError: nothing has changed; where an image could not be brought back, `left` names it.
    """
    waiting = list(steps)
    prepared: list[Prepared] = []
    committed: list[Prepared] = []
    marks = _Marks(kind)
    try:
        while waiting:
            with told(waiting[0].failing):
                prepared.append((waiting[0], waiting[0].prepare()))
            del waiting[0]
        before_commit()
        marks.put_on(prepared)
        while prepared:
            with told(prepared[0][0].failing):
                prepared[0][1].commit()
            # In both for an instant: to undo a change twice does no harm, and never would.
            committed.append(prepared[0])
            del prepared[0]
        yield
    except BaseException as error:
        in_doubt = marks.give_back(error, committed, prepared)
        for name, further in marks.take_off(in_doubt):
            add_left(error, f"Node '{name}' still carries the mark of the operation: {further}")
        raise
    for name, trouble in marks.take_off():
        # The operation is done on all images: the mark says no more than that, to whoever opens this one next.
        _log.error("Node '%s' still carries the mark of the operation: %s", name, trouble)
    _finish(committed)


def _finish(committed: Sequence[Prepared]) -> None:
    for step, change in committed:
        try:
            change.finish()
        except StillframeError as error:
            _log.warning("Node '%s' has lost space that nobody uses: %s", step.node_name, error)


class _Marks:
    """The marks of one operation on its images."""

    def __init__(self, kind: GroupKind | None) -> None:
        self._kind = kind
        self._decider: Prepared | None = None
        self._members: list[Prepared] = []

    def put_on(self, prepared: Sequence[Prepared]) -> None:
        """The image that decides is marked before any other, so that no mark is ever without its word."""
        if len(prepared) < 2:
            return
        if self._kind is None:
            raise InvalidRequest("An operation over several images must say what is done to them")
        decider, *members = prepared if self._kind is GroupKind.DELETE else reversed(prepared)
        name = decider[1].image_name
        operation = uuid4()
        for each in (decider, *members):
            if each is decider:
                self._decider = each
            else:
                self._members.append(each)
            step, change = each
            mark = GroupMark(
                operation, self._kind, GroupStage.UNDER_WAY, each is decider, len(prepared), name
            )
            with told(step.failing):
                change.mark(mark)

    def give_back(
        self, error: BaseException, committed: Sequence[Prepared], prepared: Sequence[Prepared]
    ) -> set[str]:
        """Bring every image back to what it was.

        What an image has in force that failed in its switch, and in the way back, is only known when it is opened again:

        - of the image that decides, on a save or a load: the others are suspended, so that they can still be either;
        - of another, on a delete: the image that decides stays without the snapshot, and so will all, for it cannot be
          brought back to the one where it may be gone.

        :return: the node-names of those that may be as before the operation or as after it.
        """
        in_doubt = _give_back(error, [(step.node_name, change.abandon) for step, change in prepared])
        for each in reversed(committed):
            step, change = each
            if self._kind is GroupKind.DELETE and each is self._decider and in_doubt:
                _finish([each])
                in_doubt.add(step.node_name)
                add_left(
                    error,
                    f"Node '{step.node_name}' is without it, as all will be that are opened together again",
                )
            elif self._kind is not GroupKind.DELETE and self._decider_in(in_doubt):
                in_doubt |= _give_back(error, [(step.node_name, change.suspend)]) | {step.node_name}
                add_left(error, f"Node '{step.node_name}' takes no more writes until it is opened again")
            else:
                in_doubt |= _give_back(error, [(step.node_name, change.roll_back)])
        return in_doubt

    def _decider_in(self, names: Collection[str]) -> bool:
        return self._decider is not None and self._decider[0].node_name in names

    def take_off(self, in_doubt: Collection[str] = ()) -> list[tuple[str, Exception]]:
        """As far as it can be done: the image that decides keeps its word while another may need it.

        :param in_doubt: node-names of images that may be as before the operation or as after it.
        :return: which images still carry a mark, and why.
        """
        if self._decider is None:
            return []
        step, change = self._decider
        if self._decider_in(in_doubt):
            return []
        sure = [each for each in self._members if each[0].node_name not in in_doubt]
        failed = _attempt((member.node_name, settled.settle) for member, settled in sure)
        if in_doubt or failed:
            return failed + _attempt([(step.node_name, change.settle)])
        failed = _attempt([(step.node_name, change.unmark)])
        if not failed:
            failed = _attempt((member.node_name, settled.unmark) for member, settled in sure)
        return failed


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

    def step(self, node: SnapshotNode, record: SnapshotRecord) -> Step:
        """The node's part in the commit of the group."""

        def prepare() -> Change:
            change = self._pending[node.name].prepare(record)
            del self._pending[node.name]
            return change

        return Step(node.name, prepare, f"Could not create snapshot '{record.name}' on '{node.called}'")

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


def _give_back(error: BaseException, undo: Sequence[tuple[str, Callable[[], None]]]) -> set[str]:
    """Undo all that can be; what cannot is told with the error that was the reason. :return: its node-names."""
    failed = _attempt(undo)
    for node_name, further in failed:
        text = f"Node '{node_name}' could not be brought back to what it was: {further}"
        _log.error("%s", text)
        add_left(error, text)
    return {node_name for node_name, _ in failed}


def _attempt(actions: Iterable[tuple[str, Callable[[], None]]]) -> list[tuple[str, Exception]]:
    """Do all of them. :return: those that failed, by node-name."""
    failed: list[tuple[str, Exception]] = []
    for node_name, action in actions:
        try:
            action()
        except Exception as error:
            failed.append((node_name, error))
    return failed
