"""The recorded dialogues: what was started, what was said, and what came.

A recording is a file of lines, each a JSON object with `dir`: "launch" begins a dialogue; "in" is a line that was sent, "out" one
that came; "stderr", "eof" and "exit" are the end. Lines that were sent with nothing in between were sent together.
"""

import json
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

TRANSCRIPTS = Path(__file__).resolve().parent.parent / "data" / "transcripts"
NAMES = (
    "block",
    "edge",
    "hmp",
    "iotest-internal-snapshots-qapi",
    "jobs",
    "jobs-verbs",
    "order-socket",
    "proto",
    "proto-oob",
    "replay",
    "vmstate-stream",
)


@dataclass
class Step:
    """Lines that were sent together, and the messages that came before the next."""

    sent: list[str]
    came: list[Any] = field(default_factory=list)


@dataclass
class Dialogue:
    """One launch. :ivar name: the file's, and a number. :ivar stderr: its lines. :ivar status: how the process ended."""

    name: str
    words: list[str]
    steps: list[Step] = field(default_factory=list)
    stderr: list[str] = field(default_factory=list)
    status: int | None = None

    def commands(self) -> set[str]:
        """The commands that were given and done; one that was only ever refused is not needed."""
        found = set()
        for step in self.steps:
            if any("return" in message for message in step.came):
                found |= {name for line in step.sent if (name := command_of(line)) is not None}
        return found


ORDER_SOCKET = [
    *("-nodefaults", "-nographic", "-machine", "pc,accel=tcg"),
    *("-blockdev", "{'driver':'file','filename':'IMG/o0.qcow2','node-name':'p0'}"),
    *("-blockdev", "{'driver':'qcow2','file':'p0','node-name':'fmt0'}"),
    *("-qmp", "stdio"),
]
"""That recording does not say how its QEMU was started: a socket, and one image."""


def command_of(line: str) -> str | None:
    """The command of a line that is one request."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    name = message.get("execute", message.get("exec-oob")) if isinstance(message, dict) else None
    return name if isinstance(name, str) else None


def dialogues(name: str) -> list[Dialogue]:
    """All dialogues of a recording, in order."""
    found: list[Dialogue] = []
    if name == "order-socket":
        found.append(Dialogue("order-socket 1", ORDER_SOCKET, [Step([])]))
    for record in map(json.loads, (TRANSCRIPTS / f"{name}-q10.jsonl").read_text().splitlines()):
        kind = record["dir"]
        if kind == "launch":
            found.append(Dialogue(f"{name} {len(found) + 1}", record["argv"][1:], [Step([])]))
        elif kind == "in":
            if found[-1].steps[-1].came:
                found[-1].steps.append(Step([]))
            found[-1].steps[-1].sent.append(record["line"])
        elif kind == "out" and record["line"].strip():
            message = json.loads(record["line"])
            if "QMP" in message and found[-1].steps[-1].came:
                # The next connection, to another process.
                found.append(Dialogue(f"{name} {len(found) + 1}", found[-1].words, [Step([])]))
            found[-1].steps[-1].came.append(message)
        elif kind == "stderr" and found:
            found[-1].stderr.append(record["line"])
        elif kind == "exit":
            found[-1].status = record["rc"]
    for dialogue in found:
        _conclude(dialogue.steps)
        if dialogue.steps[-1].sent and command_of(dialogue.steps[-1].sent[-1]) == "quit":
            dialogue.status = dialogue.status or 0
    return found


def _conclude(steps: list[Step]) -> None:
    """What a job did after its command's reply belongs to that command, also where the next line was sent before."""
    for step, after in pairwise(steps):
        states = {
            m["data"]["id"]: m["data"]["status"] for m in step.came if m.get("event") == "JOB_STATUS_CHANGE"
        }
        under_way = {
            job for job, state in states.items() if state in ("created", "running", "waiting", "aborting")
        }
        asked = " ".join(after.sent)
        if under_way and '"quit"' not in asked and not any(f'"{job}"' in asked for job in under_way):
            step.came += [message for message in after.came if "event" in message]
            after.came = [message for message in after.came if "event" not in message]
