"""A machine put together from what a user asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stillframe.block.node import Node
from stillframe.errors import InvalidRequest
from stillframe.events import EventBus
from stillframe.machine.boards.none import none_board
from stillframe.machine.clock import VirtualClock
from stillframe.machine.console import Console
from stillframe.machine.engines import Engine, EnvironmentCall
from stillframe.machine.engines.none import NoEngine
from stillframe.machine.engines.qemu.adopt import take_over
from stillframe.machine.engines.qemu.command_line import QemuConfig, drive_of, refuse_words
from stillframe.machine.engines.qemu.home import MachineHome
from stillframe.machine.engines.qemu.machine import QemuMachine
from stillframe.machine.machine import Machine
from stillframe.machine.mailbox import Mailbox
from stillframe.machine.memory import GuestMemory


@dataclass(frozen=True, slots=True)
class DriveConfig:
    """A virtio-blk device of the guest.

    :param node: the node behind it. :param device_id: None for one by its slot, "virtio-mmio-bus.0".
    :param serial: what the guest reads as the disk's id, at most 20 bytes.
    :param werror: :param rerror: what a failed write or read does: "enospc" (stop the guest if there is no room, else tell it),
        "stop", "report" or "ignore". Other operations than reads count as writes.
    """

    node: Node
    device_id: str | None = None
    serial: str = ""
    werror: str = "enospc"
    rerror: str = "report"


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """What `stillframe run` takes, nodes opened.

    :param board: "virt" or "none". :param engine: "unicorn" or "none"; None for the board's own.
    :param memory_size: bytes of RAM.
    :param bios: firmware to start instead of a kernel: in S mode, on our SBI; with a kernel, both are loaded.
    :param flash: the nodes of the flash banks, in their order.
    :param entropy: whether the guest has a virtio-rng device.
    :param console: the serial port's other end; None for one that drops everything.
    :param icount_shift: None: time is the host's clock; else an instruction takes `2**icount_shift` nanoseconds.
    :param exit_on_shutdown: a guest that powers itself off ends the machine.
    """

    name: str | None = None
    board: str = "virt"
    engine: str | None = None
    memory_size: int = 128 << 20
    kernel: Path | None = None
    initrd: Path | None = None
    append: str = ""
    bios: Path | None = None
    drives: tuple[DriveConfig, ...] = ()
    flash: tuple[Node, ...] = ()
    entropy: bool = True
    console: Console | None = None
    icount_shift: int | None = None
    exit_on_shutdown: bool = True


_POLICIES = ("enospc", "stop", "report", "ignore")


def _build_none(config: MachineConfig, events: EventBus) -> Machine:
    if config.drives or config.flash or config.kernel or config.bios:
        raise InvalidRequest(
            "The board 'none' has no processor and no devices: it takes no drives, flash, kernel or firmware",
            remedy="Give the nodes alone (--blockdev); snapshots need no device.",
        )
    _refuse_engine(config, "none")
    return Machine(
        name=config.name,
        board=none_board(),
        engine=NoEngine(),
        memory=GuestMemory(),
        clock=VirtualClock(),
        mailbox=Mailbox(),
        events=events,
        exit_on_shutdown=config.exit_on_shutdown,
    )


def _refuse_engine(config: MachineConfig, *fitting: str) -> None:
    if config.engine is not None and config.engine not in fitting:
        raise InvalidRequest(
            f"The board '{config.board}' cannot have the engine '{config.engine}'",
            remedy=f"Choose {' or '.join(fitting)}.",
        )


def _unicorn(clock: VirtualClock, environment_call: EnvironmentCall) -> Engine:
    from stillframe.machine.engines.unicorn.engine import UnicornEngine

    return UnicornEngine(clock, environment_call)


def _build_virt(config: MachineConfig, events: EventBus) -> Machine:
    from stillframe.machine.boards.virt import Drive, VirtBoard, VirtConfig
    from stillframe.machine.devices.virtio_blk import ErrorPolicy

    _refuse_engine(config, "unicorn")
    for drive in config.drives:
        for policy in (drive.werror, drive.rerror):
            if policy not in _POLICIES:
                raise InvalidRequest(
                    f"'{policy}' is not an error policy", remedy=f"Choose one of: {', '.join(_POLICIES)}."
                )
    drives = tuple(
        Drive(drive.node, drive.device_id, drive.serial, ErrorPolicy(drive.werror, drive.rerror))
        for drive in config.drives
    )
    board = VirtBoard(
        VirtConfig(
            name=config.name,
            memory_size=config.memory_size,
            kernel=config.kernel,
            initrd=config.initrd,
            append=config.append,
            bios=config.bios,
            drives=drives,
            flash=config.flash,
            entropy=config.entropy,
            console=config.console or Console(),
            icount_shift=config.icount_shift,
            exit_on_shutdown=config.exit_on_shutdown,
        ),
        _unicorn,
        events,
    )
    machine = Machine(
        name=config.name,
        board=board.board(),
        engine=board.engine,
        memory=board.memory,
        clock=board.clock,
        mailbox=board.mailbox,
        events=events,
        exit_on_shutdown=config.exit_on_shutdown,
    )
    board.attach(machine)
    return machine


_BUILDERS: Mapping[str, Callable[[MachineConfig, EventBus], Machine]] = {
    "none": _build_none,
    "virt": _build_virt,
}


def build_machine(config: MachineConfig, events: EventBus) -> Machine:
    """Make the machine; it is not powered on yet: `Machine.start`.

    :raise InvalidRequest: the words do not fit each other. :raise Refused: a file cannot be what it is given as.
    """
    builder = _BUILDERS.get(config.board)
    if builder is None:
        raise InvalidRequest(
            f"There is no board '{config.board}'", remedy=f"Choose one of: {', '.join(sorted(_BUILDERS))}."
        )
    return builder(config, events)


def build_qemu_machine(config: QemuConfig, events: EventBus) -> QemuMachine:
    """A machine whose guest a QEMU runs; that is started by `start`.

    :raise InvalidRequest: the words do not fit each other. :raise Refused: there is no place for its sockets.
    """
    return QemuMachine(config, events)


__all__ = [
    "DriveConfig",
    "MachineConfig",
    "MachineHome",
    "QemuConfig",
    "QemuMachine",
    "build_machine",
    "build_qemu_machine",
    "drive_of",
    "refuse_words",
    "take_over",
]
