"""Small valid inputs to begin with: images of a few KiB, by ourselves and by QEMU (tests/data/fuzz), streams, names."""

import gzip
import json
import struct
from pathlib import Path
from uuid import UUID

from qcow2.images import take
from qcow2.memory import MemoryNode
from stillframe.block.node import GroupMember, Lineage
from stillframe.block.qcow2 import Qcow2Node, create_image
from stillframe.block.qcow2.lineage import pack_lineage
from vmstate.streams import mixed_memory, written

DATA = Path(__file__).resolve().parent.parent / "data"
CORPUS = DATA / "fuzz"
"""By target or "image": what QEMU made, and every find; gzip'd."""

SIZE = 40 * 512 + 100 * 512


def image(compat: str = "1.1", refcount_bits: int = 16, **more: str) -> bytes:
    """Clusters of 512 bytes: two snapshots, one with state; zero clusters, shared ones, lineage."""
    file = MemoryNode()
    create_image(file, SIZE, cluster_size=512, compat=compat, refcount_bits=refcount_bits, **more)  # type: ignore[arg-type]
    node = Qcow2Node("node", file)
    node.write(0, b"\x11" * 3000)
    take(node, "first", b"state" * 200, lineage=family())
    node.write(1000, b"\x22" * 1000)
    if compat != "0.10":
        node.write_zeroes(4096, 1024)
    take(node, "second")
    node.write(60 * 512, b"\x33" * 2000)
    node.close()
    return bytes(file.data)


def family() -> Lineage:
    """A lineage with everything in it."""
    own, other = UUID(int=1), UUID(int=2)
    return Lineage(
        own, UUID(int=3), UUID(int=4), (GroupMember("root", own), GroupMember("data", other)), "why"
    )


def seeds(target: str) -> list[bytes]:
    """Inputs for a target: the corpus, and what is made here."""
    if target == "stream":
        page = bytes(4096)
        memory = {"ram": mixed_memory(12), "flash": page}
        return [written("none", memory), (DATA / "vmstate" / "none-10.0.bin").read_bytes()]
    if target == "lineage":
        return [pack_lineage(family())]
    if target == "names":
        file = {"driver": "file", "filename": "a.qcow2"}
        return [
            json.dumps(
                {"driver": "qcow2", "file": file, "backing": {"driver": "raw", "file": file}}
            ).encode(),
            json.dumps({"driver": "null-co", "size": 1 << 20, "latency-ns": 3}).encode(),
            b"driver=qcow2,node-name=root,file.driver=file,file.filename=a,,b.qcow2",
            b"nbd://host/x",
            b"../sub/base.raw",
        ]
    if target == "monitor":
        return [
            b'\x05{"execute": "query-block", "arguments": {"a": [1, -2.5e3, true, null, \'x\\u00e9\']}, "id": 7}\n'
        ]
    made = [
        image(),
        image("0.10"),
        image(refcount_bits=1 << 6),
        image(backing_file="/nowhere", backing_format="raw"),
    ]
    return made + [gzip.decompress(path.read_bytes()) for path in sorted((CORPUS / "image").glob("*.gz"))]


def finds(target: str) -> list[Path]:
    """What once did harm to a target."""
    return sorted((CORPUS / target).glob("*"))


def snapshot_entry(l1_offset: int, l1_size: int, state_size: int = 0, extra: int = 16) -> bytes:
    """A snapshot table's entry with an id and a name of 4 bytes each: 64 bytes."""
    head = struct.pack(">QIHHIIQII", l1_offset, l1_size, 4, 4, 0, 0, 0, 0, extra)
    return head + struct.pack(">QQ", state_size, 512) + b"0001" + b"name"
