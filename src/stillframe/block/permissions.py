"""What the users of a node do with it, and what they suffer others to do: the rules of QEMU's block graph.

    user of a node            uses                            shares
    ------------------------  ------------------------------  ------------------------------------
    format over its file      consistent read; writable: +    all but write, resize
                              write, resize
    format over its backing   consistent read                 consistent read, write unchanged
    raw over its file         what its own users use          what its own users share
    guest device              consistent read; writable: +    all but write
                              write
    export                    consistent read; writable: +    all
                              write

Two users of one node agree when neither uses what the other does not share. The same numbers are bits of
QEMU's image locks, which carry the rule over to other processes (`block/locks.py`).
"""

from dataclasses import dataclass
from enum import IntFlag


class Permission(IntFlag):
    """Things that can be done to a node, one bit each; QEMU's image locks use the number of the bit."""

    NONE = 0
    CONSISTENT_READ = 1 << 0
    WRITE = 1 << 1
    WRITE_UNCHANGED = 1 << 2
    RESIZE = 1 << 3
    ALL = 0xF

    @property
    def words(self) -> str:
        """The permissions in QEMU's words, as "write, resize"."""
        return ", ".join(bit.name.lower().replace("_", " ") for bit in self if bit.name)


@dataclass(frozen=True, slots=True)
class Permissions:
    """One user's stand on one node.

    :param uses: what it does.
    :param shares: what it lets others do meanwhile.
    """

    uses: Permission
    shares: Permission

    @property
    def unshared(self) -> Permission:
        """What nobody else may do."""
        return Permission.ALL & ~self.shares

    def join(self, other: "Permissions") -> "Permissions":
        """Two users seen as one."""
        return Permissions(self.uses | other.uses, self.shares & other.shares)


UNUSED = Permissions(Permission.NONE, Permission.ALL)
FORMAT_WRITER = Permissions(
    Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE,
    Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED,
)
FORMAT_READER = Permissions(
    Permission.CONSISTENT_READ, Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
)
BACKING_READER = FORMAT_READER
DEVICE_WRITER = Permissions(Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL & ~Permission.WRITE)
DEVICE_READER = Permissions(Permission.CONSISTENT_READ, Permission.ALL & ~Permission.WRITE)
EXPORT_WRITER = Permissions(Permission.CONSISTENT_READ | Permission.WRITE, Permission.ALL)
EXPORT_READER = Permissions(Permission.CONSISTENT_READ, Permission.ALL)
