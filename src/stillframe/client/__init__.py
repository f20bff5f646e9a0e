"""The other end of a monitor: `connect(name_or_address)`, for any QMP server, a real QEMU's too.

The protocol is the library qemu.qmp's; here are names of machines, jobs seen through to their end, and one
tree of errors.
"""

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from qemu.qmp import ConnectError, EventListener, ExecuteError, QMPClient, QMPError
from qemu.qmp.protocol import Runstate

from stillframe.client.job import Disconnected, JobChoice, JobFailed, JobLife, JobState
from stillframe.errors import Cancelled, InvalidRequest, NotFound, PeerError, Unsupported
from stillframe.monitor.addresses import (
    Address,
    UnixAddress,
    connected_socket,
    machine_names,
    machine_socket,
    parse_address,
)

__all__ = [
    "Client",
    "Disconnected",
    "JobChoice",
    "JobFailed",
    "JobState",
    "ProgressListener",
    "QmpEvent",
    "connect",
    "resolve",
]

_POLL_SECONDS = 0.1
_GREETING_SECONDS = 10.0

ProgressListener = Callable[[int, int], None]
"""Called with what is done and what there is to do, in the job's unit."""


@dataclass(frozen=True, slots=True)
class QmpEvent:
    """An event as the server told it; `seconds` is its wall clock."""

    name: str
    data: Mapping[str, Any]
    seconds: float


def resolve(target: str) -> Address:
    """The address of a machine's name, or the address itself where `target` is one.

    :raise NotFound: no machine of that name. :raise InvalidRequest: neither a name nor an address.
    """
    if target == "stdio" or target.partition(":")[0] in ("unix", "tcp"):
        return parse_address(target)
    try:
        path = machine_socket(target, create=False)
    except NotFound:
        path = None
    if path is None or not path.exists():
        names = machine_names()
        known = f"There are: {', '.join(names)}." if names else "None is running under this user."
        raise NotFound(f"There is no machine '{target}'", remedy=known)
    return UnixAddress(path)


class Client:
    """A connection to a monitor; use it as `async with connect("box") as box:`.

    One event loop's, not to be shared between threads. Every call may raise `PeerError`: the server answered
    with an error (`error_class` is its class), or the connection is gone.
    """

    def __init__(self, target: str) -> None:
        self.address = resolve(target)
        self._qmp = QMPClient("stillframe")
        self._qmp.logger = logging.getLogger("stillframe.client.qmp")
        # The library logs what it also raises; only who asks for the log is to see it.
        self._qmp.logger.setLevel(logging.CRITICAL)

    async def __aenter__(self) -> "Client":
        sock = connected_socket(self.address)
        try:
            async with asyncio.timeout(_GREETING_SECONDS):
                await self._qmp.connect(sock)
        except TimeoutError as error:
            sock.close()
            raise PeerError(
                f"'{self.address}' did not greet within {_GREETING_SECONDS:.0f} seconds",
                remedy="A QEMU serves one client at a time: end the other one.",
            ) from error
        except ConnectError as error:
            sock.close()
            raise PeerError(f"'{self.address}' did not answer as a QMP server: {error}") from error
        except BaseException:
            sock.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """End the connection; the machine goes on."""
        if self._qmp.runstate != Runstate.IDLE:
            try:
                await self._qmp.disconnect()
            except (QMPError, EOFError, OSError):
                # It was ended from the other side, which every call that was under way has told already.
                pass

    @property
    def connected(self) -> bool:
        """Whether commands can be given."""
        return self._qmp.runstate == Runstate.RUNNING

    @property
    def server_version(self) -> tuple[int, int, int]:
        """QEMU's version as the server announces it."""
        greeting = self._qmp.greeting
        if greeting is None:
            return (0, 0, 0)
        qemu: Any = greeting.QMP.version["qemu"]
        return (qemu["major"], qemu["minor"], qemu["micro"])

    async def execute(self, command: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Run one command and return what it returns.

        :raise PeerError: its error, or the end of the connection. :raise InvalidRequest: an argument is not
            text, as a name typed in another encoding.
        """
        try:
            # The server would answer without the request's id, which the library takes for the end of it all.
            json.dumps(dict(arguments or {}), ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InvalidRequest(
                f"An argument of '{command}' is not text in UTF-8", remedy="Type it in UTF-8."
            ) from error
        try:
            return await self._qmp.execute(command, dict(arguments) if arguments else None)
        except ExecuteError as error:
            raise PeerError(str(error), error_class=error.error_class) from error
        except (QMPError, EOFError, OSError) as error:
            raise Disconnected(
                f"The connection to '{self.address}' ended during '{command}'",
                remedy="Is the machine still running?",
            ) from error

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[AsyncIterator[QmpEvent]]:
        """Listen inside the block to the events named, or to all: `async with box.events("STOP") as events:`.

        The iterator waits for the next event; cancelling the task ends the wait, and so does the end of the
        connection.

        :raise PeerError: from the iterator: the connection ended, and all events before that have been given.
        """
        with self._qmp.listener(names or None) as listener:
            yield self._each(listener)

    async def _each(self, listener: EventListener) -> AsyncIterator[QmpEvent]:
        while True:
            message = await self._next(listener)
            stamp: Any = message["timestamp"]
            data: Any = message.get("data", {})
            yield QmpEvent(str(message["event"]), data, stamp["seconds"] + stamp["microseconds"] / 1e6)

    async def _next(self, listener: EventListener) -> Any:
        while listener.empty():
            if self._qmp.runstate != Runstate.RUNNING:
                raise PeerError(f"The connection to '{self.address}' ended")
            changed = asyncio.ensure_future(self._qmp.runstate_changed())
            came = asyncio.ensure_future(listener.get())
            try:
                # Both have to have begun before the state is looked at, or a change in between is never told.
                await asyncio.sleep(0)
                if self._qmp.runstate == Runstate.RUNNING:
                    await asyncio.wait({changed, came}, return_when=asyncio.FIRST_COMPLETED)
                if came.done():
                    return came.result()
            finally:
                changed.cancel()
                came.cancel()
        return await listener.get()

    # The machine

    async def status(self) -> str:
        """The run state, as "running"."""
        return str((await self.execute("query-status"))["status"])

    async def stop(self) -> None:
        """Pause the guest."""
        await self.execute("stop")

    async def cont(self) -> None:
        """Let the guest run."""
        await self.execute("cont")

    async def quit(self) -> None:
        """End the machine. Returns when the server has answered, or has gone without."""
        with suppress(Disconnected):
            await self.execute("quit")

    # Jobs

    async def jobs(self) -> list[JobState]:
        """All jobs, newest first."""
        return [
            JobState(
                each["id"],
                each["type"],
                each["status"],
                each["current-progress"],
                each["total-progress"],
                each.get("error"),
                tuple(
                    JobChoice(choice["what"], choice["chosen"], choice.get("why", ""))
                    for choice in each.get("choices", ())
                ),
            )
            for each in await self.execute("query-jobs")
        ]

    async def run_job(
        self,
        command: str,
        arguments: Mapping[str, Any],
        *,
        job_id: str | None = None,
        progress: ProgressListener | None = None,
    ) -> JobState:
        """Start a job, see it through to its end, and dismiss it.

        If the task is cancelled the job is cancelled too, and its end awaited, which a note of the exception tells: nothing of
        it is left behind.
        Where the job was done before that could be, it is done: the cancellation is taken back and this
        returns. So it does where the machine ended just after the job was done.

        :param job_id: chosen where None is given.
        :raise JobFailed: the job's own error. :raise Cancelled: somebody else cancelled it.
        :raise Disconnected: the machine ended; `left` says what that means for the snapshot.
        :raise PeerError: it could not be started.
        """
        if job_id is None:
            job_id = f"stillframe-{secrets.token_hex(6)}"
        with self._qmp.listener(JobLife.EVENTS) as listener:
            life = JobLife(job_id, command, listener)
            try:
                await self.execute(command, {"job-id": job_id, **arguments})
                job = await self._see_through(life, progress)
            except asyncio.CancelledError as interruption:
                concluded = await asyncio.shield(self._cancel(life))
                if concluded is None or concluded.error is not None:
                    if concluded is not None:
                        undone = "; nothing of it is left" if concluded.error == str(Cancelled()) else ""
                        interruption.add_note(f"job '{job_id}' ended: {concluded.error}{undone}")
                    raise
                job = concluded
                if (task := asyncio.current_task()) is not None:
                    task.uncancel()
            life.hear()
        if job.error is not None:
            if job.error == str(Cancelled()):
                if life.machine_ended:
                    raise self._ended(life)
                raise Cancelled(left="Nothing of it is left behind.")
            raise JobFailed(job)
        return job

    async def _see_through(self, life: JobLife, progress: ProgressListener | None) -> JobState:
        """The job as it concluded; it is dismissed then."""
        last = JobState(life.id, life.command, "created", 0, 1, None)
        try:
            while True:
                # Not wait_for: before Python 3.12 it can swallow a cancellation.
                with suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_SECONDS):
                        await life.end_told()
                if (job := await self._job(life.id)) is None:
                    break
                last = job
                if progress is not None:
                    progress(job.done, job.total)
                if job.status == "concluded":
                    life.concluded = job
                    await self._dismiss(life)
                    return job
        except Disconnected as error:
            life.hear()
            if not life.ended_well:
                raise self._ended(life) from error
        life.hear()
        if life.ended_well:
            return replace(last, status="concluded", done=last.total, error=None)
        if life.machine_ended:
            raise self._ended(life)
        raise PeerError(f"Job '{life.id}' vanished: somebody else dismissed it")

    async def _job(self, id: str) -> JobState | None:
        return next((each for each in await self.jobs() if each.id == id), None)

    async def _dismiss(self, life: JobLife) -> None:
        """Forget a concluded job, if its machine's end does not."""
        try:
            await self.execute("job-dismiss", {"id": life.id})
        except PeerError as error:
            life.hear()
            if not isinstance(error, Disconnected) and not life.machine_ended:
                raise

    async def _cancel(self, life: JobLife) -> JobState | None:
        """The job as it concluded, done in spite of the cancel or not; None if it was never started, or its server is gone."""
        with suppress(PeerError):
            # Refused if it has just concluded, or is past the point from which it can be undone: its end is awaited.
            await self.execute("job-cancel", {"id": life.id})
        with suppress(PeerError):
            if life.concluded is None:
                return await self._see_through(life, None)
            await self._dismiss(life)
        return life.concluded

    def _ended(self, life: JobLife) -> Disconnected:
        """The server is gone, or is about to go."""
        greeting = self._qmp.greeting
        package = str(greeting.QMP.version["package"]) if greeting is not None else ""
        return life.end(str(self.address), is_stillframe=package.startswith("stillframe"))

    # Snapshots

    async def _takes(self, command: str, argument: str) -> bool:
        """Whether the server's introspection has this argument."""
        schema = {each["name"]: each for each in await self.execute("query-qmp-schema")}
        members = schema.get(schema.get(command, {}).get("arg-type"), {}).get("members", ())
        return any(each["name"] == argument for each in members)

    async def _limit(self, command: str, speed: int) -> dict[str, int]:
        """The argument that asks for a limit, where one is wanted."""
        if not speed:
            return {}
        if not await self._takes(command, "speed"):
            raise Unsupported(
                f"The server at '{self.address}' has no limit of speed for {command}",
                remedy="A QEMU reads and writes as fast as it can: leave the speed out.",
            )
        return {"speed": speed}

    async def save(
        self,
        tag: str,
        *,
        vmstate: str,
        devices: Sequence[str],
        speed: int = 0,
        quiesce: str | None = None,
        job_id: str | None = None,
        progress: ProgressListener | None = None,
    ) -> JobState:
        """Take a snapshot: machine state into the node `vmstate`, and all nodes of `devices`;
        `snapshot-save`.

        :param speed: at most so many bytes of machine state a second; 0 for no limit. :raise Unsupported: the server knows none.
        :param quiesce: "required" or "try": the guest's file systems are frozen for the instant.
        :raise JobFailed: nothing was saved, and the guest goes on.
        """
        arguments: dict[str, Any] = {"tag": tag, "vmstate": vmstate, "devices": list(devices)}
        arguments |= await self._limit("snapshot-save", speed)
        if quiesce is not None:
            arguments["quiesce"] = quiesce
        return await self.run_job("snapshot-save", arguments, job_id=job_id, progress=progress)

    async def load(
        self,
        tag: str,
        *,
        vmstate: str,
        devices: Sequence[str],
        eager: bool = False,
        replace: bool = False,
        speed: int = 0,
        job_id: str | None = None,
        progress: ProgressListener | None = None,
    ) -> JobState:
        """Bring a snapshot back; `snapshot-load`.

        :param eager: the guest runs only when all of its memory is there. A server that does not know this, as QEMU,
            never does otherwise.
        :param replace: of a guest that a QEMU runs for stillframe, that one is ended before the one that goes on is started.
        :param speed: as in `save`; what the guest asks for comes at once.
        :raise JobFailed: with stillframe's server everything is as before; with QEMU's the guest may stand
            still.
        """
        arguments: dict[str, Any] = {"tag": tag, "vmstate": vmstate, "devices": list(devices)}
        if eager and await self._takes("snapshot-load", "eager"):
            arguments["eager"] = True
        if replace:
            if not await self._takes("snapshot-load", "replace"):
                raise Unsupported(f"The server at '{self.address}' replaces no guest by another")
            arguments["replace"] = True
        arguments |= await self._limit("snapshot-load", speed)
        return await self.run_job("snapshot-load", arguments, job_id=job_id, progress=progress)

    async def delete(
        self,
        tag: str,
        *,
        devices: Sequence[str],
        job_id: str | None = None,
        progress: ProgressListener | None = None,
    ) -> JobState:
        """Delete a snapshot from the nodes; `snapshot-delete`. A tag that is nowhere is no error, as with
        QEMU.
        """
        arguments = {"tag": tag, "devices": list(devices)}
        return await self.run_job("snapshot-delete", arguments, job_id=job_id, progress=progress)


def connect(target: str) -> Client:
    """A client of the machine called `target`, or of the QMP server at that address (unix:PATH,
    tcp:HOST:PORT).

        async with stillframe.connect("box") as box:
            await box.save("before-upgrade", vmstate="root", devices=["root"])

    :raise NotFound: no machine of that name. :raise PeerError: from entering the block: nobody answers.
    """
    return Client(target)
