"""Snapshots as fast as they come of a guest that never rests, then all of them loaded, then all of them deleted.

    1  the bundled guest rewrites memory and disk without a rest; every few hundred milliseconds a snapshot is taken
    2  each is loaded, in random order, into the same process: the guest finds nothing wrong with itself, its nonce is that of
       the save, and its next heartbeat is one that came next at the save
    3  some are loaded in fresh processes, which save again, so that chains cross processes
    4  all are deleted in random order: after each, `qemu-img check` is clean and others load

`make stress` runs it for two minutes; PYTHONPATH=src python tests/storm.py --seconds N --seed N for another time.
"""

import argparse
import os
import random
import re
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from running import RunningMachine
from snapshots.hosts import do_delete, new_image, opened, qemu_img_check
from stillframe.block.node import SnapshotInfo
from stillframe.block.qcow2.node import Qcow2Node
from stillframe.errors import PeerError

DISK = 32 << 20
_PATIENCE = 60.0
_BEAT = re.compile(rb"HB (\d+) t=\d+ gap=\d+ bad=(\d+) nonce=([0-9a-f]{16})\r?\n")


class Loss(AssertionError):
    """A snapshot is not what was saved."""


class WatchedConsole:
    """A guest's console on a socket, read all the time by a thread of its own.

    :ivar beats: position in the text behind the line, number of the beat, `bad`, nonce; in the order of arrival.
    :ivar arrivals: of the same, host's monotonic seconds.
    """

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._text = b""
        self.beats: list[tuple[int, int, int, str]] = []
        self.arrivals: list[float] = []
        self._news = threading.Condition()
        self._scanned = 0
        self._ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(65536)
            except OSError:
                data = b""
            now = time.monotonic()
            with self._news:
                self._text += data
                for found in _BEAT.finditer(self._text, self._scanned):
                    beat = (found.end(), int(found[1]), int(found[2]), found[3].decode())
                    self.beats.append(beat)
                    self.arrivals.append(now)
                    self._scanned = found.end()
                self._ended |= not data
                self._news.notify_all()
            if not data:
                return

    @property
    def position(self) -> int:
        """Of the text's end."""
        with self._news:
            return len(self._text)

    def type(self, text: str) -> None:
        """Lines for the guest."""
        self._socket.sendall(text.encode())

    def _await(self, found: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + _PATIENCE
        with self._news:
            while not found():
                left = deadline - time.monotonic()
                if left <= 0 or self._ended:
                    raise Loss(f"the guest did not give {what}; it said last: {self._text[-600:]!r}")
                self._news.wait(left)

    def until(self, pattern: str, after: int = 0) -> str:
        """The first match that begins behind a position in the text."""
        compiled = re.compile(pattern.encode(), re.MULTILINE)
        match: list[re.Match[bytes]] = []
        self._await(lambda: bool((m := compiled.search(self._text, after)) and not match.append(m)), pattern)
        return match[0][0].decode().strip()

    def command(self, text: str) -> str:
        """The closing line of the answer."""
        after = self.position
        self.type(text + "\n")
        return self.until(r"^(ok\b|error:)[^\r\n]*\r?\n", after)

    def beats_after(self, position: int, count: int) -> list[tuple[int, int, int, str]]:
        """The first beats whose line ends behind a position."""

        def after() -> list[tuple[int, int, int, str]]:
            return [beat for beat in self.beats if beat[0] > position]

        self._await(lambda: len(after()) >= count, f"{count} heartbeats")
        return after()[:count]

    def close(self) -> None:
        """The thread ends, too."""
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@dataclass(frozen=True, slots=True)
class Instant:
    """What a snapshot shows. :param earliest: and :param latest: the number of the last beat before it."""

    earliest: int
    latest: int
    nonce: str


def await_monitor(machine: RunningMachine) -> None:
    """A socket's file is there a moment before anybody listens."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            machine.execute("query-status")
            return
        except PeerError:
            if time.monotonic() > deadline or machine.process.poll() is not None:
                raise
            time.sleep(0.01)


@contextmanager
def machine_on(directory: Path, image: Path, *words: str) -> Iterator[tuple[RunningMachine, WatchedConsole]]:
    """The bundled guest on an image, its console watched."""
    blockdev = f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"
    with RunningMachine(
        directory, "--memory", "64M", "--kernel", "bundled", "--append", "mb=8 dirty=256 period=20",
        "--blockdev", blockdev, "--device", "virtio-blk,drive=root", *words,
    ) as machine:  # fmt: skip
        await_monitor(machine)
        # One reader at a time: the harness's own would take bytes away.
        machine.console.close()
        console = WatchedConsole(directory / "console.sock")
        try:
            yield machine, console
        finally:
            console.close()


def take_snapshot(machine: RunningMachine, console: WatchedConsole, tag: str) -> Instant:
    """Save the running guest."""
    earliest = console.beats[-1][1] if console.beats else 0
    machine.save(tag)
    said = console.command("status")
    latest = int(re.findall(r"\bhb=(\d+)", said)[0])
    if " bad=0 " not in said:
        raise Loss(f"the guest that was saved as {tag} says {said!r}")
    return Instant(earliest, latest, re.findall(r"nonce=(\w+)", said)[0])


def healthy(console: WatchedConsole, tag: str, instant: Instant, position: int, old: int) -> int:
    """The guest that has just been loaded is the one that was saved, and finds nothing wrong.

    :param position: in the console's text, before the load. :param old: the last beat's number until then, whose
        successors may still have been under way. :return: the number of the guest's first beat.
    """
    seen = 1
    torn = False
    while True:
        _, number, bad, nonce = console.beats_after(position, seen)[-1]
        if instant.earliest < number <= instant.latest + 1 + torn:
            break
        may_be_torn = not torn and is_torn(number, old + 1, instant)
        if number != old + 1 and not may_be_torn:
            raise Loss(f"{tag} goes on with beat {number} after {old}, and was saved at {instant}")
        torn |= may_be_torn
        old += number == old + 1
        seen += 1
    if bad or nonce != instant.nonce:
        raise Loss(f"{tag}: beat {number} with bad={bad} nonce={nonce}, and was saved at {instant}")
    # It may have been saved with half a line typed, which must not become a command.
    after = console.position
    console.type("?\nnonce\n")
    console.until(r"^ok nonce=\w+\r?\n", after)
    said = console.command("check")
    if " bad=0 " not in f"{said} ":
        raise Loss(f"after the load of {tag} the guest says {said!r}: {console.command('status')}")
    return number


def is_torn(number: int, old: int, instant: Instant) -> bool:
    """Whether a line began as the beat `old` of the guest before the load, and ended as one of the loaded guest's."""
    text = str(number)
    nexts = [str(beat) for beat in range(instant.earliest + 1, instant.latest + 2)]
    return any(
        str(old).startswith(text[:cut]) and any(beat.endswith(text[cut:]) for beat in nexts)
        for cut in range(1, len(text) + 1)
    )


def load_each(
    machine: RunningMachine, console: WatchedConsole, order: Sequence[str], instants: dict[str, Instant]
) -> dict[str, int]:
    """:return: with which beat each goes on."""
    first = {}
    for tag in order:
        # What the stopped guest said arrives before anything that a loaded one can say.
        machine.execute("stop")
        old, position = console.beats[-1][1] if console.beats else 0, console.position
        machine.load(tag)
        machine.execute("cont")
        first[tag] = healthy(console, tag, instants[tag], position, old)
    return first


def storm(directory: Path, chance: random.Random, seconds: float, say: Callable[[str], None]) -> None:
    """All of it. :param seconds: of saving; the rest takes as long as it takes. :raise AssertionError: something is lost."""
    image = new_image(directory / "root.qcow2", DISK)
    instants: dict[str, Instant] = {}
    with machine_on(directory / "first", image) as (machine, console):
        console.until(r"ready;")
        console.command("busy on")
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            tag = f"s{len(instants)}"
            instants[tag] = take_snapshot(machine, console, tag)
            if len(instants) % 6 == 0:
                console.command(f"nonce {chance.getrandbits(64) | 1:x}")
            time.sleep(chance.uniform(0.0, 0.2))
        saved = len(instants)
        say(f"{saved} snapshots saved")
        order = chance.sample(sorted(instants), saved)
        first = load_each(machine, console, order, instants)
        if sorted(first, key=lambda tag: int(tag[1:])) != sorted(
            first, key=lambda tag: (first[tag], int(tag[1:]))
        ):
            raise Loss(f"later snapshots go on with earlier beats: {first}")
        say(f"{saved} loaded in random order")
        machine.quit()
    qemu_img_check(image)
    for number, tag in enumerate(chance.sample(sorted(instants), min(3, saved))):
        with machine_on(directory / f"fresh{number}", image, "--paused") as (machine, console):
            load_each(machine, console, [tag], instants)
            console.command("busy on")
            instants[f"c{number}"] = take_snapshot(machine, console, f"c{number}")
            load_each(machine, console, [f"c{number}", tag], instants)
            machine.quit()
        qemu_img_check(image)
    say("some loaded in fresh processes, which saved again")
    delete_each(directory, image, chance, instants)
    say("all deleted in random order")


def delete_each(directory: Path, image: Path, chance: random.Random, instants: dict[str, Instant]) -> None:
    """The last ones left, and one in eight, are seen to load before the next goes."""
    order = chance.sample(sorted(instants), len(instants))
    for number, tag in enumerate(order):
        with opened(image, "root") as node:
            before = {
                s.name: node.snapshot_store.read_state(s, 0, s.state_size)
                for s in store_sample(node, chance, tag)
            }
            do_delete([node], tag)
            left = {s.name: s for s in node.snapshot_store.snapshots()}
            if left.keys() != set(order[number + 1 :]):
                raise Loss(f"{sorted(left)} are left instead of {order[number + 1 :]}")
            for name, state in before.items():
                if node.snapshot_store.read_state(left[name], 0, left[name].state_size) != state:
                    raise Loss(f"the deletion of {tag} has changed the state of {name}")
        qemu_img_check(image)
        if number + 1 < len(order) and (number % 12 == 5 or number + 2 == len(order)):
            with machine_on(directory / f"left{number}", image, "--paused") as (machine, console):
                rest = order[number + 1 :]
                load_each(machine, console, chance.sample(rest, min(2, len(rest))), instants)
                machine.quit()


def store_sample(node: Qcow2Node, chance: random.Random, but: str) -> list[SnapshotInfo]:
    """Two snapshots of an image, not the one of that name."""
    others = [each for each in node.snapshot_store.snapshots() if each.name != but]
    return chance.sample(others, min(2, len(others)))


def main() -> int:
    """The long form."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of saving; all of it takes about twice that"
    )
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    asked = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="stillframe-storm-"))
    print(f"seed {asked.seed}, in {directory}, which stays if something is lost", flush=True)
    storm(directory, random.Random(asked.seed), asked.seconds, lambda text: print(text, flush=True))
    for path in sorted(directory.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    directory.rmdir()
    return 0


if __name__ == "__main__":
    sys.exit(main())
