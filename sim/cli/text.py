"""Plain tables and lists for the terminal."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sim.errors import InputError
from sim.errors import whole_number as check_whole_number
from sim.files import is_there

_MAX_VALUES = 10_000


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns aligned by the signs < and > of `align`, one each; never cut to the terminal's width."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def print_table(title: str, heads: list[str], cells: list[list[str]], markdown: bool, align: str = "") -> None:
    """Print a table under its title, or as Markdown; column heads are split at the first blank into two lines.

    `align` has the signs of the first columns; the others go to the right.
    """
    align += ">" * (len(heads) - len(align))
    if markdown:
        print("| " + " | ".join(heads) + " |\n|" + "".join(":---|" if side == "<" else "---:|" for side in align))
        print("\n".join("| " + " | ".join(row) + " |" for row in cells))
        return
    first = [head.partition(" ")[0] for head in heads]
    second = [head.partition(" ")[2] for head in heads]
    top, rule, *body = table(second, [first, *cells], align).splitlines()
    print("\n".join([title, "", body[0], top, rule, *body[1:]]))


def estimate(mean: float, high: float, form: str) -> str:
    """A mean with the half-width of its interval, if it has one; - where there is no mean."""
    if mean != mean:
        return "-"
    return format(mean, form) + (f" ± {format(high - mean, form.lstrip('+'))}" if high == high else "")


def note(message: str) -> None:
    """A remark for the user, on stderr, apart from the result."""
    print(f"note: {' '.join(message.split())}", file=sys.stderr)


def say_about_inputs(model: Any, workload: Any) -> None:
    """Notes on a model that was not verified, and on traffic that was fitted to another one."""
    if model.unverified:
        note(f"{model.name}: not read from the checkpoint itself: {'; '.join(model.unverified)}")
    if model.caveat:
        note(f"{model.name}: {model.caveat}")
    fitted_to = getattr(workload, "fitted_to", "")
    alike = ("deepseek-r1", "deepseek-v3")  # one router
    same = model.name.startswith(alike) if fitted_to.startswith(alike) else model.name == fitted_to
    if fitted_to and not same:
        note(f"{workload.name} traffic is fitted to {fitted_to}; on {model.name} it is an assumption")


def whole_numbers(option: str) -> Callable[[str], list[int]]:
    """Parser of a list of whole numbers and ranges: `1,8,64`; `8..64` doubles; `2..12:2` counts up by 2."""

    def parse(text: str) -> list[int]:
        values: list[int] = []
        for part in text.split(","):
            values += _range(option, part.strip())
            if len(values) > _MAX_VALUES:
                raise InputError(f"{option} {text}: more than {_MAX_VALUES} values")
        return values

    return parse


def _range(option: str, part: str) -> list[int]:
    ends, _, step = part.partition(":")
    first, dots, last = ends.partition("..")
    try:
        start, stop = int(first), int(last) if dots else int(first)
        width = int(step) if step else 0
    except ValueError:
        raise InputError(
            f"{option} '{part}': expected whole numbers as in 1,8,64, or a range as in 8..64 (doubling) or 2..12:2"
        ) from None
    if not dots:
        if step:
            raise InputError(f"{option} '{part}': a step goes with a range, as in 2..12:2")
        return [start]
    if start < 1 or stop < start or width < 0 or (step and width == 0):
        raise InputError(f"{option} '{part}': a range goes up from at least 1, by a step of at least 1")
    if width and (stop - start) // width >= _MAX_VALUES:
        raise InputError(f"{option} '{part}': more than {_MAX_VALUES} values")
    if width:
        return list(range(start, stop + 1, width))
    values = [start]
    while values[-1] * 2 <= stop:
        values.append(values[-1] * 2)
    return values


def whole_number(option: str) -> Callable[[str], int]:
    """Parser of one whole number."""

    def parse(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{option} '{text}': expected a whole number") from None

    return parse


def threads(text: str | None) -> int | None:
    """Value of --threads, None where it is not given."""
    return None if text is None else check_whole_number("--threads", whole_number("--threads")(text), 1, 4096)


def numbers(option: str) -> Callable[[str], list[float]]:
    """Parser of a list of numbers."""

    def parse(text: str) -> list[float]:
        try:
            return [float(part) for part in text.split(",")]
        except ValueError:
            raise InputError(f"{option} '{text}': expected numbers as in 1.5,2") from None

    return parse


def names(option: str) -> Callable[[str], list[str]]:
    """Parser of a list of names."""

    def parse(text: str) -> list[str]:
        parts = [part.strip() for part in text.split(",")]
        if not all(parts):
            raise InputError(f"{option} '{text}': expected names with commas between them")
        return parts

    return parse


def share(option: str) -> Callable[[str], float]:
    """Parser of a share: 1% or 0.01."""

    def parse(text: str) -> float:
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise InputError(f"{option} '{text}': expected a share as in 1% or 0.01") from None

    return parse


def folder(option: str, text: str) -> Path:
    """Name of a folder that is there or can be made."""
    if not text.strip() or "\0" in text:
        raise InputError(f"{option} must be the name of a folder")
    if is_there(Path(text)) and not Path(text).is_dir():
        raise InputError(f"{option} {text} is a file, not a folder")
    return Path(text)


_UNITS_S = {"s": 1, "m": 60, "h": 3600}


def seconds(option: str) -> Callable[[str], float]:
    """Parser of a time: 90s, 10m, 2h or a number of seconds."""

    def parse(text: str) -> float:
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS_S else (text, "s")
        try:
            value = float(number) * _UNITS_S[unit]
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise InputError(f"{option} '{text}': expected a time as in 90s, 10m or 2h")
        return value

    return parse
