"""Machines whose guest a QEMU runs, for tests: with the checking Linux guest, or with the small one of heartbeat.c."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from machine.qemu.qemus import built_guest
from peers import checking_guest, peer
from running import RunningMachine

VERSIONS = ["7.2", "10.0"]
BEAT = r"HB (\d+) t=\d+ gap=\d+ bad=(\d+) nonce=([0-9a-f]+)"
MACHINE = "pc-q35-7.2"
CPU = "qemu64,-cx16"
"""See docs/guest.md: with it, 7.2 sometimes fails to start this kernel."""
APPEND = "console=ttyS0 quiet no_timer_check period=20 mb=16"


def qemu_words(version: str, image: Path, *more: str) -> list[str]:
    """QEMU alone, with the same devices."""
    files = checking_guest("x86_64")
    words = [peer("qemu-system-x86_64", version), "-machine", MACHINE, "-m", "128M"]
    words += ["-cpu", CPU, "-nodefaults"]
    words += ["-no-user-config", "-display", "none", "-serial", "stdio"]
    words += ["-kernel", str(files["kernel"]), "-initrd", str(files["check-initrd"]), "-append", APPEND]
    words += ["-blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"]
    return [*words, "-device", "virtio-blk-pci,drive=root", "-device", "virtio-rng-pci,id=rng", *more]


class QemuMachine(RunningMachine):
    """`stillframe run --engine qemu` with the checking guest on one disk."""

    def __init__(self, directory: Path, version: str, *more: str) -> None:
        files = checking_guest("x86_64")
        self.version = version
        self.image = directory / "root.qcow2"
        if not self.image.exists():
            directory.mkdir(parents=True, exist_ok=True)
            create(self.image)
        words = ["--engine", "qemu", "--qemu", peer("qemu-system-x86_64", version), "--machine", MACHINE]
        words += ["--memory", "128M", "--kernel", str(files["kernel"])]
        words += ["--initrd", str(files["check-initrd"]), "--append", APPEND]
        words += ["--blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={self.image}"]
        words += ["--device", "virtio-blk-pci,drive=root", *more, "--", "-cpu", CPU]
        words += ["-nodefaults", "-no-user-config", "-device", "virtio-rng-pci,id=rng"]
        super().__init__(directory / "machine", *words)

    def beat(self) -> int:
        """The number of a heartbeat to come; it found no fault."""
        self.console.skip()
        found = self.console.until(BEAT)
        assert found[2] == "0", found[0]
        return int(found[1])

    def delete(self, tag: str) -> None:
        self.talk(lambda client: client.delete(tag, devices=["root"]))


class SmallMachine(RunningMachine):
    """A guest without a use for its disk, which is up in a quarter of a second and checks its memory.

    :param dying: WHO and N, as tests/qemu/dying.py takes them; None: nobody is killed.
    """

    def __init__(
        self, directory: Path, version: str, *more: str, dying: tuple[str, int] | None = None
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.version = version
        self.image = directory / "root.qcow2"
        self.died = directory / "died"
        self.died.unlink(missing_ok=True)
        if not self.image.exists():
            create(self.image)
        if dying is not None:
            script = Path(__file__).resolve().parent.parent / "qemu" / "dying.py"
            self.program = (sys.executable, str(script), dying[0], str(dying[1]), str(self.died))
        words = ["--engine", "qemu", "--qemu", peer("qemu-system-x86_64", version), "--machine", MACHINE]
        words += ["--memory", "64M", "--kernel", str(small_guest()), "--append", "mb=16"]
        words += ["--blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={self.image}"]
        words += ["--device", "virtio-blk-pci,drive=root", *more]
        words += ["--", "-cpu", "qemu64", "-nodefaults", "-no-user-config"]
        super().__init__(directory / "machine", *words)


@cache
def small_guest() -> Path:
    """The kernel of `SmallMachine`."""
    return built_guest(Path(mkdtemp()))


def beat(machine: RunningMachine) -> int:
    """The number of a heartbeat to come; it found no fault."""
    machine.console.skip()
    found = machine.console.until(BEAT)
    assert found[2] == "0", found[0]
    return int(found[1])


def tags(machine: RunningMachine) -> list[str]:
    (block,) = machine.execute("query-block")
    return [each["name"] for each in block["inserted"]["image"].get("snapshots", ())]


def create(image: Path) -> None:
    subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", str(image), "64M"], check=True)


def check_image(image: Path, *, in_use: bool = False) -> None:
    """A machine at work has clusters that it will use: they look lost, and nothing else is wrong."""
    done = subprocess.run([peer("qemu-img"), "check", "-U", str(image)], stdout=subprocess.PIPE, text=True)
    assert done.returncode in ((0, 3) if in_use else (0,)), done.stdout


LONG = bool(os.environ.get("STILLFRAME_LONG"))
STEPS = {"save": 26, "load": 30}
"""About as many there are."""


def steps(operation: str, count: int) -> Iterator[int]:
    """Numbers of steps to die at."""
    if LONG:
        yield from range(1000)
    day = int(time.time() // 86400)
    for number in range(count):
        yield (day * 7 + number * STEPS[operation] // count) % STEPS[operation]


def qemus_of(directory: Path) -> list[int]:
    """Processes that have a word of this directory on their command line, and are QEMUs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if os.fsencode(directory) in words and b"stillframe-qmp" in words:
            found.append(int(path.parent.name))
    return found


def qemu_of(runtime: Path) -> int:
    """The only QEMU there, by the directory of machines' names."""
    (pid,) = qemus_of(runtime.parent)
    return pid


def listed(image: Path) -> list[str]:
    done = subprocess.run(
        [peer("qemu-img"), "snapshot", "-l", "-U", str(image)], stdout=subprocess.PIPE, text=True, check=True
    )
    return [line.split()[1] for line in done.stdout.splitlines()[2:]]
