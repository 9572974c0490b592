"""Placements of a sweep: strategies by name, placements and arrays as given; and what load-aware ones are fitted on, which is
never the tokens that are scored.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.errors import InputError, shown, whole_number
from sim.model import ModelSpec
from sim.placement import (
    LayerCost,
    Placement,
    check_loads,
    check_slots,
    is_load_aware,
    place_balanced,
    place_fixed,
    split_name,
    strategy_name,
)
from sim.traffic import LoadCounts, RecordedTraffic, SyntheticTraffic, Workload, read_traffic
from sim.traffic.split import load_of

MAX_TOKENS = 2**24
DEFAULT_FIT_TOKENS = 2**14

PlacementLike = str | Placement | ArrayLike
"""A strategy's name, a placement, or the rank of each expert."""
Given = dict[tuple[str, int], Placement]
"""Placements that were not asked for by a strategy's name, by name and EP size."""


def read_placements(
    placements: PlacementLike | Iterable[PlacementLike], model: ModelSpec, ep_sizes: Sequence[int]
) -> tuple[list[str], Given]:
    """Names of placements, in order, and those that were given as such: a Placement, or the rank of each expert, [n_experts] or
    [layers, n_experts], named 'array'. Several of one name on different EP sizes are one placement of the grid; of one EP size
    they are numbered.

    Raises InputError for a name that is not known, a placement that is not one of this model, or none for one of the EP sizes.
    """
    values: list[Any] = [placements]
    if isinstance(placements, Iterable) and not isinstance(placements, str | np.ndarray):
        values = list(placements)
    if values and isinstance(values[0], int | np.integer) and values[0] is not placements:
        values = [values]  # the rank of each expert
    if not values:
        raise InputError("`placements` needs at least one value")
    strategies = {strategy_name(value, "placements") for value in values if isinstance(value, str)}
    names: list[str] = []
    given: Given = {}
    for value in values:
        if isinstance(value, str):
            names.append(strategy_name(value, "placements"))
            continue
        placement = value if isinstance(value, Placement) else _placement_of_array(value)
        _check_placement(placement, model)
        name, n = placement.strategy, 1
        while name in strategies or (name, placement.ep_size) in given:
            n += 1
            name = f"{placement.strategy} {n}"
        given[name, placement.ep_size] = placement
        names.append(name)
    for name, size in given:
        if size not in ep_sizes:
            raise InputError(
                f"`placements` {name} is on {size} ranks, which `ep_sizes` {_listed(ep_sizes)} does not have"
            )
    for name in dict.fromkeys(name for name, _ in given):
        for size in ep_sizes:
            if (name, size) not in given:
                has = _listed([of for key, of in given if key == name])
                raise InputError(f"`placements` {name} is given for {has} ranks, not for `ep_sizes` {size}")
    return list(dict.fromkeys(names)), given


def _listed(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes))


def _placement_of_array(value: Any) -> Placement:
    """The rank of each expert, of one layer or of several; there are as many ranks as are named."""
    try:
        ranks = np.asarray(value)
    except ValueError:  # rows of different lengths
        ranks = np.empty(0)
    if ranks.ndim not in (1, 2) or ranks.dtype.kind not in "iu" or not ranks.size:
        raise InputError(
            f"`placements` {shown(value)}: must be a name, a Placement, or the rank of each expert as whole numbers "
            "[n_experts] or [layers, n_experts]"
        )
    if ranks.min() < 0 or ranks.max() >= 2**15:
        raise InputError(f"`placements` array: ranks must be from 0 to {2**15 - 1}")
    return Placement.of_ranks("array", int(ranks.max()) + 1, np.atleast_2d(ranks).astype(np.int32))


def _check_placement(placement: Placement, model: ModelSpec) -> None:
    """Refuse what is not a placement of the model's experts on all of its ranks."""
    name, n_experts, size = placement.strategy, model.n_experts, placement.ep_size
    ranks, experts = placement.ranks, placement.experts
    if placement.n_experts != n_experts:
        raise InputError(f"`placements` {name} is of {placement.n_experts} experts, model {model.name} has {n_experts}")
    is_whole = ranks.ndim == 2 and ranks.shape == experts.shape and n_experts <= ranks.shape[1] < 2**16
    if not is_whole or ranks.min() < 0 or ranks.max() >= size or experts.min() < -1 or experts.max() >= n_experts:
        raise InputError(f"`placements` {name}: ranks and experts do not fit {size} ranks and {n_experts} experts")
    for row, (of_slot, expert) in enumerate(zip(ranks, experts, strict=True)):
        for what, held, n in (("rank", of_slot, size), ("expert", expert, n_experts)):
            missing = np.flatnonzero(np.bincount(held[expert >= 0], minlength=n) == 0)
            if missing.size:
                raise InputError(f"`placements` {name}, layer {row}: {what} {missing[0]} of {n} is in no slot")


def place_pair(
    name: str,
    model: ModelSpec,
    ep_size: int,
    ranks_per_node: int,
    given: Given,
    loads: np.ndarray | None,
    layer_cost: LayerCost | None,
) -> Placement | None:
    """Placement of a pair, of one layer or all; None where each draw has its own."""
    if (name, ep_size) in given:
        return given[name, ep_size]
    check_slots(name, model, ep_size)
    if is_load_aware(name):
        return None if loads is None else place_balanced(name, model, ep_size, ranks_per_node, loads, None, layer_cost)
    if name == "random":
        return None
    return place_fixed(name, model, ep_size, ranks_per_node)


def check_same_layers(
    what: str, n_layers: int, ids: Iterable[int] | None, workload: Workload | LoadCounts, model: ModelSpec
) -> None:
    """Refuse what has another number of layers than recorded traffic or measured loads, or, where both say which decoder layers
    they have (0, 1, ... may be those that nobody named), other ones.
    """
    if workload.n_layers not in (None, n_layers):
        raise InputError(f"{what} has {n_layers} layers, workload {workload.name} has {workload.n_layers}")
    mine, other, moe = list(getattr(workload, "layer_ids", ())), list(ids or ()), set(model.moe_layer_ids)
    if list(range(len(mine))) in (mine, other) or not (moe.issuperset(mine) and moe.issuperset(other)):
        return
    for layer, wanted in zip(other, mine, strict=False):
        if layer != wanted:
            raise InputError(
                f"{what} has decoder layer {layer} where workload {workload.name} has layer {wanted}: keep the same layers"
            )


def layout_id(name: str, placement: Placement | None, fit: str, replica_choice: str) -> str:
    """What tells the layout of a pair from another's: a digest of a fixed placement, or how each draw gets its own."""
    if placement is None:
        layout, replicas = name if name == "random" else f"{name}, fitted on {fit}", split_name(name)[1] > 0
    else:
        replicas = placement.has_replicas
        ranks, experts = placement.ranks, placement.experts
        table = ranks.tobytes() + experts.tobytes() if replicas else placement.expert_ranks.tobytes()
        layout = hashlib.sha256(table).hexdigest()[:16]
    return f"{layout}, {replica_choice}" if replicas and replica_choice != "even" else layout


class FittedOn(NamedTuple):
    """What load-aware placements are fitted on, and the traffic that is left to score: never the same tokens."""

    scored: Workload
    about: str = ""
    tokens: int = 0  # of each layer draw of synthetic traffic
    loads: np.ndarray | None = None  # of the layers of a record, float64 [layers, n_experts]


def fitted_on(names: list[str], model: ModelSpec, workload: Workload, tokens: int | None, other: Any) -> FittedOn:
    """Synthetic: other tokens of each layer draw. Recorded: every second sequence. Recorded or fitted: other traffic (a file,
    or what was read from one) of the same layers. `names` are those of strategies.
    """
    if not any(map(is_load_aware, names)):
        for option, value in (("`fit_tokens`", tokens), ("`fit_on`", other)):
            if value is not None:
                raise InputError(f"{option} goes with a load-aware placement (eplb, eplb_refined); there is none")
        return FittedOn(workload)
    if other is not None and workload.n_layers is None:
        raise InputError(
            f"`fit_on` {shown(str(other))}: goes with recorded or fitted traffic; the layers of {workload.name} are drawn, and "
            "those of other traffic are unrelated to them (`fit_tokens` sets what is fitted)"
        )
    if other is not None and tokens is not None:
        raise InputError("`fit_tokens` and `fit_on` exclude each other: tokens of the same layers, or other traffic")
    if isinstance(workload, SyntheticTraffic) and other is None:
        n = whole_number("`fit_tokens`", DEFAULT_FIT_TOKENS if tokens is None else tokens, 1, MAX_TOKENS)
        return FittedOn(workload, f"{n} other tokens of each layer draw", n)
    if tokens is not None:
        raise InputError(
            "`fit_tokens` goes with synthetic traffic; recorded traffic is fitted on every second sequence"
        )
    if isinstance(workload, RecordedTraffic) and other is None:
        fitted, scored = workload.halves()
        return FittedOn(
            scored, "even sequences of the record", loads=fitted.count_experts(model.n_experts).astype(float)
        )
    data = read_traffic(str(other).removeprefix("file:"), model) if isinstance(other, str | Path) else other
    if isinstance(data, RecordedTraffic):
        data.check_model(model.n_experts, model.top_k, model.name)
    about = f"`fit_on` {data.name.removeprefix('file:')}"
    loads = check_loads(load_of(data, model.n_experts), model.n_experts, about, layers=True)
    check_same_layers(about, len(loads), data.layer_ids.tolist(), workload, model)
    # synthetic traffic names what it is fitted to
    if data.digest in (getattr(workload, "digest", "") or workload.source).split():
        raise InputError(f"{about} is the traffic that is scored; leave it out to fit on other tokens")
    return FittedOn(workload, f"{data.name.removeprefix('file:')} ({data.digest[:16]})", loads=loads)
