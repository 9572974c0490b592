"""What recorded routing or measured loads look like: skew of experts, dependence of tokens, drift.

Statistics of skew take loads, float or int [..., experts]; the last axis is of experts. A load of 0 everywhere has no skew
and is not allowed.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.fit import correlation
from sim.fit.together import co_selection
from sim.model import ModelSpec
from sim.traffic import LoadCounts, RecordedTraffic
from sim.traffic.split import cut_in_order, load_of

TOP_SHARE = 0.125
"""Share of the experts whose load `top_share` takes by default."""


class Drift(NamedTuple):
    """Two loads of the same layers, float64 [layers, experts], and how they differ, float64 [layers]."""

    names: tuple[str, str]
    first: np.ndarray
    second: np.ndarray
    distance: np.ndarray
    alike: np.ndarray


@dataclass(frozen=True, eq=False)
class Description:
    """Statistics of a file.

    Attributes
    ----------
    layers : int64 [layers]
    load : float64 [layers, experts]
    top_k, n_tokens, n_sequences : int
        Of tokens; None and 0 for counts.
    n_steps : int
    by_layer : dict of float64 [layers]
        Skew and tilt, by the name of their column.
    group_shares : float64 [layers, groups] or None
        None without a grouped model.
    within, across : dict of int to float64 [layers]
        Variance over multinomial by number of tokens, of tokens of one sequence and of different ones.
    by_lag : dict of int to float64 [layers]
        Correlation of the experts of two tokens of a sequence, by the distance between them in tokens.
    decay : Decay or None
        Fitted to it, as `fit_traffic` does; None where sequences are too few or too short.
    drift : Drift or None
        None where there are no halves.
    together : DataFrame or None
        Of `co_selection`; None of counts, and of fewer than 16 sequences.
    """

    layers: np.ndarray
    load: np.ndarray
    top_k: int | None
    n_tokens: int
    n_sequences: int
    n_steps: int
    by_layer: dict[str, np.ndarray]
    group_shares: np.ndarray | None
    within: dict[int, np.ndarray]
    across: dict[int, np.ndarray]
    by_lag: dict[int, np.ndarray]
    decay: correlation.Decay | None
    drift: Drift | None
    together: pd.DataFrame | None = None

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.load.shape[1]


def describe(
    data: RecordedTraffic | LoadCounts,
    model: ModelSpec | None = None,
    other: RecordedTraffic | LoadCounts | None = None,
) -> Description:
    """Statistics of a file; groups are known with a model, and without one the largest id is taken for the last expert.

    Drift is between the halves of the file, or towards an `other` one of the same layers and experts.

    Raises
    ------
    InputError
        The other file has other layers or experts.
    """
    recorded = data if isinstance(data, RecordedTraffic) else None
    if isinstance(data, RecordedTraffic):
        n_experts = model.n_experts if model else int(data.topk_ids.max()) + 1
        load, layers = load_of(data, n_experts).astype(float), data.layer_ids
    else:
        load, layers = data.total, data.layer_ids
        n_experts = load.shape[1]
    by_layer = {
        "CV": variation(load),
        "max/mean": max_over_mean(load),
        "Gini": gini(load),
        "top 12.5 %": top_share(load),
        "tilt": index_tilt(load),
    }
    groups = None
    if model is not None and model.is_grouped:
        groups = group_shares(load, model.n_group)
        if recorded is not None and model.top_k > 1:
            by_layer["same group"] = correlation.same_group(recorded, model.n_group, n_experts)
    together = None
    if recorded is not None and recorded.n_sequences >= correlation.LEAST_SEQUENCES:
        together = co_selection(recorded, model)
        lifts = {"pair lift": "pair_lift", "next lift": "next_lift"}
        of_layers = {name: together[column].to_numpy(float)[:-1] for name, column in lifts.items()}
        by_layer |= {name: values for name, values in of_layers.items() if not np.isnan(values).all()}
    within: dict[int, np.ndarray] = {}
    across: dict[int, np.ndarray] = {}
    for n in correlation.BLOCKS if recorded is not None else ():
        for found, take in ((within, correlation.within_sequences), (across, correlation.across_sequences)):
            value = take(recorded, n, n_experts)  # type: ignore[arg-type]
            if value is not None:
                found[n] = value
    return Description(
        layers, load, recorded.topk_ids.shape[2] if recorded else None, recorded.topk_ids.shape[1] if recorded else 0,
        len(recorded.starts) - 1 if recorded else 0, 1 if isinstance(data, RecordedTraffic) else len(data.counts),
        by_layer, groups, within, across,
        correlation.lag_correlation(recorded, n_experts) if recorded else {},
        correlation.decay_of(recorded, n_experts) if recorded else None,
        _halves(data, n_experts) if other is None else _against(data, load, other),
        together,
    )  # fmt: skip


def _drift(names: tuple[str, str], first: np.ndarray, second: np.ndarray) -> Drift | None:
    if not (first.any(axis=1) & second.any(axis=1)).all():
        return None
    return Drift(names, first, second, distance(first, second), alikeness(first, second))


def _against(data: RecordedTraffic | LoadCounts, load: np.ndarray, other: RecordedTraffic | LoadCounts) -> Drift | None:
    """Drift from one file to another."""
    second = load_of(other, load.shape[1]).astype(float)
    if second.shape != load.shape:
        raise InputError(
            f"--against {other.name} has {second.shape[0]} layers of {second.shape[1]} experts, {data.name} "
            f"{load.shape[0]} of {load.shape[1]}"
        )
    return _drift((data.name, other.name), load, second)


def _halves(data: RecordedTraffic | LoadCounts, n_experts: int) -> Drift | None:
    """From the first half of the sequences, or of the steps, to the second."""
    halves = cut_in_order(data, n_experts)
    what = "sequences" if isinstance(data, RecordedTraffic) else "steps"
    return None if halves is None else _drift((f"first half of the {what}", "second half"), *halves)


def shares(load: np.ndarray) -> np.ndarray:
    """Load over the sum of loads, float64 [..., experts]."""
    return load / load.sum(axis=-1, keepdims=True, dtype=float)


def variation(load: np.ndarray) -> np.ndarray:
    """Coefficient of variation: standard deviation over experts / mean; 0 for balance."""
    return (load / load.mean(axis=-1, keepdims=True)).std(axis=-1)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Largest load of an expert / mean."""
    return load.max(axis=-1) / load.mean(axis=-1)


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient: half the mean absolute difference of two experts / mean; 0 for balance, 1 - 1/experts at most."""
    n = load.shape[-1]
    ordered = np.sort(load, axis=-1)
    weight = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weight).sum(axis=-1) / (n * ordered.sum(axis=-1, dtype=float))


def top_share(load: np.ndarray) -> np.ndarray:
    """Share of the load that the most used TOP_SHARE of the experts (rounded up to whole experts) takes."""
    n_top = int(np.ceil(TOP_SHARE * load.shape[-1] - 1e-9))
    return np.sort(load, axis=-1)[..., load.shape[-1] - n_top :].sum(axis=-1) / load.sum(axis=-1, dtype=float)


def group_shares(load: np.ndarray, n_group: int) -> np.ndarray:
    """Load of each expert group over the mean of groups, float64 [..., n_group]; 1 for balance."""
    of_group = load.reshape(*load.shape[:-1], n_group, -1).sum(axis=-1, dtype=float)
    return of_group / of_group.mean(axis=-1, keepdims=True)


def index_tilt(load: np.ndarray) -> np.ndarray:
    """Slope of the least-squares line of load / mean on (index + 1/2) / experts: -1 falls from 1.5 to 0.5, 0 is level."""
    n = load.shape[-1]
    v = (np.arange(n) + 0.5) / n
    v -= v.mean()
    if n == 1:
        return np.zeros(load.shape[:-1])
    return (load / load.mean(axis=-1, keepdims=True)) @ v / (v @ v)


def distance(load: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation distance of the shares of two loads: the share of the load that would have to move, 0 to 1."""
    return np.abs(shares(load) - shares(other)).sum(axis=-1) / 2


def alikeness(load: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation over experts of the shares of two loads; nan where one of them is level."""
    a, b = (shares(x) - 1 / x.shape[-1] for x in (load, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
