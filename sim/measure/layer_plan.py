"""Who sends what to whom in one expert-parallel layer: planned in numpy, for the ranks that will do it for real.

Tokens sit evenly on the ranks, rank r with the r-th block of them. Each pair of a token goes to the slot of its expert
(of several copies, to the one that vLLM's hash of the token's index on its rank takes). A rank receives rows, computes its
pairs slot by slot, sums those of a token, and the token's own rank sums what comes back.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sim.copies import find_copies, slots_by_hash
from sim.cost.exchange import KINDS
from sim.cost.inputs import expert_width
from sim.cost.links import count_links
from sim.errors import InputError, unknown
from sim.measure.experts import DTYPES
from sim.measure.steps import plan_measurement, turned
from sim.model import ModelSpec
from sim.placement import Placement
from sim.router import draw_trials
from sim.traffic import SyntheticTraffic, Workload

EXCHANGES = tuple(kind for kind in KINDS if kind != "none")


@dataclass(frozen=True, eq=False)
class Routed:
    """Tokens of one step, with the slots that compute them; rank r holds the r-th block of slots."""

    slots: np.ndarray  # int64 [tokens, top_k], of each pair
    weights: np.ndarray  # float32 [tokens, top_k], what the router multiplies each pair's result by
    ep_size: int
    slots_per_rank: int

    @property
    def tokens_per_rank(self) -> int:
        """Tokens that sit on each rank."""
        return len(self.slots) // self.ep_size

    @cached_property
    def ranks(self) -> np.ndarray:
        """Rank that computes each pair, int64 [tokens, top_k]."""
        return self.slots // self.slots_per_rank

    @cached_property
    def needed(self) -> np.ndarray:
        """Whether a rank needs a token, bool [tokens, ranks]."""
        needed = np.zeros((len(self.slots), self.ep_size), bool)
        np.put_along_axis(needed, self.ranks, True, axis=1)
        return needed

    @cached_property
    def links(self) -> np.ndarray:
        """Tokens, and pairs, that each rank sends to each, int64 [2, ranks, ranks]."""
        links = np.zeros((2, self.ep_size, self.ep_size), np.int64)
        rank_of_slot = np.arange(self.ep_size).repeat(self.slots_per_rank)
        count_links(self.slots, rank_of_slot, np.arange(self.ep_size + 1) * self.tokens_per_rank, links)
        return links

    def own(self, rank: int) -> slice:
        """The tokens that sit on a rank."""
        return slice(rank * self.tokens_per_rank, (rank + 1) * self.tokens_per_rank)

    def load(self, rank: int) -> dict[str, int]:
        """Pairs and distinct experts (slots) that a rank computes, and received: the tokens that need it."""
        slots = self.slots[self.ranks == rank]
        return {"pairs": slots.size, "distinct": np.unique(slots).size, "received": int(self.needed[:, rank].sum())}


class RankPlan(NamedTuple):
    """One rank's part of a layer: `send` is empty where whole tensors are exchanged, `home` where the exchange itself sums."""

    send: np.ndarray  # int64 [sent], own token in each row that is sent, destination by destination
    send_splits: list[int]  # rows to each rank, in the dispatch; the combine returns them
    receive_splits: list[int]  # rows from each rank
    rows: np.ndarray  # int64 [pairs], received row of each pair, slot by slot
    ends: np.ndarray  # int32 [slots of the rank], where each slot's pairs end
    back: np.ndarray  # int32 [rows to return, n], pairs (-1: none) whose weighted sum each row that goes back is
    back_weights: np.ndarray  # float32
    home: np.ndarray  # int32 [own tokens, n], returned rows (-1: none) whose weighted sum each own token is
    home_weights: np.ndarray  # float32


def plan_rank(routed: Routed, exchange: str, rank: int) -> RankPlan:
    """Plan a rank's part of a layer under one of the EXCHANGES."""
    mine = routed.ranks == rank
    token, place = np.nonzero(mine)  # token by token, so source by source
    slots = routed.slots[mine] - rank * routed.slots_per_rank
    order = np.argsort(slots, kind="stable")
    ends = np.cumsum(np.bincount(slots, minlength=routed.slots_per_rank)).astype(np.int32)
    pair = np.empty(order.size, np.int32)  # of each of the rank's entries in `slots`, its place among the pairs
    pair[order] = np.arange(order.size, dtype=np.int32)
    nothing = np.empty((0, 0), np.int32), np.empty((0, 0), np.float32)
    if exchange == "pair":
        back = pair[:, None], np.ones((pair.size, 1), np.float32)
        sent, home = _own_pairs(routed, rank)
        return RankPlan(*sent, order, ends, *back, *home)
    of_token = np.full(routed.slots.shape, -1, np.int32)
    of_token[token, place] = pair
    weights = np.where(mine, routed.weights, np.float32(0))
    if exchange == "token":
        needed = routed.needed[:, rank]
        row_of_token = np.cumsum(needed) - 1
        back = of_token[needed], weights[needed]
        sent, home = _own_tokens(routed, rank)
        return RankPlan(*sent, row_of_token[token[order]], ends, *back, *home)
    return RankPlan(np.empty(0, np.int64), [], [], token[order], ends, of_token, weights, *nothing)


Sent = tuple[np.ndarray, list[int], list[int]]
Home = tuple[np.ndarray, np.ndarray]


def _own_pairs(routed: Routed, rank: int) -> tuple[Sent, Home]:
    """What a rank sends of its own tokens, a row a pair, and how the rows that return make them; as `RankPlan` has both."""
    ranks = routed.ranks[routed.own(rank)]
    order = np.argsort(ranks, axis=None, kind="stable")  # destination by destination
    home = np.empty(ranks.size, np.int32)
    home[order] = np.arange(ranks.size, dtype=np.int32)
    sent = order // ranks.shape[1], routed.links[1, rank].tolist(), routed.links[1, :, rank].tolist()
    return sent, (home.reshape(ranks.shape), routed.weights[routed.own(rank)])


def _own_tokens(routed: Routed, rank: int) -> tuple[Sent, Home]:
    """The same, a row a token and rank that needs it."""
    needed = routed.needed[routed.own(rank)].T
    send = np.ascontiguousarray(np.nonzero(needed)[1])  # destination by destination
    row = (np.cumsum(needed) - 1).reshape(needed.shape)
    home = np.where(needed, row, -1).T.astype(np.int32, order="C"), needed.T.astype(np.float32, order="C")
    return (send, routed.links[0, rank].tolist(), routed.links[0, :, rank].tolist()), home


class Cell(NamedTuple):
    """Layers that differ only in their placement and exchange, both in the order of measurement."""

    workload: str
    tokens: int
    step: int
    placements: list[str]
    exchanges: list[str]


@dataclass(frozen=True, eq=False)
class LayerSteps:
    """Sampled steps of whole layers; a step is an independent layer draw, whose tokens all placements share.

    `tokens` ascend: a shorter step is the beginning of a longer one. A placement is of all steps, or of each where it is fitted
    to other tokens of its layer. `dtype` is that of the weights, and of the tokens that are dispatched.
    """

    model: ModelSpec
    ep_size: int
    tokens: list[int]  # per step over the EP group
    ids: dict[str, np.ndarray]  # by workload, int16 [steps, most tokens, top_k]
    placed: dict[tuple[str, str], Placement]  # by workload and placement
    exchanges: list[str]
    weights: np.ndarray  # float32 [most tokens, top_k], of the router, the same in all steps
    seed: int
    dtype: str = "bf16"

    @property
    def n_steps(self) -> int:
        """Steps that were sampled."""
        return len(next(iter(self.ids.values())))

    @property
    def placements(self) -> list[str]:
        """Names of the placements."""
        return list(dict.fromkeys(name for _, name in self.placed))

    @property
    def slots_per_rank(self) -> int:
        """Slots of a rank under the placement that has the most."""
        return max(placed.n_slots for placed in self.placed.values()) // self.ep_size

    def routed(self, workload: str, placement: str, step: int, tokens: int) -> Routed:
        """The first tokens of a step, with their slots under a placement."""
        placed, ids = self.placed[workload, placement], self.ids[workload][step, :tokens]
        row = step % placed.n_rows
        copies = find_copies(placed.experts[row : row + 1], placed.n_experts)
        of_rank = np.ascontiguousarray(ids.reshape(self.ep_size, -1, ids.shape[1]))  # an index is that on its rank
        slots = np.empty(of_rank.shape, np.int32)
        slots_by_hash(of_rank, np.zeros(self.ep_size, np.int64), copies, slots)
        slots_per_rank = placed.n_slots // self.ep_size
        return Routed(slots.reshape(ids.shape).astype(np.int64), self.weights[:tokens], self.ep_size, slots_per_rank)

    def cells(self) -> Iterator[Cell]:
        """What is measured, in the order of `Measurement.compared`; the exchange that goes first changes, too."""
        for step in range(self.n_steps):
            placements, exchanges = (turned(names, step) for names in (self.placements, self.exchanges))
            for tokens in self.tokens:
                for workload in self.ids:
                    yield Cell(workload, tokens, step, placements, exchanges)


def sample_layers(
    model: ModelSpec,
    workloads: Sequence[Workload],
    *,
    ep_size: int,
    tokens: Sequence[int],
    placements: Sequence[str],
    exchanges: Sequence[str],
    steps: int,
    seed: int = 0,
    dtype: str = "bf16",
) -> LayerSteps:
    """Sample steps of each workload token by token, and place the experts; every step has a fresh layer.

    The tokens are those that `plan_measurement` counts under the same seed. Raises InputError.
    """
    if dtype not in DTYPES:
        raise unknown("--dtype", dtype, DTYPES)
    if dtype == "fp8" and (expert_width(model) % 16 or (model.moe_intermediate_size or 0) % 16):
        raise InputError(f"--dtype fp8: the widths of {model.name} must be multiples of 16")
    for name in exchanges:
        if name not in EXCHANGES:
            raise unknown("--exchange", name, EXCHANGES)
    if not exchanges:
        raise InputError("--exchange must name at least one")
    for workload in workloads:
        if not isinstance(workload, SyntheticTraffic):
            raise InputError(f"`workload` {workload.name}: a layer is measured under synthetic traffic")
    counted = plan_measurement(
        model, workloads, ep_sizes=[ep_size], tokens=tokens, placements=placements, steps=steps, seed=seed
    )
    for what, n in [(f"experts of {model.name}", model.n_experts), *(("`tokens`", n) for n in counted.tokens)]:
        if n % ep_size:
            raise InputError(f"`ep_sizes` {ep_size}: must divide the {what}, {n}")
    for (_, name, _), placed in counted.placed.items():
        if (placed.ranks != np.arange(placed.n_slots) // (placed.n_slots // ep_size)).any():
            raise InputError(f"`placements` {name}: all ranks must hold the same number of slots")
    most = counted.tokens[-1]
    ids = {
        workload.name: draw_trials(model, workload, seed, range(steps), steps, np.array(counted.tokens), n_ids=most)[1]
        for workload in workloads
    }
    weights = np.random.default_rng(seed).uniform(0.5, 1.5, (most, model.top_k)).astype(np.float32)
    return LayerSteps(
        model=model,
        ep_size=ep_size,
        tokens=counted.tokens,
        ids=ids,
        placed={(workload, name): placed for (workload, name, _), placed in counted.placed.items()},
        exchanges=list(dict.fromkeys(exchanges)),
        weights=weights / weights.sum(axis=1, keepdims=True),
        seed=seed,
        dtype=dtype,
    )
