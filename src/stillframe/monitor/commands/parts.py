"""The parts of a machine that a manager binds to what it has planned: processors, devices, character devices.

Where a QEMU runs the guest, that QEMU answers.
"""

from stillframe.errors import DeviceNotFound
from stillframe.machine.machine import Machine
from stillframe.monitor.commands.program import ObjectPropertyInfo, SysEmuTarget
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class CpuInstanceProperties(Structure):
    """Where a processor is. :param core_id: the number of its core."""

    core_id: int


class CpuInfoFast(Structure):
    """A processor.

    :param cpu_index: its number.
    :param qom_path: QEMU's path of it.
    :param thread_id: the host's number of the thread that runs it.
    :param props: where it is.
    :param target: what it is.
    """

    cpu_index: int
    qom_path: str
    thread_id: int
    props: CpuInstanceProperties
    target: SysEmuTarget


class ChardevInfo(Structure):
    """Where characters go and come from.

    :param label: its id. :param filename: what it is: `pty:` and a path for a pseudo terminal.
    :param frontend_open: whether something of the machine is at it, which is always so.
    """

    label: str
    filename: str
    frontend_open: bool


class ObjectPath(Structure):
    """:param path: of an object."""

    path: str


@command("query-cpus-fast", of_program=True)
def query_cpus_fast(host: Host) -> list[CpuInfoFast]:
    """The processors, and the threads that run them."""
    threads = host.machine.processor_threads if isinstance(host.machine, Machine) else ()
    return [
        CpuInfoFast(
            index, f"/machine/soc0/harts[{index}]", thread, CpuInstanceProperties(index), SysEmuTarget.RISCV64
        )
        for index, thread in enumerate(threads)
    ]


@command("query-chardev", at_once=True, of_program=True)
def query_chardev(host: Host) -> list[ChardevInfo]:
    """The character devices of monitors and of the serial port."""
    return [ChardevInfo(each.label, each.filename(), frontend_open=True) for each in host.chardevs]


@command("qom-list", at_once=True, of_program=True)
def qom_list(host: Host, arguments: ObjectPath) -> list[ObjectPropertyInfo]:
    """The devices that were given an id, as the objects below `/machine/peripheral`; no other path is there."""
    if arguments.path != "/machine/peripheral":
        raise DeviceNotFound(f"Device '{arguments.path}' not found")
    devices = [ObjectPropertyInfo(name, f"child<{kind}>") for name, kind in host.peripherals.items()]
    return [ObjectPropertyInfo("type", "string"), *devices]
