"""The table of measured times, on disk: rows appended as they come, and read back as a file from outside."""

import csv
import io
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.files import read_text

COLUMNS = {
    "model": str,
    "gpu": str,  # preset whose numbers predict the time
    "device": str,  # what ran
    "dtype": str,
    "kernel": str,
    "workload": str,
    "tokens": int,
    "step": int,
    "ep_size": int,
    "placement": str,
    "rank": int,
    "chosen": str,
    "pairs": int,
    "distinct": int,
    "tiles_128": int,
    "tiles_256": int,
    "tiles_512": int,
    "time_us": float,
    "spread_us": float,
    "layers": int,
    "replays": int,
    "seed": int,
    "versions": str,
}
"""Columns of the table and their types. Tiles of so many rows hold the rank's pairs, each those of one expert."""
TILE_ROWS = (128, 256, 512)
_MOST_ROWS = 200_000
_MOST_LETTERS = 200


def partial_path(path: Path) -> Path:
    """Where rows are kept until the run ends."""
    return path.with_name(f"{path.stem}.partial{path.suffix}")


@contextmanager
def growing_table(path: Path, columns: Iterable[str] = COLUMNS) -> Iterator["Rows"]:
    """A table that takes its name when the block ends well. A run that fails, or is killed, leaves its rows, whole ones,
    under the partial name; one without rows leaves nothing. Raises InputError where one of the two names is taken.
    """
    partial = partial_path(path)
    for there in (path, partial):
        if there.exists():
            raise InputError(f"--out {path}: {there} is there already; move it away, or choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(partial, list(columns))
    try:
        yield rows
        if rows.written:
            partial.replace(path)
    finally:
        if not rows.written:
            partial.unlink(missing_ok=True)


class Rows:
    """A file that rows are appended to."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self._path, self._columns = path, columns
        self.written = 0
        self._append([dict(zip(columns, columns, strict=True))])

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows that belong together."""
        self._append(rows)
        self.written += len(rows)

    def _append(self, rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        csv.DictWriter(text, self._columns, lineterminator="\n").writerows(rows)
        with self._path.open("ab", buffering=0) as file:  # one write: whole rows, or none of them
            file.write(text.getvalue().encode())


def read_measured(path: Path) -> pd.DataFrame:
    """Read measured times of one model and one GPU, finished or partial: the COLUMNS, without tiles in files written before these
    were counted. Raises InputError.
    """
    where = f"measured times {path}"
    there = read_header(path, where)
    columns = {name: kind for name, kind in COLUMNS.items() if "tiles_128" in there or not name.startswith("tiles_")}
    rows = read_typed(path, where, columns, same=("model", "gpu", "device"))
    wrongs = (
        (~((rows.time_us > 0) & (rows.time_us < 1e9)), "time_us must be above 0 and below 1e9"),
        (~((rows.spread_us >= 0) & (rows.spread_us < 1e9)), "spread_us must be from 0 to 1e9"),
        (~rows.tokens.between(1, 2**20), "tokens must be from 1 to 1048576"),
        (~rows.ep_size.between(1, 2**15), "ep_size must be from 1 to 32768"),
        ((rows["rank"] < 0) | (rows["rank"] >= rows.ep_size), "rank must be from 0 to ep_size - 1"),
        (~rows.pairs.between(0, 2**32), "pairs must be from 0 to 2**32"),
        ((rows.distinct < 0) | (rows.distinct > rows.pairs), "distinct must be from 0 to pairs"),
        ((rows.distinct == 0) & (rows.pairs > 0), "pairs need a distinct expert"),
        (_wrong_tiles(rows), "tiles must hold the pairs, and each distinct expert needs one"),
        ((rows.step < 0) | (rows.layers < 1) | (rows.replays < 1), "step, layers and replays must count something"),
        (~rows.dtype.isin(["bf16", "fp8"]), "dtype must be bf16 or fp8"),
        (~rows.chosen.isin(["busiest", "random"]), "chosen must be busiest or random"),
        (rows.duplicated(["dtype", "workload", "tokens", "step", "ep_size", "placement", "rank"]), "is measured twice"),
    )
    check_rows(rows, where, wrongs, "time_us")
    return rows


def read_header(path: Path, where: str) -> list[str]:
    """Names in the first line of a bounded file."""
    return read_text(path, where).partition("\n")[0].rstrip("\r").split(",")


def read_typed(path: Path, where: str, columns: dict[str, type], *, same: Iterable[str]) -> pd.DataFrame:
    """Rows of a bounded file whose first line names these columns, by their types; those of `same` have one value each; `where`
    begins an error's message.
    """
    text = read_text(path, where)
    if text.count("\n") > _MOST_ROWS:
        raise InputError(f"{where} has more than {_MOST_ROWS} lines")
    try:
        lines = list(csv.reader(io.StringIO(text)))
    except csv.Error as error:
        raise InputError(f"{where} is not a table: {error}") from None
    if not lines or lines[0] != list(columns):
        raise InputError(f"{where}: the first line must name the columns {','.join(columns)}")
    if len(lines) < 2:
        raise InputError(f"{where} has no rows")
    for number, line in enumerate(lines, 1):
        if len(line) != len(columns) or not all(len(field) <= _MOST_LETTERS and field.isprintable() for field in line):
            raise InputError(
                f"{where}, line {number}: expected {len(columns)} fields of at most {_MOST_LETTERS} printable letters"
            )
    values = dict(zip(columns, zip(*lines[1:], strict=True), strict=True))
    for name in same:
        if len(set(values[name])) > 1:
            raise InputError(f"{where}: column {name} must be the same in all rows")
    return pd.DataFrame({name: _typed(values[name], kind, name, where) for name, kind in columns.items()})


def _typed(values: Iterable[str], kind: type, name: str, where: str) -> Any:
    if kind is str:
        return list(values)
    try:
        return np.array([kind(value) for value in values], np.int64 if kind is int else np.float64)
    except (ValueError, OverflowError):
        what = "whole numbers" if kind is int else "numbers"
        raise InputError(f"{where}: column {name} must hold {what}") from None


def _wrong_tiles(rows: pd.DataFrame) -> pd.Series:
    wrong = pd.Series(False, rows.index)
    for size in TILE_ROWS if "tiles_128" in rows else ():
        tiles = rows[f"tiles_{size}"]
        wrong |= (tiles < rows.distinct) | (tiles * size < rows.pairs) | (tiles > rows.pairs)
    return wrong


def check_rows(rows: pd.DataFrame, where: str, wrongs: Iterable[tuple[pd.Series, str]], time: str = "layer_us") -> None:
    """Refuse the first row that is wrong: masks of rows, and what a right row is."""
    for wrong, text in wrongs:
        if wrong.any():
            line = int(np.flatnonzero(wrong)[0])
            row = rows.iloc[line]
            raise InputError(
                f"{where}, line {line + 2}: {text} (tokens {row.tokens}, rank {row['rank']}, {time} {row[time]})"
            )
