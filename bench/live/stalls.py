"""How long a single store of a guest stands still while a snapshot is written, or while one that was loaded comes.

A thread without the interpreter (stores.c) stores once to every page that is not zero, in random order, as fast as it can, from the
end of the pause to the end of the job: in the place of a processor, for a guest's own clock stands still as it does. Each of these
stores is the first to its page, so each meets what the kernel, or the server of a lazy load, has to do for it. The pause is not
counted. What the host's scheduler takes from the thread is.
"""

import ctypes
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
from guests import DISK, SIZES
from tables import Row, at_most

from snapshots.hosts import Register, new_image, new_machine, opened
from stillframe.machine.machine import Machine
from stillframe.snapshots import selection
from stillframe.snapshots.context import Unwatched
from stillframe.snapshots.ground import Ground
from stillframe.snapshots.load import load
from stillframe.snapshots.save import save
from stillframe.vmstate.ram import PAGE_SIZE

_STANDS, _RUNS, _OVER = 0, 1, 2
_SOURCE = Path(__file__).with_name("stores.c")

Stalls = npt.NDArray[np.uint32]
"""Nanoseconds, one a store."""


def rows(rounds: int, progress: Callable[[str], None]) -> list[Row]:
    """Of the larger memory. :param rounds: how often; the distribution is over the stores of each round."""
    memory = max(SIZES)
    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="stillframe-bench-") as directory:
        compiled = _compiled(Path(directory))
        taken: dict[str, list[Stalls]] = {"save": [], "lazy load": []}
        for number in range(rounds):
            progress(f"stalls of stores, round {number + 1} of {rounds}")
            for work, stalls in _round(compiled, memory, Path(directory) / f"{number}.qcow2").items():
                taken[work].append(stalls)
    for work, every in taken.items():
        bars = {"99 %": 2000.0, "worst": 20000.0} if work == "save" else {}
        for what, quantile in (("median", 0.5), ("99 %", 0.99), ("99.9 %", 0.999), ("worst", 1.0)):
            bar = bars.get(what)
            row = Row(
                f"a store during a {work}, {memory} MiB, first to its page: {what}",
                "µs",
                f"≤ {bar / 1000:g} ms" if bar else "",
                ours=[float(np.quantile(each, quantile)) / 1000 for each in every],
                limit=None if bar is None else at_most(bar),
            )
            found.append(row)
        found.append(
            Row(f"stores during a {work}, {memory} MiB", "", ours=[float(len(each)) for each in every])
        )
    return found


def _compiled(directory: Path) -> ctypes.CDLL:
    compiler = shutil.which("cc")
    if compiler is None:
        raise SystemExit("this needs a C compiler: apt-get install gcc libc6-dev")
    path = directory / "stores.so"
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", str(path), str(_SOURCE)], check=True)
    compiled = ctypes.CDLL(str(path))
    compiled.store.restype = ctypes.c_long
    return compiled


class _Stores:
    """The thread. :ivar at_rest: for a save or a load: nothing is stored in the block, and before it."""

    def __init__(self, compiled: ctypes.CDLL, machine: Machine, filled: int) -> None:
        self._phase = ctypes.c_int(_STANDS)
        self._pages = np.random.default_rng(1).permutation(filled).astype(np.uint32)
        self._took = np.zeros(filled, np.uint32)
        self._count = 0
        self._thread = threading.Thread(target=partial(self._store, compiled, machine))
        self._thread.start()

    def _store(self, compiled: ctypes.CDLL, machine: Machine) -> None:
        self._count = compiled.store(
            ctypes.c_void_p(machine.memory.blocks[0].host_address),
            ctypes.c_void_p(self._pages.ctypes.data),
            ctypes.c_long(len(self._pages)),
            ctypes.byref(self._phase),
            ctypes.c_void_p(self._took.ctypes.data),
        )

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        yield
        self._phase.value = _RUNS

    def end(self) -> Stalls:
        self._phase.value = _OVER
        self._thread.join()
        return self._took[: self._count]


def _round(compiled: ctypes.CDLL, memory: int, image: Path) -> dict[str, Stalls]:
    filled = (SIZES[memory] << 20) // PAGE_SIZE
    machine = new_machine(Register(), memory={"ram": memory << 20}, running=True)
    found = {}
    try:
        content = np.frombuffer(machine.memory.blocks[0].view, np.uint8)[: filled * PAGE_SIZE]
        content[:] = np.random.default_rng(1).integers(0, 256, len(content), np.uint8)
        with opened(new_image(image, DISK), "root") as node:
            nodes = [selection.snapshot_node(node)]
            ground = Ground(machine)
            stores = _Stores(compiled, machine, filled)
            chosen = selection.for_save(nodes, "s", None)
            save(machine, chosen, Unwatched(), ground=ground, at_rest=stores.at_rest)
            found["save"] = stores.end()
            # A ground of its own knows of no way back that is shorter than the whole state.
            ground.close()
            ground = Ground(machine)
            stores = _Stores(compiled, machine, filled)
            back = selection.for_load(nodes, "s", None)
            load(machine, back, Unwatched(), ground=ground, at_rest=stores.at_rest)
            found["lazy load"] = stores.end()
            ground.close()
    finally:
        machine.close()
        image.unlink(missing_ok=True)
    return found
