"""Devices whose state is kept by somebody else than QEMU: a snapshot would miss it, so it is refused by name before the pause."""

from typing import Final

from stillframe.errors import Unsupported
from stillframe.machine.engines.qemu.monitor import QemuMonitor

_KEPT_OUTSIDE: Final = ("vfio-", "vhost-user-", "vhost-vdpa", "tpm-", "virtio-tpm")
_DEVICES: Final = ("/machine/peripheral", "/machine/peripheral-anon")


def refuse_outside_state(monitor: QemuMonitor) -> None:
    """:raise Unsupported: a device keeps its state outside, or QEMU names something else that stands against a stream."""
    for path in _DEVICES:
        for entry in monitor.execute("qom-list", {"path": path}):
            kind = str(entry["type"]).removeprefix("child<").removesuffix(">")
            if kind.startswith(_KEPT_OUTSIDE):
                raise Unsupported(
                    f"Device '{entry['name']}' ({kind}) keeps its state outside of QEMU, where a snapshot cannot reach it",
                    remedy="Start the machine without it.",
                )
    reasons = monitor.execute("query-migrate").get("blocked-reasons") or []
    if reasons:
        raise Unsupported(f"QEMU cannot give the guest's state: {'; '.join(map(str, reasons))}")
