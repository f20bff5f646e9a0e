"""`stillframe qmp`: one command of the monitor, or a shell on it."""

import asyncio
import json
import shlex
import sys
import threading
from collections.abc import Sequence
from typing import Any

import click

from stillframe.cli.target import converse, qmp_option
from stillframe.client import Client, QmpEvent
from stillframe.errors import InvalidRequest, PeerError


@click.command(
    context_settings={"ignore_unknown_options": True},
    epilog="""\b
EXAMPLES
  stillframe qmp box query-status
  stillframe qmp box snapshot-delete job-id=j0 tag=clean 'devices=["root"]'
  stillframe qmp box '{"execute": "query-jobs"}'
  stillframe qmp box                        # a shell; `help` lists the commands, Ctrl-D ends it
  echo query-status | stillframe qmp box    # commands from a pipe

\b
ARGUMENTS
  KEY=VALUE   VALUE is JSON if it reads as JSON, else a string; a dot in KEY makes a nested object
  {...}       the arguments as one JSON object""",
)
@click.argument("words", nargs=-1, metavar="[NAME] [COMMAND [ARGUMENT]...]")
@qmp_option
def qmp(words: tuple[str, ...], address: str | None) -> None:
    """Speak with a machine's monitor: one command, or an interactive shell."""
    if address is None:
        if not words:
            raise click.UsageError("Missing: NAME, or --qmp ADDRESS")
        address, words = words[0], words[1:]
    if words:
        request = parse_request(words)
        converse(address, lambda client: _one(client, request))
    else:
        converse(address, _shell)


def parse_request(words: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A command and its arguments from what was typed.

    :raise InvalidRequest: it cannot be read.
    """
    if len(words) == 1 and words[0].lstrip().startswith("{"):
        request = _json_object(words[0])
        command, arguments = request.get("execute"), request.get("arguments", {})
        if not isinstance(command, str) or not isinstance(arguments, dict):
            raise InvalidRequest('A request is {"execute": COMMAND, "arguments": {...}}')
        return command, arguments
    result: dict[str, Any] = {}
    for word in words[1:]:
        if word.lstrip().startswith("{"):
            result.update(_json_object(word))
            continue
        key, separator, text = word.partition("=")
        if not separator or not key:
            raise InvalidRequest(f"'{word}' is not KEY=VALUE")
        inner = result
        *path, last = key.split(".")
        for step in path:
            inner = inner.setdefault(step, {})
            if not isinstance(inner, dict):
                raise InvalidRequest(f"'{key}' goes through '{step}', which has a value already")
        inner[last] = _value(text)
    return words[0], result


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"Not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest("Not a JSON object")
    return value


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _print(value: Any) -> None:
    click.echo(json.dumps(value, indent=4))


async def _one(client: Client, request: tuple[str, dict[str, Any]]) -> None:
    command, arguments = request
    _print(await client.execute(command, arguments))


async def _shell(client: Client) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        _prepare_readline([each["name"] for each in await client.execute("query-commands")])
    async with client.events() as events:
        telling = asyncio.create_task(_tell_events(events)) if interactive else None
        try:
            while (line := await _read_line(interactive)) is not None:
                if not line.strip():
                    continue
                try:
                    await _obey(client, line)
                except (PeerError, InvalidRequest) as error:
                    if isinstance(error, PeerError) and not client.connected:
                        raise
                    click.echo(f"error: {error}", err=True)
                    if not interactive:
                        raise SystemExit(1) from error
        finally:
            if telling is not None:
                telling.cancel()


async def _obey(client: Client, line: str) -> None:
    try:
        words = [line] if line.lstrip().startswith("{") else shlex.split(line)
    except ValueError as error:
        raise InvalidRequest(f"Cannot read that: {error}") from error
    if words == ["help"]:
        names = sorted(each["name"] for each in await client.execute("query-commands"))
        click.echo("\n".join(names))
    else:
        await _one(client, parse_request(words))


async def _read_line(interactive: bool) -> str | None:
    """The next line; None at the end of input. Cancelling the task ends the wait."""
    loop = asyncio.get_running_loop()
    line: asyncio.Future[str | None] = loop.create_future()

    def take(text: str | None) -> None:
        if not line.done():
            line.set_result(text)

    def read() -> None:
        try:
            text = input("(qmp) ") if interactive else sys.stdin.readline() or None
        except EOFError:
            text = None
        loop.call_soon_threadsafe(take, text)

    # Not the loop's own pool: its end would wait for a terminal at which nobody types any more.
    threading.Thread(target=read, daemon=True).start()
    return await line


async def _tell_events(events: Any) -> None:
    event: QmpEvent
    async for event in events:
        click.echo(f"\r{event.name} {json.dumps(dict(event.data))}", err=True)


def _prepare_readline(commands: Sequence[str]) -> None:
    try:
        import readline
    except ImportError:
        return

    def complete(text: str, state: int) -> str | None:
        found = [name for name in commands if name.startswith(text)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    readline.parse_and_bind("tab: complete")
