"""An operation recorded, its crash states built, and each held against the model: see crash_states.py and worlds.py.

Of every state: it opens; its content is that of a world that may be found; our check finds no corruption; leaks can be
repaired, and the content is the same afterwards. Of some: QEMU finds no corruption either and reads the same bytes, before
anything of ours has touched the state; and the image can be used as ever.
"""

from collections.abc import Sequence
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from block.faults import Log, RecordingNode, Step
from peers import installed_versions, using
from qcow2.crash_states import Files, State, states
from qcow2.images import as_raw, assert_only_leaks, delete, qemu_img, take
from qcow2.memory import MemoryNode
from qcow2.operations import OPERATIONS
from qcow2.scenes import DATA_FILE, Options, content_of, open_image
from qcow2.worlds import Content, MayHold, Witness, allowed
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


def record(name: str, options: Options) -> tuple[Files, list[Step]]:
    """The files before an operation, and all that is done to them up to its end."""
    operation = OPERATIONS[name]
    start = operation.scene(options)
    log = Log()
    files = [RecordingNode(MemoryNode(each), log, number) for number, each in enumerate(start.files)]
    with options.in_force():
        operation.work(Witness(files, log, [start.content], open_image))
    return start.files, log.steps


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
            if options.data_file == "raw":
                # What was cut off may still be behind the disk's end.
                disks = [world[0].disk for world in may_hold]
                assert any(each.may_read(state.files[1][: len(each.flushed)]) for each in disks), (
                    "the raw file is no disk"
                )
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
    files = state.files
    is_dirty = int.from_bytes(files[0][72:80], "big") & DIRTY and files[0][7] >= 3
    found = contents(files)
    if is_dirty:
        # Refcounts are not to be believed until they have been rebuilt, which the open for writing does.
        files = opened_and_closed(files)
        assert contents(files) == found
    result = check(MemoryNode(files[0], read_only=True))
    assert result.corruptions == 0, result.messages
    if tally.states % shown == shown // 2 and not is_dirty:
        tally.shown += 1
        show(files, found[0], folder / "shown.qcow2", tally.shown)
    if result.leaks:
        tally.leaked += 1
        file = MemoryNode(files[0])
        again = repair(file, "leaks")
        assert (again.leaks, again.corruptions, again.leaks_fixed) == (0, 0, result.leaks)
        files = (bytes(file.data), *files[1:])
        result = check(MemoryNode(files[0], read_only=True))
        assert (result.leaks, result.corruptions) == (0, 0)
        assert contents(files) == found
    if tally.states % USED_EVERY == 0:
        tally.used += 1
        use(state.files, found[0])
    return found


def contents(files: Files) -> list[Content]:
    """What the image in these files holds."""
    nodes = open_image([MemoryNode(each, read_only=True) for each in files], read_only=True)
    return [content_of(node) for node in nodes]


def opened_and_closed(before: Files) -> Files:
    """What becomes of an image that is opened for writing and closed."""
    files = [MemoryNode(each) for each in before]
    open_image(files)[0].close()
    return tuple(bytes(file.data) for file in files)


def show(files: Files, found: Content, path: Path, number: int) -> None:
    """QEMU opens the state as the crash left it, finds no corruption, and reads what we read."""
    path.write_bytes(files[0])
    for each in files[1:]:
        path.with_name(DATA_FILE).write_bytes(each)
    peers = installed_versions()
    # A data file's name is looked up where the program runs.
    with using(peers[number % len(peers)]), chdir(path.parent):
        assert_only_leaks(path)
        if number % 4 == 0:
            assert as_raw(path) == found.disk
            listed = qemu_img("snapshot", "-l", path)
            assert all(name in listed for name in found.snapshots)
            for name, (disk, _) in found.snapshots.items():
                # It shows a snapshot in a disk of the present size.
                assert as_raw(path, "-l", name)[: len(disk)] == disk[: len(found.disk)]


def use(before: Files, found: Content) -> None:
    """The image serves as if nothing had happened, and what it held stays as it was."""
    files = [MemoryNode(each) for each in before]
    (node,) = open_image(files)
    node.write(100, b"\xee" * 1000)
    node.flush()
    if node.image.header.refcount_bits > 1 and len(files) == 1:
        take(node, "after", b"state")
        node.write(100, b"\xef" * 1000)
        for name in found.snapshots:
            assert content_of(node).snapshots[name] == found.snapshots[name]
            delete(node, name)
            break
    node.close()
    result = check(MemoryNode(files[0].data, read_only=True))
    assert result.corruptions == 0, result.messages
    (content,) = contents(tuple(bytes(file.data) for file in files))
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
