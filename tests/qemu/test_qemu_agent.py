"""Saves for which the guest's file systems stand still, through QEMU's guest agent: nothing stays frozen, whatever comes."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import linux_guest, peer
from qemu_guests import GuestMachine, check_image, machine_within, versions
from stillframe.errors import StillframeError
from stillframe.machine.control import Quiesce
from stillframe.machine.engines.qemu.agent import agent_at

APPEND = "console=ttyS0 quiet no_timer_check"
_NEEDS_RECOVERY = 0x04
"""Of ext4's incompatible features: its journal has something to replay."""


@pytest.fixture(scope="module", params=versions("agent"))
def machine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestMachine]:
    directory = tmp_path_factory.mktemp("agent") / "guest"
    with GuestMachine(directory, request.param, "--agent", initrd="agent-initrd", append=APPEND) as machine:
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


@pytest.mark.parametrize("version", [pytest.param("10.0", marks=pytest.mark.xdist_group("agent-10.0"))])
def test_file_systems_are_thawed_where_the_save_fails_in_its_pause(version: str, tmp_path: Path) -> None:
    files = linux_guest("x86_64")
    with machine_within(
        tmp_path,
        peer("qemu-system-x86_64", version),
        "shell ready",
        kernel=files["kernel"],
        initrd=files["agent-initrd"],
        append=APPEND,
        agent=True,
    ) as machine:
        seen = []

        def fail() -> None:
            seen.append(machine.run_state)
            raise StillframeError("the disk is gone")

        def state() -> str:
            port = machine._agent_port()
            assert port is not None
            with agent_at(port) as agent:
                return str(agent.execute("guest-fsfreeze-status", 30.0))

        deadline = time.monotonic() + 60
        while True:
            try:
                assert state() == "thawed"
                break
            except StillframeError:
                # The shell is there before the agent is.
                assert time.monotonic() < deadline
        with (
            pytest.raises(StillframeError, match="the disk is gone"),
            machine.captured(fail, quiesce=Quiesce.REQUIRED),
        ):
            pass
        assert (len(seen), state(), machine.runs()) == (1, "thawed", True)
