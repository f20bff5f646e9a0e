"""The bundled guest's serial console, as a person at it would use it; for the demo and the tests."""

import asyncio
import re
from pathlib import Path
from types import TracebackType

from stillframe.errors import Failed, PeerError
from stillframe.monitor.addresses import UnixAddress, connected_socket

_ANSWER_SECONDS = 30.0
_PAIR = re.compile(r"(\w+)=(\S+)")


class GuestConsole:
    """A connection to the console's socket: `async with GuestConsole(path) as console:`.

    Every wait ends after a stated time with `Failed`, which quotes what the guest said last.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[str] = []

    async def __aenter__(self) -> "GuestConsole":
        sock = connected_socket(UnixAddress(self._path))
        self._reader, self._writer = await asyncio.open_connection(sock=sock)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    async def _line(self) -> str:
        raw = await self._reader.readline()
        if not raw:
            raise PeerError("The guest's console was closed")
        line = raw.decode("utf-8", "replace").strip()
        self._lines = [*self._lines[-19:], line]
        return line

    async def until(self, beginning: str, seconds: float = _ANSWER_SECONDS) -> str:
        """The next line that begins so.

        :raise Failed: none came in time.
        """

        async def search() -> str:
            while not (line := await self._line()).startswith(beginning):
                pass
            return line

        try:
            return await asyncio.wait_for(search(), seconds)
        except TimeoutError:
            last = "\n  ".join(self._lines) or "(nothing)"
            raise Failed(
                f"The guest did not say '{beginning}' within {seconds:.0f} s. It said last:\n  {last}"
            ) from None

    async def heartbeats(self, count: int) -> None:
        """Wait for so many heartbeats."""
        for _ in range(count):
            await self.until("HB ")

    async def command(self, text: str) -> dict[str, str]:
        """Type a command; the `key=value` pairs of its answer.

        :raise Failed: the guest answered with an error, or not at all.
        """
        self._writer.write(f"{text}\n".encode())
        await self._writer.drain()

        async def answer() -> str:
            while True:
                line = await self._line()
                if line.startswith(("ok", "error:")):
                    return line

        try:
            line = await asyncio.wait_for(answer(), _ANSWER_SECONDS)
        except TimeoutError:
            last = "\n  ".join(self._lines) or "(nothing)"
            raise Failed(
                f"The guest did not answer '{text}' within {_ANSWER_SECONDS:.0f} s. It said last:\n  {last}"
            ) from None
        if line.startswith("error:"):
            raise Failed(f"The guest answered '{text}' with: {line}")
        return dict(_PAIR.findall(line))
