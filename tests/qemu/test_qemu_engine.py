"""A machine whose guest an unmodified QEMU runs: saved while it runs, brought back, and read by stock QEMU, 7.2 and 10.0.

One guest a version is booted and serves all tests of that version: each leaves it running and without snapshots.
"""

import asyncio
import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest.consoles import GuestProcess
from peers import peer
from qemu_guests import BEAT, VERSIONS, GuestMachine, check_image, create, qemu_words, versions
from running import connected, stillframe
from stillframe.client import Client, connect
from stillframe.errors import StillframeError


@pytest.fixture(scope="module", params=versions("qemu"))
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestMachine]:
    with GuestMachine(tmp_path_factory.mktemp("qemu"), request.param) as machine:
        machine.console.until(r"boot nonce=")
        machine.console.until("HB 3 ")
        yield machine
        assert machine.process.poll() is None, machine.log.read_text()
        machine.quit()
        check_image(machine.image)


@pytest.fixture
def machine(running: GuestMachine) -> Iterator[GuestMachine]:
    yield running
    for tag in running.tags():
        running.delete(tag)
    assert running.execute("query-status")["status"] == "running"
    running.beat()


def test_guest_runs_on_while_it_is_saved_and_comes_back_to_each_instant(machine: GuestMachine) -> None:
    first = machine.beat()
    machine.save("one")
    between = machine.beat()
    machine.save("two")
    later = machine.beat()
    assert first <= between <= later
    for tag, least, most in (("one", first, between), ("two", between, later), ("one", first, between)):
        machine.execute("stop")
        machine.console.skip()
        machine.load(tag)
        machine.execute("cont")
        found = machine.console.until(BEAT)
        assert found[2] == "0"
        assert least <= int(found[1]) <= most + 1
    machine.load("two")
    machine.beat()


def test_second_save_writes_only_what_changed_and_stock_qemu_loads_it(
    machine: GuestMachine, tmp_path: Path
) -> None:
    def blocks() -> int:
        return machine.image.stat().st_blocks * 512

    empty = blocks()
    machine.save("one")
    whole = blocks() - empty
    machine.save("two")
    assert blocks() - empty - whole < whole / 4
    copy = tmp_path / "root.qcow2"
    shutil.copyfile(machine.image, copy)
    for version in VERSIONS:
        with GuestProcess(qemu_words(version, copy, "-loadvm", "two")) as guest:
            assert {guest.heartbeat().bad for _ in range(10)} == {0}
    check_image(copy, in_use=True)


def test_snapshot_that_stock_qemu_made_is_loaded_and_continued(machine: GuestMachine, tmp_path: Path) -> None:
    copy = tmp_path / "theirs" / "root.qcow2"
    copy.parent.mkdir()
    create(copy)
    with GuestProcess(
        [*qemu_words(machine.version, copy), "-qmp", f"unix:{tmp_path}/qmp,server=on,wait=off"]
    ) as guest:
        guest.expect(r"boot nonce=")
        before = guest.heartbeat()
        save_and_quit(tmp_path / "qmp", "theirs")
        assert guest.wait() == 0
    check_image(copy)
    with GuestMachine(copy.parent, machine.version, "--paused") as ours:
        ours.load("theirs")
        ours.execute("cont")
        found = ours.console.until(BEAT)
        assert (found[2], int(found[1]) >= before.number) == ("0", True)
        ours.save("ours")
        ours.beat()
        ours.load("ours")
        ours.beat()
        ours.quit()
    check_image(copy)


def save_and_quit(path: Path, tag: str) -> None:
    async def work() -> None:
        async with connect(f"unix:{path}") as client:
            await client.run_job("snapshot-save", {"tag": tag, "vmstate": "root", "devices": ["root"]})
            await client.quit()

    asyncio.run(work())


def test_state_of_another_machine_is_refused_in_qemus_words_and_the_guest_goes_on(
    machine: GuestMachine, tmp_path: Path
) -> None:
    machine.save("one")
    directory = tmp_path / "other"
    directory.mkdir()
    shutil.copyfile(machine.image, directory / "root.qcow2")
    with GuestMachine(directory, machine.version, "--device", "virtio-balloon-pci") as other:
        other.console.until("HB 3 ")
        before = other.beat()
        with pytest.raises(StillframeError, match=r"virtio-balloon|savevm section|Device '"):
            other.load("one")
        assert other.beat() > before
        assert other.execute("query-status")["status"] == "running"
        other.quit()
    check_image(directory / "root.qcow2", in_use=True)


def test_cancelled_save_leaves_nothing_behind(machine: GuestMachine) -> None:
    machine.save("kept")

    async def cancelled(client: Client) -> str:
        await client.execute(
            "snapshot-save", {"job-id": "j", "tag": "gone", "vmstate": "root", "devices": ["root"]}
        )
        await client.execute("job-cancel", {"id": "j"})
        while True:
            job = next(each for each in await client.execute("query-jobs") if each["id"] == "j")
            if job["status"] == "concluded":
                await client.execute("job-dismiss", {"id": "j"})
                return str(job.get("error", ""))

    error = machine.talk(cancelled)
    assert (machine.tags(), "cancel" in error.lower()) == (["kept"], True)
    machine.beat()
    machine.save("again")
    check_image(machine.image, in_use=True)


def test_paused_guest_stays_paused_through_a_save_and_a_load(machine: GuestMachine) -> None:
    machine.execute("stop")
    machine.save("paused")
    assert machine.execute("query-status") == {"status": "paused", "running": False}
    machine.load("paused")
    assert machine.execute("query-status") == {"status": "paused", "running": False}
    machine.execute("cont")
    machine.beat()


def test_monitor_passes_on_what_is_qemus_and_hides_what_is_ours(machine: GuestMachine) -> None:
    assert machine.execute("query-cpus-fast")[0]["cpu-index"] == 0
    names = {each["name"] for each in machine.execute("query-commands")}
    assert {"device_add", "snapshot-save", "query-cpus-fast"} <= names
    assert not {name for name in names if name.startswith("migrate")}
    assert not {"blockdev-snapshot-sync", "blockdev-mirror", "block_resize", "eject"} & names
    # Not our two boards: those of the program that runs the guest.
    assert len(machine.execute("query-machines")) > 2
    with pytest.raises(StillframeError, match="has not been found"):
        machine.execute("migrate", uri="exec:true")
    with pytest.raises(StillframeError, match="has not been found"):
        machine.execute("no-such-command")
    assert "CPU #0" in machine.execute("human-monitor-command", command_line="info cpus")
    with connected(machine.qmp, None) as monitor, monitor.makefile("rb") as lines:
        monitor.sendall(
            b'{"execute": "qmp_capabilities"}{"execute": "qom-list", "arguments": {"path": 1e999}}'
        )
        # The greeting, the reply to each.
        assert b"cannot be written as JSON" in [next(lines) for _ in range(3)][2]
    # It is done, and prints nothing.
    assert machine.execute("human-monitor-command", command_line="log none") == ""
    machine.save("one")
    assert "one" in machine.execute("human-monitor-command", command_line="info snapshots")


def test_what_the_guest_writes_is_in_the_snapshot_whatever_was_asked_of_qemus_disks(
    machine: GuestMachine, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    for command, arguments in {
        "blockdev-snapshot-sync": {
            "node_name": "root",
            "snapshot_file": str(other),
            "snapshot_node_name": "o",
        },
        "drive-mirror": {"device": "root", "target": str(other), "sync": "full"},
        "block_resize": {"node_name": "root", "size": 128 << 20},
        "eject": {"id": "rng"},
    }.items():
        with pytest.raises(StillframeError, match=f"The command {command} has not been found"):
            machine.execute(command, **arguments)
    for line in (
        f"snapshot_blkdev root {other} qcow2",
        f"drive_backup -f root {other} raw",
        f"drive_add/ if=none,id=other,file={machine.image},format=raw,read-only=on",
        "change other medium",
        "commit all",
    ):
        name = line.split()[0].removesuffix("/")
        assert typed(machine, line) == f"unknown command: '{name}'\r\n"
    assert not other.exists()
    # So it is with what QEMU would let a client set of a device at work.
    for path, name in (("/machine/peripheral-anon/device[0]", "drive"), ("/machine", "pflash0")):
        with pytest.raises(StillframeError, match=f"Property '{name}' of .* cannot be set"):
            machine.execute("qom-set", path=path, property=name, value="root")
        assert f"Error: Property '{name}' of" in typed(machine, f'qom-set "{path}" {name} "root"')
    # Where the guest has nothing of its own.
    write = "write -P 0x77 32M 64k"
    assert typed(machine, f'qemu-io -d {BLOCK_BACKEND} "{write}"') == ""
    machine.save("one")
    content = tmp_path / "content"
    words = ["convert", "-U", "-l", "snapshot.name=one", "-O", "raw", str(machine.image), str(content)]
    subprocess.run([peer("qemu-img", "7.2"), *words], check=True)
    with content.open("rb") as file:
        file.seek(32 << 20)
        assert file.read(1 << 16) == b"\x77" * (1 << 16)


BLOCK_BACKEND = "/machine/peripheral-anon/device[0]/virtio-backend"


def typed(machine: GuestMachine, line: str) -> str:
    """What a line prints at the human monitor."""
    return str(machine.execute("human-monitor-command", command_line=line))


def test_node_that_was_added_to_a_running_machine_is_refused_as_its_disk_and_can_be_closed(
    machine: GuestMachine,
) -> None:
    machine.execute("blockdev-add", driver="null-co", node_name="late", size=1 << 20)
    with pytest.raises(
        StillframeError, match=r"Device 'virtio-blk-pci' cannot use node 'late': .* command line"
    ):
        machine.execute("device_add", driver="virtio-blk-pci", drive="late", id="disk")
    printed = typed(machine, "device_add virtio-blk-pci,drive=late,id=disk")
    assert printed.startswith("Error: Device 'virtio-blk-pci' cannot use node 'late'")
    # What no node of ours is called, QEMU may know.
    with pytest.raises(StillframeError) as refused:
        machine.execute("device_add", driver="virtio-blk-pci", drive="no-such-node", id="disk")
    assert "cannot use node" not in str(refused.value)
    machine.execute("blockdev-del", node_name="late")


def test_schema_tells_of_our_commands_as_they_are_here_and_of_qemus_as_it_has_them(
    machine: GuestMachine,
) -> None:
    entries = machine.execute("query-qmp-schema")
    schema = {each["name"]: each for each in entries}
    assert len(schema) == len(entries)

    def arguments(command: str) -> set[str]:
        return {each["name"] for each in schema[schema[command]["arg-type"]]["members"]}

    assert {"eager", "replace", "speed", "tag"} <= arguments("snapshot-load")
    assert {"command-line", "cpu-index"} == arguments("human-monitor-command")
    assert "driver" in arguments("device_add")
    commands = {each["name"] for each in entries if each["meta-type"] == "command"}
    assert commands == {each["name"] for each in machine.execute("query-commands")}
    for entry in entries:
        used = [entry[role] for role in ("arg-type", "ret-type", "element-type") if role in entry]
        used += [member["type"] for member in entry.get("members", ()) if "type" in member]
        used += [case["type"] for case in entry.get("variants", ())]
        assert set(used) <= set(schema), entry


def test_options_of_the_command_line_reach_a_qemus_machine(machine: GuestMachine) -> None:
    at = ["--qmp", f"unix:{machine.qmp}"]
    stillframe("save", *at, "one", "--speed", "1G", check=True)
    done = stillframe("load", *at, "one", "--eager", "--json", check=True)
    assert ("eager", "it was asked for") in [
        (each["chosen"], each["why"]) for each in json.loads(done.stdout)["job"]["choices"]
    ]
