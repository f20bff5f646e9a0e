"""All images or none, whichever call of whichever image fails.

The images here are models that keep the rules of `Change` and check that they are kept: real ones cannot fail
at will in every call. The same promise on real images is in test_faults.py.
"""

import errno
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.block.node import Change, GroupKind, GroupMark, GroupStage, SnapshotRecord
from stillframe.errors import Cancelled, IOFailed
from stillframe.snapshots.group import Step, all_or_none, frozen_nodes
from stillframe.snapshots.selection import SnapshotNode

CALLS = ("prepare", "mark", "commit", "roll_back", "settle", "unmark", "finish", "abandon")


@dataclass
class Image:
    """One image: which world is in force, and whether space is still reserved for the other."""

    name: str
    journal: list[str]
    failing: frozenset[str] = frozenset()
    world: str = "old"
    reserved: bool = False
    mark: GroupMark | None = None
    stages: list[str] = field(default_factory=list)
    others: "list[Image]" = field(default_factory=list)

    def happens(self, call: str) -> None:
        self.stages.append(call)
        self.journal.append(f"{call} {self.name}")
        if call in self.failing:
            raise IOFailed(f"{call} of {self.name} failed", errno=errno.EIO)

    def happened(self) -> None:
        """A crash here would be recovered: who has not what was decided says so, and who decides is there to be asked."""
        if len(self.others) < 2:
            return
        waiting = [each for each in self.others if each.mark and each.mark.stage is not GroupStage.SETTLED]
        decider = next((each for each in waiting if each.mark and each.mark.decides), None)
        assert decider or not waiting
        if decider is None or decider.mark is None:
            assert len({each.world for each in self.others}) == 1
            return
        decided = "new" if decider.mark.stage is GroupStage.COMMITTED else "old"
        assert all(each in waiting for each in self.others if each.world != decided)

    def prepare(self) -> Change:
        assert not self.reserved
        self.happens("prepare")
        self.reserved = True
        return ModelChange(self)


class ModelChange:
    def __init__(self, image: Image) -> None:
        self.image = image

    @property
    def image_name(self) -> str:
        return self.image.name

    def mark(self, mark: GroupMark) -> None:
        assert self.image.stages[-1] == "prepare"
        self.image.happens("mark")
        self.image.mark = mark
        self.image.happened()

    def _stage(self, stage: GroupStage) -> None:
        if self.image.mark is not None:
            self.image.mark = replace(self.image.mark, stage=stage)

    def commit(self) -> None:
        assert self.image.stages[-1] in ("prepare", "mark")
        self.image.happens("commit")
        self.image.world = "new"
        if self.image.mark is not None and self.image.mark.decides:
            self._stage(GroupStage.COMMITTED)
        self.image.happened()

    def roll_back(self) -> None:
        assert self.image.stages[-1] == "commit"
        self.image.happens("roll_back")
        self.image.world, self.image.reserved = "old", False
        self._stage(GroupStage.UNDER_WAY)
        self.image.happened()

    def suspend(self) -> None:
        assert self.image.stages[-1] == "commit"
        self.image.happens("suspend")

    def settle(self) -> None:
        self.image.happens("settle")
        if self.image.mark is not None and not self.image.mark.decides:
            self._stage(GroupStage.SETTLED)
        self.image.happened()

    def unmark(self) -> None:
        self.image.happens("unmark")
        self.image.mark = None
        self.image.happened()

    def finish(self) -> None:
        assert "commit" in self.image.stages
        self.image.happens("finish")
        self.image.reserved = False

    def abandon(self) -> None:
        assert self.image.world == "old"
        self.image.happens("abandon")
        self.image.reserved = False


failures = st.lists(st.frozensets(st.sampled_from(CALLS), max_size=2), min_size=1, max_size=4)


@given(failures, st.sampled_from(["nothing", "before commit", "body"]), st.sampled_from(GroupKind))
def test_all_images_change_or_none_does(failing: list[frozenset[str]], raising: str, kind: GroupKind) -> None:
    journal: list[str] = []
    images = [Image(f"node{number}", journal, calls) for number, calls in enumerate(failing)]
    for image in images:
        image.others = images
    steps = [Step(image.name, image.prepare, f"Could not change '{image.name}'") for image in images]

    def before_commit() -> None:
        assert all(image.reserved and image.world == "old" for image in images)
        if raising == "before commit":
            raise Cancelled

    error: Exception | None = None
    try:
        with all_or_none(steps, before_commit, kind=kind):
            assert all(image.world == "new" for image in images)
            if raising == "body":
                raise RuntimeError("the machine would not take it")
    except (IOFailed, Cancelled, RuntimeError) as raised:
        error = raised
    # Whatever came of it, opened anew all have it or none.
    images[0].happened()
    if error is None:
        assert all(image.world == "new" for image in images)
        assert not any({"prepare", "commit"} & image.failing for image in images)
        assert not (len(images) > 1 and any("mark" in image.failing for image in images))
        assert any({"settle", "unmark"} & i.failing for i in images) or not any(i.mark for i in images)
        leaked = {image.name for image in images if image.reserved}
        assert leaked == {image.name for image in images if "finish" in image.failing}
    else:
        told = getattr(error, "left", None) or " ".join(getattr(error, "__notes__", ()))
        for image in images:
            undone = image.world == "old" and not image.reserved
            assert undone or f"Node '{image.name}'" in told
            if image.world == "new":
                assert "roll_back" in image.failing or f"Node '{image.name}'" in told
            if image.mark is not None:
                assert "still carries the mark" in told or "could not be brought back" in told


def test_images_change_in_the_order_given_and_go_back_in_the_opposite_one() -> None:
    journal: list[str] = []
    images = [Image(name, journal) for name in ("member", "state")]
    with (
        pytest.raises(RuntimeError),
        all_or_none([Step(i.name, i.prepare, "no") for i in images], kind=GroupKind.SAVE),
    ):
        raise RuntimeError
    assert journal == [
        "prepare member",
        "prepare state",
        "mark state",
        "mark member",
        "commit member",
        "commit state",
        "roll_back state",
        "roll_back member",
        "settle member",
        "unmark state",
        "unmark member",
    ]


def test_a_delete_is_decided_by_its_first_image() -> None:
    journal: list[str] = []
    images = [Image(name, journal) for name in ("state", "member")]
    with all_or_none([Step(i.name, i.prepare, "no") for i in images], kind=GroupKind.DELETE):
        pass
    assert journal[2:] == [
        "mark state",
        "mark member",
        "commit state",
        "commit member",
        "settle member",
        "unmark state",
        "unmark member",
        "finish state",
        "finish member",
    ]


def test_an_image_alone_pays_for_no_mark() -> None:
    journal: list[str] = []
    image = Image("alone", journal)
    with all_or_none([Step(image.name, image.prepare, "no")]):
        pass
    assert journal == ["prepare alone", "commit alone", "finish alone"]


def test_a_failure_is_told_in_the_words_of_its_image_with_the_cause() -> None:
    images = [Image("a", []), Image("b", [], frozenset({"commit"}))]
    steps = [Step(i.name, i.prepare, f"Could not create snapshot 's' on '{i.name}'") for i in images]
    with pytest.raises(IOFailed) as failed, all_or_none(steps, kind=GroupKind.SAVE):
        pass
    assert str(failed.value) == "Could not create snapshot 's' on 'b': commit of b failed"
    assert failed.value.errno == errno.EIO


class Pending:
    """A frozen content that must end as a change or be given up."""

    def __init__(self, image: Image) -> None:
        self.image = image
        self.over = False

    def write_state(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        assert not self.over

    def prepare(self, record: SnapshotRecord) -> Change:
        assert not self.over
        change = self.image.prepare()
        self.over = True
        return change

    def abandon(self) -> None:
        assert not self.over
        self.image.happens("abandon")
        self.over = True


class Store:
    def __init__(self, image: Image) -> None:
        self.image = image
        self.made: list[Pending] = []

    def freeze(self) -> Pending:
        self.image.happens("freeze")
        self.made.append(Pending(self.image))
        return self.made[-1]


@given(
    st.lists(
        st.frozensets(st.sampled_from(("freeze", "prepare", "commit")), max_size=1), min_size=1, max_size=4
    )
)
def test_no_node_stays_frozen_whatever_fails(failing: list[frozenset[str]]) -> None:
    from stillframe.block.null import NullNode

    images = [Image(f"node{number}", [], calls) for number, calls in enumerate(failing)]
    stores = [Store(image) for image in images]
    nodes = [
        SnapshotNode(NullNode(image.name), store)  # type: ignore[arg-type]
        for image, store in zip(images, stores, strict=True)
    ]
    try:
        with frozen_nodes() as frozen:
            frozen.freeze(nodes)
            record = SnapshotRecord("s", 0, 0)
            with all_or_none([frozen.step(node, record) for node in nodes], kind=GroupKind.SAVE):
                pass
    except IOFailed:
        assert any(failing)
    else:
        assert not any(failing)
    assert all(pending.over for store in stores for pending in store.made)
    assert not any(image.reserved for image in images)
    assert len({image.world for image in images}) == 1
