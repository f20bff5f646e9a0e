"""How a QEMU's state is taken where the best way is not open, and that giving up harms nobody: 7.2 and 10.0.

Two guests a version: one whose QEMU may track what it writes, one whose QEMU may not. Each test leaves its guest running, without
snapshots.
"""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from peers import checking_guest, peer
from qemu_guests import (
    APPEND,
    BEAT,
    VERSIONS,
    GuestMachine,
    check_image,
    machine_within,
    versions,
    without_userfaultfd,
)
from running import stillframe
from stillframe.client import Client
from stillframe.errors import StillframeError
from stillframe.machine.build import QemuMachine
from stillframe.machine.engines.qemu import capture as capture_module

EVERY = [
    pytest.param((version, able), marks=pytest.mark.xdist_group(f"ladder-{version}"), id=f"{version}-{words}")
    for version in VERSIONS
    for able, words in ((True, "tracks"), (False, "may not track"))
]


@pytest.fixture(scope="module", params=EVERY)
def running(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[GuestMachine]:
    version, able = request.param
    directory = tmp_path_factory.mktemp("ladder")
    program = peer("qemu-system-x86_64", version)
    if not able:
        program = without_userfaultfd(directory, program)
    with GuestMachine(directory / "guest", version, program=program) as machine:
        machine.able = able
        machine.console.until("HB 3 ")
        yield machine
        assert machine.process.poll() is None, machine.log.read_text()
        machine.quit()
        check_image(machine.image)


@pytest.fixture
def machine(running: GuestMachine) -> Iterator[GuestMachine]:
    yield running
    for tag in running.tags():
        running.delete(tag)
    assert running.status() == "running"
    running.beat()


def test_job_says_which_way_and_why_and_the_guest_runs_on(machine: GuestMachine) -> None:
    before = machine.beat()
    saved, why_saved = machine.way("snapshot-save", "one")
    between = machine.beat()
    loaded, why_loaded = machine.way("snapshot-load", "one")
    after = machine.console.until(BEAT)
    if machine.able:
        assert ((saved, why_saved), (loaded, why_loaded)) == (("background", ""), ("lazy", ""))
    else:
        assert (saved, loaded) == ("precopy", "eager")
        assert "may not track what its guest writes: " in why_saved
        assert "cannot fetch missing pages: " in why_loaded
    assert (after[2], before <= int(after[1]) <= between + 1) == ("0", True)


def test_clients_hear_nothing_of_a_pause_of_ours(machine: GuestMachine) -> None:
    async def events(client: Client) -> list[str]:
        with client._qmp.listener(("STOP", "RESUME", "MIGRATION", "MIGRATION_PASS")) as heard:
            await client.save("one", vmstate="root", devices=["root"])
            await client.execute("stop")
            await client.execute("cont")
            return [str(event["event"]) for event in heard.clear()]

    assert machine.talk(events) == ["STOP", "RESUME"]


def test_guest_that_stays_paused_is_saved_again_and_runs_no_instruction_for_it(machine: GuestMachine) -> None:
    machine.execute("stop")
    ways = [machine.way("snapshot-save", tag)[0] for tag in ("one", "two", "three")]
    assert machine.status() == "paused"
    best = machine.able and machine.version != "7.2"
    assert ways == ["background" if best else "stopped"] * 3
    beats = []
    for tag in ("one", "three"):
        machine.load(tag)
        assert machine.status() == "paused"
        machine.console.skip()
        machine.execute("cont")
        found = machine.console.until(BEAT)
        beats.append((found[1], found[2]))
        machine.execute("stop")
    assert beats[0] == beats[1]
    machine.execute("cont")


@pytest.mark.parametrize("progress", [0, 4 << 20])
def test_save_that_is_cancelled_on_its_way_leaves_nothing_and_the_next_one_works(
    machine: GuestMachine, progress: int
) -> None:
    machine.save("kept")

    async def cancelled(client: Client) -> str:
        arguments = {"job-id": "j", "tag": "gone", "vmstate": "root", "devices": ["root"], "speed": 2 << 20}
        await client.execute("snapshot-save", arguments)
        while (job := await only(client))["current-progress"] < progress:
            assert job["status"] != "concluded", job
            await asyncio.sleep(0.01)
        await client.execute("job-cancel", {"id": "j"})
        while (job := await only(client))["status"] != "concluded":
            await asyncio.sleep(0.01)
        await client.execute("job-dismiss", {"id": "j"})
        return str(job.get("error"))

    async def only(client: Client) -> dict[str, Any]:
        (job,) = await client.execute("query-jobs")
        return dict(job)

    # A first save writes everything, so it is on its way for long enough.
    machine.delete("kept")
    before = machine.beat()
    assert machine.talk(cancelled) == "Operation canceled"
    assert machine.tags() == []
    assert machine.beat() > before
    machine.save("again")
    machine.load("again")
    machine.beat()
    check_image(machine.image, in_use=True)


def test_paused_job_holds_our_writing_and_never_the_guest(machine: GuestMachine) -> None:
    async def paused(client: Client) -> None:
        arguments = {"job-id": "j", "tag": "one", "vmstate": "root", "devices": ["root"]}
        await client.execute("snapshot-save", arguments)
        await client.execute("job-pause", {"id": "j"})

    async def resumed(client: Client) -> str:
        await client.execute("job-resume", {"id": "j"})
        while True:
            (job,) = await client.execute("query-jobs")
            if job["status"] == "concluded":
                await client.execute("job-dismiss", {"id": "j"})
                return str(job.get("error"))
            await asyncio.sleep(0.01)

    machine.talk(paused)
    first = machine.beat()
    while machine.beat() < first + 50:
        assert machine.status() == "running"
    assert machine.talk(resumed) == "None"
    assert machine.tags() == ["one"]


@pytest.fixture(scope="module", params=versions("ladder"))
def within(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[QemuMachine]:
    """A guest that rewrites memory all the time, whose QEMU may not track that; the machine is in this process."""
    directory = tmp_path_factory.mktemp("within")
    files = checking_guest("x86_64")
    program = without_userfaultfd(directory, peer("qemu-system-x86_64", request.param))
    append = f"{APPEND.partition('period=')[0]}period=1 mb=32 dirty=8192"
    with machine_within(
        directory, program, "HB 3 ", kernel=files["kernel"], initrd=files["check-initrd"], append=append
    ) as machine:
        yield machine


def taken(machine: QemuMachine, **more: Any) -> tuple[str, str, bool]:
    """How the state was taken, why, and whether all of it came."""
    with machine.captured(lambda: None, **more) as found:
        source = found.source()
        whole = len(found.rest(source.offset, 1 << 30)) > 1 << 20
        return found.how, found.why, whole


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Memory is sent more slowly than the guest changes it."""
    monkeypatch.setattr(capture_module, "_BANDWIDTH", 64 << 20)
    monkeypatch.setattr(capture_module, "_DOWNTIME_MS", 1)
    return monkeypatch


def test_guest_that_writes_faster_than_memory_is_sent_waits_for_the_rest(
    within: QemuMachine, slowly: pytest.MonkeyPatch
) -> None:
    slowly.setattr(capture_module, "_PASSES", 2)
    how, why, whole = taken(within)
    assert (how, whole, "faster than it can be sent" in why) == ("precopy", True, True)
    assert within.runs()


def test_guest_that_a_client_stops_while_memory_is_sent_stays_stopped(
    within: QemuMachine, slowly: pytest.MonkeyPatch
) -> None:
    slowly.setattr(capture_module, "_PASSES", 1 << 30)

    def once() -> None:
        if not within.stop_asked():
            within.stop()

    assert taken(within, refuse_if_cancelled=once)[2]
    assert within.run_state.value == "paused"
    within.cont()
    assert within.runs()


def test_clients_of_a_disk_go_on_while_memory_is_sent_and_wait_for_the_instant_alone(
    within: QemuMachine, slowly: pytest.MonkeyPatch
) -> None:
    slowly.setattr(capture_module, "_PASSES", 1)
    held, seen = False, []

    @contextmanager
    def at_rest() -> Iterator[None]:
        nonlocal held
        held = True
        yield
        held = False

    with within.captured(
        lambda: seen.append(("instant", held)),
        refuse_if_cancelled=lambda: seen.append(("sending", held)),
        others_at_rest=at_rest,
    ) as found:
        seen.append(("written", held))
        assert found.how == "precopy"
    assert set(seen) == {("sending", False), ("instant", True), ("written", False)}


def test_cancel_while_memory_is_sent_lets_the_guest_run_on(
    within: QemuMachine, slowly: pytest.MonkeyPatch
) -> None:
    class Enough(StillframeError):
        pass

    def refuse() -> None:
        raise Enough("enough")

    with pytest.raises(Enough):
        taken(within, refuse_if_cancelled=refuse)
    assert within.runs()
    slowly.undo()
    assert taken(within)[2]
    assert within.runs()


def test_failure_in_the_pause_lets_the_guest_run_on(within: QemuMachine) -> None:
    def fail() -> None:
        raise StillframeError("the disk is gone")

    with pytest.raises(StillframeError, match="the disk is gone"), within.captured(fail):
        pass
    assert within.runs()
    assert taken(within)[2]


@pytest.mark.parametrize("version", versions("ladder"))
@pytest.mark.parametrize("able", [True, False], ids=["tracks", "may not track"])
def test_doctor_says_what_a_qemu_could_do_here(version: str, able: bool, tmp_path: Path) -> None:
    program = peer("qemu-system-x86_64", version)
    if not able:
        program = without_userfaultfd(tmp_path, program)
    found = json.loads(stillframe("doctor", "--json", "--qemu", program).stdout)
    (line,) = [each for each in found if each["name"] == "engine qemu"]
    assert line["verdict"] == ("ok" if able else "limited")
    assert ("before the pause" in line["detail"], "all of the memory first" in line["detail"]) == (
        not able,
        not able,
    )
    missing = json.loads(stillframe("doctor", "--json", "--qemu", str(tmp_path / "none")).stdout)
    assert missing[-1]["verdict"] == "missing"
