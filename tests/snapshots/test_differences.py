"""Where stillframe is to differ from QEMU: both are asked the same, and each difference of
docs/differences.md is seen.

A test is called after the name of its difference. What QEMU does is asserted, too: a difference that is none
any more is to go.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from snapshots.hosts import qemu_img_check
from snapshots.servers import SERVERS, Server, qemu_img, qemu_io, server
from stillframe.machine.machine import Machine
from stillframe.machine.memory import GuestMemory, MemoryBlock

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "differences.md"
BOTH = ("diskfmt0", "diskfmt1")


@pytest.fixture(params=SERVERS)
def two(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """A running machine with two images."""
    for name in ("0", "1"):
        qemu_img("create", "-f", "qcow2", tmp_path / name, "16M")
    with server(request.param, tmp_path) as found:
        for number in (0, 1):
            found.add(number, tmp_path / str(number))
        yield found
    for name in ("0", "1"):
        # The harness ends QEMU by a signal, which costs it a leak.
        qemu_img_check(tmp_path / name, leaks_allowed=request.param != "stillframe")


def seen(two: Server, theirs: Any, ours: Any) -> None:
    """What was found, as a pair of a thing and itself: `theirs` on QEMU, `ours` here."""
    assert (ours if two.is_ours else theirs) is True


def names(two: Server, number: int) -> list[str]:
    return [name for _, name in two.tags(number)]


def test_tag_on_any_node(two: Server) -> None:
    assert two.save("s", "diskfmt0", BOTH[:1]).error is None
    outcome = two.save("s", "diskfmt0", BOTH)
    if two.is_ours:
        assert outcome.error == "Snapshot 's' already exists in one or more devices"
        assert (names(two, 0), names(two, 1)) == (["s"], [])
    else:
        assert outcome.error is None
        assert (names(two, 0), names(two, 1)) == (["s", "s"], ["s"])


def test_saves_while_running(tmp_path: Path) -> None:
    """RESUME comes before the memory is written here, and a job can be held there; QEMU's is over by then."""
    for kind in SERVERS[:2]:
        folder = tmp_path / kind
        folder.mkdir()
        qemu_img("create", "-f", "qcow2", folder / "image", "16M")

        def equip(machine: Machine) -> None:
            block = MemoryBlock.allocate("ram", 0, 64 << 20, is_ram=True)
            block.view[:] = b"\x5a" * block.size
            machine.memory = GuestMemory((block,))

        with server(kind, folder, equip=equip) as found:
            found.add(0, folder / "image")
            found.send("snapshot-save", job_id="j", tag="s", vmstate="diskfmt0", devices=["diskfmt0"])
            assert "j concluded" not in found.until_event("RESUME")
            if found.is_ours:
                found.send("job-pause", id="j")
                found.until("j", "paused")
                assert found.status() == "running"
                found.send("job-resume", id="j")
                found.until("j", "concluded")
            else:
                # The work is done: the rest follows by itself.
                assert found.until_event("j concluded")[-2:] == ["j pending", "j concluded"]


def test_failed_save_keeps_older(tmp_path: Path) -> None:
    """A node that can refuse in the middle: one bit of refcount, with data that would need a second
    reference."""
    for kind in SERVERS[:2]:
        folder = tmp_path / kind
        folder.mkdir()
        qemu_img("create", "-f", "qcow2", folder / "0", "16M")
        qemu_img("create", "-f", "qcow2", "-o", "refcount_bits=1", folder / "1", "16M")
        qemu_io(folder / "1", "write -P 1 0 1M")
        with server(kind, folder) as found:
            for number in (0, 1):
                found.add(number, folder / str(number))
            assert found.save("s", "diskfmt0", BOTH[:1]).error is None
            older = found.tags(0)
            outcome = found.save("s", "diskfmt0", BOTH)
            assert outcome.error is not None
            if found.is_ours:
                assert found.tags(0) == older
                # And where the name is free, what fails in the middle says why.
                failed = found.save("t", "diskfmt0", BOTH)
                assert failed.error is not None
                assert failed.error.startswith("Could not create snapshot 't' on 'diskfmt1': ")
                assert found.tags(0) == older
            else:
                assert outcome.error == "Could not create snapshot 's' on 'diskfmt1'"
                assert found.tags(0) == [("2", "s")]
        qemu_img_check(folder / "0")


def test_tags_match_by_name(tmp_path: Path) -> None:
    """Ids 1 'a', 2 'b', 3 '1', each with its own content: the tag 1 is the third, not the one whose id is
    1."""
    for kind in SERVERS[:2]:
        folder = tmp_path / kind
        folder.mkdir()
        image = folder / "image"
        qemu_img("create", "-f", "qcow2", image, "16M")
        for number, tag in enumerate(("a", "b", "1"), 1):
            qemu_io(image, f"write -P {number} 0 64k")
            with server(kind, folder) as found:
                found.add(0, image)
                assert found.save(tag).error is None
                assert found.tags()[-1] == (str(number), tag)
                found.ask("quit")
        with server(kind, folder) as found:
            found.add(0, image)
            assert found.load("1").error is None
            found.ask("quit")
        qemu_io(image, f"read -P {3 if kind == 'stillframe' else 1} 0 64k")
        qemu_img_check(image)


def test_no_cut_names(two: Server) -> None:
    long = "n" * 300
    outcome = two.save(long)
    if two.is_ours:
        assert outcome.error is not None
        assert "has 300 bytes, 255 are allowed" in outcome.error
        assert two.tags() == []
    else:
        assert outcome.error is None
        assert names(two, 0) == ["n" * 255]
        assert two.delete(long).error is None
        assert names(two, 0) == ["n" * 255]
    assert two.save("n" * 254 + "m").error is None


def test_no_nul_in_names(two: Server) -> None:
    outcome = two.save("a\0b")
    if two.is_ours:
        assert outcome.error == "A snapshot's name must not contain a NUL character"
    else:
        assert outcome.error is None


def test_no_node_twice(two: Server) -> None:
    outcome = two.save("s", "diskfmt0", ("diskfmt0", "diskfmt0"))
    if two.is_ours:
        assert outcome.error == "Block device node 'diskfmt0' is listed twice"
        assert two.tags() == []
    else:
        assert outcome.error is None
        assert names(two, 0) == ["s", "s"]
    two.ask("blockdev-add", driver="raw", node_name="over", file="diskfmt0")
    outcome = two.save("t", "diskfmt0", ("diskfmt0", "over"))
    if two.is_ours:
        assert outcome.error == "Block device nodes 'diskfmt0' and 'over' are the same image"
        assert two.save("t", "over", ("over",)).error is None
        assert names(two, 0) == ["t"]
    else:
        assert outcome.error is None
        assert names(two, 0) == ["s", "s", "t", "t"]


def test_failed_load_keeps_running(two: Server) -> None:
    outcome = two.load("nothing")
    assert outcome.error == "Snapshot 'nothing' does not exist in one or more devices"
    seen(two, "STOP" in outcome.events, "STOP" not in outcome.events)
    assert two.status() == ("running" if two.is_ours else "restore-vm")


def test_read_only_is_called_so(two: Server, tmp_path: Path) -> None:
    qemu_img("create", "-f", "qcow2", tmp_path / "2", "16M")
    two.add(2, tmp_path / "2", read_only=True)
    outcome = two.save("s", "diskfmt0", ("diskfmt0", "diskfmt2"))
    if two.is_ours:
        assert outcome.error == "Device 'diskfmt2' is read-only and cannot take part in snapshots"
    else:
        assert outcome.error == "Device 'diskfmt2' is writable but does not support snapshots"


def test_savevm_replaces_last(two: Server) -> None:
    """The older snapshot goes when the new one is there, so its id is not used again."""
    assert two.lines.hmp("savevm s") == ""
    assert two.lines.hmp("savevm s") == ""
    assert two.tags() == ([("2", "s")] if two.is_ours else [("1", "s")])


def test_progress_in_bytes(two: Server) -> None:
    two.send("snapshot-save", job_id="j", tag="s", vmstate="diskfmt0", devices=list(BOTH))
    two.until("j", "concluded")
    job = two.ask("query-jobs")[0]
    assert job["current-progress"] == job["total-progress"] == 1
    two.ask("job-dismiss", id="j")
    two.send("snapshot-load", job_id="j", tag="s", vmstate="diskfmt0", devices=list(BOTH))
    two.until("j", "concluded")
    job = two.ask("query-jobs")[0]
    assert job["current-progress"] == job["total-progress"]
    seen(two, job["total-progress"] == 1, job["total-progress"] > 1000)


def test_jobs_say_how(two: Server) -> None:
    two.send("snapshot-save", job_id="j", tag="s", vmstate="diskfmt0", devices=list(BOTH))
    two.until("j", "concluded")
    job = two.ask("query-jobs")[0]
    seen(two, "choices" not in job, [each["what"] for each in job.get("choices", ())][-1:] == ["state"])


def test_snapshots_have_a_speed(two: Server) -> None:
    answer = two.lines.execute(
        "snapshot-save", job_id="j", tag="s", vmstate="diskfmt0", devices=list(BOTH), speed=1 << 20
    )
    seen(two, answer.get("desc") == "Parameter 'speed' is unexpected", answer == {})


def test_loads_while_running(two: Server) -> None:
    assert two.save("s").error is None
    answer = two.lines.execute(
        "snapshot-load", job_id="j", tag="s", vmstate="diskfmt0", devices=["diskfmt0"], eager=True
    )
    seen(two, answer.get("desc") == "Parameter 'eager' is unexpected", answer == {})


NOT_ONLY_HERE = {
    "all-or-none": "test_faults.py",
    "create-says-why": "test_failed_save_keeps_older",
    "load-says-why": "test_scenarios.py",
    "jobs-can-be-cancelled": "test_jobs_of_snapshots.py",
    "load-ends-a-shutdown": "test_save_load.py",
    "no-command-11": "test_vmstate_stream.py",
    "saves-may-be-quiesced": "test_qemu_agent.py",
    "new-generation-id": "test_save_load.py",
    "snapshots-have-own-tables": "test_qcow2_recorded.py",
    "savevm-takes-every-node": "test_drop_in.py",
    "loads-may-replace": "test_replace.py",
}


def test_every_difference_is_documented_and_tested() -> None:
    document = DOCUMENT.read_text()
    section = document[document.index("## Snapshots") :].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE))
    tested = {name.removeprefix("test_").replace("_", "-") for name in globals() if name.startswith("test_")}
    tested.discard("every-difference-is-documented-and-tested")
    assert documented == tested | NOT_ONLY_HERE.keys()
