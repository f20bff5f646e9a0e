"""`stillframe image recover`, and machines that start on images which a crash has left in the middle of something."""

import json
import subprocess
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
