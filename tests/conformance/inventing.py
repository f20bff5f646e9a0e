"""Dialogues that nobody recorded: made up from a seed and held with a real QEMU, which makes recordings of them.

What is said follows from what QEMU has by then: its nodes, their snapshots, its jobs. Where a deliberate difference would leave the
two with different snapshots, it is not said; such differences have tests of their own.
"""

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conformance.dialogues import Dialogue, Step
from conformance.replay import PATIENCE, Partner, make_images

_ALWAYS = [
    *(
        "-machine",
        "virt",
        "-m",
        "16",
        "-S",
        "-bios",
        "none",
        "-nodefaults",
        "-display",
        "none",
        "-qmp",
        "stdio",
    ),
    *("-blockdev", "file,filename=IMG/i0.qcow2,node-name=p0", "-blockdev", "qcow2,file=p0,node-name=fmt0"),
]
LAYOUTS = (
    [*_ALWAYS, "-blockdev", "qcow2,file.driver=file,file.filename=IMG/i1.qcow2,node-name=fmt1"],
    [
        *_ALWAYS,
        *(
            "-drive",
            "if=none,id=d1,file=IMG/i1.qcow2,format=qcow2,node-name=fmt1",
            "-drive",
            "if=none,id=cd0",
        ),
        *("-device", "virtio-blk-device,drive=d1,id=v1"),
    ],
)
"""Command lines: nodes alone; drives, one of them empty, and a device."""
ADDED: list[dict[str, Any]] = [
    {"driver": "qcow2", "node-name": "fmt2", "file": {"driver": "file", "filename": "IMG/i2.qcow2"}},
    {
        "driver": "qcow2",
        "node-name": "old",
        "read-only": True,
        "file": {"driver": "file", "filename": "IMG/e3.qcow2"},
    },
    {"driver": "null-co", "node-name": "n0", "size": 1 << 20, "read-zeroes": True},
    {"driver": "raw", "node-name": "over", "file": "n0"},
    {"driver": "raw", "node-name": "view", "file": "fmt1", "offset": 512},
    {"driver": "file", "node-name": "p0", "filename": "IMG/i0.qcow2"},
    {"driver": "qcow2", "node-name": "twice", "file": "p0"},
    {"driver": "qcow2", "node-name": "bad", "file": {"driver": "file", "filename": "IMG"}},
]
TAGS = ("a", "b", "before upgrade", "\u00fc", "")
MALFORMED = (
    *(
        "[]",
        "5",
        "foo",
        "@",
        "}",
        "[1,]",
        "{}",
        '{"execute": }',
        '{"execute" "x"}',
        '{"a":NaN}',
        "01",
        "{1:2}",
    ),
    *('{"execute":"query-name","id":1.50,"id":2}', "{'execute':'query-name','id':'it\\'s'}", '"\\ud800"'),
    *(
        '{"execute":"query-name"}{"execute":"nosuch","id":[1e3,-0.0,18446744073709551616]}',
        '{"exec-oob":"x"}',
    ),
)
HUMAN = (
    *(
        "info snapshots",
        "info snapshots",
        "info status",
        "info block",
        "info block -n",
        "info block -v fmt1",
        "info block cd0",
        "info uuid",
    ),
    *(
        "info block-jobs",
        "info replay",
        "info name",
        "info nosuch",
        "savevm a b",
        "loadvm",
        "delvm",
        "stop",
        "cont",
        "nosuch",
    ),
    *(
        "help loadvm",
        'savevm "a',
        "snapshot_blkdev_internal",
        "snapshot_delete_blkdev_internal fmt0 nope",
        "",
    ),
)
QUERIES = (
    *(
        "query-jobs",
        "query-status",
        "query-named-block-nodes",
        "query-block",
        "query-block-jobs",
        "query-replay",
    ),
    *(
        "query-name",
        "query-uuid",
        "query-version",
        "query-yank",
        "query-block-exports",
        "stop",
        "cont",
        "nosuch",
    ),
)
RESTING = ("concluded", "null", "pending")
_AUTOMATIC = re.compile(r"#block\d+")


class Recorder(Partner):
    """A real QEMU; what it answers becomes a recording.

    :ivar told: names that it made up and has told in a list, from which the other side's are known.
    """

    noisy = True
    told: set[str]
    over = False

    def message(self, patience: float = PATIENCE) -> Any | None:
        """As there; remembers the end."""
        message = super().message(patience)
        self.over |= message is None
        return message

    def greeting(self) -> Step:
        """What comes before anything is said."""
        return Step([], [self.message()])

    def last(self, line: str) -> Step:
        """Say what ends the process."""
        step = Step([line])
        self.send(line)
        while (message := self.message()) is not None:
            step.came.append(message)
        return step

    def record(self, line: str) -> Step | None:
        """Say a line; everything that comes of it, to the end of its jobs. None if QEMU breaks down over it."""
        step = Step([line])
        self.send(line)
        step.came += self._until_mark()
        while any(state not in RESTING for state in self._jobs.values()) and not self.over:
            step.came.append(self.message())
        step.came += self._until_mark()
        self.told |= set(_AUTOMATIC.findall(json.dumps(step.came)) if "named-block-nodes" in line else ())
        return None if self.over else step

    def ask(self, command: str) -> Any:
        """What a command returns; no part of the dialogue."""
        self.send(json.dumps({"execute": command}))
        return next(message["return"] for message in self._until_mark() if "return" in message)

    @property
    def jobs(self) -> dict[str, str]:
        """Those that are there, and their states."""
        return {job: state for job, state in self._jobs.items() if state != "null"}


class Inventor:
    """Makes up what to say next. :param chance: decides. :param has_drives: some nodes are drives, or a device's."""

    def __init__(self, chance: random.Random, qemu: Recorder, *, has_drives: bool) -> None:
        self._chance = chance
        self._qemu = qemu
        self._jobs = 0
        self._files = 0
        self._choices: dict[Callable[[], str | None], int] = {
            self._save: 5,
            self._load: 4,
            self._delete: 3,
            self._verb: 5,
            self._query: 4,
            self._human: 4,
            self._human_snapshot: 4,
            self._node: 4,
            self._internal: 3,
            self._transaction: 2,
            self._backup: 1,
            self._create: 1,
            self._malformed: 1,
        }
        self._backups = [("fmt0", "fmt2"), ("fmt0", "nope"), ("n0", "n0")]
        if has_drives:
            # savevm-takes-every-node
            del self._choices[self._human_snapshot]
        else:
            # backups-have-no-filter: a device's node is refused in other words
            self._backups.append(("fmt0", "fmt1"))
        self._lines = [
            line for line in HUMAN if not (has_drives and line.startswith(("info snap", "savevm")))
        ]
        self._while_pending = (self._verb, self._query_jobs, self._malformed)

    def line(self) -> str:
        """The next line."""
        listed = self._qemu.ask("query-named-block-nodes")
        self._tables = {
            node["node-name"]: {each["name"] for each in node["image"].get("snapshots", ())}
            for node in listed
        }
        choices = self._choices
        if "pending" in self._qemu.jobs.values():
            # backup-gives-its-nodes-back, backups-have-no-filter
            choices = dict.fromkeys(self._while_pending, 1)
        while True:
            (choice,) = self._chance.choices(list(choices), list(choices.values()))
            line = choice()
            if line is not None:
                return line

    # Snapshots

    def _some_nodes(self) -> list[str]:
        likely = ["fmt0", "fmt1", *({"fmt2"} & self._tables.keys())]
        if self._chance.random() < 0.2:
            likely = [*sorted(name for name in self._tables if not name.startswith("#")), "nope"]
        chosen = self._chance.sample(likely, self._chance.randint(1, min(3, len(likely))))
        # no-node-twice
        return [name for name in chosen if name != "view" or "fmt1" not in chosen]

    def _tag(self) -> str:
        return self._chance.choice(TAGS)

    def _job(self) -> str:
        if self._qemu.jobs and self._chance.random() < 0.1:
            return self._chance.choice(sorted(self._qemu.jobs))
        self._jobs += 1
        return f"j{self._jobs}" if self._chance.random() < 0.95 else f"{self._jobs}j"

    def _save(self) -> str | None:
        nodes, tag = self._some_nodes(), self._tag()
        has_it = [name for name in nodes if tag in self._tables.get(name, ())]
        if 0 < len(has_it) < len(nodes):
            # tag-on-any-node
            return None
        return self._job_line("snapshot-save", {"tag": tag, "vmstate": self._state(nodes), "devices": nodes})

    def _load(self) -> str | None:
        nodes = self._some_nodes()
        common = set.intersection(*(self._tables.get(name, set()) for name in nodes))
        tag = self._chance.choice(sorted(common)) if common and self._chance.random() < 0.8 else self._tag()
        return self._job_line("snapshot-load", {"tag": tag, "vmstate": self._state(nodes), "devices": nodes})

    def _delete(self) -> str | None:
        return self._job_line("snapshot-delete", {"tag": self._tag(), "devices": self._some_nodes()})

    def _state(self, nodes: list[str]) -> str:
        return self._chance.choice(nodes) if self._chance.random() < 0.9 else "fmt0"

    def _job_line(self, command: str, arguments: dict[str, Any]) -> str:
        return self._request(command, {"job-id": self._job(), **arguments})

    def _human_snapshot(self) -> str | None:
        tag = self._tag() or "word"
        command = self._chance.choice(["savevm", "loadvm", "delvm"])
        if command == "savevm" and any(tag in table for table in self._tables.values()):
            # savevm-replaces-last
            return None
        return self._human_line(f'{command} "{tag}"' if " " in tag else f"{command} {tag}")

    def _internal(self) -> str | None:
        node, tag = self._chance.choice([*self._some_nodes(), "d1", "cd0"]), self._tag()
        if self._chance.random() < 0.6:
            return self._request("blockdev-snapshot-internal-sync", {"device": node, "name": tag})
        which = self._chance.choice([{"name": tag}, {"id": "1"}, {"id": "2", "name": tag}, {}])
        return self._request("blockdev-snapshot-delete-internal-sync", {"device": node, **which})

    def _transaction(self) -> str | None:
        kind = "blockdev-snapshot-internal-sync"
        actions: list[Any] = [
            {"type": kind, "data": {"device": node, "name": self._tag()}} for node in self._some_nodes()
        ]
        if self._chance.random() < 0.3:
            actions.append({"type": "abort", "data": {}})
        more = {"properties": {"completion-mode": "grouped"}} if self._chance.random() < 0.2 else {}
        return self._request("transaction", {"actions": actions, **more})

    # The rest

    def _verb(self) -> str | None:
        verb = self._chance.choice(["dismiss"] * 4 + ["pause", "resume", "cancel", "complete", "finalize"])
        jobs = sorted(self._qemu.jobs)
        job = self._chance.choice(jobs) if jobs and self._chance.random() < 0.9 else "nope"
        if self._chance.random() < 0.2:
            member = "id" if verb in ("dismiss", "finalize") else "device"
            return self._request(f"block-job-{verb}", {member: job})
        if "pending" in self._qemu.jobs.values() and self._chance.random() < 0.5:
            verb = self._chance.choice(["finalize", "cancel"])
        return self._request(f"job-{verb}", {"id": job})

    def _query(self) -> str | None:
        return self._request(self._chance.choice(QUERIES), {})

    def _query_jobs(self) -> str | None:
        return self._request(self._chance.choice(["query-jobs", "query-block-jobs"]), {})

    def _human(self) -> str | None:
        return self._human_line(self._chance.choice(self._lines))

    def _node(self) -> str | None:
        if self._chance.random() < 0.5:
            return self._request("blockdev-add", dict(self._chance.choice(ADDED)), spoilt=0.1)
        known = self._qemu.told | {name for name in self._tables if not name.startswith("#")}
        names = [*sorted(known), "nope", "d1"]
        return self._request("blockdev-del", {"node-name": self._chance.choice(names)})

    def _backup(self) -> str | None:
        source, target = self._chance.choice(self._backups)
        more = {"auto-finalize": False} if self._chance.random() < 0.5 else {}
        return self._job_line("blockdev-backup", {"device": source, "target": target, "sync": "full", **more})

    def _create(self) -> str | None:
        self._files += 1
        options = self._chance.choice(
            [
                {"driver": "file", "filename": f"made{self._files}", "size": 65536},
                {"driver": "file", "filename": "nowhere/new", "size": 65536},
                {"driver": "qcow2", "file": "nope", "size": 65536},
            ]
        )
        return self._request("blockdev-create", {"job-id": self._job(), "options": options}, spoilt=0)

    def _malformed(self) -> str | None:
        return self._chance.choice(MALFORMED)

    def _human_line(self, line: str) -> str:
        return self._request("human-monitor-command", {"command-line": line}, spoilt=0)

    def _request(self, command: str, arguments: dict[str, Any], spoilt: float = 0.15) -> str:
        if self._chance.random() < spoilt:
            arguments = self._spoil(dict(arguments))
        request: dict[str, Any] = {"execute": command}
        if arguments or self._chance.random() < 0.1:
            request["arguments"] = arguments
        if self._chance.random() < 0.1:
            request["id"] = self._chance.choice([1, "x", None, 2.5, {"a": []}])
        return json.dumps(request)

    def _spoil(self, arguments: dict[str, Any]) -> dict[str, Any]:
        kind = self._chance.randrange(3)
        if kind == 0 or not arguments:
            return {**arguments, "bogus": 1}
        name = self._chance.choice(sorted(arguments))
        if kind == 1:
            del arguments[name]
        else:
            arguments[name] = self._chance.choice([5, None, [], {}, True, 1.5, [5], "nope"])
        return arguments


def invented(seed: int, length: int, program: str, folder: Path) -> Dialogue:
    """A dialogue of so many lines, recorded with `program` in an empty folder; shorter where that breaks down over a line."""
    chance = random.Random(seed)
    words = chance.choice(LAYOUTS)
    dialogue = Dialogue(f"invented {seed}", words, [Step(["IMG/i2.qcow2 IMG/e3.qcow2"])])
    make_images(dialogue, folder)
    dialogue.steps = []
    qemu = Recorder(dialogue, folder, [program, *words])
    qemu.told = set()
    try:
        dialogue.steps = [qemu.greeting()]
        step = qemu.record('{"execute": "qmp_capabilities"}')
        inventor = Inventor(chance, qemu, has_drives=words is not LAYOUTS[0])
        if step is not None and chance.random() < 0.5:
            dialogue.steps.append(step)
            step = qemu.record('{"execute": "cont"}')
        while step is not None and len(dialogue.steps) < length:
            dialogue.steps.append(step)
            step = qemu.record(inventor.line())
        if step is not None:
            dialogue.steps.append(step)
            last = qemu.last('{"execute": "quit"}')
            status, stderr = qemu.end()
        if step is not None and status == 0:
            dialogue.steps.append(last)
            dialogue.status = status
            dialogue.stderr = [line.replace("qemu-system-riscv64", "qemu-system-x86_64") for line in stderr]
    finally:
        qemu.process.kill()
        qemu.process.wait()
    return dialogue
