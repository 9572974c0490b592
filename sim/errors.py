"""The error that a user can mend, the hints that come with it, and the checks that raise it."""

import difflib
from collections.abc import Iterable
from numbers import Integral
from typing import Any

_MOST_NAMES = 20  # more names than these are not listed in a message


class InputError(ValueError):
    """A wrong argument or an input file that is missing, unreadable or invalid. Its message is one line for the user.

    A message names a parameter in backquotes, as in "`ep_sizes` 300: ..."; the command line writes the option in its place,
    "--ep 300: ..." (`sim.options`).
    """


class RunError(RuntimeError):
    """A run that began well and failed, by no fault of its arguments. Its message is one line for the user."""


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> InputError:
    """Error for a name that is not known, with those that it is part of or near to, else all of a few."""
    known, own = sorted(known), name.lower()
    near = [one for one in known if len(own) > 2 and own in one][:3]
    near = near or difflib.get_close_matches(own, known, cutoff=0.5)  # eblp is as near to eplb
    if near:
        hint = f"; did you mean {' or '.join(near)}?"
    else:
        hint = f"; known: {', '.join(known)}" if len(known) <= _MOST_NAMES else ""
    return InputError(f"{what} '{name}' is not known{hint}{more}")


def whole_number(option: str, value: Any, least: int, most: int) -> int:
    """The value as an int, or an error that names the option and what is allowed."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise InputError(f"{option} {shown(value)}: must be a whole number from {least} to {most}")
    return int(value)


def counted(n: int, noun: str) -> str:
    """'1 layer', '2 layers'."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


def shown(value: Any) -> str:
    """A value as a message shows it: a string as it is, others by their repr, cut to a readable length."""
    if isinstance(value, int) and value.bit_length() > 10_000:  # beyond what Python turns into digits
        return f"(of type {type(value).__name__})"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
