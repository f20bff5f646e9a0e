"""Monitors of a machine: where they listen, who is connected, and the end of it all.

server = MonitorServer(host)
await server.listen(parse_address("unix:/run/user/1000/box.sock"))
await server.wait_over()
await server.close()
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import stillframe.monitor.commands  # noqa: F401 (declares them)
from stillframe.errors import InUse, Refused
from stillframe.events import Event
from stillframe.monitor import wire
from stillframe.monitor.addresses import (
    Address,
    FdAddress,
    StdioAddress,
    TcpAddress,
    UnixAddress,
    refuse_open_address,
    refuse_open_socket,
)
from stillframe.monitor.host import Host
from stillframe.monitor.human_session import HumanSession
from stillframe.monitor.session import Session, event_message
from stillframe.monitor.streams import SocketStream, StdioStream, Stream
from stillframe.sockets import SocketFile, listening_unix_socket

_log = logging.getLogger(__name__)

MAX_SESSIONS: Final = 512
_FAREWELL_SECONDS: Final = 2.0


class MonitorServer:
    """All monitors of one host; lives on the control plane's loop.

    :param stdio: the descriptors behind the address `stdio`.
    :param begun: until it is set clients are greeted, and nothing more; None if they need not wait.
    """

    def __init__(
        self, host: Host, *, stdio: tuple[int, int] = (0, 1), begun: asyncio.Event | None = None
    ) -> None:
        self._begun = begun
        self._host = host
        self._stdio = stdio
        self._loop = asyncio.get_running_loop()
        self._threads = ThreadPoolExecutor(MAX_SESSIONS, thread_name_prefix="monitor")
        self._sessions: dict[Session | HumanSession, asyncio.Task[None]] = {}
        self._visited: dict[Address, asyncio.Event] = {}
        self._servers: list[asyncio.Server] = []
        self._files: list[SocketFile] = []
        self._numbers = 0
        self._over = asyncio.Event()
        self._closed = False
        self._unsubscribe = host.events.subscribe(self._hear)

    async def listen(
        self, address: Address, *, mode: str = "control", allow_local_users: bool = False
    ) -> Address:
        """Serve clients at an address from now on.

        :param mode: "control" for QMP, "readline" for the human monitor, in QEMU's words.
        :param allow_local_users: a TCP port, which every user of the host can connect to, is wanted all the
            same.
        :return: the address, a TCP port of 0 replaced by the one that was found.
        :raise Refused: others than this user could connect, or the address cannot be had. :raise InUse: it is
            taken.
        """
        if isinstance(address, StdioAddress):
            self._welcome(StdioStream(*self._stdio), address, mode, on_tcp=False)
            return address
        if isinstance(address, FdAddress):
            os.set_inheritable(address.fd, False)
            try:
                refuse_open_socket(address, allow_local_users=allow_local_users)
                sock = socket.socket(fileno=address.fd)
                self._servers.append(await asyncio.start_server(self._connected(address, mode), sock=sock))
            except (OSError, ValueError) as error:
                raise Refused(f"Could not listen at '{address}': {error}") from error
            return address
        if isinstance(address, UnixAddress):
            sock, file = listening_unix_socket(address.path)
            self._files.append(file)
            self._servers.append(await asyncio.start_unix_server(self._connected(address, mode), sock=sock))
            return address
        refuse_open_address(address, allow_local_users=allow_local_users)
        try:
            server = await asyncio.start_server(self._connected(address, mode), address.host, address.port)
        except OSError as error:
            # The loop's own text repeats the address as a tuple.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
            raise InUse(
                f"Could not listen at '{address}': {reason}", remedy="Choose another port, or 0 for any."
            ) from error
        self._servers.append(server)
        return TcpAddress(address.host, server.sockets[0].getsockname()[1])

    def _connected(
        self, address: Address, mode: str
    ) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], None]:
        def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            stream = SocketStream(reader, writer)
            if len(self._sessions) >= MAX_SESSIONS:
                refusal = Refused(f"There are {MAX_SESSIONS} clients at this monitor already")
                _log.warning("%s: %s", address, refusal)
                stream.write(wire.encode({"error": {"class": refusal.qmp_class, "desc": str(refusal)}}))
                writer.close()
                return
            on_tcp = writer.get_extra_info("socket").family != socket.AF_UNIX
            self._welcome(stream, address, mode, on_tcp=on_tcp)

        return connected

    def _welcome(self, stream: Stream, address: Address, mode: str, *, on_tcp: bool) -> None:
        self._numbers += 1
        who = f"client {self._numbers} at {address}"
        session: Session | HumanSession
        if mode == "readline":
            session = HumanSession(self._host, stream, self._run_blocking, who, on_tcp=on_tcp)
        else:
            session = Session(self._host, stream, self._run_blocking, who, on_tcp=on_tcp)
        self._visited.setdefault(address, asyncio.Event()).set()
        self._sessions[session] = self._loop.create_task(self._serve(session))

    async def wait_for_client(self, address: Address) -> None:
        """Wait until somebody has connected to an address, once."""
        await self._visited.setdefault(address, asyncio.Event()).wait()

    async def _serve(self, session: Session | HumanSession) -> None:
        try:
            session.greet()
            if self._begun is not None:
                await self._begun.wait()
            await session.run()
        except Exception:
            _log.exception("a session failed in a way that nobody foresaw")
        finally:
            if self._host.over:
                self._over.set()
            await session.finish(_FAREWELL_SECONDS)
            self._sessions.pop(session, None)

    async def _run_blocking(self, call: Callable[[], Any]) -> Any:
        return await self._loop.run_in_executor(self._threads, call)

    def _hear(self, event: Event) -> None:
        """On the emitter's thread. After the loop's end there is nobody to tell."""
        try:
            self._loop.call_soon_threadsafe(self._tell, event)
        except RuntimeError:
            _log.debug("nobody is left to hear of %s", event.name)

    def _tell(self, event: Event) -> None:
        message = event_message(event)
        for session in self._sessions:
            session.tell(message)

    async def wait_over(self) -> None:
        """Wait until a client has ended the machine (`quit`) and has its answer."""
        await self._over.wait()

    async def close(self) -> None:
        """Stop listening, say farewell to all clients, take the sockets' files away.

        Commands under way are given up: call `Host.end` first, on a thread, where there may be some. A second
        call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        self._unsubscribe()
        for server in self._servers:
            server.close()
        for file in self._files:
            file.remove()
        farewells = [session.finish(_FAREWELL_SECONDS) for session in self._sessions]
        tasks = list(self._sessions.values())
        await asyncio.gather(*farewells)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._over.set()
