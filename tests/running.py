"""Machines for tests, as a user has them: `stillframe run` in a process of its own, its monitor's socket, its console."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from stillframe.client import Client
from stillframe.errors import NotFound, PeerError
from stillframe.sockets import connected_unix_socket

Result = TypeVar("Result")

STILLFRAME = (sys.executable, "-m", "stillframe")


PATIENCE = 120.0
"""Seconds that anything may take on a host that is busy with other things."""


def connected(path: Path, process: "subprocess.Popen[Any] | None") -> socket.socket:
    """A connection to a socket of a machine that begins; its file is there a moment before anybody listens."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return connected_unix_socket(path)
        except (PeerError, NotFound):
            assert process is None or process.poll() is None, f"the machine ended with {process.returncode}"
            assert time.monotonic() < deadline, f"nobody listens at {path} after {PATIENCE} s"
            time.sleep(0.01)


def until_it_greets(path: Path, process: "subprocess.Popen[Any]") -> None:
    """Wait until a monitor's first line has come: from then on the machine is served."""
    with connected(path, process) as monitor:
        monitor.settimeout(PATIENCE)
        assert monitor.recv(1) == b"{"


def stillframe(*words: str, check: bool = False, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run the command line; standard output and error are kept apart."""
    return subprocess.run(
        [*STILLFRAME, *words],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=check,
        timeout=120,
        **options,
    )


class Console:
    """A serial console on a socket: type, and wait for what the guest says."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self.text = ""
        self._seen = 0

    def type(self, text: str) -> None:
        self._socket.sendall(text.encode())

    def until(self, pattern: str, seconds: float = 60.0) -> "re.Match[str]":
        """Wait for `pattern` in what was said after the last match."""
        deadline = time.monotonic() + seconds
        compiled = re.compile(pattern, re.MULTILINE)
        while True:
            found = compiled.search(self.text, self._seen)
            if found:
                self._seen = found.end()
                return found
            self._socket.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise AssertionError(
                    f"the guest did not say {pattern!r} in {seconds} s; it said last:\n{self.text[-1500:]}"
                ) from None
            assert data, f"the console was closed; the guest said last:\n{self.text[-1500:]}"
            self.text += data.decode("utf-8", "replace")

    def skip(self) -> None:
        """Take what was said until now as seen."""
        self._socket.settimeout(0)
        while True:
            try:
                data = self._socket.recv(65536)
            except BlockingIOError:
                break
            if not data:
                break
            self.text += data.decode("utf-8", "replace")
        self._seen = len(self.text)

    def shell(self, command: str, seconds: float = 60.0) -> str:
        """Run a command in the guest's shell and return what it printed; it has to succeed."""
        number = time.monotonic_ns()
        # The marks are typed in two halves, so that the echo of the line does not hold them.
        self.type(f"echo =BE''GIN={number}=; {command}; echo =EN''D={number}=$?=\n")
        begin = self.until(rf"=BEGIN={number}=\r?\n", seconds).end()
        found = self.until(rf"=END={number}=(\d+)=", seconds)
        output = self.text[begin : found.start()].replace("\r", "").strip("\n")
        assert found.group(1) == "0", f"{command!r} failed in the guest:\n{output}"
        return output

    def close(self) -> None:
        self._socket.close()


class RunningMachine:
    """`with RunningMachine(directory, "--memory", "64M", ...) as machine:`; ends with the block, whatever happens."""

    program: Sequence[str] = STILLFRAME

    def __init__(self, directory: Path, *words: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.qmp = directory / "qmp.sock"
        self._console_path = directory / "console.sock"
        self.log = directory / "stderr"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *self.program,
                    "run",
                    "--qmp",
                    f"unix:{self.qmp}",
                    "--console",
                    f"unix:{self._console_path}",
                    *words,
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            until_it_greets(self.qmp, self.process)
            self.console = Console(connected(self._console_path, self.process))
        except BaseException as error:
            self.kill()
            error.add_note(self.log.read_text())
            raise

    def connect_again(self, begun: Callable[[], object]) -> None:
        """To a machine that was started anew in the same process. :param begun: whether it has."""
        deadline = time.monotonic() + PATIENCE
        while not begun():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "the machine was not started anew"
            time.sleep(0.01)
        until_it_greets(self.qmp, self.process)
        self.console.close()
        self.console = Console(connected(self._console_path, self.process))

    def talk(self, conversation: Callable[[Client], Awaitable[Result]]) -> Result:
        """One conversation with the monitor."""

        async def work() -> Result:
            async with Client(f"unix:{self.qmp}") as client:
                return await conversation(client)

        return asyncio.run(work())

    def save(self, tag: str, *devices: str) -> None:
        nodes = devices or ("root",)
        self.talk(lambda client: client.save(tag, vmstate=nodes[0], devices=nodes))

    def load(self, tag: str, *devices: str) -> None:
        nodes = devices or ("root",)
        self.talk(lambda client: client.load(tag, vmstate=nodes[0], devices=nodes))

    def delete(self, tag: str, *devices: str) -> None:
        self.talk(lambda client: client.delete(tag, devices=devices or ("root",)))

    def execute(self, command: str, **arguments: Any) -> Any:
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        return self.talk(lambda client: client.execute(command, named))

    def quit(self) -> None:
        self.talk(Client.quit)
        assert self.process.wait(30) == 0, self.log.read_text()

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> "RunningMachine":
        return self

    def __exit__(self, *_: object) -> None:
        self.console.close()
        self.kill()
