"""Steps of layers, sampled and scored under placements: the one way from a plan to loads of ranks.

A trial is a stream of tokens through one layer; its step of T tokens, the first T of them, is a block. Tokens are routed once
for all cells. Placements are laid out for the kernels in groups: all pairs without replicas share the
counts of experts; each pair with replicas has the counts of its own slots, to which the tokens of an expert are assigned.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from sim.copies import Copies, assign_by_hash, assign_evenly, assign_in_step, find_copies, pick_slots, slots_by_hash
from sim.placement import (
    BUDGET,
    Placement,
    balance_budget,
    is_load_aware,
    most_slots,
    place_balanced,
    random_ranks,
    split_name,
)
from sim.router import draw_loads, draw_trials
from sim.scoring import Layouts, fan_out, lay_out, receivers, score_blocks, score_received
from sim.sweeps.plan import Plan


class Group(NamedTuple):
    """Pairs that are scored on the same counts: all without replicas on those of experts, others each on its slots'."""

    pairs: np.ndarray  # int64, their places in the grid
    layouts: Layouts
    rows: np.ndarray  # int64 [draws, pairs], the layout of each draw (or trial) and pair
    copies: Copies | None  # of the layouts, where experts have replicas
    placements: list[Placement]  # of each pair, of the rows that it has there

    def assign(
        self, counts: np.ndarray, choice: str = "even", ids: np.ndarray | None = None, tokens: np.ndarray | None = None
    ) -> np.ndarray:
        """Counts that the group is scored on, int32 [trials, steps, slots]: those of experts, or assigned to their copies.

        counts int32 [trials, steps, n_experts], a trial for each of the group's rows; ids int16 [trials, tokens, top_k], all
        tokens of the largest step for 'vllm_hash'; tokens int64 [steps].
        """
        if self.copies is None:
            return counts
        row_of_trial, ranks = self.rows[:, 0], self.layouts.ranks
        assigned = np.zeros((*counts.shape[:2], ranks.shape[1]), np.int32)
        if choice == "vllm_hash":
            assign_by_hash(ids, tokens, row_of_trial, self.copies, assigned)
        elif choice == "in_step":
            assign_in_step(counts, row_of_trial, self.copies, ranks, self.placements[0].ep_size, assigned)
        else:
            assign_evenly(counts, row_of_trial, self.copies, assigned)
        return assigned

    def slots_of_all(self, ids: np.ndarray) -> np.ndarray:
        """Slots (without replicas: experts) that the tokens of each trial go to, by vLLM's hash, int [trials, tokens, top_k]."""
        if self.copies is None:
            return ids
        slot = np.empty(ids.shape, np.int16)
        slots_by_hash(ids, self.rows[:, 0], self.copies, slot)
        return slot

    def slots_of_first(self, ids: np.ndarray, trials: np.ndarray) -> np.ndarray:
        """Slots (without replicas: experts) that the first token of each trial goes to, int [trials, top_k]."""
        if self.copies is None:
            return ids[:, 0].copy()  # contiguous whatever the number of trials: kernels are compiled once
        slot = np.empty((len(ids), ids.shape[2]), np.int16)
        pick_slots(ids[:, 0], trials, self.rows[:, 0], self.copies, slot)
        return slot


def place_pairs(plan: Plan, draws: range, pairs: Sequence[int]) -> list[Group]:
    """Groups of some pairs of the grid on some layer draws, the pairs in the order given."""
    drawn = [p for p in pairs if plan.placements[p] is None]
    loads = None
    if any(is_load_aware(plan.grid.pairs[p][0]) for p in drawn):
        loads = draw_loads(plan.model, plan.synthetic, plan.seed, draws, plan.fit_tokens)
    plain = [p for p in pairs if not plan.has_replicas[p]]
    groups = [_plain_group(plan, draws, plain, loads)] if plain else []
    return groups + [_replica_group(plan, draws, p, loads) for p in pairs if plan.has_replicas[p]]


def _placement_of_draws(plan: Plan, draws: range, pair: int, loads: np.ndarray | None) -> tuple[Placement, np.ndarray]:
    """Placement of a pair on some draws, and which of its rows each draw has, int64 [draws]."""
    (name, ep_size), fixed = plan.grid.pairs[pair], plan.placements[pair]
    if fixed is not None:
        return fixed, np.arange(draws.start, draws.stop) % fixed.n_rows
    if name == "random":
        ranks = random_ranks(plan.model.n_experts, ep_size, plan.seed, draws.start, len(draws))
        return Placement.of_ranks(name, ep_size, ranks), np.arange(len(draws))
    if split_name(name)[0] == BUDGET:
        n_layers = plan.n_layers
        deployments = range(draws.start // n_layers, -(-draws.stop // n_layers))
        experts = np.concatenate([_budget_of_deployment(plan, pair, deployment) for deployment in deployments])
        rows = draws.start % n_layers + np.arange(len(draws))
        return Placement.of_slots(name, ep_size, plan.model.n_experts, experts), rows
    assert loads is not None
    return place_balanced(name, plan.model, ep_size, plan.ranks_per_node, loads), np.arange(len(draws))


@lru_cache(maxsize=64)  # chunks of draws ask for the same deployments
def _budget_of_deployment(plan: Plan, pair: int, deployment: int) -> np.ndarray:
    """Expert of each slot of the layers of a deployment, int16 [layers, slots]: so many draws in a row as there are layers."""
    (name, ep_size), n_layers, n_experts = plan.grid.pairs[pair], plan.n_layers, plan.model.n_experts
    draws = range(deployment * n_layers, (deployment + 1) * n_layers)
    loads = draw_loads(plan.model, plan.synthetic, plan.seed, draws, plan.fit_tokens)
    per_rank = most_slots(name, n_experts, ep_size) // ep_size  # the same for all deployments
    return balance_budget(
        loads, plan.model, ep_size, plan.ranks_per_node, split_name(name)[1], plan.layer_cost, per_rank
    )


def _plain_group(plan: Plan, draws: range, pairs: list[int], loads: np.ndarray | None) -> Group:
    rows = np.empty((len(draws), len(pairs)), np.int64)
    sizes: list[int] = []
    placements: list[Placement] = []
    for i, pair in enumerate(pairs):
        placement, row = _placement_of_draws(plan, draws, pair, loads)
        rows[:, i] = len(sizes) + row
        placements.append(placement)
        sizes += [placement.ep_size] * placement.n_rows
    ranks = np.concatenate([placement.expert_ranks for placement in placements])
    return Group(np.array(pairs), lay_out(ranks, np.array(sizes)), rows, None, placements)


def _replica_group(plan: Plan, draws: range, pair: int, loads: np.ndarray | None) -> Group:
    placement, row = _placement_of_draws(plan, draws, pair, loads)
    layouts = lay_out(placement.ranks, np.full(placement.n_rows, placement.ep_size), placement.experts >= 0)
    copies = find_copies(placement.experts, plan.model.n_experts)
    return Group(np.array([pair]), layouts, row[:, None], copies, [placement])


class Blocks(NamedTuple):
    """Steps of some trials on the slots of a group: the leading arguments of `score_blocks` and of kernels like it."""

    counts: np.ndarray  # int32 [trials, steps, slots]
    cells: np.ndarray  # int64, those of the group, as places among the scorer's
    step_of_cell: np.ndarray  # int64 [cells of the scorer]
    pair_of_cell: np.ndarray  # int64 [cells of the scorer], as places in the group
    layout_of_pair: np.ndarray  # int64 [trials, pairs of the group]
    layouts: Layouts


class Scored(NamedTuple):
    """What was seen in some trials."""

    counts: np.ndarray  # int32 [trials, steps, n_experts], tokens that take each expert
    scores: np.ndarray  # int32 [trials, cells of the scorer, metrics of the grid]
    reached: np.ndarray  # int64 [trials, pairs of the grid, 2], ranks and nodes that the first token is sent to
    received: np.ndarray  # int64 [trials, cells of the scorer, 2 or 0], tokens that all ranks, and nodes, receive


class StepScorer:
    """Samples steps and scores them under some cells of a plan, int64, ascending, as `tokens` per step of theirs then are.

    `groups` are those of `place_pairs` of the cells' pairs, on consecutive draws; trial t belongs to layer draw t % n_draws.
    """

    def __init__(self, plan: Plan, cells: np.ndarray, groups: list[Group], n_draws: int) -> None:
        grid = plan.grid
        self.plan, self.cells, self.groups, self.n_draws = plan, cells, groups, n_draws
        self.tokens, self.step_of_cell = np.unique(grid.tokens_of_cell[cells], return_inverse=True)
        self.pair_of_cell = grid.pair_of_cell[cells]
        all_tokens = grid.received or (plan.replica_choice == "vllm_hash" and any(group.copies for group in groups))
        self._n_ids = int(self.tokens[-1]) if all_tokens else 1

    def score(self, trials: Any, also: Callable[[Group, Blocks, np.ndarray], None] | None = None) -> Scored:
        """Sample and score trials (a range or int64): the first of the groups' first draw, the others of any.

        `also(group, blocks, counts)` is called for each group besides, with the counts of experts, for what else is to be
        learned from the same blocks.
        """
        plan, trials = self.plan, np.asarray(trials, np.int64)
        counts, ids = draw_trials(plan.model, plan.workload, plan.seed, trials, self.n_draws, self.tokens, self._n_ids)
        scores = np.empty((len(trials), len(self.cells), len(plan.grid.metrics)), np.int32)
        received = np.zeros((len(trials), len(self.cells), 2 if plan.grid.received else 0), np.int64)
        reached = np.zeros((len(trials), len(plan.grid.pairs), 2), np.int64)
        draw = (trials - trials[0]) % self.n_draws
        for of_draws in self.groups:
            group = of_draws._replace(rows=of_draws.rows[draw])
            cells = np.flatnonzero(np.isin(self.pair_of_cell, group.pairs))
            of_group = np.searchsorted(group.pairs, self.pair_of_cell)  # of other groups' cells: not looked at
            assigned = group.assign(counts, plan.replica_choice, ids, self.tokens)
            blocks = Blocks(assigned, cells, self.step_of_cell, of_group, group.rows, group.layouts)
            score_blocks(*blocks, scores)
            first = group.slots_of_first(ids, trials)
            fan_out(first, group.pairs, group.rows, group.layouts, plan.ranks_per_node, reached)
            if plan.grid.received:
                sizes = np.array([plan.grid.pairs[p][1] for p in group.pairs])
                to = receivers(sizes, plan.ranks_per_node)
                score_received(group.slots_of_all(ids), self.tokens, *blocks[1:], to, scores, received)
            if also is not None:
                also(group, blocks, counts)
        return Scored(counts, scores, reached, received)
