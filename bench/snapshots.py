"""Live snapshots beside QEMU's snapshot-save, snapshot-load and snapshot-delete, in one run.

    make bench
    .venv/bin/python bench/snapshots.py --rounds 5 --json snapshots.json

The bundled guest runs on our machine and on QEMU's riscv64 `virt`, with as much memory, as many pages of it filled, and the
same commands over QMP. Both sides take turns, each time in new processes on a new image; figures are medians over the rounds.

A heartbeat gap is between two beats (one every 10 ms) as they arrive here, read by a thread of its own: "in a save" the longest
from the command to three beats after its end, "normal" the longest in 1.5 s before. "Idle" is a guest that only looks at its
memory, "dirtying" one that rewrites 50 MB/s. First saves write the whole state: the snapshot before was deleted. Loads are into
new processes, in which a small guest runs; QEMU 7.2's guest has no heartbeats after a load (docs/guest.md).

What is counted in bytes, and rewinds, are measured in this process, with a machine without a processor; rewinds again over QMP,
with a guest that rewrites 500 pages a beat, two beats each time, and checks itself. live/during.py says what else is looked at,
live/stalls.py how long single stores stand still.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# In the place of this folder, where a module has the name of one of the tests' packages.
sys.path[0] = str(ROOT / "tests")
sys.path.append(str(ROOT / "bench" / "live"))

import during  # noqa: E402
import numpy as np  # noqa: E402
import stalls  # noqa: E402
from guests import (  # noqa: E402
    DIRTYING,
    DISK,
    OURS,
    SIZES,
    THEIRS,
    Guest,
    guest,
)
from tables import Row, at_most, gap_limit, report, share_of_theirs, show  # noqa: E402

from snapshots.hosts import Register, new_image, new_machine, opened  # noqa: E402
from stillframe.client import Client  # noqa: E402
from stillframe.snapshots import selection  # noqa: E402
from stillframe.snapshots.context import Unwatched  # noqa: E402
from stillframe.snapshots.ground import Ground  # noqa: E402
from stillframe.snapshots.load import load  # noqa: E402
from stillframe.snapshots.save import save  # noqa: E402
from stillframe.vmstate.ram import PAGE_SIZE  # noqa: E402

REWOUND_PAGES = 1000
_PATIENCE = 120.0
_REWINDS_AT_ONCE = 500
"""In one conversation, which may not take for ever."""


# Beside QEMU.


def beside_rows(memory: int) -> dict[str, Row]:
    """The rows for a guest of that size, by their key."""
    size, is_larger = f"{memory} MiB", memory == max(SIZES)
    gap_bar = "≤ 20 ms over normal, or 1/50 of QEMU's"
    return {
        "gap idle": Row(f"longest heartbeat gap in a save, {size}, idle", "ms", gap_bar, limit=gap_limit),
        "gap dirtying": Row(
            f"longest heartbeat gap in a save, {size}, dirtying 50 MB/s", "ms", gap_bar, limit=gap_limit
        ),
        "save idle": Row(f"first save, {size}, idle", "ms", "≤ 1.2 × QEMU's", limit=share_of_theirs(1.2)),
        "save dirtying": Row(f"first save, {size}, dirtying 50 MB/s", "ms", "≤ 1.2 × QEMU's", limit=share_of_theirs(1.2)),
        "running": Row(
            f"load until the guest runs, {size}",
            "ms",
            "≤ 100 ms, ≤ 1/10 of QEMU's" if is_larger else "≤ 100 ms",
            limit=lambda row: min(100.0, share_of_theirs(0.1 if is_larger else 1.0)(row)),
        ),
        "heartbeat": Row(f"load until the first heartbeat, {size}", "ms"),
        "resident": Row(f"load until all is in memory, {size}", "ms", "≤ 1.2 × QEMU's", limit=share_of_theirs(1.2)),
        "delete": Row(f"delete, blocks given back, {size}", "ms", "≤ 1.2 × QEMU's", limit=share_of_theirs(1.2)),
    }  # fmt: skip


def one_side(side: str, memory: int, directory: Path) -> tuple[dict[str, float], dict[str, float]]:
    """One round. :return: the figures by the rows' keys, and the normal ones."""
    figures: dict[str, float] = {}
    normal: dict[str, float] = {}
    image = new_image(directory / "root.qcow2", DISK)
    append = f"mb={SIZES[memory]} dirty=16 period=10"
    with guest(side, directory / "saved", image, memory, append) as machine:
        for state, commands in (("idle", ("hold",)), ("dirtying", ("go", f"dirty {DIRTYING}"))):
            for command in commands:
                machine.console.command(command)
            normal[f"gap {state}"] = machine.normal_gap()
            begun, ended = machine.timed(partial(Client.save, tag=state, vmstate="root", devices=["root"]))
            figures[f"save {state}"] = 1000 * (ended - begun)
            figures[f"gap {state}"] = machine.longest_gap(begun, ended)
            if state == "idle":
                begun, ended = machine.timed(partial(Client.delete, tag=state, devices=["root"]))
                figures["delete"] = 1000 * (ended - begun)
        nonce = machine.console.beats[-1][3]
        machine.talk(Client.quit)
    with guest(side, directory / "loaded", image, memory, "mb=2 period=10") as machine:
        machine.console.beats_after(0, 3)

        async def load_it(client: Client) -> tuple[float, float, float]:
            async with client.events("RESUME") as events:
                begun = time.monotonic()
                job = asyncio.create_task(client.load("dirtying", vmstate="root", devices=["root"]))
                await anext(aiter(events))
                running = time.monotonic()
                await job
                return begun, running, time.monotonic()

        begun, running, ended = machine.talk(load_it)
        figures["running"], figures["resident"] = 1000 * (running - begun), 1000 * (ended - begun)
        if side == OURS:
            figures["heartbeat"] = 1000 * (_first_beat_of(machine, nonce) - begun)
    return figures, normal


def _first_beat_of(machine: Guest, nonce: str) -> float:
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        beats = list(zip(machine.console.beats, machine.console.arrivals, strict=False))
        found = [at for beat, at in beats if beat[3] == nonce]
        if found:
            return found[0]
        time.sleep(0.005)
    raise SystemExit("the loaded guest has no heartbeat")


def beside(memory: int, rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """All rows of a size."""
    rows = beside_rows(memory)
    for number in range(rounds):
        for side in (OURS, THEIRS) if number % 2 == 0 else (THEIRS, OURS):
            progress(f"{memory} MiB, round {number + 1} of {rounds}: {side}")
            with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
                figures, normal = one_side(side, memory, Path(directory))
            for key, value in figures.items():
                (rows[key].ours if side == OURS else rows[key].theirs).append(value)
            if side == OURS:
                for key, value in normal.items():
                    rows[key].normal.append(value)
    return list(rows.values())


# In this process.


class Bench:
    """A machine without a processor, with as much memory as the smaller guest, on an image."""

    def __init__(self, directory: Path) -> None:
        self.path = new_image(directory / "state.qcow2", DISK)
        memory, filled = min(SIZES.items())
        self.machine = new_machine(Register(), memory={"ram": memory << 20}, running=True)
        self.pages = np.frombuffer(self.machine.memory.blocks[0].view, np.uint8).reshape(-1, PAGE_SIZE)
        self.chance = np.random.default_rng(1)
        self.filled = (filled << 20) // PAGE_SIZE
        self.pages[: self.filled] = self.chance.integers(0, 256, (self.filled, PAGE_SIZE), np.uint8)
        self.ground = Ground(self.machine)

    def change(self, count: int) -> "np.ndarray":
        """Pages that are not zero get other content. :return: their numbers."""
        numbers = np.sort(self.chance.choice(self.filled, count, replace=False))
        self.pages[numbers] ^= np.uint8(1 + self.chance.integers(0, 200))
        return numbers


def _written() -> int:
    """Bytes that this process has handed to write calls."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def in_bytes() -> list[Row]:
    """What saves write and take."""
    again = Row(
        "written by a save after 2 % of pages changed, of the first's", "%", "≤ 4 %", limit=at_most(4.0)
    )
    ten = Row(
        "ten snapshots, 5 % changed between: image, of one snapshot's", "×", "≤ 1.65", limit=at_most(1.65)
    )
    for row, changed, count in ((again, 0.02, 2), (ten, 0.05, 10)):
        with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
            bench = Bench(Path(directory))
            sizes, written = [], []
            with opened(bench.path, "root") as node:
                nodes = [selection.snapshot_node(node)]
                for number in range(count):
                    before = _written()
                    chosen = selection.for_save(nodes, f"s{number}", None)
                    save(bench.machine, chosen, Unwatched(), ground=bench.ground)
                    node.flush()
                    written.append(_written() - before)
                    sizes.append(bench.path.stat().st_blocks)
                    bench.change(int(changed * bench.filled))
            bench.ground.close()
        if row is again:
            row.ours.append(100 * written[1] / written[0])
        else:
            row.ours.append(sizes[-1] / sizes[0])
    return [again, ten]


def rewinds(count: int) -> list[Row]:
    """Loads of the snapshot that the machine stands on."""
    rows = []
    for what, same, with_disk in (
        ("the same each time", True, False),
        ("others each time", False, False),
        ("the same each time, and a cluster of the disk", True, True),
    ):
        times, processor = [], []
        with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
            bench = Bench(Path(directory))
            changed = bench.change(REWOUND_PAGES)
            with opened(bench.path, "root") as node:
                nodes = [selection.snapshot_node(node)]
                save(bench.machine, selection.for_save(nodes, "s", None), Unwatched(), ground=bench.ground)
                original = bench.pages[: bench.filled].copy()
                for number in range(count):
                    if same:
                        bench.pages[changed] ^= np.uint8(1 + number % 255)
                    else:
                        changed = bench.change(REWOUND_PAGES)
                    if with_disk:
                        node.write(number * PAGE_SIZE % DISK, b"x" * PAGE_SIZE)
                    begun, computed = time.perf_counter(), time.thread_time()
                    load(
                        bench.machine, selection.for_load(nodes, "s", None), Unwatched(), ground=bench.ground
                    )
                    times.append(1000 * (time.perf_counter() - begun))
                    processor.append(1000 * (time.thread_time() - computed))
                    if not np.array_equal(bench.pages[changed], original[changed]):
                        raise SystemExit("a rewind has left a page as it was")
                if not np.array_equal(bench.pages[: bench.filled], original):
                    raise SystemExit("a rewind has changed a page that it had no business with")
            bench.ground.close()
        title = f"rewind, {REWOUND_PAGES:,} pages, {what}"
        rows += _rewind_rows(title, times)
        rows.append(Row(f"{title}: processor time", "ms", ours=[statistics.median(processor)]))
    return rows


def _rewind_rows(what: str, times: list[float]) -> list[Row]:
    times.sort()
    median = Row(f"{what}: median", "ms", "≤ 10 ms", ours=[statistics.median(times)], limit=at_most(10.0))
    return [median, Row(f"{what}: 99 %", "ms", ours=[times[int(0.99 * (len(times) - 1))]])]


def rewinds_with_guest(count: int) -> list[Row]:
    """Over QMP; the guest says which beat comes next, and checks itself."""
    memory, filled = min(SIZES.items())
    times: list[float] = []
    held: list[float] = []
    tenth = max(1, count // 10)
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
        image = new_image(Path(directory) / "root.qcow2", DISK)
        append = f"mb={filled} dirty={REWOUND_PAGES // 2} period=10"
        with guest(OURS, Path(directory) / "guest", image, memory, append) as machine:
            console = machine.console

            async def work(client: Client, numbers: range) -> None:
                for number in numbers:
                    if number in (tenth, count - 1):
                        held.append(during.resident(machine))
                    # Each rewrites half of them.
                    await asyncio.to_thread(console.beats_after, console.position, 2)
                    begun = time.monotonic()
                    await client.load("s", vmstate="root", devices=["root"])
                    times.append(1000 * (time.monotonic() - begun))

            machine.talk(partial(Client.save, tag="s", vmstate="root", devices=["root"]))
            for first in range(0, count, _REWINDS_AT_ONCE):
                machine.talk(partial(work, numbers=range(first, min(first + _REWINDS_AT_ONCE, count))))
            after = console.position
            console.type("?\nnonce\n")
            console.until(r"^ok nonce=\w+\r?\n", after)
            said = console.command("check")
            wrong = [beat for beat in console.beats if beat[2]]
            if " bad=0 " not in said or wrong:
                raise SystemExit(f"{wrong[:3]}; after the rewinds the guest says {said!r}")
    slower = statistics.median(times[-tenth:]) / statistics.median(times[:tenth])
    what = f"rewind, {REWOUND_PAGES:,} pages, over QMP, the guest verifies"
    return [
        *_rewind_rows(what, times),
        Row(f"{what}: the last tenth of {count:,}, of the first", "×", ours=[slower]),
        Row(f"{what}: memory taken since the first tenth", "MB", ours=[held[-1] - held[0]]),
    ]


# The command.


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each side runs (default: 3)")
    parser.add_argument("--rewinds", type=int, default=1000, help="in process (default: 1000)")
    parser.add_argument(
        "--guest-rewinds", type=int, default=200, help="over QMP, each verified by the guest (default: 200)"
    )
    parser.add_argument(
        "--memory",
        type=int,
        action="append",
        choices=sorted(SIZES),
        help="MiB; again for more (default: all)",
    )
    parser.add_argument(
        "--only", choices=("beside", "during", "stalls", "bytes", "rewinds"), help="a part of it"
    )
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there, too; - for the output"
    )
    asked = parser.parse_args()
    if min(asked.rounds, asked.rewinds, asked.guest_rewinds) < 1:
        parser.error("--rounds, --rewinds and --guest-rewinds take numbers from 1 on")

    def progress(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows = []
    if asked.only in (None, "beside"):
        for memory in asked.memory or sorted(SIZES):
            rows += beside(memory, asked.rounds, progress)
    if asked.only in (None, "during"):
        rows += during.rows(asked.rounds, progress)
    if asked.only in (None, "stalls"):
        rows += stalls.rows(asked.rounds, progress)
    if asked.only in (None, "bytes"):
        progress("bytes")
        rows += in_bytes()
    if asked.only in (None, "rewinds"):
        progress("rewinds")
        rows += rewinds(asked.rewinds) + rewinds_with_guest(asked.guest_rewinds)
    found = report(rows, asked.rounds, "qemu-system-riscv64")
    if asked.json == Path("-"):
        print(json.dumps(found, indent=2))
        return
    show(f"snapshots: ours beside {THEIRS}'s", rows)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
