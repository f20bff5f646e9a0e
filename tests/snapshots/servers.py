"""One driver for two servers: stillframe's monitor and a real QEMU's, with nodes opened by the same
commands."""

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from monitor.harness import Client, Lines, qemu, served
from peers import peer
from stillframe.machine.machine import Machine
from stillframe.monitor.host import Host

SERVERS = ("stillframe", "qemu host", "qemu 10.0")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a job went: every event until it had concluded, job states by their name, and its error."""

    events: tuple[str, ...]
    error: str | None


class Server:
    """A negotiated monitor, and which server it is. :ivar host: of one of ours, what is behind the monitor."""

    def __init__(self, kind: str, lines: Lines, host: Host | None = None) -> None:
        self.kind = kind
        self.lines = lines
        self.host = host
        self._unanswered = 0

    @property
    def is_ours(self) -> bool:
        return self.kind == "stillframe"

    def ask(self, command: str, **arguments: Any) -> Any:
        """What a command returns; an error is not expected."""
        answer = self.lines.execute(command, **arguments)
        assert not (isinstance(answer, dict) and "class" in answer), answer
        return answer

    def send(self, command: str, **arguments: Any) -> None:
        """Ask without waiting for the answer; the next `until` takes it."""
        self.lines.send({"execute": command, "arguments": _members(arguments)})
        self._unanswered += 1

    def until(self, job: str, state: str) -> list[str]:
        """All events until the job has got to a state and everything sent is answered, as "job state" or by
        name."""
        names: list[str] = []
        while self._unanswered or f"{job} {state}" not in names:
            names += self._next()
        return names

    def until_event(self, name: str) -> list[str]:
        """All events up to this one, as above; what was sent may still be unanswered."""
        names: list[str] = []
        while name not in names:
            names += self._next()
        return names

    def _next(self) -> list[str]:
        found = self.lines.message()
        assert "error" not in found, found
        self._unanswered -= "return" in found
        if found.get("event") == "JOB_STATUS_CHANGE":
            return [f"{found['data']['id']} {found['data']['status']}"]
        return [found["event"]] if "event" in found else []

    def job(self, command: str, **arguments: Any) -> Outcome:
        """Run a job to its end, and dismiss it."""
        self.send(command, job_id="job", **arguments)
        events = tuple(name.removeprefix("job ") for name in self.until("job", "concluded"))
        job = self.ask("query-jobs")[0]
        assert (job["id"], job["type"], job["status"]) == ("job", command, "concluded")
        self.ask("job-dismiss", id="job")
        return Outcome(events, job.get("error"))

    def save(
        self, tag: str = "snap0", vmstate: str = "diskfmt0", devices: Sequence[str] = ("diskfmt0",)
    ) -> Outcome:
        return self.job("snapshot-save", tag=tag, vmstate=vmstate, devices=list(devices))

    def load(
        self, tag: str = "snap0", vmstate: str = "diskfmt0", devices: Sequence[str] = ("diskfmt0",)
    ) -> Outcome:
        return self.job("snapshot-load", tag=tag, vmstate=vmstate, devices=list(devices))

    def delete(self, tag: str = "snap0", devices: Sequence[str] = ("diskfmt0",)) -> Outcome:
        return self.job("snapshot-delete", tag=tag, devices=list(devices))

    def add(self, number: int, path: Path, driver: str = "qcow2", **options: Any) -> None:
        """The nodes diskN, of the file, and diskfmtN, of the format."""
        self.ask("blockdev-add", driver="file", node_name=f"disk{number}", filename=str(path), **options)
        self.ask("blockdev-add", driver=driver, node_name=f"diskfmt{number}", file=f"disk{number}", **options)

    def tags(self, number: int = 0) -> list[tuple[str, str]]:
        """Ids and names of the snapshots of diskfmtN."""
        for node in self.ask("query-named-block-nodes", flat=True):
            if node["node-name"] == f"diskfmt{number}":
                return [(each["id"], each["name"]) for each in node["image"].get("snapshots", ())]
        raise AssertionError("no such node")

    def status(self) -> str:
        return str(self.ask("query-status")["status"])


def _members(arguments: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in arguments.items()}


@contextmanager
def server(
    kind: str,
    folder: Path,
    *,
    running: bool = True,
    equip: Callable[[Machine], None] = lambda machine: None,
    arguments: Sequence[str] = (),
) -> Iterator[Server]:
    """A machine without a processor.

    :param kind: of `SERVERS`. :param equip: does something to the machine of ours. :param arguments: more for
        QEMU.
    """
    with ExitStack() as stack:
        host = None
        if kind == "stillframe":
            behind, address = stack.enter_context(served(folder / "qmp.sock", running=running))
            host = behind.host
            equip(host.machine)
            lines: Lines = stack.enter_context(Client(address))
        else:
            program = peer("qemu-system-x86_64", kind.removeprefix("qemu "))
            paused = () if running else ("-S",)
            lines = stack.enter_context(qemu(program, *paused, *arguments))
        yield Server(kind, lines.negotiate(), host)


def qemu_img(*arguments: str | Path) -> str:
    """What qemu-img prints; it has to succeed."""
    run = subprocess.run(
        [peer("qemu-img"), *map(str, arguments)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def qemu_io(path: Path, *commands: str) -> str:
    """What qemu-io prints; `read -P` fails it if the pattern differs."""
    words = [word for command in commands for word in ("-c", command)]
    run = subprocess.run(
        [peer("qemu-io"), "-f", "qcow2", *words, str(path)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "Pattern verification failed" not in run.stdout, run.stdout
    return run.stdout
