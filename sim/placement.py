"""Which rank holds which expert: the static rules of serving engines, random and node-aware placement, and files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown, unknown, whole_number
from sim.files import read_json
from sim.model import ModelSpec
from sim.streams import PERMUTATION, stream_key, words

STRATEGIES = {
    "linear": "contiguous blocks, the remainder spread over the first ranks (vLLM 0.33)",
    "linear_legacy": "contiguous blocks, the whole remainder on the last rank (vLLM 0.8.2, what PR #15517 set out to change)",
    "round_robin": "expert e on rank e % ep_size (vLLM); alias group_aware",
    "random": "one random permutation per layer draw, keyed by the seed, dealt in blocks like linear",
    "node_aware": "each node holds linear's block, dealt round robin over the node's ranks",
    "file:PATH": "JSON with the rank of each expert: one row, or one per layer (layer draws take the rows in turn)",
}
ALIASES = {"group_aware": "round_robin"}


@dataclass(frozen=True, eq=False)
class Placement:
    """Experts of one layer on ranks; without replicas a slot is an expert.

    Attributes
    ----------
    strategy : str
    ep_size : int
    rank_of_expert : int32 [n_experts]
    """

    strategy: str
    ep_size: int
    rank_of_expert: np.ndarray

    @property
    def logical_of_slot(self) -> np.ndarray:
        """Expert in each slot, int32 [n_experts]; slots are numbered rank by rank."""
        return np.argsort(self.rank_of_expert, kind="stable").astype(np.int32)

    @property
    def rank_of_slot(self) -> np.ndarray:
        """Rank of each slot, int32 [n_experts], ascending."""
        return np.sort(self.rank_of_expert)


def check_ep_size(model: ModelSpec, ep_size: Any) -> None:
    """Refuse an EP size that leaves ranks without experts."""
    if isinstance(ep_size, bool) or not isinstance(ep_size, int | np.integer) or not 1 <= ep_size <= model.n_experts:
        raise InputError(
            f"--ep {shown(ep_size)}: EP size must lie from 1 to the {model.n_experts} experts of {model.name}"
        )


def strategy_name(strategy: str) -> str:
    """The strategy's own name, for a name or an alias; a misspelt one is refused."""
    if not isinstance(strategy, str):
        raise InputError(f"--placement {shown(strategy)}: must be a name")
    strategy = ALIASES.get(strategy, strategy)
    if not strategy.startswith("file:") and strategy not in STRATEGIES:
        raise unknown("--placement", strategy, [*(STRATEGIES.keys() - {"file:PATH"}), *ALIASES], " (or file:PATH)")
    return strategy


def place(strategy: str, model: ModelSpec, ep_size: int, *, ranks_per_node: int = 8, seed: int = 0) -> Placement:
    """Place the experts of a layer on `ep_size` ranks.

    Parameters
    ----------
    strategy : str
        A name of `STRATEGIES`, 'group_aware' for round_robin, or 'file:PATH' (of several layers: the first).
    model : ModelSpec
    ep_size : int
        1 to n_experts, divisible or not.
    ranks_per_node : int
        For node_aware; there are ceil(ep_size / ranks_per_node) nodes.
    seed : int
        For random: this is the permutation of the sweep's first layer draw.

    Raises
    ------
    InputError
        Unknown strategy, an EP size out of range, or a file that does not place every expert on these ranks.

    Notes
    -----
    round_robin spreads a group as evenly as can be (at most ceil(group / ep_size) of it on a rank), and up to
    ep_size = n_experts / (n_group - topk_group + 1) every choice of groups reaches every rank. node_aware keeps a token
    on at most topk_group nodes where the number of nodes divides n_group, and only there.
    """
    strategy = strategy_name(strategy)
    check_ep_size(model, ep_size)
    whole_number("--ranks-per-node", ranks_per_node, 1, 2**15)
    whole_number("--seed", seed, 0, 2**63 - 1)
    if strategy == "random":
        ranks = random_ranks(model.n_experts, ep_size, seed, 0, 1)[0]
    else:
        ranks = layer_ranks(strategy, model, ep_size, ranks_per_node)[0]
    return Placement(strategy, ep_size, ranks)


def layer_ranks(strategy: str, model: ModelSpec, ep_size: int, ranks_per_node: int) -> np.ndarray:
    """Rank of each expert under a placement that is not random: int32 [1 or layers, n_experts]."""
    if strategy == "linear":
        return _linear(model.n_experts, ep_size)[None]
    if strategy == "linear_legacy":
        return _linear_legacy(model.n_experts, ep_size)[None]
    if strategy == "round_robin":
        return (np.arange(model.n_experts, dtype=np.int32) % ep_size)[None]
    if strategy == "node_aware":
        return _node_aware(model.n_experts, ep_size, ranks_per_node)[None]
    return _read_ranks(Path(strategy.removeprefix("file:")), model.n_experts, ep_size)


def random_order(n_experts: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """One random permutation of the experts per layer draw, int64 [n_draws, n_experts]."""
    return np.argsort(
        words(stream_key(seed, "placement"), PERMUTATION, 0, (n_draws, n_experts), first_draw), axis=1, kind="stable"
    )


def random_ranks(n_experts: int, ep_size: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """Rank of each expert under random placement, int32 [n_draws, n_experts]: the permuted experts, dealt like linear."""
    ranks = np.empty((n_draws, n_experts), np.int32)
    order = random_order(n_experts, seed, first_draw, n_draws)
    np.put_along_axis(ranks, order, _linear(n_experts, ep_size)[None], axis=1)
    return ranks


def _linear(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.33 `determine_expert_map`: the first E % R ranks hold one expert more."""
    q, m = divmod(n_experts, ep_size)
    return np.repeat(np.arange(ep_size, dtype=np.int32), [q + (r < m) for r in range(ep_size)])


def _linear_legacy(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.8.2: the last rank holds E // R + E % R."""
    return np.minimum(np.arange(n_experts, dtype=np.int32) // (n_experts // ep_size), np.int32(ep_size - 1))


def _node_aware(n_experts: int, ep_size: int, ranks_per_node: int) -> np.ndarray:
    ranks = _linear(n_experts, ep_size)
    for first in range(0, ep_size, ranks_per_node):
        n_ranks = min(ranks_per_node, ep_size - first)
        block = np.flatnonzero((ranks >= first) & (ranks < first + n_ranks))
        ranks[block] = first + np.arange(block.size, dtype=np.int32) % n_ranks
    return ranks


def _read_ranks(path: Path, n_experts: int, ep_size: int) -> np.ndarray:
    where = f"placement file {path}"
    rows = read_json(path, where)
    if not isinstance(rows, list) or not rows:
        raise InputError(f"{where} must be a list with the rank of each expert, or a list of such lists, one per layer")
    rows = rows if isinstance(rows[0], list) else [rows]
    for layer, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != n_experts:
            found = len(row) if isinstance(row, list) else "no list"
            raise InputError(f"{where}, layer {layer}: expected the ranks of {n_experts} experts, found {found}")
        for expert, rank in enumerate(row):
            if isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < ep_size:
                raise InputError(
                    f"{where}, layer {layer}: expert {expert} must have a rank from 0 to {ep_size - 1}, not {shown(rank)}"
                )
        if len(set(row)) < ep_size:
            empty = min(set(range(ep_size)) - set(row))
            raise InputError(f"{where}, layer {layer}: rank {empty} of --ep {ep_size} holds no expert")
    return np.array(rows, np.int32)


def fallback_notes(model: ModelSpec, ep_sizes: list[int]) -> list[str]:
    """Where vLLM 0.33 silently runs linear although round_robin was asked for, as far as model and EP size tell.

    It also does so with redundant experts, with EPLB, and with data or sequence parallelism on an all2all backend other
    than deepep_low_latency and nixl_ep.
    """
    notes = []
    if not model.is_grouped:
        notes.append(
            f"vLLM silently runs linear where round_robin is asked for on {model.name}: its router has no expert groups "
            "(n_group = 1)"
        )
    elif 1 in ep_sizes:
        notes.append("vLLM silently runs linear where round_robin is asked for at EP size 1")
    return notes
