"""What a sweep computes: its cells, and everything that identifies it."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown, whole_number
from sim.model import ModelSpec, load_model
from sim.placement import check_ep_size, layer_ranks, strategy_name
from sim.router import check_pair, routing_law
from sim.workload import RecordedTraffic, Workload, load_workload

THRESHOLDS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Imbalance thresholds of tail.csv."""
DEFAULT_TRIALS = 10_000
MAX_TOKENS = 2**24
SCHEMA = 1


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked sweep. Cells are all pairs (placement, EP size) at each number of tokens per step.

    Attributes
    ----------
    model, workload, placements, ep_sizes, trials, draws, seed, ranks_per_node, thresholds
        As in `sim.sweep`.
    tokens : tuple of int
        Tokens per step over the whole EP group, or, with `per_rank`, tokens per step and rank.
    """

    model: ModelSpec
    workload: Workload
    placements: tuple[str, ...]
    ep_sizes: tuple[int, ...]
    tokens: tuple[int, ...]
    per_rank: bool
    trials: int
    draws: int
    seed: int
    ranks_per_node: int
    thresholds: tuple[float, ...]

    @cached_property
    def steps(self) -> np.ndarray:
        """Distinct tokens per step over the EP group, int64, ascending."""
        scale = self.ep_sizes if self.per_rank else (1,)
        return np.unique([n * r for n in self.tokens for r in scale]).astype(np.int64)

    @cached_property
    def pairs(self) -> list[tuple[str, int]]:
        """(placement, EP size), placements slowest."""
        return [(placement, ep_size) for placement in self.placements for ep_size in self.ep_sizes]

    @cached_property
    def cells(self) -> list[tuple[int, int]]:
        """(index of the pair, index of the step), pairs slowest; the cells of the first placement come first."""
        step_of = {int(step): i for i, step in enumerate(self.steps)}
        return [
            (p, step_of[n * ep_size if self.per_rank else n])
            for p, (_, ep_size) in enumerate(self.pairs)
            for n in self.tokens
        ]

    @cached_property
    def baseline_cells(self) -> np.ndarray:
        """For each cell the cell of the first placement on the same EP size and step, int64."""
        return np.arange(len(self.cells)) % (len(self.ep_sizes) * len(self.tokens))

    @cached_property
    def layer_ranks(self) -> list[np.ndarray | None]:
        """Of each pair the rank of each expert, int32 [1 or layers, n_experts]; None for random placement."""
        return [
            None if placement == "random" else layer_ranks(placement, self.model, ep_size, self.ranks_per_node)
            for placement, ep_size in self.pairs
        ]

    @property
    def identity(self) -> dict[str, object]:
        """All that the tables depend on, as JSON values: two sweeps are the same if these are equal."""
        files = {
            f"{placement}@{ep_size}": hashlib.sha256(ranks.tobytes()).hexdigest()[:16]
            for (placement, ep_size), ranks in zip(self.pairs, self.layer_ranks, strict=True)
            if placement.startswith("file:") and ranks is not None
        }
        return {
            "schema": SCHEMA,
            "model": self.model.name,
            "workload": self.workload.name,
            "law": routing_law(self.model, self.workload),
            "placements": list(self.placements),
            "placement_files": files,
            "ep_sizes": list(self.ep_sizes),
            "tokens_per_rank" if self.per_rank else "tokens": list(self.tokens),
            "trials": self.trials,
            "draws": self.draws,
            "seed": self.seed,
            "ranks_per_node": self.ranks_per_node,
            "thresholds": list(self.thresholds),
        }

    def mean_load(self, cell: int) -> Fraction:
        """Mean load over ranks of a block of a cell: the same for every block."""
        pair, step = self.cells[cell]
        return Fraction(int(self.steps[step]) * self.model.top_k, self.pairs[pair][1])


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
    trials: int = DEFAULT_TRIALS,
    draws: int | None = None,
    seed: int = 0,
    tokens_per_rank: bool = False,
    ranks_per_node: int = 8,
    thresholds: Iterable[float] = THRESHOLDS,
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
    trials = whole_number("--trials", trials, 1, 10**9)
    levels = _listed("--thresholds", thresholds)
    for level in levels:
        if isinstance(level, bool) or not isinstance(level, Real) or not 1 <= float(level) <= 2**15:
            raise InputError(f"--thresholds {shown(level)}: must be a number from 1 (balance) to 32768")
    plan = Plan(
        model=model,
        workload=workload,
        placements=tuple(dict.fromkeys(names)),
        ep_sizes=tuple(int(size) for size in sizes),
        tokens=tuple(dict.fromkeys(steps)),
        per_rank=bool(tokens_per_rank),
        trials=trials,
        draws=_choose_draws(workload, trials, draws),
        seed=whole_number("--seed", seed, 0, 2**63 - 1),
        ranks_per_node=whole_number("--ranks-per-node", ranks_per_node, 1, 2**15),
        thresholds=tuple(sorted({float(level) for level in levels})),
    )
    _check_sums_fit(plan)
    if plan.layer_ranks and any(ranks is not None and len(ranks) > 1 for ranks in plan.layer_ranks):
        _check_layers(plan)
    return plan


def _choose_draws(workload: Workload, trials: int, draws: int | None) -> int:
    """Layer draws: by default as many as can be, every step a fresh layer of a law, every layer of a record."""
    if isinstance(workload, RecordedTraffic):
        if draws not in (None, workload.n_layers):
            raise InputError(
                f"--draws {shown(draws)}: {workload.name} has {workload.n_layers} layers, and each is a draw"
            )
        return min(workload.n_layers, trials)
    return trials if draws is None else whole_number("--draws", draws, 1, trials)


def _check_sums_fit(plan: Plan) -> None:
    """The sums of squares over draws must fit 64-bit integers."""
    of_block = max(int(plan.steps[-1]) * plan.model.top_k, *plan.ep_sizes)  # largest load, or number of idle ranks
    of_draw = -(-plan.trials // plan.draws) * of_block
    if plan.draws * of_draw**2 >= 2**63:
        raise InputError(
            f"--trials {plan.trials} from {plan.draws} draws at --tokens {plan.steps[-1]}: sums over draws would not fit "
            "64-bit integers; take fewer trials or fewer tokens"
        )


def _check_layers(plan: Plan) -> None:
    """A placement with a row per layer must have as many rows as the recorded layers that it is applied to."""
    n_layers = plan.workload.n_layers
    for (placement, _), ranks in zip(plan.pairs, plan.layer_ranks, strict=True):
        if n_layers is not None and ranks is not None and len(ranks) not in (1, n_layers):
            raise InputError(
                f"placement {placement} has {len(ranks)} layers, workload {plan.workload.name} has {n_layers}"
            )
