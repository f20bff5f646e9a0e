"""Pages and zero pages that alternate, as a guest's memory often does: read together, they are what they are one by one."""

import struct

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stillframe.vmstate.ram import (
    CONTINUE,
    EOS,
    PAGE,
    PAGE_SIZE,
    ZERO,
    Addresses,
    Pages,
    RamBlock,
    RamReader,
)
from stillframe.vmstate.transfer import StateSource

BLOCKS = (RamBlock("one", 16 * PAGE_SIZE), RamBlock("two", 16 * PAGE_SIZE))
RECORDS = st.lists(st.tuples(st.sampled_from(BLOCKS), st.integers(0, 15), st.integers(0, 255)), max_size=60)


class Memory:
    """What a stream makes of memory that held something else."""

    def __init__(self) -> None:
        self.bytes = {block.name: np.full((16, PAGE_SIZE), 255, np.uint8) for block in BLOCKS}

    def blocks(self, blocks: object) -> None:
        raise AssertionError("a second list of blocks")

    def pages(self, block: RamBlock, addresses: Addresses, pages: Pages, offset: int) -> None:
        for address, page in zip(addresses.tolist(), pages, strict=True):
            self.bytes[block.name][address // PAGE_SIZE] = page

    def zeroes(self, block: RamBlock, addresses: Addresses) -> None:
        self.bytes[block.name][addresses // PAGE_SIZE] = 0


def stream_of(records: list[tuple[RamBlock, int, int]]) -> bytes:
    """:param records: block, page, and its byte, 0 for a zero page."""
    out, before = bytearray(), None
    for block, page, value in records:
        flags = (PAGE if value else ZERO) | (CONTINUE if block is before else 0)
        out += struct.pack(">Q", page * PAGE_SIZE | flags)
        if block is not before:
            out += bytes((len(block.name),)) + block.name.encode()
        out += bytes((value,)) * (PAGE_SIZE if value else 1)
        before = block
    return bytes(out + struct.pack(">Q", EOS))


@given(RECORDS, st.sampled_from((1, 512, 4096, 65536, 2 << 20)))
def test_memory_that_alternates_is_what_its_last_records_say(
    records: list[tuple[RamBlock, int, int]], transfer: int
) -> None:
    stream, memory = stream_of(records), Memory()
    source = StateSource(
        lambda offset, length: stream[offset : offset + length], len(stream), transfer=transfer
    )
    RamReader(source, memory, BLOCKS, together=True).payload()
    assert source.offset == len(stream)
    expected = Memory()
    for block, page, value in records:
        expected.bytes[block.name][page] = value
    for block in BLOCKS:
        assert np.array_equal(memory.bytes[block.name], expected.bytes[block.name])
