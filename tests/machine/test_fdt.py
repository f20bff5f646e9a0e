"""The device tree writer, read back by the device tree compiler."""

import re
import struct
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peers import peer
from stillframe.errors import InvalidRequest
from stillframe.machine.boards.fdt import U64, Node


def dts(blob: bytes) -> str:
    """What dtc reads out of a blob."""
    run = subprocess.run(
        [peer("dtc"), "-q", "-I", "dtb", "-O", "dts"], input=blob, stdout=subprocess.PIPE, check=True
    )
    return run.stdout.decode()


def test_dtc_reads_every_kind_of_value_as_it_was_given() -> None:
    root = Node("").set("#address-cells", 2).set("#size-cells", 2).set("compatible", "one,board", "two")
    plic = root.add(
        Node("plic@c000000").set("reg", U64(0xC000000), U64(0x600000)).set("interrupt-controller")
    )
    serial = root.add(Node("serial@10000000").set("interrupt-parent", plic).set("interrupts", 10))
    serial.set("seed", b"\x01\x02\x03")
    text = dts(root.to_dtb())
    assert 'compatible = "one,board\\0two";' in text or 'compatible = "one,board", "two";' in text
    assert "reg = <0x00 0xc000000 0x00 0x600000>;" in text
    assert re.search(r"interrupt-controller;", text)
    assert "interrupts = <0x0a>;" in text
    assert "seed = [01 02 03];" in text
    handle = re.search(r"phandle = <(0x\w+)>;", text)
    assert handle is not None
    assert f"interrupt-parent = <{handle[1]}>;" in text


def test_a_tree_of_version_17_says_so_and_its_blocks_do_not_overlap() -> None:
    blob = Node("").set("model", "m").to_dtb(boot_cpu=3, reservations=[(0x80000000, 0x1000)])
    magic, total, structure, strings, reserved, version, oldest, cpu, strings_size, structure_size = (
        struct.unpack(">10I", blob[:40])
    )
    assert (magic, version, oldest, cpu, total) == (0xD00DFEED, 17, 16, 3, len(blob))
    assert 40 <= reserved <= structure - 32
    assert structure + structure_size <= strings
    assert strings + strings_size == total
    assert "/memreserve/	0x0000000080000000 0x0000000000001000;" in dts(blob)


def test_a_reference_to_a_node_outside_the_tree_is_refused() -> None:
    root = Node("").set("interrupt-parent", Node("elsewhere"))
    with pytest.raises(InvalidRequest, match="'interrupt-parent' refers to node 'elsewhere'"):
        root.to_dtb()


@pytest.mark.parametrize("value", [-1, 1 << 32, U64(1 << 64), U64(-1), "a\0b", "\ud800"])
def test_a_value_that_would_be_cut_is_refused(value: int | U64 | str) -> None:
    with pytest.raises(InvalidRequest, match="'bootargs'"):
        Node("chosen").set("bootargs", value)


@pytest.mark.parametrize("name", ["with space", "a/b", "x" * 40, "a@b@c"])
def test_a_name_outside_the_specification_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest):
        Node(name)
    with pytest.raises(InvalidRequest):
        Node("").set(name)


def test_two_children_of_one_name_are_refused() -> None:
    root = Node("")
    root.add(Node("cpu@0"))
    with pytest.raises(InvalidRequest, match="cpu@0"):
        root.add(Node("cpu@0"))


_NAMES = st.from_regex(r"[a-z][a-z0-9]{0,8}", fullmatch=True)
_TREES = st.recursive(
    st.tuples(st.dictionaries(_NAMES, st.binary(min_size=1, max_size=9), max_size=4), st.just({})),
    lambda inner: st.tuples(
        st.dictionaries(_NAMES, st.binary(min_size=1, max_size=9), max_size=4),
        st.dictionaries(_NAMES, inner, max_size=4),
    ),
    max_leaves=12,
)


def _build(name: str, shape: tuple[dict[str, bytes], dict[str, object]]) -> Node:
    node = Node(name)
    for key, value in shape[0].items():
        node.set(key, value)
    for key, child in shape[1].items():
        node.add(_build(key, child))  # type: ignore[arg-type]
    return node


@settings(max_examples=40, deadline=None)
@given(_TREES)
def test_dtc_writes_any_tree_of_ours_back_the_same(shape: tuple[dict[str, bytes], dict[str, object]]) -> None:
    blob = _build("", shape).to_dtb()
    again = subprocess.run(
        [peer("dtc"), "-q", "-I", "dtb", "-O", "dtb"], input=blob, stdout=subprocess.PIPE, check=True
    ).stdout
    assert dts(again) == dts(blob)
    assert struct.unpack_from(">I", again, 36) == struct.unpack_from(">I", blob, 36)
