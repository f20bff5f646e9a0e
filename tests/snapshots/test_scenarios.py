"""The twelve scenarios with which QEMU tests these commands, against stillframe and against QEMU itself, by
one driver.

Names, texts and the order of the events are those of its test `internal-snapshots-qapi`. Where stillframe is
to differ the difference is named; docs/differences.md tells of it.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from peers import installed_versions, peer
from snapshots.hosts import qemu_img_check
from snapshots.servers import qemu_img
from stillframe.testing import Machine, matches
from stillframe.testing.plugin import OURS

WORKED = ("STOP", "RESUME", "waiting", "pending")
DELETED = ("waiting", "pending")

PROGRAMS = ["stillframe", *installed_versions()]
Start = Callable[..., Machine]


@pytest.fixture(params=PROGRAMS)
def qemu_program(request: pytest.FixtureRequest) -> str:
    """Ours, and each QEMU that there is."""
    return OURS if request.param == "stillframe" else peer("qemu-system-riscv64", request.param)


class Scenario:
    """A machine with the nodes diskN, of a file, and diskfmtN, of its format."""

    def __init__(self, start: Start, folder: Path, program: str, *words: str) -> None:
        self.is_ours = program == OURS
        self.folder = folder
        # A guest that does nothing, on either.
        bare = () if self.is_ours else ("-bios", "none")
        self.machine = start("-machine", "virt", "-m", "32", *bare, *words)

    def add(self, number: int, name: str, driver: str = "qcow2") -> None:
        path = str(self.folder / name)
        ask = self.machine.execute
        assert ask("blockdev-add", driver="file", node_name=f"disk{number}", filename=path) == {}
        assert ask("blockdev-add", driver=driver, node_name=f"diskfmt{number}", file=f"disk{number}") == {}

    def save(
        self, *states: str, vmstate: str = "diskfmt0", devices: Sequence[str] = ("diskfmt0",)
    ) -> str | None:
        nodes = {"vmstate": vmstate, "devices": list(devices)}
        return self.machine.job("snapshot-save", *states, tag="snap0", **nodes)

    def load(self, *states: str, devices: Sequence[str] = ("diskfmt0",)) -> str | None:
        nodes = {"vmstate": "diskfmt0", "devices": list(devices)}
        return self.machine.job("snapshot-load", *states, tag="snap0", **nodes)

    def delete(self, *states: str, devices: Sequence[str] = ("diskfmt0",)) -> str | None:
        return self.machine.job("snapshot-delete", *states, tag="snap0", devices=list(devices))

    def load_fails(self, devices: Sequence[str] = ("diskfmt0",)) -> str | None:
        """failed-load-keeps-running: QEMU stops the guest before it looks, and leaves it so."""
        error = self.load(*(() if self.is_ours else ("STOP",)), "aborting", devices=devices)
        status = "running" if self.is_ours else "restore-vm"
        assert matches(self.machine.execute("query-status"), {"status": status})
        return error


@pytest.fixture
def scenario(start_machine: Start, qemu_program: str, tmp_path: Path) -> Iterator[Scenario]:
    """Two qcow2 images and a raw one; only the first is attached."""
    for name in ("t", "alt1"):
        qemu_img("create", "-f", "qcow2", tmp_path / name, "128M")
    qemu_img("create", "-f", "raw", tmp_path / "alt2", "128M")
    found = Scenario(start_machine, tmp_path, qemu_program)
    found.add(0, "t")
    yield found
    found.machine.close()
    for name in ("t", "alt1"):
        qemu_img_check(tmp_path / name)


def test_one_image(scenario: Scenario) -> None:
    assert scenario.save(*WORKED) is None
    assert scenario.load(*WORKED) is None
    assert scenario.delete(*DELETED) is None


def test_no_image(scenario: Scenario) -> None:
    assert scenario.save("aborting", devices=()) == "At least one device is required for snapshot"


def test_an_image_that_is_not_there(scenario: Scenario) -> None:
    error = scenario.save("aborting", devices=("diskfmt1729",))
    assert error == "No block device node 'diskfmt1729'"


def test_a_state_node_that_is_not_listed(scenario: Scenario) -> None:
    scenario.add(1, "alt1")
    error = scenario.save("aborting", devices=("diskfmt1",))
    assert error == "vmstate block device 'diskfmt0' does not exist"


def test_a_protocol_node_instead_of_its_format(scenario: Scenario) -> None:
    error = scenario.save("aborting", vmstate="disk0", devices=("disk0",))
    assert error == "Device 'disk0' is writable but does not support snapshots"


BOTH = ("diskfmt0", "diskfmt1")


def test_two_images(scenario: Scenario) -> None:
    scenario.add(1, "alt1")
    assert scenario.save(*WORKED, devices=BOTH) is None
    assert scenario.load(*WORKED, devices=BOTH) is None
    assert scenario.delete(*DELETED, devices=BOTH) is None


def test_a_raw_image_in_the_list(scenario: Scenario) -> None:
    scenario.add(1, "alt1")
    scenario.add(2, "alt2", "raw")
    three = (*BOTH, "diskfmt2")
    error = "Device 'diskfmt2' is writable but does not support snapshots"
    assert scenario.save("aborting", devices=three) == error
    assert scenario.delete("aborting", devices=three) == error
    assert scenario.load_fails(devices=three) == error


def test_a_raw_image_left_out(scenario: Scenario) -> None:
    scenario.add(1, "alt1")
    scenario.add(2, "alt2", "raw")
    assert scenario.save(*WORKED, devices=BOTH) is None
    assert scenario.load(*WORKED, devices=BOTH) is None
    assert scenario.delete(*DELETED, devices=BOTH) is None


def test_a_name_that_is_taken(scenario: Scenario) -> None:
    assert scenario.save(*WORKED) is None
    assert scenario.save("aborting") == "Snapshot 'snap0' already exists in one or more devices"
    assert scenario.delete(*DELETED) is None
    assert scenario.save(*WORKED) is None
    assert scenario.delete(*DELETED) is None


def test_loading_what_is_not_there(scenario: Scenario) -> None:
    assert scenario.load_fails() == "Snapshot 'snap0' does not exist in one or more devices"


def test_deleting_what_is_not_there(scenario: Scenario) -> None:
    assert scenario.delete(*DELETED) is None


def test_a_state_with_a_device_that_is_gone(start_machine: Start, qemu_program: str, tmp_path: Path) -> None:
    """load-says-why: up to 10.1 the reason goes to QEMU's standard error alone."""
    image = tmp_path / "t"
    qemu_img("create", "-f", "qcow2", image, "128M")
    first = Scenario(start_machine, tmp_path, qemu_program, "-device", "virtio-rng-device")
    first.add(0, "t")
    assert first.save(*WORKED) is None
    assert first.machine.quit() == 0
    second = Scenario(start_machine, tmp_path, qemu_program)
    second.add(0, "t")
    error = str(second.load_fails())
    assert error.startswith("Error -22 while loading VM state")
    reason = error if second.is_ours else second.machine.stderr
    assert "Unknown savevm section or instance" in reason
    assert second.delete(*DELETED) is None
    assert second.machine.quit() == 0
    qemu_img_check(image)


def test_ours_and_a_real_one_say_the_same(tmp_path: Path) -> None:
    """A whole transcript, events apart from replies, times and sizes hidden."""
    told: list[Any] = []
    for number, program in enumerate((OURS, peer("qemu-system-riscv64"))):
        folder = tmp_path / str(number)
        folder.mkdir()
        qemu_img("create", "-f", "qcow2", folder / "t", "1M")
        with Machine(program.split(), "-machine", "none") as machine:
            machine.execute("blockdev-add", driver="file", node_name="disk0", filename=str(folder / "t"))
            machine.execute("blockdev-add", driver="qcow2", node_name="diskfmt0", file="disk0")
            machine.transcript.replies.clear()
            machine.job("snapshot-save", *WORKED, tag="a", vmstate="diskfmt0", devices=["diskfmt0"])
            machine.job("snapshot-delete", *DELETED, tag="a", devices=["diskfmt0"])
            told.append(machine.transcript)
    assert told[0].difference(told[1]) == ""
    told[1].events.pop()
    assert "concluded" in told[0].difference(told[1]) or "null" in told[0].difference(told[1])
