"""Who can reach a monitor, and what many, slow, silent and rude clients do to each other: nothing."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from monitor.harness import PATIENCE, Client, Served, free_port, served
from stillframe.errors import AlreadyExists, InUse, InvalidRequest, NotFound, PeerError, Refused
from stillframe.jobs import JobContext
from stillframe.monitor import session as session_module
from stillframe.monitor.addresses import (
    FdAddress,
    TcpAddress,
    UnixAddress,
    listening_filename,
    machine_names,
    machine_socket,
    parse_address,
)

# Who can reach it


def test_nobody_but_the_user_can_open_the_socket(monitor: tuple[Served, UnixAddress]) -> None:
    assert stat.S_IMODE(os.lstat(monitor[1].path).st_mode) == 0o600


def test_the_mode_does_not_depend_on_the_umask(tmp_path: Path) -> None:
    former = os.umask(0)
    try:
        with served(tmp_path / "s") as (_, address):
            assert stat.S_IMODE(os.lstat(address.path).st_mode) == 0o600
    finally:
        os.umask(former)


def test_the_socket_goes_with_the_monitor(tmp_path: Path) -> None:
    with served(tmp_path / "s") as (_, address):
        assert address.path.exists()
    assert not address.path.exists()


def test_names_have_their_sockets_in_a_directory_of_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert machine_names() == []
    path = machine_socket("box", create=True)
    assert path == tmp_path / "stillframe" / "box.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with served(path):
        assert machine_names() == ["box"]


def test_without_a_runtime_directory_names_live_in_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = machine_socket("box", create=True)
    assert path == tmp_path / f"stillframe-{os.getuid()}" / "box.sock"
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("trap", ["open to others", "a link", "a file"])
def test_a_directory_that_others_could_have_prepared_is_refused(
    trap: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    place = tmp_path / "stillframe"
    if trap == "open to others":
        place.mkdir()
        place.chmod(0o755)
    elif trap == "a link":
        (tmp_path / "elsewhere").mkdir(mode=0o700)
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.touch()
    with pytest.raises(Refused):
        machine_socket("box", create=True)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can make a directory of another user's")
def test_a_directory_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = tmp_path / "stillframe"
    other.mkdir(mode=0o700)
    os.chown(other, 12345, 12345)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(Refused, match="not a directory of this user"):
        machine_socket("box", create=True)
    with pytest.raises(Refused, match="belongs to another user"), served(other / "s"):
        pass


def test_a_directory_into_which_others_may_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(Refused, match="Others may put files"), served(tmp_path / "open" / "s"):
        pass
    (tmp_path / "open").chmod(0o1777)
    with served(tmp_path / "open" / "s"):
        pass


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".", "-x", "x" * 65, "a\0b"])
def test_names_that_could_be_paths_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        machine_socket(name, create=False)


def test_paths_longer_than_a_socket_address_work_for_both_sides(tmp_path: Path) -> None:
    deep = tmp_path.joinpath(*("d" * 60 for _ in range(4)))
    deep.mkdir(parents=True)
    with served(deep / "qmp.sock") as (_, address), Client(address) as client:
        assert client.negotiate().execute("query-name") == {}
        assert stat.S_IMODE(os.lstat(address.path).st_mode) == 0o600
    assert list(deep.iterdir()) == []


def test_a_socket_that_a_dead_process_left_is_replaced(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "s"))
    with served(tmp_path / "s") as (_, address), Client(address) as client:
        client.negotiate()


def test_a_socket_that_is_in_use_is_refused_by_name_and_not_harmed(tmp_path: Path) -> None:
    with served(tmp_path / "s") as (_, address):
        with pytest.raises(InUse) as caught, served(tmp_path / "s"):
            pass
        assert str(address.path) in str(caught.value)
        with Client(address) as client:
            client.negotiate()


def test_a_file_that_is_no_socket_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("precious")
    with pytest.raises(AlreadyExists), served(tmp_path / "s"):
        pass
    assert (tmp_path / "s").read_text() == "precious"


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="missing"), served(tmp_path / "missing" / "s"):
        pass


def test_of_many_processes_that_find_a_dead_socket_one_gets_the_address(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from stillframe.errors import InUse\n"
        "from stillframe.sockets import listening_unix_socket\n"
        "sys.stdin.readline()\n"
        "try:\n    sock, _ = listening_unix_socket(Path(sys.argv[1]))\n"
        "except InUse:\n    print('in use', flush=True)\n"
        "else:\n    print('mine', flush=True)\n    sys.stdin.readline()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    rivals = [
        subprocess.Popen([sys.executable, "-c", code, str(path)], env=environment(), **pipes)
        for _ in range(6)
    ]
    for rival in rivals:
        rival.stdin.write("\n")
        rival.stdin.flush()
    said = [rival.stdout.readline().strip() for rival in rivals]
    for rival in rivals:
        rival.communicate(timeout=PATIENCE)
    assert sorted(said) == ["in use"] * 5 + ["mine"]


def environment() -> dict[str, str]:
    """Where a child process finds what this one has imported."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def test_tcp_is_for_loopback_and_for_those_who_say_that_others_may_come(tmp_path: Path) -> None:
    with served(tmp_path / "s") as (server, _):
        with pytest.raises(Refused, match="authentication"):
            server.listen(TcpAddress("0.0.0.0", 0), allow_local_users=True)
        with pytest.raises(Refused, match="authentication"):
            server.listen(TcpAddress("example.org", 0), allow_local_users=True)
        with pytest.raises(Refused, match="Every user"):
            server.listen(TcpAddress("127.0.0.1", 0))
        address = server.listen(TcpAddress("127.0.0.1", 0), allow_local_users=True)
        with Client(address) as client:
            assert client.negotiate().execute("query-name") == {}
        with pytest.raises(InUse):
            server.listen(address, allow_local_users=True)


def test_a_socket_that_was_handed_over_is_no_more_open_than_one_of_ours(tmp_path: Path) -> None:
    with served(tmp_path / "s") as (server, _):
        for host in ("0.0.0.0", None):
            with socket.socket() as sock:
                if host:
                    sock.bind((host, 0))
                with pytest.raises(Refused, match="authentication"):
                    server.listen(FdAddress(sock.fileno()), allow_local_users=True)
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            with pytest.raises(Refused, match="Every user"):
                server.listen(FdAddress(sock.fileno()))


def test_a_socket_is_named_as_qemu_names_it() -> None:
    with socket.socket(socket.AF_UNIX) as abstract, socket.socket(socket.AF_INET6) as tcp:
        name = f"\0stillframe-{os.getpid()}"
        abstract.bind(name)
        found = listening_filename(FdAddress(abstract.fileno()))
        assert found == f"unix:{name[1:]},abstract=on,tight=on,server=on"
        assert listening_filename(FdAddress(tcp.fileno())) == "tcp:[::]:0,server=on"


def test_a_web_page_cannot_give_commands_through_its_readers_browser(
    monitor: tuple[Served, UnixAddress],
) -> None:
    server, _ = monitor
    address = server.listen(TcpAddress("127.0.0.1", 0), allow_local_users=True)
    body = b'{"execute":"qmp_capabilities"}{"execute":"stop"}'
    with Client(address) as browser:
        browser.send(b"POST / HTTP/1.1\r\nContent-Type: text/plain\r\n\r\n" + body)
        assert "QMP" in browser.message()
        with suppress(ConnectionError):
            assert browser.line() == b""
    assert server.host.machine.run_state == "running"


def test_nobody_listening_is_told_in_one_sentence(tmp_path: Path) -> None:
    for address in (UnixAddress(tmp_path / "s"), TcpAddress("127.0.0.1", free_port())):
        with pytest.raises(PeerError, match="Could not connect"):
            Client(address)


@pytest.mark.parametrize(
    "text", ["", "box", "unix:", "tcp:", "tcp:localhost", "tcp:h:99999", "tcp:h:-1", "udp:h:1"]
)
def test_what_is_no_address_is_refused_with_the_forms_that_are(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_address(text)
    assert "unix:PATH" in str(caught.value.remedy)


STDIO = """
import asyncio, sys
from monitor.harness import Served
from stillframe.monitor.addresses import StdioAddress
served = Served("box")
served.listen(StdioAddress())
served.call(served.server.wait_over())
served.close()
"""


@pytest.mark.parametrize("kind", ["pipes", "files"])
def test_a_monitor_on_standard_input_and_output(kind: str, tmp_path: Path) -> None:
    requests = b'{"execute":"qmp_capabilities"}{"execute":"query-name"}\n{"execute":"quit"}\n'
    (tmp_path / "in").write_bytes(requests)
    command = [sys.executable, "-c", STDIO]
    if kind == "pipes":
        run = subprocess.run(command, input=requests, stdout=subprocess.PIPE, env=environment(), timeout=60)
        out = run.stdout
    else:
        with (tmp_path / "in").open("rb") as read, (tmp_path / "out").open("wb") as write:
            run = subprocess.run(command, stdin=read, stdout=write, env=environment(), timeout=60)
        out = (tmp_path / "out").read_bytes()
    assert run.returncode == 0
    lines = [json.loads(line) for line in out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["QMP", "return", "return", "timestamp", "return"]
    assert lines[2] == {"return": {"name": "box"}}


# Sessions


def test_events_are_for_those_who_have_negotiated(monitor: tuple[Served, UnixAddress]) -> None:
    with Client(monitor[1]) as early, Client(monitor[1]) as client:
        early.message()
        client.negotiate()
        assert client.execute("stop") == {}
        assert early.execute("qmp_capabilities") == {}
        assert client.execute("cont") == {}
        assert early.message()["event"] == "RESUME"


def test_replies_come_in_the_order_of_the_requests(client: Client) -> None:
    client.send("".join(json.dumps({"execute": "query-name", "id": number}) for number in range(200)))
    assert [client.message()["id"] for _ in range(200)] == list(range(200))


def test_an_event_of_a_command_comes_before_its_reply(client: Client) -> None:
    for _ in range(50):
        client.send('{"execute":"stop"}{"execute":"cont"}')
        assert [next(reversed(client.message())) for _ in range(4)] == ["event", "return", "event", "return"]


def test_a_command_at_work_holds_back_its_own_client_only(monitor: tuple[Served, UnixAddress]) -> None:
    server, address = monitor
    let_go = threading.Event()
    with Client(address) as waiting, Client(address) as other:
        waiting.negotiate()
        other.negotiate()
        threading.Thread(
            target=server.host.jobs.run_internal,
            args=("block", lambda context: let_go.wait(PATIENCE) and None),
            kwargs={"queue": server.host.snapshots.queue},
        ).start()
        # It waits for its turn among the snapshot operations.
        waiting.send({"execute": "human-monitor-command", "arguments": {"command-line": "delvm x"}})
        waiting.send({"execute": "query-name", "id": "later"})
        assert other.execute("query-status")["running"]
        let_go.set()
        assert waiting.message() == {"return": ""}
        assert waiting.message() == {"return": {}, "id": "later"}


@contextmanager
def held(server: Served) -> Iterator[threading.Event]:
    """Commands on snapshots wait for their turn until the event is set."""
    let_go, began = threading.Event(), threading.Event()

    def body(context: JobContext) -> None:
        began.set()
        let_go.wait(PATIENCE)

    queue = server.host.snapshots.queue
    thread = threading.Thread(
        target=server.host.jobs.run_internal, args=("block", body), kwargs={"queue": queue}
    )
    thread.start()
    assert began.wait(PATIENCE)
    try:
        yield let_go
    finally:
        let_go.set()
        thread.join()


WAITING_COMMAND = {"execute": "human-monitor-command", "arguments": {"command-line": "delvm x"}, "id": "slow"}
OOB = b'{"execute":"qmp_capabilities","arguments":{"enable":["oob"]}}'


def with_oob(client: Client) -> Client:
    client.message()
    client.send(OOB)
    assert client.message() == {"return": {}}
    return client


def test_what_is_asked_out_of_band_overtakes_a_command_that_hangs_and_those_behind_it(
    monitor: tuple[Served, UnixAddress],
) -> None:
    server, address = monitor
    with Client(address) as client, held(server) as let_go:
        with_oob(client).send(WAITING_COMMAND)
        client.send({"execute": "query-name", "id": "behind"})
        client.send({"exec-oob": "query-yank", "id": "first"})
        client.send({"exec-oob": "query-name", "id": "refused"})
        assert client.message() == {"return": [], "id": "first"}
        assert client.message()["error"]["desc"] == "The command query-name does not support OOB"
        let_go.set()
        assert [client.message()["id"] for _ in range(2)] == ["slow", "behind"]


def test_behind_eight_requests_that_wait_nothing_is_heard_until_one_is_done(
    monitor: tuple[Served, UnixAddress],
) -> None:
    server, address = monitor
    with Client(address) as client, held(server) as let_go:
        with_oob(client).send(WAITING_COMMAND)
        for number in range(session_module.MAX_QUEUED - 1):
            client.send({"execute": "query-name", "id": number})
        client.send({"exec-oob": "query-yank", "id": "heard"})
        assert client.message()["id"] == "heard"
        client.send({"execute": "query-name", "id": "eighth"})
        client.send({"exec-oob": "query-yank", "id": "too late"})
        client.send({"execute": "query-name", "id": "last"})
        let_go.set()
        came = [client.message()["id"] for _ in range(session_module.MAX_QUEUED + 3)]
        assert came[0] == "slow"
        assert [each for each in came if each != "too late"] == ["slow", *range(7), "eighth", "last"]


def test_what_was_asked_with_oob_before_the_client_went_is_done(
    monitor: tuple[Served, UnixAddress], client: Client
) -> None:
    with Client(monitor[1]) as going:
        with_oob(going).send('{"execute":"stop"}')
        going.socket.shutdown(socket.SHUT_WR)
        assert client.until("event")["event"] == "STOP"


def test_an_error_in_the_text_keeps_its_place_with_oob(
    client: Client, monitor: tuple[Served, UnixAddress]
) -> None:
    with Client(monitor[1]) as other:
        with_oob(other).send('{"execute":"query-name","id":1}{"a":NaN}{"execute":"query-name","id":2}')
        assert [other.message().get("id", "error") for _ in range(4)] == [1, "error", "error", 2]


def test_quit_is_answered_with_oob_and_ends_the_session(monitor: tuple[Served, UnixAddress]) -> None:
    with Client(monitor[1]) as client:
        with_oob(client).send('{"execute":"quit"}')
        assert client.message()["event"] == "SHUTDOWN"
        assert client.message() == {"return": {}}
        assert client.line() == b""


def test_two_hundred_idle_clients_are_served_beside_one_that_asks(
    monitor: tuple[Served, UnixAddress],
) -> None:
    clients: list[Client] = []
    try:
        for _ in range(200):
            clients.append(Client(monitor[1]).negotiate())
        clients[0].execute("stop")
        for client in clients[1:]:
            assert client.message()["event"] == "STOP"
    finally:
        for client in clients:
            client.__exit__()


def test_fifty_clients_at_once_all_get_their_answers_and_all_events(
    monitor: tuple[Served, UnixAddress],
) -> None:
    clients = [Client(monitor[1]) for _ in range(50)]
    try:
        for client in clients:
            client.negotiate()
        for number, client in enumerate(clients):
            client.send({"execute": "query-status", "id": number})
        for number, client in enumerate(clients):
            assert client.message()["id"] == number
        clients[0].execute("stop")
        for client in clients[1:]:
            assert client.message()["event"] == "STOP"
    finally:
        for client in clients:
            client.__exit__()


def test_a_client_too_many_is_told_so(
    monitor: tuple[Served, UnixAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stillframe.monitor.server.MAX_SESSIONS", 2)
    with Client(monitor[1]) as first, Client(monitor[1]) as second:
        first.negotiate()
        second.negotiate()
        with Client(monitor[1]) as third:
            assert "2 clients" in third.message()["error"]["desc"]
            assert third.line() == b""
        assert first.execute("query-name") == {}


def test_a_client_that_does_not_read_its_replies_stops_itself_alone(
    monitor: tuple[Served, UnixAddress],
) -> None:
    with Client(monitor[1]) as deaf, Client(monitor[1]) as client:
        deaf.negotiate()
        deaf.socket.setblocking(False)
        request, sent = b'{"execute":"query-qmp-schema"}' * 100, 0
        try:
            while sent < 64 << 20:
                sent += deaf.socket.send(request)
        except BlockingIOError:
            pass
        # What was sent lies in the kernel's buffers: the monitor has stopped reading.
        assert sent < 16 << 20
        assert client.negotiate().execute("query-status")["running"]


def test_a_client_that_takes_nothing_of_its_replies_for_long_loses_its_connection_and_nobody_else(
    monitor: tuple[Served, UnixAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "DEAF_SECONDS", 0.05)
    server, address = monitor
    with Client(address) as deaf, Client(address) as client:
        deaf.negotiate()
        deaf.send(b'{"execute":"query-qmp-schema"}' * 100)
        client.negotiate()
        deadline = time.monotonic() + PATIENCE
        while server.on_loop(lambda: len(server.server._sessions)) > 1:
            assert time.monotonic() < deadline, "the deaf client was kept"
            assert client.execute("query-status")["running"]
        assert client.execute("query-status")["running"]


def test_events_beside_a_long_reply_do_not_cost_a_client_its_connection(
    monitor: tuple[Served, UnixAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_UNSENT_BYTES", 1 << 17)
    server, address = monitor
    with Client(address) as client:
        client.negotiate()
        client.send({"execute": "query-name", "id": "x" * (1 << 19)})
        deadline = time.monotonic() + PATIENCE
        while server.on_loop(lambda: max(each._stream.unsent for each in server.server._sessions)) < 1 << 17:
            assert time.monotonic() < deadline, "all was taken by the kernel"
        server.events.emit("JOB_STATUS_CHANGE", id="x", status="created")
        told = [client.until("return", "event") for _ in range(2)]
        assert ["return" in message for message in told] == [True, False]


def test_a_client_that_does_not_read_its_events_loses_its_connection_and_nobody_else(
    monitor: tuple[Served, UnixAddress], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_UNSENT_BYTES", 1 << 18)
    server, address = monitor
    with Client(address) as deaf, Client(address) as client:
        deaf.negotiate()
        client.negotiate()
        stop = threading.Event()

        def flood() -> None:
            while not stop.is_set():
                server.events.emit("JOB_STATUS_CHANGE", id="x" * 200, status="created")
                time.sleep(0)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            deadline = time.monotonic() + PATIENCE
            while server.on_loop(lambda: len(server.server._sessions)) > 1:
                assert time.monotonic() < deadline, "the deaf client was kept"
                client.line()
        finally:
            stop.set()
            flooding.join()
        assert client.execute("query-status")["running"]


def test_a_flood_of_one_client_does_not_keep_another_waiting(monitor: tuple[Served, UnixAddress]) -> None:
    address = monitor[1]
    with Client(address) as flooder, Client(address) as client:
        flooder.negotiate()
        client.negotiate()
        flooder.send(b"5 " * 30000)
        first = b""
        while b"must be a JSON object" not in first:
            first = flooder.line()
        assert client.execute("query-status")["running"]
        # Answered in the middle of the flood, whose own answers are still to come.
        assert b"must be a JSON object" in flooder.line()


@pytest.mark.parametrize(
    "last", [b"", b'{"execute"', b'{"execute":"query-block"}' * 50, b'"\xff', b'{"execute":"stop"}']
)
def test_clients_that_vanish_leave_nothing_behind(monitor: tuple[Served, UnixAddress], last: bytes) -> None:
    server, address = monitor
    for _ in range(10):
        with Client(address) as rude:
            rude.negotiate()
            rude.send(last)
    with Client(address) as client:
        client.negotiate().execute("query-status")
        deadline = time.monotonic() + PATIENCE
        while server.on_loop(lambda: len(server.server._sessions)) > 1:
            assert time.monotonic() < deadline, "sessions of clients that are gone were kept"


def test_a_command_that_fails_in_a_way_nobody_foresaw_is_an_error_and_not_the_end(
    monitor: tuple[Served, UnixAddress],
    client: Client,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("1/0")

    monkeypatch.setattr(monitor[0].host.machine, "powerdown", broken)
    assert client.execute("system_powerdown") == {"class": "GenericError", "desc": "ZeroDivisionError: 1/0"}
    assert client.execute("query-status")["running"]
    assert any(record.exc_info for record in caplog.records)


# The machine


def test_stop_and_cont_are_told_and_seen(client: Client) -> None:
    client.send({"execute": "stop"})
    assert client.message()["event"] == "STOP"
    assert client.message() == {"return": {}}
    assert client.execute("query-status") == {"running": False, "status": "paused"}
    client.send({"execute": "stop"})
    assert client.message() == {"return": {}}
    assert client.execute("cont") == {}
    assert client.execute("query-status") == {"running": True, "status": "running"}


def test_reset_and_powerdown_are_told(client: Client) -> None:
    client.send({"execute": "system_reset"})
    assert client.message()["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
    assert client.message() == {"return": {}}
    client.send({"execute": "system_powerdown"})
    assert client.message()["event"] == "POWERDOWN"


def test_a_machine_started_paused_waits_in_prelaunch(tmp_path: Path) -> None:
    with served(tmp_path / "s", "box", running=False) as (_, address), Client(address) as client:
        client.negotiate()
        assert client.execute("query-status") == {"running": False, "status": "prelaunch"}
        assert client.execute("query-name") == {"name": "box"}


def test_jobs_are_seen_and_steered_by_every_client(
    monitor: tuple[Served, UnixAddress], client: Client
) -> None:
    server, address = monitor

    def body(context: JobContext) -> None:
        context.progress(1, 2)
        context.wait(PATIENCE)

    server.host.jobs.create("j", "snapshot-save", body)
    with Client(address) as other:
        other.negotiate()
        assert client.execute("job-pause", id="j") == {}
        while client.execute("query-jobs")[0]["status"] != "paused":
            pass
        (job,) = other.execute("query-jobs")
        assert job == {
            "id": "j",
            "type": "snapshot-save",
            "status": "paused",
            "current-progress": 1,
            "total-progress": 2,
        }
        assert other.execute("job-cancel", id="j") == {}
        while client.message().get("data") != {"id": "j", "status": "concluded"}:
            pass
        assert client.execute("query-jobs")[0]["error"] == "Operation canceled"
        assert client.execute("job-dismiss", id="j") == {}
        assert other.execute("query-jobs") == []


def test_quit_tells_of_the_end_ends_the_jobs_and_then_answers(
    monitor: tuple[Served, UnixAddress], client: Client
) -> None:
    server, address = monitor
    server.host.jobs.create("done", "snapshot-save", lambda context: context.checkpoint())
    assert server.host.jobs.wait_concluded("done", PATIENCE)
    server.host.jobs.create("busy", "snapshot-save", lambda context: context.wait(PATIENCE))
    with Client(address) as other:
        other.negotiate()
        client.send({"execute": "quit"})
        seen = []
        while "return" not in (message := client.message()):
            if "SHUTDOWN" in message.values() or seen:
                seen.append(message)
        assert client.line() == b""
        assert [message["event"] for message in seen] == ["SHUTDOWN"] + ["JOB_STATUS_CHANGE"] * 4
        assert seen[0]["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert [tuple(sorted(message["data"].values())) for message in seen[1:]] == [
            ("aborting", "busy"),
            ("busy", "concluded"),
            ("busy", "null"),
            ("done", "null"),
        ]
        server.call(server.server.wait_over())
        server.call(server.server.close())
        while line := other.line():
            last = json.loads(line)
        assert last["data"] == {"id": "done", "status": "null"}


def test_what_a_pipe_held_when_its_client_went_is_still_done(monitor: tuple[Served, UnixAddress]) -> None:
    with Client(monitor[1]) as rude:
        rude.negotiate()
        rude.send(b'{"execute":"stop"}')
    with Client(monitor[1]) as client:
        client.negotiate()
        while client.execute("query-status")["running"]:
            pass
