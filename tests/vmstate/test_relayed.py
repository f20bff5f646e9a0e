"""The head and the tail of a stream that QEMU made: kept to the byte, or refused by name, whatever somebody put there."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.errors import StateMismatch, StreamCorrupt
from stillframe.vmstate import layout
from stillframe.vmstate.ram import EOS, MEM_SIZE, RamBlock
from stillframe.vmstate.relayed import RelayedHead, RelayedTail, read_head, read_tail, timer_ns
from stillframe.vmstate.transfer import StateSource

BLOCKS = (RamBlock("pc.ram", 1 << 26), RamBlock("/rom@etc/acpi/tables", 1 << 17))
PAGES = b"\x02\0\0\0\x03 and so on"


def subsection(name: str, content: bytes) -> bytes:
    return bytes((layout.SUBSECTION, len(name))) + name.encode() + struct.pack(">I", 1) + content


def capabilities(*names: str) -> bytes:
    listed = b"".join(bytes((len(name),)) + name.encode() for name in names)
    return subsection("configuration/capabilities", struct.pack(">I", len(names)) + listed)


def ram_start(blocks: tuple[RamBlock, ...] = BLOCKS, more: bytes = b"") -> bytes:
    listed = b"".join(
        bytes((len(block.name),)) + block.name.encode() + struct.pack(">Q", block.length) for block in blocks
    )
    total = struct.pack(">Q", sum(block.length for block in blocks) | MEM_SIZE)
    end = struct.pack(">Q", EOS) + layout.mark(layout.FOOTER, 3)
    return layout.section_head(layout.START, 3, "ram", 0, 4) + total + listed + more + end


def read(stream: bytes) -> tuple[RelayedHead, int]:
    source = StateSource(lambda offset, length: stream[offset : offset + length], len(stream))
    return read_head(source), source.offset


PAGE_BITS = subsection("configuration/target-page-bits", struct.pack(">I", 12))
HARMLESS = capabilities("events", "background-snapshot")
UUID = subsection("configuration/uuid", bytes(range(16)))


@pytest.mark.parametrize("more", [b"", PAGE_BITS, HARMLESS, PAGE_BITS + HARMLESS + UUID])
def test_head_is_kept_to_the_byte(more: bytes) -> None:
    head = layout.header("pc-q35-7.2") + more
    found, end = read(head + ram_start() + PAGES)
    assert found == RelayedHead(head, "pc-q35-7.2", ram_start(), 3, BLOCKS)
    assert end == found.size == len(head + ram_start())


@pytest.mark.parametrize(
    ("rest", "named"),
    [
        (capabilities("x-ignore-shared") + ram_start(), "x-ignore-shared"),
        (capabilities("events", "mapped-ram") + ram_start(), "mapped-ram"),
        (capabilities("multifd") + ram_start(), "multifd"),
        (subsection("configuration/target-page-bits", struct.pack(">I", 14)) + ram_start(), "16384"),
        (subsection("configuration/new", b"") + ram_start(), "configuration/new"),
        (layout.section_head(layout.START, 1, "spapr/htab", 0, 1), "spapr/htab"),
        (layout.section_head(layout.START, 3, "ram", 0, 5), "version 5"),
        (ram_start(more=struct.pack(">Q", 0x200)), "multifd"),
        (struct.pack(">BHH", layout.COMMAND, 3, 0), "command 3"),
    ],
)
def test_what_has_its_memory_in_another_form_is_refused_by_name(rest: bytes, named: str) -> None:
    with pytest.raises(StateMismatch, match=named):
        read(layout.header("virt") + rest)


@given(st.data())
def test_a_changed_head_is_refused_or_kept_to_the_byte(data: st.DataObject) -> None:
    stream = bytearray(layout.header("virt") + PAGE_BITS + HARMLESS + ram_start() + PAGES)
    for _ in range(data.draw(st.integers(1, 4))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    del stream[data.draw(st.integers(0, len(stream))) :]
    try:
        found, end = read(bytes(stream))
    except (StreamCorrupt, StateMismatch):
        return
    assert found.head + found.ram_start == stream[:end]
    assert all(block.length % 4096 == 0 for block in found.blocks)


def section(name: str, number: int, content: bytes, version: int = 2) -> bytes:
    head = layout.section_head(layout.FULL, number, name, 0, version)
    return head + content + layout.mark(layout.FOOTER, number)


TIMER = section("timer", 0, struct.pack(">q8xq", 5, 123_456_789_012))
contents = st.binary(max_size=200)
jsons = st.none() | st.text(st.characters(codec="ascii", min_codepoint=1)).map(
    lambda text: b"{" + text.encode()
)


@given(contents, jsons, st.booleans())
def test_tail_is_taken_apart_and_put_together_again(
    content: bytes, description: bytes | None, commanded: bool
) -> None:
    tail = RelayedTail(TIMER + section("nic", 7, content), description)
    switchover = struct.pack(">BHH", layout.COMMAND, layout.SWITCHOVER_START, 0)
    assert read_tail(switchover * commanded + tail.data) == tail


def test_a_device_that_holds_another_end_does_not_deceive() -> None:
    inner = RelayedTail(TIMER, b'{"devices": []}').data
    tail = RelayedTail(section("nic", 7, inner + inner), b'{"page_size": 4096}')
    assert read_tail(tail.data) == tail


@given(st.data())
def test_a_changed_tail_is_refused_or_ends_as_sections_do(data: st.DataObject) -> None:
    tail = bytearray(RelayedTail(TIMER + section("nic", 7, bytes(20)), b'{"a": 1}').data)
    for _ in range(data.draw(st.integers(0, 4))):
        tail[data.draw(st.integers(0, len(tail) - 1))] = data.draw(st.integers(0, 255))
    del tail[data.draw(st.integers(0, len(tail))) :]
    try:
        found = read_tail(bytes(tail))
    except StreamCorrupt:
        return
    assert found.devices in tail
    assert found.devices[0] == layout.FULL
    assert found.devices[-5] == layout.FOOTER
    timer_ns(found.devices)


def test_clock_is_that_of_the_section_timer() -> None:
    text = b"\x05timer" + struct.pack(">II", 0, 2) + bytes(24)
    assert timer_ns(section("nic", 7, text) + TIMER) == 123_456_789_012
    assert timer_ns(section("nic", 7, text)) is None
    counted = struct.pack(">q8xq", 5, 6) + subsection("timer/icount", bytes(16))
    assert timer_ns(section("timer", 0, counted)) is None
