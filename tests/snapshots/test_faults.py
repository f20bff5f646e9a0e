"""Storage that fails at any moment: the operation is on all images or on none, and nothing older is
touched."""

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from block.faults import FaultyNode, ForwardingNode
from snapshots.hosts import (
    DISK,
    Register,
    content,
    do_delete,
    do_load,
    do_save,
    everything,
    new_image,
    new_machine,
    opened,
    qemu_img_check,
)
from stillframe.block.node import Node
from stillframe.block.qcow2.layout import WORLD_OFFSET
from stillframe.errors import IOFailed, NoSpace, StillframeError
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from stillframe.snapshots.recovery import recover, snapshot_nodes

NAMES = ("member", "state")
OPERATIONS: dict[str, Callable[[Machine, list[Node]], None]] = {
    "save": lambda machine, nodes: do_save(machine, nodes, "new", vmstate="state"),
    "load": lambda machine, nodes: do_load(machine, nodes, "doomed", vmstate="state"),
    "delete": lambda machine, nodes: do_delete(nodes, "doomed"),
}


class UnreadableNode(ForwardingNode):
    """Fails at the read number `fail_at`, counted from when it is set."""

    def __init__(self, inner: Node) -> None:
        super().__init__(inner)
        self.fail_at: int | None = None
        self.reads = 0

    def readinto(self, offset: int, buffer: memoryview) -> None:
        number, self.reads = self.reads, self.reads + 1
        if number == self.fail_at:
            raise IOFailed(
                f"Could not read from '{self.node_name}': {os.strerror(errno.EIO)}", errno=errno.EIO
            )
        super().readinto(offset, buffer)


def machine_of(value: int) -> Machine:
    machine = new_machine(Register(value=value), memory={"ram": 256 << 10}, running=True)
    machine.memory.blocks[0].view[:] = bytes((value,)) * (256 << 10)
    return machine


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two images with an older snapshot, one that is to be loaded or deleted, and a later content."""
    folder = tmp_path_factory.mktemp("prepared")
    paths = [new_image(folder / name, cluster_size=4096) for name in NAMES]
    machine = machine_of(1)
    with opened(paths[0], "member") as member, opened(paths[1], "state") as state:
        for number, tag in enumerate(("older", "doomed")):
            for node in (member, state):
                node.write(number * 8192, tag.encode() * 5000)
            do_save(machine, [member, state], tag, vmstate="state")
        for node in (member, state):
            node.write(4096, b"later" * 5000)
            node.flush()
    return folder


class Attempt:
    """One operation on copies of the images, with one thing that fails."""

    def __init__(self, prepared: Path, folder: Path, wrap: Callable[[Node], Node]) -> None:
        self.paths = [folder / name for name in NAMES]
        for name, path in zip(NAMES, self.paths, strict=True):
            shutil.copy(prepared / name, path)
        self.machine = machine_of(2)
        self.error: StillframeError | None = None
        self._wrap = wrap

    def run(self, operation: str) -> None:
        """Do it; the content of the disks as the guest sees it is compared if it failed."""
        with ExitStack() as stack:
            nodes: list[Node] = []
            for name, path in zip(NAMES, self.paths, strict=True):
                nodes.append(stack.enter_context(opened(path, name, self._wrap)))
            before = [content(node) for node in nodes]
            try:
                OPERATIONS[operation](self.machine, nodes)
            except StillframeError as error:
                self.error = error
                assert [content(node) for node in nodes] == before
                assert bytes(self.machine.memory.blocks[0].view[:1]) == b"\2"
            assert self.machine.run_state is RunState.RUNNING

    def tags(self) -> list[set[str]]:
        """The snapshots of each image, opened anew; what they hold is compared with the originals."""
        found = []
        with ExitStack() as stack:
            nodes = [stack.enter_context(opened(path, path.name)) for path in self.paths]
            for result in recover(snapshot_nodes(nodes)):
                assert self.error is None or self.error.left
                assert result.problem is None, str(result)
                assert not result.missing
        for path in self.paths:
            qemu_img_check(path, leaks_allowed=True)
            contents = everything(path)
            for key, value in contents.items():
                if key != "3 new":
                    assert value == ORIGINAL[path.name][key]
            found.append({key.split()[1] for key in contents})
        return found


ORIGINAL: dict[str, dict[str, tuple[str, bytes]]] = {}
EXPECTED = {
    "save": ({"older", "doomed"}, {"older", "doomed", "new"}),
    "load": ({"older", "doomed"}, {"older", "doomed"}),
    "delete": ({"older", "doomed"}, {"older"}),
}


def numbers(prepared: Path, folder: Path, operation: str, name: str) -> Iterator[int]:
    """Every changing call that the operation makes on a node's file."""
    faulty: list[FaultyNode] = []

    def wrap(inner: Node) -> Node:
        if inner.node_name != f"{name}-file":
            return inner
        faulty.append(FaultyNode(inner, None, 0))
        return faulty[0]

    before = 0
    attempt = Attempt(prepared, folder, wrap)
    with ExitStack() as stack:
        nodes: list[Node] = [
            stack.enter_context(opened(path, each, wrap))
            for each, path in zip(NAMES, attempt.paths, strict=True)
        ]
        before = faulty[0].calls
        OPERATIONS[operation](attempt.machine, nodes)
        after = faulty[0].calls
    assert after > before + 5
    yield from range(before, after)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_error_of_storage_leaves_all_or_none(
    prepared: Path, tmp_path: Path, operation: str, name: str, number: int
) -> None:
    ORIGINAL.update({each: everything(prepared / each) for each in NAMES} if not ORIGINAL else {})
    none, all_of_it = EXPECTED[operation]
    failed = 0
    for fail_at in numbers(prepared, tmp_path, operation, name):

        def wrap(inner: Node, fail_at: int = fail_at) -> Node:
            return FaultyNode(inner, fail_at, number) if inner.node_name == f"{name}-file" else inner

        attempt = Attempt(prepared, tmp_path, wrap)
        attempt.run(operation)
        if attempt.error is None:
            # Only what gives space back may fail without a word to the caller.
            assert attempt.tags() == [all_of_it, all_of_it]
        else:
            failed += 1
            assert isinstance(attempt.error, NoSpace if number == errno.ENOSPC else IOFailed)
            assert name in str(attempt.error)
            assert attempt.error.left is None
            assert attempt.tags() == [none, none]
    assert failed > 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_disk_that_dies_takes_nothing_older_with_it(
    prepared: Path, tmp_path: Path, operation: str, name: str
) -> None:
    """All later calls fail, those of the undo too: what could not be brought back is named."""
    ORIGINAL.update({each: everything(prepared / each) for each in NAMES} if not ORIGINAL else {})
    none, all_of_it = EXPECTED[operation]
    for fail_at in numbers(prepared, tmp_path, operation, name):

        def wrap(inner: Node, fail_at: int = fail_at) -> Node:
            if inner.node_name != f"{name}-file":
                return inner
            return FaultyNode(inner, fail_at, errno.EIO, forever=True)

        attempt = Attempt(prepared, tmp_path, wrap)
        try:
            attempt.run(operation)
        except IOFailed:
            # The disk could not be closed, either.
            pass
        tags = attempt.tags()
        if attempt.error is None:
            assert tags == [all_of_it, all_of_it]
        elif attempt.error.left is None:
            assert tags == [none, none]
        else:
            assert f"Node '{name}'" in attempt.error.left
            assert tags in ([none, none], [all_of_it, all_of_it])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_read_error_changes_nothing(prepared: Path, tmp_path: Path, operation: str) -> None:
    ORIGINAL.update({each: everything(prepared / each) for each in NAMES} if not ORIGINAL else {})
    none, all_of_it = EXPECTED[operation]
    fail_at, failed = 0, 0
    while True:
        made: list[UnreadableNode] = []

        def wrap(inner: Node, made: list[UnreadableNode] = made) -> Node:
            made.append(UnreadableNode(inner))
            return made[-1]

        attempt = Attempt(prepared, tmp_path, wrap)
        with ExitStack() as stack:
            nodes: list[Node] = [
                stack.enter_context(opened(path, each, wrap))
                for each, path in zip(NAMES, attempt.paths, strict=True)
            ]
            for each in made:
                each.reads, each.fail_at = 0, fail_at
            try:
                OPERATIONS[operation](attempt.machine, nodes)
            except StillframeError as error:
                attempt.error = error
            for each in made:
                each.fail_at = None
        assert attempt.tags() == ([none, none] if attempt.error else [all_of_it, all_of_it])
        if attempt.error is None:
            break
        failed += 1
        fail_at += 1
    assert failed > 0


def test_a_disk_without_room_says_so_and_works_again_with_room(tmp_path: Path) -> None:
    """A real full file system is not at hand without root; a limit on the file's size is."""
    import resource
    import signal

    path = new_image(tmp_path / "small")
    machine = new_machine(memory={"ram": 8 << 20}, running=True)
    machine.memory.blocks[0].view[:] = os.urandom(8 << 20)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    former = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with opened(path, "small") as node:
            resource.setrlimit(resource.RLIMIT_FSIZE, (2 << 20, old[1]))
            with pytest.raises(NoSpace, match="Error while writing VM state: "):
                do_save(machine, [node], "one")
            assert machine.run_state is RunState.RUNNING
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            node.write(DISK - 512, bytes(512))
            do_save(machine, [node], "one")
            do_load(machine, [node], "one")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, former)
    qemu_img_check(path)


class HeaderHook(ForwardingNode):
    """Calls `at_switch`, once, in place of a write of the header: the switch of the image's snapshots."""

    def __init__(self, inner: Node) -> None:
        super().__init__(inner)
        self.at_switch: Callable[[], None] | None = None

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        hook = self.at_switch
        if hook is not None and offset == WORLD_OFFSET:
            self.at_switch = None
            hook()
        super().write(offset, data)


def test_a_guest_that_writes_while_a_delete_fails_changes_no_snapshot(tmp_path: Path) -> None:
    """Once the first image is switched its clusters are the guest's alone; until the second one is rolled back."""
    paths = [new_image(tmp_path / name, cluster_size=4096) for name in NAMES]
    machine = machine_of(1)
    hooks: list[HeaderHook] = []

    def wrap(inner: Node) -> Node:
        hooks.append(HeaderHook(inner))
        return hooks[-1]

    with opened(paths[0], "member", wrap) as member, opened(paths[1], "state", wrap) as state:
        for node in (member, state):
            node.write(0, b"older" * 5000)
        do_save(machine, [member, state], "older", vmstate="state")
        before = [everything(path) for path in paths]
        guest = threading.Thread(target=lambda: state.write(0, b"later" * 5000), daemon=True)

        def fail() -> None:
            guest.start()
            # Long enough for a write that nothing holds back to get through.
            guest.join(0.3)
            raise IOFailed("the disk of 'member' failed", errno=errno.EIO)

        hooks[0].at_switch = fail
        with pytest.raises(IOFailed, match="Could not delete snapshot 'older' on 'member'"):
            do_delete([member, state], "older")
        guest.join(60)
        assert not guest.is_alive()
        assert state.read(0, 25_000) == b"later" * 5000
        state.flush()
        assert [everything(path) for path in paths] == before
    for path in paths:
        qemu_img_check(path)
