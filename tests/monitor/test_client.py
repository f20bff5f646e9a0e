"""The Python client, with our monitor and with a real QEMU's."""

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import stillframe
import stillframe.client as client_module
from monitor.harness import PATIENCE, Served, free_port, served
from peers import QEMU_VERSIONS, peer
from stillframe.client import Disconnected, JobFailed, connect, resolve
from stillframe.errors import Cancelled, InvalidRequest, NotFound, PeerError
from stillframe.jobs import JobContext
from stillframe.monitor.addresses import UnixAddress


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, PATIENCE))


def disk(path: Path) -> dict[str, Any]:
    subprocess.run(
        [peer("qemu-img"), "create", "-q", "-f", "qcow2", str(path), "1M"],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {"driver": "qcow2", "node-name": "d", "file": {"driver": "file", "filename": str(path)}}


@contextmanager
def real_qemu(version: str, address: str) -> Iterator[str]:
    kind, _, where = address.partition(":")
    listen = f"unix:{where}" if kind == "unix" else f"tcp:{where}"
    process = subprocess.Popen(
        [
            *(peer("qemu-system-x86_64", version), "-machine", "none", "-nodefaults", "-display", "none"),
            *("-qmp", f"{listen},server=on,wait=off"),
        ]
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                asyncio.run(touch(address))
                break
            except PeerError:
                assert time.monotonic() < deadline
        yield address
    finally:
        process.kill()
        process.wait()


async def touch(address: str) -> None:
    async with connect(address):
        pass


@pytest.fixture(params=["ours", *QEMU_VERSIONS])
def any_server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The address of a QMP server: ours, or one of the real ones."""
    path = tmp_path / "any.sock"
    if request.param == "ours":
        with served(path):
            yield f"unix:{path}"
    else:
        with real_qemu(request.param, f"unix:{path}") as address:
            yield address


# With any server


def test_a_snapshot_is_saved_loaded_and_deleted_and_no_job_stays_behind(
    any_server: str, tmp_path: Path
) -> None:
    async def work() -> None:
        seen: list[tuple[int, int]] = []
        async with connect(any_server) as box:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            done = await box.save("s", vmstate="d", devices=["d"], progress=lambda *step: seen.append(step))
            assert (done.status, done.error, done.done) == ("concluded", None, done.total)
            assert seen[-1] == (done.total, done.total)
            (node,) = (
                each for each in await box.execute("query-named-block-nodes") if each["node-name"] == "d"
            )
            assert [each["name"] for each in node["image"]["snapshots"]] == ["s"]
            await box.load("s", vmstate="d", devices=["d"])
            await box.delete("s", devices=["d"])
            assert await box.jobs() == []
            assert await box.status() == "running"

    run(work())


def test_what_fails_raises_the_jobs_own_words(any_server: str, tmp_path: Path) -> None:
    async def work() -> None:
        async with connect(any_server) as box:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            with pytest.raises(
                JobFailed, match=r"^Snapshot 's' does not exist in one or more devices$"
            ) as caught:
                await box.load("s", vmstate="d", devices=["d"], job_id="mine")
            assert caught.value.job.id == "mine"
            assert await box.jobs() == []
            with pytest.raises(PeerError, match=r"^Invalid job ID '1'$"):
                await box.save("s", vmstate="d", devices=["d"], job_id="1")
            with pytest.raises(PeerError) as refused:
                await box.execute("no-such-command")
            assert refused.value.error_class == "CommandNotFound"

    run(work())


def test_events_are_heard_until_the_connection_ends_and_that_is_told(any_server: str) -> None:
    async def work() -> None:
        async with connect(any_server) as box, box.events("STOP", "SHUTDOWN") as events:
            await box.stop()
            await box.cont()
            await box.quit()
            assert [(await anext(events)).name for _ in range(2)] == ["STOP", "SHUTDOWN"]
            with pytest.raises(PeerError, match="ended"):
                await anext(events)
            with pytest.raises(PeerError):
                await box.status()

    run(work())


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_a_real_qemu_is_reached_over_tcp(version: str) -> None:
    async def work(address: str) -> None:
        async with connect(address) as box:
            assert await box.status() == "running"
            assert box.server_version[0] >= 7

    with real_qemu(version, f"tcp:127.0.0.1:{free_port()}") as address:
        run(work(address))


def test_answers_of_any_size_are_taken(any_server: str) -> None:
    async def work() -> None:
        async with connect(any_server) as box:
            assert {"name": "query-qmp-schema"} in await box.execute("query-commands")
            assert any(entry["name"] == "snapshot-save" for entry in await box.execute("query-qmp-schema"))

    run(work())


# With ours


@pytest.fixture
def busy(monitor: tuple[Served, UnixAddress], tmp_path: Path) -> Iterator[tuple[str, Callable[[], None]]]:
    """The address of a monitor whose snapshot jobs wait for one that is at work, and what ends that."""
    server, address = monitor
    let_go = threading.Event()
    working = threading.Thread(
        target=server.host.jobs.run_internal,
        args=("busy", lambda context: let_go.wait(PATIENCE) and None),
        kwargs={"queue": server.host.snapshots.queue},
    )
    working.start()
    try:
        yield str(address), let_go.set
    finally:
        let_go.set()
        working.join()


def test_cancelling_the_task_cancels_the_job_and_leaves_nothing(
    busy: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    async def work() -> None:
        async with connect(busy[0]) as box, connect(busy[0]) as other:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            saving = asyncio.create_task(box.save("s", vmstate="d", devices=["d"]))
            while not await other.jobs():
                pass
            saving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await saving
            assert await other.jobs() == []
            assert "snapshots" not in (await other.execute("query-named-block-nodes"))[0]["image"]

    run(work())


def test_cancelling_before_the_server_has_answered_cancels_the_job_too(
    busy: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    async def work() -> None:
        async with connect(busy[0]) as box:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            for pauses in range(12):
                saving = asyncio.create_task(box.save("s", vmstate="d", devices=["d"]))
                for _ in range(pauses):
                    await asyncio.sleep(0)
                saving.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await saving
                assert await box.jobs() == []

    run(work())


def test_a_job_that_somebody_else_cancels_raises_cancelled(
    busy: tuple[str, Callable[[], None]], tmp_path: Path
) -> None:
    async def work() -> None:
        async with connect(busy[0]) as box, connect(busy[0]) as other:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            saving = asyncio.create_task(box.save("s", vmstate="d", devices=["d"], job_id="j"))
            while not await other.jobs():
                pass
            await other.execute("job-cancel", {"id": "j"})
            with pytest.raises(Cancelled):
                await saving
            assert await other.jobs() == []

    run(work())


def test_a_server_that_goes_in_the_middle_of_a_job_is_told(
    busy: tuple[str, Callable[[], None]], monitor: tuple[Served, UnixAddress], tmp_path: Path
) -> None:
    async def work() -> None:
        async with connect(busy[0]) as box, connect(busy[0]) as other:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            saving = asyncio.create_task(box.save("s", vmstate="d", devices=["d"]))
            while not await other.jobs():
                pass
            monitor[0].call(monitor[0].server.close())
            with pytest.raises(PeerError, match=r"connection .* ended during 'snapshot-save'") as told:
                await saving
            assert told.value.left == "The snapshot is there as a whole, or nothing of it is."

    run(work())


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("save", "The snapshot was not taken, and nothing of it is left."),
        ("load", "The disks are all as they were, or all the snapshot's."),
        ("delete", "Nothing was deleted."),
    ],
)
def test_a_machine_that_is_ended_in_the_middle_of_a_job_is_told_with_what_is_left(
    busy: tuple[str, Callable[[], None]], tmp_path: Path, command: str, left: str
) -> None:
    async def work() -> None:
        async with connect(busy[0]) as box, connect(busy[0]) as other:
            await box.execute("blockdev-add", disk(tmp_path / "d"))
            home = {} if command == "delete" else {"vmstate": "d"}
            job = asyncio.create_task(getattr(box, command)("s", devices=["d"], **home))
            while not await other.jobs():
                pass
            async with other.events("JOB_STATUS_CHANGE") as events:
                ending = asyncio.create_task(other.quit())
                while (await anext(events)).data["status"] != "aborting":
                    pass
            busy[1]()
            with pytest.raises(Disconnected, match=f"^The machine ended during 'snapshot-{command}'") as told:
                await job
            assert told.value.left == left
            await ending

    run(work())


def test_a_job_that_was_done_as_the_machine_ended_is_done(
    monitor: tuple[Served, UnixAddress], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_go = threading.Event()

    def save(context: JobContext, *_: object, **__: object) -> None:
        context.point_of_no_return()
        context.progress(7, 7)
        assert let_go.wait(PATIENCE)

    monkeypatch.setattr(monitor[0].host.snapshots, "save", save)

    async def work() -> None:
        async with connect(str(monitor[1])) as box, connect(str(monitor[1])) as other:
            saving = asyncio.create_task(box.save("s", vmstate="d", devices=["d"]))
            while not any(job.done for job in await other.jobs()):
                pass
            async with other.events("SHUTDOWN") as events:
                ending = asyncio.create_task(other.quit())
                await anext(events)
                let_go.set()
            job = await saving
            # How far it was is what this client had asked last, or no more than that it was done.
            assert (job.type, job.status, job.error) == ("snapshot-save", "concluded", None)
            assert job.done == job.total
            await ending

    run(work())


# Names and addresses


def test_a_machine_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "stillframe"
    with pytest.raises(NotFound, match="no machine 'box'"):
        connect("box")
    assert not place.exists(), "looking for a machine made a directory"
    place.mkdir(mode=0o700)

    async def work() -> str:
        async with stillframe.connect("box") as box:
            return (await box.execute("query-name"))["name"]

    with served(place / "box.sock", "box"):
        assert run(work()) == "box"
        with pytest.raises(NotFound) as caught:
            resolve("other")
        assert "box" in str(caught.value.remedy)


@pytest.mark.parametrize("target", ["../box", "tcp:x", "unix:"])
def test_what_is_neither_a_name_nor_an_address_is_refused(target: str) -> None:
    with pytest.raises(InvalidRequest):
        resolve(target)


@contextmanager
def strange_server(path: Path, greeting: bytes) -> Iterator[str]:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()

        def greet() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(greeting)
                connection.recv(1)

        thread = threading.Thread(target=greet)
        thread.start()
        yield f"unix:{path}"
        thread.join(PATIENCE)


@pytest.mark.parametrize("greeting", [b"220 smtp ready\r\n", b'{"QMP": 5}\n', b"[]\n", b"\xff\n"])
def test_what_is_no_qmp_server_is_told_in_one_sentence(greeting: bytes, tmp_path: Path) -> None:
    with strange_server(tmp_path / "s", greeting) as address:
        with pytest.raises(PeerError, match="did not answer as a QMP server"):
            run(touch(address))


def test_a_server_that_says_nothing_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "_GREETING_SECONDS", 0.05)
    with strange_server(tmp_path / "s", b"") as address:
        with pytest.raises(PeerError, match="did not greet"):
            run(touch(address))


# QEMU's own tools


def test_the_shell_of_qemus_own_library_reads_the_schema_and_holds_a_transaction(tmp_path: Path) -> None:
    lines = [
        "query-qmp-schema",
        "blockdev-add driver=null-co node-name=n0 size=1048576",
        "blockdev-add driver=null-co node-name=n1 size=1048576",
        "transaction(",
        "blockdev-backup job-id=b device=n0 target=n1 sync=full auto-dismiss=false",
        ")",
        "query-jobs",
    ]
    program = Path(sys.executable).with_name("qmp-shell")
    with served(tmp_path / "s") as (server, address):
        run = subprocess.run(
            [program, str(address.path)],
            input="\n".join(lines) + "\n",
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            env=os.environ | {"HOME": str(tmp_path)},
        )
        assert server.host.jobs.wait_concluded("b", PATIENCE) is not None
    replies = [json.loads(line[line.index("{") :]) for line in run.stdout.splitlines() if '{"' in line]
    assert all("return" in reply for reply in replies), run.stdout
    names = {entry["name"] for entry in replies[0]["return"]}
    assert {"transaction", "yank", "JOB_STATUS_CHANGE"} <= names
    assert replies[-1]["return"][0]["id"] == "b"
