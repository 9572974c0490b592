"""What a sweep computes, checked, and everything that identifies it."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.errors import InputError, shown, whole_number
from sim.model import ModelSpec, load_model
from sim.options import DEFAULT_MAX_TRIALS, DEFAULT_TRIALS, SweepOptions
from sim.options.declare import identity
from sim.placement import BUDGET, LayerCost, Placement, check_ep_size, is_load_aware, most_slots, split_name
from sim.results import SCHEMA
from sim.router import check_pair, routing_law
from sim.sweeps.grid import Grid
from sim.sweeps.placements import FittedOn, check_same_layers, fitted_on, layout_id, place_pair, read_placements
from sim.traffic import RecordedTraffic, SyntheticTraffic, Workload, load_workload

RARE = 1e-3
"""Probabilities that are shown to be below this do not hold up a cell under a precision of the tail."""
_LEAST_LAYERS, _MOST_LAYERS = 4, 32  # by default, for bounds where popularity is drawn
_MOST_REQUESTS = 2**15
_MOST_HELD_TOKENS = 2**20  # per step: the experts of every token are held
_SMALL_WORK, _TOKENS_PER_WORK = 20_000, 500  # ranks x cells x layers that are taken, the more the larger the sweep


class Precision(NamedTuple):
    """When a cell may stop: relative half-widths of 95 % intervals, None where it does not matter."""

    mean: float | None  # of the mean imbalance
    tail: float | None  # of every P(imbalance >= x) that is not shown to be below RARE


@dataclass(frozen=True, eq=False)
class Plan:
    """A checked sweep; what is not said here is as in `SweepOptions`.

    `placements` are those of each pair of the grid, of one layer or of several that draws take in turn; None where each draw has
    its own (random, fitted).
    """

    grid: Grid
    model: ModelSpec
    workload: Workload
    placements: list[Placement | None]
    fit_tokens: (
        int  # other tokens of each draw that load-aware placements are fitted on; 0 where none is fitted to draws
    )
    fit: str  # what load-aware placements are fitted on, in words; empty without any
    replica_choice: str
    trials: int  # under a precision the most
    draws: int | None  # None where every trial is a draw
    seed: int
    ranks_per_node: int
    precision: Precision | None
    bound_layers: int  # layer draws that bounds past sampling are taken over; 0 for no bounds
    tail_floor: float | None  # probability down to which tails over all layers are estimated (`sim.theory.rare_tail`)
    layer_cost: LayerCost | None = None  # what a budget of copies is spent by; None: the load of the busiest rank

    @property
    def identity(self) -> dict[str, object]:
        """All that the tables depend on, as JSON values: two sweeps are the same if these are equal."""
        values: dict[str, object] = {"schema": SCHEMA, **self.grid.identity, **identity(SweepOptions, self)}
        values |= {"law": routing_law(self.model, self.workload), "draws": self.draws or self.trials}
        values |= {"fit": self.fit} if self.fit else {}
        values |= {"replica_choice": self.replica_choice} if any(self.has_replicas) else {}
        values |= {"tail_floor": self.tail_floor} if self.tail_floor is not None else {}
        return values | ({"precision": list(self.precision)} if self.precision else {})

    @property
    def synthetic(self) -> SyntheticTraffic:
        """The workload, where nothing else can be."""
        assert isinstance(self.workload, SyntheticTraffic)
        return self.workload

    @property
    def n_layers(self) -> int:
        """Layers of a deployment, 0 where they are not known; of drawn ones those are so many draws in a row."""
        return self.workload.n_layers or self.model.n_moe_layers

    @cached_property
    def has_replicas(self) -> list[bool]:
        """Of each pair whether an expert may be in several slots."""
        return [
            split_name(name)[1] > 0 if placement is None else placement.has_replicas
            for (name, _), placement in zip(self.grid.pairs, self.placements, strict=True)
        ]

    @cached_property
    def slots_of_draw(self) -> int:
        """Slots of all pairs that are fitted to each draw."""
        pairs = zip(self.grid.pairs, self.placements, strict=True)
        fitted = [pair for pair, placement in pairs if placement is None and is_load_aware(pair[0])]
        return sum(most_slots(name, self.model.n_experts, ep_size) for name, ep_size in fitted)

    @cached_property
    def most_slots(self) -> int:
        """Most slots of a pair with replicas; 0 without any."""
        n_experts = self.model.n_experts
        numbers = [
            most_slots(name, n_experts, ep_size) if placement is None else placement.n_slots
            for (name, ep_size), placement in zip(self.grid.pairs, self.placements, strict=True)
        ]
        return max((n for n, has in zip(numbers, self.has_replicas, strict=True) if has), default=0)


def make_plan(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    *,
    layer_cost: LayerCost | None = None,
    **options: Any,
) -> Plan:
    """Check the arguments of `sim.sweep`. Raises InputError for whatever is wrong."""
    chosen = SweepOptions(**options)
    model = load_model(model)
    workload = workload if isinstance(workload, Workload) else load_workload(workload, model)
    check_pair(model, workload)
    names, given = read_placements(chosen.placements, model, chosen.ep_sizes)
    strategies = [name for name in names if all(name != of_given for of_given, _ in given)]
    for size in chosen.ep_sizes if strategies else ():  # on other sizes no placement was given
        check_ep_size(model, size, strategies, "ep_sizes")
    pairs = [(name, int(size)) for name in names for size in chosen.ep_sizes]
    trials, precision = _choose_trials(chosen)
    fit = fitted_on(strategies, model, workload, chosen.fit_tokens, chosen.fit_on)
    placed = [
        place_pair(name, model, size, chosen.ranks_per_node, given, fit.loads, layer_cost) for name, size in pairs
    ]
    for (name, _), of_pair in zip(pairs, placed, strict=True):
        if of_pair is not None and of_pair.n_rows > 1:
            check_same_layers(f"placement {name}", of_pair.n_rows, of_pair.layer_ids, fit.scored, model)
    grid = _grid(model, fit, chosen, pairs, placed)
    _check_requests(grid.steps, fit.scored)
    plan = Plan(
        grid=grid,
        model=model,
        workload=fit.scored,
        placements=placed,
        fit_tokens=fit.tokens,
        fit=fit.about,
        replica_choice=chosen.replica_choice,
        trials=trials,
        draws=_choose_draws(fit.scored, trials, chosen.draws),
        seed=chosen.seed,
        ranks_per_node=chosen.ranks_per_node,
        precision=precision,
        bound_layers=_choose_bound_layers(grid, workload, trials, chosen.bound_layers),
        tail_floor=chosen.tail_floor,
        layer_cost=layer_cost,
    )
    _check_sums_fit(plan)
    drawn = [name for (name, _), of_pair in zip(pairs, placed, strict=True) if of_pair is None]
    budgets = [name for name in drawn if split_name(name)[0] == BUDGET]
    if budgets and not plan.n_layers:
        raise InputError(f"placement {budgets[0]}: {model.name} does not say how many MoE layers share the budget")
    return plan


def _grid(
    model: ModelSpec, fit: FittedOn, chosen: SweepOptions, pairs: list[tuple[str, int]], placed: list[Placement | None]
) -> Grid:
    return Grid(
        model=model.name,
        workload=fit.scored.name,
        top_k=model.top_k,
        placements=tuple(dict(pairs)),
        ep_sizes=tuple(int(size) for size in chosen.ep_sizes),
        tokens=tuple(chosen.tokens),
        per_rank=chosen.tokens_per_rank,
        thresholds=tuple(sorted({float(level) for level in chosen.thresholds})),
        layouts=tuple(
            layout_id(name, of_pair, fit.about, chosen.replica_choice)
            for (name, _), of_pair in zip(pairs, placed, strict=True)
        ),
        largest_rank=tuple(
            -(-most_slots(name, model.n_experts, size) // size)
            if of_pair is None
            else max(int(np.bincount(row).max()) for row in of_pair.ranks)
            for (name, size), of_pair in zip(pairs, placed, strict=True)
        ),
        ranks_per_node=chosen.ranks_per_node,
        dummy_tokens=fit.scored.dummy_tokens,
        received=_choose_received(fit.scored, chosen),
    )


def _choose_received(workload: Workload, chosen: SweepOptions) -> bool:
    """Whether received tokens are counted. Raises InputError where what was asked for needs single tokens, which are not to be
    had.
    """
    largest_step = max(chosen.tokens) * (max(chosen.ep_sizes) if chosen.tokens_per_rank else 1)
    reason = no_single_tokens_because(workload, largest_step)
    for asked, option in (
        (chosen.received == "on", "received"),
        (chosen.replica_choice == "vllm_hash", "replica_choice"),
    ):
        if reason and asked:
            raise InputError(f"`{option}` {getattr(chosen, option)}: {reason}")
    return not reason and chosen.received != "off"


def no_single_tokens_because(workload: Workload, largest_step: int) -> str | None:
    """Why the experts of all tokens of a step, one by one, are not to be had; None if they are."""
    if isinstance(workload, RecordedTraffic) and workload.phase == "prefill":
        return "recorded prefill is replayed in runs of tokens, which are not kept"
    if workload.dummy_tokens:
        return "dummy tokens are counted by their experts, not one by one"
    if largest_step > _MOST_HELD_TOKENS:
        return f"every token of a step is held: at most {_MOST_HELD_TOKENS} tokens, not {largest_step}"
    return None


def _choose_bound_layers(grid: Grid, workload: Workload, trials: int, layers: int | None) -> int:
    """By default as many layers as keep bounds cheaper than sampling, none where few would be left; uniform traffic needs
    no draws.
    """
    if layers is not None:
        return layers
    if isinstance(workload, SyntheticTraffic) and workload.popularity == "none":
        return _MOST_LAYERS
    work = max(_SMALL_WORK, trials * int(grid.steps[-1]) // _TOKENS_PER_WORK)
    fitted = workload.n_layers if isinstance(workload, SyntheticTraffic) else None
    affordable = min(work // int(grid.ep_size_of_cell.sum()), fitted or _MOST_LAYERS)
    return affordable if affordable >= min(_LEAST_LAYERS, fitted or _LEAST_LAYERS) else 0


def _choose_trials(chosen: SweepOptions) -> tuple[int, Precision | None]:
    """Number of trials (the most, under a precision), and the precision."""
    if chosen.precision is None and chosen.precision_tail is None:
        if chosen.max_trials is not None:
            raise InputError("`max_trials` goes with `precision` or `precision_tail`; without them take `trials`")
        return DEFAULT_TRIALS if chosen.trials is None else chosen.trials, None
    if chosen.trials is not None:
        raise InputError("`trials` and a precision exclude each other; `max_trials` bounds a precision")
    most = DEFAULT_MAX_TRIALS if chosen.max_trials is None else chosen.max_trials
    return most, Precision(chosen.precision, chosen.precision_tail)


def _choose_draws(workload: Workload, trials: int, draws: int | None) -> int | None:
    """Layer draws; None for as many as trials: by default every step of synthetic traffic has a fresh layer."""
    if workload.n_layers is not None:
        if draws not in (None, workload.n_layers):
            raise InputError(
                f"`draws` {shown(draws)}: {workload.name} has {workload.n_layers} layers, and each is a draw"
            )
        return min(workload.n_layers, trials)
    draws = None if draws is None else whole_number("`draws`", draws, 1, trials)
    return None if draws == trials else draws


def _check_sums_fit(plan: Plan) -> None:
    """Loads must fit 32-bit integers, the sums of their squares over draws 64-bit ones."""
    largest_step, draws = int(plan.grid.steps[-1]) + plan.grid.dummy_tokens, plan.draws or plan.trials
    of_block = max(largest_step * plan.model.top_k, *plan.grid.ep_sizes)  # largest load, or number of idle ranks
    of_draw = -(-plan.trials // draws) * of_block
    if of_block >= 2**31 or draws * of_draw**2 >= 2**63:
        raise InputError(
            f"`trials` {plan.trials} from {draws} draws at `tokens` {largest_step}: loads would not fit 32-bit "
            "integers, or their sums over draws 64-bit ones; take fewer trials or fewer tokens"
        )


def _check_requests(steps: np.ndarray, workload: Workload) -> None:
    """A step must hold whole requests where the workload says so, and not more of them than memory does."""
    n, has_effect = workload.tokens_per_request, isinstance(workload, SyntheticTraffic) and workload.request_sigma > 0
    for step in steps.tolist():
        if workload.whole_requests and step % n:
            raise InputError(f"`tokens` {step}: `tokens_per_request` {n} must divide the tokens of a step")
        if has_effect and step > _MOST_REQUESTS * n:
            raise InputError(f"`tokens` {step}: at most {_MOST_REQUESTS} requests in a step, {n} tokens each")
