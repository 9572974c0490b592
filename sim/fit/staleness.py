"""How a load-aware placement goes stale: fitted on one part of the traffic, scored on another, further and further away."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.errors import InputError, whole_number
from sim.model import ModelSpec
from sim.placement import (
    Placement,
    check_ep_size,
    check_slots,
    is_load_aware,
    place_balanced,
    place_fixed,
    strategy_name,
)
from sim.progress import track
from sim.stats import ratio_interval
from sim.traffic.split import Halves, Windows

_Interval = tuple[float, float, float]
_ENDS = ("mean", "low", "high")


class _Pairs(NamedTuple):
    """One row of the table: its own columns, and the cuts whose halves are fitted and scored, int64 [pairs] each."""

    columns: dict[str, Any]
    fitted: np.ndarray
    scored: np.ndarray


def decay(
    model: ModelSpec, windows: Windows, placements: list[str], ep_sizes: list[int], ranks_per_node: int = 8
) -> pd.DataFrame:
    """Imbalance of placements against their age: fitted on a half of one window, scored on the other half of a later one.

    Age 0 is fitted and scored on the two halves of the same window. All figures are means over layers, each layer's the
    mean over all pairs of windows of that age; intervals are 95 % Student intervals over layers, for these windows.

    Parameters
    ----------
    model : ModelSpec
    windows : Windows
    placements : list of str
        Load-aware ones: eplb, eplb_refined, with redundant slots or without.
    ep_sizes : list of int
        From 2 on; all slots must divide by them.
    ranks_per_node : int
        For the hierarchical EPLB.

    Returns
    -------
    DataFrame
        A row for each EP size, placement and age, and one for `linear` on all windows (age 0):

        placement, ep_size, pairs
            `pairs`: pairs of windows of this age.
        age_windows, age_tokens (or age_steps)
            Distance from the fitted window to the scored one; of tokens or steps, the mean over pairs of windows.
        imbalance_mean, linear_mean, fresh_mean
            Max / mean rank load; that of linear, and of placements of age 0, on the same scored parts.
        change_mean
            imbalance - linear, paired by layer.
        removed_mean
            Share of linear's excess, imbalance - 1, that is removed.
        lost_mean
            Share of the gain over linear of age 0, on the same scored parts, that is lost: above 1 it is worse than linear.

        With `_low` and `_high` in place of `_mean` (none of fresh). Intervals are nan with one layer; those of a share also
        where the interval of what it is a share of reaches 0. A share of nothing is nan.

    Raises
    ------
    InputError
        A placement is not load-aware or not known; an EP size is 1 or above the experts, or does not divide the slots.

    Examples
    --------
    Loads of 4 experts that move by one expert from the first window to the second:

    >>> from sim.model import ModelSpec
    >>> from sim.traffic.split import cut_windows
    >>> from sim.traffic.counts import build_counts
    >>> loads = np.array([[8, 4, 2, 1], [8, 4, 2, 1], [1, 8, 4, 2], [1, 8, 4, 2]])
    >>> steps, _ = build_counts("toy", "toy", loads[:, None])
    >>> table = decay(ModelSpec("toy", n_experts=4, top_k=1), cut_windows(steps, 4, 2), ["eplb"], [2])
    >>> table[["placement", "age_windows", "imbalance_mean", "linear_mean", "fresh_mean"]]
      placement  age_windows  imbalance_mean  linear_mean  fresh_mean
    0    linear            0             1.4          1.4         1.4
    1      eplb            0             1.2          1.4         1.2
    2      eplb            1             1.6          1.2         1.2
    """
    n = len(windows.middle)
    ages = []
    for age in range(n):
        fitted = np.arange(n - age)
        distance = float((windows.middle[fitted + age] - windows.middle[fitted]).mean())
        ages.append(_Pairs({"age_windows": age, f"age_{windows.unit}": distance}, fitted, fitted + age))
    halves = windows.halves
    return _table(model, halves.fitted, halves.scored, ages, placements, ep_sizes, ranks_per_node)


def decay_against(
    model: ModelSpec, first: Halves, second: Halves, placements: list[str], ep_sizes: list[int], ranks_per_node: int = 8
) -> pd.DataFrame:
    """Imbalance of placements that are fitted on one file and scored on another.

    Columns as of `decay`, but `fitted` and `scored`, names of files, in place of ages; `fresh` is fitted on the other half of
    the file that is scored. A row for linear on each file; of each placement first on first, first on second, second on
    second, second on first.

    Raises
    ------
    InputError
        As `decay`; or the files hold the same traffic, or different numbers of layers.
    """
    if first.fitted.shape[1:] != second.fitted.shape[1:]:
        raise InputError(
            f"--against {second.name} has {second.fitted.shape[1]} layers, {first.name} has {first.fitted.shape[1]}"
        )
    if np.array_equal(first.fitted[0] + first.scored[0], second.fitted[0] + second.scored[0]):
        raise InputError(f"--against {second.name} has the same loads as {first.name}: it is the same traffic")
    names, cuts = _file_names(first, second), np.arange(len(first.fitted) + len(second.fitted))
    of_file = np.split(cuts, [len(first.fitted)])
    pairs = []
    for i, j in ((0, 0), (0, 1), (1, 1), (1, 0)):
        # Within a file a half of one random split shares pairs with the other half of another; between files none do.
        grid = (of_file[i], of_file[i]) if i == j else np.meshgrid(of_file[i], of_file[j])
        pairs.append(_Pairs({"fitted": names[i], "scored": names[j]}, grid[0].ravel(), grid[1].ravel()))
    fitted, scored = np.concatenate([first.fitted, second.fitted]), np.concatenate([first.scored, second.scored])
    return _table(model, fitted, scored, pairs, placements, ep_sizes, ranks_per_node)


def _file_names(first: Halves, second: Halves) -> list[str]:
    """Names that tell two files apart."""
    names = [halves.name.removeprefix("file:") for halves in (first, second)]
    if names[0] != names[1]:
        return names
    return [f"{halves.digest[:8]} {name}" for halves, name in zip((first, second), names, strict=True)]


def _table(
    model: ModelSpec, fitted: np.ndarray, scored: np.ndarray, rows: list[_Pairs], placements: list[str],
    ep_sizes: list[int], ranks_per_node: int,
) -> pd.DataFrame:  # fmt: skip
    placements, ep_sizes = _checked(model, placements, ep_sizes, ranks_per_node)
    table = []
    names = [f"EP {ep_size}" for ep_size in ep_sizes]
    for ep_size in track(ep_sizes, [1.0] * len(ep_sizes), names):
        linear = imbalances(place_fixed("linear", model, ep_size, ranks_per_node), scored, ep_size)
        found = {"linear": np.broadcast_to(linear, (len(fitted), *linear.shape))}
        for name in placements:
            slots = (place_balanced(name, model, ep_size, ranks_per_node, loads) for loads in fitted)
            of_windows = [imbalances(of_window, scored, ep_size) for of_window in slots]
            found[name] = np.stack(of_windows)
        for name, of in found.items():
            for columns, i, j in rows:
                if name == "linear" and (i != j).any():  # linear has no age
                    continue
                figures = _figures(of[i, j].mean(axis=0), linear[j].mean(axis=0), of[j, j].mean(axis=0))
                table.append({"placement": name, "ep_size": ep_size, **columns, "pairs": len(i), **figures})
    return pd.DataFrame(table)


def _checked(
    model: ModelSpec, placements: list[str], ep_sizes: list[int], ranks_per_node: int
) -> tuple[list[str], list[int]]:
    """Names and EP sizes that can be fitted, each once."""
    names, sizes = list(dict.fromkeys(map(strategy_name, placements))), list(dict.fromkeys(ep_sizes))
    whole_number("`ranks_per_node`", ranks_per_node, 1, 2**15)
    for name in names:
        if not is_load_aware(name):
            raise InputError(
                f"`placements` {name}: only load-aware placements go stale: eplb, eplb_refined, eplb+16 ..."
            )
    for size in sizes:
        check_ep_size(model, size, parameter="ep_sizes")
        if size == 1:
            raise InputError("`ep_sizes` 1: one rank has nothing to balance; EP sizes are from 2 on")
        for name in names:
            check_slots(name, model, size)
    return names, sizes


def imbalances(slots: Placement, loads: np.ndarray, ep_size: int) -> np.ndarray:
    """Max / mean rank load, each expert's load divided evenly over its copies.

    Parameters
    ----------
    slots : Placement
        Of each layer, or one for all; a rank has the same slots in all layers.
    loads : float64 [..., layers, n_experts]
    ep_size : int

    Returns
    -------
    float64 [..., layers]
    """
    layer = np.arange(loads.shape[-2])[:, None]
    copies = np.zeros(loads.shape[-2:])
    there = slots.experts >= 0
    np.add.at(copies, (layer, slots.experts), there)
    first = np.searchsorted(slots.ranks[0], np.arange(ep_size))
    of_rank = np.add.reduceat((loads / copies)[..., layer, slots.experts] * there, first, axis=-1)
    return of_rank.max(axis=-1) / of_rank.mean(axis=-1)


def _figures(own: np.ndarray, linear: np.ndarray, fresh: np.ndarray) -> dict[str, float]:
    """Columns of one row from imbalances by layer, float64 [layers] each."""
    intervals = {
        "imbalance": _mean(own),
        "linear": _mean(linear),
        "change": _mean(own - linear),
        "removed": _share(linear - own, linear - 1),
        "lost": _share(own - fresh, linear - fresh),
    }
    columns = {f"{name}_{end}": x for name, of in intervals.items() for end, x in zip(_ENDS, of, strict=True)}
    return columns | {"fresh_mean": float(fresh.mean())}


def _mean(of_layer: np.ndarray) -> _Interval:
    return ratio_interval(of_layer, np.ones(len(of_layer)))


def _share(part: np.ndarray, whole: np.ndarray) -> _Interval:
    """Sum of `part` over that of `whole`, with an interval only where the whole is known to be above 0: it is linearised."""
    size, low, _ = _mean(whole)
    if size < 1e-9:  # less than rounding: a share of nothing
        return np.nan, np.nan, np.nan
    share, *bounds = ratio_interval(part, whole)
    return (share, bounds[0], bounds[1]) if low > 0 else (share, np.nan, np.nan)
