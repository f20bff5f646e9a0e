"""One client of the human monitor: a prompt, lines that are edited as they are typed, and what they print.

What goes over the wire is QEMU's, byte for byte: every character is answered with the whole line, drawn anew with the
terminal's own words (ESC [ D, one to the left; ESC [ K, clear to the end).
"""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

from stillframe.monitor import hmp
from stillframe.monitor.host import Host
from stillframe.monitor.session import DEAF_SECONDS, VERSION
from stillframe.monitor.streams import Stream

_log = logging.getLogger(__name__)

PROMPT: Final = "(qemu) "
_ENTER, _BACKSPACE, _ESCAPE = "\r\n", "\b\x7f", "\x1b"
_INSIDE_ESCAPE = "[O;0123456789"
_LIMIT = 4095


class Line:
    """A line that is being typed."""

    def __init__(self) -> None:
        self.text = ""
        self._escaped = False

    def type(self, character: str) -> str:
        """Take one character; what is shown for it."""
        before = len(self.text)
        if self._escaped or character == _ESCAPE:
            # Keys that are words of the terminal, as the arrows; they move nothing here.
            self._escaped = character == _ESCAPE or character in _INSIDE_ESCAPE
            return ""
        if character in _BACKSPACE:
            self.text = self.text[:-1]
            if len(self.text) == before:
                return ""
        elif not character.isprintable() or before >= _LIMIT:
            return ""
        else:
            self.text += character
        return "\x1b[D" * before + self.text + "\x1b[K"


class HumanSession:
    """As `session.Session`, for a person. Lives on the control plane's loop; hears of no events."""

    def __init__(
        self,
        host: Host,
        stream: Stream,
        run_blocking: Callable[[Callable[[], Any]], Awaitable[Any]],
        who: str,
        *,
        on_tcp: bool = False,
    ) -> None:
        self._on_tcp = on_tcp
        self._host = host
        self._stream = stream
        self._run_blocking = run_blocking
        self._who = who

    def greet(self) -> None:
        """Say who speaks, and prompt."""
        qemu = VERSION.qemu
        version = f"{qemu.major}.{qemu.minor}.{qemu.micro}"
        self._say(f"QEMU {version} monitor - type 'help' for more information\r\n{PROMPT}")

    async def run(self) -> None:
        """Serve the client until it goes, or the machine ends."""
        line, typed = Line(), 0
        while data := await self._stream.read():
            if self._on_tcp and not typed and data[:1].isupper():
                _log.warning("%s speaks HTTP: connection closed", self._who)
                return
            for character in data.decode("utf-8", "replace"):
                typed += 1
                if self._stream.unsent:
                    await self._stream.drain_or_close(DEAF_SECONDS, self._who)
                if character not in _ENTER:
                    self._say(line.type(character))
                    continue
                self._say("\r\n")
                await self._obey(line.text)
                if self._host.over:
                    return
                line = Line()
                self._say(PROMPT)

    async def _obey(self, text: str) -> None:
        try:
            self._say(await self._run_blocking(lambda: hmp.run(self._host, text)))
        except Exception as error:
            _log.exception("a command failed in a way that nobody foresaw")
            self._say(f"Error: {type(error).__name__}: {error}\r\n")

    def _say(self, text: str) -> None:
        self._stream.write(text.encode("utf-8", "surrogateescape"))

    async def finish(self, seconds: float) -> None:
        """Close once everything was taken, or `seconds` have passed."""
        await self._stream.finish(seconds, self._who)

    def tell(self, message: bytes) -> None:
        """Events are for programs."""
