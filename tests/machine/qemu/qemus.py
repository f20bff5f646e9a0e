"""QEMUs with a guest that checks itself, what they save by themselves, and that as a stored stream."""

import json
import socket
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from guest.consoles import GuestProcess
from peers import peer
from stillframe.machine.engines.qemu.postcopy import PostcopySource
from stillframe.vmstate import layout
from stillframe.vmstate.page_index import ZERO_PAGE, PageIndex
from stillframe.vmstate.ram import PAGE_RECORD, Addresses, Pages, RamBlock, RamReader, RamWriter
from stillframe.vmstate.relayed import RelayedHead, RelayedTail, read_head, read_tail
from stillframe.vmstate.transfer import StateSource, state_sink

SOURCE = Path(__file__).with_name("heartbeat.c")
_FLAGS = ("-m32", "-march=i686", "-O2", "-ffreestanding", "-fno-stack-protector", "-fno-pic")
_LINKED = ("-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000,-n,--build-id=none,--no-warn-rwx-segments")

Read = Callable[[int, int], bytes]


def built_guest(directory: Path) -> Path:
    """The guest of heartbeat.c, as a file for `-kernel`."""
    path = directory / "heartbeat.elf"
    subprocess.run([peer("gcc"), *_FLAGS, *_LINKED, "-o", str(path), str(SOURCE)], check=True)
    return path


class Qemu:
    """A PC of 7.2's kind with that guest, on any version: its console is read here, its monitor answers here."""

    def __init__(self, version: str, guest: Path, directory: Path, *more: str, memory: int = 64) -> None:
        directory.mkdir()
        self.directory = directory
        words = [peer("qemu-system-x86_64", version), "-machine", "pc-q35-7.2", "-cpu", "qemu64"]
        words += ["-m", str(memory), "-nodefaults", "-no-user-config", "-display", "none"]
        words += ["-serial", "stdio", "-monitor", "none", "-qmp", f"unix:{directory}/qmp"]
        words += ["-kernel", str(guest), "-append", f"mb={memory // 4}", *more]
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(directory / "qmp"))
            listening.listen(1)
            listening.settimeout(60)
            self.guest = GuestProcess(words)
            connection, _ = listening.accept()
        self.printed = ""
        """On the console, when it was last saved."""
        self._monitor = connection.makefile("rwb")
        self._connection = connection
        self._monitor.readline()
        self.ask("qmp_capabilities")

    def __enter__(self) -> "Qemu":
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self.guest.__exit__()

    def ask(self, command: str, **arguments: Any) -> Any:
        """QEMU's answer to a command; its events are passed over."""
        message = {"execute": command, "arguments": {k.replace("_", "-"): v for k, v in arguments.items()}}
        self._monitor.write(json.dumps(message).encode())
        self._monitor.flush()
        for line in self._monitor:
            answer = json.loads(line)
            if "event" not in answer:
                assert "return" in answer, answer
                return answer["return"]
        raise AssertionError("QEMU went away")

    def capable_of(self, *capabilities: str) -> None:
        """Set these migration capabilities."""
        self.ask(
            "migrate-set-capabilities",
            capabilities=[{"capability": each, "state": True} for each in capabilities],
        )

    def saved_behind(self) -> bytes:
        """Its state, saved by a background snapshot, which leaves it paused here."""
        with socket.socket(socket.AF_UNIX) as listening:
            path = str(self.directory / "save")
            listening.bind(path)
            listening.listen(1)
            self.capable_of("background-snapshot")
            self.ask("migrate-set-parameters", max_bandwidth=100 << 30)
            self.ask("stop")
            self.printed = self.guest.drain()
            self.ask("migrate", uri=f"unix:{path}")
            connection, _ = listening.accept()
        with connection:
            return b"".join(iter(lambda: connection.recv(1 << 20), b""))

    def awaiting(self) -> socket.socket:
        """Have it wait for a state, and connect there."""
        path = str(self.directory / "load")
        self.ask("migrate-incoming", uri=f"unix:{path}")
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        return connection


@dataclass(frozen=True)
class Stored:
    """A stored stream. :param index: of its pages."""

    data: bytes
    head: RelayedHead
    tail: RelayedTail
    index: PageIndex

    def read(self, offset: int, length: int) -> bytes:
        """Bytes of it; it may be called in any process."""
        return self.data[offset : offset + length]

    def source(self, connection: socket.socket, **more: Any) -> PostcopySource:
        """A lazy source of it; its server is a process of its own."""
        given: dict[str, Any] = {"read": self.read, "descriptors": (), "devices": self.tail.devices, **more}
        return PostcopySource(connection, self.head, index=self.index, **given)


class Memory:
    """A visitor that puts pages where they belong."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self.content = {block.name: np.zeros((block.length // 4096, 4096), np.uint8) for block in blocks}

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        """Known."""

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        self.content[block.name][addresses // 4096] = pages

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        self.content[block.name][addresses // 4096] = 0


def taken_apart(stream: bytes) -> tuple[RelayedHead, dict[str, npt.NDArray[np.uint8]], RelayedTail]:
    """What QEMU wrote: its head, its memory, its tail."""
    source = StateSource(lambda offset, length: stream[offset : offset + length], len(stream))
    head = read_head(source)
    memory = Memory(head.blocks)
    # The reader of records has to know the blocks: it reads their list once more.
    source.seek(len(head.head) + len(layout.section_head(layout.START, 0, layout.RAM_NAME, 0, 0)))
    reader = RamReader(source, memory)
    reader.payload()
    source.take(5)
    # A background snapshot has no END: the devices follow the last PART.
    while source.window(1)[0] in (layout.PART, layout.END):
        source.take(5)
        reader.payload()
        source.take(5)
    return head, memory.content, read_tail(stream[source.offset :])


def stored(stream: bytes) -> Stored:
    """The stream as stillframe keeps it: a PART in which a quarter of the pages are garbage, and one that makes them good."""
    head, memory, tail = taken_apart(stream)
    random = np.random.default_rng(1)
    data = bytearray(head.head + head.ram_start)
    offsets = {name: where.copy() for name, where in PageIndex.of(head.blocks).offsets.items()}

    def wrote(block: RamBlock, addresses: Addresses, offset: int | None) -> None:
        where = ZERO_PAGE if offset is None else offset + PAGE_RECORD * np.arange(len(addresses))
        offsets[block.name][addresses // 4096] = where

    def write_at(offset: int, view: memoryview) -> None:
        data[offset:] = view

    with state_sink(write_at, len(data)) as sink:
        ram = RamWriter(sink, wrote)
        stale = {name: random.random(len(pages)) < 0.25 for name, pages in memory.items()}
        for which in ("stale", "good"):
            sink.write(layout.mark(layout.PART, head.ram_section_id))
            for block in head.blocks:
                pages = memory[block.name]
                if which == "stale":
                    pages = pages.copy()
                    pages[stale[block.name]] = random.integers(0, 256, 4096, np.uint8)
                flat = pages.reshape(-1)

                def readinto(offset: int, view: memoryview, flat: npt.NDArray[np.uint8] = flat) -> None:
                    view[:] = flat[offset : offset + len(view)]

                if which == "stale":
                    ram.pages(block, readinto, lambda length: None)
                else:
                    ram.some_pages(block, np.flatnonzero(stale[block.name]), readinto, lambda length: None)
            ram.end()
            sink.write(layout.mark(layout.FOOTER, head.ram_section_id))
        parts_end = sink.offset
        sink.write(layout.mark(layout.END, head.ram_section_id))
        ram.end()
        sink.write(layout.mark(layout.FOOTER, head.ram_section_id))
        sink.write(tail.data)
    return Stored(bytes(data), head, tail, PageIndex(head.blocks, offsets, parts_end, parts_end))


class InBackground:
    """A thread that does `work`; leaving the `with` waits for it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._work = work
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "InBackground":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Until it has ended."""
        self._thread.join(60)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self.error = error
