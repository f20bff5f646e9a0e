"""What the benchmarks of snapshots share: a guest in a process of its own, and the bundled one on our machine or on QEMU's."""

import asyncio
import itertools
import subprocess
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from peers import peer
from running import STILLFRAME
from stillframe.client import Client
from storm import WatchedConsole

ROOT = Path(__file__).resolve().parents[2]
OURS, THEIRS = "stillframe", "QEMU 7.2"
SIZES = {256: 192, 1024: 800}
"""MiB of memory: MiB that are filled."""
DISK = 64 << 20
DIRTYING = 128
"""Pages a beat, 100 beats a second: 52 MB/s."""
_NORMAL_SECONDS = 1.5
_PATIENCE = 120.0
_GUEST = ROOT / "src" / "stillframe" / "data" / "guest.elf"

Result = TypeVar("Result")


# A guest in a process of its own, ours or theirs.


class Guest:
    """A guest with a heartbeat, its console watched and its monitor at hand."""

    def __init__(self, process: "subprocess.Popen[bytes]", console: WatchedConsole, qmp: Path) -> None:
        self.pid = process.pid
        self.console = console
        self._qmp = qmp

    def talk(self, conversation: Callable[[Client], Awaitable[Result]]) -> Result:
        """One conversation with the monitor."""

        async def work() -> Result:
            async with Client(f"unix:{self._qmp}") as client:
                return await asyncio.wait_for(conversation(client), _PATIENCE)

        return asyncio.run(work())

    def timed(self, conversation: Callable[[Client], Awaitable[object]]) -> tuple[float, float]:
        """When it began and ended, in monotonic seconds; the connection was there before."""

        async def work(client: Client) -> tuple[float, float]:
            begun = time.monotonic()
            await conversation(client)
            return begun, time.monotonic()

        return self.talk(work)

    def longest_gap(self, begun: float, ended: float) -> float:
        """Milliseconds between beats, from the last before `begun` to the third behind `ended`."""
        deadline = time.monotonic() + _PATIENCE
        while sum(at > ended for at in self.console.arrivals[-10:]) < 3:
            if time.monotonic() > deadline:
                raise SystemExit("the guest's heartbeat has stopped")
            time.sleep(0.005)
        arrivals = list(self.console.arrivals)
        first = max(0, sum(at <= begun for at in arrivals) - 1)
        last = sum(at <= ended for at in arrivals) + 3
        here = arrivals[first:last]
        return 1000 * max(after - before for before, after in itertools.pairwise(here))

    def normal_gap(self) -> float:
        """The longest while nothing is done."""
        begun = time.monotonic()
        time.sleep(_NORMAL_SECONDS)
        return self.longest_gap(begun, time.monotonic())


@contextmanager
def guest(side: str, directory: Path, image: Path, memory: int, append: str) -> Iterator[Guest]:
    """:param memory: MiB."""
    directory.mkdir()
    qmp, serial = directory / "qmp", directory / "console"
    node = f"node-name=root,discard=unmap,file.driver=file,file.filename={image},file.discard=unmap"
    if side == OURS:
        words = [*STILLFRAME, "run", "--memory", f"{memory}M", "--kernel", "bundled", "--append", append]
        words += ["--qmp", f"unix:{qmp}", "--console", f"unix:{serial}"]
        words += ["--blockdev", f"driver=qcow2,{node}", "--device", "virtio-blk,drive=root"]
    else:
        words = [peer("qemu-system-riscv64"), "-machine", "virt", "-m", str(memory), "-display", "none"]
        words += ["-global", "virtio-mmio.force-legacy=false", "-device", "virtio-rng-device"]
        words += ["-qmp", f"unix:{qmp},server=on,wait=off", "-serial", f"unix:{serial},server=on,wait=on"]
        words += ["-kernel", str(_GUEST), "-append", append]
        words += ["-blockdev", f"qcow2,{node}", "-device", "virtio-blk-device,drive=root"]
    with started(words, directory, r"^ready;") as machine:
        yield machine


@contextmanager
def started(words: list[str], directory: Path, ready: str) -> Iterator[Guest]:
    """A process that opens `qmp` and `console` in its directory, until the end of the block.

    :param ready: what its guest says then.
    """
    qmp, serial = directory / "qmp", directory / "console"
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        console = _connected(process, serial, directory / "log")
        try:
            console.until(ready)
            yield Guest(process, console, qmp)
        finally:
            console.close()
    finally:
        process.kill()
        process.wait(_PATIENCE)


def _connected(process: "subprocess.Popen[bytes]", serial: Path, log: Path) -> WatchedConsole:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return WatchedConsole(serial)
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the guest did not start: {log.read_text()}") from None
            time.sleep(0.01)
