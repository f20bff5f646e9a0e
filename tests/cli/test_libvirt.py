"""Debian's libvirt, and what it makes of `stillframe-qemu`: the real virsh, the real probe."""

import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cli.libvirt import Libvirt
from peers import ROOT

DOCUMENT = ROOT / "docs" / "libvirt.md"


@pytest.fixture
def libvirt(tmp_path: Path) -> Iterator[Libvirt]:
    libvirt = Libvirt(tmp_path)
    yield libvirt
    libvirt.close()


def words(tree: ElementTree.Element, path: str) -> set[str]:
    return {found.text or "" for found in tree.findall(path)}


def test_libvirt_finds_out_what_a_machine_here_can_have(libvirt: Libvirt) -> None:
    host, domain = map(
        ElementTree.fromstring, libvirt.virsh("capabilities", "domcapabilities --arch riscv64 --machine virt")
    )
    guest = host.find("guest/arch[@name='riscv64']")
    assert guest is not None
    assert words(guest, "emulator") == words(domain, "path") == {str(libvirt.emulator)}
    assert words(guest, "machine") == words(domain, "machine") == {"virt"}
    assert words(domain, "domain") == {"qemu"}
    assert [each.get("max") for each in domain.findall("vcpu")] == ["1"]
    assert "virtio" in words(domain, "devices/disk/enum[@name='bus']/value")
    assert "pflash" in words(domain, "os/loader/enum[@name='type']/value")
    assert words(domain, "devices/rng/enum[@name='model']/value") == {"virtio"}
    # What there is not is not promised either.
    assert words(domain, "devices/graphics/enum[@name='type']/value") == set()
    assert words(domain, "devices/video/enum[@name='modelType']/value") == {"none"}
    for path in ("iothreads", "devices/tpm", "devices/redirdev", "features/genid", "features/backup"):
        assert [each.get("supported") for each in domain.findall(path)] == ["no"], path
    asked = libvirt.asked()
    assert asked[0] == "qmp_capabilities"
    assert set(asked) <= set(re.findall(r"`([a-z_-]+)`", DOCUMENT.read_text())), (
        "docs/libvirt.md is not complete"
    )
