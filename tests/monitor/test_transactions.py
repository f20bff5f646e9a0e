"""Transactions, backups and new images through the monitor, beside a real QEMU with the same files."""

import errno
import json
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from monitor.harness import PATIENCE, Client, Lines, Served, qemu, served
from monitor.test_block_commands import qemu_img
from peers import QEMU_VERSIONS, peer
from stillframe.block.file import FileNode
from stillframe.errors import IOFailed
from stillframe.monitor.addresses import UnixAddress

MIB = 1 << 20
SMALL = {"driver": "null-co", "size": MIB, "read-zeroes": True}


def run(command: str, **arguments: Any) -> dict[str, Any]:
    return {
        "execute": command,
        "arguments": {name.replace("_", "-"): value for name, value in arguments.items()},
    }


def node(name: str, **options: Any) -> dict[str, Any]:
    return run("blockdev-add", node_name=name, **(SMALL | options))


def image(name: str, file: str, driver: str = "qcow2") -> dict[str, Any]:
    return run("blockdev-add", driver=driver, node_name=name, file={"driver": "file", "filename": file})


def backup(job: str, device: str, target: str, **more: Any) -> dict[str, Any]:
    return run("blockdev-backup", job_id=job, device=device, target=target, sync="full", **more)


def snap(device: str, name: str) -> dict[str, Any]:
    return {"type": "blockdev-snapshot-internal-sync", "data": {"device": device, "name": name}}


def backup_of(job: str, device: str, target: str, **more: Any) -> dict[str, Any]:
    return {"type": "blockdev-backup", "data": backup(job, device, target, **more)["arguments"]}


def together(*actions: dict[str, Any], **properties: Any) -> dict[str, Any]:
    given = {"properties": properties["properties"]} if properties else {}
    return run("transaction", actions=list(actions), **given)


GROUPED = {"completion-mode": "grouped"}
ABORT = {"type": "abort", "data": {}}
GROUPED_ABORT = together(ABORT, properties=GROUPED)
GROUPED_SNAPSHOT = together(snap("fmt0", "t9"), properties=GROUPED)
GROUPED_LATE = together(backup_of("g0", "n0", "n1"), ABORT, properties=GROUPED)
JOBS = run("query-jobs")
BLOCK_JOBS = run("query-block-jobs")
NODES = ("fmt0", "fmt1")


class Dialogue:
    """What came of each request: the reply, and the events by job, in order."""

    def __init__(self, lines: Lines) -> None:
        self._lines = lines
        self._number = 0
        self.events: dict[str, list[str]] = {}
        self.replies: list[Any] = []

    def _hear(self, message: dict[str, Any]) -> None:
        data = message.get("data", {})
        job = data.get("id") or data.get("device") or ""
        told = {name: value for name, value in data.items() if name not in ("id", "device")}
        self.events.setdefault(job, []).append(f"{message['event']} {json.dumps(told, sort_keys=True)}")

    def ask(self, request: dict[str, Any]) -> Any:
        self._number += 1
        self._lines.send({**request, "id": self._number})
        while True:
            message = self._lines.message()
            if "event" in message:
                self._hear(message)
            else:
                del message["id"]
                return message

    def settle(self) -> None:
        """Until no job works on its own."""
        deadline = time.monotonic() + PATIENCE
        while any(
            job["status"] in ("created", "running", "waiting", "aborting") for job in self.ask(JOBS)["return"]
        ):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def hold(self, request: dict[str, Any]) -> None:
        reply = self.ask(request)
        self.settle()
        self.replies.append((request, reply))


def names(lines: Lines) -> dict[str, list[str]]:
    listed = lines.execute("query-named-block-nodes")
    found = {each["node-name"]: each["image"].get("snapshots", []) for each in listed}
    return {name: [each["name"] for each in found[name]] for name in NODES}


REQUESTS = [
    *(node(f"n{number}") for number in range(4)),
    node("small", size=MIB // 2),
    node("ro", read_only=True),
    image("fmt0", "d0.qcow2"),
    image("fmt1", "d1.qcow2"),
    together(),
    together(snap("fmt0", "t1"), snap("fmt1", "t1")),
    together(snap("fmt0", "t2"), snap("n0", "t2")),
    together(snap("fmt0", "t2"), ABORT),
    together(snap("fmt0", "t2"), snap("nope", "t2")),
    together({"type": "nosuch", "data": {}}),
    together({"type": "abort"}),
    together(snap("fmt0", "t5"), snap("fmt0", "t5")),
    GROUPED_ABORT,
    GROUPED_SNAPSHOT,
    GROUPED_LATE,
    together(snap("fmt0", "")),
    together(snap("fmt0", "t1")),
    backup("j", "nope", "n1"),
    backup("j", "n0", "nope"),
    backup("j", "n0", "n0"),
    backup("j", "n0", "small"),
    backup("1a", "n0", "n1"),
    run("blockdev-backup", device="n0", target="n1", sync="full"),
    run("blockdev-backup", job_id="j", device="n0", target="n1", sync="incremental"),
    run("blockdev-backup", job_id="j", device="n0", target="n1", sync="all"),
    backup("j", "n0", "n1", bitmap="x"),
    backup("j", "n0", "n1", compress=True),
    backup("j", "n0", "ro"),
    backup("j", "n0", "n1", speed=-1),
    backup("j", "n0", "n1", bogus=1),
    backup("all", "n0", "n1"),
    JOBS,
    backup("b", "n0", "n1", auto_finalize=False, auto_dismiss=False, speed=65536),
    JOBS,
    BLOCK_JOBS,
    *(run(f"job-{verb}", id="b") for verb in ("pause", "resume", "complete", "dismiss")),
    *(run(f"block-job-{verb}", device="b") for verb in ("pause", "resume", "complete")),
    backup("b", "n2", "n3"),
    run("job-finalize", id="b"),
    JOBS,
    *(run(f"job-{verb}", id="b") for verb in ("finalize", "cancel", "dismiss", "dismiss")),
    backup("c", "n0", "n1", auto_finalize=False, auto_dismiss=False),
    run("job-cancel", id="c"),
    JOBS,
    run("block-job-dismiss", id="c"),
    run("block-job-dismiss", id="c"),
    run("block-job-cancel", device="c"),
    run("block-job-finalize", id="c"),
    together(
        backup_of("g1", "n0", "n1", auto_dismiss=False), backup_of("g2", "n2", "nope"), properties=GROUPED
    ),
    together(backup_of("i1", "n0", "n1"), backup_of("i2", "n2", "n3")),
    together(
        backup_of("k1", "n0", "n1", auto_dismiss=False),
        backup_of("k2", "n2", "n3", auto_dismiss=False),
        properties=GROUPED,
    ),
    run("job-dismiss", id="k1"),
    run("job-dismiss", id="k2"),
    together(
        backup_of("l1", "n0", "n1", auto_dismiss=False, auto_finalize=False),
        backup_of("l2", "n2", "n3", auto_dismiss=False, auto_finalize=False),
        properties=GROUPED,
    ),
    JOBS,
    run("job-finalize", id="l1"),
    JOBS,
    run("job-dismiss", id="l1"),
    run("job-dismiss", id="l2"),
    together(
        backup_of("m1", "n0", "n1", auto_dismiss=False, auto_finalize=False),
        backup_of("m2", "n2", "n3", auto_dismiss=False, auto_finalize=False),
        properties=GROUPED,
    ),
    run("job-cancel", id="m1"),
    JOBS,
    together(backup_of("o1", "n0", "n1"), snap("fmt0", "t7")),
    backup("p", "fmt0", "fmt1"),
    run("blockdev-create", job_id="c", options={"driver": "raw"}),
    run("blockdev-create", job_id="c", options={"driver": "nosuch"}),
    run("blockdev-create", job_id="1c", options={"driver": "file", "filename": "x", "size": 512}),
    run("blockdev-create", job_id="c1", options={"driver": "file", "filename": "new", "size": 65536}),
    run("blockdev-create", job_id="c2", options={"driver": "file", "filename": "/nowhere/x", "size": 512}),
    run("blockdev-create", job_id="c3", options={"driver": "qcow2", "file": "nope", "size": 512}),
    run("blockdev-add", driver="file", node_name="f", filename="new"),
    run("blockdev-create", job_id="c4", options={"driver": "qcow2", "file": "f", "size": 511}),
    run(
        "blockdev-create",
        job_id="c5",
        options={"driver": "qcow2", "file": "f", "size": 512, "cluster-size": 5},
    ),
    run(
        "blockdev-create",
        job_id="c6",
        options={"driver": "qcow2", "file": "f", "size": MIB, "backing-fmt": "raw"},
    ),
    run("blockdev-create", job_id="c7", options={"driver": "qcow2", "file": "f", "size": MIB}),
    JOBS,
    *(run("job-dismiss", id=f"c{number}") for number in range(1, 8)),
]


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_transactions_backups_and_new_images_go_as_with_a_real_qemu(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for who in ("qemu", "ours"):
        place = tmp_path / who
        place.mkdir()
        for number in range(2):
            qemu_img("create", "-q", "-f", "qcow2", place / f"d{number}.qcow2", "1M")
        monkeypatch.chdir(place)
        if who == "qemu":
            with qemu(peer("qemu-system-x86_64", version)) as lines:
                seen.append(held(lines.negotiate(), version))
        else:
            with served(tmp_path / "qmp.sock") as (_, address), Client(address) as lines:
                seen.append(held(lines.negotiate(), version))
        assert "qcow2" in qemu_img("info", place / "new")
    (theirs, their_events, their_names), (ours, our_events, our_names) = seen
    for (request, expected), (_, reply) in zip(theirs, ours, strict=True):
        assert plain(reply) == plain(expected), request
    assert our_events == their_events
    assert our_names == their_names


def held(lines: Lines, version: str) -> tuple[list[Any], dict[str, list[str]], dict[str, list[str]]]:
    dialogue = Dialogue(lines)
    for request in REQUESTS:
        # 7.2 has other words for these.
        if version == "10.0" or request not in (GROUPED_ABORT, GROUPED_SNAPSHOT, GROUPED_LATE):
            dialogue.hold(request)
    return dialogue.replies, dialogue.events, names(lines)


def plain(reply: Any) -> Any:
    """But for how far a job had come that failed: with us never all the way (progress-in-bytes)."""
    if isinstance(reply.get("return"), list):
        for job in reply["return"]:
            if "error" in job:
                job.pop("current-progress", None)
    return reply


# What a user would lose


def pattern(path: Path, byte: str) -> None:
    qemu_io("-f", "qcow2", "-c", f"write -P {byte} 0 1M", path)


def qemu_io(*arguments: object) -> None:
    subprocess.run([peer("qemu-io"), *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


@pytest.fixture
def disks(tmp_path: Path, client: Client) -> Path:
    """Two images of ones, open as fmt0 and fmt1, a raw target, open as raw."""
    for number in range(2):
        path = tmp_path / f"d{number}.qcow2"
        qemu_img("create", "-q", "-f", "qcow2", path, "4M")
        pattern(path, "1")
        assert Dialogue(client).ask(image(f"fmt{number}", str(path))) == {"return": {}}
    qemu_img("create", "-q", "-f", "raw", tmp_path / "copy.raw", "4M")
    assert Dialogue(client).ask(image("raw", str(tmp_path / "copy.raw"), "raw")) == {"return": {}}
    return tmp_path


def test_a_backup_is_the_disk_of_the_instant_it_began_however_much_is_written_meanwhile(
    disks: Path, client: Client, monitor: tuple[Served, UnixAddress]
) -> None:
    talk = Dialogue(client)
    source = monitor[0].host.graph.find("fmt0")
    before = source.read(0, 4 * MIB)
    # After the first piece of 2 MiB it rests for as long as the limit stands.
    talk.ask(backup("b", "fmt0", "raw", speed=1, auto_dismiss=False))
    source.write(0, b"\2" * MIB)
    source.write(3 * MIB, b"\3" * MIB)
    talk.ask(run("blockdev-snapshot-internal-sync", device="fmt1", name="elsewhere"))
    refused = talk.ask(run("blockdev-snapshot-internal-sync", device="fmt0", name="s"))
    assert "pending" in refused["error"]["desc"]
    talk.ask(run("block-job-set-speed", device="b", speed=0))
    talk.settle()
    assert "error" not in talk.ask(JOBS)["return"][0]
    assert (disks / "copy.raw").read_bytes() == before
    assert source.read(0, MIB) == b"\2" * MIB
    # Nothing of it is left: the next snapshot is made, and the image is whole.
    assert talk.ask(run("blockdev-snapshot-internal-sync", device="fmt0", name="s")) == {"return": {}}
    talk.ask(run("job-dismiss", id="b"))
    assert talk.ask(run("blockdev-del", node_name="fmt0")) == {"return": {}}
    assert "No errors" in qemu_img("check", disks / "d0.qcow2")


def test_a_cancelled_backup_gives_everything_back(
    disks: Path, client: Client, monitor: tuple[Served, UnixAddress]
) -> None:
    talk = Dialogue(client)
    # Between the first piece and the second there are two mebibytes at a byte a second.
    talk.ask(backup("b", "fmt0", "raw", speed=1))
    monitor[0].host.graph.find("fmt0").write(0, b"\5" * MIB)
    assert "in use" in talk.ask(run("blockdev-del", node_name="raw"))["error"]["desc"]
    assert "write" in talk.ask(backup("c", "fmt1", "raw"))["error"]["desc"]
    assert talk.ask(run("job-pause", id="b")) == {"return": {}}
    assert talk.ask(run("job-cancel", id="b")) == {"return": {}}
    talk.settle()
    assert talk.ask(JOBS) == {"return": []}
    assert [told.split()[0] for told in talk.events["b"]][-3:] == [
        "BLOCK_JOB_CANCELLED",
        "JOB_STATUS_CHANGE",
        "JOB_STATUS_CHANGE",
    ]
    for name in ("raw", "fmt0"):
        assert talk.ask(run("blockdev-del", node_name=name)) == {"return": {}}
    assert "No errors" in qemu_img("check", disks / "d0.qcow2")


def test_of_a_group_the_cancellation_of_one_is_that_of_all(disks: Path, client: Client) -> None:
    talk = Dialogue(client)
    for each in (node("n0"), node("n1")):
        talk.ask(each)
    quick = backup_of("quick", "n0", "n1", auto_dismiss=False)
    slow = backup_of("slow", "fmt0", "raw", auto_dismiss=False, speed=1)
    assert talk.ask(together(quick, slow, properties=GROUPED)) == {"return": {}}
    wait_until(lambda: status(talk) == {"quick": "waiting", "slow": "running"})
    # Done, and not final before the other is.
    assert "cannot accept" in talk.ask(run("job-finalize", id="quick"))["error"]["desc"]
    talk.ask(run("job-cancel", id="slow"))
    talk.settle()
    errors = {job["id"]: job["error"] for job in talk.ask(JOBS)["return"]}
    assert errors == dict.fromkeys(("quick", "slow"), "Operation canceled")
    assert talk.ask(run("blockdev-del", node_name="raw")) == {"return": {}}


def test_of_a_group_the_failure_of_one_is_that_of_all_and_its_cause_is_told(
    disks: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Dialogue(client)
    real_write = FileNode.write

    def write(self: FileNode, offset: int, data: Any) -> None:
        if self.filename.endswith("copy.raw"):
            raise IOFailed("the disk is broken", errno=errno.EIO)
        real_write(self, offset, data)

    monkeypatch.setattr(FileNode, "write", write)
    for each in (node("n0"), node("n1")):
        talk.ask(each)
    good = backup_of("good", "n0", "n1", auto_dismiss=False)
    bad = backup_of("bad", "fmt0", "raw", auto_dismiss=False)
    talk.ask(together(good, bad, properties=GROUPED))
    talk.settle()
    errors = {job["id"]: job["error"] for job in talk.ask(JOBS)["return"]}
    assert errors["good"] == "Operation canceled"
    assert "the disk is broken" in errors["bad"]


@pytest.mark.parametrize("last", [ABORT, snap("nope", "s"), backup_of("1a", "fmt0", "raw")])
def test_a_transaction_that_is_refused_leaves_neither_snapshots_nor_jobs(
    last: dict[str, Any], disks: Path, client: Client
) -> None:
    talk = Dialogue(client)
    bytes_before = (disks / "d0.qcow2").read_bytes()
    assert "error" in talk.ask(together(snap("fmt0", "s"), backup_of("b", "fmt1", "raw"), last))
    assert talk.ask(JOBS) == {"return": []}
    assert names(client) == {"fmt0": [], "fmt1": []}
    for name in ("raw", "fmt0", "fmt1"):
        assert talk.ask(run("blockdev-del", node_name=name)) == {"return": {}}
    assert (disks / "d0.qcow2").read_bytes() == bytes_before


@pytest.mark.parametrize("after", [0, 10, 25, 40, *range(43, 60, 2)])
def test_a_transaction_that_fails_anywhere_on_its_way_is_on_all_disks_or_none(
    after: int, disks: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Dialogue(client)
    for each in (node("n0"), node("n1")):
        talk.ask(each)
    left = [after]
    for name in ("write", "write_durable", "flush", "truncate"):
        real_call = getattr(FileNode, name)

        def call(self: FileNode, *rest: Any, real_call: Any = real_call) -> Any:
            left[0] -= 1
            if left[0] == -1:
                raise IOFailed("the disk is broken", errno=errno.EIO)
            return real_call(self, *rest)

        monkeypatch.setattr(FileNode, name, call)
    backing_up = backup_of("b", "n0", "n1", auto_dismiss=False)
    reply = talk.ask(together(snap("fmt0", "s"), snap("fmt1", "s"), backing_up))
    monkeypatch.undo()
    talk.settle()
    there = {"fmt0": [], "fmt1": []} if "error" in reply else {"fmt0": ["s"], "fmt1": ["s"]}
    assert names(client) == there
    assert list(status(talk)) == ([] if "error" in reply else ["b"])
    for number in range(2):
        assert talk.ask(run("blockdev-del", node_name=f"fmt{number}")) == {"return": {}}
        checked = subprocess.run([peer("qemu-img"), "check", disks / f"d{number}.qcow2"], capture_output=True)
        # Space that nobody uses may be left, and nothing else.
        assert checked.returncode in (0, 3)


def test_snapshots_of_a_transaction_show_one_instant_with_the_backup_beside_them(
    disks: Path, client: Client
) -> None:
    talk = Dialogue(client)
    reply = talk.ask(together(snap("fmt0", "s"), backup_of("b", "fmt1", "raw")))
    assert reply == {"return": {}}
    talk.settle()
    assert names(client) == {"fmt0": ["s"], "fmt1": []}
    assert (disks / "copy.raw").read_bytes() == b"\1" * MIB + bytes(3 * MIB)


def test_a_new_image_does_not_replace_what_holds_data(disks: Path, client: Client) -> None:
    talk = Dialogue(client)
    precious = disks / "precious"
    precious.write_bytes(b"data")
    empty = disks / "empty"
    empty.touch()
    options = [
        {"driver": "file", "filename": str(precious), "size": 512},
        {"driver": "qcow2", "file": "left", "size": 512},
        {"driver": "qcow2", "file": "raw", "size": 512},
        {"driver": "file", "filename": str(empty), "size": 512},
    ]
    shutil.copy(disks / "d1.qcow2", disks / "left")
    before = (disks / "left").read_bytes()
    talk.ask(run("blockdev-add", driver="file", node_name="left", filename=str(disks / "left")))
    talk.ask(backup("b", "fmt0", "raw", speed=1))
    for number, each in enumerate(options):
        talk.ask(run("blockdev-create", job_id=f"c{number}", options=each))
    wait_until(lambda: all(state in ("concluded", "running") for state in status(talk).values()))
    wait_until(lambda: [status(talk)[f"c{number}"] for number in range(4)] == ["concluded"] * 4)
    errors = {job["id"]: job.get("error", "") for job in talk.ask(JOBS)["return"]}
    assert "exists already" in errors["c0"]
    assert "holds a qcow2 image" in errors["c1"]
    assert "write" in errors["c2"]
    assert errors["c3"] == ""
    assert precious.read_bytes() == b"data"
    assert (disks / "left").read_bytes() == before
    assert empty.read_bytes() == bytes(512)


def test_an_image_that_cannot_be_made_leaves_nothing_of_itself(
    disks: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Dialogue(client)
    (disks / "blank").write_bytes(bytes(MIB))
    talk.ask(run("blockdev-add", driver="file", node_name="blank", filename=str(disks / "blank")))

    def broken(self: FileNode) -> None:
        raise IOFailed("the disk is broken", errno=errno.EIO)

    monkeypatch.setattr(FileNode, "flush", broken)
    for number, each in enumerate(
        [
            {"driver": "qcow2", "file": "blank", "size": MIB},
            {"driver": "file", "filename": str(disks / "new"), "size": MIB},
        ]
    ):
        talk.ask(run("blockdev-create", job_id=f"c{number}", options=each))
    talk.settle()
    monkeypatch.undo()
    assert all("broken" in job["error"] for job in talk.ask(JOBS)["return"])
    assert (disks / "blank").read_bytes() == bytes(MIB)
    assert not (disks / "new").exists()


def test_quit_ends_backups_and_leaves_images_whole(disks: Path, client: Client) -> None:
    talk = Dialogue(client)
    talk.ask(backup("b", "fmt0", "raw", speed=1, auto_dismiss=False))
    talk.ask(backup("p", "fmt1", "null", auto_dismiss=False))
    client.send({"execute": "quit"})
    assert client.until("return") == {"return": {}}
    assert "No errors" in qemu_img("check", "-U", disks / "d0.qcow2")


def status(talk: Dialogue) -> dict[str, str]:
    return {job["id"]: job["status"] for job in talk.ask(JOBS)["return"]}


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)
