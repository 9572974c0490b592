"""Add sweeps of different seeds: raw counts add, tables are made from the sums."""

from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.results import SCHEMA, SweepResult
from sim.stats import CELL
from sim.sweeps.grid import Grid, events_of
from sim.sweeps.tables import KEYS, build_summary, build_tail, cell_keys
from sim.sweeps.tally import SUMS, Tally, build_counts, read_counts

_ADDS = ("seed", "trials", "draws", "precision", "parts")  # what may differ


def combine(results: list[tuple[str, SweepResult]]) -> SweepResult:
    """The sum of at least two sweeps, by name, that differ in their seeds; each may be a sum itself.

    Raises InputError where they do not belong together: another version, grid, model, traffic or placement; a seed twice (the
    same draws would count twice); or recorded traffic (its layers are the same in both).
    """
    if len(results) < 2:
        raise InputError("combine needs at least two sweeps")
    first_name, first = results[0]
    seeds: dict[int, str] = {}
    for name, result in results:
        _check_pair(first_name, first.identity, name, result.identity)
        for seed in _seeds(result.identity):
            if seed in seeds:
                raise InputError(
                    f"{name} and {seeds[seed]} have the same seed {seed}: the same draws would count twice; run one of them "
                    "with another --seed"
                )
            seeds[seed] = name
    try:
        grid = Grid.of(first.identity)
    except (KeyError, TypeError) as error:
        raise InputError(f"{first_name} does not say what sweep it holds ({error})") from None
    total = Tally.zero(grid)
    for name, result in results:
        _add(total, read_counts(grid, result.counts, name), name)
    total.compact()
    ids = first.summary.cell_id.tolist()
    if any(result.summary.cell_id.tolist() != ids for _, result in results):
        raise InputError("the sweeps have cells with different ids: their distributions differ")
    stopped = np.full(len(grid.cells), "combined", dtype=object)
    tail = [build_tail(grid, total), _mean_bounds([result.tail for _, result in results], total, grid)]
    identity = {key: value for key, value in first.identity.items() if key != "precision"}
    identity |= {
        "seed": sorted(seeds),
        "parts": sorted(part for _, result in results for part in _parts(result.identity)),
    }
    identity |= {key: int(sum(result.identity[key] for _, result in results)) for key in ("trials", "draws")}
    return SweepResult(
        build_summary(grid, total, stopped, ids),
        pd.concat([part for part in tail if len(part)], ignore_index=True),
        build_counts(grid, total),
        identity,
    )


def _parts(identity: dict[str, Any]) -> list[list[Any]]:
    """Seed, trials, draws and precision of each sweep in a sum."""
    own = [identity.get(key) for key in ("seed", "trials", "draws")] + [identity.get("precision") or []]
    return identity.get("parts", [own])


def _seeds(identity: dict[str, Any]) -> list[int]:
    return [part[0] for part in _parts(identity)]


def _check_pair(first_name: str, first: dict[str, Any], name: str, identity: dict[str, Any]) -> None:
    """Refuse a sweep of another version, of recorded layers, or that differs from the first in more than seed and size."""
    if identity.get("schema") != SCHEMA:
        raise InputError(f"{name} was written by another version of epsim; run its sweep again")
    if not isinstance(identity.get("law"), dict) or not all(isinstance(seed, int) for seed in _seeds(identity)):
        raise InputError(f"{name} does not say what sweep it holds")
    if "recorded" in identity["law"].get("traffic", {}):
        raise InputError(
            f"{name} is of recorded traffic, whose layers are the same in every sweep; run one with more trials"
        )
    for key in [*first, *identity]:
        if key not in _ADDS and first.get(key) != identity.get(key):
            mine, theirs = str(first.get(key))[:80], str(identity.get(key))[:80]
            raise InputError(f"{name} does not belong to {first_name}: {key} is {theirs}, not {mine}")


def _add(total: Tally, tally: Tally, name: str) -> None:
    if any(int(getattr(part, sums).max(initial=0)) >= 2**62 for part in (total, tally) for sums in SUMS):
        raise InputError(f"{name}: the sums of all these sweeps would not fit 64-bit integers")
    total.add(tally)


def _mean_bounds(tails: list[pd.DataFrame], total: Tally, grid: Grid) -> pd.DataFrame:
    """Rows beyond sampling, which follow those of the events: for all layers as they are, for drawn layers averaged."""
    if all(len(tail) == len(events_of(grid).cell) for tail in tails):
        return pd.DataFrame()
    rows = pd.concat([tail.iloc[len(events_of(grid).cell) :] for tail in tails])
    layers = rows.given.str.partition(" ")[0].replace("", "1").astype(int)
    rows = rows.assign(weight=layers, conditional=rows.given != "")
    for column in ("probability", "low", "high"):
        rows[column] *= rows.weight
    sums = rows.groupby([*CELL, "metric", "threshold", "conditional"], sort=False)
    table = sums[["probability", "low", "high", "weight"]].sum()
    table["method"] = sums.method.first()
    table = table[sums.size() == len(tails)].reset_index()
    for column in ("probability", "low", "high"):
        table[column] /= table.weight
    table["effective_blocks"] = np.nan
    table["given"] = np.where(table.conditional, table.weight.astype(str) + " drawn layers", "")
    keys = {tuple(keys[2:5]): keys for keys in cell_keys(grid, total)}
    of_row = [keys[key] for key in zip(table.placement, table.ep_size, table.tokens, strict=True)]
    table = pd.concat([pd.DataFrame(of_row, columns=KEYS), table.drop(columns=CELL)], axis=1)
    return table[tails[0].columns]
