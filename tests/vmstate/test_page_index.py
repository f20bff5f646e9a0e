"""A page index that is damaged is refused, whatever it says, and costs no more memory than the machine has pages."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.errors import StreamCorrupt
from stillframe.vmstate.page_index import (
    NO_RECORD,
    ZERO_PAGE,
    PageIndex,
    pack_page_index,
    unpack_page_index,
)
from stillframe.vmstate.ram import PAGE_RECORD, PAGE_SIZE, RamBlock

BLOCKS = (RamBlock("ram", 64 * PAGE_SIZE), RamBlock("rom", 4 * PAGE_SIZE))
STREAM = 100 * PAGE_RECORD


def offsets() -> st.SearchStrategy[list[int]]:
    here = st.integers(0, 99).map(lambda number: 8 + number * PAGE_RECORD)
    return st.lists(st.one_of(here, st.just(ZERO_PAGE), st.just(NO_RECORD)), min_size=64, max_size=64)


@given(offsets(), st.integers(0, STREAM))
def test_what_was_packed_is_unpacked(found: list[int], parts_end: int) -> None:
    tables = {"ram": np.array(found, np.int64), "rom": np.full(4, NO_RECORD, np.int64)}
    index = PageIndex(BLOCKS, tables, parts_end, 5)
    again = unpack_page_index(pack_page_index(index), STREAM, BLOCKS)
    assert (again.blocks, again.parts_end, again.record_bytes) == (BLOCKS, parts_end, 5)
    assert [again.offsets["ram"].tolist(), again.offsets["rom"].tolist()] == [found, [NO_RECORD] * 4]


@given(offsets(), st.data())
def test_a_changed_byte_is_refused_or_points_into_the_stream(found: list[int], data: st.DataObject) -> None:
    tables = {"ram": np.array(found, np.int64), "rom": np.full(4, ZERO_PAGE, np.int64)}
    packed = bytearray(pack_page_index(PageIndex(BLOCKS, tables, 7, 5)))
    for _ in range(data.draw(st.integers(1, 4))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    del packed[data.draw(st.integers(0, len(packed))) :]
    try:
        index = unpack_page_index(bytes(packed), STREAM, BLOCKS)
    except StreamCorrupt:
        return
    for block in BLOCKS:
        where = index.offsets[block.name]
        assert len(where) == block.length // PAGE_SIZE
        assert ((where >= NO_RECORD) & (where <= STREAM - PAGE_SIZE)).all()


@pytest.mark.parametrize("expected", [(), BLOCKS[:1], BLOCKS[::-1], (RamBlock("ram", PAGE_SIZE), BLOCKS[1])])
def test_an_index_of_another_memory_is_refused(expected: tuple[RamBlock, ...]) -> None:
    packed = pack_page_index(PageIndex.of(BLOCKS))
    with pytest.raises(StreamCorrupt):
        unpack_page_index(packed, STREAM, expected)
