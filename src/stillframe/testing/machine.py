"""A machine's process, spoken with over QMP on its standard input and output."""

import json
import os
import select
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from typing import Any, Self

from stillframe.testing.matching import matches
from stillframe.testing.transcript import Transcript


class NoAnswer(AssertionError):
    """What was waited for did not come: the message says what came instead."""


class Machine:
    """`with Machine(program, *words) as machine:`; killed at the end of the block if it has not ended itself.

    :param program: what to run, as `["stillframe-qemu"]` or `["qemu-system-x86_64"]`.
    :param words: further options; `-qmp stdio`, `-nodefaults` and `-display none` are there.
    :param captured: events that are kept until they are asked for; others are dropped.
    :param patience: seconds to wait for anything.
    :ivar patience: may be changed. :ivar transcript: what was said so far.
    """

    def __init__(
        self,
        program: Sequence[str],
        *words: str,
        captured: Sequence[str] = ("JOB_STATUS_CHANGE", "STOP", "RESUME"),
        patience: float = 60.0,
    ) -> None:
        self._captured = frozenset(captured)
        self.patience = patience
        self._events: deque[dict[str, Any]] = deque()
        self._buffer = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the machine)
        self.transcript = Transcript()
        self._process = subprocess.Popen(
            [*program, "-nodefaults", "-display", "none", *words, "-qmp", "stdio"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )
        try:
            self.greeting: dict[str, Any] = self._until("QMP")["QMP"]
            self._ask({"execute": "qmp_capabilities"})
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process, if it still runs."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()

    @property
    def stderr(self) -> str:
        """Everything on standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode(errors="replace")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Give a command; what it returns, or its error object. `_` in names of arguments is `-`.

        Events that come meanwhile are kept, as from before the reply and after it.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        request = {"execute": command, **({"arguments": named} if named else {})}
        reply = self._ask(request)
        answer = reply["return"] if "return" in reply else reply["error"]
        self.transcript.command(request, answer)
        return answer

    def event(self, name: str, **data: Any) -> dict[str, Any]:
        """Wait for an event, whose data has at least these members; the first such is taken, others keep their order.

        :raise NoAnswer: it did not come.
        """
        wanted = {"event": name, **({"data": data} if data else {})}
        seen = 0
        while True:
            for event in list(self._events)[seen:]:
                if matches(event, wanted):
                    self._events.remove(event)
                    self.transcript.event(event)
                    return event
            seen = len(self._events)
            self._keep(self._message(f"the event {wanted}"))

    def events(self, *names: str) -> None:
        """Wait for events that come one after the other, and no others of those captured between them.

        :param names: of events, or of a job's states.
        :raise NoAnswer: another came.
        """
        for name in names:
            while not self._events:
                self._keep(self._message(f"the event {name}"))
            event = self._events.popleft()
            found = event.get("data", {}).get("status", event["event"])
            self.transcript.event(event)
            if found != name:
                raise NoAnswer(f"{name} was to come, and {found} came: {event}")

    def job(self, command: str, *states: str, job_id: str = "job", **arguments: Any) -> str | None:
        """Run a job to its end, and dismiss it.

        :param states: every event between "running" and "concluded" that is to come, as of `events`.
        :return: its error; None if it did its work.
        """
        self.execute(command, job_id=job_id, **arguments)
        self.events("created", "running", *states, "concluded")
        error: str | None
        (error,) = (each.get("error") for each in self.execute("query-jobs") if each["id"] == job_id)
        self.execute("job-dismiss", id=job_id)
        self.events("null")
        return error

    def quit(self) -> int:
        """End the machine; its exit status."""
        self._ask({"execute": "quit"})
        return self._process.wait(self.patience)

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._process.stdin is None:
            raise NoAnswer("the machine has no standard input")
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        return self._until("return", "error")

    def _until(self, *members: str) -> dict[str, Any]:
        while True:
            message = self._message(" or ".join(members))
            if any(member in message for member in members):
                return message
            self._keep(message)

    def _keep(self, message: dict[str, Any]) -> None:
        if message.get("event") in self._captured:
            self._events.append(message)

    def _message(self, what: str) -> dict[str, Any]:
        """The next message; lines that are none, as QEMU prints some, are skipped."""
        deadline = time.monotonic() + self.patience
        while True:
            line, end, rest = self._buffer.partition(b"\n")
            if end:
                self._buffer = rest
                if line.startswith(b"{"):
                    message: dict[str, Any] = json.loads(line)
                    return message
                continue
            self._read(deadline, what)

    def _read(self, deadline: float, what: str) -> None:
        if self._process.stdout is None:
            raise NoAnswer("the machine has no standard output")
        descriptor = self._process.stdout.fileno()
        if not select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise NoAnswer(f"{what} did not come in {self.patience:g} s; kept are {list(self._events)}")
        data = os.read(descriptor, 1 << 16)
        if not data:
            raise NoAnswer(f"{what} did not come: the machine has ended, and said: {self.stderr}")
        self._buffer += data
