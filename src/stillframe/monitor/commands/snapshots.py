"""`snapshot-save`, `snapshot-load`, `snapshot-delete`: snapshots of the whole machine, as jobs.

Each returns at once; whatever is refused or fails afterwards is the job's error. The jobs of a machine take
turns in the order of their creation, stay `concluded` until `job-dismiss`, and report their progress in
bytes.
"""

import msgspec

from stillframe.jobs import JobContext
from stillframe.machine.control import Quiesce
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class SaveArguments(Structure):
    """What to save where.

    :param job_id: the id of the job to make.
    :param tag: the snapshot's name, at most 255 bytes.
    :param vmstate: the node-name of the device that gets the machine state; one of `devices`.
    :param devices: the node-names of all devices to snapshot.
    :param quiesce: the guest's file systems are frozen for the instant, through its agent: required, or try. Not QEMU's.
    :param speed: at most so many bytes of machine state a second; 0, the default, for no limit. Not QEMU's.
    """

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]
    quiesce: Quiesce | msgspec.UnsetType = msgspec.UNSET
    speed: int | msgspec.UnsetType = msgspec.UNSET


class LoadArguments(Structure):
    """What to load from where.

    :param job_id: the id of the job to make.
    :param tag: the snapshot's name.
    :param vmstate: the node-name of the device that holds the machine state; one of `devices`.
    :param devices: the node-names of all devices to bring back to the snapshot.
    :param eager: the guest runs only when all of its memory is there. Not QEMU's, whose loads always do.
    :param speed: as for a save. What the guest asks for comes at once.
    :param replace: a guest that a QEMU runs: that one is ended before the one that goes on is started, which needs no room beside
        it then. If the load fails after that, the guest is gone. Not QEMU's.
    """

    job_id: str
    tag: str
    vmstate: str
    devices: list[str]
    eager: bool | msgspec.UnsetType = msgspec.UNSET
    speed: int | msgspec.UnsetType = msgspec.UNSET
    replace: bool | msgspec.UnsetType = msgspec.UNSET


class DeleteArguments(Structure):
    """What to delete where.

    :param job_id: the id of the job to make.
    :param tag: the snapshot's name.
    :param devices: the node-names of all devices to delete it from; one that has none is passed over.
    """

    job_id: str
    tag: str
    devices: list[str]


def _speed(given: int | msgspec.UnsetType) -> int:
    return 0 if isinstance(given, msgspec.UnsetType) else given


@command("snapshot-save")
def snapshot_save(host: Host, arguments: SaveArguments) -> None:
    """Save the machine: memory and devices into one node, the disks each into its own, all of them or none.

    For a consistent snapshot list every node that the guest writes to. It stands still for the instant alone, and runs while the
    state is written.
    """

    def body(context: JobContext) -> None:
        quiesce = None if isinstance(arguments.quiesce, msgspec.UnsetType) else arguments.quiesce
        host.snapshots.save(context, arguments.tag, arguments.vmstate, arguments.devices, quiesce=quiesce)

    host.jobs.create(
        arguments.job_id, "snapshot-save", body, queue=host.snapshots.queue, speed=_speed(arguments.speed)
    )


@command("snapshot-load")
def snapshot_load(host: Host, arguments: LoadArguments) -> None:
    """Bring the machine and the listed devices back to a snapshot.

    The state is checked before the guest stops; after any failure the guest is as it was, but for what `replace` risks.
    """

    def body(context: JobContext) -> None:
        host.snapshots.load(
            context,
            arguments.tag,
            arguments.vmstate,
            arguments.devices,
            eager=arguments.eager is True,
            replace=arguments.replace is True,
        )

    host.jobs.create(
        arguments.job_id, "snapshot-load", body, queue=host.snapshots.queue, speed=_speed(arguments.speed)
    )


@command("snapshot-delete")
def snapshot_delete(host: Host, arguments: DeleteArguments) -> None:
    """Delete a snapshot from the listed devices, from all that have it or from none. The guest does not
    notice."""

    def body(context: JobContext) -> None:
        host.snapshots.delete(context, arguments.tag, arguments.devices)

    host.jobs.create(arguments.job_id, "snapshot-delete", body, queue=host.snapshots.queue)
