"""Steps through all layers of a model: routed tokens, in each layer the slowest rank of every placement and EP size, and the
time of the layer with its exchange.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.cost.exchange import exchange_kind, exchange_time_us
from sim.cost.expert import ExpertRates, expert_rates, least_time_us, rank_time_us, tile_of, time_ranks
from sim.cost.gpu import Gpu
from sim.errors import InputError
from sim.kernels import kernel, usable_processors
from sim.model import ModelSpec, load_model
from sim.options import LAYER_SETS, MOST_STEPS, StepOptions
from sim.options.declare import check
from sim.placement import LayerCost, is_load_aware, split_name
from sim.progress import track
from sim.scoring import METRICS, score_blocks
from sim.sweeps import make_plan
from sim.sweeps.plan import Plan
from sim.sweeps.steps import Blocks, Group, StepScorer, place_pairs
from sim.traffic import Workload

BUDGET_TOKENS = 2**24
_CHUNK_TOKENS = 2**19
_CHUNK_LAYERS = 256


@dataclass(frozen=True)
class StepSample:
    """Layers of sampled steps.

    A step runs all layers once. Layer sets are independent draws of the layers' popularities, each like a deployment of
    its own; step s belongs to set s % n_sets. The same tokens are scored under every placement, EP size and step size.

    Attributes
    ----------
    plan : Plan
        The cells: pairs (placement, EP size) at numbers of tokens.
    n_layers, n_sets : int
        Layers of a step, and layer sets.
    slowest_us : list of float64 [steps, layers, rates]
        Of each cell, the time of the layer's slowest rank.
    load_bound : list of bool [steps, layers, rates]
        Whether that rank's time grows with its pairs, and not with its distinct experts alone.
    max_load, idle_ranks : list of int32 [steps, layers]
        Of each cell, the largest load of a rank, and the ranks without any.
    active_experts : list of int32 [steps, layers]
        Of each number of tokens (`plan.grid.steps`), the experts with at least one token.
    reached : list of int32 [steps, layers, 2]
        Of each pair, the ranks and nodes that the first token of a step is sent to.
    received : list of int32 [steps, layers]
        Of each cell, the tokens of the rank that receives most; 0 where they were not counted.
    copied : str
        The placement with the most slots, of those with copies; empty without any.
    in_step : StepSample, optional
        The same steps with the pairs of the cells of `copied` split anew in each step, so that the busiest rank has the
        fewest (`sim.copies`); received tokens are left as they are.
    """

    plan: Plan
    n_layers: int
    n_sets: int
    slowest_us: list[np.ndarray]
    load_bound: list[np.ndarray]
    max_load: list[np.ndarray]
    idle_ranks: list[np.ndarray]
    active_experts: list[np.ndarray]
    reached: list[np.ndarray]
    received: list[np.ndarray]
    copied: str = ""
    in_step: "StepSample | None" = None

    def cell(self, placement: str, ep_size: int, tokens: int) -> int:
        """Index of a cell; ValueError if there is none."""
        grid = self.plan.grid
        pair = grid.pairs.index((placement, ep_size))
        return grid.cells.index((pair, int(np.flatnonzero(grid.steps == tokens)[0])))

    def set_of_step(self, cell: int) -> np.ndarray:
        """Layer set of each step of a cell, int64 [steps]."""
        return np.arange(len(self.max_load[cell])) % self.n_sets


def sample_steps(
    model: str | Path | ModelSpec,
    workload: str | Path | Workload,
    rates: Sequence[ExpertRates],
    *,
    layer_sets: int = LAYER_SETS,
    most_steps: int = MOST_STEPS,
    budget_tokens: int = BUDGET_TOKENS,
    threads: int | None = None,
    counts_received: bool = False,
    in_step: bool = False,
    **of_plan: Any,
) -> StepSample:
    """Sample steps of every size and time their layers.

    Parameters
    ----------
    model, workload
        As in `sim.sweep`.
    rates : sequence of ExpertRates
        Constants of the times, one for each GPU and type of weights.
    layer_sets : int
        Independent sets of the model's layers. Recorded and fitted traffic has one: its own layers.
    most_steps, budget_tokens : int
        Steps of each size: as many as the budget of routed tokens allows, at least 1, at most `most_steps`.
    threads : int
        By default all processors. The sample does not depend on it.
        A budget of copies (`eplb_budget+N`) is spent by the times of the first of them, at the most tokens.
    counts_received : bool
        Whether received tokens are counted; where they cannot be, or not, they are taken as even over ranks, from the fan-out of
        the first token of each step.
    in_step : bool
        Whether the steps are also sampled as a balancer within the step would have them.
    **of_plan
        ep_sizes, tokens, placements, tokens_per_rank, ranks_per_node, seed, fit_tokens and fit_on of `sim.sweep`.

    Raises
    ------
    InputError
        As `sim.sweep`, for a model whose number of MoE layers is not known, and for `in_step` without any copies.
    """
    check(StepOptions, layer_sets=layer_sets, most_steps=most_steps)
    received = "auto" if counts_received else "off"
    model = load_model(model)
    cost = time_cost(rates[0], model, of_plan.get("tokens"), bool(of_plan.get("tokens_per_rank"))) if rates else None
    plan = make_plan(model, workload, bound_layers=0, trials=1, received=received, layer_cost=cost, **of_plan)
    n_layers = plan.workload.n_layers or plan.model.n_moe_layers
    if not n_layers:
        raise InputError(f"model {plan.model.name}: a step needs the number of MoE layers, which is not known")
    n_sets = 1 if plan.workload.n_layers else layer_sets
    grid = plan.grid
    of_size = np.clip(budget_tokens // (grid.steps * n_layers), 1, most_steps)
    blocks = of_size * n_layers
    of_cell = [int(blocks[step]) for _, step in grid.cells]
    sample = StepSample(
        plan=plan,
        n_layers=n_layers,
        n_sets=n_sets,
        **_empty_cells(of_cell, len(rates)),
        active_experts=[np.empty(n, np.int32) for n in blocks],
        reached=[np.empty((int(blocks.max()), 2), np.int32) for _ in grid.pairs],
        received=[np.zeros(n, np.int32) for n in of_cell],
        copied=_most_copied(plan),
    )
    if in_step:
        if not sample.copied:
            raise InputError(
                f"`placement` in_step splits the pairs of a step over copies, and {', '.join(grid.placements)} have none; take "
                "it with one that has, as in eplb+32"
            )
        split = [n if grid.keys(cell)[2] == sample.copied else 0 for cell, n in enumerate(of_cell)]
        sample = replace(sample, in_step=replace(sample, **_empty_cells(split, len(rates))))
    chunks = _chunks(blocks, grid.steps, n_layers * n_sets)
    groups_of = cache(partial(place_pairs, plan, pairs=range(len(grid.pairs))))  # a draw comes again every n_sets steps
    constants = np.array(rates, float).reshape(len(rates), -1)
    with ThreadPoolExecutor(threads or usable_processors()) as pool:
        score = partial(_run_chunk, sample, blocks, constants, groups_of)
        sizes = [len(chunk) * int(grid.steps[blocks > chunk.start].max()) for chunk in chunks]
        list(track(pool.map(score, chunks), sizes, ["sampling"] * len(chunks)))
    lists = [sample.active_experts, sample.reached, sample.received]
    for of in (sample, sample.in_step) if sample.in_step else (sample,):
        lists += [of.slowest_us, of.load_bound, of.max_load, of.idle_ranks]
    for arrays in lists:
        arrays[:] = [values.reshape(-1, n_layers, *values.shape[1:]) for values in arrays]
    return sample


def time_cost(rates: ExpertRates, model: ModelSpec, tokens: Any, per_rank: bool = False) -> LayerCost:
    """What a budget of copies is spent by where a GPU is known: the predicted time of the slowest rank, in steps of the most of
    these numbers of tokens, over the EP group or on each rank.
    """

    def slowest_us(shares: np.ndarray) -> np.ndarray:
        pairs = shares * (float(np.max(tokens)) * (shares.shape[1] if per_rank else 1) * model.top_k)
        distinct = -np.expm1(-pairs).sum(axis=2)
        return time_ranks(rates, pairs.sum(axis=2), distinct, np.full(distinct.shape, shares.shape[2])).max(axis=1)

    return slowest_us


def _empty_cells(blocks: list[int], n_rates: int) -> dict[str, Any]:
    """Arrays of a StepSample for so many blocks of each cell, not filled in."""
    return {
        "slowest_us": [np.empty((n, n_rates)) for n in blocks],
        "load_bound": [np.empty((n, n_rates), np.bool_) for n in blocks],
        "max_load": [np.empty(n, np.int32) for n in blocks],
        "idle_ranks": [np.empty(n, np.int32) for n in blocks],
    }


def _most_copied(plan: Plan) -> str:
    """The placement of a plan with the most slots, the first of equals; empty where none has copies."""
    slots: dict[str, int] = {}
    for (name, _), placement, has_copies in zip(plan.grid.pairs, plan.placements, plan.has_replicas, strict=True):
        if has_copies:
            of_name = plan.model.n_experts + split_name(name)[1]
            slots[name] = of_name if is_load_aware(name) or placement is None else placement.n_slots
    return max(slots, key=slots.__getitem__, default="")


def _chunks(of_size: np.ndarray, steps: np.ndarray, n_draws: int) -> list[range]:
    """Trials of each chunk: consecutive draws, the same step sizes, about half a million tokens."""
    edges = sorted({0, *of_size.tolist(), *range(0, int(of_size.max()), n_draws)})
    chunks = []
    for start, stop in pairwise(edges):
        size = max(1, min(_CHUNK_LAYERS, _CHUNK_TOKENS // int(steps[of_size > start].max())))
        chunks += [range(first, min(first + size, stop)) for first in range(start, stop, size)]
    return chunks


def _run_chunk(
    sample: StepSample,
    of_size: np.ndarray,
    constants: np.ndarray,
    groups_of: Callable[[range], list[Group]],
    trials: range,
) -> None:
    """Fill in some trials of every size that has them."""
    plan, n_draws = sample.plan, sample.n_layers * sample.n_sets
    live = np.flatnonzero(of_size > trials.start)
    cells = np.array([cell for cell, (_, step) in enumerate(plan.grid.cells) if step in live])
    first_draw = trials.start % n_draws
    scorer = StepScorer(plan, cells, groups_of(range(first_draw, first_draw + len(trials))), n_draws)
    there = slice(trials.start, trials.stop)
    split_cells: list[int] = []
    slowest_us = np.empty((2, len(trials), len(cells), len(constants)))  # as placed, and split in the step
    load_bound = np.empty(slowest_us.shape, np.bool_)
    split = np.empty((len(trials), len(cells), len(METRICS)), np.int32)

    def time(group: Group, blocks: Blocks, counts: np.ndarray) -> None:
        time_slowest_ranks(*blocks, constants, slowest_us[0], load_bound[0])
        if sample.in_step is not None and plan.grid.pairs[group.pairs[0]][0] == sample.copied:
            anew = blocks._replace(counts=group.assign(counts, "in_step"))
            score_blocks(*anew, split)
            time_slowest_ranks(*anew, constants, slowest_us[1], load_bound[1])
            split_cells.extend(blocks.cells.tolist())

    seen = scorer.score(trials, time)
    of_cells = [(sample, i, 0, seen.scores) for i in range(len(cells))]
    of_cells += [(sample.in_step or sample, i, 1, split) for i in split_cells]
    for of, i, times, scores in of_cells:
        of.slowest_us[cells[i]][there] = slowest_us[times, :, i]
        of.load_bound[cells[i]][there] = load_bound[times, :, i]
        of.max_load[cells[i]][there] = scores[:, i, METRICS.index("max_load")]
        of.idle_ranks[cells[i]][there] = scores[:, i, METRICS.index("idle_ranks")]
    for i, cell in enumerate(cells):
        if plan.grid.received:
            sample.received[cell][there] = seen.scores[:, i, plan.grid.metrics.index("received_tokens_max")]
        else:
            spread = seen.reached[:, plan.grid.pair_of_cell[cell], 0].mean() / plan.grid.ep_size_of_cell[cell]
            sample.received[cell][there] = round(plan.grid.tokens_of_cell[cell] * spread)
    for i, step in enumerate(live):
        sample.active_experts[step][there] = np.count_nonzero(seen.counts[:, i], axis=1)
    for pair, of_pair in enumerate(sample.reached):
        of_pair[there] = seen.reached[:, pair]


@kernel
def time_slowest_ranks(
    counts, cells, step_of_cell, pair_of_cell, layout_of_pair, layouts, constants, slowest_us, load_bound
):
    """Time of the slowest rank of each block under some cells.

    Inputs as in `score_blocks`; constants float64 [rates, 11], the fields of ExpertRates; slowest_us float64 [trials,
    cells, rates], load_bound bool of that shape.
    """
    all_experts, all_bounds = layouts.experts, layouts.bounds
    for t in range(counts.shape[0]):
        for c in cells:
            layout = layout_of_pair[t, pair_of_cell[c]]
            count, experts, begin = counts[t, step_of_cell[c]], all_experts[layout], all_bounds[layout]
            slowest_us[t, c, :] = 0.0
            load_bound[t, c, :] = False
            for r in range(begin[0]):
                load, distinct = 0, 0
                for slot in range(begin[1 + r], begin[2 + r]):
                    pairs = count[np.uint16(experts[slot])]
                    load += pairs
                    distinct += pairs > 0
                local = begin[2 + r] - begin[1 + r]
                for g in range(constants.shape[0]):
                    rows = 0.0
                    if constants[g, 8] < np.inf:  # a kernel with large tiles: rows are counted
                        tile_rows = tile_of(constants[g], float(load), float(local))[1]
                        for slot in range(begin[1 + r], begin[2 + r]):
                            rows += tile_rows * np.ceil(count[np.uint16(experts[slot])] / tile_rows)
                    time_us, grows = rank_time_us(constants[g], float(load), float(distinct), float(local), rows)
                    if time_us > slowest_us[t, c, g]:
                        slowest_us[t, c, g] = time_us
                        load_bound[t, c, g] = grows


class CellTimes(NamedTuple):
    """Times of a cell's layers, float64 [steps, layers]."""

    experts_us: np.ndarray  # of the slowest rank
    exchange_us: np.ndarray
    is_extrapolated: bool  # the exchange, beyond what was measured

    @property
    def layer_us(self) -> np.ndarray:
        """Experts and exchange, one after the other."""
        return self.experts_us + self.exchange_us


def cell_times(sample: StepSample, cell: int, rate: int, gpu: Gpu, dtype: str, exchange: str) -> CellTimes:
    """Times of the layers of a cell on a GPU whose rates are number `rate` of the sample's, under an exchange, by kind or
    backend.
    """
    return CellTimes(
        sample.slowest_us[cell][..., rate],
        *_exchange_us(sample, cell, gpu, dtype, exchange, sample.max_load[cell].astype(float), sample.received[cell]),
    )


def balanced_times(sample: StepSample, cell: int, gpu: Gpu, dtype: str, exchange: str) -> CellTimes:
    """Times of the layers of a cell if pairs, and the experts that have any, were spread evenly over the ranks.

    No placement, with replicas or without, has faster experts: the time of a rank is convex in both but for `spread_us`, and
    grows with them. Received tokens are left as they are in the cell: where the exchange goes by them (`token`), a placement
    whose busiest rank receives fewer may still have a faster layer.
    """
    grid, model = sample.plan.grid, sample.plan.model
    active, ep_size = sample.active_experts[grid.cells[cell][1]], int(grid.ep_size_of_cell[cell])
    pairs = np.full(active.shape, float(grid.mean_load(cell)))
    local = np.full(active.shape, model.n_experts / ep_size)
    experts_us = least_time_us(expert_rates(model, gpu, dtype), pairs, active / ep_size, local)
    return CellTimes(experts_us, *_exchange_us(sample, cell, gpu, dtype, exchange, pairs, sample.received[cell]))


def _exchange_us(
    sample: StepSample, cell: int, gpu: Gpu, dtype: str, exchange: str, pairs: np.ndarray, received: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Times of the exchange, of the pairs' shape, and whether they lie beyond what was measured.

    Dummy tokens are received like the others.
    """
    grid = sample.plan.grid
    ep_size, tokens = int(grid.ep_size_of_cell[cell]), int(grid.tokens_of_cell[cell])
    per_rank = (tokens + grid.dummy_tokens) / ep_size
    traffic: dict[str, Any] = {"pairs": pairs}
    if exchange_kind(exchange) == "token":
        nodes = float(sample.reached[int(grid.pair_of_cell[cell])][..., 1].mean())
        traffic = {"received_tokens": received * (1 + grid.dummy_tokens / tokens), "nodes_per_token": nodes}
    times = exchange_time_us(
        sample.plan.model, gpu, kind=exchange, ep_size=ep_size, tokens_per_rank=per_rank,
        ranks_per_node=sample.plan.ranks_per_node, dtype=dtype, **traffic,
    )  # fmt: skip
    return np.broadcast_to(times.total_us, pairs.shape), bool(np.any(times.extrapolated))
