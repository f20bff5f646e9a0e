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
    """Drives first, then the other devices."""
    disks = {disk.node_name: disk for disk in host.machine.disks}
    found = []
    for name, node in host.graph.drives():
        found.append(Front(name, None if node is None else disks.pop(node.node_name, None), node))
    return found + [Front("", disk, host.graph.find(node_name)) for node_name, disk in disks.items()]
