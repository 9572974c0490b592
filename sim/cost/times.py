"""Times of the layers of sampled steps: the slowest rank's experts, and the exchange."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.cost.exchange import exchange_time_us
from sim.cost.expert import expert_rates, least_time_us
from sim.cost.gpu import Gpu
from sim.cost.inputs import as_gpu
from sim.cost.steps import StepSample

NETWORK_GB_PER_S = 50.0
"""Taken for a GPU whose network differs by cluster: 400 Gb/s for each GPU, as in DeepEP's measurements."""


def with_network(gpu: Gpu | str | Path, network_gb_per_s: float | None) -> Gpu:
    """The GPU with a network: the one given, its own, or NETWORK_GB_PER_S where it has none."""
    gpu = as_gpu(gpu)
    wanted = network_gb_per_s or gpu.scale_out_gb_per_s or NETWORK_GB_PER_S
    return dataclasses.replace(gpu, scale_out_gb_per_s=wanted)


class CellTimes(NamedTuple):
    """Times of a cell's layers, float64 [steps, layers]."""

    experts_us: np.ndarray  # of the slowest rank
    exchange_us: np.ndarray
    is_extrapolated: bool  # the exchange, beyond what was measured

    @property
    def layer_us(self) -> np.ndarray:
        """Experts and exchange, one after the other."""
        return self.experts_us + self.exchange_us


def cell_times(sample: StepSample, cell: int, rate: int, gpu: Gpu, dtype: str, kind: str) -> CellTimes:
    """Times of the layers of a cell on a GPU whose rates are number `rate` of the sample's, under a kind of exchange."""
    return CellTimes(
        sample.slowest_us[cell][..., rate],
        *_exchange_us(sample, cell, gpu, dtype, kind, sample.max_load[cell].astype(float), sample.received[cell]),
    )


def balanced_times(sample: StepSample, cell: int, gpu: Gpu, dtype: str, kind: str) -> CellTimes:
    """Times of the layers of a cell if pairs, and the experts that have any, were spread evenly over the ranks.

    No placement, with replicas or without, takes less: the time of a rank is convex in both but for `spread_us`, and grows
    with them. Received tokens, which some exchanges depend on, are left as they are in the cell.
    """
    grid, model = sample.plan.grid, sample.plan.model
    active, ep_size = sample.active_experts[grid.cells[cell][1]], int(grid.ep_size_of_cell[cell])
    pairs = np.full(active.shape, float(grid.mean_load(cell)))
    local = np.full(active.shape, model.n_experts / ep_size)
    experts_us = least_time_us(expert_rates(model, gpu, dtype), pairs, active / ep_size, local)
    return CellTimes(experts_us, *_exchange_us(sample, cell, gpu, dtype, kind, pairs, sample.received[cell]))


def _exchange_us(
    sample: StepSample, cell: int, gpu: Gpu, dtype: str, kind: str, pairs: np.ndarray, received: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Times of the exchange, of the pairs' shape, and whether they lie beyond what was measured.

    Dummy tokens are received like the others.
    """
    grid = sample.plan.grid
    ep_size, tokens = int(grid.ep_size_of_cell[cell]), int(grid.tokens_of_cell[cell])
    per_rank = (tokens + grid.dummy_tokens) / ep_size
    traffic: dict[str, Any] = {"pairs": pairs}
    if kind == "token":
        nodes = float(sample.reached[int(grid.pair_of_cell[cell])][..., 1].mean())
        traffic = {"received_tokens": received * (1 + grid.dummy_tokens / tokens), "nodes_per_token": nodes}
    times = exchange_time_us(
        sample.plan.model, gpu, kind=kind, ep_size=ep_size, tokens_per_rank=per_rank,
        ranks_per_node=sample.plan.ranks_per_node, dtype=dtype, **traffic,
    )  # fmt: skip
    return np.broadcast_to(times.total_us, pairs.shape), bool(np.any(times.extrapolated))
