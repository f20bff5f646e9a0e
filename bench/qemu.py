"""A QEMU as the engine beside the same QEMU alone, in one run: live saves, lazy loads, disks in the guest.

    make bench
    .venv/bin/python bench/qemu.py --saves 20 --loads 10 --rounds 5 --big --json qemu.json

The guest is x86-64 Linux that checks itself (docs/guest.md), 1 GiB of memory with 500 MiB of it not zero, one processor, on TCG;
with --big also 4 GiB with 2,500 MiB. It beats every 20 ms and rewrites 8 pages each time. QEMU alone does `snapshot-save` and
`snapshot-load` on a qcow2 image of its own. Each side boots once a size, then saves, deletes and loads over and over.

A heartbeat gap is between two beats as they arrive here, the 20 ms included: the longest from the command to three beats after its
end; "normal" the longest in 1.5 s before. Second saves come when 2 % of the pages that are not zero have been rewritten. What they
write is what the image grows by, and once more all that stillframe's process hands to write calls, where the spool of the stream
counts too. Loads are into the running guest, from the command to the event RESUME, to the first beat of the saved guest, to the
job's end.

Disks: `dd` with O_DIRECT, one request at a time, in a guest with a shell, by its own clock; the image is allocated before, and both
sides have Linux's page cache beneath them. Nothing else is to run on the host: a load beyond its guests is in every figure.
"""

import argparse
import asyncio
import json
import math
import os
import re
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

import pc  # noqa: E402
from guests import OURS, Guest  # noqa: E402
from pc import DIRTY, THEIRS, Size  # noqa: E402
from tables import Row, at_least, at_most, report, share_of_theirs, show  # noqa: E402

from snapshots.hosts import new_image  # noqa: E402
from stillframe.client import Client  # noqa: E402

SMALL, BIG = Size(1024, 500), Size(4096, 2500)
CHANGED = 0.02
_DISK = 64 << 20
_IO_DISK = 512 << 20
_IO_MIB = 256
_NODES = {"vmstate": "root", "devices": ["root"]}
_PATIENCE = 120.0

Figures = dict[str, list[float]]


# Saves and loads.


def rows_of(size: Size) -> dict[str, Row]:
    """The rows of a size, by their key."""
    big = size is BIG
    what = f"{size.memory >> 10} GiB"
    pause, load = (150.0, 600.0) if big else (80.0, 350.0)
    few = f"written by a second save, {100 * CHANGED:g} % changed, of the first's, {what}"
    return {
        "gap": Row(f"longest heartbeat gap in a save, {what}: median", "ms", f"≤ {pause:g} ms", limit=at_most(pause)),
        "gap p95": Row(f"longest heartbeat gap in a save, {what}: 95 %", "ms", "≤ 150 ms", limit=at_most(150.0)),
        "gap share": Row(
            f"longest heartbeat gap in a save, {what}: of QEMU's", "×", "≤ 1/20", limit=at_most(1 / 20)
        ),
        "save": Row(f"first save, {what}", "ms"),
        "second save": Row(f"second save, {what}", "ms"),
        "changed": Row(f"pages rewritten before a second save, of those not zero, {what}", "%"),
        "growth": Row(f"{few}: the image", "%", "≤ 5 %", limit=at_most(5.0)),
        "handed": Row(f"{few}: with the spool", "%"),
        "running": Row(f"load until the guest runs, {what}", "ms", f"≤ {load:g} ms", limit=at_most(load)),
        "heartbeat": Row(f"load until the first heartbeat, {what}", "ms"),
        "resident": Row(f"load until all is in memory, {what}", "ms"),
        "fill": Row(f"memory that comes after a load, {what}", "MB/s", "≥ 500 MB/s", least=at_least(500.0)),
        "fill gap": Row(f"longest heartbeat gap while it comes, {what}", "ms"),
    }  # fmt: skip


def session(
    side: str, version: str, size: Size, saves: int, loads: int, directory: Path, say: Callable[[str], None]
) -> tuple[Figures, list[float]]:
    """A guest from its boot on. :return: the figures by the rows' keys, and the normal gap."""
    figures: Figures = {}

    def note(key: str, value: float) -> None:
        figures.setdefault(key, []).append(value)

    image = new_image(directory / "root.qcow2", _DISK)
    say(f"{size.memory} MiB, {side}: booting")
    with pc.checking(side, version, directory / "guest", image, size) as machine:
        normal = [machine.normal_gap()]
        for number in range(saves):
            say(f"{size.memory} MiB, {side}: save {number + 1} of {saves}")
            if number:
                machine.talk(partial(Client.delete, tag="one", devices=["root"]))
            beat, blocks, handed = _last_beat(machine), _blocks(image), _handed(machine)
            begun, ended = machine.timed(partial(Client.save, tag="one", **_NODES))
            note("save", 1000 * (ended - begun))
            note("gap", machine.longest_gap(begun, ended))
            if number in (0, saves - 1):
                first = _blocks(image) - blocks, _handed(machine) - handed
                _second(side, machine, image, size, beat, first, note)
        for number in range(loads):
            say(f"{size.memory} MiB, {side}: load {number + 1} of {loads}")
            machine.console.beats_after(machine.console.position, 10)
            _load(side, machine, size, note)
        if any(beat[2] for beat in machine.console.beats):
            raise SystemExit("the guest has found a fault in its memory or on its disk")
    return figures, normal


def _second(
    side: str,
    machine: Guest,
    image: Path,
    size: Size,
    beat: int,
    first: tuple[int, int],
    note: Callable[[str, float], None],
) -> None:
    """The save after the first, which it continues. :param beat: before the first. :param first: its bytes."""
    pages = size.filled << 8
    while (_last_beat(machine) - beat) * DIRTY < CHANGED * pages:
        machine.console.beats_after(machine.console.position, 1)
    note("changed", 100 * (_last_beat(machine) - beat) * DIRTY / pages)
    blocks, handed = _blocks(image), _handed(machine)
    begun, ended = machine.timed(partial(Client.save, tag="two", **_NODES))
    note("second save", 1000 * (ended - begun))
    note("growth", 100 * (_blocks(image) - blocks) / first[0])
    if side == OURS:
        note("handed", 100 * (_handed(machine) - handed) / first[1])
    machine.talk(partial(Client.delete, tag="two", devices=["root"]))


def _last_beat(machine: Guest) -> int:
    return machine.console.beats[-1][1]


def _blocks(image: Path) -> int:
    """Bytes that the file system holds for the image."""
    with image.open("rb") as file:
        os.fsync(file)
    return image.stat().st_blocks * 512


def _handed(machine: Guest) -> int:
    """Bytes that its process has handed to write calls."""
    lines = Path(f"/proc/{machine.pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("wchar:")).split()[1])


def _load(side: str, machine: Guest, size: Size, note: Callable[[str, float], None]) -> None:
    async def work(client: Client) -> tuple[float, float, float]:
        async with client.events("RESUME") as events:
            begun = time.monotonic()
            job = asyncio.create_task(client.load("one", **_NODES))
            await anext(aiter(events))
            running = time.monotonic()
            await job
            return begun, running, time.monotonic()

    begun, running, ended = machine.talk(work)
    note("running", 1000 * (running - begun))
    note("heartbeat", 1000 * (_first_beat(machine, begun) - begun))
    note("resident", 1000 * (ended - begun))
    if side == OURS:
        note("fill", size.filled * 1.048576 / (ended - running))
        note("fill gap", machine.longest_gap(running, ended))


def _first_beat(machine: Guest, begun: float) -> float:
    """When the loaded guest beat first: its number is less than that of the beat before."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        pairs = list(zip(machine.console.beats, machine.console.arrivals, strict=False))
        before = max((number for number, (_, at) in enumerate(pairs) if at <= begun), default=0)
        for (earlier, _), (later, at) in zip(pairs[before:], pairs[before + 1 :], strict=False):
            if later[1] <= earlier[1]:
                return at
        time.sleep(0.005)
    raise SystemExit("the loaded guest has no heartbeat")


def snapshots(size: Size, version: str, saves: int, loads: int, say: Callable[[str], None]) -> list[Row]:
    """All rows of a size."""
    rows = rows_of(size)
    for side in (OURS, THEIRS):
        with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
            figures, normal = session(side, version, size, saves, loads, Path(directory), say)
        for key, values in figures.items():
            (rows[key].ours if side == OURS else rows[key].theirs).extend(values)
        if side == OURS:
            rows["gap"].normal.extend(normal)
    gap = rows["gap"]
    rows["gap p95"].ours.append(_p95(gap.ours))
    rows["gap p95"].theirs.append(_p95(gap.theirs))
    rows["gap share"].ours.append(statistics.median(gap.ours) / statistics.median(gap.theirs))
    return list(rows.values())


def _p95(values: list[float]) -> float:
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]


# Disks.


def disks(version: str, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """What `dd` in a guest gets; the sides take turns, in guests that both run all the time."""
    kinds = {
        ("read", 4): "if=/dev/vda of=/dev/null iflag=direct bs=4k count=4000",
        ("write", 4): "if=/dev/zero of=/dev/vda oflag=direct bs=4k count=4000",
        ("read", 1024): f"if=/dev/vda of=/dev/null iflag=direct bs=1M count={_IO_MIB}",
        ("write", 1024): f"if=/dev/zero of=/dev/vda oflag=direct bs=1M count={_IO_MIB}",
    }
    rows = {
        (what, kib): Row(
            f"{what} in the guest, {'4 KiB' if kib == 4 else '1 MiB'}, one at a time",
            "MB/s",
            "≥ 0.4 × QEMU's",
            least=share_of_theirs(0.4),
        )
        for what, kib in kinds
    }
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as name:
        directory = Path(name)
        images = [new_image(directory / f"{side}.qcow2", _IO_DISK) for side in ("ours", "theirs")]
        say("disks: booting")
        with (
            pc.shell(OURS, version, directory / "ours", images[0]) as ours,
            pc.shell(THEIRS, version, directory / "theirs", images[1]) as theirs,
        ):
            for machine in (ours, theirs):
                _dd(machine, f"if=/dev/zero of=/dev/vda oflag=direct bs=1M count={_IO_MIB}")
            for number in range(rounds):
                say(f"disks, round {number + 1} of {rounds}")
                for kind, words in kinds.items():
                    rows[kind].ours.append(_dd(ours, words))
                    rows[kind].theirs.append(_dd(theirs, words))
    return list(rows.values())


def _dd(machine: Guest, words: str) -> float:
    """Megabytes a second, by the guest's clock, to the hundredth of a second."""
    after = machine.console.position
    machine.console.type(f"time dd {words}\n")
    found = re.search(r"(\d+)m ([0-9.]+)s", machine.console.until(r"^real\s+\d+m [0-9.]+s", after))
    assert found is not None
    size = re.search(r"bs=(\d+)(\w) count=(\d+)", words)
    assert size is not None
    count = int(size[1]) * {"k": 1 << 10, "M": 1 << 20}[size[2]] * int(size[3])
    return count / (60 * int(found[1]) + float(found[2])) / 1e6


# The command.


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--saves", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--loads", type=int, default=5, help="of each side (default: 5)")
    parser.add_argument("--rounds", type=int, default=3, help="of the disks (default: 3)")
    parser.add_argument(
        "--big", action="store_true", help="the larger guest, too: 9 GB of memory, 12 GB of disk"
    )
    parser.add_argument(
        "--qemu", default="host", choices=("host", "10.0"), help="which one, for both sides (default: host)"
    )
    parser.add_argument("--only", choices=("snapshots", "disks"), help="a part of it")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there, too; - for the output"
    )
    asked = parser.parse_args()
    if min(asked.saves, asked.loads, asked.rounds) < 1:
        parser.error("--saves, --loads and --rounds take numbers from 1 on")

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    rows = []
    if asked.only in (None, "snapshots"):
        for size in (SMALL, BIG) if asked.big else (SMALL,):
            rows += snapshots(size, asked.qemu, asked.saves, asked.loads, say)
    if asked.only in (None, "disks"):
        rows += disks(asked.qemu, asked.rounds, say)
    found = report(rows, asked.saves, "qemu-system-x86_64", asked.qemu)
    if asked.json == Path("-"):
        print(json.dumps(found, indent=2))
        return
    show("QEMU as the engine, beside the same QEMU alone", rows)
    if asked.json:
        asked.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
