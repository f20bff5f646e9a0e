"""A recorded dialogue with QEMU 10.0, held with our monitor: the same replies, byte for byte, but for what is
named here.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from monitor.harness import Client, served
from stillframe.monitor.schema import COMMANDS, EVENTS

TRANSCRIPTS = Path(__file__).resolve().parent.parent / "data" / "transcripts"

# What the recording shows is not what was sent: its file holds text, and these were not.
NOT_TEXT = '"ÿþ"'

SKIPPED = {"proto-q10.jsonl": 11, "proto-oob-q10.jsonl": 10}


Exchange = tuple[str, list[bytes]]


def dialogues(name: str) -> Iterator[list[Exchange]]:
    """One for each launch: each line that was sent, with the lines that came before the next one."""
    dialogue: list[Exchange] = []
    for record in map(json.loads, (TRANSCRIPTS / name).read_text().splitlines()):
        if record["dir"] == "launch" and dialogue:
            yield dialogue
            dialogue = []
        if record["dir"] == "in":
            dialogue.append((record["line"], []))
        elif record["dir"] == "out" and dialogue:
            dialogue[-1][1].append((record["line"] + "\n").encode())
    yield dialogue


def exchanges(name: str) -> Iterator[Exchange]:
    """Those of all launches."""
    for dialogue in dialogues(name):
        yield from dialogue


def without_time(line: bytes) -> bytes:
    if b'"timestamp"' not in line:
        return line
    return b'{"timestamp": {}' + line[line.index(b"}") + 1 :]


def command_of(line: str) -> str | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message.get("execute") if isinstance(message, dict) else None


def unknown_here(line: str, came: list[bytes]) -> bool:
    if "migrate-" in line:
        return True
    name = command_of(line)
    return isinstance(name, str) and name not in COMMANDS and b"CommandNotFound" not in b"".join(came)


@pytest.mark.parametrize(
    ("recording", "at_least"),
    [("proto-q10.jsonl", 1100), ("proto-oob-q10.jsonl", 35)],
    ids=lambda given: str(given),
)
def test_a_dialogue_recorded_with_qemu_goes_the_same_with_us(
    recording: str, at_least: int, tmp_path: Path, record_property: Any
) -> None:
    skipped, compared = [], 0
    for number, dialogue in enumerate(dialogues(recording)):
        with served(tmp_path / f"{number}.sock") as (_, address), Client(address) as client:
            assert set(client.message()) == {"QMP"}
            for sent, came in dialogue:
                name = command_of(sent)
                if (
                    sent == NOT_TEXT
                    or unknown_here(sent, came)
                    or name in ("query-commands", "query-qmp-schema")
                ):
                    skipped.append(sent[:80])
                    continue
                client.send(sent.encode("latin-1" if sent == "ÿ" else "utf-8") + b"\n")
                for line in came:
                    expected = line
                    if name == "query-version":
                        expected = line.replace(b"Debian 1:10.0.13+ds-0+deb13u1", b"stillframe-0.1.0")
                    ours = client.line()
                    assert without_time(ours) == without_time(expected), sent[:200]
                    compared += 1
            assert client.line() == b""
    record_property("compared", compared)
    assert compared > at_least
    # Commands that we do not have, and the two whose answers must differ; nothing else may hide among them.
    assert len(skipped) == SKIPPED[recording], skipped


# The schema


def recorded_schema() -> dict[str, dict[str, Any]]:
    for sent, came in exchanges("proto-q10.jsonl"):
        if "query-qmp-schema" in sent:
            return {entry["name"]: entry for entry in json.loads(came[0])["return"]}
    raise AssertionError("the recording has no schema")


def unfolded(schema: dict[str, dict[str, Any]], name: str, depth: int = 0) -> Any:
    """A type with its members' types in the place of their numbers."""
    entry = schema[name]
    kind = entry["meta-type"]
    if kind == "builtin":
        return entry["json-type"]
    if kind == "array":
        return [unfolded(schema, entry["element-type"], depth)]
    if kind == "enum":
        return set(entry["values"])
    return {
        member["name"]: (unfolded(schema, member["type"], depth + 1), "default" in member)
        for member in entry["members"]
        if depth < 6
    }


# Members of QEMU's that have no meaning here (limits of throughput, processors), each by its command; and
# enumerations of which we know some words only.
THEIRS_ALONE = {
    "query-named-block-nodes",
    "query-block",
    "blockdev-add",
    "block-export-add",
    "query-block-exports",
    "query-jobs",
    "query-qmp-schema",
    "BLOCK_IO_ERROR",
    "query-status",
    "BLOCK_JOB_CANCELLED",
    "BLOCK_JOB_COMPLETED",
    "BLOCK_JOB_PENDING",
    "blockdev-backup",
    "blockdev-create",
    "query-block-jobs",
    "transaction",
    "migrate-set-capabilities",
    "query-command-line-options",
    "query-cpus-fast",
    "query-machines",
    "query-migrate-capabilities",
    "query-target",
}


OURS_ALONE = {
    "query-jobs": {"choices"},
    "snapshot-save": {"quiesce", "speed"},
    "snapshot-load": {"eager", "replace", "speed"},
}
"""Optional members of ours, by where they are; each is a named difference."""


@pytest.mark.parametrize("name", sorted([*COMMANDS, *EVENTS]))
def test_what_is_declared_has_the_members_and_types_of_qemu(name: str, client: Client) -> None:
    theirs = recorded_schema()
    ours = {entry["name"]: entry for entry in client.execute("query-qmp-schema")}
    if name not in theirs:
        pytest.fail(f"QEMU 10.0 has no {name}")
    for role in ("arg-type", "ret-type"):
        if role not in theirs[name]:
            continue
        mine, real = unfolded(ours, ours[name][role]), unfolded(theirs, theirs[name][role])
        members = mine[0] if isinstance(mine, list) else mine
        for added in OURS_ALONE.get(name, set()) & set(members):
            assert members.pop(added)[1], f"{added} is not optional"
        if name in THEIRS_ALONE:
            covers(real, mine, name)
        else:
            assert mine == real
    assert ours[name]["meta-type"] == theirs[name]["meta-type"]
    assert ours[name].get("features") == theirs[name].get("features")
    assert ours[name].get("allow-oob") == theirs[name].get("allow-oob")


def covers(real: Any, mine: Any, path: str) -> None:
    """Whether a client that knows QEMU's declaration understands all that ours says."""
    if isinstance(mine, dict):
        for member, (type_of, _) in mine.items():
            assert member in real, f"{path}.{member}"
            covers(real[member][0], type_of, f"{path}.{member}")
    elif isinstance(mine, list):
        covers(real[0], mine[0], path)
    elif isinstance(mine, set):
        assert mine <= real, path


def test_every_type_that_the_schema_names_is_in_it(client: Client) -> None:
    entries = client.execute("query-qmp-schema")
    names = [entry["name"] for entry in entries]
    assert len(names) == len(set(names))
    for entry in entries:
        used = [entry[role] for role in ("arg-type", "ret-type", "element-type") if role in entry]
        used += [member["type"] for member in entry.get("members", ()) if "type" in member]
        used += [case["type"] for case in entry.get("variants", ())]
        assert set(used) <= set(names), entry
    assert {entry["name"] for entry in client.execute("query-commands")} == set(COMMANDS)
