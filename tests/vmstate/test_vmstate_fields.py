"""A device's state comes back as it was, older states too, and every refusal says which device and which
field."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillframe.errors import StateMismatch
from stillframe.vmstate.fields import INTEGER_SIZES, Description, Field, Value, decode, encode
from stillframe.vmstate.sections import SectionState
from vmstate.stream_analysis import Walk
from vmstate.streams import global_state, surveyed, written


def integers(kind: str) -> st.SearchStrategy[int]:
    if kind == "bool":
        return st.booleans()
    bits = 8 * INTEGER_SIZES[kind]
    return (
        st.integers(-(1 << bits - 1), (1 << bits - 1) - 1)
        if kind.startswith("int")
        else st.integers(0, (1 << bits) - 1)
    )


@st.composite
def states(draw: st.DrawFn) -> tuple[Description, dict[str, Value]]:
    fields: list[Field] = []
    values: dict[str, Value] = {}
    for number in range(draw(st.integers(0, 8))):
        name = f"f{number}"
        kind = draw(st.sampled_from([*INTEGER_SIZES, "buffer"]))
        count = draw(st.integers(0, 5))
        counter = None
        if draw(st.booleans()):
            counter = f"{name}_count"
            fields.append(Field(counter, "uint16"))
            values[counter] = count
        fields.append(Field(name, kind, count=1 if counter else count, count_field=counter))
        if kind == "buffer":
            values[name] = draw(st.binary(min_size=count, max_size=count))
        elif counter is None and count == 1:
            values[name] = draw(integers(kind))
        else:
            values[name] = tuple(draw(st.lists(integers(kind), min_size=count, max_size=count)))
    return Description("model", version=1, fields=tuple(fields)), values


@given(states())
def test_state_comes_back_as_it_was(state: tuple[Description, dict[str, Value]]) -> None:
    description, values = state
    section = SectionState("model/0", 3, description, values)
    stream = written("none", {}, [section, global_state("running")])
    assert surveyed(stream, sections=[section]).sections["model/0", 3].values == values


@given(states())
def test_a_reader_without_our_declarations_walks_by_the_description(
    state: tuple[Description, dict[str, Value]],
) -> None:
    description, values = state
    stream = written("none", {}, [SectionState("model/0", 3, description, values), global_state("paused")])
    found = Walk(stream).sections["model/0", 3]
    for name, value in values.items():
        if value == ():
            assert name not in found
        else:
            assert found[name] == value


def test_an_older_state_means_what_its_device_says_it_means() -> None:
    old = Description("uart", 1, (Field("rate", "uint32"),))
    new = Description("uart", 2, (Field("rate", "uint32"), Field("fifo", "uint8", since=2, default=16)))
    stream = written("none", {}, [SectionState("uart", 0, old, {"rate": 9600})])
    values = surveyed(stream, sections={("uart", 0): new}).sections["uart", 0].values
    assert values == {"rate": 9600, "fifo": 16}


def test_a_younger_state_is_refused_by_section_and_version() -> None:
    new = Description("uart", 2, (Field("rate", "uint32"),))
    old = Description("uart", 1, (Field("rate", "uint32"),))
    stream = written("none", {}, [SectionState("uart/4", 0, new, {"rate": 1})])
    with pytest.raises(StateMismatch, match=r"savevm: unsupported version 2 for 'uart/4' v1") as refused:
        surveyed(stream, sections={("uart/4", 0): old})
    assert refused.value.section == "uart/4"
    assert refused.value.remedy


def test_a_count_beyond_all_bounds_is_refused_before_memory_is_taken_for_it() -> None:
    description = Description(
        "blob", 1, (Field("size", "uint64"), Field("data", "uint64", count_field="size"))
    )
    asked: list[int] = []

    def take(length: int) -> bytes:
        asked.append(length)
        return b"\xff" * length

    with pytest.raises(StateMismatch, match="field 'data' claims") as refused:
        decode(description, 1, take, "blob")
    assert refused.value.field == "data"
    assert max(asked) == 8


@pytest.mark.parametrize(
    "value", [256, -1, "text", b"x", (1,), None], ids=["large", "negative", "text", "bytes", "array", "none"]
)
def test_a_value_that_does_not_fit_its_field_is_never_written(value: Value) -> None:
    description = Description("uart", 1, (Field("lcr", "uint8"),))
    with pytest.raises(StateMismatch, match=r"device 'uart/0' .* field 'lcr'") as refused:
        encode(description, {"lcr": value}, "uart/0")
    assert refused.value.field == "lcr"


@pytest.mark.parametrize(
    "fields",
    [
        (Field("a", "uint8"), Field("a", "uint8")),
        (Field("a", "uint8", since=2),),
        (Field("a", "buffer", count_field="n"),),
        (Field("n", "uint8", count=2), Field("a", "buffer", count_field="n")),
        (Field("a", "float", default=0),),  # type: ignore[arg-type]
    ],
    ids=["twice", "no default", "no counter", "array as counter", "no type"],
)
def test_a_declaration_that_contradicts_itself_does_not_get_into_a_release(fields: tuple[Field, ...]) -> None:
    with pytest.raises(ValueError, match="'x'"):
        Description("x", 2, fields)


def test_a_description_of_any_length_is_found_by_the_bytes_before_it() -> None:
    """Its length may hold the byte of a brace, which is what is searched for."""
    for length in range(300):
        field = Field("f" * length, "uint8")
        section = SectionState("d", 0, Description("d", 1, (field,)), {field.name: 5})
        assert Walk(written("none", {}, [section])).sections["d", 0] == {field.name: 5}


def test_the_description_has_the_shape_of_qemus() -> None:
    description = Description(
        "cpu", 1, (Field("x", "uint64", count=32), Field("pc", "uint64"), Field("fcsr", "buffer", count=4))
    )
    section = SectionState("cpu", 0, description, {"x": (0,) * 32, "pc": 1, "fcsr": b"abcd"})
    found = json.loads(surveyed(written("virt", {}, [section]), "virt", [section]).description or b"")
    assert found["page_size"] == 4096
    assert found["configuration"]["fields"][1] == {"name": "name", "type": "buffer", "size": 4}
    assert found["devices"] == [
        {
            "name": "cpu",
            "instance_id": 0,
            "vmsd_name": "cpu",
            "version": 1,
            "fields": [
                {"name": "x", "array_len": 32, "type": "uint64", "size": 8},
                {"name": "pc", "type": "uint64", "size": 8},
                {"name": "fcsr", "type": "buffer", "size": 4},
            ],
        }
    ]
