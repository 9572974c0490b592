"""What is measured: sampled steps of a layer under placements, and the ranks of each that are worth the machine's time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sim.cost import Gpu, expert_time_us
from sim.errors import InputError, whole_number
from sim.model import ModelSpec, load_model
from sim.placement import BUDGET, Placement, check_ep_size, is_load_aware, place, split_name, strategy_name
from sim.scoring import METRICS
from sim.streams import PERMUTATION, stream_key, words
from sim.sweeps import make_plan
from sim.sweeps.steps import Group, StepScorer, place_pairs
from sim.traffic import SyntheticTraffic, Workload, load_workload


class MeasuredRank(NamedTuple):
    """One rank's share of a layer."""

    rank: int
    chosen: str  # 'busiest' or 'random'
    counts: np.ndarray  # int32 [slots of the rank], tokens of each


class MeasuredLayer(NamedTuple):
    """One step of one layer under one placement."""

    workload: str
    tokens: int
    step: int
    ep_size: int
    placement: str
    ranks: list[MeasuredRank]


@dataclass(frozen=True, eq=False)
class Measurement:
    """Sampled steps; a step is an independent layer draw, and all placements and EP sizes share its tokens.

    `tokens` ascend: a shorter step is the beginning of a longer one. `groups`, by workload, placement and EP size, has the group
    of placements laid out for all steps, and the place in it.
    """

    model: ModelSpec
    tokens: list[int]  # per step over the EP group
    counts: dict[str, np.ndarray]  # by workload, int32 [steps, len(tokens), n_experts]: tokens that take each expert
    groups: dict[tuple[str, str, int], tuple[Group, int]]
    most_pairs: int  # of the busiest rank of all
    seed: int

    @property
    def n_steps(self) -> int:
        """Steps that were sampled."""
        return len(next(iter(self.counts.values())))

    @property
    def placed(self) -> dict[tuple[str, str, int], Placement]:
        """Placement by (workload, placement, EP size): of all steps, or of each where it is fitted to tokens of its layer."""
        return {key: group.placements[i] for key, (group, i) in self.groups.items()}

    @property
    def most_local_experts(self) -> int:
        """Physical experts of the rank that holds the most."""
        return max(int(np.bincount(ranks).max()) for placement in self.placed.values() for ranks in placement.ranks)

    def slot_counts(self, key: tuple[str, str, int], step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each slot, and its rank, int32 [slots] both: of the step's number of tokens `size`. An expert's tokens are
        split evenly over its copies.
        """
        group, i = self.groups[key]
        counts = self.counts[key[0]][step : step + 1, size : size + 1]
        assigned = group._replace(rows=group.rows[step : step + 1]).assign(counts)[0, 0]
        placement = group.placements[i]
        row = step % placement.n_rows
        if not placement.has_replicas:  # counts are those of experts
            assigned = assigned[placement.experts[row]]
        return assigned, placement.ranks[row]

    def compared(self, gpu: Gpu, dtypes: Sequence[str]) -> Iterator[list[MeasuredLayer]]:
        """Layers in the order of measurement, those that differ in their placement together.

        Steps are outermost, so that a run that is cut short has measured all cells alike. The placement that goes first
        changes from step to step: the clocks of a warm chip must not favour one.
        """
        names = list(dict.fromkeys(name for _, name, _ in self.groups))
        sizes = list(dict.fromkeys(size for _, _, size in self.groups))
        for step in range(self.n_steps):
            for i, tokens in enumerate(self.tokens):
                for workload in self.counts:
                    for size in sizes:
                        cells = [(workload, tokens, step, size, name) for name in turned(names, step)]
                        yield [MeasuredLayer(*cell, self._ranks(cell, i, gpu, dtypes)) for cell in cells]

    def _ranks(
        self, cell: tuple[str, int, int, int, str], i: int, gpu: Gpu, dtypes: Sequence[str]
    ) -> list[MeasuredRank]:
        """The ranks that may be the slowest, and one of the others; of the step's number of tokens i."""
        workload, _, step, ep_size, placement = cell
        counts, rank_of_slot = self.slot_counts((workload, placement, ep_size), step, i)
        busiest = busiest_ranks(self.model, gpu, counts, rank_of_slot, dtypes)
        others = np.setdiff1d(np.arange(ep_size), busiest)
        chosen = [(rank, "busiest") for rank in busiest]
        if others.size:
            word = int(words(stream_key(self.seed, f"measured rank of {cell}"), PERMUTATION, 0, (1, 1))[0, 0])
            chosen.append((int(others[word * others.size >> 32]), "random"))
        return [MeasuredRank(rank, why, counts[rank_of_slot == rank]) for rank, why in chosen]


def turned(names: list[str], step: int) -> list[str]:
    """The names from another one on in each step."""
    first = step % len(names)
    return names[first:] + names[:first]


def busiest_ranks(
    model: ModelSpec, gpu: Gpu, counts: np.ndarray, rank_of_slot: np.ndarray, dtypes: Sequence[str]
) -> list[int]:
    """Ranks that may be the slowest, ascending: with the longest predicted time (in each type), the largest load, and the
    most distinct experts; of equals, the one with more of the other.
    """
    loads = np.bincount(rank_of_slot, counts).astype(np.int64)
    distinct = np.bincount(rank_of_slot, counts > 0).astype(np.int64)
    found = {int(np.lexsort((distinct, loads))[-1]), int(np.lexsort((loads, distinct))[-1])}
    found |= {
        int(expert_time_us(model, gpu, pairs=loads, distinct_experts=distinct, dtype=dtype).argmax())
        for dtype in dtypes
    }
    return sorted(found)


def plan_measurement(
    model: ModelSpec | str | Path,
    workloads: Sequence[Workload | str | Path],
    *,
    ep_sizes: Sequence[int],
    tokens: Sequence[int],
    placements: Sequence[str],
    steps: int,
    seed: int = 0,
) -> Measurement:
    """Sample steps of each workload and place the experts; every step has a fresh layer. Raises InputError.

    Placement 'random' is one permutation for all steps; load-aware ones are fitted, step by step, to other tokens of the layer.
    """
    model = load_model(model)
    whole_number("`steps`", steps, 1, 10_000)
    asked = {"`workload`": workloads, "`ep_sizes`": ep_sizes, "`tokens`": tokens, "`placements`": placements}
    for option, values in asked.items():
        if not values:
            raise InputError(f"{option} must name at least one")
    for count in tokens:
        whole_number("`tokens`", count, 1, 2**20)
    names = list(dict.fromkeys(strategy_name(name) for name in placements))
    for name in names:
        if split_name(name)[0] == BUDGET:
            raise InputError(
                f"`placements` {name}: its layers differ in slots; layers are measured with one number of them"
            )
    for ep_size in ep_sizes:
        check_ep_size(model, ep_size, names, "ep_sizes")
    asked_for: list[str | Placement] = [name for name in names if name != "random"]
    if "random" in names:  # one permutation for all steps
        at = names.index("random")
        asked_for[at:at] = [place("random", model, ep_size, seed=seed) for ep_size in ep_sizes]
    counts: dict[str, np.ndarray] = {}
    groups: dict[tuple[str, str, int], tuple[Group, int]] = {}
    most_pairs = 0
    for workload in (load_workload(name) if isinstance(name, str | Path) else name for name in workloads):
        if any(map(is_load_aware, names)) and not isinstance(workload, SyntheticTraffic):
            raise InputError(f"`workload` {workload.name}: load-aware placements are measured under synthetic traffic")
        plan = make_plan(
            model,
            workload,
            ep_sizes=ep_sizes,
            tokens=tokens,
            placements=asked_for,
            trials=steps,
            seed=seed,
            bound_layers=0,
            received="off",
        )
        placed = place_pairs(plan, range(steps), range(len(plan.grid.pairs)))
        seen = StepScorer(plan, np.arange(len(plan.grid.cells)), placed, steps).score(range(steps))
        counts[workload.name] = seen.counts
        most_pairs = max(most_pairs, int(seen.scores[..., METRICS.index("max_load")].max()))
        where = {pair: (group, i) for group in placed for i, pair in enumerate(group.pairs.tolist())}
        groups |= {(workload.name, *of_pair): where[pair] for pair, of_pair in enumerate(plan.grid.pairs)}
    return Measurement(model, sorted(set(tokens)), counts, groups, most_pairs, seed)
