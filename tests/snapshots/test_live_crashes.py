"""Power fails, or the process dies, while a live save is on its way, is committed, or while a guest runs whose memory still comes:
older snapshots are what they were, what the guest flushed is there, and the snapshot is wholly there or not at all."""

from collections.abc import Callable
from pathlib import Path

import pytest

from peers import installed_versions, using
from qcow2.crash_states import State, states
from qcow2.images import LONG, assert_only_leaks
from qcow2.memory import MemoryNode
from qcow2.worlds import Content, MayHold, allowed
from snapshots.groups import is_barred
from snapshots.living import (
    Kind,
    Recording,
    loaded_from,
    record_load,
    record_save,
    reopened,
)
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.repair import repair

pytestmark = pytest.mark.timeout(3600 if LONG else 300)

POWER_LOSSES = 1000 if LONG else 60
SHOWN_EVERY = 60
REPAIRED_EVERY = 8
ALONE = ("state",)
KINDS = [Kind(4096), Kind(4096, names=ALONE)]
if LONG:
    KINDS += [Kind(512), Kind(65536), Kind(4096, "0.10"), Kind(65536, "0.10", ALONE)]

OPERATIONS: dict[str, Callable[[Path, Kind], Recording]] = {
    "whole save": lambda folder, kind: record_save(folder, kind, continued=False),
    "continued save": lambda folder, kind: record_save(folder, kind, continued=True),
    "cancelled save": lambda folder, kind: record_save(folder, kind, continued=True, cancel_at=5),
    "lazy load": lambda folder, kind: record_load(folder, kind, "older"),
    "lazy load of a continued state": lambda folder, kind: record_load(folder, kind, "parent"),
    "cancelled load": lambda folder, kind: record_load(folder, kind, "older", cancel_late=True),
}


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_crash_while_the_guest_runs_on_loses_nothing_that_was_promised(
    name: str, kind: Kind, tmp_path: Path
) -> None:
    found = OPERATIONS[name](tmp_path, kind)
    assert found.end != []
    seen: dict[str, int] = {}
    for number, state in enumerate(states(found.start, found.steps, power_losses=POWER_LOSSES, seed=7)):
        try:
            held = examine(state, number, tmp_path)
        except BaseException as error:
            for each, data in zip(kind.names, state.files, strict=True):
                (tmp_path / f"wrong-{each}").write_bytes(data)
            error.add_note(f"{state.model} before step {state.at} of the log; see {tmp_path}/wrong-*")
            raise
        tags = " ".join(sorted(held[-1].snapshots))
        seen[tags] = seen.get(tags, 0) + 1
    if name in ("whole save", "continued save"):
        assert seen.keys() == {"older parent", "new older parent"}
        assert min(seen.values()) > 10
    else:
        assert seen.keys() == {"older parent"}
    assert sum(seen.values()) > POWER_LOSSES
    for tag, memory in found.memory.items():
        nodes = [Qcow2Node(each, MemoryNode((tmp_path / each).read_bytes())) for each in kind.names]
        assert loaded_from(nodes, tag) == memory


def examine(state: State, number: int, folder: Path) -> list[Content]:
    """What is found after the crash is what may be found; before the recovery there are leaks at most."""
    shown = number % SHOWN_EVERY == SHOWN_EVERY // 2
    for data in state.files:
        result = check(MemoryNode(data, read_only=True))
        assert result.corruptions == 0, result.messages
        if shown and not is_barred(data):
            (folder / "shown").write_bytes(data)
            versions = installed_versions()
            with using(versions[number // SHOWN_EVERY % len(versions)]):
                assert_only_leaks(folder / "shown")
    held, files = reopened(state.files)
    may_hold: MayHold = state.may_hold  # type: ignore[assignment]
    assert allowed(may_hold, held), "no world that may be found"
    for data in files:
        result = check(MemoryNode(data, read_only=True))
        assert result.corruptions == 0, result.messages
    if number % REPAIRED_EVERY == 0:
        repaired = [MemoryNode(data) for data in files]
        for file in repaired:
            again = repair(file, "leaks")
            assert (again.leaks, again.corruptions) == (0, 0)
        assert reopened(tuple(bytes(file.data) for file in repaired))[0] == held
    return held
