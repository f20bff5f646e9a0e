"""What `check` says of images that qemu-img made and somebody damaged: qemu-img's own numbers and lines."""

import json
import subprocess
from pathlib import Path

import pytest

from peers import peer
from qcow2.images import qemu_img, qemu_io
from stillframe.block.file import FileNode
from stillframe.block.qcow2.check import check

pytestmark = pytest.mark.usefixtures("every_qemu")

KINDS: dict[str, list[str]] = {
    "plain": [],
    "extended": ["extended_l2=on"],
    "data file": ["data_file=data.raw"],
}
COPIED, COMPRESSED = 1 << 63, 1 << 62


class Damaged:
    """An image with five clusters of data, one of them half full, and a way to change its words."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.path = directory / "image.qcow2"
        options = [
            word for option in KINDS[kind] for word in ("-o", option.replace("data.", f"{directory}/data."))
        ]
        qemu_img("create", "-q", "-f", "qcow2", *options, self.path, "4M")
        qemu_io(self.path, "write 64k 256k", "write 512k 4k", "write -z 1M 64k")
        self.entry = 16 if kind == "extended" else 8
        self.l1 = self.word(40)
        self.l2 = self.word(self.l1) & 0xFFFFFFFFFFFE00
        self.block = self.word(self.word(48))

    def word(self, at: int) -> int:
        return int.from_bytes(self.path.read_bytes()[at : at + 8], "big")

    def change(self, at: int, value: int) -> None:
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(value.to_bytes(8, "big"))

    def at(self, number: int, word: int = 0) -> int:
        """Where a word of an L2 entry lies."""
        return self.l2 + number * self.entry + word * 8


def theirs(path: Path) -> tuple[dict[str, int], list[str]]:
    words = [peer("qemu-img"), "check", "-f", "qcow2"]
    numbers = json.loads(
        subprocess.run([*words, "--output=json", path], capture_output=True, check=False).stdout
    )
    said = subprocess.run([*words, path], capture_output=True, text=True, check=False)
    lines = [line for line in said.stderr.splitlines() if line.startswith(("ERROR", "Leaked"))]
    return {name: value for name, value in numbers.items() if name not in ("filename", "format")}, lines


def agree(path: Path) -> list[str]:
    """Ours and theirs say the same: the lines."""
    file = FileNode("file", str(path), read_only=True)
    found = check(file)
    file.close()
    numbers, lines = theirs(path)
    assert found.as_qapi() == numbers
    assert sorted(found.messages) == sorted(lines)
    return lines


@pytest.mark.parametrize("kind", KINDS)
def test_an_undamaged_image_is_found_so(kind: str, tmp_path: Path) -> None:
    assert agree(Damaged(tmp_path, kind).path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_entries_are_told_in_qemus_words(kind: str, tmp_path: Path) -> None:
    image = Damaged(tmp_path, kind)
    whole = image.path.read_bytes()
    first, l1 = image.word(image.at(1)), image.word(image.l1)
    damages = {
        "unaligned": (image.at(1), first + 512),
        "reserved bits": (image.at(1), first | 0x100),
        "copied cleared": (image.at(1), first & ~COPIED),
        "twice": (image.at(2), first),
        "past the end": (image.at(1), first | 1 << 40),
        "compressed with copied": (image.at(1), COMPRESSED | image.word(image.at(2))),
        "compressed": (image.at(1), COMPRESSED | image.word(image.at(2)) & ~COPIED),
        "l1 reserved bits": (image.l1, l1 | 1),
        "l1 copied cleared": (image.l1, l1 & ~COPIED),
        "refcount too low": (image.block, 0x0001000100010000),
        "refcount too high": (image.block, 0x0001000100010003),
    }
    said: dict[str, list[str]] = {}
    for name, (at, value) in damages.items():
        image.path.write_bytes(whole)
        image.change(at, value)
        said[name] = agree(image.path)
    quiet = {"twice", "past the end"} if kind == "data file" else set()
    assert {name for name, lines in said.items() if not lines} <= quiet


def test_impossible_parts_of_clusters_are_told_in_qemus_words(tmp_path: Path) -> None:
    image = Damaged(tmp_path, "extended")
    whole = image.path.read_bytes()
    first = image.word(image.at(1))
    damages = [
        [(image.at(1, 1), 0x00000001FFFFFFFF)],
        [(image.at(9, 1), 1)],
        [(image.at(1), COMPRESSED | (first & ~COPIED))],
        [(image.at(1), first + 512), (image.at(1, 1), 0xFFFFFFFF00000000)],
    ]
    for changes in damages:
        image.path.write_bytes(whole)
        for at, value in changes:
            image.change(at, value)
        assert agree(image.path)
    for at, value in ((image.at(1), first | 1), (image.at(1, 1), 0xFFFFFFFF00000000)):
        image.path.write_bytes(whole)
        image.change(at, value)
        assert agree(image.path) == []
