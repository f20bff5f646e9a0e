"""The qcow2 driver beside qemu-img, in one run: snapshots and check of a large image, sequential and scattered requests.

    make bench
    .venv/bin/python bench/qcow2.py --rounds 7 --json qcow2.json

Ours runs inside this process, from opening the image to closing it, flushes included; importing is timed apart. Theirs is
the time of a qemu-img process less its time for the same on an empty image, which takes away its start; requests are timed
by `qemu-img bench` itself. Both sides take turns, on files in the same state; figures are medians over the rounds. Flushes
are counted on our side by the calls that make them, on theirs by strace where it is installed, in a run of its own that is
not timed.

`qemu-img bench` has no random order. Scattered requests go up by a step of a prime number of 4 KiB blocks, round and round the
disk: the same offsets in the same order on both sides.
"""

import argparse
import json
import mmap
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from peers import peer  # noqa: E402
from stillframe.block.file import FileNode  # noqa: E402
from stillframe.block.node import Change, SnapshotInfo, SnapshotRecord  # noqa: E402

_started = time.perf_counter()
from stillframe.block.qcow2 import changes, check, writing  # noqa: E402
from stillframe.block.qcow2.node import Qcow2Node  # noqa: E402

IMPORTS_S = time.perf_counter() - _started
"""What the qcow2 driver, and numpy with it, takes to import; once a process, stated apart."""

_LOADED = (changes, writing)

LARGE, OLDER = "32G", 9
MIB, BLOCK = 1 << 20, 4096
SEQUENTIAL_MIB = 512
SCATTERED_DISK_MIB, STEP_BLOCKS, SCATTERED_REQUESTS = 1024, 10007, 40000
NEW = SnapshotRecord("new", 1700000000, 0)


@dataclass(slots=True)
class Row:
    """One line of the table. Figures are one a round.

    :param unit: "s", for which less is better, "MiB/s" or "requests/s".
    :param ours: and :param theirs: what is compared. :param empty: theirs on an empty image, already taken away.
    :param bar: the ratio of ours to theirs that is asked for: at most it for seconds, else at least; None: reported.
    :param processor_s: of processor time, all rounds together, ours and theirs; on a busy host the fairer figure.
    :param flushes: fdatasync and fsync calls, ours and theirs. :param ours_flushing: seconds that ours spent in them.
    """

    work: str
    unit: str
    bar: float | None
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    empty: list[float] = field(default_factory=list)
    processor_s: tuple[float, float] = (0.0, 0.0)
    ours_flushing: list[float] = field(default_factory=list)
    flushes: tuple[int | None, int | None] = (None, None)

    @property
    def compared(self) -> tuple[float, float]:
        """Medians: ours, and theirs less the empty image's."""
        taken_away = statistics.median(self.empty) if self.empty else 0.0
        return statistics.median(self.ours), statistics.median(self.theirs) - taken_away

    @property
    def ratio(self) -> float:
        """Ours to theirs."""
        ours, theirs = self.compared
        return ours / theirs

    @property
    def ratio_without_flushes(self) -> float | None:
        """The same with the time that ours waited for storage taken away, as the empty image's takes theirs away."""
        if not self.ours_flushing:
            return None
        ours, theirs = self.compared
        return (ours - statistics.median(self.ours_flushing)) / theirs

    @property
    def is_met(self) -> bool | None:
        """Whether the bar is."""
        if self.bar is None:
            return None
        if self.unit != "s":
            return self.ratio >= self.bar
        without = self.ratio_without_flushes
        return (self.ratio if without is None else without) <= self.bar


# What else is measured.


@contextmanager
def processor_time(row: Row) -> Iterator[None]:
    """Add what this process and its children use in the block."""
    before = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    yield
    after = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    ours, theirs = (
        b.ru_utime + b.ru_stime - a.ru_utime - a.ru_stime for a, b in zip(before, after, strict=True)
    )
    row.processor_s = (row.processor_s[0] + ours, row.processor_s[1] + theirs)


@dataclass(slots=True)
class _Flushes:
    count: int = 0
    seconds: float = 0.0


@contextmanager
def counted_flushes() -> Iterator[_Flushes]:
    """Count and time what asks the storage to make something durable, in this process."""
    found = _Flushes()
    before = {name: getattr(os, name) for name in ("fdatasync", "fsync", "pwritev")}

    def timed(name: str, *arguments: object) -> object:
        started = time.perf_counter()
        try:
            return before[name](*arguments)
        finally:
            # pwritev is only called for what is to be durable at its return.
            found.count += 1
            found.seconds += time.perf_counter() - started

    for name in before:
        setattr(os, name, lambda *arguments, name=name: timed(name, *arguments))
    try:
        yield found
    finally:
        for name, call in before.items():
            setattr(os, name, call)


def flushes_of(words: list[str]) -> int | None:
    """How often a command asks for that; None without strace."""
    strace = shutil.which("strace")
    if strace is None:
        return None
    with tempfile.NamedTemporaryFile() as log:
        subprocess.run(
            [strace, "-f", "-qq", "-e", "trace=fsync,fdatasync", "-o", log.name, *words],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        return len(re.findall(rb"(?:fsync|fdatasync)\(", Path(log.name).read_bytes()))


# Snapshots and check.


def _run(*words: str) -> float:
    started = time.perf_counter()
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def _qemu_img(*words: str) -> float:
    return _run(peer("qemu-img"), *words)


def _copy(source: Path, target: Path) -> None:
    """A sparse copy, durable, so that no time is spent later on writing it out."""
    subprocess.run(["cp", "--sparse=always", source, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _opened(path: Path, *, read_only: bool = False) -> tuple[FileNode, Qcow2Node]:
    file = FileNode("file", str(path), read_only=read_only)
    return file, Qcow2Node("disk", file, read_only=read_only)


def _named(node: Qcow2Node, name: str) -> SnapshotInfo:
    return next(each for each in node.snapshot_store.snapshots() if each.name == name)


def _prepare_create(node: Qcow2Node) -> Change:
    return node.snapshot_store.freeze().prepare(NEW)


def _prepare_apply(node: Qcow2Node) -> Change:
    return node.snapshot_store.prepare_revert(_named(node, NEW.name))


def _prepare_delete(node: Qcow2Node) -> Change:
    return node.snapshot_store.prepare_delete(_named(node, NEW.name))


def _change(path: Path, prepare: Callable[[Qcow2Node], Change]) -> float:
    """One change of an image's snapshots, from opening to closing it."""
    started = time.perf_counter()
    file, node = _opened(path)
    change = prepare(node)
    change.commit()
    change.finish()
    node.close()
    file.close()
    return time.perf_counter() - started


def _check(path: Path) -> float:
    started = time.perf_counter()
    file = FileNode("file", str(path), read_only=True)
    result = check.check(file)
    file.close()
    taken = time.perf_counter() - started
    if result.leaks or result.corruptions:
        raise SystemExit(f"{path}: {result.messages[:3]}")
    return taken


OPERATIONS: tuple[tuple[str, str, Callable[[Qcow2Node], Change]], ...] = (
    ("snapshot create", "-c", _prepare_create),
    ("snapshot apply", "-a", _prepare_apply),
    ("snapshot delete", "-d", _prepare_delete),
)


def snapshots(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Create, apply, delete and check with every cluster of 32 GiB allocated and older snapshots there."""
    say(f"making an image of {LARGE}, every cluster allocated, with {OLDER} snapshots")
    base, ours, theirs, empty = (directory / f"{name}.qcow2" for name in ("base", "ours", "theirs", "empty"))
    _qemu_img("create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(base), LARGE)
    for number in range(OLDER):
        _qemu_img("snapshot", "-c", f"old{number}", str(base))
    rows = {name: Row(f"{name}, {LARGE} allocated", "s", 1.0) for name, _, _ in OPERATIONS}
    checked = Row(f"check of that image with {OLDER} snapshots", "s", 0.7)
    for number in range(rounds + 1):
        # The first round warms up, and counts flushes.
        is_warming_up = number == 0
        if not is_warming_up:
            say(f"snapshots: round {number} of {rounds}")
        for target in (ours, theirs):
            target.unlink(missing_ok=True)
            _copy(base, target)
        empty.unlink(missing_ok=True)
        _qemu_img("create", "-q", "-f", "qcow2", str(empty), LARGE)
        figures = (_check(ours), _qemu_img("check", "-q", str(theirs)), _qemu_img("check", "-q", str(empty)))
        if not is_warming_up:
            for values, figure in zip((checked.ours, checked.theirs, checked.empty), figures, strict=True):
                values.append(figure)
        for name, option, prepare in OPERATIONS:
            row = rows[name]
            with counted_flushes() as flushes:
                ours_s = _change(ours, prepare)
            if is_warming_up:
                words = [peer("qemu-img"), "snapshot", option, NEW.name, str(theirs)]
                count = flushes_of(words)
                if count is None:
                    _run(*words)
                _qemu_img("snapshot", option, NEW.name, str(empty))
                row.flushes = (flushes.count, count)
                continue
            row.ours.append(ours_s)
            row.ours_flushing.append(flushes.seconds)
            row.theirs.append(_qemu_img("snapshot", option, NEW.name, str(theirs)))
            row.empty.append(_qemu_img("snapshot", option, NEW.name, str(empty)))
    _qemu_img("check", "-q", str(ours))
    for path in (base, ours, theirs, empty):
        path.unlink()
    return [*rows.values(), checked]


# Requests.


def _bench(path: Path, *words: str) -> float:
    """Seconds that `qemu-img bench` says its requests took."""
    said = subprocess.run(
        [peer("qemu-img"), "bench", "-f", "qcow2", "-t", "writeback", *words, str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.search(r"Run completed in ([0-9.]+) seconds", said)
    if found is None:
        raise SystemExit(f"qemu-img bench said: {said}")
    return float(found[1])


def _settle(path: Path) -> None:
    """Write the file out between the runs, so that none pays for the one before."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _create(path: Path, mib: int, *, is_filled: bool) -> None:
    path.unlink(missing_ok=True)
    options = ["-o", "preallocation=metadata"] if is_filled else []
    _qemu_img("create", "-q", "-f", "qcow2", *options, str(path), f"{mib}M")
    if is_filled:
        _bench(path, "-w", "-d", "1", "-s", str(MIB), "-c", str(mib))
    _settle(path)


def _requests(path: Path, offsets: list[int], size: int, *, is_write: bool, threads: int = 1) -> float:
    """Seconds for requests through the block layer; opening and closing apart, as in `qemu-img bench`."""
    file, node = _opened(path, read_only=not is_write)
    # Aligned to pages, as the memory of guests is, and what qemu-img uses.
    data = memoryview(mmap.mmap(-1, size))
    data[:] = os.urandom(size)

    def work(part: list[int]) -> None:
        buffer = memoryview(mmap.mmap(-1, size))
        if is_write:
            for offset in part:
                node.write(offset, data)
        else:
            for offset in part:
                node.readinto(offset, buffer)

    started = time.perf_counter()
    if threads == 1:
        work(offsets)
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(work, (offsets[number::threads] for number in range(threads))))
    taken = time.perf_counter() - started
    node.close()
    file.close()
    return taken


def sequential(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Requests of 1 MiB, one after the other."""
    path = directory / "sequential.qcow2"
    offsets = [number * MIB for number in range(SEQUENTIAL_MIB)]
    rows: list[Row] = []
    for is_filled, state in ((True, "preallocated"), (False, "fresh")):
        for is_write, what in ((False, "read"), (True, "write")):
            say(f"sequential {what}, {state}")
            row = Row(f"sequential {what}, 1 MiB, {state}", "MiB/s", 0.8)
            words = ["-d", "1", "-s", str(MIB), "-c", str(SEQUENTIAL_MIB), *(["-w"] if is_write else [])]
            is_new_each_time = is_write and not is_filled
            if not is_new_each_time:
                _create(path, SEQUENTIAL_MIB, is_filled=is_filled)
            for _ in range(rounds):
                for values, run in (
                    (row.theirs, lambda words=words: _bench(path, *words)),
                    (row.ours, lambda write=is_write: _requests(path, offsets, MIB, is_write=write)),
                ):
                    if is_new_each_time:
                        _create(path, SEQUENTIAL_MIB, is_filled=False)
                    with processor_time(row):
                        values.append(SEQUENTIAL_MIB / run())
                    _settle(path)
            rows.append(row)
    path.unlink()
    return rows


def scattered(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """Requests of 4 KiB, all over a preallocated disk."""
    path = directory / "scattered.qcow2"
    disk, step = SCATTERED_DISK_MIB * MIB, STEP_BLOCKS * BLOCK
    offsets = [number * step % disk for number in range(SCATTERED_REQUESTS)]
    say("making a disk for scattered requests")
    _create(path, SCATTERED_DISK_MIB, is_filled=True)
    rows: list[Row] = []
    for is_write, what in ((False, "read"), (True, "write")):
        one = Row(f"random {what}, 4 KiB, one at a time", "requests/s", 1.0)
        many = Row(f"random {what}, 4 KiB, 16 at a time", "requests/s", None)
        for number in range(rounds):
            say(f"random {what}: round {number + 1} of {rounds}")
            for depth, row in ((1, one), (16, many)):
                words = ["-s", str(BLOCK), "-S", str(step), "-c", str(SCATTERED_REQUESTS), "-d", str(depth)]
                words += ["-w"] if is_write else []
                with processor_time(row):
                    row.theirs.append(SCATTERED_REQUESTS / _bench(path, *words))
                _settle(path)
                with processor_time(row):
                    taken = _requests(path, offsets, BLOCK, is_write=is_write, threads=depth)
                row.ours.append(SCATTERED_REQUESTS / taken)
                _settle(path)
        rows += [one, many]
    path.unlink()
    return rows


# The report.


def _figure(value: float, unit: str) -> str:
    return f"{value * 1000:.1f} ms" if unit == "s" else f"{value:,.0f}"


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table(title=f"qcow2: ours beside qemu-img (imports apart: {IMPORTS_S * 1000:.0f} ms)")
    for title in ("work", "unit", "ours", "in flushes", "qemu-img", "on empty", "flushes", "ratio", "bar"):
        table.add_column(title, justify="left" if title in ("work", "unit", "bar") else "right")
    for row in rows:
        ratio = f"{row.ratio:.2f}"
        if row.processor_s[0]:
            ratio += f" ({row.processor_s[1] / row.processor_s[0]:.2f} by processor time)"
        if row.ratio_without_flushes is not None:
            ratio = f"{row.ratio_without_flushes:.2f} ({ratio} with flushes)"
        bar = "reported"
        if row.bar is not None:
            bar = f"{'≤' if row.unit == 's' else '≥'} {row.bar:.1f} {'met' if row.is_met else 'MISSED'}"
        table.add_row(
            row.work,
            "ms" if row.unit == "s" else row.unit,
            _figure(statistics.median(row.ours), row.unit),
            _figure(statistics.median(row.ours_flushing), "s") if row.ours_flushing else "",
            _figure(statistics.median(row.theirs), row.unit),
            _figure(statistics.median(row.empty), row.unit) if row.empty else "",
            " : ".join("?" if count is None else str(count) for count in row.flushes)
            if row.ours_flushing
            else "",
            ratio,
            bar,
        )
    Console(width=max(Console().width, 150)).print(table)


PARTS = {"snapshots": snapshots, "sequential": sequential, "scattered": scattered}


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="how often each side runs (default: 5)")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there, too; - for the output"
    )
    parser.add_argument(
        "--only", choices=PARTS, action="append", help="one part of the table; can be given several times"
    )
    parser.add_argument(
        "--directory", type=Path, help="where the images are made (default: build/bench, on this disk)"
    )
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    directory = asked.directory or ROOT / "build" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    said = subprocess.run([peer("qemu-img"), "--version"], capture_output=True, text=True, check=True)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        for name in asked.only or PARTS:
            rows += PARTS[name](
                Path(scratch), asked.rounds, lambda text: print(text, file=sys.stderr, flush=True)
            )
    report = {
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "qemu": said.stdout.splitlines()[0]},
        "imports_s": IMPORTS_S,
        "rows": [
            asdict(row)
            | {"ratio": row.ratio, "ratio_without_flushes": row.ratio_without_flushes, "met": row.is_met}
            for row in rows
        ],
    }
    if asked.json == Path("-"):
        print(json.dumps(report, indent=2))
    else:
        show(rows)
        if asked.json:
            asked.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
