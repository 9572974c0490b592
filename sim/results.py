"""The outcome of a sweep: its tidy tables, what is read off them, and the tables on disk with their provenance."""

import hashlib
import io
import json
import platform
import shlex
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from html import escape
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from sim.errors import InputError, counted, shown
from sim.files import is_there, model_label, read_json, read_text, whole_files
from sim.stats import CELL, Design, Histogram, Moments, mean_interval, probability_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCHEMA = 3
"""Version of the tables: raised when a column or its meaning changes, or the rows of a seed."""
SUMMARY, TAIL, COUNTS, PROVENANCE = "summary.csv", "tail.csv", "counts.parquet", "provenance.json"
_FLOAT = "%.10g"


@dataclass(frozen=True, eq=False, repr=False)
class SweepResult:
    """Outcome of a sweep.

    Attributes
    ----------
    summary : DataFrame
        One row per cell: model, workload, placement, EP size, tokens. `epsim columns summary` has all columns with units.
        An estimate has its 95 % interval beside it: `imbalance_mean`, `imbalance_mean_low`, `imbalance_mean_high`.
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

    def exceedance(self, metric: str, placement: str, ep_size: int, tokens: int) -> pd.DataFrame:
        """P(metric >= value) of a cell at every value that was seen, with its 95 % interval, from the raw counts.

        Parameters
        ----------
        metric : {'imbalance', 'idle_ranks'}

        Returns
        -------
        DataFrame
            Columns value, probability, low, high.
        """
        return self._curves(metric, [(placement, ep_size, tokens)]).drop(columns=CELL)

    def exceedances(self, metric: str, most_points: int) -> pd.DataFrame:
        """As `exceedance`, of all cells, at most so many points of each, evenly spread over its probabilities on a log scale.

        Returns
        -------
        DataFrame
            Columns placement, ep_size, tokens, value, probability, low, high.
        """
        return self._curves(metric, list(self._cells), most_points)

    def _curves(self, metric: str, cells: list[tuple[str, int, int]], most_points: int | None = None) -> pd.DataFrame:
        parts = []
        for key in cells:
            cell = self._cell(*key)
            histogram = Histogram(*self._counts_of("max_load" if metric == "imbalance" else metric, *key))
            values, counts = histogram.exceedance()
            at = values / cell.mean_load if metric == "imbalance" else values.astype(float)
            probability = counts / counts[0]
            if most_points is not None and len(at) > most_points:
                levels = np.geomspace(probability[0], probability[-1], most_points)
                few = np.unique(len(at) - 1 - np.searchsorted(probability[::-1], levels * (1 - 1e-9)))
                at, probability = at[few], probability[few]
            parts.append((at, probability, self._effective_blocks(metric, key, at)))
        value, probability, blocks = (np.concatenate(part) for part in zip(*parts, strict=True))
        low, high = probability_interval(probability, blocks)
        places = np.repeat(np.arange(len(cells)), [len(at) for at, _, _ in parts])
        columns = dict(zip(CELL, zip(*cells, strict=True), strict=True))
        table = pd.DataFrame(columns).iloc[places].reset_index(drop=True)
        return table.assign(value=value, probability=probability, low=low, high=high)

    def rank_loads(self, placement: str, ep_size: int) -> pd.DataFrame:
        """Mean load of each rank over the mean of all, in the largest steps, with its 95 % interval.

        Returns
        -------
        DataFrame
            Columns rank, load, low, high.
        """
        tokens = max((key[2] for key in self._cells if key[:2] == (placement, ep_size)), default=0)
        cell = self._cell(placement, ep_size, tokens)
        moments = Moments(
            *(
                self._counts_of(f"rank_load{part}", placement, ep_size, tokens)[1].astype(float)
                for part in ("", "_square", "_weighted")
            )
        )
        mean, low, high = mean_interval(moments, Design.of(int(cell.trials), int(cell.draws)))
        scale = mean.mean()
        return pd.DataFrame(
            {"rank": np.arange(ep_size), "load": mean / scale, "low": low / scale, "high": high / scale}
        )

    def against_baseline(self) -> pd.DataFrame:
        """Load of the busiest rank over that under the baseline, with 95 % intervals: mean and 99th percentile.

        The interval of the mean is paired: the variances of both means and of their difference give their covariance.
        That of the percentile divides the ends of both intervals, and is wider than it need be.

        Returns
        -------
        DataFrame
            A row per cell: placement, ep_size, tokens, mean, mean_low, mean_high, p99, p99_low, p99_high.
        """
        cells = self.summary
        columns = [*CELL, *(f"imbalance_{what}{end}" for what in ("mean", "p99") for end in ("", "_low", "_high"))]
        base = cells[columns].rename(columns={"placement": "baseline"})
        both = cells[[*columns, "baseline", "imbalance_change_mean", "imbalance_change_mean_high"]].merge(
            base, on=["baseline", "ep_size", "tokens"], suffixes=("", "_of"), how="inner"
        )
        half, half_of = (both[f"imbalance_mean_high{end}"] - both[f"imbalance_mean{end}"] for end in ("", "_of"))
        half_change = both.imbalance_change_mean_high - both.imbalance_change_mean
        mean = both.imbalance_mean / both.imbalance_mean_of
        square = (1 - mean) * (half**2 - mean * half_of**2) + mean * half_change**2
        wide = np.sqrt(np.maximum(square, 0)) / both.imbalance_mean_of
        same = (both.placement == both.baseline) | ((both.imbalance_change_mean == 0) & (half_change == 0))
        out = both[CELL].assign(mean=mean, mean_low=mean - wide, mean_high=mean + wide)
        out["p99"] = both.imbalance_p99 / both.imbalance_p99_of
        out["p99_low"] = (both.imbalance_p99_low / both.imbalance_p99_high_of).mask(same, 1.0)
        out["p99_high"] = (both.imbalance_p99_high / both.imbalance_p99_low_of).mask(same, 1.0)
        return out

    def plot(self, figure: str = "against_baseline", **options: Any) -> "Figure":
        """Draw one of the figures of `epsim plot`.

        Parameters
        ----------
        figure : str
            Its name: a key of `sim.figures.FIGURES`.
        **options
            Of that figure, such as `tokens` (per step) or `deepest` (probability) of `exceedance`.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            There is no such figure, it would show nothing, or it needs counts.parquet.

        Examples
        --------
        >>> import sim
        >>> result = sim.sweep("deepseek-v3", "chat", ep_sizes=[8, 16], tokens=[8, 64], placements=["linear", "round_robin"],
        ...     trials=100, bound_layers=0, threads=1)
        >>> result
        SweepResult: deepseek-v3, chat traffic, 2 placements x 2 EP sizes x 2 step sizes, 100 trials
        >>> len(result.plot("exceedance", tokens=64).axes)
        2
        """
        from sim.figures import draw

        drawn = draw(figure, self, **options)
        if drawn is None:
            raise InputError(f"figure '{figure}' would show nothing of this sweep")
        return drawn

    def save(self, folder: Path | str) -> None:
        """Write the tables and their provenance into a folder, for `read_result` and `epsim show`. Raises OSError."""
        write_result(self, Path(folder))

    def _counts_of(self, metric: str, placement: str, ep_size: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Values of a metric in a cell, ascending, and their counts. Raises InputError where they were not kept."""
        if self.counts.empty:
            raise InputError(f"the sweep was read without {COUNTS}, which this is computed from; run it again")
        values, counts, places = self._sorted_counts
        at = places[metric, placement, ep_size, tokens]
        return values[at], counts[at]

    @cached_property
    def _sorted_counts(self) -> tuple[np.ndarray, np.ndarray, dict[Any, np.ndarray]]:
        """Values, ascending, their counts, and the places of each metric and cell."""
        table = self.counts.sort_values("value", kind="stable")
        places = table.groupby(["metric", *CELL], observed=True).indices
        return table["value"].to_numpy(), table["count"].to_numpy(), places

    def _cell(self, placement: str, ep_size: int, tokens: int) -> Any:
        """A row of the summary. Raises InputError where the sweep has no such cell."""
        if (placement, ep_size, tokens) not in self._cells:
            raise InputError(f"`placement` {placement}, `ep_size` {ep_size}, `tokens` {tokens}: no cell of this sweep")
        return self._cells[placement, ep_size, tokens]

    @cached_property
    def _cells(self) -> dict[Any, Any]:
        cells = self.summary[[*CELL, "mean_load", "trials", "draws"]]
        return {cell[:3]: cell for cell in cells.itertuples(index=False)}

    def _effective_blocks(self, metric: str, key: tuple[str, int, int], at: np.ndarray) -> np.ndarray:
        """Effective blocks at values `at`: between those of the tail's rows; a draw counts once where none is known."""
        cell = self._cell(*key)
        seen = None if cell.trials == cell.draws else self._sampled.get((metric, *key))
        if seen is None:
            return np.full(len(at), float(cell.draws))
        return np.interp(at, seen.threshold, seen.effective_blocks.fillna(cell.draws))

    @cached_property
    def _sampled(self) -> dict[Any, pd.DataFrame]:
        """Thresholds and effective blocks of what was sampled, and neither never nor always seen, by metric and cell."""
        tail = self.tail[(self.tail.method == "sampled") & (self.tail.probability > 0) & (self.tail.probability < 1)]
        groups = tail.sort_values("threshold").groupby(["metric", *CELL])
        return dict(list(groups[["threshold", "effective_blocks"]]))

    def __repr__(self) -> str:
        first, n = self.summary.iloc[0], self.summary[CELL].nunique()
        return (
            f"SweepResult: {model_label(first.model)}, {first.workload} traffic, {counted(n.placement, 'placement')} x "
            f"{counted(n.ep_size, 'EP size')} x {counted(n.tokens, 'step size')}, {self.summary.trials.max()} trials"
        )

    def _repr_html_(self) -> str:
        """The busiest rank's load over the mean of the ranks, in the smallest, middle and largest steps."""
        steps = sorted(self.summary.tokens.unique())
        few = self.summary[self.summary.tokens.isin({steps[0], steps[len(steps) // 2], steps[-1]})]
        text = few.imbalance_mean.map("{:.2f}".format) + " (" + few.imbalance_p99.map("{:.2f}".format) + ")"
        table = few.assign(text=text).pivot(index=["ep_size", "tokens"], columns="placement", values="text")
        table = table[list(dict.fromkeys(few.placement))].fillna("")
        caption = "Mean (99th percentile) of the busiest rank's load over the mean of the ranks; all cells: <code>.summary</code>"
        return f"<p>{escape(repr(self))}</p>{table.to_html(max_rows=60)}<p>{caption}</p>"


def write_result(result: SweepResult, folder: Path) -> None:
    """Write the tables and their provenance, all or nothing. Raises InputError for what is no result, and OSError."""
    if not isinstance(result, SweepResult):
        raise InputError(f"`result` {shown(result)}: must be what sim.sweep gives")
    buffer = io.BytesIO()
    result.counts.to_parquet(buffer, index=False, compression="zstd")
    tables = {
        SUMMARY: csv_of(result.summary),
        TAIL: csv_of(result.tail),
        COUNTS: buffer.getvalue(),
    }
    notes = {"notes": result.notes} if result.notes else {}
    _write_whole(folder, tables, PROVENANCE, {"sweep": result.identity, **notes})


def write_table(table: pd.DataFrame, folder: Path, name: str, identity: dict[str, Any]) -> None:
    """Write NAME.csv, and NAME.json with its provenance, both or none. Raises OSError."""
    data = csv_of(table)
    _write_whole(folder, {f"{name}.csv": data}, f"{name}.json", {name: identity})


def read_table(folder: Path, name: str, verb: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """What `write_table` wrote, and its provenance. Raises InputError where it is missing, damaged or changed."""
    path = folder / f"{name}.csv"
    if not is_there(path.with_suffix(".json")):
        what = (
            f"holds nothing that epsim {verb} wrote ({name}.json is missing)" if is_there(folder) else "does not exist"
        )
        raise InputError(f"{folder} {what}")
    about = read_json(path.with_suffix(".json"), str(path.with_suffix(".json")))
    text = read_text(path, str(path))
    digests = about.get("sha256") if isinstance(about, dict) else None
    if not isinstance(digests, dict) or hashlib.sha256(text.encode()).hexdigest() != digests.get(path.name):
        raise InputError(f"{path} is damaged or was changed: it is not what epsim {verb} wrote")
    if digests.get(name) != digest_of(about.get(name)):
        raise InputError(f"{path.with_suffix('.json')} is damaged or was changed: it is not what epsim {verb} wrote")
    try:
        return pd.read_csv(io.StringIO(text)), about
    except ValueError as error:
        raise InputError(f"{path} is not a table of epsim {verb} ({error})") from None


def csv_of(table: pd.DataFrame) -> bytes:
    """What `to_csv(index=False, float_format="%.10g")` writes, many times faster."""
    floats = [name for name in table if table[name].dtype.kind == "f"]
    texts = {name: [_FLOAT % x if x == x else "" for x in table[name].tolist()] for name in floats}
    return table.assign(**texts).to_csv(index=False).encode()


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


def provenance(what: dict[str, Any], digests: dict[str, str]) -> dict[str, Any]:
    """What made a result: its identity, versions, command and time; and the digests of its identity and its files."""
    packages = ("epsim", "numpy", "numba", "pandas", "scipy")
    return {
        **what,
        "command": shlex.join([Path(sys.argv[0]).name.replace("__main__.py", "epsim"), *sys.argv[1:]]),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "sha256": digests,
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in packages}},
    }


def version_of(package: str) -> str:
    """Version of a package; 'unknown' where it is not installed, as epsim used from a source tree."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


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
        The folder does not exist, holds no finished sweep, or a file that is not as it was written.

    Examples
    --------
    >>> import sim, tempfile
    >>> folder = tempfile.mkdtemp()
    >>> sim.sweep("mixtral-8x7b", "chat", ep_sizes=4, tokens=8, placements="linear", trials=64, threads=1).save(folder)
    >>> sim.read_result(folder)
    SweepResult: mixtral-8x7b, chat traffic, 1 placement x 1 EP size x 1 step size, 64 trials
    """
    if not isinstance(folder, str | Path):
        raise InputError(f"`folder` {shown(folder)}: must be the name of a folder")
    folder = Path(folder)
    about = _read_provenance(folder)
    if about is None:
        what = f"holds no finished sweep ({PROVENANCE} is missing)" if is_there(folder) else "does not exist"
        raise InputError(f"{folder} {what}")
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
