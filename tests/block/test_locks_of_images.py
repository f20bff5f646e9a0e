"""Images and their backing files in the hands of two programs at once: what is refused, by which words, what is shared.

Each with both QEMUs, and in both directions. Whole images here; single files in test_locks.py.
"""

import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from block.qemu_dialogue import QemuBlockLayer, said_on_command_line
from cli.commands import in_process
from peers import QEMU_VERSIONS, peer
from stillframe.block.graph import BlockGraph
from stillframe.block.node import Node
from stillframe.errors import InUse, StillframeError

WRITE = 'Failed to get "write" lock'
SHARED_WRITE = 'Failed to get shared "write" lock'
pytestmark = pytest.mark.parametrize("version", QEMU_VERSIONS)

WRITERS: list[tuple[str, ...]] = [
    ("snapshot", "-c", "new", "IMAGE"),
    ("snapshot", "-a", "old", "IMAGE"),
    ("snapshot", "-d", "old", "IMAGE"),
    ("resize", "IMAGE", "16M"),
    ("check", "-r", "all", "IMAGE"),
    ("rebase", "-u", "-b", "", "IMAGE"),
    ("amend", "-o", "lazy_refcounts=on", "IMAGE"),
    ("bitmap", "--add", "IMAGE", "bitmap"),
    ("commit", "IMAGE"),
    ("convert", "-n", "-O", "qcow2", "OTHER", "IMAGE"),
    ("create", "-f", "qcow2", "IMAGE", "1M"),
]
READERS: list[tuple[str, ...]] = [
    ("info", "IMAGE"),
    ("snapshot", "-l", "IMAGE"),
    ("check", "IMAGE"),
    ("map", "IMAGE"),
    ("convert", "-O", "raw", "IMAGE", "OUT"),
    ("compare", "IMAGE", "OTHER"),
]


@pytest.fixture
def chain(tmp_path: Path, version: str) -> dict[str, Path]:
    """An image with a snapshot over a base, and another one over the same."""
    paths = {name: tmp_path / f"{name}.qcow2" for name in ("base", "image", "other")}
    say(version, "qemu-img", "create", "-q", "-f", "qcow2", paths["base"], "8M")
    say(version, "qemu-io", "-c", "write -P 1 0 1M", paths["base"])
    for name in ("image", "other"):
        say(
            *(version, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2"),
            paths[name],
        )
    say(version, "qemu-img", "snapshot", "-c", "old", paths["image"])
    return paths


def say(version: str, program: str, *words: str | Path) -> str:
    """What a program prints, on both streams."""
    command = [peer(program, version), *map(str, words)]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True).stdout


def words_for(words: tuple[str, ...], chain: dict[str, Path]) -> list[str]:
    """The words with names of files in them."""
    names = {"IMAGE": chain["image"], "OTHER": chain["other"], "OUT": chain["image"].parent / "out.raw"}
    return [str(names.get(word, word)) for word in words]


def options(path: Path, **more: Any) -> dict[str, Any]:
    return {"driver": "qcow2", "node-name": "disk", "file": {"driver": "file", "filename": str(path)}} | more


@contextmanager
def ours(path: Path, **more: Any) -> Iterator[Node]:
    """The image open with us, its backing file too."""
    graph = BlockGraph()
    try:
        yield graph.blockdev_add(options(path, **more))
    finally:
        graph.close()


@contextmanager
def theirs(path: Path, version: str, **more: Any) -> Iterator[QemuBlockLayer]:
    """The image open with a running QEMU."""
    qemu = QemuBlockLayer(path.parent, version)
    try:
        assert qemu.ask("blockdev-add", options(path, **more)) == {}
        yield qemu
    finally:
        qemu.close()


def test_what_we_write_qemu_img_neither_writes_nor_reads(chain: dict[str, Path], version: str) -> None:
    with ours(chain["image"]) as node:
        node.write(0, b"ours" * 1000)
        before = chain["image"].read_bytes()
        for words in WRITERS:
            assert WRITE in say(version, "qemu-img", *words_for(words, chain)), words
        for words in READERS:
            assert SHARED_WRITE in say(version, "qemu-img", *words_for(words, chain)), words
        assert WRITE in say(version, "qemu-io", "-c", "write 0 512", chain["image"])
        assert chain["image"].read_bytes() == before
        # Forced, it reads, and what is flushed is there.
        node.flush()
        assert "old" in say(version, "qemu-img", "snapshot", "-l", "-U", chain["image"])
        assert "read 512/512" in say(
            version, "qemu-io", "-U", "-r", "-c", "read -P 0x6f 0 1", "-c", "read 0 512", chain["image"]
        )
    for words in READERS:
        assert "lock" not in say(version, "qemu-img", *words_for(words, chain)), words


def test_what_we_write_a_qemu_does_not_start_with(chain: dict[str, Path], version: str) -> None:
    read_only = options(chain["image"]) | {"read-only": True}
    with ours(chain["image"]):
        said = said_on_command_line(chain["image"].parent, json.dumps(options(chain["image"])), version)
        assert said is not None
        assert WRITE in said
        said = said_on_command_line(chain["image"].parent, json.dumps(read_only), version)
        assert said is not None
        assert SHARED_WRITE in said
        forced = read_only | {"force-share": True}
        assert said_on_command_line(chain["image"].parent, json.dumps(forced), version) is None
    assert said_on_command_line(chain["image"].parent, json.dumps(options(chain["image"])), version) is None


def test_what_qemu_writes_we_refuse_by_name_and_read_when_forced(
    chain: dict[str, Path], version: str
) -> None:
    image = chain["image"]
    asked = f"Is another process using the image [{image}]?"
    with theirs(image, version):
        before = image.read_bytes()
        for words in (
            ("snapshot", "create", image, "new"),
            ("snapshot", "apply", image, "old"),
            ("snapshot", "delete", image, "old"),
            ("check", "--repair", "all", image),
            ("create", "--force", image, "1M"),
        ):
            refused = in_process("image", *words)
            assert refused.code == 1, words
            assert WRITE in refused.stderr, words
            assert asked in refused.stderr, words
        for words in (("info", image), ("check", image), ("snapshot", "list", image)):
            refused = in_process("image", *words)
            assert refused.code == 1, words
            assert SHARED_WRITE in refused.stderr, words
            assert asked in refused.stderr, words
            assert in_process("image", *words[:-1], "--force-share", image).code == 0, words
        with pytest.raises(InUse, match=WRITE), ours(image):
            pass
        with pytest.raises(InUse, match=SHARED_WRITE), ours(image, **{"read-only": True}):
            pass
        with ours(image, **{"read-only": True, "force-share": True}) as node:
            assert node.read(0, 512) == b"\1" * 512
        assert image.read_bytes() == before
    with ours(image) as node:
        node.write(0, b"free again")


def test_readers_share_and_hold_writers_back(chain: dict[str, Path], version: str) -> None:
    image = chain["image"]
    read_only = {"read-only": True}
    with theirs(image, version, **read_only), ours(image, **read_only) as node:
        assert node.read(0, 512) == b"\1" * 512
        assert in_process("image", "info", image).code == 0
        for words in READERS:
            assert "lock" not in say(version, "qemu-img", *words_for(words, chain)), words
        for words in (("snapshot", "create", image, "new"), ("check", "--repair", "leaks", image)):
            assert WRITE in in_process("image", *words).stderr
        assert WRITE in say(version, "qemu-img", "snapshot", "-c", "new", image)
    with ours(image, **read_only):
        assert WRITE in say(version, "qemu-img", "snapshot", "-c", "new", image)
    with theirs(image, version, **read_only):
        assert WRITE in in_process("image", "snapshot", "create", image, "new").stderr


def test_a_backing_file_is_shared_by_those_who_stand_on_it_and_written_by_nobody(
    chain: dict[str, Path], version: str
) -> None:
    base = chain["base"]
    with ours(chain["image"]) as node, theirs(chain["other"], version):
        assert node.read(0, 512) == b"\1" * 512
        node.write(0, b"above")
        assert WRITE in say(version, "qemu-io", "-c", "write 0 512", base)
        assert WRITE in say(version, "qemu-img", "snapshot", "-c", "new", base)
        assert WRITE in in_process("image", "snapshot", "create", base, "new").stderr
        assert "lock" not in say(version, "qemu-img", "info", base)
        assert in_process("image", "check", base).code == 0
    # The lock of the one that is left holds by itself.
    with theirs(chain["other"], version):
        assert WRITE in in_process("image", "snapshot", "create", base, "new").stderr
    with ours(chain["image"]):
        assert WRITE in say(version, "qemu-img", "resize", base, "16M")
    assert in_process("image", "snapshot", "create", base, "new").code == 0


def test_an_image_is_not_opened_while_somebody_writes_what_it_stands_on(
    chain: dict[str, Path], version: str
) -> None:
    with theirs(chain["base"], version):
        with pytest.raises(StillframeError, match=f"^Could not open backing file: {SHARED_WRITE}"):
            with ours(chain["image"]):
                pass
        with ours(chain["image"], backing=None) as node:
            assert node.read(0, 512) == bytes(512)
    with ours(chain["base"]):
        assert SHARED_WRITE in say(version, "qemu-io", "-c", "read 0 512", chain["image"])
        said = said_on_command_line(chain["base"].parent, json.dumps(options(chain["image"])), version)
        assert said is not None
        assert SHARED_WRITE in said
    # What we could not open is held by nobody.
    assert "wrote 512" in say(version, "qemu-io", "-c", "write 0 512", chain["image"])
