"""Our monitor beside QEMU's, in one run: how many times a second one client can ask `query-status` and have its answer.

    make bench
    .venv/bin/python bench/monitor.py --rounds 9 --json monitor.json

Both run all the time, without a guest, each behind a unix socket; the client is the same and asks them in turn. Figures are
medians over the rounds; the bar is on the median of the rounds' ratios, since what else a host does changes between rounds
more than within one. Then the same with 200 more clients of ours that are connected and say nothing, and with one that
listens to nothing and asks for more than it takes.
"""

import argparse
import json
import os
import platform
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from peers import peer  # noqa: E402

BAR = 1.5
IDLE_CLIENTS = 200
_SECONDS = 30.0
_REQUEST = b'{"execute": "query-status"}\n'


class Asker:
    """A client that has negotiated."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(_SECONDS)
        self.socket.connect(str(path))
        self._line()
        self.socket.sendall(b'{"execute": "qmp_capabilities"}\n')
        self._line()

    def _line(self) -> bytes:
        data = b""
        while not data.endswith(b"\n"):
            piece = self.socket.recv(1 << 16)
            if not piece:
                raise ConnectionError("the monitor is gone")
            data += piece
        return data

    def rate(self, count: int) -> float:
        """Round trips a second over `count` of them."""
        started = time.perf_counter()
        for _ in range(count):
            self.socket.sendall(_REQUEST)
            if b'"running": true' not in self._line():
                raise RuntimeError("that is no answer")
        return count / (time.perf_counter() - started)


@contextmanager
def serving(words: list[str], path: Path) -> Iterator[None]:
    """A process that serves a monitor at `path`."""
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _SECONDS
        while not path.exists():
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError(f"{words[0]} serves nothing")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(_SECONDS)


def collect(rounds: int, count: int) -> dict[str, list[float]]:
    """Round trips a second, one figure a round, by who was asked."""
    found: dict[str, list[float]] = {"qemu": [], "stillframe": []}
    with tempfile.TemporaryDirectory() as directory, ExitStack() as stack:
        theirs, ours = Path(directory) / "qemu", Path(directory) / "stillframe"
        program = peer("qemu-system-x86_64")
        quiet = ["-machine", "none", "-nodefaults", "-display", "none"]
        stack.enter_context(serving([program, *quiet, "-qmp", f"unix:{theirs},server=on,wait=off"], theirs))
        words = [sys.executable, "-m", "stillframe", "run", "--machine", "none", "--console", "none"]
        stack.enter_context(serving([*words, "--qmp", f"unix:{ours}"], ours))
        askers = {"qemu": Asker(theirs), "stillframe": Asker(ours)}
        for asker in askers.values():
            asker.rate(count // 10)
        for _ in range(rounds):
            for name, asker in askers.items():
                found[name].append(asker.rate(count))
        idle = [Asker(ours) for _ in range(IDLE_CLIENTS)]
        found["stillframe, with 200 idle clients"] = [askers["stillframe"].rate(count) for _ in range(rounds)]
        deaf = Asker(ours)
        deaf.socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                deaf.socket.send(b'{"execute": "query-qmp-schema"}\n' * 100)
        found["stillframe, with a deaf client too"] = [
            askers["stillframe"].rate(count) for _ in range(rounds)
        ]
        for client in (*idle, deaf, *askers.values()):
            client.socket.close()
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often each is asked (default: 7)")
    parser.add_argument("--count", type=int, default=4000, help="round trips in a round (default: 4000)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there, too")
    asked = parser.parse_args()
    found = collect(asked.rounds, asked.count)
    medians = {name: statistics.median(values) for name, values in found.items()}
    pairs = zip(found["stillframe"], found["qemu"], strict=True)
    ratio = statistics.median(ours / theirs for ours, theirs in pairs)
    print("query-status, round trips a second on one connection, median")
    for name, value in medians.items():
        print(f"  {name:<36}{value:10.0f}")
    print(f"  stillframe to qemu {ratio:.2f}   bar ≥ {BAR}: {'met' if ratio >= BAR else 'MISSED'}")
    if asked.json:
        host = {"machine": platform.machine(), "cpus": os.cpu_count(), "python": platform.python_version()}
        record = {"host": host, "round_trips_a_second": found, "medians": medians, "ratio": ratio}
        asked.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
