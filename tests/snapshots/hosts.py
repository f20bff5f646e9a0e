"""A machine without a processor and its images on real files: what the tests of this folder share."""

import errno
import hashlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from peers import peer
from stillframe.block.file import FileNode
from stillframe.block.node import Node
from stillframe.block.qcow2.create import create_image
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import Cancelled, IOFailed
from stillframe.events import EventBus
from stillframe.machine.clock import VirtualClock
from stillframe.machine.devices import Device
from stillframe.machine.engines.none import NoEngine
from stillframe.machine.machine import Board, Machine
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory, MemoryBlock
from stillframe.snapshots import selection
from stillframe.snapshots.context import Context, Unwatched
from stillframe.snapshots.delete import delete
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.fields import Description, Field, Values

DISK = 1 << 20


def new_image(path: Path, size: int = DISK, **options: Any) -> Path:
    """An empty qcow2 image."""
    file = FileNode.create("new", str(path))
    try:
        create_image(file, size, **options)
    finally:
        file.close()
    return path


@contextmanager
def opened(path: Path, name: str, wrap: Callable[[Node], Node] = lambda node: node) -> Iterator[Qcow2Node]:
    """An image as a node. :param wrap: puts something between the driver and the file."""
    file = FileNode(f"{name}-file", str(path))
    try:
        node = Qcow2Node(name, wrap(file))
        try:
            yield node
        finally:
            node.close()
    finally:
        file.close()


class Register(Device):
    """A device with some state of every kind, that can be told to refuse it."""

    description = Description(
        "register",
        version=2,
        fields=(
            Field("value", "uint64"),
            Field("length", "uint32"),
            Field("queue", "buffer", count_field="length"),
            Field("late", "uint8", since=2, default=7),
        ),
    )

    def __init__(self, section_name: str = "register", instance_id: int = 0, value: int = 0) -> None:
        self.section_name = section_name
        self.instance_id = instance_id
        self.value = value
        self.queue = b""
        self.refuses_check = False
        self.fails_load = 0
        self.generation = 0
        self.loads = 0

    def new_generation_id(self) -> None:
        self.generation += 1

    def save_state(self) -> Values:
        return {"value": self.value, "length": len(self.queue), "queue": self.queue, "late": 1}

    def check_state(self, values: Values) -> None:
        if self.refuses_check:
            raise self.refuse("value", "is not what this device takes")
        self.integer(values, "value")

    def load_state(self, values: Values) -> None:
        self.loads += 1
        if self.fails_load:
            self.fails_load -= 1
            raise IOFailed(f"'{self.section_name}' could not reach its disk", errno=errno.EIO)
        self.value, self.queue = self.integer(values, "value"), self.buffer(values, "queue")


def new_machine(
    *devices: Device,
    memory: Mapping[str, int] = MappingProxyType({}),
    board: str = "none",
    running: bool = False,
) -> Machine:
    """A machine without a processor.

    :param memory: bytes of each block of RAM by its name.
    """
    blocks = [
        MemoryBlock.allocate(name, (number + 1) << 32, size, is_ram=True)
        for number, (name, size) in enumerate(memory.items())
    ]
    machine = Machine(
        name="test",
        board=Board(board, devices=devices),
        engine=NoEngine(),
        memory=GuestMemory(tuple(blocks)),
        clock=VirtualClock(),
        mailbox=Mailbox(),
        events=EventBus(),
    )
    machine.start(paused=not running)
    return machine


def events_of(machine: Machine) -> list[str]:
    """The names of all events from now on, as they come."""
    names: list[str] = []
    machine.events.subscribe(lambda event: names.append(event.name))
    return names


class Steps:
    """A context that counts the checkpoints, and is cancelled at the one with the number `cancel_at`."""

    def __init__(self, cancel_at: int | None = None) -> None:
        self.cancel_at = cancel_at
        self.checkpoints = 0
        self.reports: list[tuple[int, int]] = []
        self.choices: list[tuple[str, str, str]] = []

    def chose(self, what: str, chosen: str, why: str = "") -> None:
        self.choices.append((what, chosen, why))

    def progress(self, done: int, total: int) -> None:
        self.reports.append((done, total))

    def checkpoint(self) -> None:
        number = self.checkpoints
        self.checkpoints += 1
        if number == self.cancel_at:
            raise Cancelled

    def moved(self, count: int) -> None:
        self.checkpoint()

    def point_of_no_return(self) -> None:
        self.checkpoint()


def do_save(
    machine: Machine,
    nodes: Sequence[Node],
    tag: str,
    context: Context | None = None,
    vmstate: str | None = None,
) -> None:
    """Save as the commands do, onto nodes that are in no graph."""
    chosen = selection.for_save([selection.snapshot_node(node) for node in nodes], tag, vmstate)
    save(machine, chosen, context or Unwatched())


def do_load(
    machine: Machine,
    nodes: Sequence[Node],
    tag: str,
    context: Context | None = None,
    vmstate: str | None = None,
) -> None:
    """Load as the commands do."""
    chosen = selection.for_load([selection.snapshot_node(node) for node in nodes], tag, vmstate)
    load(machine, chosen, context or Unwatched())


def do_delete(nodes: Sequence[Node], tag: str, context: Context | None = None) -> None:
    """Delete as the commands do."""
    found = selection.for_delete([selection.snapshot_node(node) for node in nodes], tag)
    delete(found, context or Unwatched())


def qemu_img_check(path: Path, *, leaks_allowed: bool = False) -> None:
    """`qemu-img check` finds nothing wrong: exit status 0, or 3 for leaks where they are allowed."""
    run = subprocess.run([peer("qemu-img"), "check", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode in ((0, 3) if leaks_allowed else (0,)), run.stdout + run.stderr


def content(node: Node) -> str:
    """A digest of a node's bytes."""
    return hashlib.sha256(node.read(0, node.size)).hexdigest()


def everything(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every snapshot of an image by its id and name: a digest of its disk, and its machine state.

    The image is opened anew, and a copy of it is reverted to each in turn.
    """
    found: dict[str, tuple[str, bytes]] = {}
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    with opened(copy, "copy") as node:
        store = node.snapshot_store
        for snapshot in store.snapshots():
            state = store.read_state(snapshot, 0, snapshot.state_size)
            change = store.prepare_revert(snapshot)
            change.commit()
            change.finish()
            found[f"{snapshot.id} {snapshot.name}"] = (content(node), state)
    copy.unlink()
    return found
