"""Steps through all layers of a model: routed tokens, and in each layer the slowest rank of every placement and EP size."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from sim.cost.expert import ExpertRates
from sim.errors import InputError, whole_number
from sim.kernels import kernel, usable_processors
from sim.model import ModelSpec
from sim.router import draw_trials
from sim.score import fan_out
from sim.sweeps import make_plan
from sim.sweeps.layouts import chunk_groups
from sim.sweeps.plan import Plan
from sim.workload import Workload

LAYER_SETS = 32
MOST_STEPS = 512
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
    max_load : list of int64 [steps, layers]
        Of each cell, the largest load of a rank.
    reached : float64 [pairs, 2]
        Mean ranks and nodes that a token is sent to.
    """

    plan: Plan
    n_layers: int
    n_sets: int
    slowest_us: list[np.ndarray]
    load_bound: list[np.ndarray]
    max_load: list[np.ndarray]
    reached: np.ndarray

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
    ep_sizes: int | Iterable[int],
    tokens: int | Iterable[int],
    placements: str | Sequence[str],
    tokens_per_rank: bool = False,
    ranks_per_node: int = 8,
    layer_sets: int = LAYER_SETS,
    most_steps: int = MOST_STEPS,
    budget_tokens: int = BUDGET_TOKENS,
    seed: int = 0,
    threads: int | None = None,
) -> StepSample:
    """Sample steps of every size and time their layers.

    Parameters
    ----------
    model, workload, ep_sizes, tokens, placements, tokens_per_rank, ranks_per_node, seed
        As in `sim.sweep`.
    rates : sequence of ExpertRates
        Constants of the times, one for each GPU and type of weights.
    layer_sets : int
        Independent sets of the model's layers. Recorded traffic has one: its own layers.
    most_steps, budget_tokens : int
        Steps of each size: as many as the budget of routed tokens allows, at least 1, at most `most_steps`.
    threads : int
        By default all processors. The sample does not depend on it.

    Raises
    ------
    InputError
        As `sim.sweep`, and for a model whose number of MoE layers is not known.
    """
    whole_number("--layer-sets", layer_sets, 1, 4096)
    whole_number("--steps", most_steps, 1, 10**6)
    plan = make_plan(
        model, workload, ep_sizes=ep_sizes, tokens=tokens, placements=placements, tokens_per_rank=tokens_per_rank,
        ranks_per_node=ranks_per_node, seed=seed, bound_layers=0, trials=1,
    )  # fmt: skip
    n_layers = plan.workload.n_layers or plan.model.n_moe_layers
    if not n_layers:
        raise InputError(f"model {plan.model.name}: a step needs the number of MoE layers, which is not known")
    n_sets = 1 if plan.workload.n_layers else layer_sets
    grid = plan.grid
    of_size = np.clip(budget_tokens // (grid.steps * n_layers), 1, most_steps)
    sample = StepSample(
        plan,
        n_layers,
        n_sets,
        [np.empty((int(of_size[step]) * n_layers, len(rates))) for _, step in grid.cells],
        [np.empty((int(of_size[step]) * n_layers, len(rates)), np.bool_) for _, step in grid.cells],
        [np.empty(int(of_size[step]) * n_layers, np.int64) for _, step in grid.cells],
        np.zeros((len(grid.pairs), 2)),
    )
    chunks = _chunks(of_size * n_layers, grid.steps, n_layers * n_sets)
    constants = np.array(rates, float).reshape(len(rates), -1)
    with ThreadPoolExecutor(threads or usable_processors()) as pool:
        reached = list(pool.map(lambda trials: _run_chunk(sample, of_size * n_layers, constants, trials), chunks))
    sample.reached[:] = np.sum(reached, axis=0) / sum(map(len, chunks))
    for of_cell in (sample.slowest_us, sample.load_bound, sample.max_load):
        of_cell[:] = [values.reshape(-1, n_layers, *values.shape[1:]) for values in of_cell]
    return sample


def _chunks(of_size: np.ndarray, steps: np.ndarray, n_draws: int) -> list[range]:
    """Trials of each chunk: consecutive draws, the same step sizes, about half a million tokens."""
    edges = sorted({0, *of_size.tolist(), *range(0, int(of_size.max()), n_draws)})
    chunks = []
    for start, stop in pairwise(edges):
        size = max(1, min(_CHUNK_LAYERS, _CHUNK_TOKENS // int(steps[of_size > start].max())))
        chunks += [range(first, min(first + size, stop)) for first in range(start, stop, size)]
    return chunks


def _run_chunk(sample: StepSample, of_size: np.ndarray, constants: np.ndarray, trials: range) -> np.ndarray:
    """Fill in some trials of every size that has them; returns ranks and nodes reached, summed, [pairs, 2]."""
    plan, n_draws = sample.plan, sample.n_layers * sample.n_sets
    grid = plan.grid
    live = np.flatnonzero(of_size > trials.start)
    cells = np.array([cell for cell, (_, step) in enumerate(grid.cells) if step in live])
    first_draw = trials.start % n_draws
    counts, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, n_draws, grid.steps[live])
    slowest_us = np.empty((len(trials), len(cells), len(constants)))
    load_bound = np.empty(slowest_us.shape, np.bool_)
    max_load = np.empty((len(trials), len(cells)), np.int64)
    reached = np.zeros((len(trials), len(grid.pairs), 2), np.int64)
    step_of_cell = np.searchsorted(live, [grid.cells[cell][1] for cell in cells])
    pair_of_cell = grid.pair_of_cell[cells]
    for group in chunk_groups(plan, range(first_draw, first_draw + len(trials)), range(len(grid.pairs))):
        mine = np.flatnonzero(np.isin(pair_of_cell, group.pairs))
        of_group = np.searchsorted(group.pairs, pair_of_cell)  # of other groups' cells: not looked at
        dealt = group.deal(counts, ids, grid.steps[live], plan.replica_choice)
        time_slowest_ranks(
            dealt, mine, step_of_cell, of_group, group.rows, group.layouts, constants, slowest_us, load_bound, max_load
        )
        first = group.slots_of_first(ids, trials.start)
        fan_out(first, group.pairs, group.rows, group.layouts, plan.ranks_per_node, reached)
    for i, cell in enumerate(cells):
        sample.slowest_us[cell][trials.start : trials.stop] = slowest_us[:, i]
        sample.load_bound[cell][trials.start : trials.stop] = load_bound[:, i]
        sample.max_load[cell][trials.start : trials.stop] = max_load[:, i]
    return reached.sum(axis=0)


@kernel
def time_slowest_ranks(
    counts, cells, step_of_cell, pair_of_cell, layout_of_pair, layouts, constants, slowest_us, load_bound, max_load
):
    """Time of the slowest rank, and the largest load, of each block under some cells.

    Inputs as in `score_blocks`; constants float64 [rates, 5], the fields of ExpertRates; slowest_us float64 [trials,
    cells, rates], load_bound bool of that shape; max_load int64 [trials, cells].
    """
    all_experts, all_bounds = layouts.experts, layouts.bounds
    for t in range(counts.shape[0]):
        for c in cells:
            layout = layout_of_pair[t, pair_of_cell[c]]
            count, experts, begin = counts[t, step_of_cell[c]], all_experts[layout], all_bounds[layout]
            slowest_us[t, c, :] = 0.0
            load_bound[t, c, :] = False
            largest = 0
            for r in range(begin[0]):
                load, distinct = 0, 0
                for slot in range(begin[1 + r], begin[2 + r]):
                    pairs = count[np.uint16(experts[slot])]
                    load += pairs
                    distinct += pairs > 0
                largest = max(largest, load)
                for g in range(constants.shape[0]):
                    launch_us, us_per_expert, us_per_pair, us_per_row, tile_rows = constants[g]
                    whole_us = max(distinct * us_per_expert + load * us_per_pair, us_per_row * distinct * tile_rows)
                    rows_us = us_per_row * (load + distinct * (tile_rows / 2))
                    time_us = launch_us + max(whole_us, rows_us)
                    if time_us > slowest_us[t, c, g]:
                        slowest_us[t, c, g] = time_us
                        load_bound[t, c, g] = rows_us > whole_us
            max_load[t, c] = largest
