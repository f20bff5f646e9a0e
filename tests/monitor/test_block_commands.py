"""Block nodes through the monitor, beside a real QEMU with the same files."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from monitor.harness import Client, Lines, qemu, served
from peers import QEMU_VERSIONS, peer


def qemu_img(*arguments: object) -> str:
    run = subprocess.run(
        [peer("qemu-img"), *map(str, arguments)],
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return run.stdout


@contextmanager
def side_by_side(tmp_path: Path, version: str) -> Iterator[tuple[Lines, Lines, Path, Path]]:
    """A real QEMU's monitor and ours, each with a directory of its own, the two alike."""
    with ExitStack() as stack:
        places = []
        for name in ("qemu", "ours"):
            place = tmp_path / name / "images"
            place.mkdir(parents=True)
            places.append(place)
        master = tmp_path / "master"
        master.mkdir()
        qemu_img("create", "-f", "raw", master / "raw", "1M")
        qemu_img("create", "-f", "qcow2", master / "base", "2M")
        qemu_img("create", "-f", "qcow2", "-b", "base", "-F", "qcow2", master / "over")
        qemu_img("create", "-f", "qcow2", "-o", "cluster_size=4096,refcount_bits=8", master / "odd", "3M")
        qemu_img("create", "-f", "qcow2", "-o", "compat=0.10", master / "old", "1M")
        qemu_img("snapshot", "-c", "first", master / "odd")
        for image in sorted(master.iterdir()):
            for place in places:
                shutil.copy(image, place / image.name)
        real = stack.enter_context(qemu(peer("qemu-system-x86_64", version))).negotiate()
        _, address = stack.enter_context(served(tmp_path / "qmp.sock"))
        ours = stack.enter_context(Client(address)).negotiate()
        yield real, ours, *places


def add(image: str, node_name: str, driver: str = "qcow2", **more: Any) -> dict[str, Any]:
    return {"driver": driver, "node-name": node_name, "file": {"driver": "file", "filename": image}, **more}


# Chosen at random, or true of one process, one place and one moment only.
PASSING = {
    "date-sec",
    "date-nsec",
    "vm-clock-sec",
    "vm-clock-nsec",
    "actual-size",
    "file",
    "full-backing-filename",
}
# Of files: QEMU rounds their sizes up, and allocates in an order of its own; 7.2 says nothing specific of
# them and of `active`.
OF_FILES = {"virtual-size", "format-specific"}
# Of null-co: QEMU knows no dirty flag, and describes the options where we give the name that it accepts, too.
OF_NULL = {"filename", "dirty-flag"}


def alike(value: Any, place: Path) -> Any:
    """What two programs must say alike of the same nodes."""
    if isinstance(value, dict):
        passing = PASSING | {"active"}
        passing |= {"file": OF_FILES, "null-co": OF_NULL}.get(value.get("format", ""), set())
        return {
            key: alike("#" if str(item).startswith("#block") else item, place)
            for key, item in value.items()
            if key not in passing
        }
    if isinstance(value, list):
        return [alike(each, place) for each in value]
    if isinstance(value, str) and value.startswith("json:"):
        return alike(json.loads(value.removeprefix("json:")), place)
    return value.replace(str(place), "PLACE") if isinstance(value, str) else value


STEPS: list[tuple[str, dict[str, Any]]] = [
    ("blockdev-add", add("PLACE/odd", "odd")),
    ("blockdev-add", add("PLACE/odd", "again")),
    ("blockdev-add", {"driver": "null-co", "node-name": "odd"}),
    ("blockdev-add", {"driver": "file", "node-name": "p0", "filename": "PLACE/raw"}),
    ("blockdev-add", {"driver": "raw", "node-name": "r0", "file": "p0"}),
    ("blockdev-add", {"driver": "raw", "node-name": "r1", "file": "p0"}),
    ("blockdev-add", {"driver": "raw", "node-name": "r0", "file": "p0"}),
    ("blockdev-add", add("PLACE/odd", "odd")),
    ("blockdev-add", {"driver": "null-co", "node-name": "n1", "size": 65536}),
    ("blockdev-add", {"driver": "raw", "node-name": "on", "file": "n1"}),
    ("blockdev-add", {"driver": "raw", "node-name": "view", "file": "odd", "offset": 512}),
    ("blockdev-add", add("PLACE/over", "over")),
    ("blockdev-add", add("PLACE/old", "old", **{"read-only": True})),
    ("blockdev-add", {"driver": "null-co", "node-name": "n0", "size": 65536}),
    ("blockdev-add", add("PLACE/raw", "bad")),
    ("blockdev-add", add("PLACE/missing", "bad")),
    ("blockdev-add", add("/tmp", "bad", driver="raw")),
    ("query-named-block-nodes", {"flat": True}),
    ("query-named-block-nodes", {}),
    ("query-block", {}),
    ("blockdev-del", {"node-name": "p0"}),
    ("blockdev-snapshot-internal-sync", {"device": "odd", "name": "second"}),
    ("blockdev-snapshot-internal-sync", {"device": "odd", "name": "second"}),
    ("blockdev-snapshot-internal-sync", {"device": "odd", "name": ""}),
    ("blockdev-snapshot-internal-sync", {"device": "n0", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"device": "p0", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"device": "nope", "name": "s"}),
    ("query-named-block-nodes", {"flat": True}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd", "id": "99"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd", "id": "", "name": "first"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd", "id": "2", "name": "first"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd", "id": "2", "name": "second"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "odd", "name": "first"}),
    ("query-named-block-nodes", {"flat": True}),
    ("blockdev-del", {"node-name": "r0"}),
    ("blockdev-del", {"node-name": "p0"}),
    ("blockdev-del", {"node-name": "odd"}),
    ("blockdev-del", {"node-name": "over"}),
    ("blockdev-del", {"node-name": "nope"}),
    ("query-named-block-nodes", {"flat": True}),
]


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_nodes_and_their_snapshots_are_as_with_a_real_qemu(tmp_path: Path, version: str) -> None:
    differing = []
    with side_by_side(tmp_path, version) as (real, ours, theirs_at, ours_at):
        for command, arguments in STEPS:
            said = []
            for side, place in ((real, theirs_at), (ours, ours_at)):
                text = json.dumps(arguments).replace("PLACE", str(place))
                side.send(json.dumps({"execute": command, "arguments": json.loads(text)}))
                said.append(alike(side.until("return", "error"), place))
            if said[1] != said[0]:
                differing.append((command, arguments, *said))
    assert differing == []
    for image in ("odd", "base", "over", "old"):
        qemu_img("check", ours_at / image)


def test_what_is_not_honoured_is_refused_by_its_name(client: Client, tmp_path: Path) -> None:
    (tmp_path / "raw").write_bytes(bytes(65536))
    client.send(
        {
            "execute": "blockdev-add",
            "arguments": {
                "driver": "file",
                "node-name": "n",
                "filename": str(tmp_path / "raw"),
                "aio": "io_uring",
            },
        }
    )
    assert "aio" in client.until("error")["error"]["desc"]
    assert client.execute("query-named-block-nodes") == []


def test_the_human_monitor_lists_the_snapshots_of_all_disks(client: Client, tmp_path: Path) -> None:
    for name in ("a", "b"):
        qemu_img("create", "-f", "qcow2", tmp_path / name, "1M")
        qemu_img("snapshot", "-c", "both", tmp_path / name)
        client.send({"execute": "blockdev-add", "arguments": add(str(tmp_path / name), name)})
        client.until("return")
    assert client.hmp("snapshot_blkdev_internal b alone") == ""
    lines = client.hmp("info snapshots").split("\r\n")
    assert lines[0] == "List of snapshots present on all disks:"
    assert lines[2].startswith("--      both")
    assert lines[3:5] == ["", "List of partial (non-loadable) snapshots on 'b':"]
    assert lines[6].startswith("2       alone")
    assert client.hmp("snapshot_delete_blkdev_internal b alone") == ""
    assert client.hmp("snapshot_delete_blkdev_internal b alone").startswith(
        "Error: Snapshot with id 'null' and name 'alone'"
    )
    assert "partial" not in client.hmp("info snapshots")


def test_savevm_loadvm_and_delvm_work_on_all_disks(client: Client, tmp_path: Path) -> None:
    for name in ("a", "b"):
        qemu_img("create", "-f", "qcow2", tmp_path / name, "1M")
        client.send({"execute": "blockdev-add", "arguments": add(str(tmp_path / name), name)})
        client.until("return")
    assert client.hmp("savevm one") == ""
    assert client.hmp("savevm one") == ""
    assert client.hmp('savevm "two words"') == ""
    assert client.hmp("savevm") == ""
    for name in ("a", "b"):
        # The state lies on the first disk; each has each snapshot once.
        tags = [
            line.split()[1] for line in qemu_img("snapshot", "-U", "-l", tmp_path / name).splitlines()[2:]
        ]
        assert tags[:2] == ["one", "two"]
        assert tags[2].startswith("vm-")
        assert len(tags) == 3
    assert client.hmp("loadvm one") == ""
    assert client.hmp("info status") == "VM status: running\r\n"
    assert client.hmp("loadvm nope") == "Error: Snapshot 'nope' does not exist in one or more devices\r\n"
    for tag in ("one", '"two words"', "nope"):
        assert client.hmp(f"delvm {tag}") == ""
    assert client.hmp("info snapshots").count("vm-") == 1
    for name in ("a", "b"):
        client.execute("blockdev-del", node_name=name)
        qemu_img("check", tmp_path / name)
