"""A load's job over a real socket while its memory comes: what waits for it, what holds it, how it ends with the machine, and what
is left when it fails."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from snapshots.hosts import qemu_img_check
from snapshots.servers import Server, qemu_img, server
from stillframe.machine.arriving import ArrivingMemory
from stillframe.machine.machine import Machine
from stillframe.machine.memory import GuestMemory, MemoryBlock

RAM = 48 << 20
NODE = {"vmstate": "diskfmt0", "devices": ["diskfmt0"]}


class Guest:
    """What the machine has for memory, seen from outside."""

    def __init__(self) -> None:
        self.block = MemoryBlock.allocate("ram", 0, RAM, is_ram=True)

    def equip(self, machine: Machine) -> None:
        machine.memory = GuestMemory((self.block,))

    def fill(self) -> bytes:
        chunk = os.urandom(1 << 20)
        for offset in range(0, RAM, len(chunk)):
            self.block.view[offset : offset + len(chunk)] = chunk
        return chunk

    def holds(self, chunk: bytes) -> bool:
        view = self.block.view
        return all(view[offset : offset + len(chunk)] == chunk for offset in range(0, RAM, len(chunk)))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "16M")
    yield path
    qemu_img_check(path)


@pytest.fixture
def saved(tmp_path: Path, image: Path) -> bytes:
    """A snapshot "s" of an earlier process. :return: a mebibyte that its memory consists of."""
    guest = Guest()
    with server("stillframe", tmp_path, equip=guest.equip) as found:
        found.add(0, image)
        chunk = guest.fill()
        assert found.save("s").error is None
        found.ask("quit")
    return chunk


@pytest.fixture
def guest() -> Guest:
    return Guest()


@pytest.fixture
def found(tmp_path: Path, image: Path, saved: bytes, guest: Guest) -> Iterator[Server]:
    with server("stillframe", tmp_path, equip=guest.equip) as running:
        running.add(0, image)
        yield running


@pytest.fixture
def held_load(found: Server, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A load that was paused when its guest ran again, with most of its memory still to come. :return: lengths of what comes."""
    came: list[int] = []
    plain = ArrivingMemory.fill

    def fill(self: ArrivingMemory, tell: Callable[[int], None]) -> None:
        assert found.host is not None
        if not came:
            found.host.jobs.pause("load")

        def told(length: int) -> None:
            came.append(length)
            tell(length)

        plain(self, told)

    monkeypatch.setattr(ArrivingMemory, "fill", fill)
    found.send("snapshot-load", job_id="load", tag="s", **NODE)
    events: list[str] = []
    while not {"load paused", "load concluded"} & set(events):
        events += found._next()
    if "load concluded" in events:
        pytest.skip("this host has no userfaultfd that tracks writes")
    job = found.ask("query-jobs")[-1]
    assert job["total-progress"] - job["current-progress"] > RAM // 2
    assert found.status() == "running"
    return came


def errors(found: Server) -> dict[str, str | None]:
    return {job["id"]: job.get("error") for job in found.ask("query-jobs")}


def test_a_save_asked_for_while_memory_comes_waits_for_all_of_it(
    found: Server, guest: Guest, saved: bytes, held_load: list[int]
) -> None:
    found.send("snapshot-save", job_id="save", tag="t", **NODE)
    found.until("save", "created")
    found.send("job-resume", id="load")
    events = found.until("save", "concluded")
    assert events.index("load concluded") < events.index("save running")
    assert errors(found) == {"load": None, "save": None}
    guest.fill()
    found.ask("job-dismiss", id="load")
    found.ask("job-dismiss", id="save")
    assert found.load("t").error is None
    assert guest.holds(saved)


def test_a_load_asked_for_while_memory_comes_waits_for_all_of_it(
    found: Server, guest: Guest, saved: bytes, held_load: list[int]
) -> None:
    found.send("snapshot-load", job_id="again", tag="s", **NODE)
    found.until("again", "created")
    found.send("job-resume", id="load")
    events = found.until("again", "concluded")
    assert events.index("load concluded") < events.index("again running")
    assert errors(found) == {"load": None, "again": None}
    assert guest.holds(saved)


def test_a_held_load_lets_the_guest_have_all_of_its_memory_and_stop_and_go_on(
    found: Server, guest: Guest, saved: bytes, held_load: list[int]
) -> None:
    found.ask("stop")
    assert found.status() == "paused"
    assert guest.holds(saved)
    found.ask("cont")
    assert found.status() == "running"
    found.send("job-resume", id="load")
    found.until("load", "concluded")
    assert errors(found) == {"load": None}
    assert guest.holds(saved)


def test_a_load_whose_guest_runs_cannot_be_cancelled(
    found: Server, guest: Guest, saved: bytes, held_load: list[int]
) -> None:
    refused = found.lines.execute("job-cancel", id="load")
    assert "cannot accept command verb 'cancel'" in refused["desc"]
    found.send("job-resume", id="load")
    found.until("load", "concluded")
    assert errors(found) == {"load": None}
    assert guest.holds(saved)


def test_memory_that_cannot_be_read_stops_the_guest_with_io_error_and_a_load_starts_it_again(
    found: Server, guest: Guest, saved: bytes, held_load: list[int], image: Path
) -> None:
    whole = image.read_bytes()
    os.truncate(image, 1 << 20)
    found.send("job-resume", id="load")
    events = found.until("load", "concluded")
    if "STOP" not in events:
        found.until_event("STOP")
    assert "BLOCK_IO_ERROR" in events
    error = errors(found)["load"]
    assert error is not None
    assert error.startswith("Error -5 while loading VM state: Could not read the guest's memory")
    assert found.status() == "io-error"
    refused = found.lines.execute("cont")
    assert "has not come as a whole" in refused["desc"]
    assert found.status() == "io-error"
    found.ask("job-dismiss", id="load")
    with image.open("r+b") as file:
        file.write(whole)
    assert found.load("s").error is None
    assert guest.holds(saved)
    found.ask("cont")
    assert found.status() == "running"


def test_quitting_while_memory_comes_does_not_wait_for_all_of_it(found: Server, held_load: list[int]) -> None:
    found.ask("quit")
    while found.lines.line():
        pass
    assert sum(held_load) <= RAM // 2
