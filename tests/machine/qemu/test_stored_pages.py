"""Sections made of a stored stream's pages hold what the stream's own reader finds there, in any order and number."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from machine.qemu.qemus import Memory
from stillframe.errors import StreamCorrupt
from stillframe.machine.engines.qemu.stored_pages import StoredPages
from stillframe.vmstate import layout
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.ram import PAGE_SIZE, RamReader
from stillframe.vmstate.stream import RAM_SECTION_ID, MemoryContent, write_continuation, write_stream
from stillframe.vmstate.transfer import StateSource, state_sink

PAGES = 700
START = len(layout.header("none") + layout.section_head(layout.START, 0, layout.RAM_NAME, 0, 0))
"""Where the list of memory blocks begins in a stream."""


@cache
def stream(seed: int) -> tuple[bytes, PageIndex, bytes]:
    """A stream with a continuation, its index, and the memory that it stands for."""
    random = np.random.default_rng(seed)
    memory = random.integers(0, 256, (PAGES, PAGE_SIZE), np.uint8)
    memory[random.random(PAGES) < 0.4] = 0
    data = bytearray()

    def write_at(offset: int, view: memoryview) -> None:
        data[offset : offset + len(view)] = view

    content = [MemoryContent.of("ram", memory.reshape(-1).data)]
    with state_sink(write_at) as sink:
        index = write_stream(sink, "none", content, [])
    changed = np.flatnonzero(random.random(PAGES) < 0.3)
    memory[changed] = random.integers(0, 2, (len(changed), 1), np.uint8)
    with state_sink(write_at, index.parts_end) as sink:
        index = write_continuation(sink, "none", index, content, [changed], [])
    return bytes(data), index, memory.tobytes()


def stored_pages(data: bytes, index: PageIndex) -> StoredPages:
    return StoredPages(RAM_SECTION_ID, index, lambda offset, length: data[offset : offset + length])


@settings(max_examples=40)
@given(st.integers(0, 5), st.data())
def test_sections_hold_what_the_stream_says_of_each_page(seed: int, data: st.DataObject) -> None:
    written, index, memory = stream(seed)
    pages = stored_pages(written, index)
    (block,) = index.blocks
    chosen = data.draw(st.lists(st.integers(0, PAGES - 1), min_size=1, max_size=128, unique=True))
    whole = data.draw(st.booleans())
    portions = pages.pieces(block, np.arange(PAGES)) if whole else [np.array(chosen)]
    found = Memory(index.blocks)
    found.content["ram"][:] = 0xAA
    listed = written[START : START + written[START:].index(layout.mark(layout.FOOTER, RAM_SECTION_ID))]
    for portion in portions:
        section = bytes(pages.section(block, portion))
        assert section.startswith(layout.mark(layout.PART, RAM_SECTION_ID))
        assert section.endswith(layout.mark(layout.FOOTER, RAM_SECTION_ID))
        payloads = listed + section[5:-5]
        source = StateSource(lambda offset, length, of=payloads: of[offset : offset + length], len(payloads))
        reader = RamReader(source, found)
        reader.payload()
        reader.payload()
        assert source.remaining == 0
    expected = np.full((PAGES, PAGE_SIZE), 0xAA, np.uint8)
    numbers = range(PAGES) if whole else chosen
    for number in numbers:
        expected[number] = np.frombuffer(memory, np.uint8, PAGE_SIZE, number * PAGE_SIZE)
    assert (found.content["ram"] == expected).all()


@given(st.integers(0, PAGES - 1), st.integers(-8000, 8000))
def test_an_index_that_points_elsewhere_is_noticed(page: int, by: int) -> None:
    written, index, _ = stream(1)
    offsets = index.offsets["ram"].copy()
    # Below nothing it says that the page is zeroes.
    if offsets[page] < 0 or by == 0 or offsets[page] + by < 0:
        return
    offsets[page] += by
    wrong = PageIndex(index.blocks, {"ram": offsets}, index.parts_end, index.record_bytes)
    with pytest.raises(StreamCorrupt):
        stored_pages(written, wrong).section(index.blocks[0], np.array([page]))


def test_a_stream_that_ends_too_early_is_noticed() -> None:
    written, index, _ = stream(1)
    pages = stored_pages(written[: len(written) // 2], index)
    last = pages.pieces(index.blocks[0], np.flatnonzero(index.offsets["ram"] > len(written) // 2))[-1]
    with pytest.raises(StreamCorrupt, match="where its page index points"):
        pages.section(index.blocks[0], last)
