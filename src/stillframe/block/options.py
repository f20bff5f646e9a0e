"""What a node is to be, as its user wrote it: QMP's object, or the command line's text, checked into
`NodeOptions`.

    driver=qcow2,node-name=root,file.driver=file,file.filename=a,,b.qcow2        dotted keys; `,,` is a comma
    {"driver": "qcow2", "node-name": "root", "file": {...} or "NODE"}            JSON, with JSON's types

Members are looked at in the order of QEMU's schema, and the first mistake is reported in its words. An option
that QEMU knows and stillframe does not do is refused by name, unless its value is what QEMU does without it.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from stillframe.errors import InvalidRequest, Unsupported

_MAX_DEPTH = 32
_INT64 = range(-(1 << 63), 1 << 63)
_KEY_FRAGMENT = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True, slots=True)
class NodeOptions:
    """One node and the nodes below it, as asked for.

    :param read_only: None where not given, as with all of these: the graph knows what to inherit.
    :param discard: whether discards are passed on ("unmap") or ignored.
    :param settings: the driver's own options that were given, by their names.
    :param children: by role; a string names a node that is there already, None asks for no such child: as "data-file", which no
        user can write, for a node that is read-only and only described.
    """

    driver: str
    node_name: str | None = None
    read_only: bool | None = None
    auto_read_only: bool | None = None
    force_share: bool | None = None
    discard: bool | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    children: Mapping[str, "NodeOptions | str | None"] = field(default_factory=dict)


def parse_options(text: str) -> NodeOptions:
    """The text after `--blockdev`: JSON if it begins with a brace, else dotted keys.

    :raise InvalidRequest: in QEMU's words. :raise Unsupported: an option that we know and do not do.
    """
    if text.lstrip().startswith("{"):
        return read_options(parse_json_options(text))
    return _read(_parse_dotted(text), typed=False)


def read_options(arguments: Mapping[str, Any]) -> NodeOptions:
    """The arguments of QMP's `blockdev-add`; raises as `parse_options` does."""
    return _read(arguments, typed=True)


def parse_json_options(text: str) -> dict[str, Any]:
    """An object out of JSON text, every key once. :raise InvalidRequest: it is not one."""
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError as error:
        raise InvalidRequest("JSON nesting depth limit exceeded") from error
    except json.JSONDecodeError as error:
        raise InvalidRequest(f"JSON parse error, {error.msg} at character {error.pos}") from error
    except ValueError as error:
        # Python's bound on the digits of a number.
        raise InvalidRequest("JSON parse error, a number is too long") from error
    if not isinstance(value, dict):
        raise InvalidRequest("JSON parse error, expecting an object")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise InvalidRequest("JSON parse error, duplicate key")
    return made


def _parse_dotted(text: str) -> dict[str, Any]:
    root: dict[str, Any] = {}
    position = 0
    while position < len(text):
        key_end = min(
            (text.find(mark, position) for mark in "=," if text.find(mark, position) >= 0), default=len(text)
        )
        key = text[position:key_end]
        if key_end < len(text) and text[key_end] == "=":
            position = key_end + 1
        elif position == 0:
            # Only the first may leave its name out: it is the driver then.
            key, position = "driver", 0
        else:
            raise InvalidRequest(f"Expected '=' after parameter '{key}'")
        value, position = _dotted_value(text, position)
        _put(root, key, value)
    return root


def _dotted_value(text: str, position: int) -> tuple[str, int]:
    """The value that begins at `position`, and where the next key does."""
    parts = []
    while True:
        comma = text.find(",", position)
        if comma < 0:
            parts.append(text[position:])
            return "".join(parts), len(text)
        parts.append(text[position:comma])
        if text[comma : comma + 2] != ",,":
            return "".join(parts), comma + 1
        parts.append(",")
        position = comma + 2


def _put(root: dict[str, Any], key: str, value: str) -> None:
    fragments = key.split(".")
    if len(fragments) > _MAX_DEPTH or not all(_KEY_FRAGMENT.fullmatch(fragment) for fragment in fragments):
        raise InvalidRequest(f"Invalid parameter '{key}'")
    here = root
    for depth, fragment in enumerate(fragments[:-1]):
        here = here.setdefault(fragment, {})
        if not isinstance(here, dict):
            raise _inconsistent(fragments[: depth + 1])
    if isinstance(here.get(fragments[-1]), dict):
        raise _inconsistent(fragments)
    here[fragments[-1]] = value


def _inconsistent(fragments: list[str]) -> InvalidRequest:
    return InvalidRequest(f"Parameters '{'.'.join(fragments)}.*' used inconsistently")


class _Object:
    """One object of options while it is read: takes its members, remembers which, knows its own path.

    :param typed: values have JSON's types; else all are text.
    """

    def __init__(self, members: Mapping[str, Any], path: str, typed: bool) -> None:
        self._members = members
        self._path = path
        self._typed = typed
        self._taken: set[str] = set()
        self._not_done: list[str] = []

    def name_of(self, member: str) -> str:
        return f"{self._path}.{member}" if self._path else member

    def has(self, member: str) -> bool:
        return member in self._members

    def take(self, member: str) -> Any:
        self._taken.add(member)
        try:
            return self._members[member]
        except KeyError:
            raise InvalidRequest(f"Parameter '{self.name_of(member)}' is missing") from None

    def text(self, member: str) -> str:
        value = self.take(member)
        if not isinstance(value, str):
            raise self._wrong_type(member, "string")
        return value

    def boolean(self, member: str) -> bool:
        value = self.take(member)
        if self._typed and isinstance(value, bool):
            return value
        if self._typed or not isinstance(value, str):
            raise self._wrong_type(member, "boolean")
        if value in ("on", "yes", "true", "y"):
            return True
        if value in ("off", "no", "false", "n"):
            return False
        raise InvalidRequest(f"Parameter '{self.name_of(member)}' expects 'on' or 'off'")

    def integer(self, member: str) -> int:
        value = self.take(member)
        if self._typed and isinstance(value, int) and not isinstance(value, bool) and value in _INT64:
            return value
        if self._typed or not isinstance(value, str):
            raise self._wrong_type(member, "integer")
        try:
            number = int(value, 0)
        except ValueError:
            number = _INT64.stop
        if number not in _INT64:
            raise InvalidRequest(f"Parameter '{self.name_of(member)}' expects integer")
        return number

    def word(self, member: str, allowed: tuple[str, ...]) -> str:
        value = self.text(member)
        if value not in allowed:
            # QEMU leaves the path out where the word chooses between kinds of objects.
            name = member if member == "driver" else self.name_of(member)
            raise InvalidRequest(f"Parameter '{name}' does not accept value '{value}'")
        return value

    def object(self, member: str) -> "_Object":
        value = self.take(member)
        if not isinstance(value, Mapping):
            raise self._wrong_type(member, "object")
        return _Object(value, self.name_of(member), self._typed)

    def child(self, member: str) -> NodeOptions | str | None:
        value = self.take(member)
        if isinstance(value, str):
            return value
        if isinstance(value, Mapping):
            return _read(value, self.name_of(member), typed=self._typed)
        if member == "backing":
            if value is None:
                return None
            raise self._wrong_type(member, "BlockdevRefOrNull")
        raise self._wrong_type(member, "BlockdevRef")

    def unsupported(self, member: str, value: Any, without: Any) -> None:
        """Note that the option is not done, where it asks for something other than leaving it out would."""
        if value != without:
            shown = json.dumps(value) if isinstance(value, bool) else value
            name = self.name_of(member)
            self._not_done.append(f"Parameter '{name}' with the value '{shown}' is not supported")

    def finish(self) -> None:
        """Refuse what nobody took, and what was noted."""
        for member in self._members:
            if member not in self._taken:
                raise InvalidRequest(f"Parameter '{self.name_of(member)}' is unexpected")
        for text in self._not_done:
            raise Unsupported(text, remedy="Leave the option out.")

    def _wrong_type(self, member: str, expected: str) -> InvalidRequest:
        return InvalidRequest(f"Invalid parameter type for '{self.name_of(member)}', expected: {expected}")


def _read(members: Mapping[str, Any], path: str = "", *, typed: bool) -> NodeOptions:
    if path.count(".") >= _MAX_DEPTH:
        raise InvalidRequest(f"Parameter '{path[:40]}...' is nested too deep")
    options = _Object(members, path, typed)
    driver = options.word("driver", tuple(_DRIVERS))
    node_name = options.text("node-name") if options.has("node-name") else None
    discard = None
    if options.has("discard"):
        discard = options.word("discard", ("ignore", "off", "unmap", "on")) in ("unmap", "on")
    if options.has("cache"):
        cache = options.object("cache")
        for member in ("direct", "no-flush"):
            if cache.has(member):
                cache.unsupported(member, cache.boolean(member), False)
        cache.finish()
    flags = {
        member: options.boolean(member)
        for member in ("read-only", "auto-read-only", "force-share")
        if options.has(member)
    }
    if options.has("detect-zeroes"):
        options.unsupported("detect-zeroes", options.word("detect-zeroes", ("off", "on", "unmap")), "off")
    settings, children = _DRIVERS[driver](options)
    options.finish()
    return NodeOptions(
        driver=driver,
        node_name=node_name,
        read_only=flags.get("read-only"),
        auto_read_only=flags.get("auto-read-only"),
        force_share=flags.get("force-share"),
        discard=discard,
        settings=settings,
        children=children,
    )


_Own = tuple[dict[str, Any], dict[str, NodeOptions | str | None]]


def _read_file(options: _Object) -> _Own:
    settings: dict[str, Any] = {"filename": options.text("filename")}
    if options.has("pr-manager"):
        options.unsupported("pr-manager", options.text("pr-manager"), None)
    if options.has("locking"):
        settings["locking"] = options.word("locking", ("auto", "on", "off"))
    if options.has("aio"):
        options.unsupported("aio", options.word("aio", ("threads", "native", "io_uring")), "threads")
    if options.has("aio-max-batch"):
        options.unsupported("aio-max-batch", options.integer("aio-max-batch"), 0)
    if options.has("drop-cache"):
        options.unsupported("drop-cache", options.boolean("drop-cache"), True)
    if options.has("x-check-cache-dropped"):
        options.unsupported("x-check-cache-dropped", options.boolean("x-check-cache-dropped"), False)
    return settings, {}


def _read_null(options: _Object) -> _Own:
    settings: dict[str, Any] = {}
    for member in ("size", "latency-ns"):
        if options.has(member):
            settings[member] = options.integer(member)
    if options.has("read-zeroes"):
        settings["read-zeroes"] = options.boolean("read-zeroes")
    return settings, {}


def _read_raw(options: _Object) -> _Own:
    children = {"file": options.child("file")}
    settings = {member: options.integer(member) for member in ("offset", "size") if options.has(member)}
    for member, value in settings.items():
        if value < 0:
            raise InvalidRequest(f"Value '{value}' is out of range for parameter '{member}'")
    return settings, children


def _read_qcow2(options: _Object) -> _Own:
    children = {"file": options.child("file")}
    if options.has("backing"):
        children["backing"] = options.child("backing")
    if options.has("lazy-refcounts"):
        options.unsupported("lazy-refcounts", options.boolean("lazy-refcounts"), False)
    for member, without in (
        ("pass-discard-request", None),
        ("pass-discard-snapshot", True),
        ("pass-discard-other", False),
        ("discard-no-unref", False),
    ):
        if options.has(member):
            options.unsupported(member, options.boolean(member), without)
    if options.has("overlap-check"):
        _refuse_overlap_check(options)
    for member in ("cache-size", "l2-cache-size", "l2-cache-entry-size", "refcount-cache-size"):
        if options.has(member):
            options.unsupported(member, options.integer(member), None)
    if options.has("cache-clean-interval"):
        options.unsupported("cache-clean-interval", options.integer("cache-clean-interval"), 600)
    if options.has("encrypt"):
        options.take("encrypt")
        options.unsupported("encrypt", "...", None)
    if options.has("data-file"):
        children["data-file"] = options.child("data-file")
    return {}, children


def _refuse_overlap_check(options: _Object) -> None:
    if isinstance(options.take("overlap-check"), Mapping):
        options.unsupported("overlap-check", "...", None)
    else:
        word = options.word("overlap-check", ("none", "constant", "cached", "all"))
        options.unsupported("overlap-check", word, "cached")


_DRIVERS: Final[Mapping[str, Callable[[_Object], _Own]]] = {
    "file": _read_file,
    "host_device": _read_file,
    "raw": _read_raw,
    "null-co": _read_null,
    "qcow2": _read_qcow2,
}
