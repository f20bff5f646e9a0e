"""Debian's libvirt, and what it makes of `stillframe-qemu`: the real virsh, the real probe, a real domain."""

import os
import re
import select
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli.libvirt import Libvirt, VirshError
from peers import ROOT
from running import PATIENCE, stillframe

DOCUMENT = ROOT / "docs" / "libvirt.md"
ENTROPY = "<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>"
SERIAL = "<serial type='pty'/>"
DOMAIN = f"""
<domain type='qemu'>
  <name>box</name>
  <memory unit='MiB'>64</memory>
  <os>
    <type arch='riscv64' machine='virt'>hvm</type>
    <kernel>{ROOT / "src" / "stillframe" / "data" / "guest.elf"}</kernel>
    <cmdline>mb=2 quiet=1</cmdline>
  </os>
  {{machine}}
  <devices>
    <emulator>{{emulator}}</emulator>
    <disk type='file' device='disk'>
      <driver name='qemu' type='qcow2'/>
      <source file='{{image}}'/>
      <target dev='vda' bus='virtio'/>
    </disk>
    {{devices}}
    <memballoon model='none'/>
  </devices>
</domain>"""


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libvirt]:
    with Libvirt(tmp_path_factory.mktemp("libvirt")) as libvirt:
        yield libvirt


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "box.qcow2"
    stillframe("image", "create", str(path), "16M", check=True)
    return path


@contextmanager
def defined(libvirt: Libvirt, image: Path, *, machine: str = "", devices: str = SERIAL) -> Iterator[None]:
    """A domain `box` with this disk. :param machine: and what stands beside its devices."""
    path = image.with_suffix(".xml")
    path.write_text(DOMAIN.format(emulator=libvirt.emulator, image=image, machine=machine, devices=devices))
    libvirt.virsh(f"define {path}")
    try:
        yield
    finally:
        with suppress(VirshError):
            libvirt.virsh("destroy box")
        libvirt.virsh("undefine box --snapshots-metadata")


def words(tree: ElementTree.Element, path: str) -> set[str]:
    return {found.text or "" for found in tree.findall(path)}


def test_libvirt_finds_out_what_a_machine_here_can_have(libvirt: Libvirt) -> None:
    host = ElementTree.fromstring(libvirt.virsh("capabilities"))
    domain = ElementTree.fromstring(libvirt.virsh("domcapabilities --arch riscv64 --machine virt"))
    guest = host.find("guest/arch[@name='riscv64']")
    assert guest is not None
    assert words(guest, "emulator") == words(domain, "path") == {str(libvirt.emulator)}
    assert words(guest, "machine") == words(domain, "machine") == {"virt"}
    assert words(domain, "domain") == {"qemu"}
    assert [each.get("max") for each in domain.findall("vcpu")] == ["1"]
    assert "virtio" in words(domain, "devices/disk/enum[@name='bus']/value")
    assert "pflash" in words(domain, "os/loader/enum[@name='type']/value")
    assert words(domain, "devices/rng/enum[@name='model']/value") == {"virtio"}
    assert words(domain, "devices/rng/enum[@name='backendModel']/value") == {"random", "builtin"}
    # What there is not is not promised either.
    assert words(domain, "devices/graphics/enum[@name='type']/value") == set()
    assert words(domain, "devices/video/enum[@name='modelType']/value") == {"none"}
    for path in ("iothreads", "devices/tpm", "devices/redirdev", "features/genid", "features/backup"):
        assert [each.get("supported") for each in domain.findall(path)] == ["no"], path


class Terminal:
    """The guest's console, as `virsh console` has it."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_NOCTTY)

    def close(self) -> None:
        os.close(self._fd)

    def ask(self, command: str) -> str:
        """A command of the guest's, typed until it answers: the guest may not have begun to listen."""
        deadline, data = time.monotonic() + PATIENCE, b""
        while time.monotonic() < deadline:
            os.write(self._fd, command.encode() + b"\r")
            while select.select([self._fd], [], [], 2)[0]:
                data += os.read(self._fd, 4096)
                if found := re.search(rf"(ok {command.split()[0]}\b[^\r\n]*)\r".encode(), data):
                    return found[1].decode()
        raise AssertionError(f"no answer to {command}: {data[-400:]!r}")


@contextmanager
def console(libvirt: Libvirt) -> Iterator[Terminal]:
    with closing(Terminal(libvirt.virsh("ttyconsole box"))) as terminal:
        yield terminal


def test_libvirt_starts_a_guest_and_brings_back_what_a_snapshot_has(libvirt: Libvirt, image: Path) -> None:
    with defined(libvirt, image, devices=SERIAL + ENTROPY):
        libvirt.virsh("start box")
        with console(libvirt) as guest:
            assert guest.ask("random").startswith("ok random=")
            nonce = guest.ask("nonce")
            libvirt.virsh("snapshot-create-as box before")
            guest.ask("nonce 1234")
            assert guest.ask("nonce") != nonce
        libvirt.virsh("suspend box")
        assert libvirt.virsh("domstate box") == "paused"
        libvirt.virsh("snapshot-revert box before --running")
        assert libvirt.virsh("domstate box") == "running"
        with console(libvirt) as guest:
            assert guest.ask("nonce") == nonce
            assert "bad=0 " in guest.ask("check")
        assert libvirt.virsh("snapshot-list box --name") == "before"
        libvirt.virsh("snapshot-delete box before")
        libvirt.virsh("destroy box")
    assert "before" not in stillframe("image", "snapshot", "list", str(image), check=True).stdout


def test_what_is_not_here_is_refused_at_the_start_and_libvirt_shows_why(
    libvirt: Libvirt, image: Path
) -> None:
    with defined(libvirt, image, machine="<clock offset='localtime'/>"):
        why = "base=localtime: Parameter 'base' does not accept value 'localtime'"
        with pytest.raises(VirshError, match=why):
            libvirt.virsh("start box")


def test_the_document_lists_what_libvirt_asks(libvirt: Libvirt, image: Path) -> None:
    with defined(libvirt, image):
        libvirt.virsh("start box")
    described = set(re.findall(r"`([a-z_-]+)`", DOCUMENT.read_text()))
    assert "query-chardev" in libvirt.asked()
    assert set(libvirt.asked()) <= described
