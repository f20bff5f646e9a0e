"""Whole streams: what was written comes back, what QEMU wrote is read, and damage is named, never
believed."""

import random
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stillframe.errors import StateMismatch, StillframeError, StreamCorrupt
from stillframe.machine.clock import VirtualClock
from stillframe.vmstate.layout import mark
from stillframe.vmstate.ram import PAGE_RECORD, ZERO_RECORD, PageMap
from stillframe.vmstate.sections import GLOBAL_STATE, GLOBAL_STATE_KEY, SectionState, saved_run_state
from stillframe.vmstate.stream import RAM_SECTION_ID as RAM
from stillframe.vmstate.stream import MemoryContent, survey, write_stream
from stillframe.vmstate.transfer import CHUNK, StateSource, state_sink
from vmstate.stream_analysis import Walk
from vmstate.streams import Memory, global_state, mixed_memory, surveyed, written

DATA = Path(__file__).resolve().parent.parent / "data" / "vmstate"
QEMU_STREAM = (DATA / "none-10.0.bin").read_bytes()
TIMER = SectionState(
    "timer",
    0,
    VirtualClock.description,
    {"cpu_ticks_offset": -5, "unused": bytes(8), "cpu_clock_offset": 1 << 40},
)


def sample(memory: bytes = b"", machine: str = "none") -> bytes:
    return written(machine, {"ram0": memory} if memory else {}, [TIMER, global_state("running")])


def test_a_stream_of_qemu_10_is_read() -> None:
    found = surveyed(QEMU_STREAM, sections=[TIMER])
    assert (found.machine, found.blocks, found.size) == ("none", (), len(QEMU_STREAM))
    assert list(found.sections) == [("timer", 0), GLOBAL_STATE_KEY]
    assert saved_run_state(found.sections[GLOBAL_STATE_KEY]) == "prelaunch"


def test_our_stream_of_the_same_machine_differs_from_qemus_only_where_it_must() -> None:
    """Section ids and one type's name in the description are free; COMMAND 11 is what QEMU 7.2 refuses."""
    zero = SectionState("timer", 0, TIMER.description, dict.fromkeys(TIMER.values, 0) | {"unused": bytes(8)})
    ours, theirs = Walk(written("none", {}, [zero, global_state("prelaunch")])), Walk(QEMU_STREAM)
    assert ours.sections == theirs.sections
    assert (ours.machine, ours.memory) == (theirs.machine, theirs.memory)
    assert (ours.commands, theirs.commands) == ([], [11])
    for section in theirs.json["devices"]:
        for field in section["fields"]:
            field["type"] = field["type"].removeprefix("unused_")
    assert ours.json == theirs.json


@settings(max_examples=40)
@given(
    st.lists(
        st.lists(st.sampled_from([b"\0", b"\1", b"ab", b"\0\0\0\x80"]), min_size=1, max_size=40),
        min_size=0,
        max_size=3,
    )
)
@example([[b"\0"] * 600])
@example([[b"\1"] * 600, [b"\0"], [b"\1"]])
def test_memory_comes_back_byte_for_byte(blocks: list[list[bytes]]) -> None:
    memory = {
        f"block{number}": b"".join((page * 4096)[:4096] for page in pages)
        for number, pages in enumerate(blocks)
    }
    found = Memory()
    stream = written("none", memory, [TIMER])
    survey = surveyed(stream, sections=[TIMER], pages=found)
    assert found.content == memory
    assert [(block.name, block.length) for block in survey.blocks or ()] == [
        (name, len(content)) for name, content in memory.items()
    ]
    assert Walk(stream).memory == memory


def test_zero_pages_cost_no_data() -> None:
    stream = sample(bytes(64 << 20))
    assert len(stream) < (64 << 20) // 4096 * ZERO_RECORD + 4096


def test_a_large_memory_is_read_alike_by_a_reader_that_goes_record_by_record() -> None:
    memory = mixed_memory(3000)
    found = Memory()
    stream = sample(memory)
    surveyed(stream, sections=[TIMER], pages=found)
    assert found.content == {"ram0": memory} == Walk(stream).memory


def test_the_later_record_of_a_page_wins() -> None:
    """What makes an incremental state possible: stale records stay where they are, fresh ones follow."""
    old, new = mixed_memory(700, seed=1), mixed_memory(700, seed=2)
    first, second = sample(old), sample(new)
    part, end = mark(2, RAM), mark(3, RAM)
    joined = first[: first.index(end)]
    joined += second[second.index(part) : second.index(end)] + first[first.index(end) :]
    found, where = Memory(), PageMap()
    surveyed(joined, sections=[TIMER], pages=found)
    surveyed(joined, sections=[TIMER], pages=where)
    assert found.content["ram0"] == new == Walk(joined).memory["ram0"]
    addresses, offsets = where.latest("ram0")
    assert addresses.tolist() == list(range(0, len(new), 4096))
    for address, offset in zip(addresses.tolist(), offsets.tolist(), strict=True):
        page = bytes(4096) if offset == PageMap.ZERO else joined[offset : offset + 4096]
        assert page == new[address : address + 4096]


def test_transfers_are_large_and_aligned_and_in_order() -> None:
    seen: list[tuple[int, int]] = []
    memory = np.random.default_rng(3).bytes(9 << 20)
    with state_sink(lambda offset, data: seen.append((offset, len(data)))) as sink:
        write_stream(sink, "none", [MemoryContent.of("ram0", memoryview(memory))], [TIMER])
    assert all(offset % CHUNK == 0 for offset, _ in seen)
    assert all(length == CHUNK for _, length in seen[:-1])
    assert [offset for offset, _ in seen] == [number * CHUNK for number in range(len(seen))]
    assert seen[-1][0] + seen[-1][1] > (9 << 20) // 4096 * PAGE_RECORD


def test_writing_ends_at_once_when_it_is_told_to() -> None:
    seen: list[int] = []

    def wrote(length: int) -> None:
        seen.append(length)
        if sum(seen) >= 3 << 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), state_sink(lambda offset, data: None) as sink:
        write_stream(sink, "none", [MemoryContent.of("ram0", memoryview(bytes(32 << 20)))], [], wrote)
    assert seen == [1 << 20] * 3


def test_another_board_is_refused_by_name() -> None:
    with pytest.raises(StateMismatch, match="Machine type received is 'virt' and local is 'none'") as refused:
        surveyed(sample(machine="virt"))
    assert refused.value.remedy


def test_a_section_that_this_machine_lacks_is_refused_in_qemus_words() -> None:
    with pytest.raises(
        StateMismatch, match=r"Unknown savevm section or instance 'timer' 0\. Make sure"
    ) as refused:
        surveyed(sample())
    assert refused.value.section == "timer"


def replaced(data: bytes, old: bytes, new: bytes) -> bytes:
    assert data.count(old) == 1
    return data.replace(old, new)


STREAM = sample(mixed_memory(64))
ZEROES = sample(bytes(8 * 4096))
TIMER_HEAD = mark(4, RAM + 1) + b"\5timer"
BETWEEN = mark(0x7E, RAM + 1) + mark(4, RAM + 2)
"""The footer of `timer` and the beginning of `globalstate`."""
DAMAGE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "Not a migration stream"),
    "no stream": (b"QFI\xfb" + bytes(400), "Not a migration stream"),
    "version 2": (replaced(STREAM, b"QEVM\0\0\0\3", b"QEVM\0\0\0\2"), "SaveVM v2 format is obsolete"),
    "version 4": (replaced(STREAM, b"QEVM\0\0\0\3", b"QEVM\0\0\0\4"), "Unsupported migration stream version"),
    "no configuration": (STREAM[:8] + STREAM[17:], "Configuration section missing"),
    "another footer": (
        replaced(STREAM, BETWEEN, mark(0x7E, 7) + BETWEEN[5:]),
        f"Mismatched section id in footer for timer - read 0x7 expected {RAM + 1:#x}",
    ),
    "no footer": (
        replaced(STREAM, BETWEEN, BETWEEN[5:]),
        "Missing section footer for timer",
    ),
    "unknown type": (replaced(STREAM, TIMER_HEAD, b"\x55" + TIMER_HEAD[1:]), "section type 85"),
    "section twice": (
        replaced(
            STREAM,
            STREAM[STREAM.index(TIMER_HEAD) : STREAM.index(BETWEEN) + 5],
            STREAM[STREAM.index(TIMER_HEAD) : STREAM.index(BETWEEN) + 5] * 2,
        ),
        "A second section 'timer' 0",
    ),
    "page beyond the end": (
        replaced(STREAM, struct.pack(">Q", 40 << 12 | 0x28), struct.pack(">Q", 64 << 12 | 0x28)),
        "Page 0x40000 is beyond the end of memory block 'ram0'",
    ),
    "length of no pages": (
        replaced(STREAM, b"\4ram0" + struct.pack(">Q", 64 << 12), b"\4ram0" + struct.pack(">Q", 5)),
        "Memory block 'ram0' has 5 bytes",
    ),
    "zero page with a value": (
        replaced(ZEROES, struct.pack(">Q", 0x02) + b"\4ram0\0", struct.pack(">Q", 0x02) + b"\4ram0\7"),
        "Found a zero page with value 7",
    ),
    "zero page with a value in a run": (
        replaced(
            ZEROES, struct.pack(">Q", 5 << 12 | 0x22) + b"\0", struct.pack(">Q", 5 << 12 | 0x22) + b"\7"
        ),
        "Found a zero page with value 7",
    ),
    "no end of the memory": (
        replaced(STREAM, mark(3, RAM) + struct.pack(">Q", 0x10) + mark(0x7E, RAM), b""),
        "The memory's section has no end",
    ),
    "another command": (QEMU_STREAM.replace(b"\x08\0\x0b\0\0", b"\x08\0\x0c\0\0"), "MIG_CMD 0xc unknown"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_in_qemus_words(name: str) -> None:
    data, words = DAMAGE[name]
    with pytest.raises(StreamCorrupt) as found:
        surveyed(data, sections=[TIMER])
    assert words in str(found.value)
    assert "byte " in str(found.value)


def test_every_truncation_is_noticed() -> None:
    stream = sample(mixed_memory(3))
    ends = stream.index(b"\0\x06\0\0")
    for length in range(ends):
        with pytest.raises(StreamCorrupt):
            surveyed(stream[:length], sections=[TIMER])


def test_bytes_behind_the_stream_are_nobodys() -> None:
    """A save of stock QEMU over a longer state leaves the older bytes behind its own end."""
    assert surveyed(STREAM + b"\x06\xff" * 1000, sections=[TIMER]).size == len(STREAM)


@pytest.mark.parametrize("original", [STREAM, QEMU_STREAM], ids=["ours", "qemu"])
def test_a_damaged_stream_ends_in_an_error_of_ours_or_in_a_reading(original: bytes) -> None:
    """Never a crash, a hang, or memory beyond what the stream's own size accounts for."""
    chance = random.Random(original[-1])
    edges = [0, len(original) - 1, *range(min(len(original), 400))]
    for _ in range(1500):
        data = bytearray(original)
        for _ in range(chance.choice((1, 1, 2, 8))):
            at = chance.choice(edges) if chance.random() < 0.7 else chance.randrange(len(data))
            at %= len(data)
            what = chance.randrange(4)
            if what == 0:
                data[at] = chance.choice((0, 1, 2, 4, 8, 0x10, 0x20, 0x7E, 0x7F, 0x80, 0xFF))
            elif what == 1:
                data[at] ^= 1 << chance.randrange(8)
            elif what == 2:
                del data[at : at + chance.choice((1, 4, 8, 9, 4096))]
            else:
                data[at:at] = chance.randbytes(chance.choice((1, 4, 9)))
            if not data:
                break
        reads = 0

        def read(offset: int, length: int, data: bytes = bytes(data)) -> bytes:
            nonlocal reads
            reads += length
            assert length <= 64 << 20
            return data[offset : offset + length]

        known = {("timer", 0): TIMER.description, GLOBAL_STATE_KEY: GLOBAL_STATE}
        try:
            survey(StateSource(read, len(data)), "none", known, PageMap())
        except StillframeError:
            pass
        assert reads <= 3 * len(data) + CHUNK


def test_many_small_records_are_read_and_can_be_given_up() -> None:
    """Alternating zero and data records have no runs; a reader that is told to stop does."""
    head = sample(mixed_memory(2))
    begin = head.index(mark(2, RAM)) + 5
    records = b"".join(
        struct.pack(">Q", 0 | (0x02 if first else 0x22)) + (b"\4ram0" if first else b"") + b"\0"
        for first in [True] + [False] * 500_000
    )
    stream = head[:begin] + records + head[begin:]
    surveyed(stream, sections=[TIMER])

    def give_up(offset: int) -> None:
        if offset > 2 << 20:
            raise KeyboardInterrupt

    source = StateSource(
        lambda offset, length: stream[offset : offset + length], len(stream), on_read=give_up
    )
    with pytest.raises(KeyboardInterrupt):
        survey(source, "none", {}, PageMap())
