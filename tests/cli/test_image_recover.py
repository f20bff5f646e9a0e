"""`stillframe image recover`, and machines that start on images which a crash has left in the middle of something."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cli.commands import assert_one_sentence, in_process
from peers import peer
from running import STILLFRAME
from snapshots.groups import interrupted

NAMES = ("first.qcow2", "second.qcow2", "state.qcow2")


def laid_out(folder: Path, name: str, *, committed: bool) -> list[str]:
    paths = [folder / each for each in NAMES]
    for path, data in zip(paths, interrupted(name, committed=committed), strict=True):
        path.write_bytes(data)
    return [str(path) for path in paths]


def tags(path: str) -> list[str]:
    listed = in_process("image", "snapshot", "list", "--json", path)
    return [each["name"] for each in json.loads(listed.stdout)]


def test_recover_completes_what_was_committed_and_undoes_what_was_not(tmp_path: Path) -> None:
    for name, committed, said, wanted in (
        ("save", False, "the save of 3 images was undone", ["older", "doomed"]),
        ("save", True, "the save of 3 images was completed", ["older", "doomed", "new"]),
        ("delete", True, "the delete of 3 images was completed", ["older"]),
        ("load", False, "the load of 3 images was undone", ["older", "doomed"]),
    ):
        paths = laid_out(tmp_path, name, committed=committed)
        done = in_process("image", "recover", *paths)
        assert done.code == 0, done
        assert said in done.stdout
        assert [tags(path) for path in paths] == [wanted] * 3
        again = in_process("image", "recover", *paths)
        assert (again.code, again.stdout) == (0, "Nothing is unfinished in these images.\n")


KILLED = """
import os, sys
from stillframe.block.file import FileNode
from stillframe.block.node import GroupKind
from stillframe.block.qcow2 import Qcow2Node
from stillframe.snapshots.group import Step, all_or_none

kind, at, paths = GroupKind(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]

class Dying:
    def __init__(self, change):
        self._change = change

    def __getattr__(self, name):
        return getattr(self._change, name)

    def commit(self):
        os.kill(os.getpid(), 9)

def step(number, path):
    store = Qcow2Node(path, FileNode(f"file{number}", path)).snapshot_store
    (found,) = store.snapshots()
    prepare = store.prepare_delete if kind is GroupKind.DELETE else store.prepare_revert
    return Step(path, lambda: Dying(prepare(found)) if number == at else prepare(found), "Not done")

with all_or_none([step(*each) for each in enumerate(paths)], kind=kind):
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("kind", "at"), [(kind, at) for kind in ("load", "delete") for at in range(4)])
def test_what_a_killed_process_left_half_done_is_all_or_none_after_recover(
    kind: str, at: int, tmp_path: Path
) -> None:
    """Killed at the switch of each of three images, and when all of them are switched."""
    paths = [tmp_path / name for name in NAMES]
    for path in paths:
        assert in_process("image", "create", "-q", path, "1M").code == 0
        for number, tag in ((1, "tag"), (2, None)):
            subprocess.run(
                [peer("qemu-io"), "-c", f"write -P {number} 0 1M", path], check=True, capture_output=True
            )
            assert tag is None or in_process("image", "snapshot", "create", path, tag).code == 0
    died = subprocess.run(
        [sys.executable, "-c", KILLED, kind, str(at), *paths],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert died.returncode == -signal.SIGKILL
    # The last image decides on a load and switches last, the first on a delete and switches first.
    is_committed = at == 3 if kind == "load" else at > 0
    done = in_process("image", "recover", *paths)
    assert f"the {kind} of 3 images was {'completed' if is_committed else 'undone'}" in done.stdout, done
    shown = 1 if kind == "load" and is_committed else 2
    for path in paths:
        assert tags(str(path)) == ([] if kind == "delete" and is_committed else ["tag"])
        read = [peer("qemu-io"), "-r", "-c", f"read -P {shown} 0 1M", path]
        assert b"verification failed" not in subprocess.run(read, check=True, capture_output=True).stdout
        assert in_process("image", "check", "--repair", "leaks", path).code == 0
        subprocess.run([peer("qemu-img"), "check", "-q", path], check=True)


def test_recover_names_the_image_that_is_missing_and_forget_is_the_way_out(tmp_path: Path) -> None:
    first, second, _ = laid_out(tmp_path, "load", committed=False)
    done = in_process("image", "recover", first, second)
    assert done.code == 1
    assert "the load of 3 images is not resolved" in done.stdout
    assert "which decides, is not here" in done.stdout
    shown = in_process("image", "recover", "--json", first, second)
    assert shown.code == 1
    (found,) = json.loads(shown.stdout)
    assert (found["kind"], found["committed"], found["files"]) == ("load", None, [first, second])
    assert "error" in found
    refused = in_process("image", "snapshot", "apply", first, "older")
    assert refused.code == 1
    assert "interrupted load of 3 images" in refused.stderr
    done = in_process("image", "recover", "--forget", first, second)
    assert done.code == 0
    assert "the disk is what it was before the load" in done.stdout
    assert in_process("image", "snapshot", "apply", first, "older").code == 0


def test_recover_refuses_what_keeps_no_snapshots(tmp_path: Path) -> None:
    raw = tmp_path / "disk.raw"
    raw.write_bytes(bytes(4096))
    assert_one_sentence(in_process("image", "recover", raw), "cannot keep snapshots")


def test_an_image_alone_says_that_it_is_part_of_something_unfinished(tmp_path: Path) -> None:
    first, *_ = laid_out(tmp_path, "save", committed=False)
    listed = in_process("image", "snapshot", "list", first)
    assert "new" not in listed.stdout
    assert "is part of an interrupted save of 3 images" in listed.stderr


@pytest.mark.parametrize("committed", [False, True], ids=["under way", "committed"])
def test_a_machine_resolves_its_images_before_it_starts(tmp_path: Path, committed: bool) -> None:
    paths = laid_out(tmp_path, "load", committed=committed)
    run = machine(paths)
    assert run.returncode == 0, run.stderr
    assert f"load of 3 images was {'completed' if committed else 'undone'}" in run.stderr
    for path in paths:
        check = subprocess.run([peer("qemu-img"), "check", path], capture_output=True, text=True)
        assert check.returncode in (0, 3), check.stdout + check.stderr


def test_a_machine_without_the_image_that_decides_does_not_start(tmp_path: Path) -> None:
    paths = laid_out(tmp_path, "load", committed=False)
    run = machine(paths[:2])
    assert run.returncode == 1
    assert "which decides, is not here" in run.stderr


def test_a_node_that_is_added_later_resolves_those_that_wait_for_it(tmp_path: Path) -> None:
    paths = laid_out(tmp_path, "delete", committed=True)
    add = {
        "execute": "blockdev-add",
        "arguments": {
            "driver": "qcow2",
            "node-name": "state",
            "file": {"driver": "file", "filename": paths[2]},
        },
    }
    run = machine(paths[:2], add)
    assert run.returncode == 0, run.stderr
    assert "error" not in run.stdout
    assert [tags(path) for path in paths] == [["older"]] * 3
    assert "was completed" in run.stderr


def machine(paths: list[str], *lines: dict[str, object]) -> "subprocess.CompletedProcess[str]":
    """A machine of these nodes alone, from its start to its end; what is said to its monitor in between."""
    words = ["run", "--machine", "none", "--qmp", "stdio"]
    for number, path in enumerate(paths):
        words += ["--blockdev", f"driver=qcow2,node-name=node{number},file.driver=file,file.filename={path}"]
    said = [{"execute": "qmp_capabilities"}, *lines, {"execute": "quit"}]
    text = "".join(json.dumps(line) + "\n" for line in said)
    return subprocess.run([*STILLFRAME, *words], input=text, capture_output=True, text=True, timeout=120)
