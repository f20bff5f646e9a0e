"""The command line as whole processes, beside qemu-img: what a script that calls it a thousand times pays.

    make bench
    .venv/bin/python bench/startup.py --rounds 20

Figures are medians over the rounds, in milliseconds; the commands take turns, so that what disturbs one disturbs all.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from peers import peer  # noqa: E402

_BAR_MS = 150.0
_STILLFRAME = str(Path(sys.executable).with_name("stillframe"))


def commands(image: str) -> dict[str, list[str]]:
    """What is timed, by what it is called in the table."""
    return {
        "stillframe image info": [_STILLFRAME, "image", "info", image],
        "qemu-img info": [peer("qemu-img"), "info", image],
        "stillframe image check": [_STILLFRAME, "image", "check", image],
        "qemu-img check": [peer("qemu-img"), "check", image],
        "stillframe --help": [_STILLFRAME, "--help"],
        "python -c pass": [sys.executable, "-c", "pass"],
    }


def collect(rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every command in every round."""
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        image = str(Path(directory) / "disk.qcow2")
        subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", image, "10G"], check=True)
        subprocess.run([peer("qemu-img"), "snapshot", "-c", "one", image], check=True)
        for _ in range(rounds):
            for name, words in commands(image).items():
                started = time.perf_counter()
                subprocess.run(words, stdout=subprocess.DEVNULL, check=True)
                found.setdefault(name, []).append((time.perf_counter() - started) * 1000)
    return found


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15, help="how often each command runs (default: 15)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures there, too")
    asked = parser.parse_args()
    found = collect(asked.rounds)
    medians = {name: statistics.median(values) for name, values in found.items()}
    print("whole processes, median milliseconds")
    for name, value in medians.items():
        bar = (
            f"   bar ≤ {_BAR_MS:.0f}: {'met' if value <= _BAR_MS else 'MISSED'}"
            if "image info" in name
            else ""
        )
        print(f"  {name:<24}{value:8.1f}{bar}")
    if asked.json:
        asked.json.write_text(json.dumps({"milliseconds": found, "medians": medians}, indent=2) + "\n")


if __name__ == "__main__":
    main()
