"""What is measured: sampled steps of a layer, dealt to ranks, and the ranks of each that are worth the machine's time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from sim.cost import Gpu, expert_time_us
from sim.errors import InputError, whole_number
from sim.model import ModelSpec
from sim.placement import place
from sim.router import check_pair, draw_trials
from sim.streams import PERMUTATION, stream_key, words
from sim.workload import Workload


class Rank(NamedTuple):
    """One rank's share of a layer."""

    rank: int
    chosen: str  # 'busiest' or 'random'
    counts: np.ndarray  # int32 [experts of the rank], tokens of each


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
    placed : dict of int32 [n_experts]
        Rank of each expert, by (placement, EP size).
    seed : int
    """

    model: ModelSpec
    tokens: list[int]
    counts: dict[str, np.ndarray]
    placed: dict[tuple[str, int], np.ndarray]
    seed: int

    @property
    def n_steps(self) -> int:
        """Steps that were sampled."""
        return len(next(iter(self.counts.values())))

    @property
    def most_local_experts(self) -> int:
        """Experts of the rank that holds the most."""
        return max(int(np.bincount(ranks).max()) for ranks in self.placed.values())

    @property
    def most_pairs(self) -> int:
        """Pairs of the busiest rank of all."""
        counts = np.concatenate([rows.reshape(-1, self.model.n_experts) for rows in self.counts.values()])
        return max(int(rank_sums(counts, ranks).max()) for ranks in self.placed.values())

    def compared(self, gpu: Gpu, dtypes: Sequence[str]) -> Iterator[list[Layer]]:
        """Layers in the order of measurement, those that differ in their placement together.

        Steps are outermost, so that a run that is cut short has measured all cells alike. The placement that goes first
        changes from step to step: the clocks of a warm chip must not favour one.
        """
        names = list(dict.fromkeys(name for name, _ in self.placed))
        sizes = list(dict.fromkeys(size for _, size in self.placed))
        for step in range(self.n_steps):
            turned = names[step % len(names) :] + names[: step % len(names)]
            for i, tokens in enumerate(self.tokens):
                for workload, counts in self.counts.items():
                    for size in sizes:
                        cells = [(workload, tokens, step, size, name) for name in turned]
                        yield [Layer(*cell, self._ranks(cell, counts[step, i], gpu, dtypes)) for cell in cells]

    def _ranks(
        self, cell: tuple[str, int, int, int, str], counts: np.ndarray, gpu: Gpu, dtypes: Sequence[str]
    ) -> list[Rank]:
        """The ranks that may be the slowest, and one of the others."""
        _, _, _, ep_size, placement = cell
        rank_of_expert = self.placed[placement, ep_size]
        busiest = busiest_ranks(self.model, gpu, counts, rank_of_expert, dtypes)
        others = np.setdiff1d(np.arange(ep_size), busiest)
        chosen = [(rank, "busiest") for rank in busiest]
        if others.size:
            word = int(words(stream_key(self.seed, f"measured rank of {cell}"), PERMUTATION, 0, (1, 1))[0, 0])
            chosen.append((int(others[word * others.size >> 32]), "random"))
        return [Rank(rank, why, counts[rank_of_expert == rank]) for rank, why in chosen]


def rank_sums(counts: np.ndarray, rank_of_expert: np.ndarray) -> np.ndarray:
    """Sum over each rank's experts: counts [..., n_experts] to int64 [..., ranks]."""
    belongs = rank_of_expert[:, None] == np.arange(rank_of_expert.max() + 1)
    return counts.astype(np.int64) @ belongs.astype(np.int64)


def busiest_ranks(
    model: ModelSpec, gpu: Gpu, counts: np.ndarray, rank_of_expert: np.ndarray, dtypes: Sequence[str]
) -> list[int]:
    """Ranks that may be the slowest, ascending: with the longest predicted time (in each type), the largest load, and the
    most distinct experts; of equals, the one with more of the other.
    """
    loads = rank_sums(counts, rank_of_expert)
    distinct = rank_sums((counts > 0).astype(np.int32), rank_of_expert)
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
        Names for `place`; 'random' is one permutation for all steps.
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
    placed = {}
    for name in placements:
        for ep_size in ep_sizes:
            placement = place(name, model, ep_size, seed=seed)
            placed[placement.strategy, ep_size] = placement.rank_of_expert
    counts = {}
    for workload in workloads:
        check_pair(model, workload)
        drawn, _ = draw_trials(model, workload, seed, range(steps), steps, np.array(ascending), n_ids=0)
        counts[workload.name] = drawn
    return Steps(model, ascending, counts, placed, seed)
