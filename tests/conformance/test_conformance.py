"""Every recorded dialogue with QEMU 10.0, held with stillframe-qemu: what differs has a name, and what is left out too.

`make conformance` prints the count.
"""

import json
import subprocess
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from conformance.dialogues import NAMES, Dialogue, dialogues
from conformance.differences import DIFFERENCES
from conformance.replay import PROGRAM, make_images, replay

GOING_ON = {"block", "hmp"}
"""Recordings whose dialogues go on with the images of those before."""
SECOND_HALVES = {"iotest-internal-snapshots-qapi 10", "iotest-internal-snapshots-qapi 12"}
INCIDENTAL = {"proto 1": {"migrate-set-parameters"}, "jobs 1": {"blockdev-mirror"}}
"""Commands that we have not, on which nothing else in the dialogue depends: only that line is left out, and its job."""
OTHER_DEVICES = ("ide-cd", "blkreplay")
DOCS = Path(__file__).resolve().parents[2] / "docs"


@cache
def here() -> tuple[frozenset[str], frozenset[str]]:
    """The commands that there are here, and the capabilities offered."""
    run = subprocess.run(
        [*PROGRAM, "-machine", "none", "-qmp", "stdio"],
        input='{"execute":"qmp_capabilities"}{"execute":"query-commands"}{"execute":"quit"}',
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    greeting, _, commands, *_ = map(json.loads, run.stdout.splitlines())
    return (
        frozenset(each["name"] for each in commands["return"]),
        frozenset(greeting["QMP"]["capabilities"]),
    )


def left_out(dialogue: Dialogue) -> str | None:
    """What a dialogue needs that there is not here."""
    commands, capabilities = here()
    missing = sorted(dialogue.commands() - commands - INCIDENTAL.get(dialogue.name, set()))
    devices = [device for device in OTHER_DEVICES if any(device in word for word in dialogue.words)]
    sent = " ".join(line for step in dialogue.steps for line in step.sent)
    oob = ["oob"] if '"enable":["oob"]' in sent and "oob" not in capabilities else []
    needs = [*devices, *oob, *missing]
    return ", ".join(needs) if needs else None


@pytest.mark.parametrize("name", NAMES)
def test_a_recorded_dialogue_goes_the_same_but_for_named_differences(name: str, tmp_path: Path) -> None:
    seen: Counter[str] = Counter()
    unnamed: list[str] = []
    for number, dialogue in enumerate(dialogues(name)):
        folder = tmp_path / ("all" if name in GOING_ON else str(number - (dialogue.name in SECOND_HALVES)))
        folder.mkdir(exist_ok=True)
        reason = left_out(dialogue)
        if reason is not None:
            print(f"{dialogue.name}: left out, needs {reason}")
            continue
        make_images(dialogue, folder)
        for mismatch in replay(dialogue, folder, DIFFERENCES):
            seen.update(mismatch.names)
            if not mismatch.names:
                unnamed.append(f"{dialogue.name}: {mismatch}")
        print(f"{dialogue.name}: the same")
    print(f"{name}: {dict(seen)}")
    assert not unnamed, "\n\n".join(unnamed)[:6000]


@pytest.mark.parametrize("name", DIFFERENCES)
def test_every_difference_has_a_line(name: str) -> None:
    text = (DOCS / "differences.md").read_text() + (DOCS / "monitor.md").read_text()
    assert f"| `{name}` |" in text or f"| {name} |" in text


def every_dialogue() -> Iterator[Dialogue]:
    for name in NAMES:
        yield from dialogues(name)


def test_fewer_than_one_dialogue_in_five_is_left_out() -> None:
    reasons = {dialogue.name: left_out(dialogue) for dialogue in every_dialogue()}
    missing = {name: reason for name, reason in reasons.items() if reason}
    print(f"{len(reasons) - len(missing)} of {len(reasons)} dialogues held; left out: {missing}")
    assert 5 * len(missing) < len(reasons)
