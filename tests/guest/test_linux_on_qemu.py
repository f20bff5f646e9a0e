"""The Linux guests of scripts/debian-guest as a stock QEMU runs them: x86 without and with UEFI, riscv64 with disks on PCI."""

import asyncio
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from guest.consoles import GuestProcess, pc_argv
from peers import checking_guest, linux_guest, peer
from stillframe.client import connect

APPEND = "console=ttyS0 quiet period=20 mb=16"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "root.qcow2"
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(path), "64M"], check=True)
    return path


def beats_without_fault(guest: GuestProcess, count: int, nonce: str) -> None:
    beats = [guest.heartbeat() for _ in range(count)]
    assert {(beat.bad, beat.nonce) for beat in beats} == {(0, nonce)}


def booted(guest: GuestProcess) -> str:
    """Wait until it checks memory and disk; its nonce. UEFI leaves the cursor in the middle of a line."""
    return guest.expect(r"boot nonce=([0-9a-f]{16}) pattern=16 disks=1\r")[1].decode()


def test_x86_guest_on_two_processors_goes_on_from_what_qemu_saved_and_notices_a_wreck(
    disk: Path, tmp_path: Path
) -> None:
    files = checking_guest("x86_64")
    monitor = tmp_path / "qmp"
    more = ["-smp", "2", "-qmp", f"unix:{monitor},server=on,wait=off"]
    words = pc_argv(
        "host", kernel=files["kernel"], initrd=files["check-initrd"], disk=disk, append=APPEND, more=more
    )

    def hmp(line: str) -> None:
        async def ask() -> Any:
            async with connect(f"unix:{monitor}") as client:
                return await client.execute("human-monitor-command", {"command-line": line})

        assert asyncio.run(ask()) == ""

    with GuestProcess(words) as guest:
        nonce = booted(guest)
        beats_without_fault(guest, 50, nonce)
        hmp("savevm one")
        before = guest.status()
        assert before["bad"] == 0
        assert before["workers"] == 1
        assert before["rounds"] > 0
        beats_without_fault(guest, 50, nonce)
        assert guest.command("wreck") == "ok wreck"
        guest.command("check")
        status = guest.status()
        assert min(status[kind] for kind in ("memory", "shared", "disk", "worker")) > 0
        hmp("loadvm one")
        assert guest.command("check") == "ok check bad=0"
        after = guest.status()
        assert after["nonce"] == int(nonce, 16)
        assert after["hb"] < status["hb"]
        beats_without_fault(guest, 50, nonce)
        assert guest.status()["rounds"] > after["rounds"]


def test_x86_guest_starts_under_uefi(disk: Path, tmp_path: Path) -> None:
    files = checking_guest("x86_64")
    variables = tmp_path / "vars.fd"
    shutil.copyfile(files["ovmf-vars"], variables)
    words = pc_argv(
        "host",
        kernel=files["kernel"],
        initrd=files["check-initrd"],
        disk=disk,
        firmware=(files["ovmf-code"], variables),
        append=APPEND,
    )
    with GuestProcess(words) as guest:
        nonce = booted(guest)
        beats_without_fault(guest, 20, nonce)
    assert variables.read_bytes() != files["ovmf-vars"].read_bytes(), "the firmware keeps its variables there"


class Agent:
    """QEMU's guest agent at the other end of its socket."""

    def __init__(self, connection: socket.socket) -> None:
        self._lines = connection.makefile("rw")

    def ask(self, command: str, **arguments: Any) -> Any:
        """What it returns; fails with its error."""
        self._lines.write(json.dumps({"execute": command, "arguments": arguments}) + "\n")
        self._lines.flush()
        reply = json.loads(self._lines.readline())
        assert "return" in reply, reply
        return reply["return"]


def agent_argv(architecture: str, disk: Path, more: Sequence[str]) -> list[str]:
    files = linux_guest(architecture)
    kernel, initrd = files["kernel"], files["agent-initrd"]
    if architecture == "x86_64":
        return pc_argv("host", kernel=kernel, initrd=initrd, disk=disk, more=more)
    words = [peer("qemu-system-riscv64", "host"), "-machine", "virt", "-m", "256", "-nodefaults"]
    words += ["-display", "none", "-serial", "stdio", "-append", "console=ttyS0 quiet"]
    words += ["-kernel", str(kernel), "-initrd", str(initrd)]
    words += ["-blockdev", f"qcow2,node-name=root,file.driver=file,file.filename={disk}"]
    return [*words, "-device", "virtio-blk-pci,drive=root", *more]


@contextmanager
def agent_at(path: Path) -> Iterator[Agent]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(60)
        connection.connect(str(path))
        yield Agent(connection)


@pytest.mark.parametrize("architecture", ["x86_64", "riscv64"])
def test_guest_agent_freezes_thaws_and_sets_the_clock(architecture: str, disk: Path, tmp_path: Path) -> None:
    port = tmp_path / "agent"
    more = ["-device", "virtio-serial-pci", "-chardev", f"socket,id=agent,path={port},server=on,wait=off"]
    more += ["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]
    with GuestProcess(agent_argv(architecture, disk, more)) as guest:
        guest.expect(r"^stillframe: shell ready")
        guest.expect(r"~ # ")
        guest.send("mkfs.ext4 -q /dev/vda && mount /dev/vda /mnt; echo mounted=$?")
        assert guest.expect(r"^mounted=(\d+)\r")[1] == b"0"
        with agent_at(port) as agent:
            assert agent.ask("guest-sync", id=7) == 7
            assert agent.ask("guest-fsfreeze-freeze") == 1
            assert agent.ask("guest-fsfreeze-status") == "frozen"
            assert agent.ask("guest-fsfreeze-thaw") == 1
            assert agent.ask("guest-set-time", time=2_000_000_000 * 10**9) == {}
            guest.send("echo since=$(date +%s) chip=$(cat /sys/class/rtc/rtc0/since_epoch)")
            since, chip = map(int, guest.expect(r"^since=(\d+) chip=(\d+)\r").groups())
            assert 2_000_000_000 <= min(since, chip) <= max(since, chip) < 2_000_001_000
