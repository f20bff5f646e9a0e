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
from collections.abc import Generator, Iterator
from typing import Final

from stillframe.errors import InvalidRequest

MAX_TOKEN_BYTES: Final = 64 << 20

Token = tuple[str, bytes]


class JSONError(InvalidRequest):
    """The text is not JSON; the message is QEMU's."""


_WHITE: Final = re.compile(rb"[ \t\r\n]*")
_PUNCTUATION: Final = frozenset(b"{}[]:,")
_SKIPPED: Final = re.compile(rb"[^\x00-\x08\x0a-\x1f,:\[\]{}\xfe\xff]*")
_STRING_BODY: Final = {
    ord('"'): re.compile(rb'(?:[^\x00-\x1f"\\\xfe\xff]+|\\[^\x00-\x1f\xfe\xff])*'),
    ord("'"): re.compile(rb"(?:[^\x00-\x1f'\\\xfe\xff]+|\\[^\x00-\x1f\xfe\xff])*"),
}
_LETTERS: Final = re.compile(rb"[a-z]*")
_DIGITS: Final = re.compile(rb"[0-9]*")

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
            if self._recovering:
                position = _end(_SKIPPED, data, position)
                if position == size:
                    return
                self._recovering = False
            if not self._kind:
                position = _end(_WHITE, data, position)
                if position == size:
                    return
                byte = data[position]
                if byte in _PUNCTUATION:
                    position += 1
                    yield "punctuation", bytes((byte,))
                    continue
                self._token.append(byte)
                position += 1
                if byte in b"\"'":
                    self._kind, self._quote = "string", byte
                elif 0x61 <= byte <= 0x7A:
                    self._kind = "keyword"
                elif byte == 0x2D:
                    self._kind = "sign"
                elif byte == 0x30:
                    self._kind = "zero"
                elif 0x31 <= byte <= 0x39:
                    self._kind = "integer"
                else:
                    yield from self._stray()
                continue
            position = yield from self._go_on(data, position)

    def _go_on(self, data: bytes, position: int) -> Generator[Token, None, int]:
        """Lengthen the token that was begun; returns where it stopped."""
        kind = self._kind
        if kind == "string":
            stop = _end(_STRING_BODY[self._quote], data, position)
            self._token += data[position:stop]
            if stop == len(data):
                yield from self._bound()
                return stop
            byte = data[stop]
            self._token.append(byte)
            if byte == self._quote:
                yield from self._finish("string")
            elif byte == 0x5C and stop + 1 == len(data):
                self._kind = "escape"
            elif byte == 0x5C:
                self._token.append(data[stop + 1])
                yield from self._stray()
                return stop + 2
            else:
                yield from self._stray()
            return stop + 1
        byte = data[position]
        if kind == "escape":
            self._token.append(byte)
            if byte < 0x20 or byte >= 0xFE:
                yield from self._stray()
            else:
                self._kind = "string"
            return position + 1
        if kind == "keyword":
            return (yield from self._run(_LETTERS, "keyword", data, position))
        if kind == "sign":
            return (yield from self._must(data, position, {0x30: "zero"}, "integer"))
        if kind == "zero":
            if 0x30 <= byte <= 0x39:
                self._token.append(byte)
                yield from self._stray()
                return position + 1
            if byte in b"eE":
                # QEMU takes no exponent right after a lone zero: the number ends here.
                yield from self._finish("number")
                return position
            return (yield from self._after_integer(data, position))
        if kind == "integer":
            stop = _end(_DIGITS, data, position)
            self._token += data[position:stop]
            if stop == len(data):
                yield from self._bound()
                return stop
            return (yield from self._after_integer(data, stop))
        if kind == "point":
            return (yield from self._must(data, position, {}, "fraction"))
        if kind == "fraction":
            stop = _end(_DIGITS, data, position)
            self._token += data[position:stop]
            if stop == len(data):
                yield from self._bound()
                return stop
            if data[stop] in b"eE":
                self._token.append(data[stop])
                self._kind = "e"
                return stop + 1
            yield from self._finish("number")
            return stop
        if kind == "e":
            return (
                yield from self._must(
                    data, position, {0x2B: "exponent sign", 0x2D: "exponent sign"}, "exponent"
                )
            )
        if kind == "exponent sign":
            return (yield from self._must(data, position, {}, "exponent"))
        return (yield from self._run(_DIGITS, "number", data, position))

    def _run(
        self, letters: re.Pattern[bytes], finished: str, data: bytes, position: int
    ) -> Generator[Token, None, int]:
        """The rest of a token that ends where something else begins."""
        stop = _end(letters, data, position)
        self._token += data[position:stop]
        if stop == len(data):
            yield from self._bound()
        else:
            yield from self._finish(finished)
        return stop

    def _must(
        self, data: bytes, position: int, others: dict[int, str], digits: str
    ) -> Generator[Token, None, int]:
        """A byte that has to be a digit, or one of `others`."""
        byte = data[position]
        self._token.append(byte)
        if byte in others:
            self._kind = others[byte]
        elif 0x30 <= byte <= 0x39:
            self._kind = digits
        else:
            yield from self._stray()
        return position + 1

    def _after_integer(self, data: bytes, position: int) -> Generator[Token, None, int]:
        byte = data[position]
        if byte == 0x2E:
            self._token.append(byte)
            self._kind = "point"
            return position + 1
        if byte in b"eE":
            self._token.append(byte)
            self._kind = "e"
            return position + 1
        yield from self._finish("number")
        return position

    def _bound(self) -> Iterator[Token]:
        """A token that grows past all bounds is given up."""
        if len(self._token) > MAX_TOKEN_BYTES:
            yield from self._finish("string")

    def _stray(self) -> Iterator[Token]:
        text = readable(bytes(self._token).split(b"\0", 1)[0])
        self._reset()
        self._recovering = True
        yield "stray", text.encode("utf-8")

    def _reset(self) -> None:
        self._token = bytearray()
        self._kind = ""

    def _finish(self, kind: str) -> Iterator[Token]:
        token = bytes(self._token)
        self._reset()
        yield kind, token


def _end(pattern: re.Pattern[bytes], data: bytes, position: int) -> int:
    match = pattern.match(data, position)
    return match.end() if match is not None else position
