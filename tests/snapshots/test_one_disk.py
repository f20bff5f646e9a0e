"""Snapshots of one disk, and those of everything: the words and effects are the same on stillframe and on
QEMU."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshots.hosts import qemu_img_check
from snapshots.servers import SERVERS, Server, qemu_img, qemu_io, server


@pytest.fixture(params=SERVERS)
def machine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    qemu_img("create", "-f", "qcow2", tmp_path / "0", "16M")
    qemu_io(tmp_path / "0", "write -P 1 0 1M")
    with server(request.param, tmp_path) as found:
        found.add(0, tmp_path / "0")
        yield found
    qemu_img_check(tmp_path / "0", leaks_allowed=request.param != "stillframe")


def create(found: Server, name: str = "s", device: str = "diskfmt0") -> Any:
    return found.lines.execute("blockdev-snapshot-internal-sync", device=device, name=name)


def delete(found: Server, device: str = "diskfmt0", **arguments: Any) -> Any:
    return found.lines.execute("blockdev-snapshot-delete-internal-sync", device=device, **arguments)


def test_a_disk_is_snapshotted_alone(machine: Server) -> None:
    assert create(machine) == {}
    assert create(machine, "t") == {}
    assert machine.tags() == [("1", "s"), ("2", "t")]
    gone = delete(machine, name="s")
    assert (gone["id"], gone["name"], gone["vm-state-size"]) == ("1", "s", 0)
    assert "icount" not in gone
    assert delete(machine, id="2", name="t")["name"] == "t"
    assert machine.tags() == []
    assert machine.load("s").error == "Snapshot 's' does not exist in one or more devices"


def test_a_disk_without_machine_state_is_not_loaded(machine: Server) -> None:
    assert create(machine) == {}
    assert machine.load("s").error == "This is a disk-only snapshot. Revert to it  offline using qemu-img"


def test_refusals_have_qemus_words(machine: Server, tmp_path: Path) -> None:
    machine.ask("blockdev-add", driver="null-co", node_name="n0")
    assert create(machine) == {}
    words = {
        ("nope", "x"): "Cannot find device='nope' nor node-name='nope'",
        ("disk0", "x"): "Need a root block node",
        ("diskfmt0", ""): "Name is empty",
        ("n0", "x"): "Block format 'null-co' used by device 'n0' does not support internal snapshots",
        ("diskfmt0", "s"): "Snapshot with name 's' already exists on device 'diskfmt0'",
    }
    for (device, name), desc in words.items():
        answer = create(machine, name, device)
        assert answer == {"class": "GenericError", "desc": desc}
    missing = {
        (): "Name or id must be provided",
        (("id", "99"),): "Snapshot with id '99' and name 'null' does not exist on device 'diskfmt0'",
        (("name", "x"),): "Snapshot with id 'null' and name 'x' does not exist on device 'diskfmt0'",
        (("id", "1"), ("name", "x")): "Snapshot with id '1' and name 'x' does not exist on device 'diskfmt0'",
    }
    for arguments, desc in missing.items():
        assert delete(machine, **dict(arguments)) == {"class": "GenericError", "desc": desc}
    assert machine.tags() == [("1", "s")]


def test_everything_is_saved_loaded_and_deleted_by_name(machine: Server, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / "1", "16M")
    machine.add(1, tmp_path / "1")
    qemu_img("create", "-f", "qcow2", tmp_path / "2", "16M")
    machine.add(2, tmp_path / "2", read_only=True)
    hmp = machine.lines.hmp
    assert hmp("info snapshots").strip() == "There is no snapshot available."
    assert hmp("savevm s") == ""
    assert hmp("loadvm s") == ""
    assert machine.tags(0) == machine.tags(1) == [("1", "s")]
    assert machine.tags(2) == []
    assert create(machine, "partial", "diskfmt1") == {}
    listing = hmp("info snapshots")
    assert "List of snapshots present on all disks:" in listing
    assert "List of partial (non-loadable) snapshots on" in listing
    assert re.search(r"^--\s+s\s", listing, re.MULTILINE)
    assert hmp("loadvm nothing").startswith("Error: Snapshot 'nothing' does not exist in one or more devices")
    machine.ask("cont")
    assert hmp("delvm s") == ""
    assert hmp("delvm s") == ""
    assert (machine.tags(0), [name for _, name in machine.tags(1)]) == ([], ["partial"])
    assert hmp("savevm") == ""
    assert re.fullmatch(r"vm-\d{14}", machine.tags(0)[0][1])


def test_a_writable_disk_that_keeps_no_snapshots_is_never_left_out_in_silence(machine: Server) -> None:
    machine.ask("blockdev-add", driver="null-co", node_name="n0")
    for line in ("savevm s", "loadvm s", "delvm s"):
        said = machine.lines.hmp(line)
        assert said.strip() == "Error: Device 'n0' is writable but does not support snapshots"
    assert machine.tags() == []


@pytest.mark.parametrize("kind", SERVERS)
def test_a_machine_without_disks_says_so(kind: str, tmp_path: Path) -> None:
    with server(kind, tmp_path) as found:
        words = "Error: no block device can store vmstate for snapshot"
        for line in ("savevm s", "loadvm s"):
            assert found.lines.hmp(line).strip() == words
        assert found.lines.hmp("delvm s") == ""
        assert found.lines.hmp("info snapshots").strip().endswith(words.removeprefix("Error: "))
