"""A stillframe is killed, and another takes its machine over: nothing that the guest was told of is lost, or it does not go on."""

import asyncio
import os
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from peers import peer
from qemu.killed import SmallMachine, listed, qemu_of, qemus_of, steps
from qemu_guests import BEAT, GuestMachine, QemuGuest, check_image, versions
from running import stillframe
from stillframe.block.qcow2 import unflushed
from stillframe.client import Client
from stillframe.errors import StillframeError
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.sockets import connected_unix_socket

ROUNDS = int(os.environ.get("STILLFRAME_ADOPT_ROUNDS", "2"))


def adopted(directory: Path) -> QemuGuest:
    """Goes on with the machine 'box'."""
    return QemuGuest(directory, "--adopt", "box")


def refusal() -> str:
    """Why 'box' is not adopted."""
    done = stillframe("run", "--adopt", "box", "--console", "none")
    assert done.returncode == 1
    return done.stderr


@pytest.mark.parametrize("version", versions("qemu"))
def test_no_acknowledged_write_reads_back_old_however_often_we_are_killed(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    """A snapshot before each kill, so that the guest's writes replace clusters of it, which is what memory alone knows of."""
    machine: QemuGuest = GuestMachine(tmp_path / "m", version, "--name", "box")
    image = tmp_path / "m" / "root.qcow2"
    try:
        machine.console.until("HB 3 ")
        pid = qemu_of(runtime)
        for number in range(ROUNDS):
            machine.save(f"s{number}")
            for _ in range(3 + number % 5):
                machine.console.until(BEAT)
            machine.kill()
            machine = adopted(tmp_path / f"again{number % 2}")
            assert qemu_of(runtime) == pid
            for _ in range(70):
                assert machine.console.until(BEAT)[2] == "0"
            machine.load(f"s{number}")
            machine.beat()
            pid = qemu_of(runtime)
            machine.delete(f"s{number}")
        machine.quit()
    finally:
        machine.kill()
    check_image(image, in_use=True)
    assert list(runtime.iterdir()) == []


def test_guest_is_found_as_its_user_left_it_and_by_one_at_a_time(tmp_path: Path, runtime: Path) -> None:
    with SmallMachine(tmp_path / "m", "10.0", "--name", "box") as machine:
        machine.beat()
        assert "A stillframe serves the machine 'box'" in refusal()
        machine.execute("stop")
        machine.kill()
        anew = stillframe("run", "--engine", "qemu", "--name", "box", "--console", "none")
        assert (anew.returncode, "--adopt box" in anew.stderr) == (1, True)
        other = stillframe("run", "--adopt", "box", "--memory", "1G")
        assert (other.returncode, "is what it was" in other.stderr) == (1, True)
        with adopted(tmp_path / "again") as again:
            assert again.execute("query-status")["status"] == "paused"
            again.execute("cont")
            again.beat()
            again.quit()
    assert list(runtime.iterdir()) == []
    assert "There is no machine 'box'" in refusal()


def somebody_writes(machine: SmallMachine, runtime: Path) -> None:
    subprocess.run([peer("qemu-io"), "-c", "write 0 4k", str(machine.image)], check=True)


def image_is_replaced(machine: SmallMachine, runtime: Path) -> None:
    other = machine.image.with_suffix(".copy")
    other.write_bytes(machine.image.read_bytes())
    other.replace(machine.image)


def what_was_not_flushed_is_gone(machine: SmallMachine, runtime: Path) -> None:
    about = machine.image.stat()
    (record,) = Path(unflushed._directory_path()).glob(f"{about.st_dev:x}-{about.st_ino:x}.*")
    record.unlink()


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (somebody_writes, "somebody else has opened the image|may be lost"),
        (image_is_replaced, "another file|may be lost"),
        (what_was_not_flushed_is_gone, "may be lost"),
    ],
)
def test_guest_whose_disk_is_not_what_it_was_is_ended_and_never_gets_it_again(
    what: Callable[[SmallMachine, Path], None], word: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", "7.2", "--name", "box") as machine:
        machine.beat()
        machine.kill()
        what(machine, runtime)
        said = refusal()
        assert any(each in said for each in word.split("|")), said
        assert "cannot go on" in said
        assert qemus_of(tmp_path) == []
    assert list(runtime.glob("*.qemu")) == []
    check_image(machine.image, in_use=True)


def test_record_that_is_damaged_or_of_a_qemu_that_ended_is_refused_with_that_word(
    tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", "7.2", "--name", "box") as machine:
        machine.beat()
        machine.kill()
        record = runtime / "box.qemu" / "record"
        whole = record.read_bytes()
        for broken in (b"", whole[:-2], whole.replace(b'"version":1', b'"version":2'), b"[" * 5000):
            record.write_bytes(broken)
            assert "missing or damaged" in refusal()
        record.write_bytes(whole)
        os.kill(qemu_of(runtime), 9)
        assert "has ended, too" in refusal()
    assert list(runtime.glob("*.qemu")) == []


def test_qemu_of_a_machine_without_a_name_ends_with_us(tmp_path: Path, runtime: Path) -> None:
    with SmallMachine(tmp_path / "m", "10.0") as machine:
        machine.beat()
        machine.save("one")
        machine.load("one")
        machine.beat()
        assert len(qemus_of(tmp_path)) == 1
        machine.kill()
        deadline = time.monotonic() + 30
        while qemus_of(tmp_path):
            assert time.monotonic() < deadline
            time.sleep(0.02)
    (left,) = tmp_path.glob("stillframe.*")
    with SmallMachine(tmp_path / "m", "10.0") as another, SmallMachine(tmp_path / "n", "10.0") as third:
        assert left not in tmp_path.glob("stillframe.*")
        third.quit()
        another.beat()
        another.quit()
    assert list(tmp_path.glob("stillframe.*")) == []


@pytest.mark.parametrize("version", versions("qemu"))
def test_guest_whose_memory_had_still_to_come_is_ended_with_that_word_and_its_snapshot_loads(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", version, "--name", "box") as machine:
        machine.beat()
        machine.save("kept")
        half = 8 << 20

        async def die_half_way(client: Client) -> None:
            arguments = {"job-id": "j", "tag": "kept", "vmstate": "root", "devices": ["root"], "speed": half}
            await client.execute("snapshot-load", arguments)
            while True:
                (job,) = await client.execute("query-jobs")
                assert job["status"] == "running", job
                if job["current-progress"] > half:
                    break
                await asyncio.sleep(0.01)
            machine.kill()
            await client.execute("query-status")

        with pytest.raises(StillframeError):
            machine.talk(die_half_way)
        said = refusal()
        assert ("had still to come" in said, "load it again" in said) == (True, True), said
        assert (qemus_of(tmp_path), list(runtime.glob("*.qemu"))) == ([], [])
        check_image(machine.image, in_use=True)
    with SmallMachine(tmp_path / "m", version, "--name", "box") as machine:
        machine.load("kept")
        machine.beat()
        machine.quit()
    check_image(machine.image, in_use=True)


@pytest.mark.parametrize("version", versions("qemu"))
@pytest.mark.parametrize("operation", ["save", "load"])
def test_machine_is_taken_over_from_any_step_of_a_save_or_load_or_it_is_said_why_not(
    operation: str, version: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", version) as machine:
        machine.beat()
        machine.save("kept")
        machine.quit()
    for number in steps(operation, 1):
        with SmallMachine(tmp_path / "m", version, "--name", "box", dying=("us", number)) as machine:
            machine.beat()
            try:
                (machine.save if operation == "save" else machine.load)(
                    "new" if operation == "save" else "kept"
                )
            except (StillframeError, OSError):
                assert machine.process.wait(60) == -9
            else:
                machine.quit()
                break
        step = machine.died.read_text()
        if (said := why_not(tmp_path / "again")) is not None:
            # Its disks are the snapshot's already, and its memory had to come from us.
            assert (operation, "load it again" in said) == ("load", True), (step, said)
        assert list(runtime.glob("*.qemu")) == [], step
        assert "kept" in listed(machine.image), step
        check_image(machine.image, in_use=True)


def why_not(directory: Path) -> str | None:
    """Go on with the machine 'box', save and load it, and end it; else what was said."""
    try:
        with adopted(directory) as again:
            try:
                again.beat()
            except AssertionError:
                again.process.wait(60)
                raise
            again.save("more")
            again.load("kept")
            again.beat()
            again.delete("more")
            again.quit()
    except AssertionError:
        return (directory / "stderr").read_text()
    return None


def own_monitor(runtime: Path) -> QemuMonitor:
    """That of the QEMU of 'box', which nobody else may be connected to."""
    (path,) = runtime.glob("box.qemu/*/qmp")
    return QemuMonitor(connected_unix_socket(path), lambda _: None)


def write_to_disk(monitor: QemuMonitor, runtime: Path) -> str:
    """Through the disk that the guest has; what QEMU has printed when that has ended. The monitor is closed."""
    (printed,) = runtime.glob("box.qemu/*/errors")
    device = "/machine/peripheral-anon/device[0]/virtio-backend"
    try:
        line = f'qemu-io -d {device} "write -P 171 0 4k"'
        monitor.execute("human-monitor-command", {"command-line": line})
    finally:
        monitor.close()
    return printed.read_text()


def holds(image: Path, byte: int) -> bool:
    """Whether the disk begins with 4 KiB of it."""
    words = [peer("qemu-io"), "-r", "-c", f"read -P {byte} 0 4k", str(image)]
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize("version", versions("qemu"))
def test_write_that_nobody_serves_in_the_stated_time_fails_and_is_not_done_afterwards(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", version, "--name", "box", "--reconnect", "1") as machine:
        machine.beat()
        machine.kill()
        assert "write failed: Input/output error" in write_to_disk(own_monitor(runtime), runtime)
        with adopted(tmp_path / "again") as again:
            again.beat()
            again.quit()
    assert holds(machine.image, 0)


@pytest.mark.parametrize("version", versions("qemu"))
def test_write_that_waits_is_done_when_the_machine_is_taken_over_in_the_stated_time(
    version: str, tmp_path: Path, runtime: Path
) -> None:
    with SmallMachine(tmp_path / "m", version, "--name", "box", "--reconnect", "120") as machine:
        machine.beat()
        machine.kill()
        monitor = own_monitor(runtime)
        with ThreadPoolExecutor(1) as beside:
            written = beside.submit(write_to_disk, monitor, runtime)
            # It serves the disks, and waits for the monitor that is in use until the write has ended.
            with adopted(tmp_path / "again") as again:
                assert "wrote 4096/4096 bytes" in written.result()
                again.beat()
                again.quit()
    assert holds(machine.image, 171)
