"""What machines are made of here, by the names of QEMU's object model: what a manager asks before it starts one.

Names, parents, types and descriptions are those that QEMU 10.0's `qom-list-types` and `device-list-properties` give, tried with
qemu-system-riscv64. A type has the properties that can be set here, and no others.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

ARCHITECTURE = "riscv64"
CPU_MODELS = ("rv64", "max")
"""The first is what a board has where none is named."""


@dataclass(frozen=True, slots=True)
class Property:
    """What can be set on an object.

    :param type: as QEMU calls it, "str" or "bool". :param description: where QEMU has one.
    :param default: where QEMU tells it.
    """

    name: str
    type: str
    description: str | None = None
    default: str | bool | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """A type of objects. :param parent: None for the root alone. :param properties: its own, without its parents'."""

    name: str
    parent: str | None
    abstract: bool = False
    properties: tuple[Property, ...] = ()


@dataclass(frozen=True, slots=True)
class BoardKind:
    """A machine as `-machine` names it.

    :param text: what it is. :param cpu_model: None where there is no processor.
    """

    name: str
    text: str
    cpu_model: str | None
    is_default: bool = False


BOARDS: Mapping[str, BoardKind] = {
    board.name: board
    for board in (
        BoardKind("none", "empty machine", None),
        BoardKind("virt", "RISC-V VirtIO board (default)", CPU_MODELS[0], is_default=True),
    )
}

_NODE = "Node name or ID of a block device to use as a backend"
_POLICY = "Error handling policy (report/ignore/enospc/stop/auto)"
_DISK = (
    Property("drive", "str", _NODE),
    Property("serial", "str"),
    Property("werror", "BlockdevOnError", _POLICY, "auto"),
    Property("rerror", "BlockdevOnError", _POLICY, "auto"),
    Property("bootindex", "int32"),
    Property("write-cache", "OnOffAuto", "on/off/auto", "auto"),
)
_ENTROPY = (Property("rng", "link<rng-backend>"),)
_BANKS = (Property("pflash0", "str", _NODE), Property("pflash1", "str", _NODE))

DEVICES: Mapping[str, tuple[Property, ...]] = {"virtio-blk-device": _DISK, "virtio-rng-device": _ENTROPY}
"""Those that a command line can add, and what it can say of them."""

_MACHINE_WORDS = (
    Property("usb", "bool", "Set on/off to enable/disable usb"),
    Property("dump-guest-core", "bool", "Include guest memory in a core dump"),
    Property("mem-merge", "bool", "Enable/disable memory merge support"),
)

KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("object", None, abstract=True, properties=(Property("type", "string"),)),
        Kind("accel", "object", abstract=True),
        Kind("tcg-accel", "accel"),
        Kind("rng-backend", "object", abstract=True),
        Kind("rng-builtin", "rng-backend"),
        Kind("rng-random", "rng-backend", properties=(Property("filename", "string"),)),
        Kind("secret_common", "object", abstract=True),
        Kind("secret", "secret_common"),
        Kind("memory-backend", "object", abstract=True),
        # libvirt 9.0 dies of a program that does not know it; that it is abstract says that there can be none.
        Kind("memory-backend-file", "memory-backend", abstract=True),
        Kind("machine", "object", abstract=True, properties=_MACHINE_WORDS),
        Kind("none-machine", "machine"),
        Kind("virt-machine", "machine", properties=_BANKS),
        Kind("device", "object", abstract=True),
        Kind("cpu", "device", abstract=True),
        Kind("riscv-cpu", "cpu", abstract=True),
        Kind("riscv-dynamic-cpu", "riscv-cpu", abstract=True),
        *(Kind(f"{model}-riscv-cpu", "riscv-dynamic-cpu") for model in CPU_MODELS),
        Kind("sys-bus-device", "device", abstract=True),
        Kind("cfi.pflash01", "sys-bus-device"),
        Kind("goldfish_rtc", "sys-bus-device"),
        Kind("riscv.sifive.plic", "sys-bus-device"),
        Kind("serial-mm", "sys-bus-device"),
        Kind("virtio-mmio", "sys-bus-device"),
        Kind("virtio-device", "device", abstract=True),
        *(Kind(name, "virtio-device", properties=properties) for name, properties in DEVICES.items()),
    )
}
"""Every type by its name."""


def lineage(kind: Kind) -> Iterator[Kind]:
    """The type, then its parents, up to the root."""
    step: Kind | None = kind
    while step is not None:
        yield step
        step = KINDS[step.parent] if step.parent is not None else None
