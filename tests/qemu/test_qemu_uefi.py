"""A machine with UEFI: OVMF, its code and its variables in flash, the variables raw and left out, or qcow2 and included.

What writes the variables is the firmware's own shell; no system is started.
"""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from peers import linux_guest, peer
from qemu_guests import GuestMachine, QemuGuest, check_image, create, disk
from stillframe.errors import StillframeError

_VARIABLE = "Mark -guid 9ae6e1f2-37f8-4d5c-b6a5-0f3b8a5c7d11"


class Shell(QemuGuest):
    """OVMF's shell, on the console."""

    def shell(self, line: str) -> str:
        """What the firmware's shell prints until its next prompt."""
        self.console.skip()
        self.console.type(f"{line}\r")
        before = len(self.console.text)
        self.console.until(r"Shell> ")
        return re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", self.console.text[before:])

    def mark(self, text: str) -> None:
        self.shell(f"setvar {_VARIABLE} -nv -bs =H{text.encode().hex()}")
        assert self.marked(text)

    def marked(self, text: str) -> bool:
        """Whether the variable is that, to the firmware that runs."""
        return " ".join(f"{each:02X}" for each in text.encode()) in self.shell(f"setvar {_VARIABLE}")


class Firmware(Shell, GuestMachine):
    """OVMF's shell, and a second disk whose size is no whole number of sectors of any cluster."""

    def __init__(self, directory: Path, version: str, driver: str, *options: str) -> None:
        files = linux_guest("x86_64")
        self.variables = directory / "vars"
        self.driver = driver
        self.nodes = ("root", "data", "vars") if driver == "qcow2" else ("root", "data")
        if not self.variables.exists():
            directory.mkdir(parents=True)
            words = ["convert", "-f", "raw", "-O", driver, str(files["ovmf-vars"]), str(self.variables)]
            subprocess.run([peer("qemu-img"), *words], check=True)
            create(directory / "data.qcow2", str((3 << 20) + 512))
            with (directory / "raw").open("wb") as raw:
                raw.truncate((5 << 20) + 512)
        more = [*disk(directory / "data.qcow2", "data"), "--device", "virtio-blk-pci,drive=data"]
        more += [*disk(directory / "raw", "raw", "raw"), "--device", "virtio-blk-pci,drive=raw,id=raw0"]
        more += ["--device", "pcie-root-port,id=rp0"]
        flash = [("code", "raw", files["ovmf-code"]), ("vars", driver, self.variables)]
        super().__init__(directory, version, *more, *options, initrd=None, flash=flash)

    def content(self) -> bytes:
        """The image's bytes; of a qcow2 image, which is ours alone while the machine runs, none."""
        return self.variables.read_bytes() if self.driver == "raw" else b""


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            (version, driver), marks=pytest.mark.xdist_group(f"uefi-{driver}"), id=f"{version}-{driver}"
        )
        for version, driver in (("7.2", "raw"), ("10.0", "qcow2"))
    ],
)
def machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Firmware]:
    version, driver = request.param
    directory = tmp_path_factory.mktemp("uefi") / "guest"
    with Firmware(directory, version, driver, "--name", f"uefi-{os.getpid()}-{driver}") as machine:
        machine.console.until("seconds to skip", 120)
        machine.console.type("\x1b")
        machine.console.until("Shell> ")
        yield machine
        if machine.process.poll() is None:
            machine.quit()
        check_image(machine.image)


def test_load_brings_the_variables_back_and_says_what_was_left_out(machine: Firmware) -> None:
    machine.mark("first")
    saved = machine.job("snapshot-save", "one", *machine.nodes)
    before = machine.content()
    machine.mark("other")
    assert machine.content() != before or machine.driver == "qcow2"
    loaded = machine.job("snapshot-load", "one", *machine.nodes)
    assert machine.marked("first")
    assert machine.content() == before
    for job in (saved, loaded):
        left_out = {each.chosen: each.why for each in job.choices if each.what == "left-out"}
        assert set(left_out) == ({"raw", "vars"} if machine.driver == "raw" else {"raw"})
        assert "it is not listed" in left_out["raw"]
        if machine.driver == "raw":
            assert "it is flash" in left_out["vars"]


def test_load_that_fails_leaves_the_variables_as_they_were(machine: Firmware) -> None:
    if "one" not in machine.tags():
        machine.mark("first")
        machine.job("snapshot-save", "one", *machine.nodes)
    machine.mark("other")
    before = machine.content()
    # The state is of a machine without this device.
    machine.execute("device_add", driver="virtio-balloon-pci", id="new", bus="rp0")
    machine.job("snapshot-save", "with-another", *machine.nodes)
    with pytest.raises(StillframeError, match="does not take the machine state"):
        machine.load("with-another", *machine.nodes)
    assert machine.content() == before
    assert machine.marked("other")
    machine.load("one", *machine.nodes)
    assert machine.marked("first")


def test_machine_with_several_images_and_flash_is_taken_over(machine: Firmware, tmp_path: Path) -> None:
    """The last of this machine."""
    machine.mark("saved")
    machine.job("snapshot-save", "before", *machine.nodes)
    machine.mark("later")
    machine.kill()
    with Shell(tmp_path / "again", "--adopt", f"uefi-{os.getpid()}-{machine.driver}") as again:
        assert again.marked("later")
        again.job("snapshot-save", "after", *machine.nodes)
        again.load("before", *machine.nodes)
        assert again.marked("saved")
        again.load("after", *machine.nodes)
        assert again.marked("later")
        again.quit()
    files = {"root": "root.qcow2", "data": "data.qcow2"}
    for name in machine.nodes:
        check_image(machine.variables.parent / files.get(name, name), in_use=True)
