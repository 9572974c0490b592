"""The error that a user can mend, and the hints that come with it."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """A wrong argument or an input file that is missing, unreadable or invalid. Its message is one line for the user."""


def unknown(what: str, name: str, known: Iterable[str], more: str = "") -> InputError:
    """Error for a name that is not known, with the nearest known ones."""
    known = sorted(known)
    near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
    return InputError(f"{what} '{name}' is not known; {hint}{more}")
