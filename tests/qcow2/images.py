"""What the tests of this folder share: images made and opened, and the programs they are compared with."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peers import peer
from stillframe.block.file import FileNode
from stillframe.block.node import Change, Node, SnapshotInfo, SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node, create_image

DATA = Path(__file__).resolve().parent.parent / "data" / "qcow2"
LONG = bool(os.environ.get("STILLFRAME_LONG"))


def make(path: Path, size: int, **options: Any) -> Path:
    """An empty image of ours."""
    file = FileNode.create("file", str(path), replace=True)
    try:
        create_image(file, size, **options)
    finally:
        file.close()
    return path


@contextmanager
def opened(path: Path, *, read_only: bool = False, backing: Node | None = None) -> Iterator[Qcow2Node]:
    """An image of any maker, open; closed at the end."""
    file = FileNode("file", str(path), read_only=read_only)
    try:
        node = Qcow2Node("node", file, backing=backing, read_only=read_only)
        try:
            yield node
        finally:
            node.close()
    finally:
        file.close()


def apply(change: Change) -> None:
    """Prepared already: commit and finish."""
    change.commit()
    change.finish()


def take(node: Qcow2Node, name: str, state: bytes = b"", **fields: Any) -> None:
    """A snapshot from freeze to finish."""
    pending = node.snapshot_store.freeze()
    try:
        if state:
            pending.write_state(0, state)
        change = pending.prepare(SnapshotRecord(name, 1_700_000_000, 5, **fields))
    except BaseException:
        pending.abandon()
        raise
    apply(change)


def named(node: Qcow2Node, name: str) -> SnapshotInfo:
    """The snapshot of that name."""
    return next(each for each in node.snapshot_store.snapshots() if each.name == name)


def revert(node: Qcow2Node, name: str) -> None:
    apply(node.snapshot_store.prepare_revert(named(node, name)))


def delete(node: Qcow2Node, name: str) -> None:
    apply(node.snapshot_store.prepare_delete(named(node, name)))


def qemu_img(*arguments: str | Path) -> str:
    """Its standard output; it must succeed."""
    done = subprocess.run([peer("qemu-img"), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"qemu-img {arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def qemu_io(path: Path, *commands: str, image_format: str = "qcow2") -> str:
    """Run commands on an image; all must succeed."""
    arguments = [part for command in commands for part in ("-c", command)]
    done = subprocess.run(
        [peer("qemu-io"), "-f", image_format, *arguments, str(path)], capture_output=True, text=True
    )
    assert done.returncode == 0, f"{commands}: {done.stdout}{done.stderr}"
    assert "failed" not in done.stdout, done.stdout
    return done.stdout


def checked(path: Path) -> dict[str, int]:
    """The numbers of `qemu-img check`, whatever it found."""
    done = subprocess.run(
        [peer("qemu-img"), "check", "-U", "--output=json", "-f", "qcow2", str(path)],
        capture_output=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    assert found, done.stderr
    return {key: value for key, value in found.items() if isinstance(value, int)}


def assert_clean(path: Path) -> None:
    """Neither corruption nor leak, in qemu-img's eyes."""
    found = checked(path)
    assert (found.get("corruptions", 0), found.get("leaks", 0), found["check-errors"]) == (0, 0, 0), found


def assert_only_leaks(path: Path) -> None:
    """No corruption, in qemu-img's eyes."""
    found = checked(path)
    assert (found.get("corruptions", 0), found["check-errors"]) == (0, 0), found


def as_raw(path: Path, *options: str) -> bytes:
    """The disk's bytes, as qemu-img reads them."""
    raw = path.with_suffix(".raw")
    qemu_img("convert", *options, "-f", "qcow2", "-O", "raw", path, raw)
    data = raw.read_bytes()
    raw.unlink()
    return data
