"""Arguments against their declaration: what is refused, in which order, in which words; and the reference
made of it.
"""

import ast
import json
import random
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
from msgspec import UNSET, UnsetType

from monitor.harness import Client, Lines
from stillframe.errors import InvalidRequest
from stillframe.monitor import schema
from stillframe.monitor.introspect import reference
from stillframe.monitor.schema import Structure, UInt8, UInt64, shape_of
from stillframe.monitor.visitor import check_arguments

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"

# Each is asked of a real QEMU and of us. None of them passes the check, or has anything to act on.
REQUESTS: list[tuple[str, Any]] = [
    ("snapshot-save", {}),
    ("snapshot-save", {"job-id": 1}),
    ("snapshot-save", {"job-id": None, "bogus": 1}),
    ("snapshot-save", {"job-id": "j", "tag": "t", "vmstate": "v", "devices": "x"}),
    ("snapshot-save", {"job-id": "j", "tag": "t", "vmstate": "v", "devices": ["a", None]}),
    ("snapshot-save", {"job-id": "j", "tag": "t", "vmstate": "v", "devices": ["a"], "bogus": 1}),
    ("snapshot-save", {"job-id": "j", "tag": True, "devices": 5}),
    ("snapshot-load", {"job-id": "j", "tag": "t", "devices": ["a"]}),
    ("snapshot-delete", {"job-id": "1a", "tag": "t", "devices": ["a"]}),
    ("snapshot-delete", {"job-id": "j", "tag": "t", "vmstate": "v", "devices": ["a"]}),
    ("job-dismiss", {}),
    ("job-dismiss", {"id": "nope"}),
    ("job-pause", {"id": "nope", "x": 1}),
    ("job-resume", {"id": "nope"}),
    ("job-cancel", {"id": "nope"}),
    ("job-complete", {"id": "nope"}),
    ("job-finalize", {"id": "nope"}),
    ("query-jobs", {"a": 1}),
    ("human-monitor-command", {"command-line": 5}),
    ("human-monitor-command", {"command-line": "", "cpu-index": 1.5}),
    ("human-monitor-command", {"command-line": "", "cpu-index": "0"}),
    ("human-monitor-command", {"command-line": "", "cpu-index": 1 << 63}),
    ("qmp_capabilities", {"enable": 1}),
    ("qmp_capabilities", {"enable": ["nosuch"]}),
    ("qmp_capabilities", {"enable": [["oob"]]}),
    ("qmp_capabilities", {}),
    ("query-named-block-nodes", {"flat": "yes"}),
    ("blockdev-add", {}),
    ("blockdev-add", {"driver": "nosuch"}),
    ("blockdev-add", {"driver": 5}),
    ("blockdev-add", {"driver": "file"}),
    ("blockdev-add", {"driver": "file", "filename": 5}),
    ("blockdev-add", {"driver": "file", "filename": "/x"}),
    ("blockdev-add", {"driver": "file", "filename": "/nowhere/x", "node-name": "n"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "1a"}),
    ("blockdev-add", {"driver": "null-co", "node-name": "x" * 32}),
    ("blockdev-add", {"driver": "null-co", "node-name": "n", "bogus": 1}),
    ("blockdev-add", {"driver": "raw", "node-name": "n", "file": "nope"}),
    ("blockdev-add", {"driver": "raw", "node-name": "n", "file": {"driver": "nosuch"}}),
    ("blockdev-add", {"driver": "raw", "node-name": "n", "file": {}}),
    ("blockdev-add", {"driver": "qcow2", "node-name": "n"}),
    ("blockdev-del", {}),
    ("blockdev-del", {"node-name": "nope"}),
    ("blockdev-snapshot-internal-sync", {"device": "nope", "name": "s"}),
    ("blockdev-snapshot-internal-sync", {"name": "s"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "nope", "name": "s"}),
    ("blockdev-snapshot-delete-internal-sync", {"device": "nope"}),
    ("query-yank", {}),
    ("yank", {}),
    ("yank", {"instances": []}),
    ("yank", {"instances": [{"type": "migration"}]}),
    ("yank", {"instances": [{"type": "chardev", "id": "x", "more": 1}]}),
    ("yank", {"instances": [{"type": "chrdev"}]}),
    ("yank", {"instances": [{"type": "block-node"}]}),
]


def test_what_is_wrong_with_a_request_is_said_in_the_words_of_a_real_qemu(
    real: Lines, client: Client
) -> None:
    for command, arguments in REQUESTS:
        request = json.dumps({"execute": command, "arguments": arguments, "id": 1}).encode()
        assert client.answers(request) == real.answers(request), request


def test_of_several_unknown_members_the_one_that_qemu_names_is_named(real: Lines, client: Client) -> None:
    chance = random.Random(7)
    for _ in range(200):
        names = {
            "".join(chance.choices("abxyz-_é0", k=chance.randint(1, 8))) for _ in range(chance.randint(1, 6))
        }
        arguments = {**dict.fromkeys(names, 1), "id": "nope"}
        request = json.dumps({"execute": "job-pause", "arguments": arguments}).encode()
        assert client.answers(request) == real.answers(request), request


# What no command of ours uses yet


class Color(Enum):
    RED = "red"
    BLUE = "blue"


class Paint(Structure, tag_field="type", tag="paint"):
    color: Color


class Wait(Structure, tag_field="type", tag="wait"):
    seconds: float


class Actions(Structure):
    actions: list[Paint | Wait]
    level: UInt8 | UnsetType = UNSET
    size: UInt64 | UnsetType = UNSET
    note: str | UnsetType = UNSET


DECLARED = shape_of(Actions)
assert isinstance(DECLARED, schema.Object)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"actions": [{}]}, "Parameter 'actions[0].type' is missing"),
        ({"actions": [{"type": 5}]}, "Invalid parameter type for 'actions[0].type', expected: string"),
        ({"actions": [{"type": "no"}]}, "Parameter 'type' does not accept value 'no'"),
        ({"actions": [5]}, "Invalid parameter type for 'actions[0]', expected: object"),
        (
            {"actions": [{"type": "wait", "seconds": 1}, {"type": "paint"}]},
            "Parameter 'actions[1].color' is missing",
        ),
        ({"actions": [{"type": "paint", "color": "red", "x": 1}]}, "Parameter 'actions[0].x' is unexpected"),
        ({"actions": [{"type": "paint", "color": "no"}]}, "Parameter 'color' does not accept value 'no'"),
        (
            {"actions": [{"type": "wait", "seconds": True}]},
            "Invalid parameter type for 'actions[0].seconds', expected: number",
        ),
        ({"actions": [], "level": 256}, "Parameter 'level' expects uint8_t"),
        ({"actions": [], "level": -1}, "Parameter 'level' expects uint8_t"),
        ({"actions": [], "level": True}, "Invalid parameter type for 'level', expected: integer"),
        ({"actions": [], "note": None}, "Invalid parameter type for 'note', expected: string"),
    ],
)
def test_nested_members_are_named_by_their_path(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_arguments(DECLARED, given)
    assert str(caught.value) == words


def test_what_passes_the_check_has_the_declared_types() -> None:
    given = {
        "actions": [{"type": "paint", "color": "blue"}, {"type": "wait", "seconds": 2}],
        "level": 255,
        "size": -1,
    }
    made = check_arguments(DECLARED, given)
    assert made == Actions([Paint(Color.BLUE), Wait(2)], level=255, size=(1 << 64) - 1)
    assert made.note is UNSET


# Declarations


def test_a_type_that_qmp_does_not_have_is_found_at_the_declaration() -> None:
    with pytest.raises(TypeError, match="has no shape"):
        shape_of(bytes)
    with pytest.raises(TypeError, match="no tag in common"):
        shape_of(Actions | Structure)
    with pytest.raises(TypeError, match="host or session"):

        @schema.command("x-nonsense")
        def nonsense(what: int) -> None: ...


def test_every_command_event_and_member_says_what_it_is() -> None:
    for command in schema.COMMANDS.values():
        assert schema.description(command.function.__doc__), command.name
    for event in schema.EVENTS.values():
        assert schema.description(event.data.type.__doc__), event.name
        assert all(member.text for member in event.data.members), event.name


def emitted_events() -> list[tuple[str, str, set[str]]]:
    """Where an event is emitted, its name, and the members that it is given."""
    found = []
    for path in sorted((DOCS.parent / "src").rglob("*.py")):
        for item in ast.walk(ast.parse(path.read_text())):
            if (
                isinstance(item, ast.Call)
                and isinstance(item.func, ast.Attribute)
                and item.func.attr == "emit"
            ):
                (name,) = item.args
                assert isinstance(name, ast.Constant), path
                members = {keyword.arg.replace("_", "-") for keyword in item.keywords if keyword.arg}
                found.append((f"{path.name}:{item.lineno}", name.value, members))
    return found


@pytest.mark.parametrize(
    ("where", "name", "members"), emitted_events(), ids=[where for where, *_ in emitted_events()]
)
def test_every_event_that_is_emitted_is_declared_with_its_members(
    where: str, name: str, members: set[str]
) -> None:
    declared = schema.EVENTS[name].data.members
    assert members <= {member.name for member in declared}
    assert {member.name for member in declared if not member.optional} <= members


def test_every_declared_event_is_emitted_somewhere() -> None:
    assert {name for _, name, _ in emitted_events()} == set(schema.EVENTS)


def test_the_reference_says_what_is_declared() -> None:
    assert (DOCS / "commands.md").read_text() == reference(), (
        "run: python -m stillframe.monitor.introspect > docs/commands.md"
    )
