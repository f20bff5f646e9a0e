"""A process that writes to an image and tells of each write once it is acknowledged, until it is killed.

    victim.py IMAGE SEED FIRST      its lines: "w FIRST_BLOCK BLOCKS NUMBER" before a write, "a NUMBER" after it,
                                    "s NAME" before a snapshot and "t" after it, "d NAME" before one is deleted and "e" after it,
                                    "f" after a flush, and first "r" with what the open found

A block of 512 bytes holds its own place and the number of the write, over and over.
"""

import os
import random
import struct
import sys

from stillframe.block.file import FileNode
from stillframe.block.node import SnapshotRecord
from stillframe.block.qcow2 import Qcow2Node

BLOCK = 512


def block(place: int, number: int) -> bytes:
    return struct.pack("<QQ", place, number) * (BLOCK // 16)


def say(text: str) -> None:
    os.write(1, text.encode() + b"\n")


def main(path: str, seed: int, number: int) -> None:
    chance = random.Random(seed)
    node = Qcow2Node("node", FileNode("file", path))
    store = node.snapshot_store
    recovery = node.image.recovery
    assert recovery is not None
    say(f"r {recovery.outcome.value} {recovery.entries}")
    blocks = node.size // BLOCK
    while True:
        what = chance.random()
        if what < 0.95:
            count = chance.choice([1, 1, 8, 8, 8, 40, 300])
            first = chance.randrange(blocks - count)
            say(f"w {first} {count} {number}")
            node.write(first * BLOCK, b"".join(block(first + each, number) for each in range(count)))
            say(f"a {number}")
            number += 1
        elif what < 0.97:
            node.flush()
            say("f")
        elif what < 0.99 or len(store.snapshots()) < 2:
            name = f"s{number}"
            say(f"s {name}")
            change = store.freeze().prepare(SnapshotRecord(name, 1, 2))
            change.commit()
            change.finish()
            say("t")
            number += 1
        else:
            snapshot = chance.choice(list(store.snapshots()))
            say(f"d {snapshot.name}")
            change = store.prepare_delete(snapshot)
            change.commit()
            change.finish()
            say("e")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
