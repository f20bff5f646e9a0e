"""JSON in and out, as lenient, as strict and in the words of QEMU's monitor.

    bytes ──▶ lexer ──▶ tokens ──▶ counting of { } [ ] ──▶ parser ──▶ one value, or one `JSONError`
                │ a byte that fits nowhere: the token so far and that byte are one error; then everything up
                to the └ next structural character or line end is skipped, and lexing goes on there

A value is complete as soon as its braces balance; line ends are white space. Leftovers of a message with an
error are parsed on their own, so one bad message can make several errors. Differences to RFC 8259: strings
may stand in single quotes, `\\'` is an escape, numbers of 64 bits are exact and larger ones are doubles,
duplicate keys and Unicode's non-characters are refused.

The parser works while tokens arrive and holds nothing but the value being built: at most 64 MiB of token
text, 2 Mi tokens and 1024 levels, as QEMU. After an error it only counts, so that hostile input costs no
memory.
"""

import json
import math
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Final

from stillframe.monitor.tokens import MAX_TOKEN_BYTES, JSONError, Lexer, number, unquote

MAX_TOKENS: Final = 2 << 20
MAX_NESTING: Final = 1024

_FAST_PATH_BYTES: Final = 1 << 20
_FAST_PATH_NESTING: Final = 100


# Output


def _bucket(key: str) -> int:
    """Where QEMU's dictionary keeps a key: it prints members in the order of these, whatever order they came
    in.
    """
    text = key.encode()
    value = 0x238F13AF * len(text)
    for index, byte in enumerate(text):
        value += byte << (index * 5 % 24)
    return (1103515243 * value + 12345) % (1 << 32) % 512


@lru_cache(maxsize=4096)
def _known_order(keys: tuple[str, ...]) -> tuple[str, ...]:
    return _order(keys)


def _order(keys: tuple[str, ...]) -> tuple[str, ...]:
    # Of two keys in one bucket the later one comes first: the sort is stable.
    return tuple(sorted(keys[::-1], key=_bucket))  # noqa: C415


def members_in_order(value: dict[str, Any]) -> tuple[str, ...]:
    """The keys of an object in the order in which QEMU visits and prints them."""
    keys = tuple(value)
    if len(keys) <= 24 and all(len(key) <= 64 for key in keys):
        return _known_order(keys)
    return _order(keys)


_ESCAPES: Final = {
    ord('"'): '\\"',
    ord("\\"): "\\\\",
    ord("\b"): "\\b",
    ord("\f"): "\\f",
    ord("\n"): "\\n",
    ord("\r"): "\\r",
    ord("\t"): "\\t",
}
_NEEDS_ESCAPE: Final = re.compile(r"[^ !#-\[\]-~]")


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    short = _ESCAPES.get(code)
    if short is not None:
        return short
    if 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE:
        code = 0xFFFD
    if code > 0xFFFF:
        code -= 0x10000
        return f"\\u{0xD800 + (code >> 10):04X}\\u{0xDC00 + (code & 0x3FF):04X}"
    return f"\\u{code:04X}"


def _string(value: str) -> str:
    return f'"{_NEEDS_ESCAPE.sub(_escape, value)}"'


def _scalar(value: Any) -> str:
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if isinstance(value, str):
        return _string(value)
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return "nan" if math.isnan(value) else f"{value:.17g}"
    raise TypeError(f"{type(value).__name__} has no JSON")


def encode(value: Any) -> bytes:
    """One message as the monitor sends it: ASCII, `", "` and `": "`, QEMU's order of members, CR LF."""
    return to_text(value).encode("ascii") + b"\r\n"


def to_text(value: Any) -> str:
    """A value as QEMU prints it; any depth, without recursion."""
    pieces: list[str] = []
    work: list[Any] = [_Open(value)]
    while work:
        item = work.pop()
        if type(item) is str:
            pieces.append(item)
            continue
        inner = item.value
        if isinstance(inner, dict):
            work.append("}")
            lead = ""
            steps: list[Any] = []
            for key in members_in_order(inner):
                steps += (f"{lead}{_string(key)}: ", _Open(inner[key]))
                lead = ", "
            work += reversed(steps)
            pieces.append("{")
        elif isinstance(inner, (list, tuple)):
            work.append("]")
            steps = []
            for member in inner:
                if steps:
                    steps.append(", ")
                steps.append(_Open(member))
            work += reversed(steps)
            pieces.append("[")
        else:
            pieces.append(_scalar(inner))
    return "".join(pieces)


class _Open:
    """A value still to be printed, told apart from text already made."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


# The ordinary path: one object on one line, of a kind where the standard library and QEMU provably agree


class _NotOrdinary(ValueError):
    """Something on which the two might differ."""


def _ordinary_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _NotOrdinary
    return value


def _no_constant(_word: str) -> Any:
    raise _NotOrdinary


def _integer(text: str) -> int | float:
    if len(text) <= 19:
        return int(text) if len(text) < 19 or abs(int(text)) < 1 << 63 else number(text)
    return number(text)


def _float(text: str) -> float:
    if text.lstrip("-")[:2] in ("0e", "0E"):
        raise _NotOrdinary
    return float(text)


_ORDINARY: Final = json.JSONDecoder(
    object_pairs_hook=_ordinary_object, parse_int=_integer, parse_float=_float, parse_constant=_no_constant
)
_MAYBE_ORDINARY: Final = re.compile(rb"[ \t]*\{[ \t -\[\]-~]*\}[ \t\r]*\n?", re.DOTALL)


def _ordinary(line: bytes | memoryview) -> dict[str, Any] | None:
    """The object on a line of printable ASCII without backslashes; None where that is not what it is."""
    if len(line) > _FAST_PATH_BYTES or not _MAYBE_ORDINARY.fullmatch(line):
        return None
    text = str(line, "ascii")
    if text.count("{") + text.count("[") > _FAST_PATH_NESTING:
        return None
    try:
        value = _ORDINARY.decode(text)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


_KEYWORDS: Final = {b"true": True, b"false": False, b"null": None}


class _Building:
    """One message on its way: the containers that are open, and the first error."""

    def __init__(self) -> None:
        self.braces = 0
        self.brackets = 0
        self.tokens = 0
        self.token_bytes = 0
        self.error: str | None = None
        self.value: Any = None
        # One entry a container: [container, what is expected next, key]
        self.open: list[list[Any]] = []

    @property
    def begun(self) -> bool:
        return self.tokens > 0


# What may come next in a container
_FIRST, _KEY, _COLON, _VALUE, _SEPARATOR = range(5)


class Decoder:
    """A connection's incoming text, in whatever pieces it arrives.

    Bytes are given to `feed`; iterating over what it returns gives values and errors in the order of the
    text. Time is linear in the input, and nothing is kept but the token and the value that are not yet
    complete.
    """

    def __init__(self) -> None:
        self._lexer = Lexer()
        self._building = _Building()
        self._taken: Any = None

    def feed(self, data: bytes) -> Iterator[Any]:
        """Values that are complete with `data`, and a `JSONError` (yielded, not raised) for each error.

        The iterator must be finished before the next call.
        """
        position = 0
        while position < len(data):
            end = data.find(b"\n", position) + 1 or len(data)
            line = data[position:end] if position or end < len(data) else data
            if self._idle:
                value = _ordinary(line)
                if value is not None:
                    yield value
                    position = end
                    continue
            for kind, token in self._lexer.feed(line):
                if self._take(kind, token):
                    yield self._taken
            position = end

    @property
    def _idle(self) -> bool:
        return self._lexer.idle and not self._building.begun

    def _take(self, kind: str, token: bytes) -> bool:
        """One token more; True if it completes a value or an error, which is in `_taken` then."""
        building = self._building
        if kind == "stray":
            return self._refuse(f"JSON parse error, stray '{token.decode()}'")
        if kind == "punctuation":
            building.braces += (token == b"{") - (token == b"}")
            building.brackets += (token == b"[") - (token == b"]")
        if building.token_bytes + len(token) + 1 > MAX_TOKEN_BYTES:
            return self._refuse("JSON token size limit exceeded")
        if building.tokens + 1 > MAX_TOKENS:
            return self._refuse("JSON token count limit exceeded")
        if building.braces + building.brackets > MAX_NESTING:
            return self._refuse("JSON nesting depth limit exceeded")
        building.tokens += 1
        building.token_bytes += len(token)
        if building.error is None:
            building.error = _parse(building, kind, token)
            if building.error is not None:
                building.open = []
        if (building.braces > 0 or building.brackets > 0) and building.braces >= 0 and building.brackets >= 0:
            return False
        if building.error is not None:
            return self._refuse(building.error)
        self._building, self._taken = _Building(), building.value
        return True

    def _refuse(self, text: str) -> bool:
        self._building, self._taken = _Building(), JSONError(text)
        return True


def _parse(building: _Building, kind: str, token: bytes) -> str | None:
    """Put one token into its place; the error's text if it has none."""
    state = building.open[-1] if building.open else None
    if state is not None:
        container, expected, _ = state
        is_object = isinstance(container, dict)
        if kind == "punctuation":
            if expected == _FIRST and token == (b"}" if is_object else b"]"):
                return _close(building)
            if expected == _SEPARATOR:
                if token == (b"}" if is_object else b"]"):
                    return _close(building)
                if token == b",":
                    state[1] = _KEY if is_object else _VALUE
                    return None
            if expected == _COLON and token == b":":
                state[1] = _VALUE
                return None
        if expected == _SEPARATOR:
            return f"JSON parse error, expected separator in {'dict' if is_object else 'list'}"
        if expected == _COLON:
            return "JSON parse error, missing : in object pair"
    if kind == "punctuation":
        if token == b"{":
            building.open.append([{}, _FIRST, None])
            return None
        if token == b"[":
            building.open.append([[], _FIRST, None])
            return None
        return "JSON parse error, expecting value"
    try:
        return _place(building, _literal(kind, token))
    except JSONError as error:
        return error.message


def _literal(kind: str, token: bytes) -> Any:
    if kind == "string":
        return unquote(token)
    if kind == "number":
        return number(token.decode("ascii"))
    if token not in _KEYWORDS:
        raise JSONError(f"JSON parse error, invalid keyword '{token.decode('ascii')}'")
    return _KEYWORDS[token]


def _close(building: _Building) -> str | None:
    return _place(building, building.open.pop()[0])


def _place(building: _Building, value: Any) -> str | None:
    """A value is complete: into its container, or it is the message itself."""
    if not building.open:
        building.value = value
        return None
    state = building.open[-1]
    container, expected, key = state
    if isinstance(container, list):
        container.append(value)
        state[1] = _SEPARATOR
        return None
    if expected == _VALUE:
        if key in container:
            return "JSON parse error, duplicate key"
        container[key] = value
        state[1] = _SEPARATOR
        return None
    if not isinstance(value, str):
        return "JSON parse error, key is not a string in object"
    state[1], state[2] = _COLON, value
    return None
