"""A recorded dialogue held again with stillframe-qemu: what differs, and by which name it is known."""

import difflib
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conformance.dialogues import Dialogue, Step
from peers import peer

PROGRAM = (sys.executable, "-m", "stillframe.cli.drop_in")
PATIENCE = 60.0

_DEVICES = {"virtio-blk-pci": "virtio-blk-device", "virtio-rng-pci": "virtio-rng-device"}
_VARYING = {
    *("current-progress", "total-progress", "offset", "len", "actual-size", "vm-state-size", "icount"),
    *("date-sec", "date-nsec", "vm-clock-sec", "vm-clock-nsec", "seconds", "microseconds"),
}
"""Members whose values are times, sizes and progress."""

_TABLE = re.compile(r" *[\d.]+ (?:[KMG]i)?B +\d{4}-\d\d-\d\d \d\d:\d\d:\d\d +[\d:]+\.\d{3} +(?:--|\d+)")
_JSON = re.compile(r"json:(\{.*?\}) \(")
"""A node's options in the middle of a text."""
_DISK_SIZE = re.compile(r"disk size: [\d.]+ (?:[KMG]i)?B")
_DATED = re.compile(r"\bvm-\d{14}\b")
_AUTOMATIC = re.compile(r"#block\d+")
_OVER = {"concluded", "null"}
_HELD = {"running", "pending", "ready", "standby", "paused"}


def words_of(dialogue: Dialogue) -> list[str]:
    """The command line for our machine."""
    words, names = [], iter(dialogue.words)
    for word in names:
        value = None
        if word == "-blockdev":
            # A backup there has many requests under way at once, ours one.
            value = next(names).replace("latency-ns=30000000", "latency-ns=6000000")
        elif word in ("-machine", "-device"):
            value = next(names)
            kind, comma, rest = value.partition(",")
            kind = "virt" if kind == "pc" else _DEVICES.get(kind, kind)
            value = kind + comma + rest
        words += [word] if value is None else [word, value]
    return words


def plain(value: Any) -> Any:
    """A message without what varies from run to run."""
    if isinstance(value, dict):
        # What a file of the host has in bytes is a size as well.
        varying = _VARYING | ({"virtual-size"} if value.get("format") == "file" else set())
        return {
            name: 0 if name in varying and isinstance(member, int) else plain(member)
            for name, member in value.items()
        }
    if isinstance(value, list):
        return [plain(member) for member in value]
    if isinstance(value, str) and value.startswith("json:"):
        return {"json:": json.loads(value.removeprefix("json:"))}
    if isinstance(value, str):
        value = _DISK_SIZE.sub("disk size: SIZE", value)
        text = _TABLE.sub(" SIZE DATE CLOCK ICOUNT", _JSON.sub(_sorted_json, value))
        return _AUTOMATIC.sub("#block", _DATED.sub("vm-DATE", text))
    return value


def _sorted_json(found: re.Match[str]) -> str:
    return f"json:{json.dumps(json.loads(found[1]), sort_keys=True)} ("


@dataclass
class Told:
    """What came of one step: replies and events, each in their order, without what varies."""

    replies: list[Any]
    events: list[Any]

    @classmethod
    def of(cls, messages: list[Any]) -> "Told":
        messages = [plain(message) for message in messages]
        events = [{k: v for k, v in m.items() if k != "timestamp"} for m in messages if "event" in m]
        return cls([m for m in messages if "event" not in m], events)


@dataclass
class Mismatch:
    """A step that went otherwise. :ivar names: of the differences that explain it; none if it is not explained."""

    step: Step
    theirs: Told
    ours: Told
    names: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        left, right = (
            json.dumps([told.replies, told.events], indent=1, sort_keys=True).splitlines()
            for told in (self.theirs, self.ours)
        )
        lines = list(difflib.unified_diff(left, right, "QEMU", "stillframe", lineterm="", n=1))
        return "\n".join([f"sent {' '.join(self.step.sent)[:400]}", *lines])


class Partner:
    """A program at work on a dialogue. :param command: how to start it; None for stillframe-qemu with the dialogue's words."""

    noisy = False
    """Whether it prints what is no message as well."""

    def __init__(self, dialogue: Dialogue, folder: Path, command: Sequence[str] | None = None) -> None:
        self.process = subprocess.Popen(
            [*PROGRAM, *words_of(dialogue)] if command is None else command,
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
        )
        self.name = dialogue.name
        self._buffer = b""
        self._jobs: dict[str, str] = {}
        self._recorded: dict[str, str] = {}
        self._marks = 0
        self.not_saved: set[str] = set()
        """Tags of snapshots that are there, and not with us: by a difference that was named."""
        self.not_started: set[str] = set()
        """Jobs that are there, and not with us: their command is not to be had."""

    def send(self, text: str) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write(text.encode("latin-1") + b"\n")
        except BrokenPipeError:
            pass

    def message(self, patience: float = PATIENCE) -> Any | None:
        """The next one; None at the end."""
        assert self.process.stdout
        deadline = time.monotonic() + patience
        while b"\n" not in self._buffer:
            ready = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]
            assert ready, f"nothing more came in {patience} s"
            data = os.read(self.process.stdout.fileno(), 1 << 20)
            if not data:
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        if self.noisy and not line.startswith(b"{"):
            return self.message(patience)
        message = json.loads(line)
        self._jobs |= dict(_states([message]))
        return message

    def step(self, step: Step, *, ends: bool) -> list[Any]:
        """Send a step's lines; everything that comes of them."""
        for line in step.sent:
            self.send(line)
        came: list[Any] = []
        self._recorded |= dict(_states(step.came))
        replies = sum("event" not in message for message in step.came)

        def missing() -> bool:
            given = sum("event" not in message for message in came)
            return (
                given < replies
                or _pending(came) < _pending(step.came)
                or not all(_settled(state, self._recorded.get(job)) for job, state in self._jobs.items())
            )

        resumed: set[str] = set()
        while ends or missing():
            message = self.message()
            if message is None:
                return came if ends else [*came, {"ended": self.end()}]
            if message.get("id") != "resume":
                came.append(message)
            for job, state in _states([message]):
                if state == "paused" and self._recorded.get(job) in _OVER and job not in resumed:
                    # What was over there before it could be paused has to go on here.
                    resumed.add(job)
                    self.send(json.dumps({"execute": "job-resume", "arguments": {"id": job}, "id": "resume"}))
        if not step.sent or not all(_whole(line) for line in step.sent):
            return came
        return came + self._until_mark()

    def _until_mark(self) -> list[Any]:
        """What is still on its way: nothing that came of the step comes after the answer to a further request."""
        self._marks += 1
        mark = f"mark {self._marks}"
        self.send(json.dumps({"execute": "query-name", "id": mark}))
        came: list[Any] = []
        while (message := self.message()) is not None and message.get("id") != mark:
            if message.get("id") != "resume":
                came.append(message)
        return came

    def quietly(self, command: str) -> None:
        """A command outside of the dialogue."""
        self.send(json.dumps({"execute": command}))
        self._until_mark()

    def error_of(self, job: str) -> str:
        """Why a job of ours failed; "" if it did not."""
        self.send(json.dumps({"execute": "query-jobs"}))
        replies = [message["return"] for message in self._until_mark() if "return" in message]
        return next((each.get("error", "") for each in replies[-1] if each["id"] == job), "")

    def end(self) -> tuple[int, list[str]]:
        """The exit status and standard error, of a process that ends by itself."""
        assert self.process.stdin
        assert self.process.stderr
        try:
            status = self.process.wait(PATIENCE)
        finally:
            self.process.kill()
        return status, self.process.stderr.read().decode().splitlines()


def _states(messages: list[Any]) -> Iterator[tuple[str, str]]:
    """The states that jobs got to, in order."""
    for message in messages:
        if message.get("event") == "JOB_STATUS_CHANGE":
            yield message["data"]["id"], message["data"]["status"]


def _settled(state: str, recorded: str | None) -> bool:
    """Whether a job, by itself, gets no further than this; the recorded one got as far as `recorded`."""
    if state in _OVER:
        return state == "null" or recorded != "null"
    return state in _HELD and state == recorded


def _pending(messages: list[Any]) -> int:
    """The events that come after a job's last state."""
    return sum(message.get("event") == "BLOCK_JOB_PENDING" for message in messages)


def _whole(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


Explain = Callable[[Mismatch, Partner], bool]
"""Whether this difference explains the mismatch; `theirs` is brought to what it should be here."""


def replay(dialogue: Dialogue, folder: Path, differences: dict[str, Explain]) -> Iterator[Mismatch]:
    """Hold a dialogue; yields each step that went otherwise."""
    partner = Partner(dialogue, folder)
    names: dict[str, str] = {}
    try:
        for number, step in enumerate(dialogue.steps):
            ends = number + 1 == len(dialogue.steps) and dialogue.status is not None
            asked = Step([_renamed(line, names) for line in step.sent], step.came)
            came = partner.step(asked, ends=ends)
            _learn(step.came, came, names)
            found = Mismatch(asked, Told.of(step.came), Told.of(came))
            if found.theirs != found.ours:
                _explain(found, partner, differences)
                yield found
        if dialogue.status is not None or dialogue.stderr:
            status, stderr = partner.end()
            theirs = [line.replace("qemu-system-x86_64", "stillframe-qemu") for line in dialogue.stderr]
            expected = int(bool(theirs)) if dialogue.status is None else dialogue.status
            if (status, stderr) != (expected, theirs):
                end = Mismatch(
                    Step(["(the end)"]),
                    Told([{"status": dialogue.status}], theirs),
                    Told([{"status": status}], stderr),
                )
                _explain(end, partner, differences)
                yield end
    finally:
        partner.process.kill()
        partner.process.wait()


def _explain(found: Mismatch, partner: Partner, differences: dict[str, Explain]) -> None:
    for name, explain in differences.items():
        if found.theirs != found.ours and explain(found, partner):
            found.names.append(name)
    if found.theirs != found.ours:
        found.names.clear()


def _renamed(line: str, names: dict[str, str]) -> str:
    return _AUTOMATIC.sub(lambda match: names.get(match.group(), match.group()), line)


def _learn(theirs: Any, ours: Any, names: dict[str, str]) -> None:
    """Which name of ours stands where they have one that was made up, in messages of one shape."""
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for name in theirs.keys() & ours.keys():
            _learn(theirs[name], ours[name], names)
    elif isinstance(theirs, list) and isinstance(ours, list):
        for left, right in zip(theirs, ours, strict=False):
            _learn(left, right, names)
    elif all(isinstance(each, str) and _AUTOMATIC.fullmatch(each) for each in (theirs, ours)):
        names[theirs] = ours


def make_images(dialogue: Dialogue, folder: Path) -> None:
    """The images that a dialogue names and that are not there yet."""
    images = folder / "IMG"
    images.mkdir(exist_ok=True)
    text = json.dumps([dialogue.words, [step.sent for step in dialogue.steps]])
    for name in sorted(set(re.findall(r"IMG/([\w.]+)", text))):
        path = images / name
        if path.exists() or name.endswith((".bin", ".img")):
            continue
        raw = name.endswith((".raw", ".alt2"))
        version = ["-o", "compat=0.10"] if name == "e3.qcow2" else []
        kind = "raw" if raw else "qcow2"
        subprocess.run(
            [peer("qemu-img"), "create", "-q", "-f", kind, *version, str(path), "128M"], check=True
        )
