"""Kinds of values: how each is read from a text of the command line, and what it may be.

Called with a text, a kind reads it, as argparse's `type=` wants it; `check` is for values from Python.
"""

import math
from argparse import ArgumentTypeError
from collections.abc import Iterable
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from sim.errors import InputError, shown, unknown
from sim.files import is_there

MAX_TOKENS = 2**24
_MAX_VALUES = 10_000
_UNITS_S = {"s": 1, "m": 60, "h": 3600}
_LONGEST_METAVAR = 30
_ABOVE_0, _BELOW_1 = math.nextafter(0.0, 1.0), math.nextafter(1.0, 0.0)


@dataclass(frozen=True)
class Kind:
    """Text as it is: a name, or a path that another module opens."""

    metavar: str = field(default="NAME", kw_only=True)
    python = "str"

    def __call__(self, text: str) -> Any:
        """The value that a text of the command line stands for. Raises ArgumentTypeError."""
        value = self.read(text)
        if (problem := self.problem(value)) is not None:
            raise ArgumentTypeError(f"{shown(text)}: {problem}")
        return value

    def check(self, name: str, value: Any) -> Any:
        """The value of a parameter. Raises InputError that names the parameter."""
        if (problem := self.problem(value)) is not None:
            raise InputError(f"`{name}` {shown(value)}: {problem}")
        return value

    def read(self, text: str) -> Any:
        """The value, before its range is looked at. Raises ArgumentTypeError."""
        return text

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, None if nothing is."""
        return None


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `least` to `most`; without them any, and a later check knows the range."""

    least: int | None = None
    most: int | None = None
    metavar: str = field(default="N", kw_only=True)
    python = "int"

    def read(self, text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise ArgumentTypeError(f"'{text}': expected a whole number") from None

    def check(self, name: str, value: Any) -> Any:
        """See `Kind`; what is no whole number is left to the later check, where there is one."""
        return int(super().check(name, value)) if self.least is not None else value

    def problem(self, value: Any) -> str | None:
        if self.least is None or self.most is None:
            return None
        fits = not isinstance(value, bool) and isinstance(value, Integral) and self.least <= int(value) <= self.most
        return None if fits else f"must be a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Number(Kind):
    """A number from `least` to `most`, times `scale` where the command line has another unit than Python."""

    least: float = 0.0
    most: float = 1e15
    metavar: str = field(default="X", kw_only=True)
    scale: float = 1.0
    allowed: str = field(default="", kw_only=True)  # in words, where the range is not said as least and most
    python = "float"

    def __call__(self, text: str) -> float:
        value = self.scale * float(super().__call__(text))
        if self.scale != 1 and (problem := self.problem(value)) is not None:  # later it would be told in Python's unit
            raise ArgumentTypeError(f"{text}: {problem}")
        return value

    def read(self, text: str) -> float:
        try:
            return float(text)
        except ValueError:
            raise ArgumentTypeError(f"{text}: {self.problem(None)}") from None

    def check(self, name: str, value: Any) -> float:
        return float(super().check(name, value))

    def problem(self, value: Any) -> str | None:
        fits = not isinstance(value, bool) and isinstance(value, Real) and self.least <= float(value) <= self.most
        return None if fits else f"must be {self.allowed or f'a number from {self.least:g} to {self.most:g}'}"


@dataclass(frozen=True)
class Measured(Number):
    """A number that was measured: on the command line the option alone stands for `alone`."""

    alone: float = field(kw_only=True)


@dataclass(frozen=True)
class Positive(Number):
    """A number above 0, and at most 1e6."""

    least: float = _ABOVE_0
    most: float = 1e6
    allowed: str = "a number above 0, and at most 1e6"


@dataclass(frozen=True)
class Share(Number):
    """A share, as in 1% or 0.01."""

    most: float = 1.0
    metavar: str = field(default="SHARE", kw_only=True)
    allowed: str = "a share from 0% to 100%, as in 1% or 0.01"

    def read(self, text: str) -> float:
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ArgumentTypeError(f"'{text}': expected a share as in 1% or 0.01") from None


@dataclass(frozen=True)
class Seconds(Kind):
    """A time, as in 90s, 10m or 2h."""

    metavar: str = field(default="TIME", kw_only=True)
    python = "float"

    def read(self, text: str) -> float:
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS_S else (text, "s")
        try:
            value = float(number) * _UNITS_S[unit]
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ArgumentTypeError(f"'{text}': expected a time as in 90s, 10m or 2h")
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """A few short names are their own metavar."""
        if len(text := "|".join(self.names)) <= _LONGEST_METAVAR:
            object.__setattr__(self, "metavar", text)

    def __call__(self, text: str) -> str:
        return str(self.check("", text))

    def check(self, name: str, value: Any) -> str:
        if value in self.names:
            return str(value)
        error = unknown(f"`{name}`" if name else "", shown(value), self.names)
        raise error if name else ArgumentTypeError(str(error).strip())


@dataclass(frozen=True)
class Folder(Kind):
    """Name of a folder that is there or can be made."""

    metavar: str = field(default="DIR", kw_only=True)

    def read(self, text: str) -> Path:
        if not text.strip() or "\0" in text:
            raise ArgumentTypeError("must be the name of a folder")
        if is_there(Path(text)) and not Path(text).is_dir():
            raise ArgumentTypeError(f"{text} is a file, not a folder")
        return Path(text)


@dataclass(frozen=True)
class NewFile(Kind):
    """Name of a file that is written, with one of some endings, in a folder that is there."""

    metavar: str = field(default="FILE", kw_only=True)
    endings: tuple[str, ...] = ()

    def read(self, text: str) -> Path:
        path = Path(text)
        if path.suffix.lower() not in self.endings or path.is_dir():
            raise ArgumentTypeError(f"'{text}': must be the name of a {' or '.join(self.endings)} file")
        if not path.parent.is_dir():
            raise ArgumentTypeError(f"{text}: the folder {path.parent} does not exist")
        return path


@dataclass(frozen=True)
class Listed(Kind):
    """One value or several of a kind."""

    metavar: str = field(default="LIST", kw_only=True)
    of: Kind = Kind()
    may_repeat: bool = False

    @property
    def python(self) -> str:  # type: ignore[override]
        """Type in Python."""
        return f"{self.of.python} or list of {self.of.python}"

    def __call__(self, text: str) -> list[Any]:
        """See `Kind`. Whole numbers take ranges: `8..64` doubles; `2..12:2` counts up by 2."""
        parts: list[Any] = [part.strip() for part in text.split(",")]
        if isinstance(self.of, Whole):
            parts = [value for part in parts for value in _range(part)]
        elif not all(parts):
            raise ArgumentTypeError(f"'{text}': expected values with commas between them")
        if len(parts) > _MAX_VALUES:
            raise ArgumentTypeError(f"{text}: more than {_MAX_VALUES} values")
        return [self.of(part) for part in parts]

    def check(self, name: str, value: Any) -> list[Any]:
        several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0
        listed = list(value) if several else [value]
        if not listed:
            raise InputError(f"`{name}` needs at least one value")
        return [self.of.check(name, item) for item in (listed if self.may_repeat else dict.fromkeys(listed))]


def _range(part: str) -> list[int]:
    ends, _, step = part.partition(":")
    first, dots, last = ends.partition("..")
    try:
        start, stop = int(first), int(last) if dots else int(first)
        width = int(step) if step else 0
    except ValueError:
        raise ArgumentTypeError(
            f"'{part}': expected whole numbers as in 1,8,64, or a range as in 8..64 (doubling) or 2..12:2"
        ) from None
    if not dots:
        if step:
            raise ArgumentTypeError(f"'{part}': a step goes with a range, as in 2..12:2")
        return [start]
    if start < 1 or stop < start or width < 0 or (step and width == 0):
        raise ArgumentTypeError(f"'{part}': a range goes up from at least 1, by a step of at least 1")
    if width and (stop - start) // width >= _MAX_VALUES:
        raise ArgumentTypeError(f"'{part}': more than {_MAX_VALUES} values")
    if width:
        return list(range(start, stop + 1, width))
    values = [start]
    while values[-1] * 2 <= stop:
        values.append(values[-1] * 2)
    return values


@dataclass(frozen=True)
class Placements(Listed):
    """Names on the command line; in Python also placements and arrays, which the placements of a sweep are read from."""

    python = "str, Placement, int array (rank of each expert), or list of these"

    def check(self, name: str, value: Any) -> Any:
        return value


@dataclass(frozen=True)
class PerRank(Listed):
    """`tokens_per_rank`: True in Python; on the command line the list that stands in the place of --tokens."""

    of: Kind = Whole(1, MAX_TOKENS)
    python = "bool"

    def check(self, name: str, value: Any) -> bool:  # type: ignore[override]
        return bool(value)


@dataclass(frozen=True)
class Flag(Kind):
    """Given or not: an option without a value."""

    python = "bool"


NAME, FILE, NAMES, WHOLE_NUMBERS = Kind(), Kind(metavar="FILE"), Listed(), Listed(of=Whole())
"""Kinds without a range of their own: what they name or number is checked where it is known."""
SEED, THREADS = Whole(0, 2**63 - 1), Whole(1, 4096)
PRECISION = Share(1e-6, _BELOW_1, allowed="a share from 0.0001% to below 100%, as in 1% or 0.01")
RISK = Share(_ABOVE_0, _BELOW_1, metavar="P", allowed="a probability above 0 and below 1, as in 1e-3")
