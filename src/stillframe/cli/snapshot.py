"""`stillframe save`, `load`, `delete`, `list`: the snapshots of a machine that runs."""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any, TypeVar

import click

from stillframe.cli.present import read_size, table
from stillframe.cli.progress import progress_bar
from stillframe.cli.selection import Selection, describe, select_for_save, select_with_tag
from stillframe.cli.target import converse, qmp_option, split_words
from stillframe.client import Client, JobState, ProgressListener
from stillframe.text import format_date, format_size, printable

Command = TypeVar("Command", bound=Callable[..., Any])

_JSON = click.option(
    "--json", "as_json", is_flag=True, help="For programs: one JSON object on standard output."
)
_JOB_ID = click.option("--job-id", help="The job's id; chosen where it is left out.")


def _devices_option(command: Command) -> Command:
    return click.option(
        "--devices",
        metavar="A,B",
        help="The nodes, by node-name; left out, those of the guest's devices that can be snapshotted.",
    )(command)


def _vmstate_option(command: Command) -> Command:
    return click.option(
        "--vmstate", metavar="NODE", help="The node that holds the machine state; one of the devices."
    )(command)


def _speed_option(command: Command) -> Command:
    return click.option(
        "--speed",
        metavar="SIZE",
        callback=read_size,
        help="At most so many bytes of machine state a second, as 50M; the guest is not held.",
    )(command)


def _names(text: str | None) -> tuple[str, ...]:
    """None of them where the option was left out; an empty list is not that, but a script's empty variable."""
    if text is None:
        return ()
    names = tuple(text.split(","))
    if not all(names):
        raise click.UsageError(f"--devices '{text}' has an empty name: write A,B, or leave the option out")
    return names


def _tell_selection(selection: Selection, *, quiet: bool) -> None:
    if quiet:
        return
    for name, reason in selection.left_out:
        click.echo(printable(f"left out: '{name}': {reason}"), err=True)


def _tell_end(what: str, selection: Selection, job: JobState, seconds: float, *, as_json: bool) -> None:
    if as_json:
        outcome = {
            **describe(selection),
            "job": {
                "id": job.id,
                "type": job.type,
                "bytes": job.total,
                "choices": [asdict(choice) for choice in job.choices],
            },
            "seconds": round(seconds, 6),
        }
        click.echo(json.dumps(outcome, indent=4))
        return
    size = f", {format_size(job.total)}" if job.total > 1 else ""
    click.echo(printable(f"{what} on {', '.join(selection.devices)}{size} in {seconds:.2f} s"))
    for choice in job.choices:
        why = f" ({choice.why})" if choice.why else ""
        click.echo(printable(f"  {choice.what}: {choice.chosen}{why}"))


def _see_through(
    target: str,
    doing: str,
    done: str,
    choose: Callable[[Client], Awaitable[Selection]],
    run: Callable[[Client, Selection, ProgressListener | None], Awaitable[JobState]],
    *,
    as_json: bool,
) -> None:
    """Choose the nodes, say which are left out, run the job beside a progress bar, and tell its end."""

    async def talk(client: Client) -> None:
        selection = await choose(client)
        _tell_selection(selection, quiet=as_json)
        started = time.monotonic()
        with progress_bar(doing, shown=not as_json) as listener:
            try:
                job = await run(client, selection, listener)
            except asyncio.CancelledError as interruption:
                for note in getattr(interruption, "__notes__", ()):
                    click.echo(printable(f"stillframe: {note}"), err=True)
                raise
        _tell_end(done, selection, job, time.monotonic() - started, as_json=as_json)

    converse(target, talk)


@click.command(
    epilog="""\b
EXAMPLES
  stillframe save box before-upgrade
  stillframe save box clean --devices root,vars --vmstate root
  stillframe save --qmp unix:/run/vm/qmp.sock clean --json
  stillframe save box nightly --speed 50M --job-id night
  stillframe qmp box block-job-set-speed device=night speed=0

The last one lifts the limit while the job is at work. Ctrl-C cancels the job; nothing of it is left
behind, and the guest goes on."""
)
@click.argument("words", nargs=-1, metavar="[NAME] TAG")
@qmp_option
@_devices_option
@_vmstate_option
@_speed_option
@click.option(
    "--quiesce",
    type=click.Choice(["required", "try"]),
    help="Freeze the guest's file systems for the instant, through its agent; with `try` go on without.",
)
@_JOB_ID
@_JSON
def save(
    words: tuple[str, ...],
    address: str | None,
    devices: str | None,
    vmstate: str | None,
    speed: int | None,
    quiesce: str | None,
    job_id: str | None,
    as_json: bool,
) -> None:
    """Take a snapshot of a machine: memory, devices and disks."""
    target, tag = split_words(words, address, "TAG")
    names = _names(devices)
    _see_through(
        target,
        f"Saving {tag}",
        f"Saved '{tag}'",
        lambda client: select_for_save(client, names, vmstate),
        lambda client, chosen, listener: client.save(
            tag,
            vmstate=chosen.home,
            devices=chosen.devices,
            speed=speed or 0,
            quiesce=quiesce,
            job_id=job_id,
            progress=listener,
        ),
        as_json=as_json,
    )


@click.command(
    epilog="""\b
EXAMPLES
  stillframe load box before-upgrade
  stillframe load box clean --devices root --vmstate root
  stillframe load box before-upgrade --eager
  stillframe load box before-upgrade --speed 50M
  stillframe load box before-upgrade --replace

The guest runs as soon as its devices are restored, and its memory comes while it does; the command ends
when all has come. Ctrl-C cancels a load until the guest runs; from then on the command waits for its
end, and a second Ctrl-C leaves it to itself. What the machine does now is lost. A flash device's content
is part of the machine state: it is written back to its node, also where that node is not among the
devices.

With --engine qemu two QEMUs are there for a moment. Where the host has no memory for both, or both
would listen at one address, --replace does it with one at a time: the snapshot is read as a whole
first; but if the other QEMU then refuses it, there is no guest to go back to."""
)
@click.argument("words", nargs=-1, metavar="[NAME] TAG")
@qmp_option
@_devices_option
@_vmstate_option
@click.option(
    "--eager", is_flag=True, help="The guest runs only when all of its memory is there, as with QEMU."
)
@click.option(
    "--replace",
    is_flag=True,
    help="End a QEMU's guest before the one that goes on is started; if that fails, it is gone.",
)
@_speed_option
@_JOB_ID
@_JSON
def load(
    words: tuple[str, ...],
    address: str | None,
    devices: str | None,
    vmstate: str | None,
    eager: bool,
    replace: bool,
    speed: int | None,
    job_id: str | None,
    as_json: bool,
) -> None:
    """Bring a snapshot back: the machine goes on from there."""
    target, tag = split_words(words, address, "TAG")
    names = _names(devices)
    _see_through(
        target,
        f"Loading {tag}",
        f"Loaded '{tag}'",
        lambda client: select_with_tag(client, tag, names, vmstate, needs_state=True),
        lambda client, chosen, listener: client.load(
            tag,
            vmstate=chosen.home,
            devices=chosen.devices,
            eager=eager,
            replace=replace,
            speed=speed or 0,
            job_id=job_id,
            progress=listener,
        ),
        as_json=as_json,
    )


@click.command(
    epilog="""\b
EXAMPLES
  stillframe delete box before-upgrade
  stillframe delete box clean --devices root"""
)
@click.argument("words", nargs=-1, metavar="[NAME] TAG")
@qmp_option
@_devices_option
@_JOB_ID
@_JSON
def delete(
    words: tuple[str, ...], address: str | None, devices: str | None, job_id: str | None, as_json: bool
) -> None:
    """Delete a snapshot; its space is given back."""
    target, tag = split_words(words, address, "TAG")
    names = _names(devices)
    _see_through(
        target,
        f"Deleting {tag}",
        f"Deleted '{tag}'",
        lambda client: select_with_tag(client, tag, names, None, needs_state=False),
        lambda client, chosen, listener: client.delete(
            tag, devices=chosen.devices, job_id=job_id, progress=listener
        ),
        as_json=as_json,
    )


@click.command(
    "list",
    epilog="""\b
EXAMPLES
  stillframe list box
  stillframe list box --json
  stillframe list --qmp tcp:127.0.0.1:4444""",
)
@click.argument("words", nargs=-1, metavar="[NAME]")
@qmp_option
@_JSON
def list_snapshots(words: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """The snapshots of a machine, over all of its nodes."""
    (target,) = split_words(words, address)

    async def talk(client: Client) -> list[dict[str, Any]]:
        return _by_tag(await client.execute("query-named-block-nodes", {"flat": True}))

    found = converse(target, talk)
    if as_json:
        click.echo(json.dumps(found, indent=4))
    elif not found:
        click.echo("There is no snapshot.")
    else:
        rows = [
            (
                each["tag"],
                ", ".join(node["node-name"] for node in each["nodes"]),
                f"{format_size(each['vm-state-size'])} on {each['vmstate']}"
                if each["vmstate"]
                else "none: disks only",
                format_date(each["date-sec"]),
            )
            for each in found
        ]
        click.echo(table(("TAG", "NODES", "STATE", "DATE"), rows))


def _by_tag(nodes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a tag, oldest first; `nodes` as `query-named-block-nodes` lists them, newest first."""
    found: dict[str, dict[str, Any]] = {}
    for node in reversed(nodes):
        for snapshot in node.get("image", {}).get("snapshots", []):
            entry = found.setdefault(
                snapshot["name"],
                {"tag": snapshot["name"], "vmstate": None, "vm-state-size": 0, "date-sec": 0, "nodes": []},
            )
            entry["nodes"].append({"node-name": node["node-name"], **snapshot})
            entry["date-sec"] = max(entry["date-sec"], snapshot["date-sec"])
            if snapshot["vm-state-size"]:
                entry["vmstate"] = node["node-name"]
                entry["vm-state-size"] = snapshot["vm-state-size"]
    return sorted(found.values(), key=lambda entry: entry["date-sec"])
