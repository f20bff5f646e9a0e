"""The NBD server and a client that says what it likes."""

import errno
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from block.faults import ForwardingNode
from export.client import PATIENCE, Client, text
from export.serving import Failing, serving
from stillframe.block.export import nbd
from stillframe.block.export.connection import MAXIMUM_IN_FLIGHT, PIECE
from stillframe.block.export.export import Export
from stillframe.block.export.nbd import Option, OptionReply
from stillframe.block.file import FileNode
from stillframe.errors import IOFailed, NoSpace

MIB = 1 << 20
SIZE = 4 * MIB + 5


@pytest.fixture
def node(tmp_path: Path) -> Iterator[FileNode]:
    path = tmp_path / "raw"
    path.write_bytes(bytes(range(256)) * 16)
    with path.open("r+b") as file:
        file.truncate(SIZE)
    opened = FileNode("n", str(path))
    yield opened
    opened.close()


@pytest.fixture
def export(node: FileNode) -> Export:
    return Export("e", node, name="", writable=True)


@pytest.fixture
def path(tmp_path: Path, export: Export) -> Iterator[Path]:
    with serving(tmp_path / "s", export):
        yield tmp_path / "s"


# Negotiation.


def test_a_client_finds_out_what_there_is(tmp_path: Path, node: FileNode) -> None:
    readable = Export("a", node, name="one", description="the first")
    with (
        serving(tmp_path / "s", readable, Export("b", node, name="two", writable=True)),
        Client(tmp_path / "s") as client,
    ):
        listed = client.option(Option.LIST)
        assert listed == [
            (OptionReply.SERVER, text("one") + b"the first"),
            (OptionReply.SERVER, text("two")),
            (OptionReply.ACK, b""),
        ]
        info = client.option(Option.INFO, text("one") + struct.pack(">HHH", 2, 1, 2))
        assert info == [
            (OptionReply.INFO, struct.pack(">HQH", 0, SIZE, 0b101_0000_0111)[:8] + info[0][1][8:]),
            (OptionReply.INFO, struct.pack(">HIII", 3, 1, 4096, 32 * MIB)),
            (OptionReply.INFO, b"\0\1one"),
            (OptionReply.INFO, b"\0\2the first"),
            (OptionReply.ACK, b""),
        ]
        assert struct.unpack(">H", info[0][1][10:])[0] & nbd.ExportFlag.READ_ONLY
        assert client.option(Option.GO, text("three") + b"\0\0")[0][0] == OptionReply.ERR_UNKNOWN
        assert client.option(Option.STARTTLS)[0][0] == OptionReply.ERR_POLICY
        assert client.option(77, b"whatever")[0][0] == OptionReply.ERR_UNSUP
        assert client.option(Option.LIST, b"x")[0][0] == OptionReply.ERR_INVALID
        assert (
            client.option(Option.SET_META_CONTEXT, text("two") + b"\0\0\0\0")[0][0] == OptionReply.ERR_INVALID
        )
        client.go("two")
        assert client.do(nbd.READ, 0, 4) == [(0, b"\0\1\2\3")]


def test_a_client_of_the_oldest_kind_reads_and_writes(path: Path) -> None:
    with Client(path) as client:
        client.send(nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, Option.EXPORT_NAME, 0))
        size, flags = struct.unpack(">QH", client.read(10))
        assert (size, flags & nbd.ExportFlag.HAS_FLAGS) == (SIZE, 1)
        assert client.do(nbd.WRITE, SIZE - 3, 3, data=b"end") == b""
        assert client.do(nbd.READ, SIZE - 4, 4) == b"\0end"
        client.ask(nbd.DISC)
        assert client.is_ended


def test_a_client_that_says_nothing_is_sent_away(tmp_path: Path, export: Export) -> None:
    with serving(tmp_path / "s", export, seconds=0.1), Client(tmp_path / "s") as client:
        assert client.is_ended


# Requests.


def test_holes_are_told_and_not_sent(path: Path, node: FileNode) -> None:
    with Client(path).go() as client:
        assert client.do(nbd.BLOCK_STATUS, 0, SIZE) == [(4096, 0), (SIZE - 4096, 3)]
        assert client.do(nbd.BLOCK_STATUS, 0, SIZE, flags=nbd.FLAG_REQ_ONE) == [(4096, 0)]
        assert client.do(nbd.READ, 0, MIB) == [(0, node.read(0, 4096)), (4096, MIB - 4096)]
        whole = client.do(nbd.READ, 0, PIECE, flags=nbd.FLAG_DF)
        assert whole == [(0, node.read(0, PIECE))]


@pytest.mark.parametrize("structured", [False, True])
def test_what_is_written_is_read_whatever_its_length(path: Path, structured: bool) -> None:
    with Client(path).go(structured=structured) as client:
        for length in (1, 65536, 65537, PIECE, PIECE + 1, 3 * MIB + 1):
            data = (b"%d" % length) * (length // len(str(length)) + 1)
            assert not client.do(nbd.WRITE, 77, length, data=data[:length])
            found = client.do(nbd.READ, 77, length)
            assert (b"".join(part for _, part in found) if structured else found) == data[:length]


def test_zeroes_and_discards_do_what_they_say(path: Path, node: FileNode) -> None:
    with Client(path).go() as client:
        assert not client.do(nbd.WRITE, 0, 8192, data=b"x" * 8192, flags=nbd.FLAG_FUA)
        assert not client.do(nbd.WRITE_ZEROES, 100, 100, flags=nbd.FLAG_NO_HOLE | nbd.FLAG_FUA)
        assert node.read(99, 102) == b"x" + bytes(100) + b"x"
        assert not client.do(nbd.TRIM, 4096, 4096)
        assert not client.do(nbd.CACHE, 0, 4096)
        assert not client.do(nbd.FLUSH)
        assert client.do(nbd.BLOCK_STATUS, 4096, 4096) == [(4096, 3)]


def test_what_cannot_be_done_is_refused_and_the_connection_goes_on(path: Path) -> None:
    with Client(path).go() as client:
        assert client.do(nbd.READ, SIZE, 1) == nbd.EINVAL
        assert client.do(nbd.READ, SIZE - 1, MIB) == nbd.EINVAL
        assert client.do(nbd.READ, 0, 0xFFFFFFFF) == nbd.EINVAL
        assert client.do(nbd.READ, (1 << 64) - 1, 1) == nbd.EINVAL
        assert client.do(nbd.WRITE, SIZE - 1, 2, data=b"ab") == nbd.ENOSPC
        assert client.do(nbd.WRITE, SIZE - 1, MIB, data=bytes(MIB)) == nbd.ENOSPC
        assert client.do(nbd.WRITE_ZEROES, SIZE, 1) == nbd.ENOSPC
        assert client.do(nbd.TRIM, SIZE, 1) == nbd.EINVAL
        assert client.do(nbd.BLOCK_STATUS, 0, 0) == nbd.EINVAL
        assert client.do(nbd.READ, 0, 1, flags=1 << 15) == nbd.EINVAL
        assert client.do(99, 0, 1) == nbd.EINVAL
        assert client.do(nbd.READ, 0, MIB, flags=nbd.FLAG_DF) == nbd.EOVERFLOW
        assert client.do(nbd.READ, 0, 2) == [(0, b"\0\1")]
    with Client(path).go(allocation=False) as client:
        assert client.do(nbd.BLOCK_STATUS, 0, 1) == nbd.EINVAL


def test_a_read_only_export_refuses_every_change(tmp_path: Path, node: FileNode) -> None:
    before = node.read(0, SIZE)
    with serving(tmp_path / "s", Export("e", node, name="")), Client(tmp_path / "s").go() as client:
        assert client.do(nbd.WRITE, 0, 4, data=b"abcd") == nbd.EPERM
        assert client.do(nbd.WRITE, 0, MIB, data=bytes(MIB)) == nbd.EPERM
        assert client.do(nbd.WRITE_ZEROES, 0, 4) == nbd.EPERM
        assert client.do(nbd.TRIM, 0, 4096) == nbd.EPERM
        assert not client.do(nbd.FLUSH)
    assert node.read(0, SIZE) == before


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (IOFailed("bad", errno=errno.EIO), nbd.EIO),
        (IOFailed("bad", errno=errno.ENXIO), nbd.EIO),
        (IOFailed("bad", errno=errno.EACCES), nbd.EPERM),
        (NoSpace("full", errno=errno.EDQUOT), nbd.ENOSPC),
        (ValueError("a defect"), nbd.EIO),
    ],
)
def test_an_error_of_the_node_reaches_the_client_by_its_number(
    tmp_path: Path, node: FileNode, error: BaseException, number: int
) -> None:
    failing = Failing(node)
    with serving(tmp_path / "s", Export("e", failing, name="", writable=True)):
        for structured in (False, True):
            with Client(tmp_path / "s").go(structured=structured) as client:
                failing.error = error
                assert client.do(nbd.READ, 0, 512) == number
                assert client.do(nbd.READ, 0, PIECE) == number
                assert client.do(nbd.WRITE, 0, 4, data=b"abcd") == number
                assert client.do(nbd.WRITE, 0, MIB, data=bytes(MIB)) == number
                for kind in (nbd.FLUSH, nbd.TRIM, nbd.WRITE_ZEROES):
                    assert client.do(kind, 0, 0 if kind == nbd.FLUSH else 4096) == number
                failing.error = None
                assert not client.do(nbd.FLUSH)


# Many at once.


class _Stuck(ForwardingNode):
    """Flushes wait until they are let go."""

    def __init__(self, inner: FileNode) -> None:
        super().__init__(inner)
        self.let_go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.count = 0

    def flush(self) -> None:
        self.count += 1
        self.begun.release()
        assert self.let_go.wait(PATIENCE)
        super().flush()


def test_a_slow_flush_is_overtaken_by_reads_and_writes(tmp_path: Path, node: FileNode) -> None:
    stuck = _Stuck(node)
    with (
        serving(tmp_path / "s", Export("e", stuck, name="", writable=True)),
        Client(tmp_path / "s").go() as client,
    ):
        flush = client.ask(nbd.FLUSH)
        assert client.do(nbd.READ, 0, 2) == [(0, b"\0\1")]
        assert not client.do(nbd.WRITE, 0, MIB, data=bytes(MIB))
        stuck.let_go.set()
        assert client.reply()[:2] == (flush, 0)


def test_no_more_requests_of_a_client_are_in_flight_than_the_bound(tmp_path: Path, node: FileNode) -> None:
    stuck = _Stuck(node)
    with (
        serving(tmp_path / "s", Export("e", stuck, name="", writable=True)),
        Client(tmp_path / "s").go() as client,
    ):
        asked = {client.ask(nbd.FLUSH) for _ in range(3 * MAXIMUM_IN_FLIGHT)}
        for _ in range(MAXIMUM_IN_FLIGHT):
            assert stuck.begun.acquire(timeout=PATIENCE)
        with Client(tmp_path / "s").go() as other:
            assert other.do(nbd.READ, 0, 2) == [(0, b"\0\1")]
        assert stuck.count == MAXIMUM_IN_FLIGHT
        stuck.let_go.set()
        assert {client.reply()[0] for _ in asked} == asked


def test_while_an_export_is_held_nothing_is_in_flight_and_nothing_is_lost(
    path: Path, export: Export, node: FileNode
) -> None:
    with Client(path).go() as client:
        with export.held():
            client.ask(nbd.WRITE, 0, 4, data=b"held")
            client.socket.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.read(1)
            assert node.read(0, 4) == bytes(range(4))
            client.socket.settimeout(PATIENCE)
        assert client.reply()[1] == 0
        assert node.read(0, 4) == b"held"


def test_a_hold_waits_for_what_is_in_flight(tmp_path: Path, node: FileNode) -> None:
    stuck, held = _Stuck(node), threading.Event()
    export = Export("e", stuck, name="", writable=True)
    with serving(tmp_path / "s", export), Client(tmp_path / "s").go() as client:
        client.ask(nbd.FLUSH)
        assert stuck.begun.acquire(timeout=PATIENCE)
        holder = threading.Thread(target=lambda: (export.hold(), held.set()))
        holder.start()
        assert not held.wait(0.1)
        stuck.let_go.set()
        assert held.wait(PATIENCE)
        export.release()
        holder.join()
        assert client.reply()[1] == 0


def test_a_held_export_can_be_closed_and_says_so(path: Path, export: Export, node: FileNode) -> None:
    with Client(path).go() as client, export.held():
        client.ask(nbd.WRITE, 0, 4, data=b"late")
        threading.Timer(0.05, export.close).start()
        assert client.reply()[1] == nbd.ESHUTDOWN
        assert node.read(0, 4) == bytes(range(4))


def test_a_client_that_dies_inside_a_write_leaves_the_rest_as_it_was(
    path: Path, export: Export, node: FileNode
) -> None:
    with Client(path).go() as client:
        client.ask(nbd.WRITE, 0, 4096, data=bytes(4095))
    # Nor does it keep anybody from holding the export meanwhile.
    with Client(path).go() as client:
        client.ask(nbd.WRITE, 0, 2 * MIB, data=b"")
        with export.held():
            assert node.read(0, 4096) == bytes(range(256)) * 16
    with Client(path).go() as client:
        assert client.do(nbd.READ, 0, 2) == [(0, b"\0\1")]


def test_a_client_that_never_reads_holds_nobody_up(tmp_path: Path, export: Export) -> None:
    with serving(tmp_path / "s", export):
        greedy = Client(tmp_path / "s").go()
        greedy.socket.settimeout(0.2)
        requests = nbd.REQUEST.pack(nbd.REQUEST_MAGIC, 0, nbd.READ, 1, 0, 4096) * 100000
        with pytest.raises(TimeoutError):
            greedy.send(requests * 10)
        with export.held(), Client(tmp_path / "s").go():
            pass
        with Client(tmp_path / "s").go() as client:
            assert client.do(nbd.READ, 0, 2) == [(0, b"\0\1")]
    greedy.socket.close()


# Bytes that nobody foresaw.

HOSTILE = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
OPTIONS = st.builds(
    lambda option, data, claimed: (
        nbd.OPTION_HEADER.pack(nbd.OPTION_MAGIC, option, len(data) + claimed) + data
    ),
    st.integers(0, 12),
    st.binary(max_size=40),
    st.sampled_from((0, 0, 0, 1, 1 << 31)),
)
REQUESTS = st.builds(
    lambda magic, flags, kind, offset, length, data: (
        nbd.REQUEST.pack(magic, flags, kind, 1, offset, length) + data
    ),
    st.sampled_from((nbd.REQUEST_MAGIC,) * 9 + (1,)),
    st.integers(0, 31),
    st.integers(0, 9),
    st.sampled_from((0, 1, 4095, SIZE - 1, SIZE, 1 << 63, (1 << 64) - 1)),
    st.sampled_from((0, 1, 4096, 65537, MIB, 33 * MIB, 0xFFFFFFFF)),
    st.binary(max_size=64),
)


def _is_alive(path: Path) -> None:
    with Client(path).go() as client:
        assert not client.do(nbd.FLUSH)


@HOSTILE
@given(st.lists(OPTIONS, max_size=5), st.binary(max_size=40))
def test_no_words_of_a_negotiation_harm_the_server(path: Path, options: list[bytes], rest: bytes) -> None:
    with Client(path) as client:
        client.send(b"".join(options) + rest)
    _is_alive(path)


@HOSTILE
@given(st.lists(REQUESTS, max_size=8), st.booleans())
def test_no_requests_harm_the_server(path: Path, requests: list[bytes], structured: bool) -> None:
    with Client(path).go(structured=structured) as client:
        try:
            client.send(b"".join(requests))
        except ConnectionError:
            # It had heard enough.
            pass
    _is_alive(path)
