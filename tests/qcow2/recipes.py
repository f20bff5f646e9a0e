"""Images to begin with: every option of the format that we write, in any combination, made by us or by qemu-img.

An option that a version or another option forbids is left out of the combination, so whatever is drawn can be made.
"""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from qcow2.images import make, qemu_img, qemu_io
from stillframe.block.file import FileNode
from stillframe.block.qcow2.repair import repair

CLUSTER_SIZES = [1 << bits for bits in range(9, 22)]
LARGEST_DISK = 4 << 20


@dataclass(frozen=True, slots=True)
class Recipe:
    """What an image is to be.

    :param clusters: of the disk; cut so that it stays small. :param odd: further sectors.
    :param packed: the compression of what it holds at first; None for an empty one.
    :param bitmap: whether it has a persistent bitmap, which holds reverts and resizes back.
    :param data_file: "raw" or "plain": the disk's bytes lie in a file of their own.
    :param below: what its backing file is; None for none. :param shift: sectors that one is longer than the disk.
    """

    compat: str
    cluster_size: int
    refcount_bits: int
    clusters: int
    odd: int
    packed: str | None
    below: str | None
    shift: int
    lazy_refcounts: bool
    by_qemu: bool
    bitmap: bool
    data_file: str | None
    extended_l2: bool
    seed: int

    @property
    def is_v2(self) -> bool:
        return self.compat == "0.10"

    @property
    def is_narrow(self) -> bool:
        """Whether snapshots, or compressed clusters beside each other, can be more than a refcount counts."""
        return self.refcount_bits < 16

    @property
    def size(self) -> int:
        return min(self.clusters * self.cluster_size, LARGEST_DISK) + self.odd * 512

    def tidy(self, path: Path) -> None:
        """Repair what a stock tool left behind: with its own, unless that would cost the snapshots."""
        if not self.bitmap:
            qemu_img("check", "-r", "all", path)
            return
        # (repair-keeps-snapshots-beside-bitmaps)
        file = FileNode("file", str(path))
        try:
            repair(file, "all")
        finally:
            file.close()

    def make(self, directory: Path) -> tuple[Path, bytes]:
        """The image, and what its disk holds."""
        path = directory / "image.qcow2"
        name, kind, shown = self._make_below(directory)
        model = shown[: self.size].ljust(self.size, b"\0")
        if self.packed is not None:
            model = patchy(self.seed, self.size, model)
            (directory / "source.raw").write_bytes(model)
            backing = ["-B", name, "-F", kind] if name else []
            words = [*backing, "-o", self._words(packed=True)]
            qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", *words, directory / "source.raw", path)
        elif self.by_qemu or self.data_file or self.extended_l2:
            backing = ["-b", name, "-F", kind] if name else []
            words = self._words(packed=False)
            if self.data_file:
                raw = "on" if self.data_file == "raw" else "off"
                words += f",data_file={directory / 'data.raw'},data_file_raw={raw}"
            qemu_img("create", "-f", "qcow2", *backing, "-o", words, path, str(self.size))
        else:
            options: dict[str, Any] = {"backing_file": name, "backing_format": kind} if name else {}
            if self.lazy_refcounts:
                options["lazy_refcounts"] = True
            make(
                path,
                self.size,
                cluster_size=self.cluster_size,
                refcount_bits=self.refcount_bits,
                compat=self.compat,
                **options,
            )
        if self.bitmap:
            qemu_img("bitmap", "--add", path, "bitmap")
        return path, model

    def _words(self, *, packed: bool) -> str:
        words = [f"compat={self.compat}", f"cluster_size={self.cluster_size}"]
        if not self.is_v2:
            words.append(f"refcount_bits={self.refcount_bits}")
            words.append(f"lazy_refcounts={'on' if self.lazy_refcounts else 'off'}")
        if self.extended_l2:
            words.append("extended_l2=on")
        if packed and self.packed == "zstd":
            words.append("compression_type=zstd")
        return ",".join(words)

    def _make_below(self, directory: Path) -> tuple[str, str, bytes]:
        """The name and the format to record, and the bytes that show through."""
        if self.below is None:
            return "", "", b""
        size = max(512, self.size + self.shift * 512)
        shown = patchy(self.seed + 1, size, bytes(size))
        (directory / "sub").mkdir()
        raw = directory / "sub" / "below.raw"
        raw.write_bytes(shown)
        if self.below == "raw":
            return "sub/below.raw", "raw", shown
        if self.below == "json":
            options = {"driver": "raw", "file": {"driver": "file", "filename": str(raw)}}
            return "json:" + json.dumps(options), "raw", shown
        middle = directory / "sub" / "middle.qcow2"
        if self.below == "packed":
            qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, middle)
            return "sub/middle.qcow2", "qcow2", shown
        # Two below: the lowest is found relative to the middle one, not to the image.
        longer = size + 1024
        at = size // 2 // 512 * 512
        qemu_img("create", "-f", "qcow2", "-b", "below.raw", "-F", "raw", middle, str(longer))
        qemu_io(middle, f"write -P 77 {at} 512")
        over = bytearray(shown.ljust(longer, b"\0"))
        over[at : at + 512] = b"M" * 512
        return "sub/middle.qcow2", "qcow2", bytes(over)


def patchy(seed: int, size: int, old: bytes) -> bytes:
    """Stretches of the old bytes, of zeroes, of one value and of noise: some compress, some do not."""
    chance = random.Random(seed)
    content = bytearray(old)
    at = 0
    while at < size:
        length = min(chance.choice([512, 4096, 20_000, 65_536, 300_000]), size - at)
        kind = chance.randrange(5)
        if kind == 1:
            content[at : at + length] = bytes(length)
        elif kind in (2, 3):
            content[at : at + length] = bytes([chance.randrange(1, 256)]) * length
        elif kind == 4:
            content[at : at + length] = chance.randbytes(length)
        at += length
    return bytes(content)


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any combination of options."""
    compat = draw(st.sampled_from(["1.1", "1.1", "1.1", "0.10"]))
    v3 = compat == "1.1"
    packed = draw(st.sampled_from([None, None, "zlib", "zstd"]))
    data_file = draw(st.sampled_from([None, None, None, None, "plain", "raw"])) if v3 and not packed else None
    below = draw(st.sampled_from([None, None, "raw", "json", "packed", "two"]))
    extended = v3 and not draw(st.integers(0, 3))
    return Recipe(
        compat=compat,
        cluster_size=draw(st.sampled_from(CLUSTER_SIZES[5 if extended else 0 :])),
        refcount_bits=draw(st.sampled_from([1, 2, 4, 8, 16, 32, 64])) if v3 else 16,
        clusters=draw(st.integers(1, 300)),
        odd=draw(st.integers(0, 3)),
        packed="zlib" if packed == "zstd" and not v3 else packed,
        below=None if data_file == "raw" else below,
        shift=draw(st.sampled_from([0, -3000, -5, 7, 3000])),
        lazy_refcounts=v3 and draw(st.booleans()),
        by_qemu=draw(st.booleans()),
        bitmap=v3 and not draw(st.integers(0, 5)),
        data_file=data_file,
        extended_l2=extended,
        seed=draw(st.integers(0, 1000)),
    )
