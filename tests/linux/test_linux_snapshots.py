"""A real Linux, Debian's kernel: saved, wrecked and brought back, with its memory, disk, processes and clock compared."""

import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import linux_guest, peer
from running import RunningMachine
from stillframe.errors import StillframeError

pytestmark = [pytest.mark.xdist_group("linux"), pytest.mark.timeout(300)]

DISK = "256M"


def arguments(image: Path, *, initrd: str = "initrd", append: str = "console=ttyS0") -> list[str]:
    guest = linux_guest()
    return [
        *(
            "--memory",
            "256M",
            "--kernel",
            str(guest["kernel"]),
            "--initrd",
            str(guest[initrd]),
            "--append",
            append,
        ),
        *("--blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"),
        *("--device", "virtio-blk,drive=root"),
    ]


def check_image(image: Path) -> None:
    check = subprocess.run([peer("qemu-img"), "check", str(image)], stdout=subprocess.PIPE, text=True)
    assert check.returncode == 0, check.stdout


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with the snapshot `booted`: Linux at its shell, ext4 on the disk, a nonce in a tmpfs, files on the disk."""
    directory = tmp_path_factory.mktemp("booted")
    image = directory / "root.qcow2"
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(image), DISK], check=True)
    with RunningMachine(directory, *arguments(image)) as machine:
        console = machine.console
        console.until("stillframe: shell ready", 120)
        console.until("# ", 60)
        console.shell("mke2fs -q -t ext4 /dev/vda 2>/dev/null || mkfs.ext4 -q /dev/vda", 120)
        console.shell("mkdir -p /mnt && mount -t ext4 /dev/vda /mnt")
        console.shell("head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n' >/tmp/nonce")
        console.shell(
            "dd if=/dev/urandom of=/mnt/random bs=1M count=4 2>/dev/null && cp -r /etc /mnt/etc; sync"
        )
        console.shell("(while true; do sleep 1; done) & echo started")
        machine.save("booted")
        machine.quit()
    check_image(image)
    return image


@pytest.fixture
def image(booted: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "root.qcow2"
    shutil.copyfile(booted, copy)
    return copy


@pytest.fixture
def machine(image: Path, tmp_path: Path) -> Iterator[RunningMachine]:
    """A process that loaded what another process saved."""
    with RunningMachine(tmp_path / "machine", "--paused", *arguments(image)) as fresh:
        fresh.load("booted")
        fresh.execute("cont")
        yield fresh
        if fresh.process.poll() is None:
            fresh.quit()
    check_image(image)


FACTS = {
    "nonce": "cat /tmp/nonce",
    "disk": "cat /mnt/random /mnt/etc/* 2>/dev/null | md5sum",
    "device": "dd if=/dev/vda bs=1M count=8 skip=64 2>/dev/null | md5sum",
}


PASSING = ("ps", "{ps}", "sleep", "{sleep}", "[")


def facts(machine: RunningMachine) -> dict[str, object]:
    """What has to be the same again; of the processes those that last, by number and words."""
    lines = machine.console.shell("ps -o pid,args").splitlines()[1:]
    processes = [line for line in lines if not line.split(maxsplit=1)[1].startswith(PASSING)]
    assert len(processes) >= 3, lines
    same = {name: machine.console.shell(command) for name, command in FACTS.items()}
    return {**same, "processes": processes}


def monotonic(machine: RunningMachine) -> float:
    return float(machine.console.shell("cat /proc/uptime").split()[0])


def wreck(machine: RunningMachine) -> None:
    console = machine.console
    console.shell("echo gone >/tmp/nonce")
    console.shell("dd if=/dev/zero of=/mnt/random bs=1M count=4 2>/dev/null; rm -r /mnt/etc; sync")
    console.shell("sleep 1000 & sh -c 'while true; do sleep 7; done' & echo another")
    assert console.shell("cat /tmp/nonce") == "gone"


def test_fresh_process_goes_on_with_what_another_process_saved(machine: RunningMachine) -> None:
    assert re.fullmatch(r"[0-9a-f]{32}", machine.console.shell("cat /tmp/nonce"))
    assert machine.console.shell("mount | grep -c '/mnt type ext4'") == "1"


def test_running_guest_comes_back_with_its_memory_disk_processes_and_clock(machine: RunningMachine) -> None:
    before, clock = facts(machine), monotonic(machine)
    machine.save("one")
    wreck(machine)
    assert facts(machine) != before
    late = monotonic(machine)
    machine.load("one")
    assert machine.execute("query-status")["status"] == "running"
    back = monotonic(machine)
    assert facts(machine) == before
    assert clock <= back < late, "the monotonic clock goes on from the snapshot"
    assert monotonic(machine) > back, "and goes on"
    machine.console.shell("umount /mnt && mount -t ext4 /dev/vda /mnt && ls /mnt/etc")


def test_paused_guest_comes_back_paused_and_goes_on(machine: RunningMachine) -> None:
    before = facts(machine)
    machine.execute("stop")
    machine.save("asleep")
    assert machine.execute("query-status")["status"] == "paused"
    machine.execute("cont")
    wreck(machine)
    machine.execute("stop")
    machine.load("asleep")
    assert machine.execute("query-status")["status"] == "paused"
    machine.execute("cont")
    assert facts(machine) == before


def test_a_second_save_and_load_after_the_first_load(machine: RunningMachine) -> None:
    first = facts(machine)
    machine.save("one")
    wreck(machine)
    machine.load("one")
    machine.console.shell("echo second >/tmp/nonce; echo second >/mnt/second; sync")
    second = facts(machine)
    machine.save("two")
    wreck(machine)
    machine.load("two")
    assert facts(machine) == second
    assert machine.console.shell("cat /mnt/second") == "second"
    machine.load("one")
    assert facts(machine) == first
    machine.console.shell("test ! -e /mnt/second")
    machine.load("two")
    assert facts(machine) == second


def test_after_a_load_the_rtc_is_right_and_the_wall_clock_is_as_old_as_the_snapshot(
    machine: RunningMachine,
) -> None:
    def seconds(command: str) -> int:
        return int(machine.console.shell(command))

    age = 5
    machine.save("old")
    at_save, saved = seconds("date +%s"), time.time()
    while time.time() < saved + age:
        machine.console.shell("true")
    machine.load("old")
    loaded = time.time()
    assert seconds("date +%s") < at_save + age, "nobody has told the guest what time it is"
    assert seconds("cat /sys/class/rtc/rtc0/since_epoch") >= int(loaded)
    machine.console.shell("hwclock -s")
    assert seconds("date +%s") >= int(loaded)


def test_state_of_a_machine_with_other_memory_is_refused_by_name(image: Path, tmp_path: Path) -> None:
    words = arguments(image)
    words[1] = "128M"
    with RunningMachine(tmp_path / "small", "--paused", *words) as machine:
        with pytest.raises(StillframeError, match=r"riscv_virt_board\.ram"):
            machine.load("booted")
        assert machine.execute("query-status")["status"] == "prelaunch"
        machine.quit()


def test_self_checking_linux_finds_nothing_bad_over_twenty_rounds(tmp_path: Path) -> None:
    image = tmp_path / "root.qcow2"
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(image), "64M"], check=True)
    words = arguments(image, initrd="check-initrd", append="console=ttyS0 quiet period=20 mb=32")
    with RunningMachine(tmp_path / "machine", *words) as machine:
        console = machine.console
        beat = re.compile(r"^HB (\d+) .*bad=(\d+) nonce=(\w{16})\s", re.MULTILINE)

        def beats(count: int) -> tuple[int, str]:
            for _ in range(count):
                found = console.until(beat.pattern, 120)
                assert found.group(2) == "0", found.group()
            return int(found.group(1)), found.group(3)

        _, nonce = beats(10)
        for round_ in range(20):
            saved_at, _ = beats(1)
            machine.save(f"round{round_}")
            console.skip()
            after_save, _ = beats(5)
            before, _ = beats(30)
            machine.load(f"round{round_}")
            # What was printed before the load comes first; then the numbers fall back to the snapshot's.
            while (now := beats(1)[0]) > before:
                before = now
            assert saved_at < now <= after_save, "it goes on from the snapshot"
            _, same = beats(20)
            assert same == nonce
            if round_ % 5 == 4:
                machine.execute(
                    "snapshot-delete", job_id=f"d{round_}", tag=f"round{round_ - 2}", devices=["root"]
                )
        machine.quit()
    check_image(image)
