"""The serial port's other ends: nothing that they do may hold the guest up for long."""

import os
import socket
import stat
import threading
from contextlib import closing
from pathlib import Path

import pytest

from machine.machines import wait_until
from stillframe.errors import AlreadyExists, InUse, IOFailed
from stillframe.machine.console import LogConsole, MemoryConsole, PtyConsole, SocketConsole, StdioConsole


def test_log_has_every_byte_and_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "console.log"
    path.write_bytes(b"before ")
    console = LogConsole(path)
    console.write(b"one ")
    console.write(b"two")
    console.close()
    assert path.read_bytes() == b"before one two"


def test_log_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(IOFailed, match=r"no/such/console\.log"):
        LogConsole(tmp_path / "no/such/console.log")


def test_log_into_a_pipe_that_was_handed_over_waits_for_its_reader() -> None:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    console = LogConsole(writer)
    console.write(b"x" * (256 << 10))
    with open(reader, "rb") as file:
        assert len(file.read(256 << 10)) == 256 << 10
        console.close()
        assert file.read() == b""


def test_socket_that_was_handed_over_serves_clients_though_it_does_not_wait() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        name = f"\0stillframe-{os.getpid()}"
        sock.bind(name)
        sock.setblocking(False)
        with closing(SocketConsole(os.dup(sock.fileno()))) as console:
            assert console.filename == f"disconnected:unix:{name[1:]},abstract=on,tight=on,server=on"
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(name)
                wait_until(lambda: console._client is not None, "connected")


def test_socket_is_the_users_alone_and_serves_one_client_after_the_other(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    console = SocketConsole(path)
    try:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        taken = bytearray()
        console.on_input = lambda: taken.extend(console.take(100))
        for text in (b"first", b"second"):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
                client.sendall(text)
                wait_until(lambda text=text: taken.endswith(text), "input arrives")  # type: ignore[misc]
                console.write(b"answer")
                client.settimeout(20)
                assert client.recv(6, socket.MSG_WAITALL) == b"answer"
        with pytest.raises(InUse, match="listens"):
            SocketConsole(path)
    finally:
        console.close()
    assert not path.exists()


def test_socket_left_by_a_dead_process_is_taken_over_and_a_file_is_not(tmp_path: Path) -> None:
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    SocketConsole(path).close()
    path.write_text("precious")
    with pytest.raises(AlreadyExists):
        SocketConsole(path)
    assert path.read_text() == "precious"


def test_client_that_reads_nothing_does_not_hold_the_guest_up(tmp_path: Path) -> None:
    path = tmp_path / "console.sock"
    console = SocketConsole(path)
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        wait_until(lambda: console._client is not None, "connected")
        for _ in range(200):
            console.write(b"x" * 65536)
        assert len(console._output) <= 4 << 20 + 65536
    console.close()


def test_terminal_end_to_end() -> None:
    guest_in, keyboard = os.pipe()
    screen, guest_out = os.pipe()
    console = StdioConsole((guest_in, guest_out))
    arrived = threading.Event()
    console.on_input = arrived.set
    os.write(keyboard, b"ls\n")
    assert arrived.wait(20)
    assert console.take(10) == b"ls\n"
    console.write(b"file\n")
    assert os.read(screen, 5) == b"file\n"
    console.close()
    console.close()
    for descriptor in (guest_in, keyboard, screen, guest_out):
        os.close(descriptor)


def test_source_of_input_waits_while_the_guest_takes_none() -> None:
    console = MemoryConsole()
    console.feed(b"x" * (64 << 10))
    fed = threading.Event()

    def feed() -> None:
        console.feed(b"more")
        fed.set()

    threading.Thread(target=feed, daemon=True).start()
    assert not fed.wait(0.05)
    console.take(1000)
    assert fed.wait(20)
    console.close()
    console.feed(b"after the end")


def test_a_pseudo_terminal_serves_one_program_after_the_other() -> None:
    with closing(PtyConsole()) as console:
        for turn in (b"first", b"second"):
            terminal = os.open(console.filename.removeprefix("pty:"), os.O_RDWR | os.O_NOCTTY)
            try:
                console.write(turn + b"\r\n")
                shown = b""
                while not shown.endswith(b"\n"):
                    shown += os.read(terminal, 64)
                # Raw: nothing is added, and nothing comes back.
                assert shown == turn + b"\r\n"
                typed = threading.Event()
                console.on_input = typed.set
                os.write(terminal, turn + b"\r\x03")
                assert typed.wait(30)
                assert console.take(64) == turn + b"\r\x03"
            finally:
                os.close(terminal)


def test_last_words_of_a_guest_are_written_though_the_console_is_closed() -> None:
    (typed, keyboard), (said, out) = os.pipe(), os.pipe()
    words = bytes(range(256)) * 200
    console = StdioConsole((typed, out))
    console.write(words)
    console.close()
    for end in (typed, keyboard, out):
        os.close(end)
    with open(said, "rb") as file:
        assert file.read() == words
