"""Our NBD export beside qemu-nbd, in one run: `qemu-img bench` over unix sockets on two copies of one qcow2 image.

    make bench
    .venv/bin/python bench/nbd.py --rounds 7 --json nbd.json

Both servers run all the time, `stillframe image serve` and `qemu-nbd --cache=writeback`; the client is the same and asks
them in turn, so both pay for it. Figures are medians over the rounds; the bar is on the median of the rounds' ratios, since
what else a host does changes between rounds more than within one. Beside it stands what each server used of the processor.
"""

import argparse
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from peers import peer  # noqa: E402

MIB = 1 << 20
DISK_MIB = 512
BAR = 0.8
REQUESTS = {4096: 40000, MIB: 1024}
"""Bytes of a request, and how many there are in a round."""
_SECONDS = 30.0


@dataclass(slots=True)
class Row:
    """One line of the table. Figures are one a round.

    :param unit: "requests/s" or "MiB/s". :param ours: and :param theirs: what is compared.
    :param processor_s: of processor time of the servers, all rounds together, ours and theirs.
    """

    work: str
    unit: str
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=lambda: [0.0, 0.0])

    @property
    def ratio(self) -> float:
        """Ours to theirs: the median of the rounds'."""
        return statistics.median(a / b for a, b in zip(self.ours, self.theirs, strict=True))

    @property
    def is_met(self) -> bool:
        """Whether the bar is."""
        return self.ratio >= BAR


@contextmanager
def serving(words: list[str], path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens at `path` inside the block."""
    process = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _SECONDS
        while not path.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"{' '.join(words)} does not listen")
            time.sleep(0.01)
        yield process
    finally:
        process.terminate()
        process.wait()


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """What a process has used so far, in the system too."""
    fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_of(path: Path, *words: str) -> float:
    """Seconds that `qemu-img bench` says its requests took."""
    said = subprocess.run(
        [peer("qemu-img"), "bench", "-f", "raw", "-t", "writeback", *words, f"nbd+unix:///?socket={path}"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = re.search(r"Run completed in ([0-9.]+) seconds", said)
    if found is None:
        raise SystemExit(f"qemu-img bench said: {said}")
    return float(found[1])


def measured(directory: Path, rounds: int, say: Callable[[str], None]) -> list[Row]:
    """All rows; the first round warms up."""
    images = [directory / name for name in ("ours.qcow2", "theirs.qcow2")]
    sockets = [directory / name for name in ("ours.sock", "theirs.sock")]
    say(f"making an image of {DISK_MIB} MiB")
    create = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", str(images[0]), f"{DISK_MIB}M"]
    subprocess.run([peer("qemu-img"), *create], check=True)
    fill = ["bench", "-f", "qcow2", "-w", "-d", "1", "-s", str(MIB), "-c", str(DISK_MIB), str(images[0])]
    subprocess.run([peer("qemu-img"), *fill], check=True, stdout=subprocess.DEVNULL)
    shutil.copy(*images)
    os.sync()
    serve = [
        sys.executable,
        "-m",
        "stillframe",
        "image",
        "serve",
        "--socket",
        str(sockets[0]),
        str(images[0]),
    ]
    nbd = [peer("qemu-nbd"), "-f", "qcow2", "--cache=writeback", "-t", "-k", str(sockets[1]), str(images[1])]
    rows = []
    with serving(serve, sockets[0]) as ours, serving(nbd, sockets[1]) as theirs:
        for size, count in REQUESTS.items():
            for is_write, what in ((False, "read"), (True, "write")):
                for depth in (1, 16):
                    name = "4 KiB" if size == 4096 else "1 MiB"
                    row = Row(f"{what}, {name}, {depth} at a time", "requests/s" if size == 4096 else "MiB/s")
                    words = [
                        "-s",
                        str(size),
                        "-c",
                        str(count),
                        "-d",
                        str(depth),
                        *(["-w"] if is_write else []),
                    ]
                    say(row.work)
                    for number in range(rounds + 1):
                        for index, (process, values) in enumerate(((ours, row.ours), (theirs, row.theirs))):
                            before = processor_seconds(process)
                            taken = seconds_of(sockets[index], *words)
                            if number:
                                values.append(count / taken)
                                row.processor_s[index] += processor_seconds(process) - before
                    rows.append(row)
    return rows


def show(rows: list[Row]) -> None:
    """The table."""
    table = Table(title="NBD: ours beside qemu-nbd, one qcow2 image")
    for title in ("work", "unit", "ours", "qemu-nbd", "ratio", "processor", "bar"):
        table.add_column(title, justify="left" if title in ("work", "unit", "bar") else "right")
    for row in rows:
        table.add_row(
            row.work,
            row.unit,
            f"{statistics.median(row.ours):,.0f}",
            f"{statistics.median(row.theirs):,.0f}",
            f"{row.ratio:.2f}",
            " : ".join(f"{each:.1f} s" for each in row.processor_s),
            f"≥ {BAR:.1f} {'met' if row.is_met else 'MISSED'}",
        )
    Console(width=max(Console().width, 110)).print(table)


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
        "--directory", type=Path, help="where the images are made (default: build/bench, on this disk)"
    )
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    directory = asked.directory or ROOT / "build" / "bench"
    directory.mkdir(parents=True, exist_ok=True)
    said = subprocess.run([peer("qemu-nbd"), "--version"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory(dir=directory) as scratch:
        rows = measured(Path(scratch), asked.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    report = {
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "qemu": said.stdout.splitlines()[0]},
        "rows": [asdict(row) | {"ratio": row.ratio, "bar": BAR, "met": row.is_met} for row in rows],
    }
    if asked.json == Path("-"):
        print(json.dumps(report, indent=2))
    else:
        show(rows)
        if asked.json:
            asked.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
