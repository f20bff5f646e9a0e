"""What stands between the guest and its nodes: the drives by name, and the devices on nodes without one, as `query-block` and
`info block` list them.
"""

from dataclasses import dataclass

from stillframe.block.node import Node
from stillframe.machine.machine import Disk
from stillframe.monitor.host import Host


@dataclass(frozen=True, slots=True)
class Front:
    """One of them.

    :param drive: its name; empty for a device's own node.
    :param disk: the guest's device; None for a drive that no device uses.
    :param node: None for an empty drive.
    """

    drive: str
    disk: Disk | None
    node: Node | None


def fronts(host: Host) -> list[Front]:
    """Drives first, then the other devices. Several may be on one node that is only read."""
    disks = list(host.machine.disks)
    found = []
    for name, node in host.graph.drives():
        disk = None if node is None else next((d for d in disks if d.node_name == node.node_name), None)
        if disk is not None:
            disks.remove(disk)
        found.append(Front(name, disk, node))
    return found + [Front("", disk, host.graph.find(disk.node_name)) for disk in disks]
