"""Guest memory that comes while the guest runs: by page fault, and in the order of the file.

    guest, devices ──store, load──▶ RAM, pages missing ◀──UFFDIO_COPY── server ◀──pread── file of the machine state
                                                                          ▲ │
                                                     one byte: a batch    │ ▼  what came, an error, the end
                                                                     a thread of ours

The server is a forked child: whoever waits for a page may hold the interpreter's lock of our process. It serves faults always,
and a batch of the background fill for each byte that it is sent, so that the fill can be held. It has nothing but the file,
opened for itself, the userfaultfd, and its two pipes; it ends with us, however we die. It alone has the userfaultfd: if it dies,
the kernel lets go of everybody who waits, with zeroes, and we stop the guest.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import select
import struct
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from stillframe.block.open_state import OpenState
from stillframe.errors import IOFailed
from stillframe.machine.child import fork_child, wait_for_child
from stillframe.machine.libc import LIBC, last_error
from stillframe.machine.memory import PAGE_SIZE, MemoryBlock, advise, aligned_mapping
from stillframe.machine.userfault import (
    FEATURE_WP_ASYNC,
    FEATURE_WP_UNPOPULATED,
    MODE_MISSING,
    MODE_WRITE_PROTECT,
    Pagemap,
    Userfaultfd,
)

_BATCH = 1024
"""Pages of a step of the fill; 4 MiB."""
_RUN = 256
"""Pages that are put in place between two looks at who waits for one."""
_GAP = 32 << 10
"""Bytes between two runs of pages that are read along rather than asked for apart."""
_AHEAD = 4
"""Batches that the server may do before it is told to go on."""
_FAULT_AROUND = 16
"""Pages that a fault brings, if they follow each other in the file."""
_ZEROES_AROUND = 64

_STEP = 8 + PAGE_SIZE
"""Bytes from one page to the next in the stream."""

_REPORT = struct.Struct("=cxxxiq")
_READY, _CAME, _RESIDENT, _FAILED = b"R", b"C", b"D", b"E"
_PATIENCE = 200
"""Milliseconds for the guest to be stopped before who waits for a page that cannot be read is let go."""

_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_DONTFORK, _DOFORK = 10, 11

Flags = Mapping[str, npt.NDArray[np.bool_]]
Offsets = npt.NDArray[np.int64]


class MovedPages:
    """The pages of a block, taken away from it in no time; the block is empty then.

    :raise OSError: the kernel does not do it; nothing has changed.
    """

    def __init__(self, block: MemoryBlock) -> None:
        self._block = block
        self._room, _, self._address = aligned_mapping(block.size)
        try:
            _move(block.host_address, self._address, block.size)
        except BaseException:
            self._room.close()
            raise

    def put_back(self) -> None:
        """The block is as it was; what it has become meanwhile is gone."""
        _move(self._address, self._block.host_address, self._block.size)
        self._room.close()

    def forget(self) -> None:
        """Give the memory back."""
        self._room.close()


_mremap = LIBC.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


def _move(source: int, target: int, size: int) -> None:
    if _mremap(source, size, size, _MAYMOVE | _FIXED | _DONTUNMAP, target) != target:
        raise last_error()


class ArrivingMemory:
    """Blocks of memory, and the server that will fill them; made while the guest runs, nothing changes before `empty`.

    :param blocks: with bytes, all of one machine. :param offsets: of each page in the stream, negative for zeroes.
    :param file: of the stream; it is closed here, whatever comes. :raise OSError: the host cannot do it.
    """

    def __init__(
        self, blocks: Sequence[MemoryBlock], offsets: Mapping[str, Offsets], file: OpenState
    ) -> None:
        self._blocks = tuple(blocks)
        self._moved: list[MovedPages] = []
        self._pagemap = Pagemap()
        self._report = self._control = self._pid = -1
        self._faults: Userfaultfd | None = None
        self.total = sum(int((offsets[block.name] >= 0).sum()) for block in blocks) * PAGE_SIZE
        """Bytes that come from the file."""
        try:
            self._faults = Userfaultfd(FEATURE_WP_UNPOPULATED | FEATURE_WP_ASYNC)
            self._start([(block.host_address, offsets[block.name]) for block in blocks], file)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(file.fd)

    def _start(self, parts: Sequence[tuple[int, Offsets]], file: OpenState) -> None:
        self._report, told = os.pipe()
        hears, self._control = os.pipe()
        try:
            for block in self._blocks:
                advise(block.host_address, block.size, _DONTFORK)
            try:
                self._pid = self._fork(parts, file, hears, told)
            finally:
                for block in self._blocks:
                    advise(block.host_address, block.size, _DOFORK)
        finally:
            os.close(told)
            os.close(hears)
        kind, _, _ = self._next()
        if kind != _READY:
            raise OSError(errno.ECHILD, os.strerror(errno.ECHILD))

    def _fork(self, parts: Sequence[tuple[int, Offsets]], file: OpenState, hears: int, told: int) -> int:
        faults = self._faults
        if faults is None:
            raise RuntimeError("Already given away")
        return fork_child(
            lambda: _Server(faults, parts, file, hears, told).serve(), (faults.fd, file.fd, hears, told)
        )

    def empty(self) -> None:
        """Held, and nobody else watches the blocks: their pages are set aside, and missing from here on.

        :raise OSError: nothing has changed.
        """
        faults = self._faults
        if faults is None:
            raise RuntimeError("Emptied twice")
        try:
            for block in self._blocks:
                self._moved.append(MovedPages(block))
                faults.register(block.host_address, block.size, MODE_MISSING | MODE_WRITE_PROTECT)
        except BaseException:
            self.put_back()
            raise
        # The server alone has it now; see the module's text.
        faults.close()
        self._faults = None

    def put_back(self) -> None:
        """Held: all blocks are what they were before `empty`."""
        self.close()
        while self._moved:
            self._moved.pop().put_back()

    def forget(self) -> None:
        """What was set aside is no longer needed."""
        while self._moved:
            self._moved.pop().forget()

    def fill(self, came: Callable[[int], None]) -> None:
        """Until all is there: let the server work.

        :param came: called with bytes that have come; while it does not return, few more come but by faults. Raises to end it.
        :raise IOFailed: the file cannot be read, or the server is gone. Who waits for a page gets zeroes soon: stop the guest.
        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self._control, bytes(_AHEAD))
        while True:
            kind, code, pages = self._next()
            if kind == _RESIDENT:
                return
            if kind == _FAILED:
                raise IOFailed(f"Could not read the guest's memory: {os.strerror(code)}", errno=code)
            if kind != _CAME:
                raise IOFailed("The process that fetches the guest's memory is gone", errno=errno.ECHILD)
            came(pages * PAGE_SIZE)
            # A server that has ended by now has said why, or says nothing: the next report tells.
            with contextlib.suppress(BrokenPipeError):
                os.write(self._control, b"\0")

    @property
    def serves(self) -> bool:
        """Whether the server lives: then all that was read until now was there, or has come from it."""
        if self._pid <= 0:
            return False
        try:
            return os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
        except ChildProcessError:
            return False

    def finish(self) -> Flags:
        """At a boundary, after `fill`: watch no more. :return: the pages that were written since `empty`."""
        flags: dict[str, npt.NDArray[np.bool_]] = {}
        for block in self._blocks:
            flags[block.name] = np.zeros(block.size // PAGE_SIZE, np.bool_)
            self._pagemap.mark_written(flags[block.name], block.host_address, filled=True)
        self.close()
        return flags

    def _next(self) -> tuple[bytes, int, int]:
        """The server's next report; nothing but zeroes when it has ended."""
        data = os.read(self._report, _REPORT.size)
        kind, code, pages = _REPORT.unpack(data.ljust(_REPORT.size, b"\0"))
        return kind, code, pages

    def close(self) -> None:
        """The server ends; pages that have not come are zeroes. A second time, nothing."""
        if self._faults is not None:
            self._faults.close()
            self._faults = None
        if self._control >= 0:
            os.close(self._control)
            os.close(self._report)
            self._control = self._report = -1
        if self._pid > 0:
            wait_for_child(self._pid)
            self._pid = -1
        self._pagemap.close()


_Runs = npt.NDArray[np.int64]
"""Shape (n, 3): offset in the stream, host address, pages."""


def _runs(parts: Sequence[tuple[int, Offsets]]) -> _Runs:
    """What follows each other both in the stream and in memory, `_RUN` pages at most, in the stream's order."""
    found: list[_Runs] = [np.zeros((0, 3), np.int64)]
    for address, offsets in parts:
        pages = np.flatnonzero(offsets >= 0)
        if not len(pages):
            continue
        pages = pages[np.argsort(offsets[pages], kind="stable")]
        where = offsets[pages]
        cuts = np.flatnonzero((np.diff(pages) != 1) | (np.diff(where) != _STEP)) + 1
        whole = np.concatenate(([0], cuts))
        within = np.arange(len(pages)) - np.repeat(whole, np.diff(whole, append=len(pages)))
        starts = np.flatnonzero(within % _RUN == 0)
        counts = np.diff(starts, append=len(pages))
        found.append(np.stack((where[starts], address + pages[starts] * PAGE_SIZE, counts), axis=1))
    every = np.concatenate(found)
    return every[np.argsort(every[:, 0], kind="stable")]


def _near(runs: _Runs) -> int:
    """How many of these, from the first on, lie in one piece of the stream that is worth reading at once."""
    ends = runs[:, 0] + (runs[:, 2] - 1) * _STEP + PAGE_SIZE
    far = (ends - runs[0, 0] > _RUN * _STEP) | (np.cumsum(runs[:, 2]) > _RUN)
    far[1:] |= runs[1:, 0] - ends[:-1] > _GAP
    return int(far.argmax()) if far.any() else len(runs)


class _Server:
    """The child's work. It takes no lock that the parent may have held."""

    def __init__(
        self,
        faults: Userfaultfd,
        parts: Sequence[tuple[int, Offsets]],
        file: OpenState,
        hears: int,
        told: int,
    ) -> None:
        self._faults, self._parts, self._file = faults, parts, file
        self._hears, self._told = hears, told
        self._raw = memoryview(bytearray(_RUN * _STEP))
        self._room = mmap.mmap(-1, _RUN * PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._pages = np.frombuffer(self._room, np.uint8).reshape(_RUN, PAGE_SIZE)
        self._address = int(self._pages.ctypes.data)

    def serve(self) -> None:
        """Until the parent ends it, or a page cannot be had."""
        # Before anybody waits for a page: it takes up to tens of milliseconds.
        runs = _runs(self._parts)
        self._tell(_READY, 0, 0)
        try:
            self._serve(runs)
        except OSError as error:
            self._tell(_FAILED, error.errno or errno.EIO, 0)
            poll = select.poll()
            poll.register(self._hears, 0)
            poll.poll(_PATIENCE)

    def _tell(self, kind: bytes, code: int, pages: int) -> None:
        os.write(self._told, _REPORT.pack(kind, code, pages))

    def _serve(self, runs: _Runs) -> None:
        poll = select.poll()
        poll.register(self._faults.fd, select.POLLIN)
        poll.register(self._hears, select.POLLIN)
        allowed = at = 0
        resident = False
        while True:
            for fd, _ in poll.poll(None if resident or not allowed else 0):
                if fd == self._faults.fd:
                    for address in self._faults.faults():
                        self._fault(address & -PAGE_SIZE)
                else:
                    sent = os.read(self._hears, 64)
                    if not sent:
                        return
                    allowed += len(sent)
            if resident or not allowed:
                continue
            if at < len(runs):
                at += self._batch(runs[at : at + _BATCH])
                allowed -= 1
            else:
                resident = True
                self._tell(_RESIDENT, 0, 0)

    def _batch(self, runs: _Runs) -> int:
        """Some runs. :return: how many it were."""
        pages = done = 0
        while done < len(runs) and pages < _BATCH:
            near = runs[done : done + _near(runs[done : done + _RUN])]
            self._put(near)
            for waiting in self._faults.faults():
                self._fault(waiting & -PAGE_SIZE)
            pages += int(near[:, 2].sum())
            done += len(near)
        self._tell(_CAME, 0, pages)
        return done

    def _put(self, runs: _Runs) -> None:
        """Runs that lie in one piece of the stream: read at once, copied together, put in place one by one."""
        offsets, counts = runs[:, 0], runs[:, 2]
        start, total = int(offsets[0]), int(counts.sum())
        raw = self._raw[: int(offsets[-1] - start + (counts[-1] - 1) * _STEP) + PAGE_SIZE]
        self._file.readinto(start, raw)
        if len(runs) == 1:
            self._pages[:total] = np.ndarray((total, PAGE_SIZE), np.uint8, raw, 0, (_STEP, 1))
        else:
            within = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
            view = np.lib.stride_tricks.sliding_window_view(np.frombuffer(raw, np.uint8), PAGE_SIZE)
            self._pages[:total] = view[np.repeat(offsets - start, counts) + within * _STEP]
        source = self._address
        for _, address, count in runs.tolist():
            self._faults.fill(address, source, count * PAGE_SIZE)
            source += count * PAGE_SIZE

    def _fault(self, address: int) -> None:
        for start, offsets in self._parts:
            page = (address - start) // PAGE_SIZE
            if 0 <= page < len(offsets):
                break
        else:
            return
        first = int(offsets[page])
        if first < 0:
            missing = offsets[page : page + _ZEROES_AROUND] < 0
            count = len(missing) if missing.all() else int(missing.argmin())
            self._faults.fill_with_zeroes(address, count * PAGE_SIZE)
            return
        around = offsets[page : page + _FAULT_AROUND]
        follows = around == first + _STEP * np.arange(len(around))
        count = len(around) if follows.all() else int(follows.argmin())
        self._put(np.array([[first, address, count]]))
