"""The short form of tests/storm.py, which says what is shown."""

import random
from pathlib import Path

from storm import storm


def test_snapshots_of_a_guest_that_never_rests_are_whole_and_go_in_any_order(tmp_path: Path) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    storm(tmp_path, random.Random(seed), 4.0, print)
