"""What is measured: sampled steps of a layer, dealt to ranks, and the ranks of each that are worth the machine's time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from sim.cost import Gpu, expert_time_us
from sim.errors import InputError, whole_number
from sim.model import ModelSpec
from sim.placement import (
    Placement,
    check_ep_size,
    is_load_aware,
    place_balanced,
    place_fixed,
    random_ranks,
    strategy_name,
)
from sim.router import check_pair, draw_loads, draw_trials
from sim.scoring import assign_evenly, find_copies
from sim.streams import PERMUTATION, stream_key, words
from sim.sweeps.fit import DEFAULT_FIT_TOKENS
from sim.traffic import SyntheticTraffic, Workload

_RANKS_PER_NODE = 8


class Rank(NamedTuple):
    """One rank's share of a layer."""

    rank: int
    chosen: str  # 'busiest' or 'random'
    counts: np.ndarray  # int32 [slots of the rank], tokens of each


class Layer(NamedTuple):
    """One step of one layer under one placement."""

    workload: str
    tokens: int
    step: int
    ep_size: int
    placement: str
    ranks: list[Rank]


@dataclass(frozen=True, eq=False)
class Steps:
    """Sampled steps; a step is an independent layer draw, and all placements and EP sizes share its tokens.

    Attributes
    ----------
    model : ModelSpec
    tokens : list of int
        Tokens per step over the EP group, ascending: a shorter step is the beginning of a longer one.
    counts : dict of int32 [steps, len(tokens), n_experts]
        Tokens that take each expert, by workload.
    placed : dict of Placement
        By (workload, placement, EP size): of all steps, or of each step where it is fitted to other tokens of its layer.
    seed : int
    """

    model: ModelSpec
    tokens: list[int]
    counts: dict[str, np.ndarray]
    placed: dict[tuple[str, str, int], Placement]
    seed: int

    @property
    def n_steps(self) -> int:
        """Steps that were sampled."""
        return len(next(iter(self.counts.values())))

    @property
    def most_local_experts(self) -> int:
        """Placement of the rank that holds the most."""
        return max(int(np.bincount(ranks).max()) for slots in self.placed.values() for ranks in slots.ranks)

    @property
    def most_pairs(self) -> int:
        """Pairs of the busiest rank of all."""
        last = len(self.tokens) - 1
        return max(
            int(rank_sums(*self.slot_counts(key, step, last)).max())
            for key in self.placed
            for step in range(self.n_steps)
        )

    def slot_counts(self, key: tuple[str, str, int], step: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens of each slot, and its rank, int32 [slots] both: of the step's number of tokens `size`. An expert's tokens
        are split evenly over its copies.
        """
        slots, counts = self.placed[key], self.counts[key[0]][step, size]
        row = step % len(slots.ranks)
        if not slots.has_replicas:
            return counts[slots.experts[row]], slots.ranks[row]
        copies = find_copies(slots.experts[row : row + 1], slots.n_experts)
        dealt = np.empty((1, 1, slots.experts.shape[1]), np.int32)
        assign_evenly(counts[None, None], np.zeros(1, np.int64), copies, dealt)
        return dealt[0, 0], slots.ranks[row]

    def compared(self, gpu: Gpu, dtypes: Sequence[str]) -> Iterator[list[Layer]]:
        """Layers in the order of measurement, those that differ in their placement together.

        Steps are outermost, so that a run that is cut short has measured all cells alike. The placement that goes first
        changes from step to step: the clocks of a warm chip must not favour one.
        """
        names = list(dict.fromkeys(name for _, name, _ in self.placed))
        sizes = list(dict.fromkeys(size for _, _, size in self.placed))
        for step in range(self.n_steps):
            turned = names[step % len(names) :] + names[: step % len(names)]
            for i, tokens in enumerate(self.tokens):
                for workload in self.counts:
                    for size in sizes:
                        cells = [(workload, tokens, step, size, name) for name in turned]
                        yield [Layer(*cell, self._ranks(cell, i, gpu, dtypes)) for cell in cells]

    def _ranks(self, cell: tuple[str, int, int, int, str], i: int, gpu: Gpu, dtypes: Sequence[str]) -> list[Rank]:
        """The ranks that may be the slowest, and one of the others; of the step's number of tokens i."""
        workload, _, step, ep_size, placement = cell
        counts, rank_of_slot = self.slot_counts((workload, placement, ep_size), step, i)
        busiest = busiest_ranks(self.model, gpu, counts, rank_of_slot, dtypes)
        others = np.setdiff1d(np.arange(ep_size), busiest)
        chosen = [(rank, "busiest") for rank in busiest]
        if others.size:
            word = int(words(stream_key(self.seed, f"measured rank of {cell}"), PERMUTATION, 0, (1, 1))[0, 0])
            chosen.append((int(others[word * others.size >> 32]), "random"))
        return [Rank(rank, why, counts[rank_of_slot == rank]) for rank, why in chosen]


def rank_sums(counts: np.ndarray, rank_of_slot: np.ndarray) -> np.ndarray:
    """Sum over each rank's slots: counts [..., slots] to int64 [..., ranks]."""
    belongs = rank_of_slot[:, None] == np.arange(rank_of_slot.max() + 1)
    return counts.astype(np.int64) @ belongs.astype(np.int64)


def busiest_ranks(
    model: ModelSpec, gpu: Gpu, counts: np.ndarray, rank_of_slot: np.ndarray, dtypes: Sequence[str]
) -> list[int]:
    """Ranks that may be the slowest, ascending: with the longest predicted time (in each type), the largest load, and the
    most distinct experts; of equals, the one with more of the other.
    """
    loads = rank_sums(counts, rank_of_slot)
    distinct = rank_sums((counts > 0).astype(np.int32), rank_of_slot)
    found = {int(np.lexsort((distinct, loads))[-1]), int(np.lexsort((loads, distinct))[-1])}
    for dtype in dtypes:
        found.add(int(expert_time_us(model, gpu, pairs=loads, distinct_experts=distinct, dtype=dtype).argmax()))
    return sorted(found)


def sample_steps(
    model: ModelSpec,
    workloads: Sequence[Workload],
    *,
    ep_sizes: Sequence[int],
    tokens: Sequence[int],
    placements: Sequence[str],
    steps: int,
    seed: int = 0,
) -> Steps:
    """Sample steps of each workload and place the experts; every step has a fresh layer.

    Parameters
    ----------
    tokens : sequence of int
        Tokens per step over the whole EP group.
    placements : sequence of str
        'random' is one permutation for all steps; load-aware ones are fitted, step by step, to other tokens of the layer.
    steps : int
        Independent layer draws, 1 to 10,000.

    Raises
    ------
    InputError
        Unknown names, numbers out of range, or a workload that does not go with the model.
    """
    whole_number("--steps", steps, 1, 10_000)
    whole_number("--seed", seed, 0, 2**63 - 1)
    asked = {"--workload": workloads, "--ep": ep_sizes, "--tokens": tokens, "--placement": placements}
    for option, values in asked.items():
        if not values:
            raise InputError(f"{option} must name at least one")
    ascending = sorted({whole_number("--tokens", count, 1, 2**20) for count in tokens})
    names = [strategy_name(name) for name in placements]
    for ep_size in ep_sizes:
        check_ep_size(model, ep_size)
    counts, placed = {}, {}
    for workload in workloads:
        check_pair(model, workload)
        drawn, _ = draw_trials(model, workload, seed, range(steps), steps, np.array(ascending), n_ids=0)
        counts[workload.name] = drawn
        loads = _fitted_loads(model, workload, seed, steps) if any(map(is_load_aware, names)) else None
        for name, ep_size in product(names, ep_sizes):
            placed[workload.name, name, ep_size] = _place(name, model, ep_size, seed, loads)
    return Steps(model, ascending, counts, placed, seed)


def _fitted_loads(model: ModelSpec, workload: Workload, seed: int, steps: int) -> np.ndarray:
    """Loads of other tokens of the layers, float64 [steps, n_experts]."""
    if not isinstance(workload, SyntheticTraffic):
        raise InputError(f"--workload {workload.name}: load-aware placements are measured under traffic by law")
    return draw_loads(model, workload, seed, range(steps), DEFAULT_FIT_TOKENS)


def _place(name: str, model: ModelSpec, ep_size: int, seed: int, loads: np.ndarray | None) -> Placement:
    if is_load_aware(name):
        assert loads is not None
        return place_balanced(name, model, ep_size, _RANKS_PER_NODE, loads)
    if name == "random":
        return Placement.of_ranks(name, ep_size, random_ranks(model.n_experts, ep_size, seed, 0, 1))
    return place_fixed(name, model, ep_size, _RANKS_PER_NODE)
