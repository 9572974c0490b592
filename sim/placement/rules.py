"""The static rules of serving engines, random and node-aware placement: the rank of each expert."""

import numpy as np

from sim.model import ModelSpec
from sim.streams import PERMUTATION, stream_key, words


def random_order(n_experts: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """One random permutation of the experts per layer draw, int64 [n_draws, n_experts]."""
    return np.argsort(
        words(stream_key(seed, "placement"), PERMUTATION, 0, (n_draws, n_experts), first_draw), axis=1, kind="stable"
    )


def random_ranks(n_experts: int, ep_size: int, seed: int, first_draw: int, n_draws: int) -> np.ndarray:
    """Rank of each expert under random placement, int32 [n_draws, n_experts]: the permuted experts, dealt like linear."""
    ranks = np.empty((n_draws, n_experts), np.int32)
    order = random_order(n_experts, seed, first_draw, n_draws)
    np.put_along_axis(ranks, order, linear(n_experts, ep_size)[None], axis=1)
    return ranks


def linear(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.33 `determine_expert_map`: the first E % R ranks hold one expert more."""
    q, m = divmod(n_experts, ep_size)
    return np.repeat(np.arange(ep_size, dtype=np.int32), [q + (r < m) for r in range(ep_size)])


def linear_legacy(n_experts: int, ep_size: int) -> np.ndarray:
    """vLLM 0.8.2: the last rank holds E // R + E % R."""
    return np.minimum(np.arange(n_experts, dtype=np.int32) // (n_experts // ep_size), np.int32(ep_size - 1))


def node_aware(n_experts: int, ep_size: int, ranks_per_node: int) -> np.ndarray:
    """Each node holds the block that `linear` gives its ranks, dealt round robin over them."""
    ranks = linear(n_experts, ep_size)
    for first in range(0, ep_size, ranks_per_node):
        n_ranks = min(ranks_per_node, ep_size - first)
        block = np.flatnonzero((ranks >= first) & (ranks < first + n_ranks))
        ranks[block] = first + np.arange(block.size, dtype=np.int32) % n_ranks
    return ranks


ROUND_ROBIN_BACKENDS = ("deepep_low_latency", "nixl_ep")
"""All2all backends on which vLLM 0.33 keeps round_robin under data or sequence parallelism."""


def why_linear(model: ModelSpec, ep_size: int) -> str:
    """Why vLLM 0.33 silently runs linear where round_robin is asked for, as far as model and EP size tell; empty if not.

    It also does so with redundant experts, with EPLB, and with data or sequence parallelism on a backend that is not one
    of ROUND_ROBIN_BACKENDS.
    """
    if not model.is_grouped:
        return f"the router of {model.name} has no expert groups (n_group = 1)"
    return "the EP size is 1" if ep_size == 1 else ""
