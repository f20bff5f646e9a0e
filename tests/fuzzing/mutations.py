"""Damage done where it hurts: header fields, extensions, entries of tables, the snapshot table."""

import random
import struct

INTERESTING = (
    0,
    1,
    2,
    0xFF,
    0x1FF,
    0x200,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 63) - 1,
    (1 << 64) - 1,
)
OFFSETS = 0x00FFFFFFFFFFFE00

_FIELDS = (
    *[(at, 4) for at in (4, 12, 16, 20, 32, 36, 56, 60, 96, 100)],
    *[(at, 8) for at in (8, 24, 40, 48, 64, 72, 80, 88)],
    (104, 1),
)


def places(image: bytes) -> list[tuple[int, int]]:
    """Offset and width of the numbers that an image's tables are made of, as far as its header can be followed."""
    found = [place for place in _FIELDS if sum(place) <= len(image)]
    if len(image) < 112:
        return found
    bits = min(max(int.from_bytes(image[20:24], "big"), 9), 21)
    size = 1 << bits
    extensions = int.from_bytes(image[100:104], "big") if image[7] >= 3 else 72
    found += [(at, 4) for at in range(extensions, min(extensions + 64, size, len(image) - 4), 4)]
    l1_size, l1 = struct.unpack_from(">IQ", image, 36)
    refcounts, _, snapshots, table = struct.unpack_from(">QIIQ", image, 48)

    def table_at(offset: int, count: int) -> list[int]:
        offset &= OFFSETS
        places_of = [offset + 8 * n for n in range(min(count, 64)) if offset + 8 * n + 8 <= len(image)]
        found.extend((at, 8) for at in places_of)
        words = [int.from_bytes(image[at : at + 8], "big") for at in places_of]
        return [word for word in words if word & OFFSETS]

    for word in table_at(l1, l1_size)[:8]:
        table_at(word, size // 8)
    for word in table_at(refcounts, 64)[:4]:
        table_at(word, size // 8)
    at = table
    for _ in range(min(snapshots, 4)):
        if at + 64 > len(image):
            break
        found += [
            (at + where, width)
            for where, width in ((0, 8), (8, 4), (12, 2), (14, 2), (32, 4), (36, 4), (40, 8), (48, 8))
        ]
        found += [(at + 64 + where, 2) for where in range(0, 64, 2) if at + 66 + where <= len(image)]
        own, count = struct.unpack_from(">QI", image, at)
        for word in table_at(own, count)[:4]:
            table_at(word, size // 8)
        id_length, name_length = struct.unpack_from(">HH", image, at + 12)
        at += -(-(40 + int.from_bytes(image[at + 36 : at + 40], "big") + id_length + name_length) // 8) * 8
    return [place for place in found if sum(place) <= len(image)]


def damage(image: bytes, chance: random.Random) -> bytes:
    """One to four numbers changed, sometimes the end cut off."""
    data = bytearray(image)
    where = places(image)
    if not where:
        return image
    clusters = max(1, len(image) >> 9)
    for _ in range(chance.choice((1, 1, 2, 3, 4))):
        at, width = chance.choice(where)
        old = int.from_bytes(data[at : at + width], "big")
        new = chance.choice(
            (
                lambda old=old: chance.choice(INTERESTING),
                lambda old=old, width=width: old ^ (1 << chance.randrange(width * 8)),
                lambda old=old: old + chance.choice((-1, 1, 511, 512, -512, 65536)),
                # Something that is there, as a table, a cluster of the guest, a compressed one.
                lambda old=old: (
                    chance.randrange(clusters) << 9 | chance.choice((0, 1 << 63, 1 << 62, 1, 3 << 62))
                ),
                lambda width=width: chance.getrandbits(width * 8),
            )
        )()
        data[at : at + width] = (new % (1 << (8 * width))).to_bytes(width, "big")
    if chance.randrange(20) == 0:
        del data[chance.randrange(len(data)) :]
    return bytes(data)
