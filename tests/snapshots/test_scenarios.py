"""The twelve scenarios with which QEMU tests these commands, against stillframe and against QEMU itself, by
one driver.

Names, texts and the order of the events are those of its test `internal-snapshots-qapi`. Where stillframe is
to differ the difference is named; docs/differences.md tells of it.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from snapshots.hosts import Register, qemu_img_check
from snapshots.servers import SERVERS, Outcome, Server, qemu_img, server
from stillframe.machine.machine import Board, Machine

WORKED = ("created", "running", "STOP", "RESUME", "waiting", "pending", "concluded")
DELETED = ("created", "running", "waiting", "pending", "concluded")
REFUSED = ("created", "running", "aborting", "concluded")
STOPPED = ("created", "running", "STOP", "aborting", "concluded")


@pytest.fixture(params=SERVERS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Two qcow2 images and a raw one; the raw one is attached by those who need it."""
    for name in ("t", "alt1"):
        qemu_img("create", "-f", "qcow2", tmp_path / name, "128M")
    qemu_img("create", "-f", "raw", tmp_path / "alt2", "128M")
    with server(request.param, tmp_path) as found:
        found.add(0, tmp_path / "t")
        yield found
    for name in ("t", "alt1"):
        qemu_img_check(tmp_path / name)


def worked(outcome: Outcome) -> None:
    assert outcome == Outcome(WORKED, None)


def deleted(outcome: Outcome) -> None:
    assert outcome == Outcome(DELETED, None)


def refused(outcome: Outcome, error: str) -> None:
    assert outcome == Outcome(REFUSED, error)


def load_refused(server: Server, outcome: Outcome, error: str) -> None:
    """failed-load-keeps-running: QEMU stops the guest before it looks, and leaves it so."""
    assert outcome == Outcome(REFUSED if server.is_ours else STOPPED, error)
    assert server.status() == ("running" if server.is_ours else "restore-vm")
    if not server.is_ours:
        server.ask("cont")


def test_one_image(machine: Server) -> None:
    worked(machine.save())
    worked(machine.load())
    deleted(machine.delete())


def test_no_image(machine: Server) -> None:
    refused(machine.save(devices=()), "At least one device is required for snapshot")


def test_an_image_that_is_not_there(machine: Server) -> None:
    refused(machine.save(devices=("diskfmt1729",)), "No block device node 'diskfmt1729'")


def test_a_state_node_that_is_not_listed(machine: Server, tmp_path: Path) -> None:
    machine.add(1, tmp_path / "alt1")
    refused(machine.save(devices=("diskfmt1",)), "vmstate block device 'diskfmt0' does not exist")


def test_a_protocol_node_instead_of_its_format(machine: Server) -> None:
    refused(
        machine.save(vmstate="disk0", devices=("disk0",)),
        "Device 'disk0' is writable but does not support snapshots",
    )


def test_two_images(machine: Server, tmp_path: Path) -> None:
    machine.add(1, tmp_path / "alt1")
    both = ("diskfmt0", "diskfmt1")
    worked(machine.save(devices=both))
    worked(machine.load(devices=both))
    deleted(machine.delete(devices=both))


def test_a_raw_image_in_the_list(machine: Server, tmp_path: Path) -> None:
    machine.add(1, tmp_path / "alt1")
    machine.add(2, tmp_path / "alt2", "raw")
    three = ("diskfmt0", "diskfmt1", "diskfmt2")
    error = "Device 'diskfmt2' is writable but does not support snapshots"
    refused(machine.save(devices=three), error)
    refused(machine.delete(devices=three), error)
    load_refused(machine, machine.load(devices=three), error)


def test_a_raw_image_left_out(machine: Server, tmp_path: Path) -> None:
    machine.add(1, tmp_path / "alt1")
    machine.add(2, tmp_path / "alt2", "raw")
    both = ("diskfmt0", "diskfmt1")
    worked(machine.save(devices=both))
    worked(machine.load(devices=both))
    deleted(machine.delete(devices=both))


def test_a_name_that_is_taken(machine: Server) -> None:
    worked(machine.save())
    refused(machine.save(), "Snapshot 'snap0' already exists in one or more devices")
    deleted(machine.delete())
    worked(machine.save())
    deleted(machine.delete())


def test_loading_what_is_not_there(machine: Server) -> None:
    load_refused(machine, machine.load(), "Snapshot 'snap0' does not exist in one or more devices")


def test_deleting_what_is_not_there(machine: Server) -> None:
    deleted(machine.delete())


RNG = "0000:00:02.0/virtio-rng"


@pytest.mark.parametrize("kind", SERVERS)
def test_a_state_with_a_device_that_is_gone(kind: str, tmp_path: Path) -> None:
    """load-says-why: up to 10.1 the reason goes to QEMU's standard error alone."""

    def with_rng(machine: Machine) -> None:
        machine.board = Board("none", devices=(Register(RNG),))

    image = tmp_path / "t"
    qemu_img("create", "-f", "qcow2", image, "128M")
    pc = ("-machine", "pc", "-m", "16")
    with server(kind, tmp_path, equip=with_rng, arguments=(*pc, "-device", "virtio-rng")) as found:
        found.add(0, image)
        worked(found.save())
        found.ask("quit")
    with server(kind, tmp_path, arguments=pc) as found:
        found.add(0, image)
        error = "Error -22 while loading VM state"
        if found.is_ours:
            error += (
                f": Unknown savevm section or instance '{RNG}' 0. Make sure that your current VM setup matches "
                "your saved VM setup, including any hotplugged devices"
            )
        load_refused(found, found.load(), error)
        deleted(found.delete())
    qemu_img_check(image)
