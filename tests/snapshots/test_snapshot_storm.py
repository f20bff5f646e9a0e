"""The short form of tests/storm.py, which says what is shown."""

import random
from pathlib import Path

from storm import Instant, is_torn, storm


def test_snapshots_of_a_guest_that_never_rests_are_whole_and_go_in_any_order(tmp_path: Path) -> None:
    seed = random.getrandbits(32)
    print(f"seed {seed}")
    storm(tmp_path, random.Random(seed), 14.0, print)


def test_a_line_of_two_guests_is_told_from_a_beat_that_is_wrong() -> None:
    instant = Instant(earliest=863, latest=869, nonce="")
    assert is_torn(413864, 4139, instant)
    assert is_torn(41, 4139, instant)
    assert not is_torn(413871, 4139, instant)
    assert not is_torn(513864, 4139, instant)
