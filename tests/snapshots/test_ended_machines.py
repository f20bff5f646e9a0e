"""A machine's process ends in the middle of a save, and of a load whose memory still comes: as asked, by a signal, or by death."""

import random
import signal
from pathlib import Path

import pytest

from monitor.harness import Client
from running import PATIENCE, RunningMachine
from snapshots.hosts import new_image, opened, qemu_img_check
from snapshots.servers import Server, qemu_img
from stillframe.monitor.addresses import UnixAddress
from storm import Instant, load_each, machine_on, take_snapshot

NODE = {"vmstate": "root", "devices": ["root"]}
MUCH_MEMORY = ("--append", "mb=40 dirty=256 period=20")
"""So much that neither a save nor a load is over when its guest has only just gone on."""


def end_in_the_middle(machine: RunningMachine, end: str, command: str, tag: str) -> None:
    """As soon as the job's guest runs again."""
    with Client(UnixAddress(machine.qmp)) as client:
        monitor = Server("stillframe", client.negotiate())
        monitor.send(command, job_id="job", tag=tag, **NODE)
        events = monitor.until_event("RESUME")
        assert "job concluded" not in events
        if end == "quit":
            monitor.send("quit")
        else:
            machine.process.send_signal(signal.Signals[end])
        code = machine.process.wait(PATIENCE)
        assert code == (-signal.SIGKILL if end == "SIGKILL" else 0), machine.log.read_text()


def assert_whole(image: Path, end: str) -> list[str]:
    """:return: the snapshots' names. Nobody has opened the image since."""
    qemu_img_check(image, leaks_allowed=end == "SIGKILL")
    with opened(image, "root") as node:
        return [snapshot.name for snapshot in node.snapshot_store.snapshots()]


@pytest.mark.parametrize("end", ["quit", "SIGTERM", "SIGKILL"])
def test_a_machine_that_ends_in_the_middle_of_a_job_leaves_snapshots_that_load(
    end: str, tmp_path: Path
) -> None:
    image = new_image(tmp_path / "root.qcow2", 16 << 20)
    instants: dict[str, Instant] = {}
    with machine_on(tmp_path / "saving", image, *MUCH_MEMORY) as (machine, console):
        console.until(r"ready;")
        console.command(f"nonce {random.getrandbits(64) | 1:x}")
        console.command("busy on")
        instants["older"] = take_snapshot(machine, console, "older")
        end_in_the_middle(machine, end, "snapshot-save", "cut")
    # What was cut off is not there; where all of it was written before the end came, it is there as a whole.
    tags = assert_whole(image, end)
    assert tags in (["older"], ["older", "cut"])
    with machine_on(tmp_path / "loading", image, *MUCH_MEMORY) as (machine, _):
        end_in_the_middle(machine, end, "snapshot-load", "older")
    assert assert_whole(image, end) == tags
    with machine_on(tmp_path / "after", image, *MUCH_MEMORY, "--paused") as (machine, console):
        if "cut" in tags:
            machine.load("cut")
            assert " bad=0 " in console.command("check")
        load_each(machine, console, ["older"], instants)
        instants["after"] = take_snapshot(machine, console, "after")
        load_each(machine, console, ["after", "older"], instants)
        machine.quit()
    # What a killed process had set aside is free again after a repair.
    qemu_img_check(image, leaks_allowed=end == "SIGKILL")
    qemu_img("check", "-r", "leaks", image)
    qemu_img_check(image)
