"""`make stress`: a machine under load, killed with SIGKILL at random moments, over and over; ends at the first loss.

Each round starts `stillframe run` in a process of its own, from a snapshot or from the disk as it is, lets the bundled guest
work on memory and disk, writes sectors through its console, saves, loads and deletes snapshots at random, and kills it. Then,
of the image as it was left:

    it opens, and says that every acknowledged write is there; our check and qemu-img's find it whole once leaks are repaired
    every snapshot that was acknowledged is there, and every one seen before has the same disk and machine state, by SHA-256
    every sector that the guest was told is written reads back, flushed or not
    the next round's load in a fresh process works, and the guest finds nothing wrong with itself

It prints a line a round. At a loss the directory is kept, with the image and the record as they were left by the kill.
"""

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from peers import peer
from running import RunningMachine, stillframe
from stillframe.block.file import FileNode
from stillframe.block.qcow2 import Qcow2Node, create_image, unflushed
from stillframe.block.qcow2.check import check

DISK = 32 << 20
SECTOR = 512
FIRST_SECTOR = DISK // SECTOR // 2
SECTORS = 4096
MOST_SNAPSHOTS = 6

Sectors = dict[int, set[int]]
"""What each sector may hold: one value, or more while a write is under way."""


class Loss(AssertionError):
    """Something is not there that should be."""


@dataclass
class Saved:
    """A snapshot.

    :ivar digests: of disk and machine state, once they were seen.
    """

    sectors: Sectors
    nonce: str = ""
    digests: tuple[str, str] | None = None


@dataclass
class Story:
    """What may be found, and what has been done so far."""

    sectors: Sectors = field(default_factory=dict)
    snapshots: dict[str, Saved] = field(default_factory=dict)
    saving: tuple[str, Saved] | None = None
    deleting: tuple[str, Saved] | None = None
    loading: Sectors | None = None
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str, number: int = 1) -> None:
        self.counts[what] = self.counts.get(what, 0) + number


class Life:
    """One process, from its start to the kill."""

    def __init__(
        self, machine: RunningMachine, story: Story, chance: random.Random, round_number: int
    ) -> None:
        self.machine = machine
        self.story = story
        self.chance = chance
        self.round = round_number
        self.killed = threading.Event()
        self.errors: list[BaseException] = []
        self._console = threading.Lock()
        self._changing = threading.Lock()

    def command(self, text: str) -> str:
        with self._console:
            self.machine.console.type(text + "\n")
            found = self.machine.console.until(r"^(ok|error:)[^\r\n]*\r?\n").group(0).strip()
        if found.startswith("error:"):
            raise Loss(f"the guest answered {text!r} with {found!r}")
        return found

    def live(self, seconds: float) -> None:
        """Work until the kill."""
        threads = [threading.Thread(target=self._run, args=(work,)) for work in (self.write, self.operate)]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and not self.errors:
            time.sleep(0.005)
        self.killed.set()
        self.machine.kill()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def _run(self, work) -> None:  # type: ignore[no-untyped-def]
        try:
            while not self.killed.is_set():
                work()
        except BaseException as error:
            if not self.killed.is_set() and self.machine.process.poll() is None:
                self.errors.append(error)

    def write(self) -> None:
        """A sector through the console, now and then a flush."""
        if self.chance.random() < 0.03:
            self.command("disk flush")
            self.story.count("flushes")
            return
        sector = FIRST_SECTOR + self.chance.randrange(SECTORS) * 8
        value = random.getrandbits(60) | 1
        with self._changing:
            places = [self.story.sectors, *([self.story.saving[1].sectors] if self.story.saving else [])]
            for sectors in places:
                sectors.setdefault(sector, {0}).add(value)
            self.command(f"disk write {sector} {value:x}")
            self.story.sectors[sector] = {value}
        self.story.count("writes")

    def operate(self) -> None:
        """One operation on snapshots."""
        story = self.story
        what = self.chance.random()
        if what < 0.5 and len(story.snapshots) < MOST_SNAPSHOTS:
            tag = f"s{self.round}-{story.counts.get('saves', 0)}"
            nonce = self.nonce()
            with self._changing:
                saved = Saved({sector: set(values) for sector, values in story.sectors.items()}, nonce)
                story.saving = (tag, saved)
            self.machine.save(tag)
            with self._changing:
                story.snapshots[tag], story.saving = saved, None
            story.count("saves")
        elif what < 0.75 and story.snapshots:
            tag = self.chance.choice(sorted(story.snapshots))
            with self._changing:
                saved = story.snapshots[tag]
                story.loading = saved.sectors
                self.machine.load(tag)
                story.sectors = {sector: set(values) for sector, values in saved.sectors.items()}
                story.loading = None
                self.healthy(saved)
            story.count("loads")
        elif story.snapshots:
            tag = self.chance.choice(sorted(story.snapshots))
            with self._changing:
                story.deleting = (tag, story.snapshots.pop(tag))
            self.machine.delete(tag)
            story.deleting = None
            story.count("deletes")

    def nonce(self) -> str:
        return self.command("nonce").rpartition("=")[2]

    def healthy(self, saved: Saved) -> None:
        """The guest is the one that was saved, and finds nothing wrong."""
        # It may have been saved with half a line typed, which must not become a command.
        with self._console:
            self.machine.console.type("?\nnonce\n")
            self.machine.console.until(r"^ok nonce=")
            self.machine.console.until(r"\n")
        if self.nonce() != saved.nonce:
            raise Loss("another guest than the one that was saved")
        found = self.command("check")
        if " bad=0 " not in f"{found} ":
            raise Loss(f"after a load the guest says {found!r}: {self.command('status')}")


def start(directory: Path, image: Path, *words: str) -> RunningMachine:
    blockdev = f"driver=qcow2,node-name=root,file.driver=file,file.filename={image}"
    return RunningMachine(
        directory, "--memory", "64M", "--kernel", "bundled", "--append", "mb=8 dirty=64 period=20 quiet=1",
        "--blockdev", blockdev, "--device", "virtio-blk,drive=root", *words,
    )  # fmt: skip


def one_round(directory: Path, image: Path, story: Story, chance: random.Random, number: int) -> str:
    """:return: what is to be printed. :raise Loss: something was lost."""
    tag = chance.choice(sorted(story.snapshots)) if story.snapshots and chance.random() < 0.6 else None
    machine_directory = directory / "machine"
    shutil.rmtree(machine_directory, ignore_errors=True)
    with start(machine_directory, image, *(["--paused"] if tag else [])) as machine:
        life = Life(machine, story, chance, number)
        if tag:
            saved = story.snapshots[tag]
            machine.load(tag)
            story.sectors = {sector: set(values) for sector, values in saved.sectors.items()}
            machine.execute("cont")
            life.healthy(saved)
            story.count("loads in a fresh process")
        else:
            machine.console.until("ready;")
        life.command("busy on")
        life.live(chance.uniform(0.05, 3.0))
    keep_evidence(directory, image)
    outcome = examine(directory, image, story)
    return f"from {tag or 'the disk'}: {outcome}"


def keep_evidence(directory: Path, image: Path) -> None:
    """Image and record as the kill has left them."""
    subprocess.run(["cp", "--sparse=always", str(image), str(directory / "left.qcow2")], check=True)
    about = image.stat()
    record = Path(unflushed._directory_path()) / f"{about.st_dev:x}-{about.st_ino:x}.unflushed"
    (directory / "left.unflushed").unlink(missing_ok=True)
    if record.exists():
        shutil.copyfile(record, directory / "left.unflushed")


def examine(directory: Path, image: Path, story: Story) -> str:
    """The image as it was left; see the module's text. :return: what its opening found."""
    with opened(image) as node:
        recovery = node.image.recovery
        assert recovery is not None
        if not recovery.is_complete:
            raise Loss(f"writes may be lost: {recovery}")
        names = {each.name for each in node.snapshot_store.snapshots()}
        disk = node.read(0, DISK)
        states = {
            each.name: hashlib.sha256(node.snapshot_store.read_state(each, 0, each.state_size)).hexdigest()
            for each in node.snapshot_store.snapshots()
        }
        found = check(node._file)
        if found.corruptions:
            raise Loss(f"corrupt: {found.messages[:5]}")
    settle_sectors(disk, story)
    settle_snapshots(names, story)
    for name, saved in story.snapshots.items():
        raw = directory / "snapshot.raw"
        run("convert", "-f", "qcow2", "-l", f"snapshot.name={name}", "-O", "raw", str(image), str(raw))
        data = raw.read_bytes()
        digests = (hashlib.sha256(data).hexdigest(), states[name])
        if saved.digests not in (None, digests):
            raise Loss(f"snapshot {name} is not what it was")
        saved.digests = digests
        # What it may hold stays as it was: a guest that was saved before it came to write does so after each load.
        settled(data, saved.sectors, f"snapshot {name}")
    repaired = stillframe("image", "check", "--repair", "leaks", str(image))
    if repaired.returncode:
        raise Loss(f"image check --repair leaks: {repaired.stdout}{repaired.stderr}")
    run("check", str(image))
    story.count("replayed", recovery.entries)
    return (
        f"{recovery.outcome.value} ({recovery.entries} entries), {len(names)} snapshots, {found.leaks} leaks"
    )


def settle_sectors(disk: bytes, story: Story) -> None:
    try:
        story.sectors = settled(disk, story.sectors, "the disk")
    except Loss:
        if story.loading is None:
            raise
        story.sectors = settled(disk, story.loading, "the disk, of which a load was under way,")
    story.loading = None


def settled(disk: bytes, sectors: Sectors, what: str) -> Sectors:
    """What the sectors do hold. :raise Loss: something else than they may."""
    result: Sectors = {}
    for sector, values in sectors.items():
        data = disk[sector * SECTOR : (sector + 1) * SECTOR]
        value = int.from_bytes(data[:8], "little")
        if data != value.to_bytes(8, "little") * (SECTOR // 8) or value not in values:
            raise Loss(f"{what} holds {data[:16].hex()} in sector {sector}, and not one of {values}")
        result[sector] = {value}
    return result


def settle_snapshots(names: set[str], story: Story) -> None:
    under_way = [each for each in (story.saving, story.deleting) if each is not None]
    for name, saved in under_way:
        if name in names:
            story.snapshots[name] = saved
    story.saving = story.deleting = None
    if names != story.snapshots.keys():
        raise Loss(f"snapshots {sorted(names)} instead of {sorted(story.snapshots)}")


def run(*words: str) -> None:
    done = subprocess.run([peer("qemu-img"), *words], capture_output=True, text=True)
    if done.returncode:
        raise Loss(f"qemu-img {' '.join(words)}: {done.stdout}{done.stderr}")


@contextlib.contextmanager
def opened(image: Path) -> Iterator[Qcow2Node]:
    file = FileNode("file", str(image))
    try:
        node = Qcow2Node("node", file)
        try:
            yield node
        finally:
            node.close()
    finally:
        file.close()


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="how long; without both, ten minutes")
    parser.add_argument("--rounds", type=int, help="how many kills")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "big"))
    parser.add_argument("--directory", type=Path, help="where images and evidence go")
    options = parser.parse_args()
    if options.minutes is None and options.rounds is None:
        options.minutes = 10.0
    directory = options.directory or Path(tempfile.mkdtemp(prefix="stillframe-stress-"))
    directory.mkdir(parents=True, exist_ok=True)
    image = directory / "root.qcow2"
    file = FileNode.create("file", str(image), replace=True)
    create_image(file, DISK)
    file.close()
    chance, story = random.Random(options.seed), Story()
    print(f"seed {options.seed}, in {directory}", flush=True)
    begun = time.monotonic()
    number = 0
    while (options.rounds is None or number < options.rounds) and (
        options.minutes is None or time.monotonic() - begun < options.minutes * 60
    ):
        number += 1
        try:
            said = one_round(directory, image, story, chance, number)
        except (Exception, KeyboardInterrupt) as error:
            print(
                f"round {number}: {type(error).__name__}: {error}\nevidence: {directory}, seed {options.seed}",
                flush=True,
            )
            return 1
        print(f"round {number}, {time.monotonic() - begun:.0f} s, {said}", flush=True)
    print(
        f"{number} kills, nothing lost: "
        + ", ".join(f"{value} {key}" for key, value in sorted(story.counts.items()))
    )
    if options.directory is None:
        shutil.rmtree(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
