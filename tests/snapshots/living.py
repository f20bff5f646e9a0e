"""Live saves and lazy loads, recorded with all that their guest does meanwhile: what the crash tests of them are made of.

The images are real files, for a lazy load reads the file by itself: "state" with the machine state, and perhaps a "member". Each
has a snapshot "older", and one "parent" whose state goes on where that of "older" ends, in the same clusters. Everything done to
a file goes into one log (block/faults.py), with what may be found there after a crash (qcow2/worlds.py).

The guest writes at every checkpoint of the operation, to memory and to its disks: before the pause, while the state is written,
while memory comes. During the commit of a save a thread of its own goes on with it.
"""

import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from block.faults import Flush as Flushed
from block.faults import Log, Punch, Step, Truncate, Write, Zeroes
from qcow2.crash_states import Files
from qcow2.memory import MemoryNode
from qcow2.scenes import content_of
from qcow2.worlds import Content, Disk, Image, MayHold, Snapshot, Witness
from snapshots.hosts import Register, new_image, new_machine
from stillframe.block.file import FileNode
from stillframe.block.node import Node
from stillframe.block.qcow2 import pending, refcounts
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import Cancelled
from stillframe.events import Event
from stillframe.machine import arriving
from stillframe.machine.machine import Machine
from stillframe.snapshots import selection
from stillframe.snapshots.context import Context, Unwatched
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.lazy import lazy_memory
from stillframe.snapshots.load import load
from stillframe.snapshots.recovery import recover, snapshot_nodes
from stillframe.snapshots.save import save
from stillframe.vmstate import ram, transfer
from stillframe.vmstate.ram import PAGE_SIZE

DISK = 96 << 10
PAGES = 80
"""Of the machine's memory."""


@dataclass(frozen=True)
class Kind:
    """How the images are made. :param names: of the nodes; the last one takes the machine state."""

    cluster_size: int
    compat: str = "1.1"
    names: tuple[str, ...] = ("member", "state")

    def __str__(self) -> str:
        return f"{self.cluster_size}-{'v2' if self.compat == '0.10' else 'v3'}-{len(self.names)}"


@contextmanager
def in_small_steps() -> Iterator[None]:
    """Memory is written, and comes, in so many pieces that a guest can do something between them; images grow by little."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refcounts, "FIRST_LEASE_BYTES", 0)
        patch.setattr(refcounts, "LARGEST_LEASE_BYTES", 0)
        patch.setattr(pending, "_RESERVED_FIRST", 64 << 10)
        patch.setattr(ram, "BATCH", 4)
        patch.setattr(transfer, "CHUNK", 32 << 10)
        patch.setattr(arriving, "_BATCH", 8)
        patch.setattr(arriving, "_RUN", 8)
        patch.setattr(arriving, "_AHEAD", 1)
        yield


def recorded(file: FileNode, log: Log, number: int) -> FileNode:
    """The same node, every change of it noted when it is done: no node around it, for a lazy load wants the file itself."""
    steps: dict[str, Callable[..., Step]] = {
        "write": lambda offset, data: Write(offset, bytes(data), number),
        "write_durable": lambda offset, data: Write(offset, bytes(data), number, is_durable=True),
        "write_zeroes": lambda offset, length, **_: Zeroes(offset, length, number),
        "discard": lambda offset, length: Punch(offset, length, number),
        "truncate": lambda size: Truncate(size, number),
        "flush": lambda: Flushed(number),
    }
    inside = threading.local()

    def noting(name: str, step: Callable[..., Step]) -> Callable[..., None]:
        plain = getattr(file, name)

        @wraps(plain)
        def noted(*arguments: Any, **options: Any) -> None:
            if getattr(inside, "noted", False):
                plain(*arguments, **options)
                return
            with log.order:
                inside.noted = True
                try:
                    plain(*arguments, **options)
                finally:
                    inside.noted = False
                log.steps.append(step(*arguments, **options))

        return noted

    for name, step in steps.items():
        setattr(file, name, noting(name, step))
    return file


class Promised:
    """A snapshot that is on its way: equal to what it has become. :ivar made: None until then, when nothing equals it."""

    def __init__(self) -> None:
        self.made: Snapshot | None = None

    def __eq__(self, other: object) -> bool:
        return self.made is not None and other == self.made

    __hash__ = None  # type: ignore[assignment]


def held_by(node: Qcow2Node) -> Content:
    """What an image holds; the page index counts as part of a machine state."""
    plain, store = content_of(node), node.snapshot_store
    indexes = {info.name: store.read_page_index(info) or b"" for info in store.snapshots()}
    return Content(
        plain.disk, {name: (disk, state + indexes[name]) for name, (disk, state) in plain.snapshots.items()}
    )


class Guest(Unwatched):
    """Writes whenever the operation lets it, and says what may be found.

    :param cancel_at: the number of the checkpoint that cancels. :param at_commit: called at the point of no return.
    :ivar instant: memory when the guest was last stopped, and its disks.
    """

    def __init__(self, machine: Machine, witness: Witness, seed: int, cancel_at: int | None = None) -> None:
        self._machine, self._witness = machine, witness
        self._chance = random.Random(seed)
        self._pages = pages_of(machine)
        self._cancel_at = cancel_at
        self.at_commit: Callable[[], None] = lambda: None
        self.checkpoints = self.resumed_at = 0
        self.instant: tuple[bytes, list[bytes]] = b"", []
        self.on_resume: Callable[[], None] = lambda: None
        machine.events.subscribe(self._heard)

    def _heard(self, event: Event) -> None:
        if event.name == "STOP":
            self.instant = (
                self._pages.tobytes(),
                [self._witness.present(number) for number in range(len(self._witness.nodes))],
            )
        elif event.name == "RESUME":
            self.resumed_at = self.checkpoints
            self.on_resume()

    def checkpoint(self) -> None:
        if self.checkpoints == self._cancel_at:
            raise Cancelled
        self.checkpoints += 1
        self.act()

    def point_of_no_return(self) -> None:
        # The images are prepared: whoever writes waits for the end of the commit, and this thread makes it.
        self.at_commit()

    def act(self, memory: bool = True) -> None:
        """One thing to a disk, one to memory."""
        chance, image = self._chance, self._chance.randrange(len(self._witness.nodes))
        length = chance.choice((300, 512, 5000))
        offset = chance.randrange(DISK - length)
        match chance.randrange(8):
            case 0:
                self._witness.flush(image)
            case 1:
                size = max(4096, self._witness.cluster)
                self._witness.discard(min(offset, DISK - size) // size * size, size, image)
            case _:
                self._witness.write(offset, chance.randbytes(length), image)
        if memory:
            self._pages[chance.randrange(PAGES)] = chance.randrange(256)


def pages_of(machine: Machine) -> np.ndarray[Any, Any]:
    return np.frombuffer(machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)


@dataclass
class Host:
    """A machine on recorded images."""

    nodes: list[Qcow2Node]
    files: list[FileNode]
    machine: Machine
    ground: Ground

    @property
    def _selected(self) -> Sequence[selection.SnapshotNode]:
        return [selection.snapshot_node(node) for node in self.nodes]

    def save(self, tag: str, context: Context | None = None) -> None:
        chosen = selection.for_save(self._selected, tag, "state")
        save(self.machine, chosen, context or Unwatched(), ground=self.ground)

    def load(self, tag: str, context: Context | None = None, *, eager: bool = False) -> None:
        chosen = selection.for_load(self._selected, tag, "state")
        load(self.machine, chosen, context or Unwatched(), ground=self.ground, eager=eager)

    def dirty(self, seed: int, count: int) -> None:
        """Pages of memory, and some of its disks."""
        chance = np.random.default_rng(seed)
        pages = pages_of(self.machine)
        for page in chance.choice(PAGES, count, replace=False).tolist():
            pages[page] = 0 if page % 5 == 0 else chance.integers(0, 256, PAGE_SIZE, np.uint8)
        for node in self.nodes:
            node.write(int(chance.integers(0, DISK - 9000)), chance.bytes(9000))


@contextmanager
def host_on(folder: Path, names: Sequence[str], log: Log) -> Iterator[Host]:
    """A new machine, with bytes in its memory that no snapshot has."""
    with ExitStack() as stack:
        files, nodes = [], []
        for number, name in enumerate(names):
            files.append(recorded(FileNode(f"{name}-file", str(folder / name)), log, number))
            stack.callback(files[-1].close)
            nodes.append(Qcow2Node(name, files[-1]))
        machine = new_machine(Register(value=1), memory={"ram": PAGES * PAGE_SIZE}, running=True)
        pages_of(machine)[:] = 0xEE
        ground = Ground(machine)
        stack.callback(ground.close)
        yield Host(nodes, files, machine, ground)


def with_a_past(folder: Path, kind: Kind) -> None:
    """The images with "older" and "parent", and what was written since."""
    for name in kind.names:
        new_image(folder / name, DISK, cluster_size=kind.cluster_size, compat=kind.compat)
    with host_on(folder, kind.names, Log()) as host:
        host.dirty(1, PAGES)
        host.save("older")
        host.dirty(2, 12)
        host.save("parent")
        host.dirty(3, 10)
        for node in host.nodes:
            node.close()


@dataclass
class Recording:
    """:param memory: of each snapshot that was made, to be found by a load."""

    start: Files
    steps: list[Step]
    end: list[Content]
    memory: dict[str, bytes] = field(default_factory=dict)


def _say(witness: Witness, may_hold: MayHold) -> None:
    witness._say(may_hold)


@contextmanager
def recording(folder: Path, kind: Kind, stand: str | None) -> Iterator[tuple[Host, Witness, Log, Recording]]:
    """A host whose machine stands on a snapshot, or on none; what is done in the block is recorded.

    :return: the recording, finished at the end of the block.
    """
    log = Log()
    with in_small_steps(), ExitStack() as stack:
        with_a_past(folder, kind)
        host = stack.enter_context(host_on(folder, kind.names, log))
        if stand is not None:
            host.load(stand, eager=True)
        for node in host.nodes:
            node.flush()
        start = tuple((folder / name).read_bytes() for name in kind.names)
        log.steps.clear()
        witness = Witness(host.files, log, [held_by(node) for node in host.nodes], lambda _: host.nodes)
        found = Recording(start, log.steps, [])
        yield host, witness, log, found
        found.end = [held_by(node) for node in host.nodes]
        found.steps = list(log.steps)


def record_save(folder: Path, kind: Kind, *, continued: bool, cancel_at: int | None = None) -> Recording:
    """A save "new" while the guest writes, and what it writes afterwards."""
    with recording(folder, kind, "parent" if continued else None) as (host, witness, _, found):
        guest = Guest(host.machine, witness, seed=5, cancel_at=cancel_at)
        promised = [Promised() for _ in kind.names]
        ended = threading.Event()

        def go_on() -> None:
            for _ in range(12):
                if ended.is_set():
                    break
                guest.act(memory=False)

        thread = threading.Thread(target=go_on)
        pages_of(host.machine)[10:30] ^= 0x11

        def at_commit() -> None:
            before = witness.may_hold
            _say(witness, before + tuple(_with_new(world, promised) for world in before))
            thread.start()

        guest.at_commit = at_commit
        try:
            host.save("new", guest)
            assert cancel_at is None
        except Cancelled:
            assert guest.checkpoints == cancel_at > guest.resumed_at
        finally:
            ended.set()
            if thread.ident:
                thread.join()
        if cancel_at is None:
            found.memory["new"], disks = guest.instant
            for node, promise, disk in zip(host.nodes, promised, disks, strict=True):
                promise.made = disk, held_by(node).snapshots["new"][1]
            _say(witness, tuple(world for world in witness.may_hold if "new" in world[0].snapshots))
            assert guest.checkpoints > guest.resumed_at + 3
        for _ in range(4):
            guest.act()
        witness.flush(0)
        guest.act()
        if cancel_at is None:
            state = _parts(host.nodes[-1])
            assert (state["new"] == state["parent"]) == continued
    return found


def _parts(node: Qcow2Node) -> dict[str, object]:
    """Which stream each state is a part of."""
    return {
        info.name: info.lineage.page_index.stream
        for info in node.snapshot_store.snapshots()
        if info.lineage is not None and info.lineage.page_index is not None
    }


def _with_new(world: Sequence[Image], promised: Sequence[Promised]) -> tuple[Image, ...]:
    return tuple(
        Image(image.disk, {**image.snapshots, "new": promise})  # type: ignore[dict-item]
        for image, promise in zip(world, promised, strict=True)
    )


def record_load(folder: Path, kind: Kind, tag: str, *, cancel_late: bool = False) -> Recording:
    """A lazy load while the guest writes: before it, and while its memory comes."""
    with recording(folder, kind, None) as (host, witness, _, found):
        skip_unless_lazy(host, tag)
        guest = Guest(host.machine, witness, seed=6)

        def at_commit() -> None:
            before = witness.may_hold
            loaded = tuple(
                tuple(Image(Disk(image.snapshots[tag][0]), image.snapshots) for image in world)
                for world in before
            )
            _say(witness, before + loaded)
            if cancel_late:
                _say(witness, before)
                raise Cancelled

        def on_resume() -> None:
            if not cancel_late:
                _say(witness, tuple(world for world in witness.may_hold if _shows(world, tag)))

        guest.at_commit, guest.on_resume = at_commit, on_resume
        try:
            host.load(tag, guest)
        except Cancelled:
            assert cancel_late
        else:
            assert guest.checkpoints > guest.resumed_at + 3, "all was loaded before the guest ran"
        for _ in range(4):
            guest.act()
    return found


def skip_unless_lazy(host: Host, tag: str) -> None:
    """Ask the host, without touching anything."""
    state = selection.snapshot_node(host.nodes[-1])
    snapshot = state.named(tag)
    assert snapshot is not None
    memory, _ = lazy_memory(host.machine, selection.Found(state, snapshot), host.ground)
    if memory is None:
        pytest.skip("this host has no userfaultfd that tracks writes")
    memory.close()


def _shows(world: Sequence[Image], tag: str) -> bool:
    return all(image.disk == Disk(image.snapshots[tag][0]) for image in world)


def reopened(files: Files) -> tuple[list[Content], Files]:
    """The images opened together after a crash, and recovered. :return: what they hold, and their bytes then."""
    memory = [MemoryNode(data) for data in files]
    nodes = [Qcow2Node(f"node{number}", file) for number, file in enumerate(memory)]
    for result in recover(snapshot_nodes(nodes)):
        assert result.problem is None, str(result)
    assert recover(snapshot_nodes(nodes)) == []
    return [held_by(node) for node in nodes], tuple(bytes(file.data) for file in memory)


def loaded_from(nodes: Sequence[Node], tag: str) -> bytes:
    """A new machine's memory after the load of a snapshot."""
    machine = new_machine(Register(), memory={"ram": PAGES * PAGE_SIZE}, running=True)
    chosen = selection.for_load([selection.snapshot_node(node) for node in nodes], tag, nodes[-1].node_name)
    load(machine, chosen, Unwatched())
    return pages_of(machine).tobytes()
