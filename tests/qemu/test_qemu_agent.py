"""Saves for which the guest's file systems stand still, through QEMU's guest agent: nothing stays frozen, whatever comes."""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import peer
from qemu_guests import VERSIONS, GuestMachine, check_image
from stillframe.errors import StillframeError

_NEEDS_RECOVERY = 0x04
"""Of ext4's incompatible features: its journal has something to replay."""


@pytest.fixture(
    scope="module",
    params=[pytest.param(version, marks=pytest.mark.xdist_group(f"agent-{version}")) for version in VERSIONS],
)
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestMachine]:
    directory = tmp_path_factory.mktemp("agent") / "guest"
    append = "console=ttyS0 quiet no_timer_check"
    with GuestMachine(directory, request.param, "--agent", initrd="agent-initrd", append=append) as machine:
        machine.console.until("shell ready")
        machine.console.shell("mkfs.ext4 -q /dev/vda && mkdir -p /mnt && mount /dev/vda /mnt")
        yield machine
        machine.quit()
        check_image(machine.image)


def busy(machine: GuestMachine) -> None:
    """The file system has something in its journal, and can be written to."""
    machine.console.shell("date >> /mnt/file; sync; date >> /mnt/file")


def needs_recovery(machine: GuestMachine, tag: str, directory: Path) -> bool:
    """Whether the file system on a snapshot's disk was caught at work."""
    raw = directory / "raw"
    words = [
        "convert",
        "-U",
        "-l",
        f"snapshot.name={tag}",
        "-f",
        "qcow2",
        "-O",
        "raw",
        str(machine.image),
        str(raw),
    ]
    subprocess.run([peer("qemu-img"), *words], check=True)
    with raw.open("rb") as file:
        file.seek(1024 + 0x60)
        return bool(file.read(1)[0] & _NEEDS_RECOVERY)


def test_file_systems_are_whole_in_a_quiesced_snapshot_and_thawed_after_it(
    machine: GuestMachine, tmp_path: Path
) -> None:
    busy(machine)
    machine.save("at-work")
    ways = [
        machine.way("snapshot-save", mode, what="file-systems", quiesce=mode) for mode in ("required", "try")
    ]
    assert ways == [("frozen", "")] * 2
    busy(machine)
    found = [needs_recovery(machine, tag, tmp_path) for tag in ("at-work", "required", "try")]
    assert found == [True, False, False]
    for tag in ("at-work", "required", "try"):
        machine.delete(tag)


def test_loaded_guest_is_thawed_and_knows_the_time(machine: GuestMachine) -> None:
    machine.console.shell("date -s @1000000000")
    machine.job("snapshot-save", "frozen", quiesce="required")
    machine.load("frozen")
    # Only a guest that was thawed can write, and only one whose agent was spoken with knows the time.
    busy(machine)
    machine.console.shell("while [ $(date +%s) -lt 1500000000 ]; do sleep 0.1; done")
    machine.delete("frozen")


def test_agent_that_does_not_answer_is_waited_for_no_longer_than_it_is_worth(machine: GuestMachine) -> None:
    number = re.sub(r"\D", "", machine.console.shell("pidof qemu-ga"))
    machine.console.shell(f"kill -STOP {number}")
    with pytest.raises(StillframeError, match="cannot be frozen: The guest agent does not answer"):
        machine.job("snapshot-save", "none", quiesce="required")
    assert machine.tags() == []
    way, why = machine.way("snapshot-save", "all-the-same", what="file-systems", quiesce="try")
    assert (way, "does not answer" in why) == ("running", True)
    machine.console.shell(f"kill -CONT {number}")
    busy(machine)
    machine.delete("all-the-same")
    assert machine.way("snapshot-save", "now", what="file-systems", quiesce="required") == ("frozen", "")
    machine.delete("now")
    busy(machine)


def test_paused_guest_cannot_be_quiesced(machine: GuestMachine) -> None:
    machine.execute("stop")
    with pytest.raises(StillframeError, match="the guest is paused"):
        machine.job("snapshot-save", "none", quiesce="required")
    assert machine.status() == "paused"
    machine.execute("cont")
    busy(machine)
