"""`stillframe demo`: the main job, end to end, on the bundled guest; every claim is proven by value.

A machine is started as a user would start it, as a process of its own, and spoken with over its monitor's socket and its
serial console alone. It has two block nodes: `root`, a qcow2 disk, and `vars`, raw and writable, in a flash device, as the
variable store of a UEFI guest is.
"""

import asyncio
import json
import os
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from stillframe.cli.guest_console import GuestConsole
from stillframe.client import Client
from stillframe.data import bundled_guest
from stillframe.errors import Failed, PeerError, StillframeError

_DISK_SIZE = 64 << 20
_FLASH_BANK_SIZE = 32 << 20
_FLASH_OFFSET = 0x1000
_DISK_SECTOR = 100_000
_START_SECONDS = 30.0
_HEARTBEATS = 3

# What is on the disk and in the flash at the snapshot, and what is written over it afterwards.
_DISK_BEFORE, _DISK_AFTER = 0x5EEDF00D0000BEEF, 0x0BAD0BAD0BAD0BAD
_FLASH_BEFORE, _FLASH_AFTER = 0x5717F8A3, 0x00170000


@dataclass(frozen=True, slots=True)
class Proof:
    """One line of the table.

    :param seen: the values that were compared. :param seconds: how long the step took.
    """

    claim: str
    seen: str
    seconds: float


class Refuted(Failed):
    """A claim did not hold."""


class Demo:
    """The story, told step by step to `tell`; each step appends to `proofs` or raises `Refuted`."""

    def __init__(
        self, client: Client, console: GuestConsole, root_path: Path, vars_path: Path, *, quiet: bool
    ) -> None:
        self._client = client
        self._console = console
        self._root = root_path
        self._vars = vars_path
        self._quiet = quiet
        self.proofs: list[Proof] = []
        self._started = time.monotonic()

    def _tell(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)
        self._started = time.monotonic()

    def _prove(self, holds: bool, claim: str, seen: str) -> None:
        seconds = time.monotonic() - self._started
        if not holds:
            raise Refuted(f"Not proven: {claim}. Seen: {seen}")
        self.proofs.append(Proof(claim, seen, seconds))
        if not self._quiet:
            click.echo(f"  proven: {claim}: {seen}")
        self._started = time.monotonic()

    async def tell_all(self) -> None:
        """The whole story."""
        console, client = self._console, self._client
        self._tell("A guest boots; its nonce lives in its memory alone.")
        await console.until("ready;", _START_SECONDS)
        await console.heartbeats(_HEARTBEATS)
        status = await console.command("status")
        self._prove(
            status["bad"] == "0" and int(status["hb"]) > 0,
            "the guest runs and finds its memory, devices and disk right",
            f"heartbeat {status['hb']}, bad={status['bad']}, nonce={status['nonce']}",
        )

        self._tell(
            "It writes values to disk and flash, and is saved: state and disk into `root`, `vars` left out."
        )
        await console.command(f"disk write {_DISK_SECTOR} {_DISK_BEFORE:x}")
        await console.command(f"flash erase {_FLASH_OFFSET:x}")
        await console.command(f"flash write {_FLASH_OFFSET:x} {_FLASH_BEFORE:x}")
        await console.command("hold")
        memory = (await console.command("sum"))["sum"]
        before = await console.command("status")
        allocated = self._allocated()
        job = await client.save("demo", vmstate="root", devices=["root"])
        took = time.monotonic() - self._started
        first = self._allocated() - allocated
        await console.heartbeats(_HEARTBEATS)
        saved = await console.command("status")
        self._prove(
            int(saved["hb"]) >= int(before["hb"])
            and saved["bad"] == "0"
            and await client.status() == "running",
            "snapshot-save took the machine and the guest went on",
            f"{job.total >> 20} MiB in {took:.2f} s, heartbeat {before['hb']} before and {saved['hb']} after",
        )

        self._tell("The guest goes on, then everything is wrecked: memory, registers, disk, flash.")
        await console.command("go")
        await console.heartbeats(_HEARTBEATS)
        await console.command(f"disk write {_DISK_SECTOR} {_DISK_AFTER:x}")
        await console.command(f"flash erase {_FLASH_OFFSET:x}")
        await console.command(f"flash write {_FLASH_OFFSET:x} {_FLASH_AFTER:x}")
        await console.command("wreck")
        wrecked = await console.command("check")
        disk = (await console.command(f"disk read {_DISK_SECTOR}"))["value"]
        flash = self._flash_on_host()
        self._prove(
            int(wrecked["bad"]) > 0 and int(disk, 16) == _DISK_AFTER and flash == _FLASH_AFTER,
            "the wreck is real: the guest finds itself broken",
            f"bad={wrecked['bad']}, disk {disk}, flash file {flash:08x}",
        )
        late = await console.command("status")

        self._tell("The snapshot is loaded.")
        await client.load("demo", vmstate="root", devices=["root"])
        took = time.monotonic() - self._started
        back = await console.command("status")
        self._prove(
            back["nonce"] == status["nonce"] and back["boot"] == status["boot"],
            "it is the same guest, not a rebooted one",
            f"nonce={back['nonce']}, boot {back['boot']}, loaded in {took:.2f} s",
        )
        self._prove(
            int(before["hb"]) <= int(back["hb"]) < int(late["hb"]),
            "its devices are back: timer and heartbeat go on from the snapshot",
            f"heartbeat {back['hb']}, was {late['hb']} at the wreck and {before['hb']} at the save",
        )
        restored = (await console.command("sum"))["sum"]
        self._prove(restored == memory, "its memory is back, every page", f"checksum {restored}")
        disk = (await console.command(f"disk read {_DISK_SECTOR}"))["value"]
        self._prove(int(disk, 16) == _DISK_BEFORE, "its disk is back", f"sector {_DISK_SECTOR} holds {disk}")
        inside = (await console.command(f"flash read {_FLASH_OFFSET:x}"))["value"]
        flash = self._flash_on_host()
        self._prove(
            int(inside, 16) == _FLASH_BEFORE == flash,
            "the flash is machine state: written back to `vars`, though it was not among the devices",
            f"guest reads {inside}, the file on the host holds {flash:08x}",
        )
        checked = await console.command("check")
        self._prove(
            checked["bad"] == "0",
            "the guest checks everything again and finds it right",
            f"bad={checked['bad']}",
        )

        self._tell("The guest works on, and a second snapshot is saved.")
        await console.command("go")
        await console.heartbeats(_HEARTBEATS)
        allocated = self._allocated()
        await client.save("later", vmstate="root", devices=["root"])
        second = self._allocated() - allocated
        self._prove(
            second < first / 2,
            "a second snapshot writes what changed, not the memory once more",
            f"{first >> 10} KiB for the first, {second >> 10} KiB for this one",
        )

        self._tell("A raw node cannot keep a snapshot: asked for, it is refused, and nothing is touched.")
        refusal = await self._refused(client.save("both", vmstate="root", devices=["root", "vars"]))
        self._prove(
            "'vars'" in refusal and await client.status() == "running",
            "devices [root, vars] is refused by name and the guest goes on",
            refusal,
        )

        self._tell("The first snapshot is deleted; the later one, which shares its state, is loaded.")
        await client.delete("demo", devices=["root"])
        await client.load("later", vmstate="root", devices=["root"])
        gone = await self._refused(client.load("demo", vmstate="root", devices=["root"]))
        await console.command("check")
        await console.heartbeats(_HEARTBEATS)
        last = await console.command("status")
        self._prove(
            last["bad"] == "0" and await client.status() == "running",
            "snapshot-delete took the first off the image, and the later one is whole without it",
            f"{gone}; heartbeat {last['hb']}, bad={last['bad']}",
        )

    async def _refused(self, job: Coroutine[Any, Any, object]) -> str:
        try:
            await job
        except PeerError as error:
            return str(error)
        raise Refuted("Not proven: it should have been refused, and was not")

    def _allocated(self) -> int:
        """Bytes that the image takes on the host's disk."""
        return self._root.stat().st_blocks * 512

    def _flash_on_host(self) -> int:
        with self._vars.open("rb") as file:
            file.seek(_FLASH_OFFSET)
            return int(struct.unpack("<I", file.read(4))[0])


def _make_images(directory: Path) -> tuple[Path, Path]:
    from stillframe.block.create import create_qcow2

    root, flash = directory / "root.qcow2", directory / "vars.raw"
    create_qcow2(str(root), _DISK_SIZE)
    with flash.open("xb") as file:
        file.truncate(_FLASH_BANK_SIZE)
    return root, flash


def _machine_command(directory: Path, root: Path, flash: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "stillframe", "run"),
        *("--memory", "64M", "--kernel", str(bundled_guest())),
        *("--blockdev", f"driver=qcow2,node-name=root,file.driver=file,file.filename={root}"),
        *("--blockdev", f"driver=raw,node-name=vars,file.driver=file,file.filename={flash}"),
        *("--device", "virtio-blk,drive=root", "--flash", "vars"),
        *("--qmp", f"unix:{directory / 'qmp.sock'}", "--console", f"unix:{directory / 'console.sock'}"),
    ]


async def _run(directory: Path, *, quiet: bool) -> list[Proof]:
    root, flash = _make_images(directory)
    command = _machine_command(directory, root, flash)
    if not quiet:
        click.echo(f"$ {' '.join(command)}\n")
    machine = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL)
    try:
        await _until_listening(machine, directory / "qmp.sock")
        async with Client(f"unix:{directory / 'qmp.sock'}") as client:
            async with GuestConsole(directory / "console.sock") as console:
                demo = Demo(client, console, root, flash, quiet=quiet)
                await demo.tell_all()
            await client.quit()
        await asyncio.wait_for(machine.wait(), _START_SECONDS)
    finally:
        if machine.returncode is None:
            machine.send_signal(signal.SIGTERM)
            try:
                await asyncio.wait_for(machine.wait(), 10)
            except TimeoutError:
                machine.kill()
                await machine.wait()
    return [*demo.proofs, await _image_proof(root)]


async def _until_listening(machine: asyncio.subprocess.Process, path: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not path.exists():
        if machine.returncode is not None:
            raise Failed(f"The machine ended at its start, with exit status {machine.returncode}")
        if time.monotonic() > deadline:
            raise Failed(f"The machine did not listen within {_START_SECONDS:.0f} s")
        await asyncio.sleep(0.02)


async def _image_proof(root: Path) -> Proof:
    started = time.monotonic()
    checks: list[tuple[str, Sequence[str]]] = [
        ("stillframe image check", (sys.executable, "-m", "stillframe", "image", "check", str(root)))
    ]
    if stock := shutil.which("qemu-img"):
        checks.append(("qemu-img check", (stock, "check", str(root))))
    for name, command in checks:
        check = await asyncio.create_subprocess_exec(
            *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        output, _ = await check.communicate()
        if check.returncode:
            raise Refuted(
                f"Not proven: the image is clean. {name}: {output.decode(errors='replace').strip()}"
            )
    words = " and ".join(name for name, _ in checks)
    return Proof("the image left behind is clean", words, time.monotonic() - started)


def _print_table(proofs: Sequence[Proof], seconds: float) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    grid = Table("proven", "seen", title=f"{len(proofs)} proofs in {seconds:.1f} s", title_justify="left")
    grid.add_column("took", justify="right", no_wrap=True)
    for proof in proofs:
        grid.add_row(escape(proof.claim), escape(proof.seen), f"{proof.seconds:.2f} s")
    width = None if sys.stdout.isatty() else 132
    Console(width=width, highlight=False).print(grid)


@click.command(
    epilog="""\b
EXAMPLES
  stillframe demo
  stillframe demo --keep /tmp/demo     # keep the images to look at

\b
EXIT CODES
  0  every proof held
  1  one did not; it is named"""
)
@click.option("--json", "as_json", is_flag=True, help="For programs: the proofs as a list.")
@click.option("--keep", "keep", metavar="DIRECTORY", help="Work there, and leave the images behind.")
def demo(as_json: bool, keep: str | None) -> None:
    """The main job, end to end: a guest is saved, wrecked and brought back, with proofs."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="stillframe-demo-") as temporary:
        directory = Path(keep).absolute() if keep else Path(temporary)
        if keep:
            try:
                os.makedirs(directory, exist_ok=True)
            except OSError as error:
                raise Failed(f"Could not make '{directory}': {error.strerror}") from error
        try:
            proofs = asyncio.run(_run(directory, quiet=as_json))
        except StillframeError as error:
            raise SystemExit(_refuted(error)) from error
    if as_json:
        click.echo(json.dumps([asdict(proof) for proof in proofs], indent=4))
    else:
        _print_table(proofs, time.monotonic() - started)


def _refuted(error: StillframeError) -> int:
    click.echo(f"stillframe demo: {error}", err=True)
    return 1
