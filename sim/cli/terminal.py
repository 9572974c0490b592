"""What goes to the terminal: tables that fit it, the same rows for programs, files that were written, remarks, progress."""

import json
import shutil
import sys
import textwrap
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sim.options import FigureOptions
from sim.options.declare import add_options, section_of
from sim.options.kinds import Folder

_held: list[str] = []  # remarks that are not printed yet


def width() -> int:
    """Columns of the terminal (COLUMNS, where it is set); 80 where there is none."""
    return max(shutil.get_terminal_size().columns, 60)


def filled(text: str, first: str = "", indent: str = "") -> str:
    """A text in lines that fit the terminal, at most 100 columns; names and paths are not cut."""
    return textwrap.fill(
        text, min(width(), 100), initial_indent=first, subsequent_indent=indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def say(text: str, first: str = "", indent: str = "") -> None:
    """Print a text in such lines."""
    print(filled(text, first, indent))


# Tables


def estimate(mean: float, high: float, form: str) -> str:
    """A mean with the half-width of its interval, if it has one; - where there is no mean."""
    if mean != mean:
        return "-"
    return format(mean, form) + (f" ± {format(high - mean, form.lstrip('+'))}" if high == high else "")


def cells(rows: Iterable[Any], columns: Mapping[str, str | Callable[[Any], str]]) -> tuple[list[str], list[list[str]]]:
    """Heads and lines of a table of objects, rows of a DataFrame say, for `print_lines`.

    Each head has an attribute, `NAME` as it is, `NAME:FORMAT`, `NAME±FORMAT` for a mean with the interval that `NAME_high` ends,
    or a function of the object. What has no value is -.
    """

    def text(row: Any, what: str | Callable[[Any], str]) -> str:
        if callable(what):
            return what(row)
        name, sign, form = what.partition("±" if "±" in what else ":")
        value = getattr(row, name)
        if sign == "±":
            return estimate(value, getattr(row, f"{name}_high"), form)
        return "-" if value is None or value != value else format(value, form)

    return list(columns), [[text(row, what) for what in columns.values()] for row in rows]


def pivoted(
    rows: Any, keys: list[str], across: list[str], text: Callable[[Any], str]
) -> tuple[list[tuple[Any, ...]], list[list[str]]]:
    """The values of the columns `across`, and lines with the `keys` and a cell for each of these values; - without a row."""
    columns, lines = list(dict.fromkeys(zip(*(rows[name] for name in across), strict=True))), []
    for key, of in rows.groupby(keys, sort=False):
        at = {tuple(getattr(row, name) for name in across): text(row) for row in of.itertuples()}
        lines.append([*map(str, key), *(at.get(column, "-") for column in columns)])
    return columns, lines


def print_table(
    title: str, rows: Iterable[Any], columns: Mapping[str, str | Callable[[Any], str]], markdown: bool, **how: Any
) -> None:
    """Print a table of objects by its `cells`, as `print_lines` does."""
    print_lines(title, *cells(rows, columns), markdown, **how)


def print_lines(
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
        say(line)
    first, second = ([head.partition(" ")[part] for head in heads] for part in (0, 2))
    widths = [max(len(row[i]) for row in [first, second, *cells]) for i in range(len(heads))]
    for columns in _bands(widths, keys):
        above = [first, second] if any(second[i] for i in columns) else [first]
        print()
        for row in [*above, ["-" * width for width in widths], *cells]:
            print("  ".join(f"{row[i]:{align[i]}{widths[i]}}" for i in columns).rstrip())


def _bands(widths: list[int], keys: int) -> list[list[int]]:
    """Columns of each of the tables that one is cut into so that each fits the terminal."""
    key = list(range(keys))
    bands = [list(key)]
    for i in range(keys, len(widths)):
        if len(bands[-1]) > keys and sum(widths[j] + 2 for j in [*bands[-1], i]) - 2 > width():
            bands.append(list(key))
        bands[-1].append(i)
    return bands


# The same rows for programs, and files


def add_output(parser: ArgumentParser, out: str = "", *, figures: bool = False) -> None:
    """Add --markdown, --json and --csv, other forms of the answer, of which stdout then holds nothing else; and --out."""
    forms = section_of(parser, "output").add_mutually_exclusive_group()
    forms.add_argument("--markdown", action="store_true", help="print the table alone, as Markdown")
    forms.add_argument("--json", action="store_true", help="print the rows alone, with all their columns, as JSON")
    forms.add_argument("--csv", action="store_true", help="print the rows alone, with all their columns, as CSV")
    if figures:
        add_options(parser, FigureOptions)
    if out:
        section_of(parser, "output").add_argument("--out", type=Folder(), metavar="DIR", help=f"write {out} there")


def is_alone(arguments: Namespace) -> bool:
    """Whether stdout holds the rows, or the Markdown table, alone."""
    return bool(arguments.markdown or arguments.json or arguments.csv)


def print_rows(rows: Any, arguments: Namespace) -> bool:
    """Print a table, or a list of rows, as --json or --csv if one of them is given; whether it is."""
    if not (arguments.json or arguments.csv):
        return False
    import pandas as pd

    frame = rows if isinstance(rows, pd.DataFrame) else pd.DataFrame(rows, dtype=object)
    if arguments.json:
        records = [
            {key: None if value != value or value == float("inf") else value for key, value in row.items()}
            for row in frame.to_dict(orient="records")
        ]
        print(json.dumps(records, indent=1, default=lambda value: value.item()))
    else:
        from sim.results import csv_of

        print(csv_of(frame).decode(), end="")
    return True


def answer(
    folder: Path | None,
    arguments: Namespace,
    show: Callable[[], None],
    tables: dict[str, Any],
    identity: dict[str, Any],
    figures: Callable[[], dict[str, Any]] = dict,
    rows: Any = None,
) -> None:
    """Write the tables of a verb with what made them, and figures, into a folder, if one is given; and show its answer, or print
    its `rows` for programs (default: the last table). A reader that closes the pipe loses no file.
    """
    from sim.files import writable_folder
    from sim.results import write_table

    files = [f"{name}.csv" for name in tables] + [f"{name}.json (what made it)" for name in list(tables)[-1:]]
    if folder is not None:
        with writable_folder(folder):
            for name, table in tables.items():
                write_table(table, folder, name, identity)
            for stem, figure in figures().items():
                from sim.figures import save_as

                files += [path.name for path in save_as(figure, folder / stem, arguments.formats)]
    if not print_rows(list(tables.values())[-1] if rows is None else rows, arguments):
        show()
    if folder is not None:
        say_written(f"written to {folder}: {', '.join(files)}", arguments)


def say_written(text: str, arguments: Namespace) -> None:
    """Say what was written, on stderr where stdout holds the rows alone."""
    if is_alone(arguments):
        print(text, file=sys.stderr)
    else:
        print(f"\n{filled(text)}")


# Remarks


def note(*messages: str) -> None:
    """Remarks for the user on stderr, before the work begins or after the answer; none where the run ends with an error."""
    _held.extend(" ".join(message.split()) for message in messages)


def say_notes() -> None:
    """Print the remarks that were made."""
    for text in dict.fromkeys(_held):
        print(f"note: {text}", file=sys.stderr)
    drop_notes()
    sys.stderr.flush()


def drop_notes() -> None:
    """Forget the remarks that were made."""
    _held.clear()


def note_compiling() -> None:
    """Say so where kernels are not compiled yet."""
    from sim.kernels import is_cold

    if is_cold():
        note("compiling the kernels, once for this version: about 20 seconds")


# Progress


def time_left_s(elapsed_s: float, share: float) -> float:
    """Seconds left where `share` of the work took `elapsed_s`; inf where nothing is known."""
    return elapsed_s * (1 - share) / share if share > 0 else float("inf")


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextmanager
def shown_progress() -> Iterator[None]:
    """Print the remarks once the work of the block begins, and show what it announces (`sim.progress`), on stderr if that is a
    terminal; then wipe it out.
    """
    from sim.progress import watching

    if not sys.stderr.isatty():
        with watching(lambda share, name: say_notes()):
            yield
        return
    say_notes()
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    from sim.kernels import is_cold

    cold, started_s, start_share = is_cold(), time.monotonic(), 0.0
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(20),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, expand=True) as bar:
        task = bar.add_task("compiling" if cold else "starting", total=1.0, left="--:--")

        def show(share: float, name: str) -> None:
            nonlocal cold, started_s, start_share
            now_s = time.monotonic()
            if cold and share > 0:  # kernels are compiled in the first part: its time tells nothing of the others
                cold, started_s, start_share = False, now_s, share
            done = (share - start_share) / (1 - start_share) if start_share < 1 else 1.0
            left = _clock(time_left_s(now_s - started_s, done))
            bar.update(task, completed=share, description=name or "working", left=left)

        with watching(show):
            yield
