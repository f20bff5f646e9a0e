"""An error of the storage at any call of any operation costs nothing that was there before, and the image stays usable."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from block.faults import FaultyNode, ForwardingNode, Log, UnreadableNode
from qcow2.crash_checks import opened_and_closed
from qcow2.images import LONG, assert_only_leaks, named, take
from qcow2.memory import MemoryNode
from qcow2.operations import CASES, OPERATIONS, NotBroughtBack
from qcow2.scenes import Options, content_of, open_image, worn
from qcow2.worlds import Content, Witness, allowed
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.layout import DIRTY
from stillframe.errors import IOFailed, NoSpace, StillframeError

SHORT = [(name, options) for name, options in CASES if options == Options(512)]
EVERY = [each for each in CASES if not each[1].data_file] if LONG else SHORT
pytestmark = pytest.mark.timeout(3600 if LONG else 180)


def label(each: object) -> str:
    return str(each).replace(" ", "-")


def attempt(
    name: str, options: Options, file: FaultyNode | UnreadableNode, content: Content
) -> tuple[Witness, StillframeError | None]:
    """An operation on storage that fails at times: who did it, and the error that it ended with."""
    witness = Witness([file], Log(), [content], open_image)
    try:
        with options.in_force():
            OPERATIONS[name].work(witness)
    except StillframeError as error:
        return witness, error
    return witness, None


def assert_whole(image: bytes, path: Path | None = None) -> None:
    """No corruption, in our eyes and, where there is a path, in those of qemu-img."""
    if int.from_bytes(image[72:80], "big") & DIRTY and image[7] >= 3:
        (image,) = opened_and_closed((image,))
    found = check(MemoryNode(image, read_only=True))
    assert found.corruptions == 0, found.messages
    if path is not None:
        path.write_bytes(image)
        assert_only_leaks(path)


def contents(image: bytes | bytearray) -> list[Content]:
    return [content_of(each) for each in open_image([MemoryNode(image, read_only=True)], read_only=True)]


def assert_usable(name: str, options: Options, memory: MemoryNode, witness: Witness) -> None:
    """The error has passed: the guest goes on, and what it writes is there after the next open."""
    if witness.is_open:
        assert allowed(witness.may_hold, [content_of(node) for node in witness.nodes])
    if name == "close":
        witness.open_again()
    node = witness.node
    size = node.size
    node.write(1000, b"\xee" * 3000)
    node.flush()
    older = content_of(node).snapshots
    if options.refcount_bits > 1:
        take(node, "after", b"state")
    node.write(1000, b"\xef" * 3000)
    disk = node.read(0, size)
    node.close()
    (content,) = contents(memory.data)
    assert content.disk == disk
    assert {each: content.snapshots[each] for each in older} == older


def errors_at_every_call(
    name: str, options: Options, forever: bool, then: Callable[[MemoryNode, FaultyNode, Witness, int], None]
) -> None:
    """Let an operation fail at each of its changing calls in turn, and look at what `then` remains."""
    start = OPERATIONS[name].scene(options)
    number = 0
    while True:
        memory = MemoryNode(start.image)
        code = errno.ENOSPC if number % 2 else errno.EIO
        file = FaultyNode(memory, number, code, forever=forever)
        witness, error = attempt(name, options, file, start.content)
        if file.calls <= number:
            break
        if error is not None and not isinstance(error, NotBroughtBack):
            assert isinstance(error, IOFailed)
            assert isinstance(error, NoSpace) == (code == errno.ENOSPC)
        if error is not None:
            assert "memory" in error.message
        then(memory, file, witness, number)
        number += 1
    assert number > 8


@pytest.mark.parametrize(("name", "options"), EVERY, ids=label)
def test_an_error_anywhere_leaves_a_usable_image_and_everything_older_whole(
    name: str, options: Options, tmp_path: Path
) -> None:
    def then(memory: MemoryNode, file: FaultyNode, witness: Witness, number: int) -> None:
        file.fail_at = None
        assert_usable(name, options, memory, witness)
        assert_whole(bytes(memory.data), tmp_path / "image.qcow2" if number % 6 == 0 or LONG else None)

    errors_at_every_call(name, options, False, then)


@pytest.mark.parametrize(("name", "options"), EVERY, ids=label)
def test_a_place_that_cannot_be_read_costs_nothing_and_goes_into_no_table(
    name: str, options: Options
) -> None:
    start = OPERATIONS[name].scene(options)
    number = 0
    while True:
        memory = MemoryNode(start.image)
        file = UnreadableNode(memory, number)
        witness, error = attempt(name, options, file, start.content)
        if file.calls <= number:
            break
        if error is not None and not isinstance(error, NotBroughtBack):
            assert isinstance(error, IOFailed)
            assert "memory" in error.message
        file.fail_at = None
        assert_usable(name, options, memory, witness)
        assert_whole(bytes(memory.data))
        number += 1
    assert number > 5


@pytest.mark.parametrize(("name", "options"), EVERY, ids=label)
def test_a_disk_that_dies_leaves_what_a_crash_may_leave(name: str, options: Options, tmp_path: Path) -> None:
    def then(memory: MemoryNode, file: FaultyNode, witness: Witness, number: int) -> None:
        assert allowed(witness.may_hold, contents(memory.data))
        assert_whole(bytes(memory.data), tmp_path / "image.qcow2" if number % 6 == 0 or LONG else None)

    errors_at_every_call(name, options, True, then)


class InterruptedNode(ForwardingNode):
    """Behind the switch, and behind the switch back, somebody presses Ctrl-C."""

    interrupts = 0

    def flush(self) -> None:
        super().flush()
        if self.interrupts:
            self.interrupts -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("interrupts", [1, 2, 3])
@pytest.mark.parametrize("name", ["revert", "delete"])
def test_whoever_interrupts_a_switch_again_and_again_is_left_a_whole_image(
    name: str, interrupts: int, tmp_path: Path
) -> None:
    start = worn(Options(512))
    memory = MemoryNode(start.image)
    file = InterruptedNode(memory)
    node = Qcow2Node("node", file)
    store = node.snapshot_store
    change = (
        store.prepare_revert(named(node, "first"))
        if name == "revert"
        else store.prepare_delete(named(node, "second"))
    )
    file.interrupts = interrupts
    with pytest.raises(KeyboardInterrupt):
        change.commit()
    try:
        change.abandon()
    except KeyboardInterrupt:
        pass
    node.close()
    content = content_of(Qcow2Node("node", MemoryNode(memory.data, read_only=True), read_only=True))
    changed = start.content.snapshots["first"][0] if name == "revert" else start.content.disk
    kept = {each: start.content.snapshots[each] for each in ("first",) if name == "delete"}
    assert content in (start.content, Content(changed, kept or start.content.snapshots))
    assert_whole(bytes(memory.data), tmp_path / "image.qcow2")
