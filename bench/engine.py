"""The unicorn engine beside QEMU's TCG, with Debian's Linux, in one run: boot, hashing, fork and exec, and idling.

    make bench
    .venv/bin/python bench/engine.py --rounds 5 --json engine.json

Each round starts every runner anew, one after the other; figures are medians over the rounds, in seconds of the host's clock
(idle: share of one core). The last columns hold ours against QEMU's, and against the bar where there is one.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from guest.consoles import GuestProcess, argv  # noqa: E402
from peers import linux_guest, peer  # noqa: E402

_MEMORY_MIB = 256
_HASHED_MIB = 64
_FORKS = 300
_SETTLE_SECONDS, _IDLE_SECONDS = 2.0, 5.0
_APPEND = "console=ttyS0 quiet"


@dataclass(frozen=True, slots=True)
class Runner:
    """Something that runs a guest.

    :param kind: as `guest.consoles.argv` names it. :param more: further words of its command line.
    """

    name: str
    kind: str
    more: tuple[str, ...] = ()


OURS = Runner("unicorn", "unicorn")
OURS_COUNTED = Runner("unicorn --icount", "unicorn", ("--icount", "0"))
THEIRS = Runner("QEMU 7.2 TCG", "qemu host")
THEIRS_NEW = Runner("QEMU 10.0 TCG", "qemu 10.0")


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure. :param bars: by the runner's name, the largest ratio to QEMU's (for `idle`, the largest value)."""

    key: str
    title: str
    bars: dict[str, float]


MEASURES = (
    Measure("boot", "boot to shell, process start included [s]", {OURS.name: 1.2}),
    Measure("sha256", f"sha256 of {_HASHED_MIB} MB [s]", {OURS.name: 0.7, OURS_COUNTED.name: 1.3}),
    Measure("fork", f"{_FORKS} fork+exec [s]", {}),
    Measure("idle", "idle guest, share of a core", {OURS.name: 0.03}),
)


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def _shell(runner: Runner) -> Iterator[GuestProcess]:
    files = linux_guest()
    words = argv(
        runner.kind,
        files["kernel"],
        initrd=files["initrd"],
        memory=_MEMORY_MIB,
        append=_APPEND,
        more=runner.more,
    )
    with GuestProcess(words) as guest:
        guest.expect(r"^stillframe: shell ready")
        guest.expect(r"~ # ")
        yield guest


def _timed(guest: GuestProcess, command: str) -> float:
    started = time.perf_counter()
    # The quotes keep the echo of what is typed from looking like the answer.
    guest.send(f'{command}; echo D""ONE')
    guest.expect(r"^DONE\r?\n")
    return time.perf_counter() - started


def _idle(guest: GuestProcess) -> float:
    time.sleep(_SETTLE_SECONDS)
    before, started = _processor_seconds(guest.pid), time.perf_counter()
    time.sleep(_IDLE_SECONDS)
    return (_processor_seconds(guest.pid) - before) / (time.perf_counter() - started)


def measure(runner: Runner) -> dict[str, float]:
    """One round: a guest from its start to its figures."""
    started = time.perf_counter()
    with _shell(runner) as guest:
        figures = {"boot": time.perf_counter() - started}
        _timed(guest, f"dd if=/dev/urandom of=/tmp/data bs=1M count={_HASHED_MIB} 2>/dev/null")
        guest.send("stat -c size=%s /tmp/data")
        guest.expect(rf"^size={_HASHED_MIB << 20}\r?\n")
        figures["sha256"] = _timed(guest, "sha256sum /tmp/data")
        loop = f"i=0; while [ $i -lt {_FORKS} ]; do /bin/true; i=$((i+1)); done"
        figures["fork"] = _timed(guest, loop)
        figures["idle"] = _idle(guest)
    return figures


def collect(
    runners: list[Runner], rounds: int, progress: Callable[[str], None]
) -> dict[str, dict[str, list[float]]]:
    """All figures of all rounds, by runner and measure."""
    found: dict[str, dict[str, list[float]]] = {runner.name: {} for runner in runners}
    for number in range(rounds):
        for runner in runners:
            progress(f"round {number + 1} of {rounds}: {runner.name}")
            for key, value in measure(runner).items():
                found[runner.name].setdefault(key, []).append(value)
    return found


def summarise(found: dict[str, dict[str, list[float]]]) -> list[dict[str, object]]:
    """A row for each measure: medians by runner, ratios to the host's QEMU, and whether the bars are met."""
    rows: list[dict[str, object]] = []
    for measure_ in MEASURES:
        medians = {name: statistics.median(figures[measure_.key]) for name, figures in found.items()}
        reference = medians[THEIRS.name]
        ratios = {name: value / reference for name, value in medians.items() if reference}
        held = medians if measure_.key == "idle" else ratios
        bars = {name: bar for name, bar in measure_.bars.items() if name in held}
        rows.append(
            {
                "measure": measure_.key,
                "title": measure_.title,
                "medians": medians,
                "ratios": ratios,
                "bars": bars,
                "met": {name: held[name] <= bar for name, bar in bars.items()},
            }
        )
    return rows


def show(rows: list[dict[str, object]], runners: list[Runner]) -> None:
    """The table."""
    table = Table(title="engine: ours beside QEMU's TCG")
    table.add_column("measure")
    for runner in runners:
        table.add_column(runner.name, justify="right")
    table.add_column("ours / QEMU 7.2", justify="right")
    table.add_column("bar")
    for row in rows:
        medians, ratios, bars, met = (row[key] for key in ("medians", "ratios", "bars", "met"))
        assert isinstance(medians, dict)
        assert isinstance(ratios, dict)
        assert isinstance(bars, dict)
        assert isinstance(met, dict)
        share = row["measure"] == "idle"
        cells = [f"{medians[r.name]:.1%}" if share else f"{medians[r.name]:.2f}" for r in runners]
        ours = ", ".join(f"{ratios[r.name]:.2f}" for r in runners if r.kind == "unicorn" and r.name in ratios)
        verdicts = [
            f"{name}: ≤ {bar:.0%} {'met' if met[name] else 'MISSED'}"
            if share
            else f"{name}: ≤ {bar:.1f} × {'met' if met[name] else 'MISSED'}"
            for name, bar in bars.items()
        ]
        table.add_row(str(row["title"]), *cells, ours, "\n".join(verdicts))
    Console().print(table)


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="how often each runner is started (default: 3)")
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="write all figures there, too; - for the output"
    )
    parser.add_argument(
        "--without-icount", action="store_true", help="leave out our engine with counted time"
    )
    parser.add_argument("--with-qemu-10", action="store_true", help="QEMU 10.0 of scripts/debian-qemu, too")
    asked = parser.parse_args()
    if asked.rounds < 1:
        parser.error("--rounds takes a number from 1 on")
    runners = [OURS, OURS_COUNTED, THEIRS, THEIRS_NEW]
    if asked.without_icount:
        runners.remove(OURS_COUNTED)
    if not asked.with_qemu_10:
        runners.remove(THEIRS_NEW)
    said = subprocess.run(
        [peer("qemu-system-riscv64"), "--version"], capture_output=True, text=True, check=True
    )
    found = collect(runners, asked.rounds, lambda text: print(text, file=sys.stderr, flush=True))
    rows = summarise(found)
    report = {
        "host": {"machine": platform.machine(), "cores": os.cpu_count(), "qemu": said.stdout.splitlines()[0]},
        "rounds": found,
        "summary": rows,
    }
    if asked.json == Path("-"):
        print(json.dumps(report, indent=2))
    else:
        show(rows, runners)
        if asked.json:
            asked.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
