"""Snapshot jobs over a real socket: paused, cancelled, queued and ended with the machine, and nothing is left
of what was undone."""

import errno
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from snapshots.hosts import qemu_img_check
from snapshots.servers import SERVERS, Server, qemu_img, server
from stillframe.jobs import JobContext
from stillframe.machine import arriving, frozen, tracking
from stillframe.machine.machine import Machine
from stillframe.machine.memory import GuestMemory, MemoryBlock

RAM = 96 << 20


def with_memory(machine: Machine) -> None:
    block = MemoryBlock.allocate("ram", 0, RAM, is_ram=True)
    chunk = os.urandom(1 << 20)
    for offset in range(0, RAM, len(chunk)):
        block.view[offset : offset + len(chunk)] = chunk
    machine.memory = GuestMemory((block,))


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "image.qcow2"
    qemu_img("create", "-f", "qcow2", path, "16M")
    yield path
    qemu_img_check(path)


@pytest.fixture
def found(tmp_path: Path, image: Path) -> Iterator[Server]:
    with server("stillframe", tmp_path, equip=with_memory) as running:
        running.add(0, image)
        yield running


NODE = {"vmstate": "diskfmt0", "devices": ["diskfmt0"]}


def paused_save(found: Server, job: str = "j", tag: str = "s") -> list[str]:
    """A save held somewhere in the middle of the memory."""
    found.send("snapshot-save", job_id=job, tag=tag, **NODE)
    events = found.until_event("RESUME")
    found.send("job-pause", id=job)
    return events + found.until(job, "paused")


def test_a_save_is_paused_and_goes_on(found: Server) -> None:
    assert "j running" in paused_save(found)
    before = found.ask("query-jobs")[0]
    assert before["status"] == "paused"
    assert 0 <= before["current-progress"] < before["total-progress"] == RAM + 1
    assert found.ask("query-jobs")[0]["current-progress"] == before["current-progress"]
    assert found.tags() == []
    found.send("job-resume", id="j")
    found.until("j", "concluded")
    after = found.ask("query-jobs")[0]
    assert "error" not in after
    assert after["current-progress"] == after["total-progress"] == RAM + 1
    assert found.tags() == [("1", "s")]


def test_the_guest_runs_on_and_the_snapshot_shows_the_instant(tmp_path: Path, image: Path) -> None:
    machines: list[Machine] = []

    def equip(machine: Machine) -> None:
        with_memory(machine)
        machines.append(machine)

    with server("stillframe", tmp_path, equip=equip) as found:
        found.add(0, image)
        view = machines[0].memory.blocks[0].view
        before = bytes(view)
        events = paused_save(found)
        assert [event for event in events if event in ("STOP", "RESUME")] == ["STOP", "RESUME"]
        assert found.status() == "running"
        for offset in range(0, RAM, 4096):
            view[offset : offset + 8] = b"\xee" * 8
        found.send("job-resume", id="j")
        found.until("j", "concluded")
        assert found.status() == "running"
        assert view[RAM - 4096 : RAM - 4088] == b"\xee" * 8
        assert found.load("s").error is None
        assert bytes(view) == before


def test_a_save_whose_copy_of_the_memory_dies_fails_and_leaves_nothing(found: Server) -> None:
    paused_save(found)
    children = {
        int(path.parent.name)
        for path in Path("/proc").glob("[0-9]*/stat")
        if path.read_text().rsplit(") ", 1)[1].split()[1] == str(os.getpid())
    }
    copies = [pid for pid in children if os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe")]
    assert len(copies) == 1
    os.kill(copies[0], signal.SIGKILL)
    found.send("job-resume", id="j")
    found.until("j", "concluded")
    assert "the instant of the snapshot is gone" in found.ask("query-jobs")[0]["error"]
    assert found.tags() == []
    assert found.status() == "running"


def test_a_cancelled_save_leaves_nothing_and_the_guest_running(found: Server, image: Path) -> None:
    events = paused_save(found)
    found.send("job-cancel", id="j")
    events += found.until("j", "concluded")
    assert events.count("STOP") == events.count("RESUME")
    assert events[-2:] == ["j aborting", "j concluded"]
    assert found.ask("query-jobs")[0]["error"] == "Operation canceled"
    assert found.tags() == []
    assert found.status() == "running"
    assert found.lines.execute("job-cancel", id="j")["class"] == "GenericError"
    # These nodes ignore discards, as QEMU's do unless told otherwise: what the save had written until then is free
    # space inside the file, and the close gives it back.
    found.ask("blockdev-del", node_name="diskfmt0")
    found.ask("blockdev-del", node_name="disk0")
    assert image.stat().st_size < 1 << 20


def test_a_cancelled_load_leaves_the_guest_as_it_was(found: Server) -> None:
    assert found.save("s").error is None
    # Paused before its turn has come, so that it is held at its first checkpoint however short it is.
    paused_save(found, "before", "other")
    found.send("snapshot-load", job_id="j", tag="s", **NODE)
    found.send("job-pause", id="j")
    found.until("j", "created")
    found.send("job-resume", id="before")
    events = found.until("j", "paused")
    found.send("job-cancel", id="j")
    events += found.until("j", "concluded")
    assert "STOP" not in events
    assert found.ask("query-jobs")[0]["error"] == "Operation canceled"
    assert found.status() == "running"


def test_jobs_of_a_machine_take_turns_in_the_order_of_their_arrival(found: Server) -> None:
    paused_save(found, "first", "one")
    found.send("snapshot-load", job_id="second", tag="one", **NODE)
    found.send("snapshot-delete", job_id="third", tag="one", devices=["diskfmt0"])
    found.until("third", "created")
    states = {job["id"]: job["status"] for job in found.ask("query-jobs")}
    assert states == {"third": "created", "second": "created", "first": "paused"}
    found.send("job-resume", id="first")
    events = found.until("third", "concluded")
    turns = [event for event in events if event.split()[-1] in ("running", "concluded")]
    assert turns[turns.index("first concluded") :] == [
        "first concluded",
        "second running",
        "second concluded",
        "third running",
        "third concluded",
    ]
    assert all("error" not in job for job in found.ask("query-jobs"))
    assert found.tags() == []


def test_a_job_that_waits_for_its_turn_can_be_cancelled(found: Server) -> None:
    paused_save(found, "first", "one")
    found.send("snapshot-delete", job_id="second", tag="one", devices=["diskfmt0"])
    found.until("second", "created")
    found.send("job-cancel", id="second")
    found.until("second", "concluded")
    found.send("job-resume", id="first")
    found.until("first", "concluded")
    assert found.tags() == [("1", "one")]


def test_a_node_in_use_by_a_job_cannot_be_removed(found: Server) -> None:
    paused_save(found)
    refused = found.lines.execute("blockdev-del", node_name="diskfmt0")
    assert refused["desc"] == "Node diskfmt0 is in use"
    found.send("job-cancel", id="j")
    found.until("j", "concluded")
    found.ask("blockdev-del", node_name="diskfmt0")


@pytest.mark.parametrize("word", ["stop", "cont"])
def test_what_is_asked_of_the_guest_during_a_save_holds_after_it(found: Server, word: str) -> None:
    paused_save(found)
    found.ask(word)
    found.send("job-resume", id="j")
    found.until("j", "concluded")
    assert found.status() == ("paused" if word == "stop" else "running")


def test_quitting_during_a_save_leaves_nothing_of_it(tmp_path: Path, image: Path) -> None:
    with server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        paused_save(found)
        found.ask("quit")
    assert qemu_img("snapshot", "-l", image) == ""
    qemu_img_check(image)


def test_the_human_commands_wait_for_their_turn(found: Server) -> None:
    assert found.save("one").error is None
    found.send("snapshot-save", job_id="j", tag="two", **NODE)
    found.send("human-monitor-command", command_line="delvm one")
    found.until("j", "concluded")
    assert [name for _, name in found.tags()] == ["two"]


@pytest.mark.parametrize("eager", [False, True])
def test_an_eager_load_needs_nothing_of_the_image_once_the_guest_runs(
    tmp_path: Path, image: Path, eager: bool
) -> None:
    machines: list[Machine] = []

    def equip(machine: Machine) -> None:
        with_memory(machine)
        machines.append(machine)

    with server("stillframe", tmp_path, equip=equip) as found:
        found.add(0, image)
        assert found.save("s").error is None
        found.ask("quit")
    whole = image.read_bytes()
    with server("stillframe", tmp_path, equip=equip) as found:
        found.add(0, image)
        machines[1].events.subscribe(
            lambda event: os.truncate(image, 1 << 20) if event.name == "RESUME" else None
        )
        outcome = found.job("snapshot-load", tag="s", **NODE, **({"eager": True} if eager else {}))
        image.write_bytes(whole)
        if eager:
            assert outcome.error is None
            assert bytes(machines[1].memory.blocks[0].view) == bytes(machines[0].memory.blocks[0].view)
        else:
            if outcome.error is None:
                pytest.skip("this host has no userfaultfd")
            assert "Could not read the guest's memory" in outcome.error
            assert found.lines.execute("cont")["class"] == "GenericError"


def begin(found: Server, command: str, event: str = "RESUME", **arguments: Any) -> None:
    """Have a job made, and wait for an event of the guest's that it brings about."""
    found.send(command, job_id="j", tag="s", **arguments, **NODE)
    if event not in found.until("j", "running"):
        found.until_event(event)


def test_a_save_with_a_limit_writes_so_much_and_no_more_until_the_limit_is_lifted(found: Server) -> None:
    """At one byte a second the first transfer comes through, and nothing after it before the test is over."""
    begin(found, "snapshot-save", speed=1)
    while not (before := found.ask("query-jobs")[0]["current-progress"]):
        pass
    assert before < RAM // 4
    assert found.status() == "running"
    found.send("block-job-set-speed", device="j", speed=0)
    found.until("j", "concluded")
    assert "error" not in found.ask("query-jobs")[0]
    assert found.tags() == [("1", "s")]


@pytest.mark.parametrize("end", ["job-cancel", "quit"])
def test_a_save_at_rest_is_ended_at_once(tmp_path: Path, image: Path, end: str) -> None:
    with server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        begin(found, "snapshot-save", speed=1)
        if end == "job-cancel":
            found.send(end, id="j")
            found.until("j", "concluded")
            assert found.tags() == []
        else:
            found.ask(end)
    assert qemu_img("snapshot", "-l", image) == ""


@pytest.mark.parametrize("eager", [False, True])
def test_a_load_with_a_limit_does_not_keep_the_guest_from_its_memory(
    tmp_path: Path, image: Path, eager: bool
) -> None:
    machines: list[Machine] = []

    def equip(machine: Machine) -> None:
        with_memory(machine)
        machines.append(machine)

    with server("stillframe", tmp_path, equip=equip) as found:
        found.add(0, image)
        assert found.save("s").error is None
        found.ask("quit")
    with server("stillframe", tmp_path, equip=equip) as found:
        found.add(0, image)
        begin(found, "snapshot-load", "j running" if eager else "RESUME", speed=1, eager=eager)
        saved, loaded = (machine.memory.blocks[0].view for machine in machines)
        if not eager:
            assert bytes(loaded[-4096:]) == bytes(saved[-4096:])
        found.send("block-job-set-speed", device="j", speed=0)
        found.until("j", "concluded")
        assert "error" not in found.ask("query-jobs")[0]
        assert bytes(loaded) == bytes(saved)


def test_the_words_about_a_speed_are_qemus(tmp_path: Path) -> None:
    for kind in SERVERS[:2]:
        with server(kind, tmp_path) as found:
            asked = found.lines.execute("block-job-set-speed", device="nope", speed=-1)
            assert asked == {"class": "DeviceNotActive", "desc": "Block job 'nope' not found"}


def choices(found: Server, command: str, tag: str, **arguments: Any) -> dict[str, tuple[str, str]]:
    """What a job says of how it was done."""
    found.send(command, job_id="j", tag=tag, **arguments, **NODE)
    found.until("j", "concluded")
    (job,) = found.ask("query-jobs")
    assert "error" not in job
    found.ask("job-dismiss", id="j")
    return {each["what"]: (each["chosen"], each.get("why", "")) for each in job["choices"]}


def test_a_job_says_how_it_was_done_and_why_not_better(tmp_path: Path, image: Path) -> None:
    with server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        first = choices(found, "snapshot-save", "a")
        if first["changes"][0] != "kernel":
            pytest.skip("this host has no userfaultfd that tracks writes")
        assert first == {
            "memory": ("forked", ""),
            "changes": ("kernel", ""),
            "state": ("whole", "the machine stands on no snapshot whose pages are known"),
        }
        assert choices(found, "snapshot-save", "b")["state"] == ("continued", "the machine stands on 'a'")
        assert choices(found, "snapshot-load", "b") == {"memory": ("rewind", "")}
        found.ask("quit")
    with server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        assert choices(found, "snapshot-load", "a") == {"memory": ("lazy", "")}
        found.ask("quit")
    with server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        assert choices(found, "snapshot-load", "a", eager=True) == {"memory": ("eager", "asked for")}


def test_a_job_says_what_its_host_does_not_let_it_do(found: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> NoReturn:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    for module, name in ((frozen, "ForkedMemory"), (tracking, "KernelTracking"), (arriving, "Userfaultfd")):
        monkeypatch.setattr(module, name, refused)
    for tag, state in (("a", "whole"), ("b", "continued")):
        told = choices(found, "snapshot-save", tag)
        assert told["memory"] == (
            "copied",
            "no second process can hold the memory (Operation not permitted)",
        )
        assert told["changes"] == ("xxh3", "the kernel does not tell what changes: Operation not permitted")
        assert told["state"][0] == state
    chosen, why = choices(found, "snapshot-load", "a")["memory"]
    assert (chosen, "Operation not permitted" in why) == ("eager", True)


@pytest.mark.parametrize("kind", ["whole", "continued", "rewind", "eager", "lazy"])
def test_the_total_of_a_job_is_known_before_its_first_byte_and_stays(
    tmp_path: Path, image: Path, kind: str
) -> None:
    seen: list[tuple[int, int]] = []
    told = JobContext.progress

    def progress(self: JobContext, done: int, total: int) -> None:
        seen.append((done, total))
        told(self, done, total)

    with pytest.MonkeyPatch.context() as patch, server("stillframe", tmp_path, equip=with_memory) as found:
        found.add(0, image)
        for tag in ("c", "b", "a", "s")[: 1 if kind == "continued" else 0 if kind == "whole" else 4]:
            assert found.save(tag).error is None
        patch.setattr(JobContext, "progress", progress)
        if kind in ("whole", "continued"):
            choices(found, "snapshot-save", "s")
        else:
            tag = "s" if kind == "rewind" else "c"
            chosen = choices(found, "snapshot-load", tag, eager=kind == "eager")
            if chosen["memory"][0] != kind:
                pytest.skip("this host has no userfaultfd")
    assert seen[0][0] == 0
    assert len({total for _, total in seen}) == 1
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]
