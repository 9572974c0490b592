"""Counts and tokens under placements: loads of ranks, and what they are summed up by. One block = one step of one MoE layer.

load of a rank
    (token, expert) pairs that it computes.
max load
    The largest load over ranks: the layer is a barrier, so it sets the layer's time.
imbalance
    max load / mean load, at least 1 (Megatron-LM: overload factor; TensorRT-LLM's spread is imbalance - 1).
balancedness
    mean load / max load, of one layer (vLLM and SGLang; over layers the two differ).
idle ranks
    Ranks of load 0.
one-rank event
    All of a step's load on one rank: all other ranks idle.
distinct experts
    Experts of a rank with at least one token: weights that it must read. On the busiest rank (the lowest of equals),
    and the most over ranks.
fan-out
    Distinct ranks (nodes) that one token is sent to; a node is a run of `ranks_per_node` ranks joined by NVLink.
received tokens
    Distinct tokens of a step with at least one expert on a rank (node), those that already sit there included: what arrives
    where a kernel sends a token once to each rank, and what its buffers hold.

Which copy of an expert pairs go to is told in `sim.copies`.
"""

from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from sim.copies import assign_evenly, assign_in_step, find_copies, hashed, slot_by_hash
from sim.errors import InputError, shown, unknown, whole_number
from sim.kernels import kernel
from sim.placement import Placement

METRICS = ("max_load", "idle_ranks", "distinct_experts_busiest", "distinct_experts_max")
RECEIVED = ("received_tokens_max", "received_node_tokens_max")
"""Of the rank, and of the node, that receives the most tokens: further metrics of a block, where all its tokens are looked at."""
_MOST_COUNT = 2**53  # pairs of an expert in a block


class Layouts(NamedTuple):
    """Placements laid out for the kernels, one row each."""

    ranks: np.ndarray  # int32 [layouts, n_experts], the rank of each expert
    experts: np.ndarray  # int16 [layouts, n_experts], the experts rank by rank
    bounds: np.ndarray  # int32 [layouts, most ranks + 2]: EP size, begin of each rank in `experts`, end of the last


def lay_out(ranks: np.ndarray, ep_sizes: np.ndarray, is_there: np.ndarray | None = None) -> Layouts:
    """Layouts of `ranks` int32 [layouts, n_experts] on `ep_sizes` int64 [layouts] ranks; with replicas of slots in the place of
    experts, those that are there, bool [layouts, slots].
    """
    experts = np.empty(ranks.shape, np.int16)
    bounds = np.zeros((len(ranks), int(ep_sizes.max()) + 2), np.int32)
    _fill_layouts(ranks, np.ones(ranks.shape, np.bool_) if is_there is None else is_there, ep_sizes, experts, bounds)
    return Layouts(ranks, experts, bounds)


@kernel
def _fill_layouts(ranks, is_there, ep_sizes, experts, bounds):
    for row in range(ranks.shape[0]):
        rank, begin = ranks[row], bounds[row]
        begin[0] = ep_sizes[row]
        for e in range(rank.size):
            begin[2 + rank[e]] += is_there[row, e]
        for r in range(ep_sizes[row]):
            begin[2 + r] += begin[1 + r]
        free = begin[1:].copy()
        for e in range(rank.size):
            if is_there[row, e]:
                experts[row, free[rank[e]]] = e
                free[rank[e]] += 1


# Rows of numbers, one of each step: the METRICS in their order, then load and distinct experts of the rank at hand; after them
# the tokens of each expert. All lie in one array, at constant places: so loops over steps become vectors.
_STEPS = 64
_BUSIEST, _IDLE, _DISTINCT_BUSIEST, _DISTINCT_MAX, _LOAD, _DISTINCT, _COUNTS = (row * _STEPS for row in range(7))


@kernel
def score_blocks(counts, cells, step_of_cell, pair_of_cell, layout_of_pair, layouts, scores):
    """Score each block under some cells: pairs (placement, EP size) at one number of tokens per step.

    counts int32 [trials, steps, n_experts]; cells int64, those to score, quickest with those of a pair in a row; step_of_cell,
    pair_of_cell int64 [all cells]; layout_of_pair int64 [trials, pairs]; scores int32 [trials, all cells, 4], the METRICS.
    """
    n_trials, n_steps, n_experts = counts.shape
    for first in range(0, n_steps, _STEPS):
        n = min(_STEPS, n_steps - first)
        width = (n + 15) // 16 * 16  # whole vectors
        rows = np.zeros(_COUNTS + n_experts * width, np.int32)
        for t in range(n_trials):
            for step in range(n):
                for e in range(n_experts):
                    rows[_COUNTS + e * width + step] = counts[t, first + step, e]
            scored = -1
            for c in cells:
                pair, step = pair_of_cell[c], step_of_cell[c] - first
                if 0 <= step < n:
                    if pair != scored:
                        layout, scored = layout_of_pair[t, pair], pair
                        _score_steps(layouts.experts[layout], layouts.bounds[layout], width, rows)
                    for metric in range(4):
                        scores[t, c, metric] = rows[metric * _STEPS + step]


@kernel
def _score_steps(experts, begin, width, rows):
    """Score the steps of a trial under one layout: experts int16 [n_experts], begin int32, as in `Layouts`."""
    for i in range(width):
        rows[_BUSIEST + i] = rows[_IDLE + i] = rows[_DISTINCT_BUSIEST + i] = rows[_DISTINCT_MAX + i] = 0
    for r in range(begin[0]):
        for i in range(width):
            rows[_LOAD + i] = rows[_DISTINCT + i] = 0
        for slot in range(begin[1 + r], begin[2 + r]):
            at = _COUNTS + np.uint16(experts[slot]) * width
            for i in range(width):
                pairs = rows[np.uint64(at + i)]  # unsigned, which spares the test for a negative index
                rows[_LOAD + i] += pairs
                rows[_DISTINCT + i] += pairs > 0
        for i in range(width):
            load, distinct = rows[_LOAD + i], rows[_DISTINCT + i]
            rows[_IDLE + i] += load == 0
            rows[_DISTINCT_MAX + i] = max(rows[_DISTINCT_MAX + i], distinct)
            rows[_DISTINCT_BUSIEST + i] = distinct if load > rows[_BUSIEST + i] else rows[_DISTINCT_BUSIEST + i]
            rows[_BUSIEST + i] = max(rows[_BUSIEST + i], load)


@kernel
def rank_loads(counts, step_of_pair, layout_of_pair, layouts, first_rank, loads):
    """Load of each rank of each pair at one of the steps: counts int32 [trials, steps, n_experts]; first_rank int64
    [pairs], where a pair's ranks begin in loads int64 [trials, ranks of all pairs], to which is added.
    """
    for t in range(counts.shape[0]):
        for p in range(first_rank.size):
            rank, count = layouts.ranks[layout_of_pair[t, p]], counts[t, step_of_pair[p]]
            for e in range(rank.size):
                loads[t, first_rank[p] + rank[e]] += count[e]


@kernel
def fan_out(ids, pairs, layout_of_pair, layouts, ranks_per_node, reached):
    """Ranks and nodes that one token per trial is sent to: ids int16 [trials, top_k]; pairs int64, their places in reached
    int64 [trials, all pairs, 2].
    """
    for t in range(ids.shape[0]):
        for p in range(layout_of_pair.shape[1]):
            rank = layouts.ranks[layout_of_pair[t, p]]
            n_ranks, n_nodes = 0, 0
            for k in range(ids.shape[1]):
                new_rank, new_node = 1, 1
                mine = rank[np.uint16(ids[t, k])]
                for j in range(k):
                    theirs = rank[np.uint16(ids[t, j])]
                    if theirs == mine:
                        new_rank = 0
                    if theirs // ranks_per_node == mine // ranks_per_node:
                        new_node = 0
                n_ranks += new_rank
                n_nodes += new_node
            reached[t, pairs[p], 0] = n_ranks
            reached[t, pairs[p], 1] = n_nodes


class Receivers(NamedTuple):
    """Ranks and nodes of all pairs (placement, EP size)."""

    first_rank: np.ndarray  # int64 [pairs + 1], where a pair's ranks begin, and the end of all
    first_node: np.ndarray  # int64 [pairs + 1], where a pair's nodes begin among the nodes, and the end of all
    ranks_per_node: int


def receivers(ep_sizes: np.ndarray, ranks_per_node: int) -> Receivers:
    """Receivers of pairs on `ep_sizes` int64 [pairs] ranks."""
    first_rank, first_node = (np.concatenate([[0], np.cumsum(n)]) for n in (ep_sizes, -(-ep_sizes // ranks_per_node)))
    return Receivers(first_rank, first_node, ranks_per_node)


def count_received(
    ids: np.ndarray, steps: np.ndarray, layout_of_pair: np.ndarray, layouts: Layouts, to: Receivers
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens that each rank, and each node, of all pairs receives in each step, int32 [trials, steps, ranks or nodes].

    ids int16 [trials, tokens, top_k], experts or slots of the tokens of the largest step, of which smaller ones are the first;
    steps int64, ascending; layout_of_pair int64 [trials, pairs].
    """
    received = np.zeros((len(ids), len(steps), int(to.first_rank[-1])), np.int32)
    by_nodes = np.zeros((len(ids), len(steps), int(to.first_node[-1])), np.int32)
    _count_trials(ids, steps, layout_of_pair, layouts, to, received, by_nodes)
    return received, by_nodes


@kernel
def _count_trials(ids, steps, layout_of_pair, layouts, to, received, by_nodes):
    rows = np.empty(_EXPERTS + layouts.ranks.shape[1] * _ROW, np.uint64)
    for t in range(ids.shape[0]):
        _count_trial(ids[t], steps, layout_of_pair[t], layouts, to, rows, received[t], by_nodes[t])


@kernel
def score_received(ids, steps, cells, step_of_cell, pair_of_cell, layout_of_pair, layouts, to, scores, received):
    """Of some cells the most tokens that a rank, and a node, receives, and the sum over all ranks, and nodes.

    ids, steps as in `count_received`; cells, step_of_cell, pair_of_cell, layout_of_pair as in `score_blocks`; scores int32
    [trials, all cells, METRICS and RECEIVED]; received int64 [trials, all cells, 2].
    """
    rows = np.empty(_EXPERTS + layouts.ranks.shape[1] * _ROW, np.uint64)
    of_ranks = np.empty((steps.size, to.first_rank[-1]), np.int32)
    of_nodes = np.empty((steps.size, to.first_node[-1]), np.int32)
    for t in range(ids.shape[0]):
        of_ranks[:], of_nodes[:] = 0, 0
        _count_trial(ids[t], steps, layout_of_pair[t], layouts, to, rows, of_ranks, of_nodes)
        for c in cells:
            for i, (tokens, first) in enumerate(((of_ranks, to.first_rank), (of_nodes, to.first_node))):
                of_cell = tokens[step_of_cell[c], first[pair_of_cell[c]] : first[pair_of_cell[c] + 1]]
                most, total = np.int32(0), 0
                for r in range(of_cell.size):
                    most = max(most, of_cell[r])
                    total += of_cell[r]
                scores[t, c, len(METRICS) + i] = most
                received[t, c, i] = total


# Rows of words, at constant places of one array: the tokens of the rank and of the node at hand, then those of each expert.
_WORDS, _ROW = 64, 72
_RANK, _NODE, _EXPERTS = (row * _ROW for row in range(3))


@intrinsic
def _count_ones(typing_context, word):
    """Bits of a uint64 that are on."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(*arguments)

    return types.uint64(types.uint64), generate


@kernel
def _count_trial(ids, steps, layout_of_pair, layouts, to, rows, received, by_nodes):
    """Of one trial, added to received and by_nodes; every rank has an expert. An expert has a row of bits, one for each token, on
    where the token takes it. The union of a rank's rows are the tokens that it receives, that of its ranks' those of a node; bits
    are joined, and counted, by words of 64 tokens.
    """
    n_experts = layouts.ranks.shape[1]
    of_experts = np.zeros((steps.size, n_experts), np.int32)
    ends, masks = np.empty(steps.size, np.int64), np.empty(steps.size, np.uint64)
    for start in range(0, steps[-1], 64 * _WORDS):
        n = min(_WORDS, (steps[-1] - start + 63) // 64)
        first = np.searchsorted(steps, start + 1)  # steps before it have ended
        for step in range(first, steps.size):  # words that it fills, and of the next one the tokens that are left
            ends[step], left = min(n, (steps[step] - start) // 64), np.uint64(steps[step] % 64)
            masks[step] = (np.uint64(ends[step] < n) << left) - np.uint64(ends[step] < n)
        rows[:] = 0
        for token in range(start, min(start + 64 * n, steps[-1])):
            w, bit = np.uint64(token - start) // np.uint64(64), np.uint64(1) << np.uint64(token % 64)
            for k in range(ids.shape[1]):
                rows[_row_of(ids[np.uint64(token), k]) + w] |= bit
        for e in range(n_experts):
            _add_ones(rows, _row_of(e), first, ends, masks, e, of_experts)
        for p in range(layout_of_pair.size):
            experts, begin = layouts.experts[layout_of_pair[p]], layouts.bounds[layout_of_pair[p]]
            for node in range(to.first_node[p + 1] - to.first_node[p]):
                for w in range(n):
                    rows[_NODE + w] = 0
                for r in range(node * to.ranks_per_node, min((node + 1) * to.ranks_per_node, begin[0])):
                    i, e, row = to.first_rank[p] + r, np.uint16(experts[begin[1 + r]]), _row_of(experts[begin[1 + r]])
                    if begin[2 + r] - begin[1 + r] == 1:  # it receives what its expert takes
                        for step in range(first, steps.size):
                            received[step, i] = of_experts[step, e]
                    else:
                        row = np.uint64(_RANK)
                        _join_rows(experts, begin[1 + r], begin[2 + r], n, rows)
                        _add_ones(rows, row, first, ends, masks, i, received)
                    for w in range(n):
                        rows[_NODE + w] |= rows[row + np.uint64(w)]
                _add_ones(rows, np.uint64(_NODE), first, ends, masks, to.first_node[p] + node, by_nodes)


@kernel(forceinline=True)
def _row_of(expert):
    """Place of the row of an expert or slot, int16; unsigned, too."""
    return np.uint64(_EXPERTS) + np.uint64(_ROW) * np.uint64(np.uint16(expert))


@kernel(forceinline=True)
def _join_rows(experts, begin, end, n, rows):
    """The union of the rows of some experts, four at a time."""
    for w in range(n):
        rows[_RANK + w] = 0
    for i in range(begin, end, 4):
        a, b = _row_of(experts[i]), _row_of(experts[min(i + 1, end - 1)])
        c, d = _row_of(experts[min(i + 2, end - 1)]), _row_of(experts[min(i + 3, end - 1)])
        for w in range(n):
            w = np.uint64(w)
            rows[_RANK + w] |= rows[a + w] | rows[b + w] | rows[c + w] | rows[d + w]


@kernel(forceinline=True)
def _add_ones(rows, row, first, ends, masks, i, tokens):
    """Add the ones of a row, up to the end of each step from `first` on, to column i of tokens int32 [steps, columns]."""
    ones, begin = np.uint64(tokens[-1, i]), 0  # so far the last step has all
    for step in range(first, ends.size):
        for w in range(begin, ends[step]):
            ones += _count_ones(rows[row + np.uint64(w)])
        begin = ends[step]
        tokens[step, i] = ones + _count_ones(rows[row + np.uint64(begin)] & masks[step])


class Score(NamedTuple):
    """What the counts of blocks decide; `...` are the leading axes of the counts."""

    loads: np.ndarray  # int64 [..., ranks], pairs
    max_load: np.ndarray  # int64 [...]
    mean_load: np.ndarray  # float64 [...]
    imbalance: np.ndarray  # float64 [...], max / mean; NaN without tokens
    balancedness: np.ndarray  # float64 [...], mean / max; NaN without tokens
    idle_ranks: np.ndarray  # int64 [...]
    distinct_experts: np.ndarray  # int64 [..., ranks], with replicas slots
    distinct_experts_busiest: np.ndarray  # int64 [...], on the rank of the largest load, the lowest of equals
    distinct_experts_max: np.ndarray  # int64 [...]


class TokenScore(NamedTuple):
    """What single tokens decide; `...` is [layers] for ids of several layers."""

    loads: np.ndarray  # int64 [..., ranks], pairs
    received_tokens: np.ndarray  # int64 [..., ranks], distinct tokens with at least one expert there
    received_node_tokens: np.ndarray  # int64 [..., nodes]
    ranks_per_token: np.ndarray  # int64 [..., tokens], distinct ranks that a token is sent to
    nodes_per_token: np.ndarray  # int64 [..., tokens]


def score(placement: Placement, counts: Any, replica_choice: str = "even") -> Score:
    """Loads of ranks, and the metrics that they give, of counts of experts under a placement.

    Parameters
    ----------
    placement : Placement
    counts : int [..., n_experts]
        Tokens of each expert, in any number of blocks; [..., layers, n_experts] where the placement has a row for each of
        several layers.
    replica_choice : str
        Where experts have replicas: 'even', each expert's count is split evenly over its copies, the first taking the
        remainder; or 'in_step', so that the busiest rank of each block has as little as any split gives it (`sim.copies`).

    Returns
    -------
    Score

    Raises
    ------
    InputError
        No Placement, or counts that are no whole numbers from 0 to 2**53 or not of this shape.

    Examples
    --------
    >>> from sim import place, score
    >>> result = score(place("linear", "mixtral-8x7b", 4), [[3, 1, 0, 0, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]])
    >>> result.loads.tolist(), result.imbalance.tolist(), result.idle_ranks.tolist()
    ([[4, 0, 4, 0], [2, 2, 2, 2]], [2.0, 1.0], [2, 0])

    Copies leave room for a better split than an even one:

    >>> copied = place("eplb", "mixtral-8x7b", 4, loads=[3, 1, 1, 1, 1, 1, 1, 1], redundant=4)
    >>> [score(copied, [0, 8, 0, 8, 4, 0, 0, 0], choice).max_load.item() for choice in ("even", "in_step")]
    [12, 8]
    """
    placement, table = _checked(placement), _whole_numbers("`counts`", counts, _MOST_COUNT)
    rows, n_experts, known = placement.n_rows, placement.n_experts, ("even", "in_step")
    if replica_choice not in known:
        raise unknown("`replica_choice`", shown(replica_choice), known, "; vllm_hash needs tokens (score_tokens)")
    if table.ndim < 1 + (rows > 1) or table.shape[-1] != n_experts or (rows > 1 and table.shape[-2] != rows):
        wanted = f"[..., {rows}, {n_experts}]" if rows > 1 else f"[..., {n_experts}]"
        raise InputError(f"`counts` must have shape {wanted} under {placement.strategy}, not {list(table.shape)}")
    counts_type = np.int32 if table.max(initial=0) < 2**31 else np.int64  # as in sweeps, whose kernels may be there
    blocks = np.ascontiguousarray(table.reshape(-1, n_experts), counts_type)
    loads = np.zeros((len(blocks), placement.ep_size), np.int64)
    distinct = np.zeros_like(loads)
    assigned = np.zeros((len(blocks), 1, placement.n_slots), counts_type)
    copies, row_of_block = find_copies(placement.experts, n_experts), np.arange(len(blocks)) % rows
    if replica_choice == "in_step":
        assign_in_step(blocks[:, None], row_of_block, copies, placement.ranks, placement.ep_size, assigned)
    else:
        assign_evenly(blocks[:, None], row_of_block, copies, assigned)
    _add_loads(assigned[:, 0], placement.ranks, loads, distinct)
    busiest = np.take_along_axis(distinct, loads.argmax(axis=1)[:, None], axis=1)[:, 0]
    most, mean = loads.max(axis=1), loads.mean(axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 without tokens
        ratios = most / mean, mean / most
    found = (loads, most, mean, *ratios, (loads == 0).sum(axis=1), distinct, busiest, distinct.max(axis=1))
    return Score(*(array.reshape(table.shape[:-1] + array.shape[1:]) for array in found))


def score_tokens(placement: Placement, ids: Any, ranks_per_node: int = 8) -> TokenScore:
    """Tokens that ranks and nodes receive, and how far each token is spread, of one step's routing under a placement.

    Parameters
    ----------
    placement : Placement
    ids : int [tokens, top_k]
        Experts of each token; [layers, tokens, top_k] for several layers, which a placement with a row per layer needs.
        Replicas: the copy that vLLM's hash of the token's index takes.
    ranks_per_node : int
        A node is a run of so many ranks; the last may have fewer.

    Returns
    -------
    TokenScore

    Raises
    ------
    InputError
        No Placement, or ids that are no experts of it or not of this shape.

    Examples
    --------
    >>> from sim import place, score_tokens
    >>> result = score_tokens(place("linear", "mixtral-8x7b", 4), [[0, 1], [1, 2], [6, 0]], ranks_per_node=2)
    >>> result.received_tokens.tolist(), result.received_node_tokens.tolist(), result.ranks_per_token.tolist()
    ([3, 1, 0, 1], [3, 1], [1, 2, 2])
    """
    placement = _checked(placement)
    table = _whole_numbers("`ids`", ids, placement.n_experts - 1)
    per_node, rows = whole_number("`ranks_per_node`", ranks_per_node, 1, 2**15), placement.n_rows
    if table.ndim not in ((2, 3) if rows == 1 else (3,)) or (rows > 1 and len(table) != rows):
        wanted = "[tokens, top_k]" if rows == 1 else f"[{rows}, tokens, top_k]"
        raise InputError(f"`ids` must have shape {wanted} under {placement.strategy}, not {list(table.shape)}")
    layers = np.ascontiguousarray(table if table.ndim == 3 else table[None], np.int64)
    n_nodes, n_layers, n_tokens = -(-placement.ep_size // per_node), *layers.shape[:2]
    loads = np.zeros((n_layers, placement.ep_size), np.int64)
    received, of_node = np.zeros_like(loads), np.zeros((n_layers, n_nodes), np.int64)
    spread = np.zeros((2, n_layers, n_tokens), np.int64)
    copies = find_copies(placement.experts, placement.n_experts)
    _add_tokens(layers, placement.ranks, copies, per_node, loads, received, of_node, spread)
    found = TokenScore(loads, received, of_node, spread[0], spread[1])
    return found if table.ndim == 3 else TokenScore(*(array[0] for array in found))


def _checked(placement: Any) -> Placement:
    """The placement, or an error for anything else."""
    if not isinstance(placement, Placement):
        raise InputError(f"`placement` {shown(placement)}: must be a Placement, as sim.place gives it")
    return placement


def _whole_numbers(what: str, values: Any, most: int) -> np.ndarray:
    """Values as an array of integers from 0 to `most`, or an error."""
    try:
        table = np.asarray(values)
    except ValueError:  # rows of different lengths
        table = np.empty(0, object)
    if table.dtype.kind not in "iu":
        raise InputError(f"{what} must be an array of whole numbers, not {shown(values)}")
    if table.size and (table.min() < 0 or table.max() > most):
        bad = table.min() if table.min() < 0 else table.max()
        raise InputError(f"{what} must lie from 0 to {most}, not {bad}")
    return table


@kernel
def _add_loads(assigned, ranks, loads, distinct):
    """Loads and distinct slots of each rank, int64 [blocks, ranks]: assigned int32 or int64 [blocks, slots]; ranks int32
    [rows, slots]; block b lies under row b % rows.
    """
    for b in range(assigned.shape[0]):
        rank = ranks[b % ranks.shape[0]]
        for s in range(rank.size):
            loads[b, rank[s]] += assigned[b, s]
            distinct[b, rank[s]] += assigned[b, s] > 0


@kernel
def _add_tokens(ids, ranks, copies, ranks_per_node, loads, received, of_node, spread):
    """Pairs and tokens of each rank, int64 [layers, ranks], tokens of each node, int64 [layers, nodes], and ranks and nodes of
    each token, int64 [2, layers, tokens]: ids int64 [layers, tokens, top_k]; ranks int32 [rows, slots].
    """
    for layer in range(ids.shape[0]):
        row = layer % ranks.shape[0]
        rank, slots, first = ranks[row], copies.slots[row], copies.first[row]
        last_of_rank = np.full(received.shape[1], -1)  # the last token that each rank and node received
        last_of_node = np.full(of_node.shape[1], -1)
        for t in range(ids.shape[1]):
            word = hashed(t)
            for k in range(ids.shape[2]):
                r = rank[slot_by_hash(word, ids[layer, t, k], slots, first)]
                loads[layer, r] += 1
                if last_of_rank[r] != t:
                    last_of_rank[r] = t
                    received[layer, r] += 1
                    spread[0, layer, t] += 1
                if last_of_node[r // ranks_per_node] != t:
                    last_of_node[r // ranks_per_node] = t
                    of_node[layer, r // ranks_per_node] += 1
                    spread[1, layer, t] += 1
