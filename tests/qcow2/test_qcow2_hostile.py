"""An image made to hurt is refused in our own words: no traceback, no hang, no memory beyond the stated bounds."""

import gzip
import struct
import tracemalloc
import zlib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzzing.disks import use
from fuzzing.mutations import places
from qcow2.images import DATA, LONG, qemu_img
from qcow2.memory import MemoryNode
from qcow2.scenes import scene
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.compression import decompress
from stillframe.errors import ImageCorrupt, StillframeError


def fixture(name: str) -> bytes:
    return gzip.decompress((DATA / f"{name}.qcow2.gz").read_bytes())


@cache
def source_of(name: str) -> tuple[bytes, list[int], list[int]]:
    """An image, where it holds anything, and where the numbers of its tables lie."""
    image = scene(int(name[6:])).image if name.startswith("scene") else fixture(name)
    used = [at for at in range(0, len(image), 8) if image[at : at + 8] != bytes(8)]
    return image, used, [at for at, _ in places(image)]


@pytest.mark.timeout(3600 if LONG else 180)
@settings(max_examples=3000 if LONG else 60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_damage_to_an_image_ends_in_an_error_of_ours(data: st.DataObject) -> None:
    source = data.draw(st.sampled_from(["fx-v2", "fx-v3", "fx-v3-zstd", "scene-512", "scene-65536"]))
    whole, used, tables = source_of(source)
    image = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.sampled_from(data.draw(st.sampled_from([[*range(0, 112, 4)], tables, used]))))
        new = data.draw(
            st.one_of(
                st.binary(min_size=1, max_size=8),
                st.sampled_from([b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, bytes(8), b"\0\0\0\1"]),
                st.integers(0, 63).map(lambda bit: struct.pack(">Q", 1 << bit)),
                # An offset of something that is there.
                st.integers(0, 40).map(
                    lambda n: struct.pack(">Q", (1 << 63) | (n * 65536 if n % 2 else n * 512))
                ),
            )
        )
        image[where : where + len(new)] = new
    if data.draw(st.integers(0, 9)) == 0:
        del image[data.draw(st.integers(0, len(image))) :]
    tracemalloc.start()
    try:
        use(bytes(image))
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
    finally:
        tracemalloc.stop()


def patched(image: bytes, at: int, form: str, *values: int) -> MemoryNode:
    data = bytearray(image)
    struct.pack_into(form, data, at, *values)
    return MemoryNode(data, read_only=True)


@pytest.mark.parametrize(
    ("at", "form", "value", "words"),
    [
        (4, ">I", 4, "Unsupported qcow2 version 4"),
        (20, ">I", 8, r"Unsupported cluster size: 2\^8"),
        (20, ">I", 22, r"Unsupported cluster size: 2\^22"),
        (24, ">Q", 1 << 62, "Image is too big"),
        (36, ">I", 1 << 30, "Active L1 table too large"),
        (36, ">I", 0, "L1 table is too small"),
        (40, ">Q", 0x10001, "Active L1 table offset invalid"),
        (48, ">Q", 0x10200, "Reference count table offset invalid"),
        (56, ">I", 0, "Image does not contain a reference count table"),
        (56, ">I", 0x10000, "Reference count table too large"),
        (60, ">I", 0x10001, "Snapshot table too large"),
        (64, ">Q", 0x10200, "Snapshot table offset invalid"),
        (72, ">Q", 1 << 20, r"Unsupported qcow2 feature\(s\): Unknown incompatible feature: 100000"),
        (96, ">I", 7, "Reference count entry width too large; may not exceed 64 bits"),
        (100, ">I", 8, "qcow2 header too short"),
        (100, ">I", 1 << 20, "qcow2 header exceeds cluster size"),
        (8, ">Q", 1 << 20, "Invalid backing file offset"),
    ],
)
def test_a_number_out_of_its_bounds_is_refused_in_qemus_words(
    at: int, form: str, value: int, words: str
) -> None:
    with pytest.raises(StillframeError, match=f"^{words}$"):
        Qcow2Node("node", patched(scene(65536).image, at, form, value), read_only=True)


def test_extra_data_of_a_snapshot_over_the_bound_is_refused() -> None:
    image = scene(65536).image
    table = int.from_bytes(image[64:72], "big")
    with pytest.raises(ImageCorrupt, match="Too much extra metadata in snapshot table entry 0"):
        Qcow2Node("node", patched(image, table + 36, ">I", 1025), read_only=True)


@pytest.mark.parametrize("kind", ["zlib", "zstd"])
def test_compressed_data_that_claims_to_be_more_is_cut_at_one_cluster(kind: str) -> None:
    if kind == "zlib":
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        bomb = packer.compress(bytes(256 << 20)) + packer.flush()
    else:
        zstandard = pytest.importorskip("zstandard")
        bomb = zstandard.ZstdCompressor().compress(bytes(256 << 20))
    tracemalloc.start()
    try:
        assert decompress(bomb, kind, 65536) == bytes(65536)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()
    with pytest.raises(ImageCorrupt):
        decompress(bomb[:12], kind, 1 << 21)


def test_a_write_is_never_let_onto_metadata(tmp_path: Path) -> None:
    """An entry that points at the L1 table: the write is refused, the image marked, and every byte kept."""
    start = scene(65536)
    data = bytearray(start.image)
    l1 = int.from_bytes(data[40:48], "big")
    l2 = int.from_bytes(data[l1 : l1 + 8], "big") & 0x00FFFFFFFFFFFE00
    struct.pack_into(">Q", data, l2 + 8 * 5, (1 << 63) | l1)
    file = MemoryNode(data)
    node = Qcow2Node("node", file)
    with pytest.raises(
        ImageCorrupt, match=r"Preventing invalid write on metadata \(overlaps with active L1 table\)"
    ):
        node.write(5 * 65536, b"x" * 512)
    with pytest.raises(StillframeError):
        node.write(0, b"y")
    assert file.data[l1 : l1 + 4096] == data[l1 : l1 + 4096]
    path = tmp_path / "image.qcow2"
    path.write_bytes(file.data)
    assert '"corrupt": true' in qemu_img("info", "--output=json", path)
