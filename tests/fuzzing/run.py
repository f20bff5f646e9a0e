"""atheris on one target: `python tests/fuzzing/run.py look --seconds 600` (`make fuzz` runs them all).

A find is a file crash-*, timeout-* or oom-* in the folder of finds; once mended, it goes gzip'd to tests/data/fuzz.
Without coverage's help (--blind) the same mutations run under plain Python, many times faster.
"""

import argparse
import faulthandler
import random
import resource
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

MEMORY = 256 << 20
"""Bytes that reading one input of at most `LONGEST` bytes may take beyond what the process has already."""

LONGEST = 1 << 20
SECONDS_FOR_ONE = 20


def bound_memory() -> None:
    """More than the bound is a MemoryError, which is no error of ours."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (bound, bound))


def blind(name: str, seconds: float, folder: Path, seed: int) -> None:
    """Seeded mutations for a while; the first find is kept and raised."""
    from fuzzing.mutations import damage
    from fuzzing.seeds import seeds
    from fuzzing.targets import IMAGES, TARGETS

    target, given = TARGETS[name], seeds(name)
    for data in given:
        target(data)
    bound_memory()
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        chance = random.Random(f"{seed} {count}")
        data = chance.choice(given)
        data = damage(data, chance) if name in IMAGES else scrambled(data, chance)
        count += 1
        find = folder / f"{name}-{seed}-{count}"
        find.write_bytes(data)
        faulthandler.dump_traceback_later(SECONDS_FOR_ONE, exit=True)
        target(data)
        faulthandler.cancel_dump_traceback_later()
        find.unlink()
    print(f"{name}: {count} inputs in {seconds:.0f} s, seed {seed}")


def scrambled(data: bytes, chance: random.Random) -> bytes:
    """Bytes changed, taken out, doubled."""
    found = bytearray(data)
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(found) + 1)
        kind = chance.randrange(3)
        if kind == 0:
            found[at : at + 1] = chance.choice(
                (b"\0", b"\xff", b"\\", b'"', b"[", b"{", b"9", bytes([chance.randrange(256)]))
            )
        elif kind == 1:
            del found[at : at + chance.choice((1, 4, 9, 100))]
        else:
            found[at:at] = found[max(0, at - chance.choice((1, 8, 50))) : at] * chance.choice((1, 3, 500))
    return bytes(found[:LONGEST])


def guided(name: str, seconds: float, folder: Path) -> None:
    """atheris, with our mutations before its own."""
    import atheris

    with atheris.instrument_imports(include=["stillframe"]):
        import stillframe.block.opening
        import stillframe.block.qcow2.changes
        import stillframe.block.qcow2.check
        import stillframe.block.qcow2.compression
        import stillframe.block.qcow2.refcounts
        import stillframe.block.qcow2.repair
        import stillframe.block.qcow2.resize
        import stillframe.block.qcow2.shadow
        import stillframe.block.qcow2.writing
        import stillframe.monitor.wire
        import stillframe.vmstate.stream  # noqa: F401
    from fuzzing.mutations import damage
    from fuzzing.seeds import seeds
    from fuzzing.targets import IMAGES, TARGETS

    corpus = folder / f"{name}.corpus"
    corpus.mkdir(exist_ok=True)
    target = TARGETS[name]
    for number, data in enumerate(seeds(name)):
        (corpus / f"seed-{number}").write_bytes(data)
        target(data)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        chance = random.Random(seed)
        if name not in IMAGES or chance.randrange(8) == 0:
            return bytes(atheris.Mutate(data, max_size))
        return damage(bytes(data), chance)[:max_size]

    options = [
        f"-max_total_time={seconds:.0f}",
        f"-timeout={SECONDS_FOR_ONE}",
        f"-max_len={LONGEST}",
        f"-artifact_prefix={folder}/{name}-",
        # atheris keeps its corpus in memory, some 20 KiB an input: the bound for one input is `blind`'s.
        "-rss_limit_mb=8192",
        "-print_final_stats=1",
    ]
    atheris.Setup([sys.argv[0], *options, str(corpus)], target, custom_mutator=mutate)
    atheris.Fuzz()


def main() -> None:
    """One target."""
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("target")
    words.add_argument("--seconds", type=float, default=600)
    words.add_argument("--folder", type=Path, default=Path("build/fuzz"))
    words.add_argument("--blind", action="store_true")
    words.add_argument("--seed", type=int, default=int(time.time()))
    asked = words.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    if asked.blind:
        blind(asked.target, asked.seconds, asked.folder, asked.seed)
    else:
        guided(asked.target, asked.seconds, asked.folder)


if __name__ == "__main__":
    main()
