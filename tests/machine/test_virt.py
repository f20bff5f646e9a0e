"""The board: where everything is, and the device tree that says so."""

import subprocess
from pathlib import Path

from machine.machines import RAM, MemoryNode, machine
from machine.rv64 import Program
from peers import peer
from stillframe.machine.build import DriveConfig
from stillframe.machine.devices.flash import BANK_SIZE


def program() -> Program:
    p = Program()
    p.label("loop")
    p.wfi()
    p.jump("loop")
    return p


def test_device_tree_is_one_that_dtc_accepts_and_shows_the_memory_map(tmp_path: Path) -> None:
    drives = (DriveConfig(MemoryNode("root", 1 << 20)),)
    flash = (MemoryNode("code", BANK_SIZE, read_only=True), MemoryNode("vars", BANK_SIZE))
    with machine(tmp_path, program(), drives=drives, flash=flash, append="quiet x=1") as (built, _, _):
        built.start(paused=True)
        cpu = built.engine.devices[0].save_state()
        entry, (hart, tree_at) = cpu["pc"], cpu["gpr"][10:12]  # type: ignore[index]
        assert (entry, hart) == (RAM, 0)
        head = built.memory.read(tree_at, 8)
        assert head is not None
        tree = built.memory.read(tree_at, int.from_bytes(head[4:], "big"))
    assert tree is not None
    done = subprocess.run(
        [peer("dtc"), "-q", "-I", "dtb", "-O", "dts"], input=tree, capture_output=True, check=True
    )
    assert not done.stderr
    text = done.stdout.decode()
    for place in (
        "plic@c000000",
        "serial@10000000",
        "rtc@101000",
        "vmgenid@102000",
        "flash@20000000",
        "flash@22000000",
        "memory@80000000",
        *(f"virtio_mmio@{0x10001000 + 0x1000 * n:x}" for n in range(8)),
    ):
        assert place in text
    assert 'bootargs = "quiet x=1"' in text
    assert "zicntr" not in text, "cycle and instret are the host's"


def test_sections_and_disks_are_named_for_good(tmp_path: Path) -> None:
    """A saved state is found by these names: they are not to change."""
    drives = (
        DriveConfig(MemoryNode("root", 1 << 20)),
        DriveConfig(MemoryNode("data", 1 << 20, read_only=True), "d1"),
    )
    flash = (MemoryNode("vars", BANK_SIZE),)
    with machine(tmp_path, program(), drives=drives, flash=flash) as (built, _, _):
        assert [device.section_name for device in built.devices] == [
            "timer",
            "cpu",
            "sbi",
            "plic",
            "serial",
            "virtio-blk/virtio-mmio-bus.0",
            "virtio-blk/d1",
            "virtio-rng",
            "rtc",
            "vmgenid",
            "flash0",
        ]
        assert [(b.name, b.base, b.size) for b in built.memory] == [
            ("riscv_virt_board.ram", RAM, 8 << 20),
            ("virt.flash0", 0x2000_0000, BANK_SIZE),
        ]
        assert [(d.device_id, d.node_name, d.firmware, d.writable) for d in built.disks] == [
            ("flash0", "vars", True, True),
            ("virtio-mmio-bus.0", "root", False, True),
            ("d1", "data", False, False),
        ]
