"""Placements of the pairs of a sweep on some layer draws, laid out for the kernels."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sim.placement import Placement, is_load_aware, place_balanced, random_ranks
from sim.router import draw_loads
from sim.scoring import Copies, Layouts, assign_by_hash, assign_evenly, find_copies, lay_out, pick_slots
from sim.sweeps.plan import Plan
from sim.traffic import SyntheticTraffic


class Group(NamedTuple):
    """Pairs that are scored on the same counts: all without replicas on those of experts, others each on its slots'."""

    pairs: np.ndarray  # int64, their places in the grid
    layouts: Layouts
    rows: np.ndarray  # int64 [draws, pairs], the layout of each draw and pair
    copies: Copies | None  # of the layouts, where experts have replicas

    def deal(self, counts: np.ndarray, ids: np.ndarray, steps: np.ndarray, choice: str) -> np.ndarray:
        """Counts that the group is scored on, int32 [trials, steps, slots]: those of experts, or dealt to their copies.

        counts int32 [trials, steps, n_experts]; ids int16 [trials, tokens, top_k], all tokens for 'vllm_hash'.
        """
        if self.copies is None:
            return counts
        dealt = np.empty((*counts.shape[:2], self.layouts.ranks.shape[1]), np.int32)
        if choice == "vllm_hash":
            assign_by_hash(ids, steps, self.rows[:, 0], self.copies, dealt)
        else:
            assign_evenly(counts, self.rows[:, 0], self.copies, dealt)
        return dealt

    def slots_of_first(self, ids: np.ndarray, first_trial: int) -> np.ndarray:
        """Slots (without replicas: experts) that the first token of each trial goes to, int [trials, top_k]."""
        if self.copies is None:
            return ids[:, 0]
        slot = np.empty((len(ids), ids.shape[2]), np.int32)
        pick_slots(ids[:, 0], first_trial, self.rows[:, 0], self.copies, slot)
        return slot


def chunk_groups(plan: Plan, draws: range, pairs: Sequence[int]) -> list[Group]:
    """Groups of some pairs on some draws, the pairs in the order given."""
    loads = _loads(plan, draws) if any(is_load_aware(plan.grid.pairs[p][0]) for p in pairs) else None
    plain = [p for p in pairs if not plan.has_replicas[p]]
    groups = [_plain_group(plan, draws, plain, loads)] if plain else []
    return groups + [_replica_group(plan, draws, p, loads) for p in pairs if plan.has_replicas[p]]


def _loads(plan: Plan, draws: range) -> np.ndarray | None:
    """Loads that the draws' layouts are fitted on, float64 [draws, n_experts]; None where layers have their own (records)."""
    if not plan.fit_tokens:
        return None
    assert isinstance(plan.workload, SyntheticTraffic)
    return draw_loads(plan.model, plan.workload, plan.seed, draws, plan.fit_tokens)


def _slots(plan: Plan, draws: range, pair: int, loads: np.ndarray | None) -> tuple[Placement, np.ndarray]:
    """Placement of a pair on some draws, and which of their rows each draw has, int64 [draws]."""
    (name, ep_size), fixed = plan.grid.pairs[pair], plan.slots[pair]
    if fixed is not None:
        return fixed, np.arange(draws.start, draws.stop) % len(fixed.ranks)
    assert loads is not None
    return place_balanced(name, plan.model, ep_size, plan.ranks_per_node, loads), np.arange(len(draws))


def _plain_group(plan: Plan, draws: range, pairs: list[int], loads: np.ndarray | None) -> Group:
    rows = np.empty((len(draws), len(pairs)), np.int64)
    ranks: list[np.ndarray] = []
    sizes: list[int] = []
    for i, p in enumerate(pairs):
        name, ep_size = plan.grid.pairs[p]
        if name == "random":
            ranks.append(random_ranks(plan.model.n_experts, ep_size, plan.seed, draws.start, len(draws)))
            row = np.arange(len(draws))
        else:
            slots, row = _slots(plan, draws, p, loads)
            ranks.append(slots.expert_ranks)
        rows[:, i] = len(sizes) + row
        sizes += [ep_size] * len(ranks[-1])
    return Group(np.array(pairs), lay_out(np.concatenate(ranks), np.array(sizes)), rows, None)


def _replica_group(plan: Plan, draws: range, pair: int, loads: np.ndarray | None) -> Group:
    slots, row = _slots(plan, draws, pair, loads)
    layouts = lay_out(slots.ranks, np.full(len(slots.ranks), plan.grid.pairs[pair][1]))
    return Group(np.array([pair]), layouts, row[:, None], find_copies(slots.experts, plan.model.n_experts))
