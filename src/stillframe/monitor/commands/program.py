"""What the program has: asked by managers before they start a machine, and of no machine in particular.

Where a QEMU runs the guest, that QEMU answers.
"""

from enum import Enum
from typing import Any

from msgspec import UNSET, UnsetType

from stillframe.errors import DeviceNotFound, InvalidRequest
from stillframe.machine.catalogue import ARCHITECTURE, BOARDS, KINDS, Kind, Property, lineage
from stillframe.monitor.host import Host
from stillframe.monitor.schema import Structure, command


class SysEmuTarget(Enum):
    """The processor that a guest sees."""

    RISCV64 = ARCHITECTURE


class TargetInfo(Structure):
    """:param arch: of the guest's processor."""

    arch: SysEmuTarget


class KvmInfo(Structure):
    """The kernel's accelerator, which is not used here.

    :param enabled: whether it runs the guest. :param present: whether it could.
    """

    enabled: bool
    present: bool


class MachineInfo(Structure, kw_only=True):
    """A board.

    :param name: as `-machine` takes it.
    :param is_default: the board where none is named; else absent.
    :param cpu_max: the most processors that it can have.
    :param hotpluggable_cpus: never.
    :param numa_mem_supported: never.
    :param deprecated: never.
    :param default_cpu_type: of its processor where none is named.
    :param acpi: never: a guest has a device tree.
    """

    name: str
    is_default: bool | UnsetType = UNSET
    cpu_max: int
    hotpluggable_cpus: bool = False
    numa_mem_supported: bool = False
    deprecated: bool = False
    default_cpu_type: str | UnsetType = UNSET
    acpi: bool = False


class WhichTypes(Structure):
    """:param implements: only these and what descends from them. :param abstract: also types of which there are no objects."""

    implements: str | UnsetType = UNSET
    abstract: bool | UnsetType = UNSET


class ObjectTypeInfo(Structure):
    """A type of objects.

    :param name: its name. :param abstract: there are no objects of this type itself; else absent.
    :param parent: the type that it descends from; absent for the root.
    """

    name: str
    abstract: bool | UnsetType = UNSET
    parent: str | UnsetType = UNSET


class TypeName(Structure):
    """:param typename: the type."""

    typename: str


class ObjectPropertyInfo(Structure):
    """What can be set on an object.

    :param name: the property's. :param type: of its value. :param description: what it is.
    :param default_value: where it has one.
    """

    name: str
    type: str
    description: str | UnsetType = UNSET
    default_value: Any | UnsetType = UNSET


class CommandLineParameterType(Enum):
    """What a parameter's value is."""

    STRING = "string"
    BOOLEAN = "boolean"
    NUMBER = "number"
    SIZE = "size"


class CommandLineParameterInfo(Structure):
    """:param name: the parameter's. :param type: of its value."""

    name: str
    type: CommandLineParameterType


class CommandLineOptionInfo(Structure):
    """An option of the command line.

    :param option: its name, which is not always how it is written: `-m` is `memory`.
    :param parameters: what its value can say; empty where that depends on the value.
    """

    option: str
    parameters: list[CommandLineParameterInfo]


class WhichOption(Structure):
    """:param option: this one alone."""

    option: str | UnsetType = UNSET


@command("query-target", at_once=True, of_program=True)
def query_target(host: Host) -> TargetInfo:
    """The guest's architecture."""
    return TargetInfo(SysEmuTarget.RISCV64)


@command("query-kvm", at_once=True, of_program=True)
def query_kvm(host: Host) -> KvmInfo:
    """Whether the host's processor runs the guest: no."""
    return KvmInfo(enabled=False, present=False)


@command("query-machines", at_once=True, of_program=True)
def query_machines(host: Host) -> list[MachineInfo]:
    """The boards that there are."""
    return [
        MachineInfo(
            name=board.name,
            is_default=board.is_default or UNSET,
            cpu_max=1,
            default_cpu_type=f"{board.cpu_model}-riscv-cpu" if board.cpu_model else UNSET,
        )
        for board in BOARDS.values()
    ]


@command("qom-list-types", at_once=True, of_program=True)
def qom_list_types(host: Host, arguments: WhichTypes) -> list[ObjectTypeInfo]:
    """What machines here are made of, by the names of QEMU's types; none for a type that nothing descends from."""
    return [
        ObjectTypeInfo(kind.name, kind.abstract or UNSET, kind.parent or UNSET)
        for kind in KINDS.values()
        if (not kind.abstract or arguments.abstract is True)
        and (
            arguments.implements is UNSET or any(each.name == arguments.implements for each in lineage(kind))
        )
    ]


@command("device-list-properties", at_once=True, of_program=True)
def device_list_properties(host: Host, arguments: TypeName) -> list[ObjectPropertyInfo]:
    """What can be set on a device of a type."""
    kind = KINDS.get(arguments.typename)
    if kind is None:
        raise DeviceNotFound(f"Device '{arguments.typename}' not found")
    if kind.abstract or all(each.name != "device" for each in lineage(kind)):
        raise InvalidRequest("Parameter 'typename' expects a non-abstract device type")
    return [_property(each) for each in kind.properties]


@command("qom-list-properties", at_once=True, of_program=True)
def qom_list_properties(host: Host, arguments: TypeName) -> list[ObjectPropertyInfo]:
    """What can be set on an object of a type, or asked of it."""
    kind = KINDS.get(arguments.typename)
    if kind is None:
        raise DeviceNotFound(f"Class '{arguments.typename}' not found")
    return [_property(each) for each in _all_properties(kind)]


@command("query-command-line-options", at_once=True, of_program=True)
def query_command_line_options(host: Host, arguments: WhichOption) -> list[CommandLineOptionInfo]:
    """The options of the command line whose values are parameters, where the program was started with QEMU's."""
    options = host.command_line
    if arguments.option is not UNSET:
        if arguments.option not in options:
            raise InvalidRequest(f"invalid option name: {arguments.option}")
        options = {arguments.option: options[arguments.option]}
    return [
        CommandLineOptionInfo(
            option,
            [
                CommandLineParameterInfo(name, CommandLineParameterType(type_of))
                for name, type_of in parameters.items()
            ],
        )
        for option, parameters in options.items()
    ]


def _all_properties(kind: Kind) -> list[Property]:
    return [each for step in reversed([*lineage(kind)]) for each in step.properties]


def _property(shown: Property) -> ObjectPropertyInfo:
    return ObjectPropertyInfo(
        shown.name,
        shown.type,
        UNSET if shown.description is None else shown.description,
        UNSET if shown.default is None else shown.default,
    )
