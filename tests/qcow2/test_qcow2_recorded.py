"""What qemu-img 10.0.13 said and did was recorded; the same images, and the same steps with our programs, end the same.

Where we differ on purpose the step names the difference (docs/differences.md), and the test holds what we do instead.
Cluster numbers are not compared where our tables went to other clusters than QEMU's: there the meaning is.
"""

import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.commands import in_process
from qcow2.images import DATA, assert_clean, delete, make, opened, revert, take
from stillframe.block.graph import BlockGraph
from stillframe.errors import StillframeError

TRANSCRIPTS = DATA.parent / "transcripts"
L1_AT = 3 << 16
_DATE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d")
_FIRST_WORDS = re.compile(
    r"^(stillframe: |qemu-img: |qemu-io: |Could not open '[^']*': |can't open device [^:]*: |ERROR:? |Repairing |Leaked )+"
)


@dataclass(frozen=True)
class Outcome:
    """An exit code and what was printed, in a form that two programs can share."""

    code: int
    stdout: str = ""
    said: frozenset[str] = frozenset()


@dataclass
class Replay:
    """Which steps were compared, which differ by name."""

    compared: int = 0
    differs: dict[int, str] = field(default_factory=dict)


def steps(name: str) -> Iterator[dict[str, Any]]:
    for line in (TRANSCRIPTS / f"{name}-q10.jsonl").read_text().splitlines():
        yield json.loads(line)


def outcome(code: int, stdout: str, stderr: str) -> Outcome:
    said = {_FIRST_WORDS.sub("", line).casefold() for line in stderr.splitlines()}
    return Outcome(code, _DATE.sub("DATE", stdout), frozenset(said))


def as_recorded(step: dict[str, Any]) -> Outcome:
    stdout = "" if step["dir"] == "qemu-io" else step["stdout"]
    return outcome(step["rc"], stdout, step["stderr"])


def ours(*words: str | Path) -> Outcome:
    done = in_process("image", *words)
    return outcome(done.code, done.stdout, done.stderr.replace("\n  ", "\n"))


def read_by_us(path: Path) -> Outcome:
    """What `qemu-io -c read` does: open for writing, read."""
    graph = BlockGraph()
    file = {"driver": "file", "filename": str(path)}
    try:
        node = graph.blockdev_add({"driver": "qcow2", "node-name": "node", "file": file})
        node.read(0, 65536)
    except StillframeError as error:
        return outcome(1, "", "\n".join(filter(None, [error.message, error.remedy])))
    finally:
        graph.close()
    return Outcome(0)


# Damage.


def be(length: int, value: int) -> bytes:
    return value.to_bytes(length, "big")


TABLE_AT = 10 << 16
DAMAGE: dict[str, tuple[int, bytes]] = {
    "dirty": (79, b"\1"),
    "corrupt": (79, b"\2"),
    "unkinc": (77, b"\x10"),
    "unkcompat": (85, b"\x10"),
    "unkauto": (93, b"\x10"),
    "version4": (7, b"\4"),
    "nsn_big": (60, be(4, 65537)),
    "nsn3": (60, be(4, 3)),
    "sno_mis": (64, be(8, TABLE_AT + 512)),
    "sno_huge": (64, be(8, 1 << 40)),
    "snl1_mis": (TABLE_AT, be(8, 0x70200)),
    "snl1_big": (TABLE_AT + 8, be(4, 0x7FFFFFFF)),
    "extra_big": (TABLE_AT + 36, be(4, 2000)),
    "extra_small": (TABLE_AT + 36, be(4, 8)),
    "l1_resv": (L1_AT, be(8, 0x40001)),
    "copied_wrong": (L1_AT, be(8, 0x8000000000040000)),
    "trunc_hdr": (100, be(4, 96)),
    "reforder7": (96, be(4, 7)),
    "cb8": (20, be(4, 8)),
    "cb22": (20, be(4, 22)),
}

DIFFERENT_AFTER_DAMAGE: dict[int, str] = {
    31: "repair-drops-no-snapshot",
    32: "repair-drops-no-snapshot",
    62: "repair-drops-no-snapshot",
    63: "repair-drops-no-snapshot",
    68: "repair-drops-no-snapshot",
    69: "repair-drops-no-snapshot",
    73: "repair-mends-l1-entries",
    74: "repair-mends-l1-entries",
}


def damaged(name: str) -> bytes:
    """The recorded image, with two snapshots, and what was done to it."""
    image = bytearray(gzip.decompress((DATA / "two-snapshots.qcow2.gz").read_bytes()))
    assert int.from_bytes(image[64:72], "big") == TABLE_AT
    # A date that shows up where a damaged entry is misread.
    image[TABLE_AT + 92 : TABLE_AT + 96] = be(4, 758903000)
    at, data = DAMAGE[name]
    image[at : at + len(data)] = data
    return bytes(image)


def told(seen: Outcome) -> Outcome:
    """What matters of it: where tables moved, the image ends elsewhere; causes may be told in one line or in two."""
    stdout = re.sub(r"Image end offset: \d+", "Image end offset", seen.stdout)
    said = set()
    for line in seen.said:
        line = re.sub(
            r"^(failed to read the snapshot table|could not (apply|delete) snapshot 's1'): ", "", line
        )
        line = re.sub(r" size 0x[0-9a-f]+$", "", line)
        # Errno's words, after the reason; and what to do about it.
        if not re.match(
            r"check failed: |failed to load snapshot: |run `stillframe|you can force-remove", line
        ):
            said.add(line)
    return Outcome(seen.code, stdout, frozenset(said))


def test_damage_is_met_as_recorded(tmp_path: Path) -> None:
    path = tmp_path / "image.qcow2"
    replay = Replay()
    case = ""
    for step in steps("qcow2-damage"):
        if step["dir"] == "note":
            case = step["text"]
            path.write_bytes(damaged(case))
            continue
        words = step.get("argv", ["read"])
        if words[:2] == ["snapshot", "-c"]:
            continue
        before = path.read_bytes()
        if words == ["read"]:
            seen = read_by_us(path)
        elif words[0] == "check":
            seen = ours("check", *(["--repair", words[2]] if words[1] == "-r" else []), path)
        elif words[1] == "-l":
            seen = ours("snapshot", "list", path)
        else:
            seen = ours("snapshot", {"-a": "apply", "-d": "delete"}[words[1]], path, words[2])
        where = f"{step['n']} {case} {words}"
        if step["n"] in DIFFERENT_AFTER_DAMAGE:
            replay.differs[step["n"]] = DIFFERENT_AFTER_DAMAGE[step["n"]]
            assert told(seen) != told(as_recorded(step)), where
            if DIFFERENT_AFTER_DAMAGE[step["n"]] == "repair-drops-no-snapshot":
                assert seen.code == 1
                assert path.read_bytes() == before, where
            else:
                assert seen.code == 0
            continue
        assert told(seen) == told(as_recorded(step)), where
        replay.compared += 1
        if step["rc"] == 1 or words == ["check", "IMG/" + words[-1].split("/")[-1]]:
            assert path.read_bytes() == before, where
        mark = path.read_bytes()[79]
        if case == "dirty":
            assert mark == 0
        elif case == "corrupt":
            assert mark == (0 if step["n"] >= 14 else 2)
    assert replay.differs == DIFFERENT_AFTER_DAMAGE
    assert replay.compared == 62


# Bytes.


def test_operations_leave_the_counts_and_entries_that_were_recorded(tmp_path: Path) -> None:
    """`snapshots-have-own-tables`: the refcounts of L2 tables differ, those of data do not."""
    path = make(tmp_path / "image.qcow2", 64 << 20)
    first, second, third = 5, 6, 10
    doings: dict[str, Callable[[Any], None]] = {
        "fresh": lambda node: None,
        "2 writes": lambda node: (node.write(0, b"\1" * 65536), node.write(131072, b"\2" * 65536)),  # type: ignore[dict-item]
        "after create s1": lambda node: take(node, "s1", icount=0),
        "after overwrite cluster 0": lambda node: node.write(0, b"\3" * 65536),
        "after create s2": lambda node: take(node, "s2", icount=0),
        "after apply s1": lambda node: revert(node, "s1"),
        "after delete s1": lambda node: delete(node, "s1"),
        "after delete s2": lambda node: delete(node, "s2"),
    }
    for step in steps("qcow2-bytes"):
        if step["dir"] != "note":
            continue
        with opened(path) as node:
            doings.pop(step["text"])(node)
        assert_clean(path)
        with opened(path, read_only=True) as node:
            world = node.image.world
            assert len(world.l1) == 8 * len(step["l1"])
            assert (world.header.snapshot_count, bool(world.header.snapshots_offset)) == (
                step["nsn"],
                bool(step["sno"]),
            )
            assert [_as_recorded(each) for each in world.snapshots] == [
                (each["id"], each["name"], each["l1n"], each["vs32"], each["extra"]) for each in step["snaps"]
            ]
            recorded = [step["refcounts"][n] for n in (first, second, third) if n < len(step["refcounts"])]
            # The third place was a table before it held data, and a free cluster after.
            if step["text"] in ("after create s1", "after overwrite cluster 0", "2 writes", "fresh"):
                recorded = recorded[:2] + [1] * (step["text"] == "after overwrite cluster 0")
            if step["text"] == "after delete s2":
                recorded = recorded[:2]
            assert sorted(_counts_of_data(node)) == sorted(recorded), step["text"]
    assert not doings


def _as_recorded(entry: Any) -> tuple[str, str, int, int, list[int]]:
    extra = [int.from_bytes(entry.extra[at : at + 8], "big") for at in (0, 8, 16)]
    return entry.id.decode(), entry.name.decode(), entry.l1_size, entry.state_size_32, extra


def _counts_of_data(node: Any) -> list[int]:
    """The refcount of each cluster of data that any tree leads to."""
    image = node.image
    roots = [image.world.l1]
    roots += [image.file.read(each.l1_offset, each.l1_size * 8) for each in image.world.snapshots]
    hosts = set()
    with image.gate.lock:
        for root in roots:
            for _kind, length, host in image.mapping.runs(root, 0, node.size):
                hosts |= {at >> 16 for at in range(host, host + length, 65536)} if host else set()
        return [image.refcounts.count(cluster) for cluster in hosts]
