"""Which machine a command is meant for: NAME, or `--qmp ADDRESS`; and how a command talks to it until it is done."""

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import click

from stillframe.client import Client

Result = TypeVar("Result")
Command = TypeVar("Command", bound=Callable[..., Any])


def qmp_option(command: Command) -> Command:
    """`--qmp ADDRESS`, in place of NAME."""
    return click.option(
        "--qmp",
        "address",
        metavar="ADDRESS",
        help="In place of NAME, any QMP server, a real QEMU's too: unix:PATH or tcp:HOST:PORT.",
    )(command)


def split_words(words: tuple[str, ...], address: str | None, *names: str) -> tuple[str, ...]:
    """The machine, then the arguments called `names`, out of what was typed.

    :raise click.UsageError: too few or too many words.
    """
    expected = names if address is not None else ("NAME", *names)
    if len(words) != len(expected):
        missing = " ".join(expected[len(words) :])
        surplus = " ".join(words[len(expected) :])
        text = f"Missing: {missing}" if missing else f"Unexpected: {surplus}"
        if address is not None and surplus:
            text += " (with --qmp there is no NAME)"
        raise click.UsageError(text)
    return words if address is None else (address, *words)


def converse(target: str, talk: Callable[[Client], Coroutine[Any, Any, Result]]) -> Result:
    """Connect, have `talk` done, disconnect.

    Ctrl-C cancels `talk`, which cancels a job that it waits for, and awaits the job's end; so do SIGTERM and the end
    of the terminal.

    :raise StillframeError: from connecting and from talking. :raise KeyboardInterrupt: after Ctrl-C, or a signal.
    """
    signalled = False

    async def conversation() -> Result:
        task = asyncio.current_task()

        def cancel() -> None:
            nonlocal signalled
            signalled = True
            if task is not None:
                task.cancel()

        loop = asyncio.get_running_loop()
        loop.set_exception_handler(_but_for_cancellation)
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                # Not where it is ignored, as under nohup.
                loop.add_signal_handler(number, cancel)
        async with Client(target) as client:
            return await talk(client)

    try:
        return asyncio.run(conversation())
    except asyncio.CancelledError:
        if signalled:
            raise KeyboardInterrupt from None
        raise


def _but_for_cancellation(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody waited for is reported. qemu.qmp leaves a future of its own behind where an interruption meets its goodbye."""
    if not isinstance(context.get("exception"), asyncio.CancelledError):
        loop.default_exception_handler(context)
