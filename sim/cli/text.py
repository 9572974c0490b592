"""Plain tables and lists for the terminal."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from sim.errors import InputError


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


def note_compiling() -> None:
    """Say so where kernels are not compiled yet."""
    from sim.kernels import is_cold

    if is_cold():
        note("compiling the kernels, once for this version: about 30 seconds")


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


def whole_number(option: str) -> Callable[[str], int]:
    """Parser of one whole number."""

    def parse(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{option} '{text}': expected a whole number") from None

    return parse
