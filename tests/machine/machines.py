"""Small machines for the tests, and nodes that live in memory and fail when told to."""

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine.rv64 import Program
from stillframe.block.node import Extent, ExtentKind, ImageInfo, Node
from stillframe.errors import IOFailed, NoSpace
from stillframe.events import Event, EventBus
from stillframe.machine.build import MachineConfig, build_machine
from stillframe.machine.console import MemoryConsole
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from stillframe.vmstate.fields import Values

RAM = 0x8000_0000


class MemoryNode(Node):
    """Bytes in memory. `fail` maps "read", "write", "flush", "discard" to the errno that the next ones get."""

    driver = "memory"

    def __init__(self, name: str, size: int, *, read_only: bool = False) -> None:
        super().__init__(name, read_only=read_only)
        self.content = bytearray(size)
        self.fail: dict[str, int] = {}
        self.log: list[tuple[str, int, int]] = []
        self.gate = threading.Event()
        self.gate.set()

    def _enter(self, operation: str, offset: int, length: int) -> None:
        self.gate.wait()
        self.log.append((operation, offset, length))
        number = self.fail.get(operation)
        if number is not None:
            kind = NoSpace if number == 28 else IOFailed
            raise kind(f"Could not {operation} '{self.node_name}'", errno=number)

    @property
    def size(self) -> int:
        return len(self.content)

    @property
    def children(self) -> Mapping[str, Node]:
        return {}

    def readinto(self, offset: int, buffer: memoryview) -> None:
        self._enter("read", offset, len(buffer))
        buffer[:] = self.content[offset : offset + len(buffer)]

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        self._enter("write", offset, len(data))
        self.content[offset : offset + len(data)] = data

    def write_zeroes(self, offset: int, length: int, *, unmap: bool = True) -> None:
        self._enter("write", offset, length)
        self.content[offset : offset + length] = bytes(length)

    def discard(self, offset: int, length: int) -> None:
        self._enter("discard", offset, length)

    def flush(self) -> None:
        self._enter("flush", 0, 0)

    def truncate(self, size: int) -> None:
        raise NotImplementedError

    def extents(self, offset: int, length: int) -> Iterator[Extent]:
        yield Extent(offset, length, ExtentKind.DATA)

    @property
    def snapshot_store(self) -> None:
        return None

    def info(self) -> ImageInfo:
        return ImageInfo("memory", "memory", self.size, self.size)

    def close(self) -> None:
        """Nothing to give up."""


class Events:
    """What a bus told, in order."""

    def __init__(self) -> None:
        self.bus = EventBus()
        self.seen: list[Event] = []
        self._changed = threading.Condition()
        self.bus.subscribe(self._note)

    def _note(self, event: Event) -> None:
        with self._changed:
            self.seen.append(event)
            self._changed.notify_all()

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.seen]

    def wait_for(self, name: str, timeout: float = 20.0) -> Event:
        """The first event of that name."""
        with self._changed:
            assert self._changed.wait_for(lambda: name in self.names, timeout), f"{name} among {self.names}"
            return next(event for event in self.seen if event.name == name)


@contextmanager
def machine(
    directory: Path, program: Program | bytes | None = None, **options: Any
) -> Iterator[tuple[Machine, MemoryConsole, Events]]:
    """A machine of the board `virt` that runs `program` from the start of RAM; closed at the end."""
    events, console = Events(), MemoryConsole()
    code = program.assemble() if isinstance(program, Program) else program
    if code is not None:
        path = directory / "program.bin"
        path.write_bytes(code)
        options.setdefault("bios", path)
    options.setdefault("memory_size", 8 << 20)
    built = build_machine(MachineConfig(name="test", console=console, **options), events.bus)
    try:
        yield built, console, events
    finally:
        built.close()


def word(built: Machine, address: int) -> int:
    """A u64 of RAM."""
    data = built.memory.read(address, 8)
    assert data is not None
    return int.from_bytes(data, "little")


Saved = tuple[dict[str, bytes], dict[str, Values]]


def saved(built: Machine) -> Saved:
    """Everything that a snapshot of a machine holds."""
    with built.hold(RunState.SAVE_VM):
        memory = {block.name: bytes(block.view) for block in built.memory}
        return memory, {device.section_name: device.save_state() for device in built.devices}


def load(built: Machine, state: Saved) -> None:
    """As a load does it: check, memory, devices in order."""
    memory, values = state
    for device in built.devices:
        device.check_state(values[device.section_name])
    with built.hold(RunState.RESTORE_VM):
        for block in built.memory:
            block.view[:] = memory[block.name]
        built.memory.replaced()
        for device in built.devices:
            device.load_state(values[device.section_name])
        built.new_generation_id()


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 20.0) -> None:
    """Poll until it holds; for what has no event of its own."""
    waited = threading.Event()
    for _ in range(int(timeout * 200)):
        if condition():
            return
        waited.wait(0.005)
    raise AssertionError(f"it did not come to pass: {what}")
