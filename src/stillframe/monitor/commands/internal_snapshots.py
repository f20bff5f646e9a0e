"""Commands on the snapshots of one disk alone, without machine state."""

from msgspec import UNSET, UnsetType

from stillframe.block import node as block
from stillframe.jobs import JobContext
from stillframe.monitor.commands.block import SnapshotInfo, snapshot_info
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class BlockdevSnapshotInternal(Structure):
    """What to call a snapshot of which disk.

    :param device: the guest's device, or the node.
    :param name: the snapshot's name; not empty.
    """

    device: str
    name: str


class BlockdevSnapshotInternalDelete(Structure):
    """Which snapshot of which disk; at least one of id and name.

    :param device: the guest's device, or the node.
    :param id: the snapshot's id.
    :param name: the snapshot's name.
    """

    device: str
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET


def _given(value: str | UnsetType) -> str | None:
    return None if isinstance(value, UnsetType) else value


@command("blockdev-snapshot-internal-sync")
def create(host: Host, arguments: BlockdevSnapshotInternal) -> None:
    """Snapshot one disk, without machine state. Waits for its turn among the machine's snapshot jobs."""
    host.jobs.run_internal(
        "blockdev-snapshot-internal-sync",
        lambda context: host.snapshots.create_internal(arguments.device, arguments.name),
        queue=host.snapshots.queue,
    )


@command("blockdev-snapshot-delete-internal-sync")
def delete(host: Host, arguments: BlockdevSnapshotInternalDelete) -> SnapshotInfo:
    """Delete a snapshot of one disk, and tell what it was. Waits for its turn among the machine's snapshot
    jobs.
    """
    deleted: list[block.SnapshotInfo] = []

    def body(context: JobContext) -> None:
        deleted.append(
            host.snapshots.delete_internal(
                arguments.device, id=_given(arguments.id), name=_given(arguments.name)
            )
        )

    host.jobs.run_internal("blockdev-snapshot-delete-internal-sync", body, queue=host.snapshots.queue)
    return snapshot_info(deleted[0])
