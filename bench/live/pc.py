"""x86-64 Linux guests for the benchmarks: with QEMU as our engine, or with QEMU alone; the same words for both."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from guests import OURS, Guest, started

from peers import checking_guest, peer
from running import STILLFRAME

THEIRS = "QEMU"
PERIOD_MS = 20
DIRTY = 8
"""Pages that the guest rewrites a beat."""


@dataclass(frozen=True)
class Size:
    """A guest. :param memory: MiB. :param filled: MiB of it that are not zero."""

    memory: int
    filled: int


def words_of(
    side: str, version: str, directory: Path, image: Path, memory: int, initrd: str, append: str
) -> list[str]:
    """A command line. :param version: of the QEMU, for both sides. :param initrd: see `scripts/debian-guest`."""
    files = checking_guest("x86_64")
    qmp, serial = directory / "qmp", directory / "console"
    qemu = peer("qemu-system-x86_64", version)
    # Modes of caching as both have them if nothing is said; see docs/guest.md for the processor.
    node = f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"
    machine, boot = "pc-q35-7.2", f"console=ttyS0 quiet no_timer_check {append}".strip()
    devices = ["-cpu", "qemu64,-cx16", "-nodefaults", "-no-user-config", "-device", "virtio-rng-pci,id=rng"]
    if side == OURS:
        words = [*STILLFRAME, "run", "--engine", "qemu", "--qemu", qemu, "--machine", machine]
        words += ["--memory", f"{memory}M", "--kernel", str(files["kernel"]), "--initrd", str(files[initrd])]
        words += ["--append", boot, "--qmp", f"unix:{qmp}", "--console", f"unix:{serial}"]
        words += ["--blockdev", node, "--device", "virtio-blk-pci,drive=root"]
        return [*words, "--", *devices]
    words = [qemu, "-machine", machine, "-m", str(memory), "-display", "none", *devices]
    words += ["-kernel", str(files["kernel"]), "-initrd", str(files[initrd]), "-append", boot]
    words += ["-qmp", f"unix:{qmp},server=on,wait=off", "-serial", f"unix:{serial},server=on,wait=on"]
    return [*words, "-blockdev", node, "-device", "virtio-blk-pci,drive=root"]


@contextmanager
def checking(side: str, version: str, directory: Path, image: Path, size: Size) -> Iterator[Guest]:
    """The guest that checks itself and has a heartbeat."""
    directory.mkdir()
    append = f"mb={size.filled} dirty={DIRTY} period={PERIOD_MS}"
    words = words_of(side, version, directory, image, size.memory, "check-initrd", append)
    with started(words, directory, r"^HB 3 ") as machine:
        yield machine


@contextmanager
def shell(side: str, version: str, directory: Path, image: Path) -> Iterator[Guest]:
    """A shell."""
    directory.mkdir()
    words = words_of(side, version, directory, image, 256, "initrd", "")
    with started(words, directory, r"^stillframe: shell ready") as machine:
        machine.console.until("~ # ")
        yield machine
