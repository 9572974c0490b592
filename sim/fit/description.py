"""All statistics of recorded routing or of measured loads."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim.errors import InputError
from sim.fit import correlation, skew
from sim.fit.blocks import load_of, only_sequences
from sim.model import ModelSpec
from sim.traffic import LoadCounts, RecordedTraffic


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
    drift : Drift or None
        None where there are no halves.
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
    drift: Drift | None

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
        "CV": skew.variation(load),
        "max/mean": skew.max_over_mean(load),
        "Gini": skew.gini(load),
        "top 12.5 %": skew.top_share(load),
        "tilt": skew.index_tilt(load),
    }
    groups = None
    if model is not None and model.is_grouped:
        groups = skew.group_shares(load, model.n_group)
        if recorded is not None and model.top_k > 1:
            by_layer["same group"] = correlation.same_group(recorded, model.n_group, n_experts)
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
        by_layer, groups, within, across, _halves(data, n_experts) if other is None else _against(data, load, other),
    )  # fmt: skip


def _drift(names: tuple[str, str], first: np.ndarray, second: np.ndarray) -> Drift | None:
    if not (first.any(axis=1) & second.any(axis=1)).all():
        return None
    return Drift(names, first, second, skew.distance(first, second), skew.alikeness(first, second))


def _against(data: RecordedTraffic | LoadCounts, load: np.ndarray, other: RecordedTraffic | LoadCounts) -> Drift | None:
    """Drift from one file to another."""
    second = load_of(other, load.shape[1]).astype(float) if isinstance(other, RecordedTraffic) else other.total
    if second.shape != load.shape:
        raise InputError(
            f"--against {other.name} has {second.shape[0]} layers of {second.shape[1]} experts, {data.name} "
            f"{load.shape[0]} of {load.shape[1]}"
        )
    return _drift((data.name, other.name), load, second)


def _halves(data: RecordedTraffic | LoadCounts, n_experts: int) -> Drift | None:
    """From the first half of the sequences, or of the steps, to the second."""
    n = len(data.starts) - 1 if isinstance(data, RecordedTraffic) else len(data.counts)
    if n < 2:
        return None
    if isinstance(data, LoadCounts):
        first, second = data.counts[: n // 2].sum(axis=0, dtype=float), data.counts[n // 2 :].sum(axis=0, dtype=float)
        return _drift(("first half of the steps", "second half"), first, second)
    parts = [only_sequences(data, part) for part in (np.arange(n // 2), np.arange(n // 2, n))]
    first, second = (load_of(part, n_experts).astype(float) for part in parts)
    return _drift(("first half of the sequences", "second half"), first, second)
