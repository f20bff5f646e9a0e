"""A copy of memory is of one instant, whatever the guest does meanwhile, and holds nothing of ours but that memory."""

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from stillframe.block.file import FileNode
from stillframe.errors import IOFailed
from stillframe.machine.frozen import CopiedMemory, ForkedMemory, FrozenMemory, freeze, frozen
from stillframe.machine.memory import GuestMemory, MemoryBlock

SIZE = 8 << 20


@pytest.fixture
def memory() -> GuestMemory:
    blocks = (
        MemoryBlock.allocate("ram", 1 << 32, SIZE, is_ram=True),
        MemoryBlock.allocate("flash", 1 << 30, 64 << 10, is_ram=False),
        MemoryBlock.allocate("none", 1 << 29, 0, is_ram=False),
    )
    chance = np.random.default_rng(1)
    for block in blocks:
        pages = np.frombuffer(block.view, np.uint8).reshape(-1, 4096)
        pages[:] = chance.integers(0, 256, pages.shape, np.uint8)
        pages[::3] = 0
    return GuestMemory(blocks)


@pytest.fixture(params=["forked", "copied"])
def copy(request: pytest.FixtureRequest, memory: GuestMemory) -> Iterator[FrozenMemory]:
    made = ForkedMemory(memory) if request.param == "forked" else CopiedMemory(memory, "a test wants it")
    yield made
    made.close()


def content(memory: GuestMemory) -> list[bytes]:
    return [bytes(block.view) for block in memory]


def content_of(copy: FrozenMemory, memory: GuestMemory) -> list[bytes]:
    found = []
    for block in memory:
        buffer = bytearray(block.size)
        view = memoryview(buffer)
        for start in range(0, block.size, 100_000):
            copy.readinto(block, start, view[start : start + 100_000])
        found.append(bytes(buffer))
    return found


def test_a_copy_keeps_its_instant_while_the_guest_overwrites_everything(
    memory: GuestMemory, copy: FrozenMemory
) -> None:
    before = content(memory)
    for block in memory:
        block.view[:] = b"\xee" * block.size
    assert content_of(copy, memory) == before
    assert {block.view[-1] for block in memory if block.size} == {0xEE}


def test_closing_a_copy_leaves_the_guests_memory_as_it_is(memory: GuestMemory, copy: FrozenMemory) -> None:
    before = content(memory)
    copy.close()
    copy.close()
    assert content(memory) == before


def test_two_copies_show_two_instants(memory: GuestMemory) -> None:
    with frozen(memory) as first, frozen(memory) as second:
        first.freeze()
        one = content(memory)
        memory.blocks[0].view[5 << 20 : 6 << 20] = bytes(1 << 20)
        second.freeze()
        two = content(memory)
        memory.blocks[0].view[:] = bytes(SIZE)
        assert content_of(second.copy, memory) == two
        assert content_of(first.copy, memory) == one


def test_a_host_that_does_not_fork_gets_a_copy_and_the_reason(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> int:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    descriptors = len(os.listdir("/proc/self/fd"))
    before = content(memory)
    with frozen(memory) as freezer:
        copy = freezer.freeze()
        assert copy.how == "copied"
        assert "Cannot allocate memory" in copy.why
        memory.blocks[0].view[:] = bytes(SIZE)
        assert content_of(copy, memory) == before
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_the_copys_process_keeps_no_lock_of_an_image(memory: GuestMemory, tmp_path: Path) -> None:
    path = tmp_path / "image"
    path.write_bytes(bytes(4096))
    image = FileNode("image", str(path))
    copy = freeze(memory)
    assert copy.how == "forked"
    copy.readinto(memory.blocks[0], 0, memoryview(bytearray(1)))
    image.close()
    FileNode("again", str(path)).close()
    copy.close()


def test_the_copys_process_does_not_die_of_the_ctrl_c_that_we_answer(memory: GuestMemory) -> None:
    before = content(memory)
    copy = ForkedMemory(memory)
    copy.readinto(memory.blocks[0], 0, memoryview(bytearray(1)))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        os.kill(copy._pid, number)
    assert content_of(copy, memory) == before
    copy.close()


def test_a_ctrl_c_at_the_very_fork_is_not_answered_by_the_copys_process(
    memory: GuestMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would undo there, in the images that both have open, what the parent is at."""
    answers, answer = os.pipe()
    fork = os.fork

    def interrupted() -> int:
        pid = fork()
        if not pid:
            os.kill(os.getpid(), signal.SIGINT)
        return pid

    monkeypatch.setattr(os, "fork", interrupted)
    before = signal.signal(signal.SIGINT, lambda number, frame: os.write(answer, b"!") and None)
    try:
        ForkedMemory(memory).close()
        assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    finally:
        signal.signal(signal.SIGINT, before)
        os.close(answer)
    assert os.read(answers, 1) == b""
    os.close(answers)


def test_a_copy_is_given_back_where_the_kernel_waits_for_our_children(memory: GuestMemory) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        copy = ForkedMemory(memory)
        assert content_of(copy, memory) == content(memory)
        copy.close()
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_copy_whose_process_was_killed_says_so(memory: GuestMemory) -> None:
    copy = ForkedMemory(memory)
    os.kill(copy._pid, signal.SIGKILL)
    os.waitid(os.P_PID, copy._pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(IOFailed, match="the instant of the snapshot is gone"):
        copy.readinto(memory.blocks[0], 0, memoryview(bytearray(4096)))
    copy.close()


def test_the_copys_process_ends_with_ours_however_we_die(tmp_path: Path) -> None:
    program = (
        "from stillframe.machine.frozen import ForkedMemory\n"
        "from stillframe.machine.memory import GuestMemory, MemoryBlock\n"
        "import os, signal\n"
        "copy = ForkedMemory(GuestMemory((MemoryBlock.allocate('ram', 0, 1 << 20, is_ram=True),)))\n"
        "print(copy._pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    # The output has ended: nobody holds its other end any more, so the child has closed it or is gone.
    assert died.returncode == -signal.SIGKILL
    child = Path("/proc") / died.stdout.strip()
    while child.exists():
        if "State:\tZ" in (child / "status").read_text():
            break
