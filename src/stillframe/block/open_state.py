"""A machine state where it lies in a plain file, for who reads it beside the image: a process forked to serve pages.

    the stream     0 ......... 1 ......... 2 ......... 3 ..
                   │           │           │           │          pieces of 1 << cluster_bits bytes
    the file   places[0]   places[1]   places[2]   places[3]

It takes no lock and knows nothing of the image: the pieces stay where they are for as long as the snapshot is on the list.
"""

import errno
import os
from array import array
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class OpenState:
    """See the module's text.

    :param fd: for reading the file; whoever gets this closes it. :param cluster_bits: of the size of a piece.
    :param places: byte offset in the file of each piece.
    """

    fd: int
    cluster_bits: int
    places: "array[int]"

    def readinto(self, offset: int, buffer: memoryview) -> None:
        """Bytes of the stream, from `offset` on. :raise OSError: they cannot be read."""
        bits, done = self.cluster_bits, 0
        size = 1 << bits
        while done < len(buffer):
            at = offset + done
            cluster = at >> bits
            end = cluster + 1
            wanted = (at + len(buffer) - done - 1) >> bits
            while end <= wanted and self.places[end] == self.places[end - 1] + size:
                end += 1
            part = buffer[done : done + (end << bits) - at]
            count = os.preadv(self.fd, [part], self.places[cluster] + (at & (size - 1)))
            if count <= 0:
                raise OSError(errno.EIO, "the file ends too early")
            done += count
