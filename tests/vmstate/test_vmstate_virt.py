"""The state of the board `virt`, with every device it can have: read by a stranger, and by every later
release of ours.

`data/vmstate/virt-0.1.bin.xz` is what release 0.1 wrote. It is never made anew: a device whose fields change
gets a new version of its description, with defaults, and goes on loading it.
"""

import lzma
from pathlib import Path

from snapshots.hosts import Steps, do_load, do_save, new_image, opened
from stillframe.block.node import SnapshotRecord
from stillframe.block.null import NullNode
from stillframe.events import EventBus
from stillframe.machine.build import DriveConfig, MachineConfig, build_machine
from stillframe.machine.machine import Machine
from stillframe.machine.run_state import RunState
from vmstate.stream_analysis import Walk

ROOT = Path(__file__).resolve().parents[2]
GUEST = ROOT / "src" / "stillframe" / "data" / "guest.elf"
GOLDEN = ROOT / "tests" / "data" / "vmstate" / "virt-0.1.bin.xz"
FLASH = 32 << 20


def virt(memory_size: int) -> Machine:
    """Disk and flash are of zeroes, and forget what is written."""
    return build_machine(
        MachineConfig(
            name="test",
            memory_size=memory_size,
            kernel=GUEST,
            drives=(DriveConfig(NullNode("disk", size=1 << 20, read_zeroes=True)),),
            flash=(NullNode("vars", size=FLASH, read_zeroes=True),),
        ),
        EventBus(),
    )


def saved_state(machine: Machine, folder: Path) -> bytes:
    with opened(new_image(folder / "image.qcow2"), "node") as node:
        do_save(machine, [node], "s", Steps())
        found = node.snapshot_store.snapshots()[0]
        return node.snapshot_store.read_state(found, 0, found.state_size)


def test_the_state_of_a_running_guest_is_read_by_its_description_alone(tmp_path: Path) -> None:
    machine = virt(64 << 20)
    try:
        machine.start()
        while machine.clock.ns < 20_000_000:
            assert machine.run_state is RunState.RUNNING
        machine.stop()
        found = Walk(saved_state(machine, tmp_path))
        assert found.machine == "virt"
        assert found.memory == {block.name: block.view for block in machine.memory}
        for device in machine.devices:
            fields = found.sections.pop((device.section_name, device.instance_id))
            for name, value in device.save_state().items():
                assert fields.get(name, ()) == value, f"{device.section_name}: {name}"
        assert list(found.sections) == [("globalstate", 0)]
        assert found.sections["globalstate", 0]["runstate"].startswith(b"paused\0")
    finally:
        machine.close()


def test_every_release_loads_what_release_0_1_saved(tmp_path: Path) -> None:
    machine = virt(16 << 20)
    try:
        machine.start(paused=True)
        with opened(new_image(tmp_path / "image.qcow2"), "node") as node:
            pending = node.snapshot_store.freeze()
            pending.write_state(0, lzma.decompress(GOLDEN.read_bytes()))
            change = pending.prepare(SnapshotRecord("golden", 0, 0))
            change.commit()
            change.finish()
            machine.memory.blocks[-1].view[:4096] = b"\xff" * 4096
            do_load(machine, [node], "golden")
        loaded = Walk(lzma.decompress(GOLDEN.read_bytes()))
        assert {block.name: bytes(block.view) for block in machine.memory} == loaded.memory
        assert machine.clock.ns == loaded.sections["timer", 0]["cpu_clock_offset"]
        assert machine.run_state is RunState.PRELAUNCH
        machine.cont()
        before = machine.clock.ns
        while machine.clock.ns < before + 20_000_000:
            assert machine.run_state is RunState.RUNNING
    finally:
        machine.close()
