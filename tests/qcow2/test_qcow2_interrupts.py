"""Whoever is interrupted, or out of memory, at any call inside an operation: what is in the file is whole; and after the want of
memory nothing hangs, and the image goes on or says that it does not.

An interrupt comes to the main thread alone, which is a command's, and ends it; the threads of a machine know none. One that
comes just where a request is being taken off the list of those in flight leaves it there: who then waits for it on the way out has
to be interrupted again, and is.

Python hands an interrupt over where a function begins or a call has returned, and memory runs out in a call; a profiler sees just
these instants, and raises there.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import extract_tb
from types import FrameType

import pytest

import stillframe.block.qcow2.gate as gate_module
from block.faults import Log
from qcow2.images import LONG, take
from qcow2.memory import MemoryNode
from qcow2.operations import CASES, OPERATIONS
from qcow2.scenes import Options, content_of, open_image
from qcow2.test_qcow2_faults import assert_whole, contents, label
from qcow2.worlds import Witness, allowed
from stillframe.block.qcow2 import Qcow2Node
from stillframe.errors import StillframeError

HERE = str(Path(gate_module.__file__).parent.parent.parent)
AT_MOST = None if LONG else 40
"""Instants tried in each operation."""

pytestmark = pytest.mark.timeout(3600 if LONG else 180)


class Hangs(AssertionError):
    """Somebody would wait for ever: there is one thread here, and nobody to wake it."""


class LoneLock:
    """A lock that knows that nobody else will release it."""

    def __init__(self) -> None:
        self.held = False

    def acquire(self, blocking: bool = True, timeout: float = -1) -> bool:
        if self.held and blocking:
            raise Hangs("a lock that is held")
        taken = not self.held
        self.held = True
        return taken

    def release(self) -> None:
        assert self.held
        self.held = False

    __enter__ = acquire

    def __exit__(self, *_: object) -> None:
        self.release()


def hang(*_: object) -> None:
    raise Hangs("a change that nobody will tell")


_CANNOT_FAIL = {
    "acquire",
    "release",
    "__enter__",
    "__exit__",
    "get_ident",
    "notify_all",
    "len",
    "next",
    "isinstance",
}
_CANNOT_FAIL |= {"remove", "discard", "pop", "popitem", "clear", "move_to_end"}
"""Calls that need no memory."""


@contextmanager
def raising(error: type[BaseException], at: int | None) -> Iterator[Callable[[], int]]:
    """Raise an error at the instant of that number; the function given tells how many there have been."""
    seen = 0

    def profile(frame: FrameType, event: str, what: object) -> None:
        nonlocal seen
        if not frame.f_code.co_filename.startswith(HERE):
            return
        if error is KeyboardInterrupt:
            if event not in ("call", "c_return"):
                return
        elif event != "c_call" or what.__name__ in _CANNOT_FAIL:  # type: ignore[attr-defined]
            return
        seen += 1
        if at is not None and seen == at + 1:
            sys.setprofile(None)
            raise error

    sys.setprofile(profile)
    try:
        yield lambda: seen
    finally:
        sys.setprofile(None)


def instants(count: int) -> list[int]:
    """All, or as many as are tried, far and wide."""
    if AT_MOST is None or count <= AT_MOST:
        return list(range(count))
    return [number * count // AT_MOST for number in range(AT_MOST)]


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize(("name", "options"), [each for each in CASES if each[1] == Options(512)], ids=label)
def test_whoever_is_interrupted_anywhere_leaves_a_whole_image(
    name: str, options: Options, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module.threading, "Lock", LoneLock)
    monkeypatch.setattr(gate_module.Gate, "wait", hang)
    start = OPERATIONS[name].scene(options)

    endless = Hangs if error is KeyboardInterrupt else error

    def run(at: int | None) -> tuple[MemoryNode, Witness, int, str]:
        file = MemoryNode(start.image)
        witness = Witness([file], Log(), [start.content], open_image)
        place = ""
        with options.in_force():
            if name not in ("repair leaks", "open a dirty image", "open with foreign bits"):
                _ = witness.nodes
            with raising(error, at) as seen:
                try:
                    OPERATIONS[name].work(witness)
                except (error, StillframeError, endless) as raised:
                    # Not kept: whoever catches an error lets go of the frames that it came through.
                    place = " ".join(
                        f"{Path(e.filename).name}:{e.lineno}" for e in extract_tb(raised.__traceback__)[-6:]
                    )
        return file, witness, seen(), place

    count = run(None)[2]
    for at in instants(count):
        file, witness, _, place = run(at)
        try:
            assert allowed(witness.may_hold, contents(file.data))
            assert_whole(bytes(file.data))
            if error is MemoryError and witness.is_open:
                go_on_with(file, witness.node, is_closed=name == "close")
        except BaseException as wrong:
            wrong.add_note(f"{name}: {error.__name__} at instant {at} of {count}: {place}")
            raise


def go_on_with(file: MemoryNode, node: Qcow2Node, *, is_closed: bool) -> None:
    """The image is still good, or says that it is not; and then, too, it is closed whole."""
    older = content_of(node).snapshots
    written = go_on(node)
    try:
        node.close()
    except StillframeError:
        pass
    assert_whole(bytes(file.data))
    (content,) = contents(file.data)
    assert {each: content.snapshots.get(each) for each in older} == older
    if written is not None and not is_closed:
        assert content.disk == written


def go_on(node: Qcow2Node) -> bytes | None:
    """Use the image: the disk afterwards, or None where it is refused."""
    try:
        node.write(1000, b"\xee" * 3000)
        node.flush()
        take(node, "after", b"state")
        node.write(1000, b"\xef" * 3000)
        node.flush()
    except StillframeError:
        return None
    return node.read(0, node.size)
