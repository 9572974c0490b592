"""The tidy tables of a sweep, on disk with their provenance."""

import contextlib
import hashlib
import io
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.files import is_there, read_json

SCHEMA = 3
"""Version of the tables: raised when a column or its meaning changes, or the rows of a seed."""
SUMMARY, TAIL, COUNTS, PROVENANCE = "summary.csv", "tail.csv", "counts.parquet", "provenance.json"
_FLOAT = "%.10g"


@dataclass(frozen=True, eq=False)
class SweepResult:
    """Outcome of a sweep.

    Attributes
    ----------
    summary : DataFrame
        One row per cell: model, workload, placement, EP size, tokens.
    tail : DataFrame
        One row per cell and event: probability of the worst cases.
    counts : DataFrame
        Raw histograms; empty where a folder was read that does not hold them.
    identity : dict
        All that the tables depend on.
    notes : list of str
        What could not be computed, and why.
    """

    summary: pd.DataFrame
    tail: pd.DataFrame
    counts: pd.DataFrame
    identity: dict[str, Any]
    notes: list[str] = field(default_factory=list)


@contextlib.contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Temporary names beside `paths` that take their places when the block ends well, and vanish when it does not.

    Raises OSError with the name of the file that could not be written, InputError where a device or a pipe would be
    replaced.
    """
    for path in paths:
        if is_there(path) and not path.is_file() and not path.is_dir():
            raise InputError(f"{path} is not a regular file: it would be replaced")
    temporary = [path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}") for path in paths]
    try:
        yield temporary
        for path, target in zip(temporary, paths, strict=True):
            path.replace(target)
    except OSError as error:
        targets = dict(zip(map(str, temporary), paths, strict=True))
        name = targets.get(str(error.filename), error.filename or paths[0].parent)
        raise OSError(error.errno or 5, error.strerror or str(error).splitlines()[0], str(name)) from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def writable_folder(folder: Path) -> Iterator[None]:
    """Make a folder before the work whose result it shall hold; if that fails, an empty folder is taken away again."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            folder.rmdir()
        raise


def write_result(result: SweepResult, folder: Path) -> None:
    """Write the tables and their provenance, all or nothing. Raises OSError."""
    buffer = io.BytesIO()
    result.counts.to_parquet(buffer, index=False, compression="zstd")
    tables = {
        SUMMARY: result.summary.to_csv(index=False, float_format=_FLOAT).encode(),
        TAIL: result.tail.to_csv(index=False, float_format=_FLOAT).encode(),
        COUNTS: buffer.getvalue(),
    }
    notes = {"notes": result.notes} if result.notes else {}
    _write_whole(folder, tables, PROVENANCE, {"sweep": result.identity, **notes})


def write_table(table: pd.DataFrame, folder: Path, name: str, identity: dict[str, Any]) -> None:
    """Write NAME.csv, and NAME.json with its provenance, both or none. Raises OSError."""
    data = table.to_csv(index=False, float_format=_FLOAT).encode()
    _write_whole(folder, {f"{name}.csv": data}, f"{name}.json", {name: identity})


def _write_whole(folder: Path, tables: dict[str, bytes], about: str, what: dict[str, Any]) -> None:
    """Write tables and a file `about` them, all or nothing."""
    digests = {name: digest_of(part) for name, part in what.items()}
    digests |= {name: hashlib.sha256(data).hexdigest() for name, data in tables.items()}
    made = provenance(what, digests)
    text = json.dumps(made, indent=1) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    if _same_but_when(folder / about, made):  # a file that says nothing new is left as it is
        text = (folder / about).read_text(encoding="utf-8")
    with whole_files(*(folder / name for name in (*tables, about))) as names:
        for path, data in zip(names, (*tables.values(), text.encode()), strict=True):
            path.write_bytes(data)


def _same_but_when(path: Path, made: dict[str, Any]) -> bool:
    """Whether a file says the same as `made` but for the command and the time."""
    if not path.is_file():
        return False
    try:
        held = read_json(path, str(path))
    except InputError:
        return False

    def rest(about: dict[str, Any]) -> str:
        return json.dumps(
            {key: value for key, value in about.items() if key not in ("command", "written")}, sort_keys=True
        )

    return isinstance(held, dict) and rest(held) == rest(made)


def digest_of(identity: Any) -> str:
    """Digest of JSON values, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def short_id(identity: Any) -> str:
    """Digest of an identity short enough for the name of a folder: 8 hexadecimal digits."""
    return digest_of(identity)[:8]


def provenance(what: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """What made a result: its identity, versions, command and time; and the digests of its identity and its files."""
    packages = ("epsim", "numpy", "numba", "pandas", "scipy")
    return {
        **what,
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": digests,
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def _read_provenance(folder: Path) -> dict[str, Any] | None:
    path = folder / PROVENANCE
    if is_there(folder) and not folder.is_dir():
        raise InputError(f"{folder} is a file, not a folder")
    if not is_there(path):
        return None
    about = read_json(path, str(path))
    if not isinstance(about, dict) or not all(isinstance(about.get(key), dict) for key in ("sweep", "sha256")):
        raise InputError(f"{path} does not describe a sweep of this version of epsim")
    digest = about["sha256"].get("sweep")  # folders that were written before it was kept have none
    if about["sweep"].get("schema") == SCHEMA and digest is not None and digest != digest_of(about["sweep"]):
        raise InputError(f"{path} is damaged or was changed: it names another sweep than the one that wrote the tables")
    return about


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Identity of the sweep that a folder holds, None if it holds none. Raises InputError for a damaged file."""
    about = _read_provenance(folder)
    return None if about is None else about["sweep"]


def read_result(folder: Path | str, *, sealed: bool = False) -> SweepResult:
    """Read what `write_result` wrote; the counts may be absent.

    Parameters
    ----------
    folder : Path or str
    sealed : bool
        Refuse a folder whose identity has no digest, as earlier versions wrote it: it cannot be told whether it was changed.

    Raises
    ------
    InputError
        The folder holds no finished sweep, or a file that is not as it was written.
    """
    folder = Path(folder)
    about = _read_provenance(folder)
    if about is None:
        raise InputError(f"{folder} holds no finished sweep ({PROVENANCE} is missing)")
    if about["sweep"].get("schema") != SCHEMA:
        raise InputError(f"{folder} was written by another version of epsim; run its sweep again")
    if sealed and "sweep" not in about["sha256"]:
        raise InputError(
            f"{folder}: {PROVENANCE} has no digest of the sweep's identity (an earlier version wrote it); run its sweep again"
        )
    data = {}
    for name in (SUMMARY, TAIL, COUNTS):
        try:
            data[name] = (folder / name).read_bytes()
        except OSError as error:
            if name == COUNTS and isinstance(error, FileNotFoundError):
                continue
            raise InputError(f"{folder / name} cannot be read: {error.strerror or error}") from None
        if hashlib.sha256(data[name]).hexdigest() != about["sha256"].get(name):
            raise InputError(f"{folder / name} is damaged or was changed: it is not what the sweep wrote")
    tables = {name: _parse(folder / name, data[name]) for name in data}
    counts = tables.get(COUNTS, pd.DataFrame())
    return SweepResult(
        tables[SUMMARY], tables[TAIL], counts, about["sweep"], [str(note) for note in about.get("notes", [])]
    )


_COLUMNS = {
    SUMMARY: ["model", "workload", "trials", "draws", "imbalance_mean", "stopped", "cell_id"],
    TAIL: ["metric", "threshold", "probability", "low", "high", "method", "given"],
    COUNTS: ["metric", "value", "count"],
}


def _parse(path: Path, data: bytes) -> pd.DataFrame:
    """A table of one of the three files. Raises InputError where it is none, or lacks columns."""
    try:
        if path.name == COUNTS:
            table = pd.read_parquet(io.BytesIO(data))
        else:
            unknown_blocks = {"effective_blocks": [""]}  # in other columns of the tail, empty is a value
            table = pd.read_csv(
                io.BytesIO(data),
                keep_default_na=path.name == SUMMARY,
                na_values=unknown_blocks if path.name == TAIL else None,
            )
    except (ValueError, OSError) as error:  # what parsers raise: ParserError, UnicodeDecodeError, ArrowInvalid ...
        raise InputError(f"{path} is not a table ({type(error).__name__})") from None
    missing = [name for name in [*CELL, *_COLUMNS[path.name]] if name not in table.columns]
    if missing:
        raise InputError(f"{path} has no column '{missing[0]}'")
    if path.name == TAIL and "effective_blocks" not in table:  # written before there was one
        table["effective_blocks"] = np.nan
    return table


CELL = ["placement", "ep_size", "tokens"]


def best_rows(tail: pd.DataFrame) -> pd.DataFrame:
    """Of each cell, metric and threshold the row of the tail with the narrowest interval in ratio, of those that hold for
    all layers; of equally wide ones that with the lowest upper bound.
    """
    rows = tail[tail.given == ""]
    width = np.where(rows.low > 0, rows.high / rows.low.where(rows.low > 0, 1.0), np.where(rows.high > 0, np.inf, 1.0))
    order = rows.assign(width=width).sort_values(["width", "high"], kind="stable")
    return order.drop_duplicates([*CELL, "metric", "threshold"]).sort_index().drop(columns="width")
