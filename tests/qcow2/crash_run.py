"""`make crash`: as test_qcow2_crashes.py, with as many states as are asked for, and a summary.

An image that is found wanting is left in the folder, with what was wrong in the output; the others go on.
"""

import argparse
import sys
import traceback
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path

from qcow2.crash_checks import Tally, examine, power_losses_of
from qcow2.operations import CASES
from qcow2.scenes import Options


def run(name: str, options: Options, wanted: int, folder: Path, seed: int) -> tuple[Tally, str | None]:
    """The states of one case, in a process of the pool: what was seen, and what was wrong."""
    tally = Tally(f"{name} {options}")
    place = folder / tally.name.replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    try:
        examine(tally, name, options, power_losses_of(options, wanted), place, shown=100, seed=seed)
    except Exception:
        return tally, traceback.format_exc()
    for each in place.iterdir():
        each.unlink()
    place.rmdir()
    return tally, None


def main() -> int:
    """0 where all is well."""
    parser = argparse.ArgumentParser(prog="make crash", description=__doc__.splitlines()[0])
    parser.add_argument("--states", type=int, default=50_000, help="how many, about")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seed", type=int, default=1, help="another number samples other states")
    parser.add_argument(
        "--folder",
        type=lambda text: Path(text).resolve(),
        required=True,
        help="where an image that is found wanting is left",
    )
    parser.add_argument("--only", default="", help="operations whose name contains this")
    options = parser.parse_args()
    cases = [(name, each) for name, each in CASES if options.only in f"{name} {each}"]
    total = Tally("all")
    wrong = 0
    print(
        f"{'operation, cluster size, refcount bits, version':52}{'deaths':>8}{'losses':>8}{'leaked':>8}{'QEMU':>6}{'used':>6}"
    )
    with ProcessPoolExecutor(options.jobs) as pool:
        started = [
            pool.submit(run, name, each, options.states, options.folder, options.seed) for name, each in cases
        ]
        for number, done in enumerate(as_completed(started), 1):
            tally, failure = done.result()
            print(
                line(tally) + f"  [{number}/{len(cases)}, {total.states + tally.states} states]", flush=True
            )
            if failure:
                wrong += 1
                print(failure, file=sys.stderr, flush=True)
            for field in fields(Tally):
                if field.name != "name":
                    setattr(total, field.name, getattr(total, field.name) + getattr(tally, field.name))
    print(line(total))
    print(
        f"{total.states} different states: {total.process_deaths} deaths of the process, {total.power_losses} power losses; "
        f"{total.leaked} had leaks, which were repaired; {total.shown} were shown to QEMU; {total.used} were used on. "
        + (f"{wrong} cases are WRONG: see above, and {options.folder}" if wrong else "All are whole.")
    )
    return bool(wrong)


def line(tally: Tally) -> str:
    """A row of the table."""
    counts = tally.process_deaths, tally.power_losses, tally.leaked
    return f"{tally.name:52}" + "".join(f"{each:8}" for each in counts) + f"{tally.shown:6}{tally.used:6}"


if __name__ == "__main__":
    sys.exit(main())
