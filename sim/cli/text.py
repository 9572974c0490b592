"""What goes to the terminal: tables that fit it, the same rows for programs, and remarks."""

import json
import shutil
import sys
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import Any

from sim.errors import InputError


def width() -> int:
    """Columns of the terminal (COLUMNS, where it is set); 80 where there is none."""
    return max(shutil.get_terminal_size().columns, 60)


def add_forms(parser: ArgumentParser) -> None:
    """Add --markdown, --json and --csv: other forms of the answer, of which stdout then holds nothing else."""
    forms = parser.add_mutually_exclusive_group()
    forms.add_argument("--markdown", action="store_true", help="print the table alone, as Markdown")
    forms.add_argument("--json", action="store_true", help="print the rows alone, with all their columns, as JSON")
    forms.add_argument("--csv", action="store_true", help="print the rows alone, with all their columns, as CSV")


def print_rows(frame: Any, arguments: Namespace) -> bool:
    """Print a table as --json or --csv if one of them is given; whether it is."""
    if arguments.json:
        rows = [
            {key: None if value != value or value == float("inf") else value for key, value in row.items()}
            for row in frame.to_dict(orient="records")
        ]
        print(json.dumps(rows, indent=1, default=lambda value: value.item()))
    elif arguments.csv:
        print(frame.to_csv(index=False, float_format="%.10g"), end="")
    return bool(arguments.json or arguments.csv)


def say_written(text: str, arguments: Namespace) -> None:
    """Say what was written, on stderr where stdout is for a program."""
    aside = arguments.json or arguments.csv
    print(textwrap.fill(text, width(), break_long_words=False, break_on_hyphens=False) if not aside else text,
          file=sys.stderr if aside else sys.stdout)  # fmt: skip


def filled(text: str, first: str = "", indent: str = "") -> str:
    """A text in lines that fit the terminal, at most 100 columns; names and paths are not cut."""
    return textwrap.fill(
        text, min(width(), 100), initial_indent=first, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def table(header: Sequence[str], rows: Sequence[Sequence[str]], align: str) -> str:
    """Columns aligned by the signs < and > of `align`, one each; never cut to the terminal's width."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, widths, strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * w for w in widths]), *(line(row) for row in rows)])


def print_table(
    title: str, heads: list[str], cells: list[list[str]], markdown: bool, align: str = "", keys: int = 1
) -> None:
    """Print a table under its title, or as Markdown; column heads are split at the first blank into two lines.

    What is wider than the terminal is stacked: several tables, each with the first `keys` columns. `align` has the signs
    of the first columns; the others go to the right.
    """
    align += ">" * (len(heads) - len(align))
    if markdown:
        print("| " + " | ".join(heads) + " |\n|" + "".join(":---|" if side == "<" else "---:|" for side in align))
        print("\n".join("| " + " | ".join(row) + " |" for row in cells))
        return
    for line in title.splitlines():
        print(filled(line))
    first, second = ([head.partition(" ")[part] for head in heads] for part in (0, 2))
    widths = [max(len(row[i]) for row in [first, second, *cells]) for i in range(len(heads))]
    for columns in _bands(widths, keys):
        here = [[row[i] for i in columns] for row in [first, *cells]]
        lines = table([second[i] for i in columns], here, "".join(align[i] for i in columns)).splitlines()
        top, rule, *body = lines
        print("\n".join(["", body[0], *([top] if top else []), rule, *body[1:]]))


def _bands(widths: list[int], keys: int) -> list[list[int]]:
    """Columns of each of the tables that one is cut into so that each fits the terminal."""
    key = list(range(keys))
    bands = [list(key)]
    for i in range(keys, len(widths)):
        if len(bands[-1]) > keys and sum(widths[j] + 2 for j in [*bands[-1], i]) - 2 > width():
            bands.append(list(key))
        bands[-1].append(i)
    return bands


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


def say_about_file(traffic: Any) -> None:
    """Notes on what was made of a file of traffic."""
    for text in getattr(traffic, "notes", ()):
        note(text)


def traffic_fields(arguments: Namespace) -> dict[str, Any]:
    """What `load_workload` takes beside the name."""
    return {name: getattr(arguments, name) for name in ("phase", "tokens_per_request", "dummy_tokens")}


def say_about_inputs(model: Any, workload: Any) -> None:
    """Notes on a model that was not verified, and on traffic that was fitted to another one."""
    if model.unverified:
        note(f"{model.name}: not read from the checkpoint itself: {'; '.join(model.unverified)}")
    if model.caveat:
        note(f"{model.name}: {model.caveat}")
    say_about_fit(model, workload)


def say_about_fit(model: Any, workload: Any) -> None:
    """A note on traffic that was fitted to another model."""
    fitted_to = getattr(workload, "fitted_to", "")
    alike = ("deepseek-r1", "deepseek-v3")  # one router
    same = model.name.startswith(alike) if fitted_to.startswith(alike) else model.name == fitted_to
    if fitted_to and not same:
        note(f"{workload.name} traffic is fitted to {fitted_to}; on {model.name} it is an assumption")
    if getattr(workload, "whole_requests", False) and hasattr(workload, "request_sigma"):
        note(
            f"{workload.name}: the tokens of a request share an effect of sd {workload.request_sigma:g} (request_sigma) on each "
            "expert's logit"
        )


def say_about_layers(layer_correlation: float | None) -> None:
    """Where a layer correlation comes from."""
    from sim.options import LAYER_CORRELATION

    if layer_correlation == LAYER_CORRELATION:
        note(
            f"layer correlation {layer_correlation:g}: measured on gpt-oss-20b's recorded steps (1.2 to 2.9 by placement, EP "
            "size and tokens); epsim step --traffic FILE measures yours"
        )


def whole_number(option: str) -> Callable[[str], int]:
    """Parser of one whole number."""

    def parse(text: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise InputError(f"{option} '{text}': expected a whole number") from None

    return parse
