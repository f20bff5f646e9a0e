"""Whoever writes to memory, and however: what changed since the ground is found, by the kernel's memory and by hashes alike."""

import errno
import os
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stillframe.machine import tracking as tracking_module
from stillframe.machine.folding import fold
from stillframe.machine.frozen import freeze
from stillframe.machine.memory import PAGE_SIZE, GuestMemory, MemoryBlock
from stillframe.machine.tracking import Changes, HashName, HashTracking, KernelTracking, Tracking, track

PAGES = 2048


@pytest.fixture
def memory() -> GuestMemory:
    return GuestMemory(
        (
            MemoryBlock.allocate("ram", 1 << 32, PAGES * PAGE_SIZE, is_ram=True),
            MemoryBlock.allocate("flash", 1 << 30, 16 * PAGE_SIZE, is_ram=False),
            MemoryBlock.allocate("none", 1 << 29, 0, is_ram=False),
        )
    )


@pytest.fixture(params=["kernel", "xxh3", "blake3"])
def tracking(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[Tracking]:
    found = KernelTracking(memory) if request.param == "kernel" else HashTracking(request.param)
    found.stand(found_by(found, memory)[0])
    yield found
    found.close()


def found_by(tracking: Tracking, memory: GuestMemory) -> tuple[Changes, dict[str, list[int]]]:
    changes = tracking.take()
    copy = freeze(memory)
    try:
        return changes, {block.name: changes.pages(block, copy).tolist() for block in memory if block.size}
    finally:
        copy.close()


def put(memory: GuestMemory, page: int, value: int = 1) -> None:
    memory.blocks[0].view[page * PAGE_SIZE + 17] = value


def test_each_page_written_since_the_ground_is_found_and_no_other(
    tracking: Tracking, memory: GuestMemory
) -> None:
    for page in (0, 5, 6, 511, 512, 513, PAGES - 1):
        put(memory, page)
    memory.blocks[1].view[3 * PAGE_SIZE] = 9
    changes, pages = found_by(tracking, memory)
    assert pages == {"ram": [0, 5, 6, 511, 512, 513, PAGES - 1], "flash": [3]}
    tracking.stand(changes)
    changes, pages = found_by(tracking, memory)
    assert pages == {"ram": [], "flash": []}


def test_a_save_that_came_to_nothing_leaves_its_changes_to_the_next(
    tracking: Tracking, memory: GuestMemory
) -> None:
    put(memory, 3)
    changes, pages = found_by(tracking, memory)
    assert pages["ram"] == [3]
    put(memory, 4)
    tracking.put_back(changes)
    put(memory, 1000)
    changes, pages = found_by(tracking, memory)
    assert pages["ram"] == [3, 4, 1000]
    tracking.stand(changes)
    put(memory, 7)
    assert found_by(tracking, memory)[1]["ram"] == [7]


def test_what_is_written_while_a_save_is_on_its_way_belongs_to_the_next(
    tracking: Tracking, memory: GuestMemory
) -> None:
    put(memory, 1)
    changes, pages = found_by(tracking, memory)
    put(memory, 2)
    tracking.stand(changes)
    assert pages["ram"] == [1]
    assert found_by(tracking, memory)[1]["ram"] == [2]


def test_memory_put_back_into_huge_pages_keeps_its_bytes_and_what_is_known_of_them(
    tracking: Tracking, memory: GuestMemory
) -> None:
    pages = np.frombuffer(memory.blocks[0].view, np.uint8).reshape(PAGES, PAGE_SIZE)
    # The second of four huge pages stays sparse, the third is not touched at all.
    pages[:512, 0], pages[700, 0], pages[1536:, 0] = 1, 2, 3
    tracking.stand(found_by(tracking, memory)[0])
    for page in (3, 511, 700, 1540):
        put(memory, page, 9)
    before = pages.copy()
    fold(memory, tracking, lambda work: work(), cheap=0)
    assert (pages == before).all()
    put(memory, 5)
    put(memory, 1541)
    changes, found = found_by(tracking, memory)
    assert found["ram"] == [3, 5, 511, 700, 1540, 1541]
    tracking.put_back(changes)
    put(memory, 1542)
    assert 1542 in found_by(tracking, memory)[1]["ram"]


def _in_huge_pages(memory: GuestMemory) -> int:
    """Bytes of the first block, as the kernel says."""
    with open("/proc/self/smaps", encoding="ascii") as lines:
        start = end = total = 0
        address = memory.blocks[0].host_address
        for line in lines:
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, end = (int(word, 16) for word in words[0].split("-"))
            elif words[0] == "AnonHugePages:" and start < address + memory.blocks[0].size and address < end:
                total += int(words[1]) << 10
    return total


def test_memory_that_was_written_page_by_page_is_in_huge_pages_again_before_a_save(
    memory: GuestMemory,
) -> None:
    pages = np.frombuffer(memory.blocks[0].view, np.uint8).reshape(PAGES, PAGE_SIZE)
    pages[:] = 1
    huge = _in_huge_pages(memory)
    if huge < memory.blocks[0].size:
        pytest.skip("this host has no huge pages for us")
    tracking = KernelTracking(memory)
    pages[::100] = 2
    assert _in_huge_pages(memory) < memory.blocks[0].size
    for _ in range(50):
        # A busy host takes its time, and is asked again at the next save.
        fold(memory, tracking, lambda work: work(), cheap=0)
        if _in_huge_pages(memory) >= memory.blocks[0].size:
            break
    assert _in_huge_pages(memory) >= memory.blocks[0].size
    tracking.close()


def test_a_load_is_a_ground_and_nothing_before_it_counts(memory: GuestMemory) -> None:
    tracking = KernelTracking(memory)
    put(memory, 1)
    tracking.stand_here()
    put(memory, 9)
    assert found_by(tracking, memory)[1]["ram"] == [9]
    tracking.close()


def test_what_a_rewind_has_looked_at_still_counts_as_changed(memory: GuestMemory) -> None:
    tracking = KernelTracking(memory)
    tracking.stand_here()
    put(memory, 9)
    assert np.flatnonzero(tracking.changed()["ram"]).tolist() == [9]
    put(memory, 9)
    put(memory, 12)
    assert np.flatnonzero(tracking.changed()["ram"]).tolist() == [9, 12]
    assert found_by(tracking, memory)[1]["ram"] == [9, 12]
    tracking.close()


def test_hashes_without_a_ground_find_every_page_changed(memory: GuestMemory) -> None:
    tracking = HashTracking()
    assert found_by(tracking, memory)[1]["ram"] == list(range(PAGES))


def test_a_guest_cannot_know_the_hash_of_its_pages(memory: GuestMemory) -> None:
    copy = freeze(memory)
    block = memory.blocks[1]
    for algorithm in ("xxh3", "blake3"):
        one, other = HashTracking(algorithm), HashTracking(algorithm)  # type: ignore[arg-type]
        assert (one.digests(block, copy) != other.digests(block, copy)).all()
    copy.close()


@pytest.mark.parametrize("algorithm", ["xxh3", "blake3"])
def test_where_the_kernel_does_not_tell_hashes_do(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch, algorithm: HashName
) -> None:
    def refused(memory: GuestMemory) -> KernelTracking:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(tracking_module, "KernelTracking", refused)
    found = track(memory, algorithm)
    assert (found.how, found.why) == (
        algorithm,
        "the kernel does not tell what changes: Operation not permitted",
    )
    found.stand(found_by(found, memory)[0])
    put(memory, 3)
    assert found_by(found, memory)[1] == {"ram": [3], "flash": []}
    found.close()


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_the_kernel_and_the_hashes_agree(data: st.DataObject) -> None:
    memory = GuestMemory((MemoryBlock.allocate("ram", 1 << 32, PAGES * PAGE_SIZE, is_ram=True),))
    kernel, hashes = KernelTracking(memory), HashTracking()
    hashes.stand(found_by(hashes, memory)[0])
    pages = np.frombuffer(memory.blocks[0].view, np.uint8).reshape(PAGES, PAGE_SIZE)
    for turn in range(1, 4):
        chosen = data.draw(st.lists(st.integers(0, PAGES - 1), max_size=40))
        pages[chosen] = turn
        (changes, found), (hashed, told) = found_by(kernel, memory), found_by(hashes, memory)
        assert found["ram"] == told["ram"] == sorted(set(chosen))
        if data.draw(st.booleans()):
            kernel.stand(changes)
            hashes.stand(hashed)
        else:
            kernel.put_back(changes)
            hashes.put_back(hashed)
            # Written once more, so that the next turn finds them by both.
            kernel.stand_here()
            hashes.stand(found_by(hashes, memory)[0])
    kernel.close()
