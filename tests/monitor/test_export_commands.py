"""Exports through the monitor, beside a real QEMU."""

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from export.client import Client as NbdClient
from monitor.harness import Client, Lines, qemu, served
from peers import QEMU_VERSIONS, peer

UNIX = {"type": "unix", "data": {"path": "PLACE/s"}}
NBD = {"type": "nbd"}
STEPS: list[tuple[str, dict[str, Any]]] = [
    ("query-block-exports", {}),
    ("nbd-server-add", {"device": "n"}),
    ("nbd-server-remove", {"name": "n"}),
    ("nbd-server-stop", {}),
    ("block-export-add", NBD | {"id": "e", "node-name": "nope"}),
    (
        "blockdev-add",
        {"driver": "qcow2", "node-name": "n", "file": {"driver": "file", "filename": "PLACE/n"}},
    ),
    ("blockdev-add", {"driver": "null-co", "node-name": "ro", "read-only": True}),
    ("blockdev-add", {"driver": "null-co", "node-name": "z"}),
    ("block-export-add", NBD | {"id": "e", "node-name": "n"}),
    ("nbd-server-start", {"addr": {"type": "unix", "data": {"path": "/nope/s"}}}),
    ("nbd-server-start", {"addr": UNIX, "tls-creds": "foo"}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "no-such"}}}),
    ("nbd-server-start", {"addr": {"type": "bogus", "data": {}}}),
    ("nbd-server-start", {"addr": {"type": "unix"}}),
    ("nbd-server-start", {}),
    ("nbd-server-start", {"addr": UNIX, "max-connections": -1}),
    ("nbd-server-start", {"addr": UNIX, "max-connections": 2}),
    ("nbd-server-start", {"addr": UNIX}),
    ("nbd-server-add", {"device": "nope"}),
    ("nbd-server-add", {"device": "n"}),
    ("nbd-server-add", {"device": "n"}),
    ("nbd-server-add", {"device": "n", "name": "m", "writable": True}),
    ("nbd-server-add", {"device": "ro", "writable": True}),
    ("nbd-server-add", {"device": "z", "name": "x" * 5000}),
    ("nbd-server-add", {"device": "z", "name": "x" + "y" * 4096}),
    ("nbd-server-add", {"device": "z", "name": "dd", "description": "x" * 5000}),
    ("nbd-server-add", {"device": "z", "name": "bm", "bitmap": "nob"}),
    ("block-export-add", NBD | {"id": "n", "node-name": "n"}),
    ("block-export-add", NBD | {"id": "e-1", "node-name": "n"}),
    ("block-export-add", NBD | {"id": "bad id", "node-name": "n"}),
    ("block-export-add", NBD | {"id": "1a", "node-name": "n", "name": "u1"}),
    ("block-export-add", NBD | {"id": "", "node-name": "n", "name": "u1"}),
    ("block-export-add", NBD | {"id": "e-2", "node-name": "nope", "name": "u2"}),
    ("block-export-add", NBD | {"id": "e-3", "node-name": "ro", "name": "u3", "writable": True}),
    ("block-export-add", NBD | {"id": "e-5", "node-name": "z", "name": "u5", "iothread": "nope"}),
    ("block-export-add", NBD | {"id": "e-6", "node-name": "z", "name": "u6", "fixed-iothread": True}),
    ("block-export-add", NBD | {"id": "e-7", "node-name": "z", "name": "u7", "bitmaps": ["b"]}),
    ("block-export-add", {"type": "foo", "id": "f", "node-name": "z"}),
    ("block-export-add", {"id": "f", "node-name": "z"}),
    ("block-export-add", NBD | {"node-name": "z"}),
    ("block-export-add", NBD | {"id": "f"}),
    ("block-export-add", NBD | {"id": "f", "node-name": "z", "bogus": 1}),
    ("query-block-exports", {}),
    ("blockdev-del", {"node-name": "n"}),
    ("nbd-server-remove", {"name": "nope"}),
    ("block-export-del", {"id": "nope"}),
    ("nbd-server-remove", {"name": "m", "mode": "bogus"}),
    ("nbd-server-remove", {"name": "m", "mode": "safe"}),
    ("CLIENT", {"name": "n"}),
    ("block-export-del", {"id": "n"}),
    ("nbd-server-remove", {"name": "n", "mode": "safe"}),
    ("block-export-del", {"id": "n", "mode": "hard"}),
    ("ENDED", {}),
    ("blockdev-del", {"node-name": "n"}),
    ("query-block-exports", {}),
    ("CLIENT", {"name": "u6"}),
    ("nbd-server-stop", {}),
    ("ENDED", {}),
    ("query-block-exports", {}),
    ("nbd-server-stop", {}),
    ("blockdev-del", {"node-name": "z"}),
    ("nbd-server-start", {"addr": {"type": "inet", "data": {"host": "127.0.0.1", "port": "0"}}}),
    ("nbd-server-stop", {}),
]


@contextmanager
def side_by_side(tmp_path: Path, version: str) -> Iterator[list[tuple[Lines, Path]]]:
    with ExitStack() as stack:
        places = [tmp_path / "qemu", tmp_path / "ours"]
        for place in places:
            place.mkdir()
            subprocess.run([peer("qemu-img"), "create", "-q", "-f", "qcow2", place / "n", "1M"], check=True)
        real = stack.enter_context(qemu(peer("qemu-system-x86_64", version))).negotiate()
        _, address = stack.enter_context(served(tmp_path / "qmp.sock"))
        ours = stack.enter_context(Client(address)).negotiate()
        yield list(zip((real, ours), places, strict=True))


@pytest.mark.parametrize("version", QEMU_VERSIONS)
def test_exports_are_made_and_removed_in_the_words_of_a_real_qemu(tmp_path: Path, version: str) -> None:
    differing = []
    # Where an event stands among the replies, and in which order exports go at the end, is nobody's promise.
    events: list[list[str]] = [[], []]
    with side_by_side(tmp_path, version) as sides:
        clients: list[NbdClient] = []
        for command, arguments in STEPS:
            if command == "CLIENT":
                clients = [NbdClient(place / "s").go(arguments["name"]) for _, place in sides]
                continue
            if command == "ENDED":
                assert [client.is_ended for client in clients] == [True, True]
                continue
            replies = []
            for (side, place), heard in zip(sides, events, strict=True):
                text = json.dumps(arguments).replace("PLACE", str(place))
                side.send(json.dumps({"execute": command, "arguments": json.loads(text)}))
                while "event" in (message := side.message()):
                    heard.append(json.dumps([message["event"], message["data"]]))
                replies.append(message)
            if replies[0] != replies[1]:
                differing.append((command, arguments, *replies))
    assert differing == []
    assert sorted(events[0]) == sorted(events[1])
    assert len(events[0]) == 4


def test_a_server_with_options_that_are_not_honoured_does_not_listen(client: Client, tmp_path: Path) -> None:
    inet = {"host": "127.0.0.1", "port": "0"}
    for name, arguments in {
        "tls-authz": {"addr": {"type": "unix", "data": {"path": str(tmp_path / "s")}}, "tls-authz": "a"},
        "abstract": {"addr": {"type": "unix", "data": {"path": "s", "abstract": True}}},
        "mptcp": {"addr": {"type": "inet", "data": inet | {"mptcp": True}}},
        "vsock": {"addr": {"type": "vsock", "data": {"cid": "1", "port": "9"}}},
        "all addresses": {"addr": {"type": "inet", "data": inet | {"host": ""}}},
    }.items():
        client.send(json.dumps({"execute": "nbd-server-start", "arguments": arguments}))
        assert name in client.until("error")["error"]["desc"]
    assert client.execute("nbd-server-stop")["desc"] == "NBD server not running"


def test_the_socket_of_a_server_is_its_users_own_and_gone_at_its_end(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "s"
    assert client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}) == {}
    assert path.stat().st_mode & 0o777 == 0o600
    assert client.execute("nbd-server-stop") == {}
    assert not path.exists()


def test_more_clients_than_asked_for_wait_their_turn(client: Client, tmp_path: Path) -> None:
    path = tmp_path / "s"
    client.execute("nbd-server-start", addr={"type": "unix", "data": {"path": str(path)}}, max_connections=1)
    client.execute("blockdev-add", driver="null-co", node_name="n", size=4096)
    client.execute("block-export-add", type="nbd", id="e", node_name="n")
    with NbdClient(path).go("n") as first, socket.socket(socket.AF_UNIX) as second:
        second.connect(str(path))
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(1)
        first.socket.close()
        second.settimeout(20)
        assert second.recv(8) == b"NBDMAGIC"
