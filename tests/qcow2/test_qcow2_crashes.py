"""Whatever instant the machine or the process dies at: the image opens, nothing that was flushed is lost, every snapshot is
whole, and nothing is corrupt.

What a crash can leave is built in crash_states.py, what may be found is said in worlds.py, and how the one is held against the
other in crash_checks.py. `make crash` does the same with ten times as many states.
"""

from pathlib import Path

import pytest

from block.faults import Flush, Mark, Truncate, Write
from qcow2.crash_checks import Tally, examine, power_losses_of, record
from qcow2.crash_states import states
from qcow2.images import LONG
from qcow2.operations import CASES
from qcow2.scenes import Options
from qcow2.worlds import Content, Disk, Image, allowed

STATES = 5000
pytestmark = pytest.mark.timeout(3600 if LONG else 180)


@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda each: str(each).replace(" ", "-"))
def test_what_was_promised_is_there_whatever_instant_the_machine_dies_at(
    name: str, options: Options, tmp_path: Path
) -> None:
    tally = Tally(f"{name} {options}")
    wanted = power_losses_of(options, 10 * STATES if LONG else STATES)
    examine(tally, name, options, wanted, tmp_path, shown=10)
    assert tally.process_deaths > 3
    assert tally.power_losses > 2
    assert tally.shown or tally.process_deaths + tally.power_losses < 16
    assert tally.used


def test_they_are_five_thousand_different_states() -> None:
    found = 0
    for name, options in CASES:
        start, steps = record(name, options)
        found += len(
            {
                each.digest
                for each in states(start, steps, power_losses=power_losses_of(options, STATES), seed=1)
            }
        )
    assert found >= STATES


# The builder and the model themselves: a checker that allows everything would pass above.


def test_a_durable_write_stands_once_it_has_returned_and_nothing_before_it_must() -> None:
    steps = [Write(0, b"a" * 512), Write(512, b"b" * 512, is_durable=True), Write(0, b"c" * 512), Flush()]
    found = {each.files[0] for each in states((b"0" * 1024,), steps, power_losses=1000, seed=1)}
    o, a, b, c = (letter * 512 for letter in (b"0", b"a", b"b", b"c"))
    assert found == {o + o, a + o, o + b, a + b, c + b}


def test_of_what_is_not_flushed_any_part_may_stand_and_no_other() -> None:
    steps = [Write(0, b"a" * 512), Flush(), Write(0, b"b" * 1024), Mark("here"), Truncate(512), Flush()]
    found = {(each.files[0], each.model) for each in states((b"0" * 1024,), steps, power_losses=1000, seed=1)}
    files = {file for file, _ in found}
    o, a, b = b"0" * 512, b"a" * 512, b"b" * 512
    assert files == {o + o, a + o, a + b, b + o, b + b, a, b}
    assert {file for file, model in found if model == "process death"} == {a + o, b + b, b}


def test_a_flush_makes_its_own_file_durable_and_no_other() -> None:
    steps = [Write(0, b"a", file=0), Write(0, b"b", file=1), Flush(0), Write(0, b"c", file=1)]
    found = {each.files for each in states((b"0", b"0"), steps, power_losses=1000, seed=1)}
    assert found == {(x, y) for x in (b"0", b"a") for y in (b"0", b"b")} | {(b"a", b"c")}


def test_a_byte_that_was_flushed_may_not_be_older_and_a_sector_is_whole() -> None:
    old, new = b"o" * 512, b"n" * 512
    disk = Disk(old * 4, ((512, new * 2),))
    assert disk.may_read(old + new + old * 2)
    assert disk.may_read(old + old + new + old)
    assert not disk.may_read(old + old[:256] + new[256:] + old * 2)
    assert not disk.may_read(new + old * 3)
    assert not disk.may_read(old * 3)
    # Flushed: what was there before is not to come back.
    assert not Disk(disk.present).may_read(old * 4)


def test_images_of_different_worlds_are_no_world() -> None:
    def world(disk: bytes, *names: str) -> tuple[Image, ...]:
        return tuple(Image(Disk(disk), dict.fromkeys(names, (disk, b""))) for _ in range(2))

    before, after = world(b"o"), world(b"o", "snapshot")
    old, new = Content(b"o", {}), Content(b"o", {"snapshot": (b"o", b"")})
    assert allowed((before, after), [old, old])
    assert allowed((before, after), [new, new])
    assert not allowed((before, after), [old, new])
