"""A stream that another program made, and that we keep as it is but for its pages: QEMU's own bytes before and behind them.

    head       header, CONFIGURATION and its subsections          QEMU's
               START of RAM with the list of its blocks, footer   QEMU's
    pages      PARTs of page records, END of RAM                  ours: see ram.py, page_index.py
    tail       FULL sections of the devices, EOF, VMDESCRIPTION   QEMU's

What the devices' sections say is known to the program that made them alone. So their end is found from the end of the stream.
The layout of the bytes is in layout.py.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from stillframe.errors import StateMismatch, StreamCorrupt
from stillframe.vmstate import layout
from stillframe.vmstate.ram import EOS, MEM_SIZE, Addresses, Pages, RamBlock, RamReader
from stillframe.vmstate.transfer import StateSource

_TARGET_PAGE_BITS = 12
_UUID = 16
_MAXIMUM_CAPABILITIES = 64
_HARMLESS_CAPABILITIES = frozenset(
    {
        "auto-converge",
        "background-snapshot",
        "events",
        "late-block-activate",
        "pause-before-switchover",
        "postcopy-ram",
        "return-path",
        "validate-uuid",
    }
)
"""Those that change nothing in the stream; of others QEMU itself records only x-ignore-shared and mapped-ram."""

_TIMER = b"\x05timer" + struct.pack(">II", 0, 2)
_TIMER_FIELDS = struct.Struct(">q8xq")
_DESCRIPTION_HEAD = 6
"""Bytes from EOF to the JSON: EOF, VMDESCRIPTION, u32 length."""
_MAXIMUM_NAME = 255


@dataclass(frozen=True, slots=True)
class RelayedHead:
    """What stands before the pages.

    :param head: header, CONFIGURATION and its subsections, verbatim. :param machine: the machine's type, as "pc-q35-7.2".
    :param ram_start: the START of RAM, its footer included, verbatim.
    :param ram_section_id: of RAM's PARTs and END. :param blocks: of memory, in the stream's order.
    """

    head: bytes
    machine: str
    ram_start: bytes
    ram_section_id: int
    blocks: tuple[RamBlock, ...]

    @property
    def size(self) -> int:
        """Bytes of all this, and the offset of the first PART."""
        return len(self.head) + len(self.ram_start)


@dataclass(frozen=True, slots=True)
class RelayedTail:
    """What stands behind RAM's END.

    :param devices: sections, verbatim. :param description: the JSON, which nobody has looked at; None if there is none.
    """

    devices: bytes
    description: bytes | None

    @property
    def data(self) -> bytes:
        """As it stands in a stream, EOF included."""
        eof = bytes((layout.EOF,))
        if self.description is None:
            return self.devices + eof
        head = layout.mark(layout.DESCRIPTION, len(self.description))
        return b"".join((self.devices, eof, head, self.description))


def read_head(source: StateSource) -> RelayedHead:
    """Read up to the first PART, where `source` is left. Nothing in it is trusted.

    :param source: stands at the stream's first byte.
    :raise StreamCorrupt: it is no stream, or a damaged one.
    :raise StateMismatch: its memory is not in plain records of pages of 4096 bytes, or something else comes before it.
    """
    start = source.offset
    machine = _configuration(source)
    head = _again(source, start)
    start = source.offset
    section_id, blocks = _ram_start(source)
    ram_start = _again(source, start)
    if ram_start != _plain_ram_start(section_id, blocks):
        raise StateMismatch(
            "The machine state lists its memory in a form that is not known (multifd, RDMA, or blocks with page sizes)",
            section=layout.RAM_NAME,
        )
    return RelayedHead(head, machine, ram_start, section_id, blocks)


def _again(source: StateSource, start: int) -> bytes:
    """The bytes between `start` and the present place."""
    length = source.offset - start
    source.seek(start)
    return source.take(length)


def _configuration(source: StateSource) -> str:
    if source.remaining < 8 or source.u32() != layout.MAGIC:
        raise source.corrupt("Not a migration stream")
    if source.u32() != layout.VERSION:
        raise source.corrupt("Unsupported migration stream version")
    if source.u8() != layout.CONFIGURATION:
        raise source.corrupt("Configuration section missing")
    source.section = "the section 'configuration'"
    length = source.u32()
    if length > _MAXIMUM_NAME:
        raise source.corrupt(f"A machine name of {length} bytes")
    machine = source.text(length, "the machine")
    found: set[str] = set()
    while bytes(source.window(1)[:1]) == bytes((layout.SUBSECTION,)):
        source.skip(1)
        name = source.text(source.u8(), "a subsection")
        if name in found:
            raise source.corrupt(f"A second subsection '{name}'")
        found.add(name)
        _configuration_subsection(source, name, source.u32())
    return machine


def _configuration_subsection(source: StateSource, name: str, version: int) -> None:
    if version != 1:
        raise StateMismatch(f"Version {version} of '{name}' is not known", section="configuration")
    if name == "configuration/target-page-bits":
        bits = source.u32()
        if bits != _TARGET_PAGE_BITS:
            size = f"{1 << bits} bytes" if bits < 64 else f"2^{bits} bytes"
            raise StateMismatch(
                f"The machine state is in pages of {size}, and only those of 4096 are known",
                section="configuration",
            )
    elif name == "configuration/capabilities":
        count = source.u32()
        if count > _MAXIMUM_CAPABILITIES:
            raise source.corrupt(f"{count} migration capabilities")
        for _ in range(count):
            capability = source.text(source.u8(), "a migration capability")
            if capability not in _HARMLESS_CAPABILITIES:
                raise StateMismatch(
                    f"The machine state was made with the migration capability '{capability}', "
                    "with which its memory is in another form",
                    section="configuration",
                    remedy="Save it without that capability.",
                )
    elif name == "configuration/uuid":
        source.take(_UUID)
    else:
        raise StateMismatch(f"The machine state needs '{name}', which is not known", section="configuration")


def _ram_start(source: StateSource) -> tuple[int, tuple[RamBlock, ...]]:
    source.section = f"the section after byte {source.offset}"
    kind = source.u8()
    if kind == layout.COMMAND:
        command = int.from_bytes(source.take(2), "big")
        raise StateMismatch(f"The machine state begins with the migration command {command}")
    if kind not in (layout.START, layout.FULL):
        raise source.corrupt(f"Unknown savevm section type {kind}")
    section_id = source.u32()
    name = source.text(source.u8(), "a section")
    instance_id, version = source.u32(), source.u32()
    if name != layout.RAM_NAME or kind != layout.START or instance_id:
        raise StateMismatch(
            f"Before the memory comes the section '{name}' {instance_id}, whose length is not known",
            section=name,
        )
    if version != layout.RAM_VERSION:
        raise StateMismatch(
            f"savevm: unsupported version {version} for '{name}' v{layout.RAM_VERSION}", section=name
        )
    source.section = f"section '{name}'"
    reader = RamReader(source, _NoPages(source))
    reader.payload()
    if source.u8() != layout.FOOTER:
        raise source.corrupt(f"Missing section footer for {name}")
    if (found := source.u32()) != section_id:
        raise source.corrupt(
            f"Mismatched section id in footer for {name} - read 0x{found:x} expected 0x{section_id:x}"
        )
    return section_id, reader.block_list


def _plain_ram_start(section_id: int, blocks: Sequence[RamBlock]) -> bytes:
    written = bytearray(layout.section_head(layout.START, section_id, layout.RAM_NAME, 0, layout.RAM_VERSION))
    written += struct.pack(">Q", sum(block.length for block in blocks) | MEM_SIZE)
    for block in blocks:
        name = block.name.encode()
        written += bytes((len(name),)) + name + struct.pack(">Q", block.length)
    return bytes(written + struct.pack(">Q", EOS) + layout.mark(layout.FOOTER, section_id))


class _NoPages:
    """A visitor for the START of RAM, which has a list of blocks and nothing else."""

    def __init__(self, source: StateSource) -> None:
        self._source = source

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        """Any."""

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        raise self._source.corrupt("Pages in the list of memory blocks")

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        raise self._source.corrupt("Pages in the list of memory blocks")


def read_tail(data: bytes) -> RelayedTail:
    """Take apart what follows RAM's END, to the last byte of the stream.

    The description's text holds no zero byte: so EOF is the one that stands before a length that reaches exactly to the end, at
    most six bytes before its text. A COMMAND that savevm writes is left out: it says nothing where no memory is sent.

    :raise StreamCorrupt: it does not end as a stream ends, or begins with something else than devices.
    """
    start = 0
    switchover = bytes((layout.COMMAND,)) + struct.pack(">HH", layout.SWITCHOVER_START, 0)
    while data.startswith(switchover, start):
        start += len(switchover)
    end, description = _end_of_devices(data)
    devices = data[start:end]
    if not devices or devices[0] != layout.FULL or devices[-5:-4] != bytes((layout.FOOTER,)):
        kind = f"{devices[0]}" if devices else "nothing"
        raise StreamCorrupt(
            f"The machine state's devices do not begin and end as sections do (they begin with {kind})"
        )
    return RelayedTail(devices, description)


def _end_of_devices(data: bytes) -> tuple[int, bytes | None]:
    last = data.rfind(0)
    for eof in range(last, max(-1, last - _DESCRIPTION_HEAD), -1):
        head = data[eof : eof + _DESCRIPTION_HEAD + 1]
        length = len(data) - eof - _DESCRIPTION_HEAD
        if head == bytes((layout.EOF,)) + layout.mark(layout.DESCRIPTION, max(length, 0)) + b"{":
            return eof, data[eof + _DESCRIPTION_HEAD :]
    if last < 0 or last != len(data) - 1:
        raise StreamCorrupt("The machine state has no end after its devices")
    return last, None


def timer_ns(devices: bytes) -> int | None:
    """The guest's virtual clock in nanoseconds, as the section `timer` says it.

    The section's last field is that clock's value if the machine stood still when it was saved, as it does for every save.

    :param devices: of `RelayedTail`.
    :return: None where the section is not there, or the clock is derived from a count of instructions, which it holds elsewhere.
    """
    at = -1
    while (at := devices.find(_TIMER, at + 1)) >= 0:
        head, fields = at - 5, at + len(_TIMER)
        end = fields + _TIMER_FIELDS.size
        if head >= 0 and devices[head] == layout.FULL:
            footer = layout.mark(layout.FOOTER, int.from_bytes(devices[head + 1 : at], "big"))
            if devices[end : end + len(footer)] == footer:
                value: int = _TIMER_FIELDS.unpack_from(devices, fields)[1]
                return value
    return None
