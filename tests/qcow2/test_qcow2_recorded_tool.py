"""A session with qemu-img 10.0.13 was recorded; the same session with `stillframe image` ends the same.

Commands are translated; where ours has another form, or refuses on purpose, the step names the difference
(docs/differences.md), and what qemu-img did is done another way, so that the session goes on.
"""

import json
import re
from pathlib import Path
from typing import Any

from cli.commands import in_process
from qcow2.images import assert_clean, make, opened, qemu_img, take
from qcow2.test_qcow2_recorded import Outcome, as_recorded, outcome, steps

MIB = 1 << 20

LEFT_OUT = {
    21: "options that ours does not have",
    22: "options that ours does not have",
    23: "options that ours does not have",
    29: "options that ours does not have",
    38: "options that ours does not have",
    60: "amend",
    97: "the list after names that were cut",
    96: "the recording mistyped it",
}
"""Steps without a counterpart."""

DIFFERENT = {
    5: "snapshot-tags-are-new",
    8: "snapshot-tags-are-new",
    11: "snapshot-ids-are-asked-for",
    12: "snapshot-ids-are-asked-for",
    15: "snapshot-ids-are-asked-for",
    80: "refused-snapshots-leak-nothing",
    71: "refused-snapshots-leak-nothing",
    95: "no-cut-names",
}


class Session:
    """The recorded images, made again, and each recorded command done with ours."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        size = 64 * MIB
        make(self.image("i0"), size)
        (directory / "i1.raw").write_bytes(b"")
        with (directory / "i1.raw").open("r+b") as file:
            file.truncate(size)
        make(self.image("i2"), size, compat="0.10")
        make(self.image("i3"), size, refcount_bits=1)
        make(self.image("i4"), size, refcount_bits=2)
        data = f"data_file={directory / 'i5.data'}"
        qemu_img("create", "-f", "qcow2", "-o", data, self.image("i5"), str(size))
        make(self.image("i6"), size)
        make(self.image("i7"), size)
        make(self.image("i8"), size, lazy_refcounts=True, extended_l2=True)

    def image(self, name: str) -> Path:
        return self.directory / f"{name}.qcow2"

    def path(self, word: str) -> Path:
        return Path(word.replace("IMG", str(self.directory)))

    def before(self, number: int) -> None:
        """What the recording did between its commands."""
        written = {69: "i3", 76: "i4"}.get(number)
        if written:
            with opened(self.image(written)) as node:
                node.write(0, b"\1" * 65536)

    def do(self, argv: list[str]) -> Outcome:
        argv = [word for word in argv if word not in ("-q",)]
        path = self.path(argv[-1])
        match argv[:-1]:
            case ["snapshot"] | ["snapshot", "-l"] | ["snapshot", "-l", "-f", "qcow2"]:
                return self.run("snapshot", "list", path)
            case ["snapshot", "-U", "-l"]:
                return self.run("snapshot", "list", "-U", path)
            case ["snapshot", what, tag]:
                command = {"-c": "create", "-a": "apply", "-d": "delete"}[what]
                return self.run("snapshot", command, path, "--", tag)
            case ["info", *options]:
                words = {"--output=json": "--json"}
                return self.run("info", *(words.get(each, each) for each in options), path)
            case ["check", *options]:
                words = {"--output=json": "--json", "-r": "--repair"}
                return self.run("check", *(words.get(each, each) for each in options), path)
            case ["bitmap", "--add", image]:
                qemu_img("bitmap", "--add", self.path(image), argv[-1])
                return Outcome(0)
            case ["resize", *options, image]:
                return self.run("resize", *options, self.path(image), argv[-1])
            case ["convert", *options, image]:
                return self.run("convert", "-q", "--force", *options, self.path(image), path)
        raise AssertionError(f"no translation: {argv}")

    def run(self, *words: str | Path) -> Outcome:
        done = in_process("image", *words)
        return outcome(done.code, done.stdout, done.stderr)

    def differently(self, number: int, step: dict[str, Any]) -> None:
        """Ours refuses what qemu-img did, and says why; then it is done in the way that ours has for it."""
        path = self.path(step["argv"][-1])
        if number in (71, 80):
            assert self.do(step["argv"]).code == 0
            return
        seen = self.do(step["argv"])
        assert seen.code == 1
        (said,) = seen.said if len(seen.said) == 1 else [" ".join(sorted(seen.said))]
        name = DIFFERENT[number]
        if name == "snapshot-tags-are-new":
            assert ("already exists" if number == 5 else "name is empty") in said
            with opened(path) as node:
                take(node, step["argv"][2])
        elif name == "snapshot-ids-are-asked-for":
            assert ("does not exist" if number == 11 else "ids 1, 3") in said
            command = "delete" if number == 15 else "apply"
            identity = "2" if number == 11 else "1"
            assert self.run("snapshot", command, "--id", path, identity).code == 0
        else:
            assert "255" in said
            assert name == "no-cut-names"


def told(seen: Outcome) -> tuple[Any, ...]:
    """What both programs can say alike: no dates, no places in the file, no instruction counts (`no-icount-zero`)."""
    if seen.stdout.startswith(("{", "[")):
        return seen.code, _told_json(json.loads(seen.stdout))
    lines = []
    for line in seen.stdout.splitlines():
        if not re.match(r"(image|disk size|Image end offset| +disk size| +file length| +filename): ", line):
            lines.append(re.sub(r"(DATE +[\d:.]+) +(0|--)$", r"\1", line).strip())
    return seen.code, lines


def _told_json(value: Any) -> Any:
    if isinstance(value, list):
        return [_told_json(each) for each in value]
    if not isinstance(value, dict):
        return value
    left_out = {
        "data-file",
        "date-sec",
        "date-nsec",
        "icount",
        "actual-size",
        "filename",
        "image-end-offset",
        "children",
    }
    return {name: _told_json(each) for name, each in value.items() if name not in left_out}


REASONS = (
    "snapshot not found",
    "does not exist",
    "this image format does not support checks",
    "can't resize a v2 image which has snapshots",
    "device has active dirty bitmaps",
    "use the --shrink option to perform a shrink operation",
    "can't find snapshot",
)


def test_a_recorded_session_with_qemu_img_goes_the_same_with_ours(tmp_path: Path) -> None:
    session = Session(tmp_path)
    compared = notes = 0
    for step in steps("qemu-img"):
        number = step["n"]
        notes += step["dir"] == "note"
        if step["dir"] == "note" or number in LEFT_OUT:
            continue
        session.before(number)
        where = f"{number} {step['argv']}"
        if number in DIFFERENT:
            session.differently(number, step)
            continue
        seen = session.do(step["argv"])
        assert told(seen) == told(as_recorded(step)), where
        for reason in REASONS:
            if any(reason in line for line in as_recorded(step).said):
                assert any(
                    reason in line or "does not exist" in line or "cannot keep" in line for line in seen.said
                ), where
        compared += 1
    assert (compared, len(DIFFERENT), len(LEFT_OUT), notes) == (76, 8, 8, 10)
    for name in ("i0", "i2", "i3", "i4", "i6", "i7", "i8"):
        assert_clean(session.image(name))
