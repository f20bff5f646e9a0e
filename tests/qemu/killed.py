"""Machines of which a process is killed: with the small guest of heartbeat.c, at a step, and what is left then."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from machine.qemu.qemus import built_guest
from peers import peer
from qemu_guests import KVM, MACHINE, ON_KVM, QemuGuest, disk, image_in


class SmallMachine(QemuGuest):
    """A guest without a use for its disk, which is up in a quarter of a second and checks its memory.

    :param dying: WHO and N, as dying.py takes them; None: nobody is killed. :param words: further ones of QEMU's.
    :param program: instead of that version's.
    """

    def __init__(
        self,
        directory: Path,
        version: str,
        *more: str,
        dying: tuple[str, int] | None = None,
        words: Sequence[str] = (),
        program: str | None = None,
        machine: str = MACHINE,
        memory: str = "64M",
    ) -> None:
        self.image = image_in(directory)
        self.died = directory / "died"
        self.died.unlink(missing_ok=True)
        if dying is not None:
            script = Path(__file__).with_name("dying.py")
            self.program = (sys.executable, str(script), dying[0], str(dying[1]), str(self.died))
        program = program or peer("qemu-system-x86_64", version)
        ours = ["--engine", "qemu", "--qemu", program, "--machine", machine, "--memory", memory]
        ours += ["--kernel", str(small_guest()), "--append", "mb=16"]
        ours += [*disk(self.image), "--device", "virtio-blk-pci,drive=root", *more]
        ours += ["--", *(ON_KVM if KVM else ("-cpu", "qemu64")), "-nodefaults", "-no-user-config", *words]
        super().__init__(directory / "machine", *ours)


@cache
def small_guest() -> Path:
    """The kernel of `SmallMachine`."""
    return built_guest(Path(mkdtemp()))


_KVM_SECONDS = 10.0


@cache
def why_no_kvm() -> str:
    """What the small guest says against running with KVM here; empty where it runs."""
    words = [
        peer("qemu-system-x86_64", "7.2"),
        *ON_KVM,
        "-machine",
        MACHINE,
        "-nodefaults",
        "-no-user-config",
    ]
    words += [
        "-display",
        "none",
        "-m",
        "64",
        "-kernel",
        str(small_guest()),
        "-append",
        "mb=16",
        "-serial",
        "stdio",
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        timer = threading.Timer(_KVM_SECONDS, process.kill)
        timer.start()
        said = ""
        try:
            for line in process.stdout or ():
                said = line.decode("utf-8", "replace").strip()
                if said.startswith("HB 3 "):
                    return ""
        finally:
            timer.cancel()
            process.kill()
    return said or f"a guest that needs a quarter of a second said nothing for {_KVM_SECONDS:g}"


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
