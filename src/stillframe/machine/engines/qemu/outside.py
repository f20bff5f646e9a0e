"""Devices whose state is kept by somebody else than QEMU: a snapshot would miss it, so it is refused by name before the pause.

Not only what a device keeps is outside: a vhost-user back end of any device writes to the guest's memory by itself, where QEMU's
tracking does not see it.
"""

import re
from typing import Final

from stillframe.errors import Unsupported
from stillframe.machine.engines.qemu.monitor import QemuMonitor

_KEPT_OUTSIDE: Final = ("vfio-", "vhost-user-", "vhost-vdpa", "tpm-", "virtio-tpm")
_DEVICES: Final = ("/machine/peripheral", "/machine/peripheral-anon")
_OUTSIDE_NETWORK: Final = re.compile(r"^[ \\]*([^:\s]+):.*\btype=(vhost-user|vhost-vdpa)\b", re.MULTILINE)


def refuse_outside_state(monitor: QemuMonitor) -> None:
    """:raise Unsupported: a device keeps its state outside, or QEMU names something else that stands against a stream."""
    for path in _DEVICES:
        for entry in monitor.execute("qom-list", {"path": path}):
            kind = str(entry["type"]).removeprefix("child<").removesuffix(">")
            if kind.startswith(_KEPT_OUTSIDE):
                raise _kept_outside(f"Device '{entry['name']}' ({kind})")
    network = str(monitor.execute("human-monitor-command", {"command-line": "info network"}))
    found = _OUTSIDE_NETWORK.search(network)
    if found is not None:
        raise _kept_outside(f"Network '{found[1]}' ({found[2]})")
    reasons = monitor.execute("query-migrate").get("blocked-reasons") or []
    if reasons:
        raise Unsupported(f"QEMU cannot give the guest's state: {'; '.join(map(str, reasons))}")


def _kept_outside(what: str) -> Unsupported:
    return Unsupported(
        f"{what} keeps its state outside of QEMU, where a snapshot cannot reach it",
        remedy="Start the machine without it.",
    )
