"""The machine-state stream as a whole: written section by section, and surveyed before anything of it is
used.

The layout of the bytes is in layout.py, of RAM's records in ram.py, of a device's fields in fields.py.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from stillframe.errors import StateMismatch, StreamCorrupt
from stillframe.vmstate import layout
from stillframe.vmstate.description import describe
from stillframe.vmstate.fields import Description, decode, encode
from stillframe.vmstate.page_index import ZERO_PAGE, Offsets, PageIndex
from stillframe.vmstate.ram import (
    PAGE_RECORD,
    PAGE_SIZE,
    ZERO_RECORD,
    Addresses,
    Pages,
    PageVisitor,
    RamBlock,
    RamReader,
    RamWriter,
)
from stillframe.vmstate.sections import SectionKey, SectionState, SurveyedSection
from stillframe.vmstate.transfer import StateSink, StateSource

RAM_SECTION_ID = 0x53460000
"""Ours are far above those of QEMU, which counts from 0; layout.py tells why."""

_FIRST_DEVICE_ID = RAM_SECTION_ID + 1
_MAXIMUM_DESCRIPTION = 64 << 20


@dataclass(frozen=True, slots=True)
class MemoryContent:
    """One block of memory to be written.

    :param length: bytes, whole pages. :param readinto: fills a buffer with the block's bytes from an offset on.
    """

    name: str
    length: int
    readinto: Callable[[int, memoryview], None]

    @classmethod
    def of(cls, name: str, view: memoryview) -> "MemoryContent":
        """Bytes that lie in memory."""

        def readinto(offset: int, buffer: memoryview) -> None:
            buffer[:] = view[offset : offset + len(buffer)]

        return cls(name, len(view), readinto)

    @property
    def block(self) -> RamBlock:
        """As the stream lists it."""
        return RamBlock(self.name, self.length)


def write_stream(
    sink: StateSink,
    machine: str,
    memory: Sequence[MemoryContent],
    sections: Sequence[SectionState],
    wrote: Callable[[int], None] = lambda length: None,
) -> PageIndex:
    """A whole stream.

    :param machine: the board's name.
    :param wrote: called with the bytes of memory covered since its last call, a mebibyte at most; raises to
        end the writing.
    :return: where its pages lie.
    :raise StateMismatch: a section's values do not fit its description; raised before anything is written.
    """
    tail = device_sections(sections)
    blocks = [content.block for content in memory]
    records = Records(PageIndex.of(blocks))
    ram = RamWriter(sink, records.note)
    sink.write(layout.header(machine))
    sink.write(layout.section_head(layout.START, RAM_SECTION_ID, layout.RAM_NAME, 0, layout.RAM_VERSION))
    ram.block_list(blocks)
    ram.end()
    sink.write(layout.mark(layout.FOOTER, RAM_SECTION_ID))
    with _part(sink, ram):
        for content, block in zip(memory, blocks, strict=True):
            ram.pages(block, content.readinto, wrote)
    return _finish(sink, ram, records, tail, describe(machine, sections))


def write_continuation(
    sink: StateSink,
    machine: str,
    base: PageIndex,
    memory: Sequence[MemoryContent],
    changed: Sequence[Addresses],
    sections: Sequence[SectionState],
    wrote: Callable[[int], None] = lambda length: None,
) -> PageIndex:
    """The rest of a stream whose beginning is an older one's, of the same machine, up to the end of its last PART.

    :param sink: stands at `base.parts_end`. :param base: where the older stream's pages lie.
    :param changed: for each of `memory` the pages that are not as in the older stream.
    :raise StateMismatch: see `write_stream`.
    """
    tail = device_sections(sections)
    records = Records(base)
    ram = RamWriter(sink, records.note)
    with _part(sink, ram):
        for content, numbers in zip(memory, changed, strict=True):
            ram.some_pages(content.block, numbers, content.readinto, wrote)
    return _finish(sink, ram, records, tail, describe(machine, sections))


class Records:
    """A page index in the making. :param base: what it goes on from; not changed."""

    def __init__(self, base: PageIndex) -> None:
        self._blocks = base.blocks
        self._offsets = {name: offsets.copy() for name, offsets in base.offsets.items()}
        self._bytes = base.record_bytes

    def note(self, block: RamBlock, addresses: Addresses, offset: int | None) -> None:
        """See `RamWriter`."""
        count = len(addresses)
        where = self._offsets[block.name]
        if offset is None:
            where[addresses // PAGE_SIZE] = ZERO_PAGE
            self._bytes += count * ZERO_RECORD
        else:
            where[addresses // PAGE_SIZE] = offset + PAGE_RECORD * np.arange(count)
            self._bytes += count * PAGE_RECORD

    def offsets(self, block: RamBlock) -> Offsets:
        """Where the block's pages lie by now."""
        return self._offsets[block.name]

    def index(self, parts_end: int) -> PageIndex:
        """What was noted until now."""
        return PageIndex(self._blocks, self._offsets, parts_end, self._bytes)


@contextmanager
def _part(sink: StateSink, ram: RamWriter) -> Iterator[None]:
    sink.write(layout.mark(layout.PART, RAM_SECTION_ID))
    yield
    ram.end()
    sink.write(layout.mark(layout.FOOTER, RAM_SECTION_ID))


def _finish(sink: StateSink, ram: RamWriter, records: Records, tail: bytes, json: bytes) -> PageIndex:
    """Everything behind the last PART."""
    index = records.index(sink.offset)
    sink.write(layout.mark(layout.END, RAM_SECTION_ID))
    ram.end()
    sink.write(layout.mark(layout.FOOTER, RAM_SECTION_ID))
    sink.write(tail)
    sink.write(bytes((layout.EOF,)) + layout.mark(layout.DESCRIPTION, len(json)) + json)
    return index


def device_sections(sections: Sequence[SectionState]) -> bytes:
    """The FULL sections of a stream. :raise StateMismatch: see `fields.encode`."""
    written = bytearray()
    for number, section in enumerate(sections, _FIRST_DEVICE_ID):
        written += layout.section_head(
            layout.FULL, number, section.name, section.instance_id, section.description.version
        )
        written += encode(section.description, section.values, section.name)
        written += layout.mark(layout.FOOTER, number)
    return bytes(written)


@dataclass(frozen=True, slots=True)
class Survey:
    """What a whole stream holds, its pages excepted.

    :param machine: the board's name. :param blocks: of memory; None if there is no RAM section.
    :param sections: in the order of the stream, at most one a key.
    :param size: bytes of the stream, its JSON description included.
    :param description: the JSON, as bytes that nobody has looked at; None if there is none.
    """

    machine: str
    blocks: tuple[RamBlock, ...] | None
    sections: Mapping[SectionKey, SurveyedSection]
    size: int
    description: bytes | None


def survey(
    source: StateSource, machine: str, descriptions: Mapping[SectionKey, Description], pages: PageVisitor
) -> Survey:
    """Read a stream from its first byte to its last, and decode every field.

    :param machine: this board's name.
    :param descriptions: every section that this machine can take.
    :param pages: told of all of RAM's records.
    :raise StreamCorrupt: it is no stream, or a damaged one.
    :raise StateMismatch: made on another board, or with a section or a version that is not in `descriptions`.
    """
    return _Surveyor(source, descriptions, pages).survey(machine)


def survey_devices(
    source: StateSource, machine: str, descriptions: Mapping[SectionKey, Description], index: PageIndex
) -> Survey:
    """`survey` of a stream of ours whose pages are known: what lies before and behind the PARTs.

    :raise StreamCorrupt: :raise StateMismatch: as `survey`.
    """
    return _Surveyor(source, descriptions, _NoPages()).survey(machine, index)


class _NoPages:
    """A visitor for what holds no pages."""

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        raise StreamCorrupt("The machine state lists its memory behind the end that its page index gives")

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        raise StreamCorrupt("The machine state has pages behind the end that its page index gives")

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        raise StreamCorrupt("The machine state has pages behind the end that its page index gives")


class _Surveyor:
    def __init__(
        self, source: StateSource, descriptions: Mapping[SectionKey, Description], pages: PageVisitor
    ) -> None:
        self._source = source
        self._descriptions = descriptions
        self._pages = pages
        self._sections: dict[SectionKey, SurveyedSection] = {}
        self._ram: RamReader | None = None
        self._ram_id = -1
        self._ram_ended = False

    def survey(self, machine: str, index: PageIndex | None = None) -> Survey:
        """:param index: leaves out all that lies before the end of its last PART, but for the head."""
        source = self._source
        saved_on = self._head()
        if saved_on != machine:
            raise StateMismatch(
                f"Machine type received is '{saved_on}' and local is '{machine}'",
                remedy=f"Start a machine with the board '{saved_on}'.",
            )
        if index is not None:
            source.seek(index.parts_end)
            self._ram, self._ram_id = RamReader(source, self._pages), RAM_SECTION_ID
        while True:
            source.section = f"the section after byte {source.offset}"
            kind = source.u8()
            if kind == layout.EOF:
                break
            if kind in (layout.START, layout.FULL):
                self._section(kind)
            elif kind in (layout.PART, layout.END):
                self._ram_part(kind)
            elif kind == layout.COMMAND:
                self._command()
            else:
                raise source.corrupt(f"Unknown savevm section type {kind}")
        if self._ram is not None and not self._ram_ended:
            raise source.corrupt("The memory's section has no end")
        description = self._description()
        blocks = None if self._ram is None else self._ram.block_list
        return Survey(
            saved_on,
            blocks if index is None else index.blocks,
            self._sections,
            source.offset,
            description,
        )

    def _head(self) -> str:
        source = self._source
        if source.remaining < 8 or source.u32() != layout.MAGIC:
            raise source.corrupt("Not a migration stream")
        version = source.u32()
        if version == layout.OBSOLETE_VERSION:
            raise source.corrupt("SaveVM v2 format is obsolete and don't work anymore")
        if version != layout.VERSION:
            raise source.corrupt("Unsupported migration stream version")
        if source.u8() != layout.CONFIGURATION:
            raise source.corrupt("Configuration section missing")
        source.section = "the section 'configuration'"
        length = source.u32()
        if length > 255:
            raise source.corrupt(f"A machine name of {length} bytes")
        name = source.text(length, "the machine")
        while bytes(source.window(1)[:1]) == bytes((layout.SUBSECTION,)):
            self._configuration_subsection()
        return name

    def _configuration_subsection(self) -> None:
        source = self._source
        source.skip(1)
        name = source.text(source.u8(), "a subsection")
        source.u32()
        if name != "configuration/target-page-bits":
            raise StateMismatch(
                f"The machine state needs '{name}', which this machine does not have", section="configuration"
            )
        if source.u32() != 12:
            raise StateMismatch(
                "The machine state is in pages of another size than 4096", section="configuration"
            )

    def _section(self, kind: int) -> None:
        source = self._source
        offset = source.offset - 1
        section_id = source.u32()
        name = source.text(source.u8(), "a section")
        instance_id, version = source.u32(), source.u32()
        source.section = f"section '{name}'"
        key = (name, instance_id)
        if name == layout.RAM_NAME and kind == layout.START and instance_id == 0:
            if version != layout.RAM_VERSION:
                raise StateMismatch(
                    f"savevm: unsupported version {version} for '{name}' v{layout.RAM_VERSION}", section=name
                )
            if self._ram is not None:
                raise source.corrupt("A second section 'ram'")
            self._ram, self._ram_id = RamReader(source, self._pages), section_id
            self._ram.payload()
        else:
            description = self._descriptions.get(key)
            if description is None or kind != layout.FULL:
                raise StateMismatch(
                    f"Unknown savevm section or instance '{name}' {instance_id}. Make sure that your "
                    "current VM setup matches your saved VM setup, including any hotplugged devices",
                    section=name,
                )
            if key in self._sections:
                raise source.corrupt(f"A second section '{name}' {instance_id}")
            values = decode(description, version, source.take, name)
            self._sections[key] = SurveyedSection(name, instance_id, version, offset, values)
        self._footer(name, section_id)

    def _ram_part(self, kind: int) -> None:
        source = self._source
        section_id = source.u32()
        if self._ram is None or section_id != self._ram_id or self._ram_ended:
            raise source.corrupt(f"Unknown savevm section {section_id}")
        source.section = f"section '{layout.RAM_NAME}'"
        self._ram.payload()
        self._ram_ended = kind == layout.END
        self._footer(layout.RAM_NAME, section_id)

    def _footer(self, name: str, section_id: int) -> None:
        source = self._source
        if source.remaining == 0 or source.u8() != layout.FOOTER:
            raise source.corrupt(f"Missing section footer for {name}")
        found = source.u32()
        if found != section_id:
            raise source.corrupt(
                f"Mismatched section id in footer for {name} - read 0x{found:x} expected 0x{section_id:x}"
            )

    def _command(self) -> None:
        source = self._source
        command, length = int.from_bytes(source.take(2), "big"), int.from_bytes(source.take(2), "big")
        if command != layout.SWITCHOVER_START or length:
            raise source.corrupt(f"MIG_CMD {command:#x} unknown")

    def _description(self) -> bytes | None:
        """What stands behind EOF; anything but a description is not part of the stream."""
        source = self._source
        source.section = "the description"
        head = bytes(source.window(5)[:5])
        if len(head) < 5 or head[0] != layout.DESCRIPTION:
            return None
        length = int.from_bytes(head[1:], "big")
        if length > source.remaining - 5 or length > _MAXIMUM_DESCRIPTION:
            raise source.corrupt(f"A description of {length} bytes")
        source.skip(5)
        return source.take(length)
