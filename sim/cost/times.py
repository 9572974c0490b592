"""Times of the layers of sampled steps: the slowest rank's experts, and the exchange."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.cost.exchange import exchange_time_us
from sim.cost.expert import expert_time_us
from sim.cost.gpu import Gpu
from sim.cost.inputs import as_gpu
from sim.cost.steps import StepSample
from sim.errors import shown, unknown

EXCHANGES = {
    "deepep_low_latency": "a token is sent once to each of its experts",
    "deepep_high_throughput": "a token is sent once to each node, and there once to each rank that holds one of its experts",
    "none": "no all-to-all: every rank has every token, or the exchange is hidden",
}
NETWORK_GB_PER_S = 50.0
"""Taken for a GPU whose network differs by cluster: 400 Gb/s for each GPU, as in DeepEP's measurements."""


def with_network(gpu: Gpu | str | Path, network_gb_per_s: float | None) -> Gpu:
    """The GPU with a network: the one given, its own, or NETWORK_GB_PER_S where it has none."""
    gpu = as_gpu(gpu)
    wanted = network_gb_per_s or gpu.scale_out_gb_per_s or NETWORK_GB_PER_S
    return dataclasses.replace(gpu, scale_out_gb_per_s=wanted)


def check_exchange(exchange: str) -> None:
    """Refuse a name that is not one of EXCHANGES."""
    if exchange not in EXCHANGES:
        raise unknown("`exchange`", shown(exchange), EXCHANGES)


class CellTimes(NamedTuple):
    """Times of a cell's layers, float64 [steps, layers]."""

    experts_us: np.ndarray  # of the slowest rank
    exchange_us: np.ndarray
    is_extrapolated: bool  # the exchange, beyond what was measured

    @property
    def layer_us(self) -> np.ndarray:
        """Experts and exchange, one after the other."""
        return self.experts_us + self.exchange_us


def cell_times(sample: StepSample, cell: int, rate: int, gpu: Gpu, exchange: str) -> CellTimes:
    """Times of the layers of a cell on a GPU whose rates are number `rate` of the sample's."""
    imbalance = sample.max_load[cell] / float(sample.plan.grid.mean_load(cell))
    exchange_us, is_extrapolated = _exchange_us(sample, cell, gpu, exchange, imbalance)
    return CellTimes(sample.slowest_us[cell][..., rate], exchange_us, is_extrapolated)


def balanced_times(sample: StepSample, cell: int, gpu: Gpu, dtype: str, exchange: str) -> CellTimes:
    """Times of the layers of a cell if pairs, and the experts that have any, were spread evenly over the ranks.

    No placement, with replicas or without, takes less: the time of a rank is convex in both, and grows with them. Only the
    fan-out, which some exchanges depend on, is left as it is in the cell.
    """
    grid = sample.plan.grid
    active, ep_size = sample.active_experts[grid.cells[cell][1]], int(grid.ep_size_of_cell[cell])
    pairs = np.full(active.shape, float(grid.mean_load(cell)))
    experts_us = expert_time_us(sample.plan.model, gpu, pairs=pairs, distinct_experts=active / ep_size, dtype=dtype)
    return CellTimes(experts_us, *_exchange_us(sample, cell, gpu, exchange, np.ones(active.shape)))


def _exchange_us(
    sample: StepSample, cell: int, gpu: Gpu, exchange: str, imbalance: np.ndarray
) -> tuple[np.ndarray, bool]:
    """Times of the exchange, of the imbalance's shape, and whether they lie beyond what was measured."""
    if exchange == "none":
        return np.zeros(imbalance.shape), False
    grid = sample.plan.grid
    ep_size = int(grid.ep_size_of_cell[cell])
    fan_out: dict[str, Any] = {}
    if exchange == "deepep_high_throughput":
        ranks, nodes = sample.reached[int(grid.pair_of_cell[cell])].mean(axis=(0, 1))
        fan_out = {"ranks_per_token": ranks, "nodes_per_token": nodes}
    times = exchange_time_us(
        sample.plan.model, gpu, ep_size=ep_size, ranks_per_node=sample.plan.ranks_per_node,
        tokens_per_rank=(int(grid.tokens_of_cell[cell]) + grid.dummy_tokens) / ep_size, imbalance=imbalance, **fan_out,
    )  # fmt: skip
    return times.total_us, bool(np.any(times.extrapolated))
