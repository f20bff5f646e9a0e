"""What fuzzing found stays mended; the targets take their seeds; docs/security.md tells the bounds as they are."""

import gzip
import importlib
import os
import random
import re
import tracemalloc
from pathlib import Path

import pytest

from fuzzing.mutations import damage
from fuzzing.run import MEMORY, scrambled
from fuzzing.seeds import CORPUS, finds, seeds
from fuzzing.targets import IMAGES, TARGETS

ROOT = Path(__file__).resolve().parents[2]
LONG = bool(os.environ.get("STILLFRAME_LONG"))
UNITS = {"": 1, "s": 1, "KiB": 1 << 10, "Mi": 1 << 20, "MiB": 1 << 20, "GiB": 1 << 30}

pytestmark = pytest.mark.timeout(1800 if LONG else 120)


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_damaged_at_random_do_no_harm(name: str) -> None:
    """The same every time; `make fuzz` looks elsewhere each time."""
    given = seeds(name)
    chance = random.Random(name)
    tracemalloc.start()
    try:
        for data in given:
            TARGETS[name](data)
        for _ in range(3000 if LONG else 40):
            data = chance.choice(given)
            TARGETS[name](damage(data, chance) if name in IMAGES else scrambled(data, chance))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


FOUND = [(name, path) for name in TARGETS for path in finds(name)]


@pytest.mark.parametrize(("name", "path"), FOUND, ids=[f"{name}-{path.stem}" for name, path in FOUND])
def test_what_was_found_once_does_no_harm(name: str, path: Path) -> None:
    tracemalloc.start()
    try:
        TARGETS[name](gzip.decompress(path.read_bytes()))
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()


def test_the_corpus_stays_small() -> None:
    sizes = [path.stat().st_size for path in CORPUS.rglob("*.gz")]
    assert sizes
    assert max(sizes) < 20_000
    assert sum(sizes) < 200_000


def test_the_bounds_are_as_documented() -> None:
    text = (ROOT / "docs" / "security.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| `([\w.]+)\.(\w+)` \| (\d+) ?(\w*) \|$", text, re.MULTILINE)
    assert len(rows) > 10
    for module, name, number, unit in rows:
        assert getattr(importlib.import_module(f"stillframe.{module}"), name) == int(number) * UNITS[unit], (
            name
        )
