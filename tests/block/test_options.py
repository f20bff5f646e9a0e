"""Options are understood as QEMU understands them, refused in its words, and never ignored."""

from pathlib import Path

import pytest

from block.qemu_dialogue import said_on_command_line
from stillframe.block.graph import BlockGraph
from stillframe.block.options import NodeOptions, parse_options, read_options
from stillframe.errors import InvalidRequest, Refused, StillframeError, Unsupported


def test_dotted_keys_and_json_say_the_same() -> None:
    dotted = parse_options("driver=qcow2,node-name=root,read-only=on,file.driver=file,file.filename=a,,b")
    as_json = parse_options(
        '{"driver": "qcow2", "node-name": "root", "read-only": true,'
        ' "file": {"driver": "file", "filename": "a,b"}}'
    )
    assert dotted == as_json
    assert dotted == NodeOptions(
        "qcow2",
        node_name="root",
        read_only=True,
        children={"file": NodeOptions("file", settings={"filename": "a,b"})},
    )


@pytest.mark.parametrize(
    ("text", "filename"),
    [
        ("file,node-name=x,filename=a,,b", "a,b"),
        ("file,node-name=x,filename=,,", ","),
        ("file,node-name=x,filename=a,,,,b", "a,,b"),
        ("file,node-name=x,filename=a=b", "a=b"),
        ("file,node-name=x,filename=a.b", "a.b"),
        ("driver=file,node-name=x,filename=a,", "a"),
        ("driver=file,node-name=x,filename=a,filename=b", "b"),
    ],
)
def test_every_file_name_can_be_written(text: str, filename: str) -> None:
    assert parse_options(text).settings["filename"] == filename


DOTTED = [
    "driver=null-co,node-name=q,size=1M",
    "driver=null-co,node-name=q,size=",
    "driver=null-co,node-name=q,size=99999999999999999999",
    "driver=null-co,node-name=q,size=0x1000",
    "driver=null-co,node-name=q,latency-ns=x",
    "driver=null-co,node-name=q,read-zeroes=maybe",
    "driver=null-co,node-name=q,read-zeroes=yes",
    "driver=null-co,node-name=q,foo=1",
    "driver=null-co,node-name=q,foo.bar=1",
    "driver=null-co,node-name",
    "driver=null-co,node-name=q,=5",
    "driver=null-co,node-name=q,1x=5",
    "driver=qcow2,node-name=q,file..x=5",
    "driver=null-co,node-name=q,.x=5",
    "driver=qcow2,node-name=q,file=a,file.driver=file",
    "driver=qcow2,node-name=q,file.driver=file,file=a",
    "driver=file,node-name=q,filename=nx,,1",
    "driver=file,node-name=q,,filename=x",
    "driver=file,node-name=q,filename=x,cache.direct=maybe",
    "driver=file,node-name=q,filename=x,cache.nope=on",
    "driver=raw,node-name=q,file=nope",
    "driver=raw,node-name=q,file.driver=file",
    "driver=raw,node-name=q",
    "driver=nosuch",
    "nosuch",
    "null-co,node-name=q",
    "null-co",
    '{"driver": "null-co", "node-name": "n", "size": "5"}',
]


@pytest.mark.parametrize("text", DOTTED)
def test_texts_are_taken_and_refused_as_by_qemu(text: str, tmp_path: Path) -> None:
    graph = BlockGraph()
    try:
        graph.blockdev_add(parse_options(text))
        ours = None
    except StillframeError as error:
        ours = str(error)
    finally:
        graph.close()
    assert ours == said_on_command_line(tmp_path, text)


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("detect-zeroes=on", "'detect-zeroes' with the value 'on'"),
        ("cache.direct=on", "'cache.direct' with the value 'true'"),
        ("cache.no-flush=on", "'cache.no-flush' with the value 'true'"),
        ("aio=native", "'aio' with the value 'native'"),
        ("aio=io_uring", "'aio' with the value 'io_uring'"),
        ("aio-max-batch=8", "'aio-max-batch' with the value '8'"),
        ("drop-cache=off", "'drop-cache' with the value 'false'"),
        ("pr-manager=x", "'pr-manager' with the value 'x'"),
    ],
)
def test_what_is_not_done_is_refused_by_name(option: str, words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        parse_options(f"driver=file,node-name=x,filename=y,{option}")


def test_what_is_not_done_may_be_given_its_default() -> None:
    parse_options(
        "driver=file,node-name=x,filename=y,detect-zeroes=off,cache.direct=off,cache.no-flush=off,aio=threads,"
        "aio-max-batch=0,drop-cache=on,discard=ignore,locking=auto,auto-read-only=off"
    )


@pytest.mark.parametrize(
    "option",
    [
        {"lazy-refcounts": True},
        {"pass-discard-request": False},
        {"pass-discard-snapshot": False},
        {"overlap-check": "none"},
        {"overlap-check": {"template": "all"}},
        {"l2-cache-size": 1 << 20},
        {"cache-clean-interval": 0},
        {"encrypt": {"format": "luks"}},
    ],
)
def test_qcow2_options_that_are_not_done_are_refused_by_name(option: dict[str, object]) -> None:
    (name,) = option
    with pytest.raises(Unsupported, match=f"'{name}"):
        read_options({"driver": "qcow2", "node-name": "q", "file": "f", **option})


def test_options_nested_without_end_are_refused() -> None:
    text = '{"driver": "raw", "file": ' * 2000 + '"x"' + "}" * 2000
    with pytest.raises(InvalidRequest):
        parse_options(text)
    with pytest.raises(InvalidRequest):
        parse_options("driver=raw," + "file." * 500 + "driver=file")


@pytest.mark.parametrize(
    "text",
    ['{"driver": "file"', "{", '{"driver": "file", "driver": "raw"}', '{"driver": NaN}', '{"a": 1} x'],
)
def test_broken_json_is_refused(text: str) -> None:
    with pytest.raises(Refused):
        parse_options(text)
