"""Bytes into the tokens of QEMU's JSON: kinds, errors and recovery as its monitor's.

    kind          token
    punctuation   one of { } [ ] : ,
    string        with its quotes, escapes as they came
    number        as it came
    keyword       a run of small letters
    stray         the readable text of bytes that begin no token, or break one off

After a stray byte everything up to the next structural character or line end is skipped.
"""

import re
from collections.abc import Iterator
from typing import Final

from stillframe.errors import InvalidRequest

MAX_TOKEN_BYTES: Final = 64 << 20

Token = tuple[str, bytes]


class JSONError(InvalidRequest):
    """The text is not JSON; the message is QEMU's."""


_WHITE: Final = frozenset(b" \t\r\n")
_PUNCTUATION: Final = frozenset(b"{}[]:,")
_SKIPPED: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f,:\[\]{}\xfe\xff]*")
_STRING_BODY: Final = {
    ord('"'): re.compile(rb'(?:[^\x00-\x1f"\\\xfe\xff]+|\\[^\x00-\x1f\xfe\xff])*'),
    ord("'"): re.compile(rb"(?:[^\x00-\x1f'\\\xfe\xff]+|\\[^\x00-\x1f\xfe\xff])*"),
}
_LETTERS: Final = re.compile(rb"[a-z]*")
_DIGITS: Final = re.compile(rb"[0-9]*")
_NOTHING: Final = re.compile(rb"")

_SIMPLE_ESCAPES: Final = {
    '"': '"',
    "'": "'",
    "\\": "\\",
    "/": "/",
    "b": "\b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
}
_PLANE_ENDS: Final = "".join(chr(plane << 16 | last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
_NON_CHARACTER: Final = re.compile(f"[\ufdd0-\ufdef{_PLANE_ENDS}]")


def unquote(token: bytes) -> str:
    """A string token's value.

    :raise JSONError: an escape or a sequence of bytes that stands for no character.
    """
    body = token[1:-1]
    # QEMU's own way to write a NUL inside a C string.
    text = _decode(body)
    if text is not None and "\\" not in text:
        return text
    return _unescape(token)


def _decode(body: bytes) -> str | None:
    try:
        text = body.replace(b"\xc0\x80", b"\0").decode() if b"\xc0" in body else body.decode()
    except UnicodeDecodeError:
        return None
    return None if not text.isascii() and _NON_CHARACTER.search(text) else text


def _unescape(token: bytes) -> str:
    pieces: list[str] = []
    position, end = 1, len(token) - 1
    while position < end:
        start = token.find(b"\\", position, end)
        text = _decode(token[position : start if start >= 0 else end])
        if text is None:
            raise JSONError("JSON parse error, invalid UTF-8 sequence in string")
        pieces.append(text)
        if start < 0:
            break
        letter = chr(token[start + 1])
        if letter == "u":
            character, position = _unicode_escape(token, start)
            pieces.append(character)
            continue
        simple = _SIMPLE_ESCAPES.get(letter)
        if simple is None:
            raise JSONError("JSON parse error, invalid escape sequence in string")
        pieces.append(simple)
        position = start + 2
    return "".join(pieces)


def _unicode_escape(token: bytes, start: int) -> tuple[str, int]:
    """The character that the `\\u` at `start` stands for, and where the next one begins."""
    end = start + 6
    code = _hex4(token[start + 2 : end])
    if code is not None and 0xD800 <= code < 0xDC00 and token[end : end + 2] == b"\\u":
        low = _hex4(token[end + 2 : end + 6])
        if low is not None and 0xDC00 <= low < 0xE000:
            code = 0x10000 + ((code & 0x3FF) << 10 | low & 0x3FF)
            end += 6
    if code is None or 0xD800 <= code < 0xE000 or 0xFDD0 <= code < 0xFDF0 or code & 0xFFFE == 0xFFFE:
        said = readable(token[start:end])
        raise JSONError(f"JSON parse error, {said} is not a valid Unicode character")
    return chr(code), end


_SEQUENCE: Final = re.compile(
    rb"[\x00-\x7f]+|[\xc0-\xdf][\x80-\xbf]?|[\xe0-\xef][\x80-\xbf]{0,2}|[\xf0-\xf7][\x80-\xbf]{0,3}"
    rb"|[\xf8-\xfb][\x80-\xbf]{0,4}|[\xfc-\xfd][\x80-\xbf]{0,5}|.",
    re.DOTALL,
)


def readable(data: bytes) -> str:
    """Bytes that may not be UTF-8 as a text: U+FFFD for each sequence that stands for no character."""
    if data.isascii():
        return data.decode("ascii")
    return "".join("\ufffd" if (text := _decode(part)) is None else text for part in _SEQUENCE.findall(data))


def _hex4(digits: bytes) -> int | None:
    return int(digits, 16) if re.fullmatch(rb"[0-9a-fA-F]{4}", digits) else None


def number(text: str) -> int | float:
    """A number token's value: int64, uint64, else double."""
    if len(text) <= 21 and not re.search(r"[.eE]", text):
        value = int(text)
        if -(1 << 63) <= value < 1 << 64:
            return value
    return float(text)


_SINGLE: Final = {byte: bytes((byte,)) for byte in _PUNCTUATION}
_BEGINNINGS: Final = {
    ord('"'): "string",
    ord("'"): "string",
    ord("-"): "sign",
    ord("0"): "zero",
    **dict.fromkeys(range(0x31, 0x3A), "integer"),
    **dict.fromkeys(range(0x61, 0x7B), "keyword"),
}

# What a byte after the beginning of a number makes of it, where it has to be one of these.
_MUST: Final = {
    "sign": {ord("0"): "zero", **dict.fromkeys(range(0x31, 0x3A), "integer")},
    "point": dict.fromkeys(range(0x30, 0x3A), "fraction"),
    "e": {
        ord("+"): "exponent sign",
        ord("-"): "exponent sign",
        **dict.fromkeys(range(0x30, 0x3A), "exponent"),
    },
    "exponent sign": dict.fromkeys(range(0x30, 0x3A), "exponent"),
}

# What may go on for any number of bytes, and which byte then leads on to what. QEMU takes no exponent right
# after a lone zero.
_RUNS: Final[dict[str, tuple[re.Pattern[bytes], str, dict[int, str]]]] = {
    "keyword": (_LETTERS, "keyword", {}),
    "zero": (_NOTHING, "number", {ord("."): "point"}),
    "integer": (_DIGITS, "number", {ord("."): "point", ord("e"): "e", ord("E"): "e"}),
    "fraction": (_DIGITS, "number", {ord("e"): "e", ord("E"): "e"}),
    "exponent": (_DIGITS, "number", {}),
}


class Lexer:
    """The state between two pieces of a connection's text: the token that has begun. Time is linear in the
    input.
    """

    def __init__(self) -> None:
        self._token = bytearray()
        self._kind = ""
        self._quote = 0
        self._recovering = False

    @property
    def idle(self) -> bool:
        """Between two tokens."""
        return not self._kind and not self._recovering

    def feed(self, data: bytes) -> Iterator[Token]:
        """The tokens that are complete with `data`. The iterator must be finished before the next call."""
        position = 0
        size = len(data)
        while position < size:
            if self._kind:
                position, token = self._go_on(data, position)
                if token is not None:
                    yield token
                continue
            if self._recovering:
                position = _end(_SKIPPED, data, position)
                if position == size:
                    return
                self._recovering = False
            byte = data[position]
            position += 1
            if byte in _SINGLE:
                yield "punctuation", _SINGLE[byte]
            elif byte not in _WHITE:
                self._token.append(byte)
                self._kind = _BEGINNINGS.get(byte, "")
                self._quote = byte
                if not self._kind:
                    yield self._stray()

    def _go_on(self, data: bytes, position: int) -> tuple[int, Token | None]:
        """Lengthen the token that was begun: where that stopped, and the token if it is complete."""
        kind = self._kind
        if kind == "string":
            return self._string(data, position)
        byte = data[position]
        if kind == "escape":
            self._token.append(byte)
            if byte < 0x20 or byte >= 0xFE:
                return position + 1, self._stray()
            self._kind = "string"
            return position + 1, None
        if kind in _MUST:
            self._token.append(byte)
            self._kind = _MUST[kind].get(byte, "")
            return position + 1, None if self._kind else self._stray()
        pattern, finished, leads = _RUNS[kind]
        stop = _end(pattern, data, position)
        self._token += data[position:stop]
        if stop == len(data):
            return stop, self._bound()
        byte = data[stop]
        if kind == "zero" and 0x30 <= byte <= 0x39:
            self._token.append(byte)
            return stop + 1, self._stray()
        if byte in leads:
            self._token.append(byte)
            self._kind = leads[byte]
            return stop + 1, None
        return stop, self._finish(finished)

    def _string(self, data: bytes, position: int) -> tuple[int, Token | None]:
        stop = _end(_STRING_BODY[self._quote], data, position)
        self._token += data[position:stop]
        if stop == len(data):
            return stop, self._bound()
        byte = data[stop]
        self._token.append(byte)
        if byte == self._quote:
            return stop + 1, self._finish("string")
        if byte != 0x5C:
            return stop + 1, self._stray()
        # The body takes every escape that is whole and may be: this one is neither.
        self._kind = "escape"
        return stop + 1, None

    def _bound(self) -> Token | None:
        """A token that grows past all bounds is given up."""
        return self._finish("string") if len(self._token) > MAX_TOKEN_BYTES else None

    def _stray(self) -> Token:
        text = readable(bytes(self._token).split(b"\0", 1)[0])
        self._recovering = True
        self._reset()
        return "stray", text.encode()

    def _finish(self, kind: str) -> Token:
        token = bytes(self._token)
        self._reset()
        return kind, token

    def _reset(self) -> None:
        self._token = bytearray()
        self._kind = ""


def _end(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    match = pattern.match(data, position)
    return match.end() if match is not None else position
