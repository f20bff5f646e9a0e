"""`yank`: cutting connections that hang, QEMU's last resort, and what it takes commands out of band for.

Nothing here hangs on another host: there is never anything to yank, and both commands say so.
"""

from stillframe.errors import DeviceNotFound
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class YankInstance(Structure, tag_field="type"):
    """Something with a connection."""


class YankInstanceBlockNode(YankInstance, tag="block-node"):
    """A node. :param node_name: the node's."""

    node_name: str


class YankInstanceChardev(YankInstance, tag="chardev"):
    """A character device. :param id: the device's."""

    id: str


class YankInstanceMigration(YankInstance, tag="migration"):
    """A migration."""


AnyYankInstance = YankInstanceBlockNode | YankInstanceChardev | YankInstanceMigration


class Yanked(Structure):
    """:param instances: whose connections are to be cut."""

    instances: list[AnyYankInstance]


@command("yank", allow_oob=True)
def yank(host: Host, arguments: Yanked) -> None:
    """Cut connections that hang. None is known: whatever is named is not found."""
    if arguments.instances:
        raise DeviceNotFound("Instance not found")


@command("query-yank", allow_oob=True)
def query_yank(host: Host) -> list[AnyYankInstance]:
    """Connections that can be cut: none."""
    return []
