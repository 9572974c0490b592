"""What a sweep computes, checked, and everything that identifies it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.errors import InputError, shown, whole_number
from sim.model import ModelSpec, load_model
from sim.placement import check_ep_size, layer_ranks, strategy_name
from sim.results import SCHEMA
from sim.router import check_pair, routing_law
from sim.sweeps.grid import Grid
from sim.workload import GumbelTraffic, Workload, load_workload

THRESHOLDS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Imbalance thresholds of tail.csv."""
DEFAULT_TRIALS = 10_000
DEFAULT_MAX_TRIALS = 1_000_000
MAX_TOKENS = 2**24
RARE = 1e-3
"""Probabilities that are shown to be below this do not hold up a cell under a precision of the tail."""
_LEAST_LAYERS, _MOST_LAYERS = 4, 32  # by default, for bounds where popularity is drawn
_SMALL_WORK, _TOKENS_PER_WORK = 20_000, 500  # ranks x cells x layers that are taken, the more the larger the sweep


class Precision(NamedTuple):
    """When a cell may stop: relative half-widths of 95 % intervals, None where it does not matter."""

    mean: float | None  # of the mean imbalance
    tail: float | None  # of every P(imbalance >= x) that is not shown to be below RARE


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked sweep.

    Attributes
    ----------
    grid : Grid
        Its cells.
    model, workload, trials, draws, seed, ranks_per_node
        As in `sim.sweep`; under a precision, `trials` are the most, and `draws` None where every trial is a draw.
    layer_ranks : list of int32 [1 or layers, n_experts]
        Of each pair the rank of each expert; None for random placement.
    precision : Precision, optional
    bound_layers : int
        Layer draws that bounds past sampling are taken over; 0 for no bounds.
    """

    grid: Grid
    model: ModelSpec
    workload: Workload
    layer_ranks: list[np.ndarray | None]
    trials: int
    draws: int | None
    seed: int
    ranks_per_node: int
    precision: Precision | None
    bound_layers: int

    @property
    def identity(self) -> dict[str, object]:
        """All that the tables depend on, as JSON values: two sweeps are the same if these are equal."""
        identity: dict[str, object] = {"schema": SCHEMA, **self.grid.identity}
        identity |= {"law": routing_law(self.model, self.workload), "ranks_per_node": self.ranks_per_node}
        identity |= {"trials": self.trials, "draws": self.draws or self.trials, "seed": self.seed}
        identity |= {"bound_layers": self.bound_layers}
        return identity | ({"precision": list(self.precision)} if self.precision else {})


def _listed(option: str, values: Any) -> list[Any]:
    """One value or several, as a list of at least one without repetitions."""
    several = isinstance(values, Iterable) and not isinstance(values, str) and getattr(values, "ndim", 1) > 0
    listed = list(dict.fromkeys(values)) if several else [values]
    if not listed:
        raise InputError(f"{option} needs at least one value")
    return listed


def make_plan(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    *,
    ep_sizes: int | Iterable[int],
    tokens: int | Iterable[int],
    placements: str | Sequence[str],
    trials: int | None = None,
    draws: int | None = None,
    seed: int = 0,
    tokens_per_rank: bool = False,
    ranks_per_node: int = 8,
    thresholds: Iterable[float] = THRESHOLDS,
    precision: float | None = None,
    precision_tail: float | None = None,
    max_trials: int | None = None,
    bound_layers: int | None = None,
) -> Plan:
    """Check the arguments of `sim.sweep`. Raises InputError for whatever is wrong."""
    if not isinstance(model, ModelSpec):
        model = load_model(model)
    if not isinstance(workload, Workload):
        workload = load_workload(workload)
    check_pair(model, workload)
    sizes = _listed("--ep", ep_sizes)
    for size in sizes:
        check_ep_size(model, size)
    step_option = "--tokens-per-rank" if tokens_per_rank else "--tokens"
    steps = [whole_number(step_option, step, 1, MAX_TOKENS) for step in _listed(step_option, tokens)]
    names = [strategy_name(name) for name in _listed("--placement", placements)]
    trials, target = _choose_trials(trials, precision, precision_tail, max_trials)
    levels = _listed("--thresholds", thresholds)
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, Real) or not 1 <= float(level) <= 2**15:
            raise InputError(f"--thresholds {shown(level)}: must be a number from 1 (balance) to 32768")
    whole_number("--ranks-per-node", ranks_per_node, 1, 2**15)
    pairs = [(name, int(size)) for name in dict.fromkeys(names) for size in sizes]
    ranks = [None if name == "random" else layer_ranks(name, model, size, ranks_per_node) for name, size in pairs]
    _check_layers(pairs, ranks, workload)
    grid = Grid(
        model=model.name,
        workload=workload.name,
        top_k=model.top_k,
        placements=tuple(dict.fromkeys(names)),
        ep_sizes=tuple(int(size) for size in sizes),
        tokens=tuple(dict.fromkeys(steps)),
        per_rank=bool(tokens_per_rank),
        thresholds=tuple(sorted({float(level) for level in levels})),
        layouts=tuple("random" if table is None else _digest(table) for table in ranks),
        largest_rank=tuple(
            -(-model.n_experts // size) if table is None else max(int(np.bincount(row).max()) for row in table)
            for (_, size), table in zip(pairs, ranks, strict=True)
        ),
    )
    plan = Plan(
        grid=grid,
        model=model,
        workload=workload,
        layer_ranks=ranks,
        trials=trials,
        draws=_choose_draws(workload, trials, draws),
        seed=whole_number("--seed", seed, 0, 2**63 - 1),
        ranks_per_node=ranks_per_node,
        precision=target,
        bound_layers=_choose_bound_layers(grid, workload, trials, bound_layers),
    )
    _check_sums_fit(plan)
    return plan


def _choose_bound_layers(grid: Grid, workload: Workload, trials: int, layers: int | None) -> int:
    """By default as many layers as keep bounds cheaper than sampling, none where few would be left; uniform traffic needs
    no draws.
    """
    if layers is not None:
        return whole_number("--bound-layers", layers, 0, 4096)
    if isinstance(workload, GumbelTraffic) and workload.popularity == "none":
        return _MOST_LAYERS
    work = max(_SMALL_WORK, trials * int(grid.steps[-1]) // _TOKENS_PER_WORK)
    fitted = workload.n_layers if isinstance(workload, GumbelTraffic) else None
    affordable = min(work // int(grid.ep_size_of_cell.sum()), fitted or _MOST_LAYERS)
    return affordable if affordable >= min(_LEAST_LAYERS, fitted or _LEAST_LAYERS) else 0


def _digest(table: np.ndarray) -> str:
    return hashlib.sha256(table.tobytes()).hexdigest()[:16]


def _choose_trials(trials: int | None, mean: Any, tail: Any, max_trials: int | None) -> tuple[int, Precision | None]:
    """Number of trials (the most, under a precision), and the precision."""
    if mean is None and tail is None:
        if max_trials is not None:
            raise InputError("--max-trials goes with --precision or --precision-tail; without them take --trials")
        return whole_number("--trials", DEFAULT_TRIALS if trials is None else trials, 1, 10**9), None
    if trials is not None:
        raise InputError("--trials and a precision exclude each other; --max-trials bounds a precision")
    for option, value in (("--precision", mean), ("--precision-tail", tail)):
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, Real) or not 1e-6 <= float(value) < 1
        ):
            raise InputError(f"{option} {shown(value)}: must be a share from 0.0001% to below 100%, as in 1% or 0.01")
    most = whole_number("--max-trials", DEFAULT_MAX_TRIALS if max_trials is None else max_trials, 1, 10**9)
    return most, Precision(*(None if value is None else float(value) for value in (mean, tail)))


def _choose_draws(workload: Workload, trials: int, draws: int | None) -> int | None:
    """Layer draws; None for as many as trials: by default every step has a fresh layer of a law."""
    if workload.n_layers is not None:
        if draws not in (None, workload.n_layers):
            raise InputError(
                f"--draws {shown(draws)}: {workload.name} has {workload.n_layers} layers, and each is a draw"
            )
        return min(workload.n_layers, trials)
    draws = None if draws is None else whole_number("--draws", draws, 1, trials)
    return None if draws == trials else draws


def _check_sums_fit(plan: Plan) -> None:
    """The sums of squares over draws must fit 64-bit integers."""
    largest_step, draws = int(plan.grid.steps[-1]), plan.draws or plan.trials
    of_block = max(largest_step * plan.model.top_k, *plan.grid.ep_sizes)  # largest load, or number of idle ranks
    of_draw = -(-plan.trials // draws) * of_block
    if draws * of_draw**2 >= 2**63:
        raise InputError(
            f"--trials {plan.trials} from {draws} draws at --tokens {largest_step}: sums over draws would not fit "
            "64-bit integers; take fewer trials or fewer tokens"
        )


def _check_layers(pairs: list[tuple[str, int]], ranks: list[np.ndarray | None], workload: Workload) -> None:
    """A placement with a row per layer must have as many rows as the recorded layers that it is applied to."""
    for (placement, _), table in zip(pairs, ranks, strict=True):
        if workload.n_layers is not None and table is not None and len(table) not in (1, workload.n_layers):
            raise InputError(
                f"placement {placement} has {len(table)} layers, workload {workload.name} has {workload.n_layers}"
            )
