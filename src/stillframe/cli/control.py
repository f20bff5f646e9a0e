"""`stillframe jobs`, `cancel`, `stop`, `cont`, `quit`: short words for a machine that runs."""

import json
from dataclasses import asdict

import click

from stillframe.cli.present import table
from stillframe.cli.target import converse, qmp_option, split_words
from stillframe.client import Client


@click.command(
    epilog="""\b
EXAMPLES
  stillframe jobs box
  stillframe jobs box --json
  stillframe qmp box job-dismiss id=j0

A job stays on the list, as concluded, until whoever started it dismisses it: the commands here do
that themselves, unless they are killed."""
)
@click.argument("words", nargs=-1, metavar="[NAME]")
@qmp_option
@click.option("--json", "as_json", is_flag=True, help="For programs: a list of jobs.")
def jobs(words: tuple[str, ...], address: str | None, as_json: bool) -> None:
    """The jobs of a machine, newest first."""
    (target,) = split_words(words, address)
    found = converse(target, Client.jobs)
    if as_json:
        click.echo(json.dumps([asdict(job) for job in found], indent=4))
    elif not found:
        click.echo("There is no job.")
    else:
        rows = [(job.id, job.type, job.status, f"{job.done}/{job.total}", job.error or "") for job in found]
        click.echo(table(("ID", "TYPE", "STATUS", "DONE", "ERROR"), rows))


@click.command(
    epilog="""\b
EXAMPLES
  stillframe cancel box job0"""
)
@click.argument("words", nargs=-1, metavar="[NAME] JOB")
@qmp_option
def cancel(words: tuple[str, ...], address: str | None) -> None:
    """Cancel a job; what it had done is undone."""
    target, job = split_words(words, address, "JOB")
    converse(target, lambda client: client.execute("job-cancel", {"id": job}))


@click.command(
    epilog="""\b
EXAMPLES
  stillframe stop box"""
)
@click.argument("words", nargs=-1, metavar="[NAME]")
@qmp_option
def stop(words: tuple[str, ...], address: str | None) -> None:
    """Pause the guest."""
    (target,) = split_words(words, address)
    converse(target, Client.stop)


@click.command(
    epilog="""\b
EXAMPLES
  stillframe cont box"""
)
@click.argument("words", nargs=-1, metavar="[NAME]")
@qmp_option
def cont(words: tuple[str, ...], address: str | None) -> None:
    """Let the guest go on."""
    (target,) = split_words(words, address)
    converse(target, Client.cont)


@click.command(
    epilog="""\b
EXAMPLES
  stillframe quit box"""
)
@click.argument("words", nargs=-1, metavar="[NAME]")
@qmp_option
def quit(words: tuple[str, ...], address: str | None) -> None:
    """End the machine at once, as pulling its plug would; its images stay consistent."""
    (target,) = split_words(words, address)
    converse(target, Client.quit)
