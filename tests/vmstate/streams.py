"""Streams in memory, written and surveyed: what the tests of this folder share."""

from collections.abc import Mapping, Sequence

import numpy as np

from stillframe.vmstate.fields import Description
from stillframe.vmstate.ram import Addresses, PageMap, Pages, RamBlock
from stillframe.vmstate.sections import (
    GLOBAL_STATE,
    GLOBAL_STATE_KEY,
    SectionKey,
    SectionState,
    global_state,
)
from stillframe.vmstate.stream import MemoryContent, Survey, survey, write_stream
from stillframe.vmstate.transfer import StateSource, state_sink


class Memory:
    """A visitor that puts every page where it belongs, one after the other."""

    def __init__(self) -> None:
        self.content: dict[str, bytearray] = {}

    def blocks(self, blocks: Sequence[RamBlock]) -> None:
        assert sum(block.length for block in blocks) <= 64 << 20, "a test's memory is small"
        self.content = {block.name: bytearray(block.length) for block in blocks}

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        for address, page in zip(addresses.tolist(), pages, strict=True):
            self.content[block.name][address : address + 4096] = page.tobytes()

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        for address in addresses.tolist():
            self.content[block.name][address : address + 4096] = bytes(4096)


def written(
    machine: str, memory: Mapping[str, bytes | bytearray], sections: Sequence[SectionState] = ()
) -> bytes:
    """A stream as bytes."""
    out = bytearray()

    def write_at(offset: int, data: memoryview) -> None:
        assert offset == len(out)
        out.extend(data)

    content = [MemoryContent.of(name, memoryview(data)) for name, data in memory.items()]
    with state_sink(write_at) as sink:
        write_stream(sink, machine, content, sections)
    return bytes(out)


def surveyed(
    data: bytes,
    machine: str = "none",
    sections: Sequence[SectionState] | Mapping[SectionKey, Description] = (),
    pages: Memory | PageMap | None = None,
) -> Survey:
    """The survey of a stream; `sections` or their descriptions are what this machine knows, `globalstate`
    besides."""
    known: dict[SectionKey, Description] = {GLOBAL_STATE_KEY: GLOBAL_STATE}
    if isinstance(sections, Mapping):
        known |= sections
    else:
        known |= {(section.name, section.instance_id): section.description for section in sections}
    source = StateSource(lambda offset, length: data[offset : offset + length], len(data))
    return survey(source, machine, known, Memory() if pages is None else pages)


def mixed_memory(pages: int, seed: int = 1, zero_share: float = 0.4) -> bytes:
    """Random pages and zero ones, in runs and alternating."""
    random = np.random.default_rng(seed)
    content = random.integers(0, 256, (pages, 4096), np.uint8)
    content[random.random(pages) < zero_share] = 0
    content[pages // 4 : pages // 2] = 0
    content[pages // 2 : pages // 2 + pages // 4, 4095] = 1
    return content.tobytes()


__all__ = ["Memory", "global_state", "mixed_memory", "surveyed", "written"]
