"""Three images in one operation, its changes in one log, and what crashes make of them.

Death of the process: each prefix of the log stands. Power loss: of what each file was written since its own last flush any subset
may stand, writes torn at 512 bytes.
"""

import contextlib
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

from block.faults import Flush, ForwardingNode, Truncate, Write, Zeroes, apply
from block.faults import Punch as Discard
from block.faults import Step as Change
from qcow2.images import LONG, qemu_img
from qcow2.memory import MemoryNode
from qcow2.scenes import Content, content_of
from snapshots.hosts import Register, do_delete, do_load, do_save, new_machine
from stillframe.block.node import GroupKind, GroupStage, Node, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.layout import LOADING, VERSION_2_LOADING
from stillframe.machine.machine import Machine
from stillframe.snapshots.group import Step, all_or_none, frozen_nodes
from stillframe.snapshots.recovery import recover, snapshot_nodes

NAMES = ("first", "second", "state")
SAMPLES = 20 if LONG else 3
LAYOUTS = ("plain", "mixed", "qemu")

Files = tuple[bytes, ...]
Log = list[tuple[int, Change]]


class Recorder(ForwardingNode):
    """One of several files whose changes go into one log."""

    def __init__(self, inner: Node, number: int, log: Log) -> None:
        super().__init__(inner)
        self.number, self.log = number, log

    def _note(self, step: Change) -> None:
        self.log.append((self.number, step))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        super().write(offset, data)
        self._note(Write(offset, bytes(data)))

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        super().write_zeroes(offset, length, unmap=unmap)
        self._note(Zeroes(offset, length))

    def discard(self, offset: int, length: int) -> None:
        super().discard(offset, length)
        self._note(Discard(offset, length))

    def truncate(self, size: int) -> None:
        super().truncate(size)
        self._note(Truncate(size))

    def flush(self) -> None:
        super().flush()
        self._note(Flush())


def opened(files: Sequence[bytes | MemoryNode], log: Log) -> list[Qcow2Node]:
    nodes = []
    for number, (name, data) in enumerate(zip(NAMES, files, strict=True)):
        file = data if isinstance(data, MemoryNode) else MemoryNode(data)
        node = Qcow2Node(name, Recorder(file, number, log), backing=BASE if is_overlay(file) else None)
        nodes.append(node)
    return nodes


BASE = MemoryNode(b"\x42" * (64 << 10), read_only=True)


def is_overlay(file: MemoryNode) -> bool:
    return bool(int.from_bytes(file.data[8:16], "big"))


def machine_of(value: int) -> Machine:
    machine = new_machine(Register(value=value), memory={"ram": 64 << 10}, running=True)
    machine.memory.blocks[0].view[:] = bytes((value,)) * (64 << 10)
    return machine


@dataclass(frozen=True)
class Start:
    """The files before an operation, and what they hold."""

    files: Files
    contents: tuple[Content, ...]


@cache
def start_of(layout: str) -> Start:
    """Three images with an older snapshot, one that is to be loaded or deleted, and a later content."""
    files = [empty(layout, number) for number in range(3)]
    nodes = opened(files, [])
    machine = machine_of(1)
    for number, tag in enumerate(("older", "doomed")):
        for node in nodes:
            node.write(number * 8192, tag.encode() * 2000)
        do_save(machine, nodes, tag, vmstate="state")
    for node in nodes:
        node.write(4096, b"later" * 2000)
        node.flush()
    contents = contents_of(nodes)
    for node in nodes:
        node.close()
    return Start(tuple(bytes(file.data) for file in files), contents)


def empty(layout: str, number: int) -> MemoryNode:
    file = MemoryNode()
    if layout == "qemu":
        # As `qemu-img create` writes it: the names of the features, and the backing name behind the first sector.
        file = MemoryNode(made_by_qemu(number))
    elif layout == "mixed":
        size, compat = ((512, "1.1"), (4096, "0.10"), (512, "0.10"))[number]
        create_image(file, 64 << 10, cluster_size=size, compat=compat)  # type: ignore[arg-type]
    else:
        create_image(file, 64 << 10, cluster_size=4096)
    return file


def made_by_qemu(number: int) -> bytes:
    options = ("cluster_size=4096", "cluster_size=512", "cluster_size=4096,compat=0.10")[number]
    backing = () if number == 0 else ("-b", "base.raw", "-F", "raw")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.qcow2"
        (path.parent / "base.raw").write_bytes(bytes(BASE.data))
        qemu_img("create", "-f", "qcow2", "-o", options, *backing, path, "64k")
        return path.read_bytes()


def contents_of(nodes: Sequence[Qcow2Node]) -> tuple[Content, ...]:
    return tuple(content_of(node) for node in nodes)


OPERATIONS: dict[str, Callable[[list[Node]], None]] = {
    "save": lambda nodes: do_save(machine_of(2), nodes, "new", vmstate="state"),
    "load": lambda nodes: do_load(machine_of(2), nodes, "doomed", vmstate="state"),
    "delete": lambda nodes: do_delete(nodes, "doomed"),
}


@cache
def recorded(layout: str, name: str) -> tuple[Log, tuple[Content, ...]]:
    """The log of an operation that goes well, and what the images hold then."""
    log: Log = []
    nodes = opened(start_of(layout).files, log)
    log.clear()
    OPERATIONS[name](list(nodes))
    log = list(log)
    return log, contents_of(nodes)


class Undo(Exception):
    """What the caller of an operation finds wrong once every image has it."""


@cache
def recorded_undone(layout: str, name: str) -> tuple[Log, tuple[Content, ...]]:
    """The same of one that is undone when it is on all images; and what they would have held."""
    log: Log = []
    files = [MemoryNode(data) for data in start_of(layout).files]
    nodes = opened(files, log)
    log.clear()
    found = snapshot_nodes(nodes)
    kind = GroupKind(name)
    between: list[bytes] = []
    with contextlib.suppress(Undo), frozen_nodes() as frozen:
        if kind is GroupKind.SAVE:
            frozen.freeze(found)
            steps = [frozen.step(node, SnapshotRecord("new", 1, 2)) for node in found]
        else:
            prepare = "prepare_revert" if kind is GroupKind.LOAD else "prepare_delete"
            steps = [
                Step(each.name, partial(getattr(each.store, prepare), each.named("doomed")), "no")
                for each in (found if kind is GroupKind.LOAD else reversed(found))
            ]
        with all_or_none(steps, kind=kind):
            between = [bytes(file.data) for file in files]
            raise Undo
    assert contents_of(nodes) == start_of(layout).contents
    committed = opened(between, [])
    recover(snapshot_nodes(committed))
    return log, contents_of(committed)


def states(files: Files, log: Log, seed: int, samples: int = SAMPLES) -> Iterator[Files]:
    """What may be found after a crash: after each change that concerns the header, and a sample of the others."""
    chance = random.Random(seed)
    durable = [bytearray(data) for data in files]
    pending: list[list[Change]] = [[] for _ in files]
    for number, step in [*log, *((each, Flush()) for each in range(len(files)))]:
        if isinstance(step, Flush):
            for each in pending[number]:
                apply(durable[number], each)
            pending[number].clear()
            continue
        pending[number].append(step)
        if not (isinstance(step, Write) and step.offset < 512) and chance.random() > (1.0 if LONG else 0.3):
            continue
        yield lost(durable, pending, lambda steps: steps)
        yield lost(durable, pending, lambda steps: steps[:0])
        # The last one alone: what it leads to is durable, or was never promised to be.
        yield lost(durable, pending, lambda steps: steps[-1:])
        for _ in range(samples):
            yield lost(
                durable, pending, lambda steps: [torn(e, chance) for e in steps if chance.random() < 0.5]
            )


def lost(
    durable: Sequence[bytearray],
    pending: Sequence[list[Change]],
    keep: Callable[[list[Change]], list[Change]],
) -> Files:
    found = [bytearray(data) for data in durable]
    for data, steps in zip(found, pending, strict=True):
        for step in keep(steps):
            apply(data, step)
    return tuple(map(bytes, found))


def torn(step: Change, chance: random.Random) -> Change:
    if not isinstance(step, Write) or chance.random() < 0.6:
        return step
    cuts = list(range(-step.offset % 512, len(step.data), 512))
    return Write(step.offset, step.data[: chance.choice(cuts)]) if cuts else step


def is_barred(data: bytes) -> bool:
    """Whether the header refuses whoever does not know of the mark."""
    version = int.from_bytes(data[4:8], "big")
    if version == 3:
        return bool(int.from_bytes(data[72:80], "big") & LOADING)
    return version == VERSION_2_LOADING


def any_mark(files: Files) -> bool:
    return any(
        node.snapshot_store.unfinished is not None
        for node in (Qcow2Node("alone", MemoryNode(data, read_only=True), read_only=True) for data in files)
    )


@cache
def interrupted(name: str, *, committed: bool) -> Files:
    """A crash in the middle: some members are switched and the image that decides is not, or the other way round."""
    start = start_of("plain")
    log, _ = recorded("plain", name)
    found = []
    for files in states(start.files, log, seed=5, samples=0):
        nodes = [Qcow2Node("alone", MemoryNode(data, read_only=True), read_only=True) for data in files]
        stages = [node.snapshot_store.unfinished for node in nodes]
        if all(mark is not None and mark.stage is not GroupStage.SETTLED for mark in stages):
            assert stages[2] is not None
            if (stages[2].stage is GroupStage.COMMITTED) == committed:
                found.append(files)
    return found[len(found) // 2]
