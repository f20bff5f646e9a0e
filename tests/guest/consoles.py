"""A guest in a process of its own, its console on pipes: the same for QEMU and for stillframe."""

import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from peers import ROOT, peer

GUEST = ROOT / "src" / "stillframe" / "data" / "guest.elf"
RUNNERS = ("qemu host", "qemu 10.0", "unicorn")
"""What a guest can run on: parametrise with these what must hold on all."""

_PATIENCE = 60.0


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A line `HB n t=MS gap=US bad=N nonce=HEX` of either self-checking guest."""

    number: int
    milliseconds: int
    bad: int
    nonce: str


def argv(
    runner: str,
    kernel: Path,
    *,
    disk: Path | None = None,
    flash: Path | None = None,
    initrd: Path | None = None,
    append: str = "",
    memory: int = 128,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line that starts a guest, its console on stdin and stdout.

    :param runner: one of `RUNNERS`. :param disk: a qcow2 image. :param flash: a raw image of 32 MiB.
    :param memory: MiB. :param more: words of the runner's own.
    """
    kind, _, version = runner.partition(" ")
    if kind == "qemu":
        # Monitors off: a QEMU under test must not take the console's bytes for its own.
        words = [
            peer("qemu-system-riscv64", version),
            "-machine",
            "virt",
            "-m",
            str(memory),
            "-display",
            "none",
        ]
        words += ["-serial", "stdio", "-monitor", "none", "-kernel", str(kernel), "-append", append]
        words += ["-global", "virtio-mmio.force-legacy=false", "-device", "virtio-rng-device"]
        if disk:
            words += ["-blockdev", f"qcow2,node-name=root,file.driver=file,file.filename={disk}"]
            words += ["-device", "virtio-blk-device,drive=root"]
        if flash:
            words += ["-drive", f"if=pflash,unit=1,format=raw,file={flash}"]
        if initrd:
            words += ["-initrd", str(initrd)]
    else:
        words = [sys.executable, "-m", "stillframe", "run", "--engine", "unicorn", "--memory", f"{memory}M"]
        words += ["--console", "stdio", "--kernel", str(kernel), "--append", append]
        if disk:
            words += ["--blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={disk}"]
            words += ["--device", "virtio-blk,drive=root"]
        if flash:
            words += ["--blockdev", f"driver=raw,node-name=vars,file.driver=file,file.filename={flash}"]
            words += ["--flash", "vars"]
        if initrd:
            words += ["--initrd", str(initrd)]
    return [*words, *more]


def pc_argv(
    version: str,
    *,
    kernel: Path,
    initrd: Path,
    disk: Path,
    firmware: tuple[Path, Path] | None = None,
    append: str = "console=ttyS0 quiet",
    memory: int = 256,
    more: Sequence[str] = (),
) -> list[str]:
    """The command line of a QEMU that starts an x86-64 Linux, its console on stdin and stdout, its disk /dev/vda.

    Without CMPXCHG16B: QEMU 7.2's TCG sometimes leaves wrong flags behind it, and Linux dies of a double fault while it starts.
    The entropy device saves it the half second in which a kernel without one gathers its random numbers.

    :param version: one of `QEMU_VERSIONS`. :param disk: a qcow2 image. :param memory: MiB.
    :param firmware: OVMF's code and this machine's own copy of its variables; without it SeaBIOS starts the kernel.
    """
    words = [peer("qemu-system-x86_64", version), "-machine", "q35", "-m", str(memory), "-nodefaults"]
    words += ["-display", "none", "-serial", "stdio", "-device", "virtio-rng-pci"]
    words += ["-cpu", "qemu64,-cx16"]
    words += ["-kernel", str(kernel), "-initrd", str(initrd), "-append", append]
    words += ["-blockdev", f"qcow2,node-name=root,file.driver=file,file.filename={disk}"]
    words += ["-device", "virtio-blk-pci,drive=root"]
    if firmware:
        code, variables = firmware
        words += ["-drive", f"if=pflash,unit=0,format=raw,readonly=on,file={code}"]
        words += ["-drive", f"if=pflash,unit=1,format=raw,file={variables}"]
    return [*words, *more]


class GuestProcess:
    """A running guest; leaving the `with` kills it if it has not ended."""

    def __init__(self, words: Sequence[str]) -> None:
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._unread = b""
        self.seen = b""

    @property
    def pid(self) -> int:
        """Of the process that runs the guest."""
        return self._process.pid

    def __enter__(self) -> "GuestProcess":
        return self

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.communicate()

    def send(self, text: str) -> None:
        """Type a line."""
        assert self._process.stdin is not None
        self._process.stdin.write(text.encode() + b"\n")
        self._process.stdin.flush()

    def expect(self, pattern: str) -> re.Match[bytes]:
        """The first match in what the guest printed since the last; fails when the guest ends or falls silent."""
        assert self._process.stdout is not None
        wanted = re.compile(pattern.encode(), re.MULTILINE)
        deadline = time.monotonic() + _PATIENCE
        while True:
            if match := wanted.search(self._unread):
                self._unread = self._unread[match.end() :]
                return match
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._process.stdout.fileno(), 65536) if ready else b""
            if not data:
                tail = self.seen[-2000:].decode(errors="replace")
                why = "ended" if ready else f"was silent for {_PATIENCE:.0f} s"
                pytest.fail(f"the guest {why} before it printed {pattern!r}; its last words:\n{tail}")
            self._unread += data
            self.seen += data

    def drain(self) -> str:
        """All that the guest has printed by now."""
        assert self._process.stdout is not None
        while select.select([self._process.stdout], [], [], 0)[0]:
            data = os.read(self._process.stdout.fileno(), 65536)
            if not data:
                break
            self._unread += data
            self.seen += data
        return self.seen.decode(errors="replace")

    def command(self, text: str) -> str:
        """Type a command of a self-checking guest; its closing line, "ok ..." or "error: ..."."""
        self.send(text)
        return self.expect(r"^(ok\b|error:)[^\r\n]*(?=\r?\n)")[0].decode()

    def heartbeat(self) -> Heartbeat:
        """The next heartbeat."""
        match = self.expect(r"^HB (\d+) t=(\d+) gap=\d+ bad=(\d+) nonce=([0-9a-f]{16})\r?\n")
        return Heartbeat(int(match[1]), int(match[2]), int(match[3]), match[4].decode())

    def status(self) -> dict[str, int]:
        """The counters of `status`, by name; the nonce, too, as a number."""
        line = self.command("status")
        return {
            key: int(value, 16 if key == "nonce" else 10) for key, value in re.findall(r"(\w+)=(\w+)", line)
        }

    def wait(self) -> int:
        """The exit status, once the guest is off."""
        return self._process.wait(_PATIENCE)
