"""What else is at work while a snapshot is saved, loaded or deleted: other commands, lists, faults, memory, hashes."""

import asyncio
import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import get_args

import numpy as np
from guests import DIRTYING, DISK, OURS, SIZES, THEIRS, Guest, guest
from tables import Row, at_most

from snapshots.hosts import Register, new_image, new_machine
from stillframe.client import Client
from stillframe.machine.frozen import freeze
from stillframe.machine.tracking import HashName, HashTracking
from stillframe.vmstate.ram import PAGE_SIZE

_ASKED = ("query-status", "query-jobs", "query-named-block-nodes")
_NODES = {"devices": ["root"]}
_HASHED = 64 << 20


def rows(rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """All of it, of the larger guest while it rewrites 50 MB/s. :param rounds: how often."""
    memory = max(SIZES)
    size = f"{memory} MiB, dirtying"
    found = {
        (work, what): Row(f"another command in a {work}, {size}: {what}", "ms", bar, limit=limit)
        for work in ("save", "load")
        for what, bar, limit in (("99 %", "", None), ("worst", "≤ 50 ms", at_most(50.0)))
    }
    written = Row(f"first save, {size}, memory that is not zero", "MB/s")
    gone = Row(f"delete, gone from the list, {size}", "ms", "≤ 20 ms", limit=at_most(20.0))
    faults = Row(f"faults of the machine's process in a load, {size}", "")
    taken = Row(f"memory beyond the guest's, at most, in a save, {size}", "MB")
    for number in range(rounds):
        for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            progress(f"other commands, round {number + 1} of {rounds}: {side}")
            with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
                figures = _one_side(side, memory, Path(directory))
            for key, row in (
                *found.items(),
                ("written", written),
                ("gone", gone),
                ("faults", faults),
                ("memory", taken),
            ):
                if key in figures:
                    (row.ours if side == OURS else row.theirs).append(figures[key])
    progress("hashes")
    return [*found.values(), written, gone, faults, taken, *_hashes(rounds)]


def _one_side(side: str, memory: int, directory: Path) -> dict[object, float]:
    figures: dict[object, float] = {}
    image = new_image(directory / "root.qcow2", DISK)
    save = {"vmstate": "root", **_NODES}
    with guest(side, directory / "saved", image, memory, f"mb={SIZES[memory]} dirty=16 period=10") as machine:
        machine.console.command(f"dirty {DIRTYING}")
        begun = time.monotonic()
        _note(figures, "save", machine.talk(partial(_answers, job=partial(Client.save, tag="s", **save))))
        figures["written"] = SIZES[memory] * 1.048576 / (time.monotonic() - begun)
        if side == OURS:
            with _peak(machine.pid, memory) as peak:
                machine.talk(partial(Client.save, tag="again", **save))
            figures["memory"] = max(peak)
            figures["gone"] = machine.talk(partial(_until_gone, tag="again"))
        machine.talk(Client.quit)
    with guest(side, directory / "loaded", image, memory, "mb=2 period=10") as machine:
        machine.console.beats_after(0, 3)
        before = _faults(machine.pid)
        _note(figures, "load", machine.talk(partial(_answers, job=partial(Client.load, tag="s", **save))))
        if side == OURS:
            figures["faults"] = _faults(machine.pid) - before
    return figures


def _note(figures: dict[object, float], work: str, times: list[float]) -> None:
    times.sort()
    figures[work, "99 %"] = times[int(0.99 * (len(times) - 1))]
    figures[work, "worst"] = times[-1]


async def _answers(client: Client, job: Callable[[Client], Awaitable[object]]) -> list[float]:
    """How long other commands take while the job lasts; milliseconds. QEMU's monitor has room for one client."""
    times = []
    running = asyncio.ensure_future(job(client))
    while not running.done():
        for command in _ASKED:
            begun = time.monotonic()
            await client.execute(command)
            times.append(1000 * (time.monotonic() - begun))
        await asyncio.sleep(0.002)
    await running
    return times


async def _until_gone(client: Client, tag: str) -> float:
    """From the command to the first list without the snapshot; milliseconds."""
    name = f"'name': '{tag}'"
    if name not in str(await client.execute("query-named-block-nodes")):
        raise SystemExit(f"the snapshot '{tag}' that is to be deleted is not on the list")
    begun = time.monotonic()
    running = asyncio.ensure_future(client.delete(tag, devices=["root"]))
    while name in str(await client.execute("query-named-block-nodes")):
        await asyncio.sleep(0.001)
    ended = time.monotonic()
    await running
    return 1000 * (ended - begun)


def _faults(pid: int) -> int:
    """Page faults of a process so far, those without a read of its own."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


@contextlib.contextmanager
def _peak(pid: int, memory: int):  # type: ignore[no-untyped-def]
    """What the process and its children hold beyond `memory` MiB, asked again and again; decimal megabytes.

    Their proportional shares: a page that two share counts once.
    """
    figures: list[float] = []
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            figures.append(_shares(pid) / 1e6 - SIZES[memory] * 1.048576)
            ended.wait(0.02)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield figures
    finally:
        ended.set()
        thread.join()


def _shares(pid: int) -> int:
    total = 0
    children = Path(f"/proc/{pid}/task").glob("*/children")
    pids = [pid, *(int(word) for each in children for word in each.read_text().split())]
    for each in pids:
        # A child may have ended since it was listed.
        with contextlib.suppress(OSError):
            lines = Path(f"/proc/{each}/smaps_rollup").read_text().splitlines()
            total += 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def _hashes(rounds: int) -> list[Row]:
    """What telling changes by hashes costs, where the kernel does not tell them."""
    machine = new_machine(Register(), memory={"ram": _HASHED}, running=False)
    block = machine.memory.blocks[0]
    block.view[:] = np.random.default_rng(1).bytes(_HASHED)
    found = []
    copy = freeze(machine.memory)
    try:
        for algorithm in get_args(HashName):
            row = Row(f"changes by hashes, {algorithm}, pages of {PAGE_SIZE} bytes", "MB/s")
            tracking = HashTracking(algorithm)
            for _ in range(rounds):
                begun = time.perf_counter()
                tracking.digests(block, copy)
                row.ours.append(_HASHED / 1e6 / (time.perf_counter() - begun))
            found.append(row)
    finally:
        copy.close()
        machine.close()
    return found


def resident(machine: Guest) -> float:
    """Decimal megabytes of a machine's process."""
    pages = int(Path(f"/proc/{machine.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6
