"""Options of what a machine here has in one way alone: that way is accepted, every other refused."""

import json
from collections.abc import Mapping
from pathlib import Path

from stillframe.cli.drop_in_parameters import PARAMETERS, refuse_unknown
from stillframe.cli.drop_in_words import BadOption, Option, key_values, switch

_ONLY: Mapping[str, Mapping[str, str]] = {
    "rtc": {"base": "utc", "clock": "host", "driftfix": "none"},
    "overcommit": {"mem-lock": "off", "cpu-pm": "off"},
}
_OBJECTS: Mapping[str, frozenset[str]] = {
    "secret": frozenset({"format", "file", "data", "keyid", "iv"}),
    "rng-builtin": frozenset(),
    "rng-random": frozenset({"filename"}),
}
_KERNELS = ("/dev/urandom", "/dev/random")
"""Where the entropy device's bytes come from: the same generator behind both."""


def check_setting(option: Option) -> None:
    """`-rtc` and `-overcommit`. :raise BadOption: they ask for what is not here."""
    words = key_values(option)
    refuse_unknown(option, option.name, words)
    for key, value in words.items():
        if value != _ONLY[option.name][key]:
            raise option.refused(f"Parameter '{key}' does not accept value '{value}'")


def check_boot(option: Option) -> None:
    """`-boot`: a menu is not there, and whether the order is strict is the same where nobody reads it (no-boot-order).

    :raise BadOption: an order, or a menu.
    """
    for key, value in key_values(option, "order").items():
        if key not in PARAMETERS["boot-opts"]:
            raise BadOption(f"Parameter 'boot.{key}' is unexpected")
        if switch_of(f"boot.{key}", value) and key == "menu":
            raise BadOption("Parameter 'boot.menu' does not accept value 'on'")


def switch_of(name: str, value: str) -> bool:
    """As `switch`, for what QEMU reads later than its options, and names without them."""
    try:
        return switch(Option("", ""), name, value)
    except BadOption:
        raise BadOption(f"Parameter '{name}' expects 'on' or 'off'") from None


def check_audio(option: Option) -> None:
    """`-audiodev`: sound that goes nowhere. :raise BadOption: any other."""
    words = _words(option, "driver")
    driver = words.get("driver", "")
    if driver != "none":
        raise option.refused(f"Parameter 'driver' does not accept value '{driver}'")
    _identity(option, words)
    for key in words.keys() - {"driver", "id"}:
        raise option.refused(f"Parameter '{key}' is unexpected")


def read_object(option: Option) -> tuple[str, str]:
    """The id and the type of an `-object`. A secret is looked at and forgotten: nothing here takes one.

    :raise BadOption: another object, a secret that cannot be read, a source of entropy other than the kernel's.
    """
    words = _words(option, "qom-type")
    kind = words.get("qom-type", "")
    if kind not in _OBJECTS:
        raise option.refused(f"Parameter 'qom-type' does not accept value '{kind}'")
    identity = _identity(option, words)
    for key in words.keys() - _OBJECTS[kind] - {"qom-type", "id"}:
        raise option.refused(f"Invalid parameter '{key}'")
    if kind == "secret":
        _look_at_secret(words)
    elif (source := words.get("filename", _KERNELS[0])) not in _KERNELS:
        if not Path(source).exists():
            raise BadOption(f"Could not open '{source}': No such file or directory")
        raise option.refused(f"Parameter 'filename' does not accept value '{source}'")
    return identity, kind


def _look_at_secret(words: Mapping[str, str]) -> None:
    if "file" in words:
        path = Path(words["file"])
        try:
            path.read_bytes()
        except OSError as error:
            raise BadOption(
                f"Unable to read {path}: Failed to open file “{path}”: {error.strerror}"
            ) from error
    elif "data" not in words:
        raise BadOption("Either 'file' or 'data' must be provided")


def _identity(option: Option, words: Mapping[str, str]) -> str:
    if "id" not in words:
        raise option.refused("Parameter 'id' is missing")
    return words["id"]


def _words(option: Option, first: str) -> dict[str, str]:
    if not option.value.startswith("{"):
        return key_values(option, first)
    try:
        found = json.loads(option.value)
    except (ValueError, RecursionError) as error:
        raise option.refused(f"JSON parse error, {error}") from error
    return {str(key): str(value) for key, value in found.items()}
