"""Devices whose state is outside of QEMU, as QEMU would list them. No QEMU runs, and none of their hardware is there.

tests/qemu/test_qemu_outside.py has what can be had without hardware: vhost-user and a TPM, in a real QEMU.
"""

from typing import Any

import pytest

from stillframe.errors import Unsupported
from stillframe.machine.engines.qemu.monitor import QemuMonitor
from stillframe.machine.engines.qemu.outside import refuse_outside_state

_OURS = [("virtio-disk0", "virtio-blk-pci"), ("rng", "virtio-rng-pci"), ("wire", "virtio-net-pci")]


class Listing(QemuMonitor):
    """A monitor that says what there is.

    :param named: devices with an id, each with its type. :param others: those without. :param network: of `info network`.
    """

    def __init__(
        self,
        named: list[tuple[str, str]],
        others: tuple[str, ...] = (),
        network: str = "",
        blocked: tuple[str, ...] = (),
    ) -> None:
        listed = [(f"device[{number}]", kind) for number, kind in enumerate(others)]
        self._listed = {"/machine/peripheral": named, "/machine/peripheral-anon": listed}
        self._network, self._blocked = network, blocked

    def execute(self, command: str, arguments: Any = None, **_: object) -> Any:
        if command == "qom-list":
            # So says 7.2, and 10.0.
            found = [("type", "string")]
            found += [(name, f"child<{kind}>") for name, kind in self._listed[arguments["path"]]]
            return [{"name": name, "type": kind} for name, kind in found]
        if command == "query-migrate":
            return {"blocked-reasons": list(self._blocked)} if self._blocked else {}
        assert (command, arguments) == ("human-monitor-command", {"command-line": "info network"})
        return self._network


@pytest.mark.parametrize(
    "kind",
    [
        "vfio-pci",
        "vfio-pci-nohotplug",
        "vhost-user-fs-pci",
        "vhost-user-blk-pci-non-transitional",
        "vhost-user-vga",
        "vhost-vdpa-device-pci",
        "tpm-tis",
        "tpm-crb",
        "tpm-tis-device",
        "tpm-spapr",
    ],
)
def test_device_whose_state_is_outside_is_refused_by_name_with_an_id_or_without(kind: str) -> None:
    """The types are those of `qom-list-types` of QEMU 10; that of ppc64 was not looked up."""
    with pytest.raises(Unsupported, match=rf"^Device 'mine' \({kind}\) keeps its state outside of QEMU"):
        refuse_outside_state(Listing([*_OURS, ("mine", kind)]))
    with pytest.raises(Unsupported, match=rf"^Device 'device\[1\]' \({kind}\) keeps its state outside"):
        refuse_outside_state(Listing(_OURS, ("virtio-rng-pci", kind)))


@pytest.mark.parametrize("kind", ["vhost-user", "vhost-vdpa"])
def test_network_whose_state_is_outside_is_refused_by_name(kind: str) -> None:
    network = f"device[0]: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ wire: index=0,type={kind}\r\n"
    with pytest.raises(Unsupported, match=rf"^Network 'wire' \({kind}\) keeps its state outside"):
        refuse_outside_state(Listing(_OURS, network=network))


def test_what_qemu_says_against_it_is_passed_on_and_all_else_is_taken() -> None:
    with pytest.raises(Unsupported, match="cannot give the guest's state: no; and no"):
        refuse_outside_state(Listing(_OURS, blocked=("no", "and no")))
    network = "wire: index=0,type=nic,model=virtio-net-pci\r\n \\ up: index=0,type=user,net=10.0.2.0\r\n"
    refuse_outside_state(Listing(_OURS, ("virtio-rng-pci", "ivshmem-plain"), network))
