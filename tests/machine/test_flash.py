"""Flash: what firmware programs is on the node, and a load brings both back."""

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from machine.machines import MemoryNode, load, machine, saved
from machine.rv64 import Program
from stillframe.errors import InvalidRequest, StateMismatch
from stillframe.machine.devices.flash import BANK_SIZE, BLOCK_SIZE, Flash
from stillframe.machine.memory import MemoryBlock

BOTH = 0x0001_0001
READY = 0x80


def bank(node: MemoryNode | None = None) -> tuple[Flash, MemoryNode]:
    backing = node or MemoryNode("vars", BANK_SIZE)
    block = MemoryBlock.allocate("virt.flash0", 0x2000_0000, BANK_SIZE, is_ram=False)
    return Flash(0, block, backing), backing


def command(flash: Flash, value: int, offset: int = 0) -> None:
    flash.write(offset, 4, value * BOTH)


def status(flash: Flash) -> int:
    command(flash, 0x70)
    value = flash.read(0, 4)
    assert value & 0xFFFF == value >> 16, "both chips"
    command(flash, 0xFF)
    return value & 0xFF


def test_query_tells_what_drivers_look_for() -> None:
    flash, _ = bank()
    command(flash, 0x98, 0x55 * 4)
    assert [flash.read(4 * (0x10 + n), 4) for n in range(3)] == [ord(c) * BOTH for c in "QRY"]
    assert flash.read(4 * 0x13, 4) & 0xFF == 1, "Intel command set"
    assert 1 << (flash.read(4 * 0x27, 4) & 0xFF) == BANK_SIZE // 2
    blocks = (flash.read(4 * 0x2D, 4) & 0xFF | (flash.read(4 * 0x2E, 4) & 0xFF) << 8) + 1
    size = (flash.read(4 * 0x2F, 4) & 0xFF | (flash.read(4 * 0x30, 4) & 0xFF) << 8) << 8
    assert (blocks, 2 * size) == (BANK_SIZE // BLOCK_SIZE, BLOCK_SIZE)
    assert flash.read(4 * 0x10 + 2, 2) == ord("Q"), "a narrow read sees its chip"
    command(flash, 0xFF)
    assert flash.read(4 * 0x10, 4) == 0


def test_array_begins_as_the_node() -> None:
    node = MemoryNode("vars", BANK_SIZE)
    node.content[100_000:100_004] = b"abcd"
    flash, _ = bank(node)
    assert flash.read(100_000, 4) == int.from_bytes(b"abcd", "little")


def test_program_erase_and_buffer_reach_the_node() -> None:
    flash, node = bank()
    command(flash, 0x20, BLOCK_SIZE)
    command(flash, 0xD0, BLOCK_SIZE)
    assert status(flash) == READY
    assert node.content[BLOCK_SIZE : 2 * BLOCK_SIZE] == b"\xff" * BLOCK_SIZE
    command(flash, 0x40)
    flash.write(BLOCK_SIZE + 8, 4, 0x1234_5678)
    assert status(flash) == READY
    assert flash.read(BLOCK_SIZE + 8, 4) == 0x1234_5678
    command(flash, 0xE8, BLOCK_SIZE)
    command(flash, 3, BLOCK_SIZE)
    for n in range(4):
        flash.write(BLOCK_SIZE + 16 + 4 * n, 4, 0x1010_1010 * (n + 1))
    assert node.content[BLOCK_SIZE + 16] == 0xFF, "a buffer is not there before its confirmation"
    command(flash, 0xD0, BLOCK_SIZE)
    assert status(flash) == READY
    expected = b"".join((0x1010_1010 * (n + 1)).to_bytes(4, "little") for n in range(4))
    assert node.content[BLOCK_SIZE + 16 : BLOCK_SIZE + 32] == expected
    assert bytes(flash.block.view) == node.content


def begins(flash: Flash) -> None:
    command(flash, 0x20)
    command(flash, 0xD0)


def programs(flash: Flash) -> None:
    command(flash, 0x10)
    flash.write(4, 4, 1)


@pytest.mark.parametrize("action", [begins, programs])
@pytest.mark.parametrize("why", ["read-only", "I/O error"])
def test_failed_write_is_told_in_the_status_and_changes_nothing(
    action: Callable[[Flash], None], why: str
) -> None:
    node = MemoryNode("vars", BANK_SIZE, read_only=why == "read-only")
    if why == "I/O error":
        node.fail["write"] = errno.EIO
    flash, _ = bank(node)
    action(flash)
    assert status(flash) & ~READY
    assert flash.read(0, 4) == flash.read(4, 4) == 0
    command(flash, 0x50)
    assert status(flash) == READY


def test_buffer_of_too_many_words_is_an_error() -> None:
    flash, node = bank()
    command(flash, 0xE8)
    flash.write(0, 4, 0xFFFF_FFFF)
    assert status(flash) & 0x10
    assert not any(entry[0] == "write" for entry in node.log)


def test_node_of_another_size_is_refused_with_the_way_out() -> None:
    with pytest.raises(InvalidRequest, match="exactly 33554432") as caught:
        bank(MemoryNode("vars", 1 << 20))
    assert "truncate -s 32M" in (caught.value.remedy or "")


def test_state_in_the_middle_of_a_command_goes_on() -> None:
    flash, _ = bank()
    command(flash, 0xE8)
    command(flash, 1)
    flash.write(0, 4, 0xAAAA_AAAA)
    state = flash.save_state()
    fresh, node = bank()
    fresh.check_state(state)
    fresh.load_state(state)
    assert fresh.save_state() == state
    fresh.write(4, 4, 0xBBBB_BBBB)
    command(fresh, 0xD0)
    assert node.content[:8] == b"\xaa" * 4 + b"\xbb" * 4
    for field, value in (("cycle", 4), ("buffer_block", 12), ("buffer_block", 0xFFFF_FFFF)):
        with pytest.raises(StateMismatch) as caught:
            fresh.check_state({**state, field: value})
        assert (caught.value.section, caught.value.field) == ("flash0", field)


def test_load_writes_the_saved_content_back_to_the_node(tmp_path: Path) -> None:
    p = Program()
    p.label("loop")
    p.wfi()
    p.jump("loop")
    node = MemoryNode("vars", BANK_SIZE)
    node.content[5:9] = b"then"
    with machine(tmp_path, p, flash=(node,)) as (built, _, _):
        built.start()
        assert [(d.device_id, d.firmware, d.writable) for d in built.disks] == [("flash0", True, True)]
        (flash,) = [device for device in built.devices if isinstance(device, Flash)]
        state = saved(built)

        def wreck() -> None:
            command(flash, 0x20)
            command(flash, 0xD0)

        built.at_boundary(wreck)
        assert node.content[5:9] == b"\xff" * 4
        undo = saved(built)
        load(built, state)
        assert node.content[5:9] == b"then"
        assert node.log[-1][0] == "flush"
        load(built, undo)
        assert node.content[5:9] == b"\xff" * 4, "and back again"
