"""Guests that an unmodified QEMU runs for stillframe: what the tests of that engine share."""

import os
import shlex
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from peers import checking_guest, peer
from running import RunningMachine
from stillframe.client import Client
from stillframe.client.job import JobState
from stillframe.events import EventBus
from stillframe.machine.build import MachineHome, QemuConfig, QemuMachine
from stillframe.machine.console import LogConsole

VERSIONS = ["7.2", "10.0"]
BEAT = r"HB (\d+) t=\d+ gap=\d+ bad=(\d+) nonce=([0-9a-f]+)"
MACHINE = "pc-q35-7.2"
CPU = "qemu64,-cx16"
"""See docs/guest.md: with it, 7.2 sometimes fails to start this kernel."""
KVM = os.environ.get("STILLFRAME_ACCEL") == "kvm"
"""Whether guests of x86-64 are to run with it: `make kvm`. Else QEMU has all of its own."""
ON_KVM = ("-accel", "kvm", "-cpu", "host")
APPEND = "console=ttyS0 quiet no_timer_check period=20 mb=16"


def versions(group: str) -> list[Any]:
    """A test's versions of QEMU; tests with one version of the same group share a worker, and a fixture's machine."""
    return [
        pytest.param(version, marks=pytest.mark.xdist_group(f"{group}-{version}")) for version in VERSIONS
    ]


def create(image: Path, size: str = "64M") -> None:
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(image), size], check=True)


def check_image(image: Path, *, in_use: bool = False) -> None:
    """A machine at work has clusters that it will use: they look lost, and nothing else is wrong."""
    done = subprocess.run([peer("qemu-img"), "check", "-U", str(image)], stdout=subprocess.PIPE, text=True)
    assert done.returncode in ((0, 3) if in_use else (0,)), done.stdout


def disk(image: Path, name: str = "root", driver: str = "qcow2", *, read_only: bool = False) -> list[str]:
    """The words for a node, of stillframe's command line."""
    more = ",read-only=on" if read_only else ""
    return ["--blockdev", f"driver={driver},node-name={name},file.driver=file,file.filename={image}{more}"]


def image_in(directory: Path) -> Path:
    """The image of the disk `root`; it is made where there is none."""
    image = directory / "root.qcow2"
    if not image.exists():
        directory.mkdir(parents=True, exist_ok=True)
        create(image)
    return image


def without_userfaultfd(directory: Path, program: str) -> str:
    """A script that runs `program` where the kernel gives it no userfaultfd for its own accesses to memory.

    A process of root's gets one by its rights or by the device; anybody else has none as hosts are usually set up.
    """
    script = directory / "no-userfaultfd"
    command = f'exec {shlex.quote(program)} "$@"'
    if os.geteuid() == 0:
        without = "setpriv --bounding-set -sys_ptrace --inh-caps -sys_ptrace"
        inner = f'mount --bind /dev/null /dev/userfaultfd; exec {without} {shlex.quote(program)} "$@"'
        command = f'exec unshare --mount sh -c {shlex.quote(inner)} sh "$@"'
    script.write_text(f"#!/bin/sh\n{command}\n")
    script.chmod(0o755)
    return str(script)


def free_port() -> int:
    """Of TCP, on the loopback address, where nobody listens just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def free_display() -> str:
    """Words for `-vnc`. Each test has an address of its own: while one moves its display, another's QEMU would take the place."""
    number = free_port() - 5900
    return f"127.0.0.1:{number},to={number}"


def starting_while(there: Path, program: str) -> str:
    """A script that runs `program`, with the words in the file `there` behind its own, as long as there is that file."""
    script = there.with_name("starting-while")
    file = shlex.quote(str(there))
    refusal = f"[ -e {file} ] || {{ echo 'no, not again' >&2; exit 1; }}"
    script.write_text(f'#!/bin/sh\n{refusal}\nexec {shlex.quote(program)} "$@" $(cat {file})\n')
    script.chmod(0o755)
    return str(script)


@dataclass(frozen=True, slots=True)
class Board:
    """What differs between the guests' architectures."""

    machine: str
    words: tuple[str, ...]
    devices: str


BOARDS = {
    "x86_64": Board(MACHINE, (*(ON_KVM if KVM else ("-cpu", CPU)), "-nodefaults", "-no-user-config"), "pci"),
    "riscv64": Board("virt", (), "device"),
}


class QemuGuest(RunningMachine):
    """`stillframe run` with a QEMU whose guest has a heartbeat, and a disk `root`."""

    def beat(self) -> int:
        """The number of a heartbeat to come; it found no fault."""
        self.console.skip()
        found = self.console.until(BEAT)
        assert found[2] == "0", found[0]
        return int(found[1])

    def tags(self) -> list[str]:
        """The snapshots of the first disk."""
        block = next(each for each in self.execute("query-block") if each["inserted"]["node-name"] == "root")
        return [each["name"] for each in block["inserted"]["image"].get("snapshots", ())]

    def job(self, command: str, tag: str, *devices: str, **more: Any) -> JobState:
        """Run `snapshot-save` or another; how it was done.

        :param more: further arguments. :raise StillframeError: it failed.
        """
        nodes = devices or ("root",)
        arguments: dict[str, Any] = {"tag": tag, "vmstate": nodes[0], "devices": list(nodes), **more}

        async def run(client: Client) -> JobState:
            return await client.run_job(command, arguments)

        return self.talk(run)

    def way(
        self, command: str, tag: str, *devices: str, what: str = "memory", **more: Any
    ) -> tuple[str, str]:
        """Run it; which way it was done, and why not better."""
        done = self.job(command, tag, *devices, **more)
        return next((each.chosen, each.why) for each in done.choices if each.what == what)

    def status(self) -> str:
        """The run state, in QEMU's word."""
        return str(self.execute("query-status")["status"])


class GuestMachine(QemuGuest):
    """`stillframe run --engine qemu` with a Linux guest on one disk, `root`.

    :param version: of QEMU; see `VERSIONS`. :param options: further ones of ours. :param words: further ones of QEMU's.
    :param program: instead of that version's. :param initrd: "check-initrd" or another of `linux_guest`; None for no Linux at all.
    :param flash: node-name, driver and image of each bank; that called "code" is read-only.
    """

    def __init__(
        self,
        directory: Path,
        version: str,
        *options: str,
        words: Sequence[str] = (),
        program: str | None = None,
        initrd: str | None = "check-initrd",
        append: str = APPEND,
        flash: Sequence[tuple[str, str, Path]] = (),
        memory: str = "128M",
        architecture: str = "x86_64",
    ) -> None:
        files, board = checking_guest(architecture), BOARDS[architecture]
        self.version = version
        self.able = True
        """Whether its QEMU may track what the guest writes."""
        self.image = image_in(directory)
        program = program or peer(f"qemu-system-{architecture}", version)
        ours = ["--engine", "qemu", "--qemu", program, "--machine", board.machine, "--memory", memory]
        if initrd is not None:
            ours += ["--kernel", str(files["kernel"]), "--initrd", str(files[initrd]), "--append", append]
        ours += [*disk(self.image), "--device", f"virtio-blk-{board.devices},drive=root", *options]
        for name, driver, path in flash:
            ours += [*disk(path, name, driver, read_only=name == "code"), "--flash", name]
        ours += ["--", *board.words, "-device", f"virtio-rng-{board.devices},id=rng", *words]
        super().__init__(directory / "machine", *ours)


def qemu_words(version: str, image: Path, *more: str) -> list[str]:
    """QEMU alone, with the same guest and the same devices on x86-64; its console on stdin and stdout."""
    files, board = checking_guest("x86_64"), BOARDS["x86_64"]
    words = [peer("qemu-system-x86_64", version), "-machine", board.machine, "-m", "128M", *board.words]
    words += ["-display", "none", "-serial", "stdio"]
    words += ["-kernel", str(files["kernel"]), "-initrd", str(files["check-initrd"]), "-append", APPEND]
    words += ["-blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"]
    return [*words, "-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci,id=rng", *more]


@contextmanager
def machine_within(
    directory: Path,
    program: str,
    ready: str,
    *,
    kernel: Path,
    append: str,
    initrd: Path | None = None,
    agent: bool = False,
    words: Sequence[str] = (),
    home: MachineHome | None = None,
) -> Iterator[QemuMachine]:
    """A machine in this process, without disks, when its guest has said `ready`.

    :param words: further ones of QEMU's. :param home: with a record; the caller's to close.
    """
    log = directory / "console"
    with closing(MachineHome.temporary()) as temporary, closing(LogConsole(log)) as console:
        config = QemuConfig(
            name=None,
            program=program,
            machine_type=MACHINE,
            memory_size=128 << 20,
            kernel=kernel,
            initrd=initrd,
            append=append,
            bios=None,
            devices=(),
            nodes=(),
            flash=(),
            words=(*BOARDS["x86_64"].words, "-device", "virtio-rng-pci", *words),
            console=console,
            agent=agent,
            home=home or temporary,
            keep_after_shutdown=False,
            reconnect_seconds=0,
        )
        with closing(QemuMachine(config, EventBus())) as machine:
            machine.start()
            while ready.encode() not in log.read_bytes():
                assert not machine.wait(0.05), machine.failure
            yield machine
