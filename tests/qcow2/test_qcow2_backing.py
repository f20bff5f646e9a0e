"""Disks over shorter and longer ones: whatever the format of each, and whatever size the upper one takes, as QEMU has it."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from qcow2.images import as_raw, assert_clean, make, qemu_img, qemu_io
from stillframe.block.graph import BlockGraph

SIZE = 600 * 1024
UPPER: list[dict[str, Any]] = [
    {"compat": "0.10"},
    {"cluster_size": 512},
    {"cluster_size": 65536, "extended_l2": True},
    {"cluster_size": 2 << 20},
]


@pytest.mark.parametrize("below_size", [100 * 1024 + 512, SIZE, 900 * 1024 + 512])
@pytest.mark.parametrize("upper", UPPER, ids=lambda options: "-".join(map(str, options.values())))
def test_a_disk_that_grows_shows_zeroes_and_never_what_lies_below(
    upper: dict[str, Any], below_size: int, tmp_path: Path
) -> None:
    (tmp_path / "sub").mkdir()
    base = tmp_path / "sub" / "base.raw"
    base.write_bytes(random.Random(1).randbytes(below_size))
    middle = tmp_path / "sub" / "middle.qcow2"
    qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", middle, str(below_size))
    qemu_io(middle, "write -P 7 20k 30k", "write -z 60k 20k")
    inner = {"driver": "qcow2", "file": {"driver": "file", "filename": str(middle)}}
    name = "json:" + json.dumps(inner) if upper.get("extended_l2") else "sub/middle.qcow2"
    path = make(tmp_path / "top.qcow2", SIZE, backing_file=name, backing_format="qcow2", **upper)
    model = bytearray(as_raw(middle)[:SIZE].ljust(SIZE, b"\0"))
    assert as_raw(path) == model
    for size in (SIZE + 512, 300 * 1024, 1100 * 1024, 80 * 1024, 1000 * 1024 + 512):
        graph = BlockGraph()
        try:
            file = {"driver": "file", "filename": str(path)}
            node = graph.blockdev_add({"driver": "qcow2", "node-name": "top", "file": file})
            assert node.read(0, node.size) == model
            node.write(len(model) - 700, b"end" * 100)
            model[-700:-400] = b"end" * 100
            node.truncate(size)
            model = model[:size].ljust(size, b"\0")
            assert node.read(0, size) == model
        finally:
            graph.close()
        assert_clean(path)
        assert as_raw(path) == model
