"""Memory that comes after the guest runs again: what a load of a snapshot with a page index uses where the host can do it.

Before the pause the server of the missing pages is started, and what no RAM holds (flash) is read. In the pause the machine's pages
are set aside, which is the undo point, and its RAM is missing. After the resume the load's job lasts until all of it has come:

    progress      bytes of RAM that have come
    job-pause     holds the fill, as a limit of speed does; the guest's faults are served
    job-cancel    is refused: the disks are the snapshot's already
    an error      the guest is stopped with io-error, and goes on only after a load or a reset
    quit          does not wait for what has not come: nobody is there to use it
"""

import logging
import os
from collections.abc import Callable
from uuid import UUID

import numpy as np

from stillframe.block.open_state import OpenState
from stillframe.errors import Cancelled, IOFailed
from stillframe.machine.arriving import ArrivingMemory
from stillframe.machine.machine import Machine
from stillframe.machine.memory import PAGE_SIZE, GuestMemory
from stillframe.snapshots.context import Context
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.later_memory import known_pages, stop_without
from stillframe.snapshots.rewind import NearbyMemory
from stillframe.snapshots.selection import Found
from stillframe.vmstate.page_index import PageIndex
from stillframe.vmstate.ram import RamBlock

_log = logging.getLogger(__name__)


class LazyMemory:
    """See the module's text; `close` whatever comes.

    :raise OSError: the host cannot do it, the machine is untouched.
    """

    def __init__(
        self, machine: Machine, found: Found, index: PageIndex, ground: Ground, state: OpenState
    ) -> None:
        self._machine = machine
        self._found = found
        self.index = index
        self._ground = ground
        self._rest = self._other_memory(found, index, state)
        blocks = [block for block in machine.memory if block.is_ram and block.size]
        self._arriving = ArrivingMemory(blocks, index.offsets, state)
        self._exchanged = False

    def _other_memory(self, found: Found, index: PageIndex, state: OpenState) -> NearbyMemory:
        rest = GuestMemory(tuple(block for block in self._machine.memory if not block.is_ram))
        every = {block.name: np.ones(block.size // PAGE_SIZE, np.bool_) for block in rest}

        def read(offset: int, length: int) -> bytes:
            return found.node.store.read_state(found.snapshot, offset, length)

        memory = NearbyMemory(rest, index, every, read, cache=None)
        try:
            memory.stage(every)
        except BaseException:
            os.close(state.fd)
            raise
        return memory

    def exchange(self) -> None:
        """Held: the memory is the snapshot's, most of it missing; a second time, it is what it was."""
        if not self._exchanged:
            self._ground.lift()
            try:
                self._arriving.empty()
            except OSError as error:
                self._ground.set_down()
                raise IOFailed(
                    f"The machine's memory cannot be set aside: {error.strerror}", errno=error.errno or 0
                ) from error
            try:
                self._rest.exchange()
            except BaseException:
                self._arriving.put_back()
                self._ground.set_down()
                raise
            self._exchanged = True
        else:
            self._rest.exchange()
            self._arriving.put_back()
            self._ground.set_down()
            self._exchanged = False
        self._machine.memory.replaced()

    def fill(self, context: Context, progress: Callable[[int], None]) -> None:
        """The guest may run: wait until all has come, then the machine stands on the snapshot.

        :raise IOFailed: it cannot be read; the guest is stopped. :raise Cancelled: the machine was ended meanwhile.
        """
        self._arriving.forget()
        lineage = self._found.snapshot.lineage
        identity = lineage.snapshot if lineage else None
        done = 0

        def came(count: int) -> None:
            nonlocal done
            done += count
            progress(done)
            context.moved(count)
            if self._machine.shutdown is not None:
                raise Cancelled

        try:
            self._arriving.fill(came)
        except Cancelled:
            # The server lives until nobody can touch memory any more: no disk is written to with what has not come.
            self._machine.at_boundary(self._drain)
            self._ground.close()
            raise
        except BaseException as error:
            self._ground.close()
            stop_without(self._machine, self._found, error, "load a snapshot, or reset the machine")
            raise
        self._machine.at_boundary(lambda: self._settle(identity))

    def still_comes(self) -> bool:
        """Whether pages that are read, and are not there, still come. From any thread."""
        return self._arriving.serves

    def _drain(self) -> None:
        for device in self._machine.devices:
            device.drain()

    def _settle(self, identity: UUID | None) -> None:
        """At a boundary, with all memory there: the machine stands on the snapshot."""
        self._machine.memory_is_whole()
        try:
            changed = self._arriving.finish()
        except OSError as error:
            _log.warning("What has changed since the load is not known: %s", error.strerror)
            self._arriving.close()
            self._ground.close()
            return
        self._ground.stand_here(identity, self.index, changed)

    def close(self) -> None:
        """End the server, give the old memory back; pages that have not come are zeroes."""
        self._arriving.close()
        self._arriving.forget()

    @property
    def bytes_to_come(self) -> int:
        """From the file."""
        return self._arriving.total


def lazy_memory(machine: Machine, found: Found, ground: Ground) -> tuple[LazyMemory | None, str]:
    """For a load; else why all is to be read first."""
    index, why = known_pages(found, [RamBlock(block.name, block.size) for block in machine.memory])
    if index is None:
        return None, why
    if not any(block.is_ram and block.size for block in machine.memory):
        return None, "there is none"
    last = max((int(where.max()) for where in index.offsets.values() if len(where)), default=-1)
    state = found.node.store.open_state(found.snapshot, max(0, last + PAGE_SIZE))
    if state is None:
        return None, "its file cannot be read beside the image"
    try:
        return LazyMemory(machine, found, index, ground, state), ""
    except OSError as error:
        return None, f"pages cannot be fetched when they are needed ({error.strerror})"
