"""An operation recorded, its crash states built, and each held against the model: see crash_states.py and worlds.py.

Of every state: it opens; its content is that of a world that may be found; our check finds no corruption; leaks can be
repaired, and the content is the same afterwards. Of some: QEMU finds no corruption either and reads the same bytes, before
anything of ours has touched the state; and the image can be used as ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from block.faults import Log, RecordingNode, Step
from peers import installed_versions, using
from qcow2.crash_states import Files, State, states
from qcow2.images import as_raw, assert_only_leaks, delete, qemu_img, take
from qcow2.memory import MemoryNode
from qcow2.operations import OPERATIONS
from qcow2.scenes import Options, content_of
from qcow2.worlds import Content, MayHold, Witness, allowed
from stillframe.block.node import Node
from stillframe.block.qcow2 import Qcow2Node
from stillframe.block.qcow2.check import check
from stillframe.block.qcow2.layout import DIRTY
from stillframe.block.qcow2.repair import repair

USED_EVERY = 8
"""States after which one is written to as ever."""


def power_losses_of(options: Options, wanted: int) -> int:
    """How many power losses of each case make so many states of all: more of the smaller images, which take less time."""
    return wanted * {512: 11, 4096: 7}.get(options.cluster_size, 4) // 1000


@dataclass
class Tally:
    """What was seen of the states of one operation on one kind of image."""

    name: str
    process_deaths: int = 0
    power_losses: int = 0
    leaked: int = 0
    shown: int = 0
    used: int = 0

    @property
    def states(self) -> int:
        """Different ones."""
        return self.process_deaths + self.power_losses


def open_image(files: Sequence[Node], *, read_only: bool = False) -> list[Qcow2Node]:
    """The nodes of a scene of one image."""
    return [Qcow2Node("node", files[0], read_only=read_only)]


def record(name: str, options: Options) -> tuple[Files, list[Step]]:
    """The files before an operation, and all that is done to them up to its end."""
    operation = OPERATIONS[name]
    start = operation.scene(options)
    log = Log()
    file = RecordingNode(MemoryNode(start.image), log)
    with options.in_force():
        operation.work(Witness([file], log, [start.content], open_image))
    return (start.image,), log.steps


def examine(
    tally: Tally, name: str, options: Options, power_losses: int, folder: Path, *, shown: int, seed: int = 1
) -> None:
    """Hold the states of an operation against the model; AssertionError for one that is wanting.

    :param tally: what is seen is counted in it. :param power_losses: how many different ones to build, if there are so many.
    :param folder: for images that are shown to others, and for one that is found wanting.
    :param shown: one of so many states is shown to QEMU, by turns to each version.
    """
    start, steps = record(name, options)
    looked: dict[int, Sequence[Content]] = {}
    for state in states(start, steps, power_losses=power_losses, seed=seed + crc32(tally.name.encode())):
        try:
            found = looked.get(state.digest)
            if found is None:
                found = looked[state.digest] = _look(state, tally, folder, shown)
            may_hold: MayHold = state.may_hold  # type: ignore[assignment]
            assert allowed(may_hold, found), f"no world that may be found: {_differences(may_hold, found)}"
        except BaseException as error:
            place = folder / f"{tally.name.replace(' ', '-')}.qcow2"
            for number, each in enumerate(state.files):
                place.with_suffix(f".{number}.qcow2" if number else ".qcow2").write_bytes(each)
            error.add_note(f"{tally.name}: {state.model} before step {state.at} of the log; see {place}")
            raise


def _look(state: State, tally: Tally, folder: Path, shown: int) -> Sequence[Content]:
    """What a state holds, seen for the first time."""
    if state.model == "power loss":
        tally.power_losses += 1
    else:
        tally.process_deaths += 1
    image = state.files[0]
    is_dirty = int.from_bytes(image[72:80], "big") & DIRTY and image[7] >= 3
    found = [content_of(each) for each in open_image([MemoryNode(image, read_only=True)], read_only=True)]
    if is_dirty:
        # Refcounts are not to be believed until they have been rebuilt, which the open for writing does.
        image = opened_and_closed(image)
        assert [content_of(open_image([MemoryNode(image)])[0])] == found
    result = check(MemoryNode(image, read_only=True))
    assert result.corruptions == 0, result.messages
    if tally.states % shown == 0 and not is_dirty:
        tally.shown += 1
        show(image, found[0], folder / "shown.qcow2", tally.shown)
    if result.leaks:
        tally.leaked += 1
        file = MemoryNode(image)
        again = repair(file, "leaks")
        assert (again.leaks, again.corruptions, again.leaks_fixed) == (0, 0, result.leaks)
        image = bytes(file.data)
        result = check(MemoryNode(image, read_only=True))
        assert (result.leaks, result.corruptions) == (0, 0)
        assert [content_of(open_image([MemoryNode(image, read_only=True)], read_only=True)[0])] == found
    if tally.states % USED_EVERY == 0:
        tally.used += 1
        use(state.files[0], found[0])
    return found


def opened_and_closed(image: bytes) -> bytes:
    """What becomes of an image that is opened for writing and closed."""
    file = MemoryNode(image)
    open_image([file])[0].close()
    return bytes(file.data)


def show(image: bytes, found: Content, path: Path, number: int) -> None:
    """QEMU opens the state as the crash left it, finds no corruption, and reads what we read."""
    path.write_bytes(image)
    peers = installed_versions()
    with using(peers[number % len(peers)]):
        assert_only_leaks(path)
        if number % 4 == 0:
            assert as_raw(path) == found.disk
            listed = qemu_img("snapshot", "-l", path)
            assert all(name in listed for name in found.snapshots)
            for name, (disk, _) in found.snapshots.items():
                # It shows a snapshot in a disk of the present size.
                assert as_raw(path, "-l", name)[: len(disk)] == disk[: len(found.disk)]


def use(image: bytes, found: Content) -> None:
    """The image serves as if nothing had happened, and what it held stays as it was."""
    file = MemoryNode(image)
    node = open_image([file])[0]
    node.write(100, b"\xee" * 1000)
    node.flush()
    if node.image.header.refcount_bits > 1:
        take(node, "after", b"state")
        node.write(100, b"\xef" * 1000)
        for name in found.snapshots:
            assert content_of(node).snapshots[name] == found.snapshots[name]
            delete(node, name)
            break
    node.close()
    result = check(MemoryNode(file.data, read_only=True))
    assert result.corruptions == 0, result.messages
    content = content_of(open_image([MemoryNode(file.data, read_only=True)], read_only=True)[0])
    assert content.disk[:100] + content.disk[1100:] == found.disk[:100] + found.disk[1100:]
    for name, snapshot in content.snapshots.items():
        assert name == "after" or snapshot == found.snapshots[name]


def _differences(may_hold: MayHold, found: Sequence[Content]) -> str:
    """What differs from each world, in a few words."""
    said = []
    for world in may_hold:
        for image, content in zip(world, found, strict=True):
            if image.snapshots.keys() != content.snapshots.keys():
                said.append(f"snapshots {sorted(content.snapshots)} not {sorted(image.snapshots)}")
            said += [
                f"content of {n}" for n, s in content.snapshots.items() if image.snapshots.get(n, s) != s
            ]
            if not image.disk.may_read(content.disk):
                said.append(_difference(image.disk.present, content.disk))
        said.append("or")
    return ", ".join(said[:-1])


def _difference(wanted: bytes, disk: bytes) -> str:
    if len(wanted) != len(disk):
        return f"a disk of {len(disk)} bytes not {len(wanted)}"
    at = next((at for at, (a, b) in enumerate(zip(wanted, disk, strict=True)) if a != b), -1)
    return f"the disk, from {at:#x}: {disk[at : at + 4].hex()} where last written {wanted[at : at + 4].hex()}"
