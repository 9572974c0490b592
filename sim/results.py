"""The tidy tables of a sweep, on disk with their provenance."""

import contextlib
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pandas as pd

from sim.errors import InputError

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
    """

    summary: pd.DataFrame
    tail: pd.DataFrame
    counts: pd.DataFrame
    identity: dict[str, Any]


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that takes its place when the block ends well, and vanishes when it does not."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_result(result: SweepResult, folder: Path) -> None:
    """Write the tables, and last the provenance, which marks the folder as complete. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PROVENANCE).unlink(missing_ok=True)
    writers: dict[str, Callable[[Path], object]] = {
        SUMMARY: lambda path: result.summary.to_csv(path, index=False, float_format=_FLOAT),
        TAIL: lambda path: result.tail.to_csv(path, index=False, float_format=_FLOAT),
        COUNTS: lambda path: result.counts.to_parquet(path, index=False, compression="zstd"),
        PROVENANCE: lambda path: path.write_text(json.dumps(provenance(result.identity), indent=1) + "\n"),
    }
    for name, write in writers.items():
        with whole_file(folder / name) as path:
            write(path)


def provenance(identity: dict[str, Any]) -> dict[str, Any]:
    """What made a result: the sweep, versions, command and time."""
    packages = ("epsim", "numpy", "numba", "pandas", "scipy")
    return {
        "sweep": identity,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}},
    }


def read_identity(folder: Path) -> dict[str, Any] | None:
    """Identity of the sweep that a folder holds, None if it holds none."""
    path = folder / PROVENANCE
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file, not a folder")
    if not path.exists():
        return None
    try:
        identity = json.loads(path.read_text())["sweep"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(identity, dict):
        raise InputError(f"{path} does not describe a sweep")
    return identity


def read_result(folder: Path) -> SweepResult:
    """Read what `write_result` wrote; the counts may be absent.

    Raises
    ------
    InputError
        The folder holds no complete sweep, or a damaged file.
    """
    identity = read_identity(folder)
    if identity is None:
        raise InputError(f"{folder} holds no finished sweep ({PROVENANCE} is missing)")
    try:
        summary, tail = pd.read_csv(folder / SUMMARY), pd.read_csv(folder / TAIL)
        path = folder / COUNTS
        counts = pd.read_parquet(path) if path.exists() else pd.DataFrame()
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds a damaged or incomplete sweep: {str(error).splitlines()[0]}") from None
    missing = {"placement", "ep_size", "tokens", "imbalance_mean"} - set(summary.columns)
    if missing:
        raise InputError(f"{folder / SUMMARY} has no column '{min(missing)}'")
    return SweepResult(summary, tail, counts, identity)
