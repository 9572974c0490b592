"""Predicted gain of one placement over another: time of a layer and of a step, on the same sampled tokens."""

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.cost.exchange import exchange_time_us
from sim.cost.expert import crossover_tokens, expert_rates
from sim.cost.gpu import Gpu
from sim.cost.inputs import as_gpu, as_model, as_numbers
from sim.cost.steps import StepSample, sample_steps
from sim.errors import InputError, shown, unknown
from sim.model import ModelSpec
from sim.placement import strategy_name
from sim.stats import clustered_quantile, ratio_interval
from sim.workload import Workload

EXCHANGES = {
    "deepep_low_latency": "a token is sent once to each of its experts",
    "deepep_high_throughput": "a token is sent once to each node, and there once to each rank that holds one of its experts",
    "none": "no all-to-all: every rank has every token, or the exchange is hidden",
}
NETWORK_GB_PER_S = 50.0
"""Taken for a GPU whose network differs by cluster: 400 Gb/s for each GPU, as in DeepEP's measurements."""


class Rest(NamedTuple):
    """What a step does besides routed experts and their exchange: one of the two, or nothing known."""

    moe_share: float | None = None  # share of the baseline's step that experts and exchange take
    step_us: float | None = None  # time of the baseline's whole step


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


def cell_times(sample: StepSample, cell: int, rate: int, gpu: Gpu, exchange: str) -> CellTimes:
    """Times of the layers of a cell on a GPU whose rates are number `rate` of the sample's."""
    experts_us, grid = sample.slowest_us[cell][..., rate], sample.plan.grid
    if exchange == "none":
        return CellTimes(experts_us, np.zeros(experts_us.shape), False)
    pair, ep_size = int(grid.pair_of_cell[cell]), int(grid.ep_size_of_cell[cell])
    fan_out: dict[str, Any] = {}
    if exchange == "deepep_high_throughput":
        ranks, nodes = sample.reached[pair]
        fan_out = {"ranks_per_token": ranks, "nodes_per_token": nodes}
    times = exchange_time_us(
        sample.plan.model, gpu, ep_size=ep_size, ranks_per_node=sample.plan.ranks_per_node,
        tokens_per_rank=(int(grid.tokens_of_cell[cell]) + grid.dummy_tokens) / ep_size,
        imbalance=sample.max_load[cell] / float(grid.mean_load(cell)), **fan_out,
    )  # fmt: skip
    return CellTimes(experts_us, times.total_us, bool(np.any(times.extrapolated)))


def predict_gain(
    model: ModelSpec | str | Path,
    workload: Workload | str | Path,
    gpus: Gpu | str | Path | list[Gpu | str | Path],
    *,
    placement: str = "round_robin",
    baseline: str = "linear",
    dtype: str = "fp8",
    exchange: str = "deepep_low_latency",
    network_gb_per_s: float | None = None,
    moe_share: float | None = None,
    step_us: float | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Time that a placement saves over another, per layer and per step, for every GPU, EP size and number of tokens.

    Parameters
    ----------
    model, workload
        As in `sim.sweep`.
    gpus : GPU or list of GPUs
        Names, files or Gpu.
    placement, baseline : str
    dtype : str
        Type of weights and inputs, see `expert_time_us`.
    exchange : str
        A name of EXCHANGES.
    network_gb_per_s : float
        Network bandwidth of one GPU and direction, where another than the GPU's own.
    moe_share : float
        Share of the baseline's step time that routed experts and exchange take; the gain of the whole step is this share
        of the layers'.
    step_us : float
        Or: the baseline's measured step time.
    **sampling
        ep_sizes, tokens and more, as in `sample_steps`.

    Returns
    -------
    DataFrame
        One row per GPU, EP size and number of tokens. `layer_saved` is 1 - time / baseline's time of a layer, with its
        paired 95 % interval over layer draws; `experts_saved` leaves the exchange out; `step_saved` is of the whole step,
        where its rest is known. `load_bound`: share of the baseline's layers whose slowest rank's time grows with its
        tokens, and not with its distinct experts alone; `crossover_tokens`: where that begins under even load.
        `extrapolated`: the exchange lies beyond what was measured.

    Raises
    ------
    InputError
        Names that are not known, equal placements, a model without sizes, numbers out of range.
    """
    model = as_model(model)
    names = [strategy_name(baseline), strategy_name(placement)]
    if names[0] == names[1]:
        raise InputError(f"--baseline {baseline} and --placement {placement} are the same: there is nothing to compare")
    check_exchange(exchange)
    rest = _check_rest(moe_share, step_us)
    chips = [with_network(gpu, network_gb_per_s) for gpu in (gpus if isinstance(gpus, list) else [gpus])]
    rates = [expert_rates(model, gpu, dtype) for gpu in chips]
    sample = sample_steps(model, workload, rates, placements=names, **sampling)
    grid, rows = sample.plan.grid, []
    for rate, gpu in enumerate(chips):
        for base in np.flatnonzero(grid.baseline_cells == np.arange(len(grid.cells))):
            cell = base + len(grid.cells) // 2
            row = _gain_row(sample, int(base), int(cell), rate, gpu, exchange, rest)
            keys = {"model": model.name, "workload": grid.workload, "gpu": gpu.name, "dtype": dtype}
            keys |= {"exchange": exchange, "baseline": names[0], "placement": names[1]}
            rows.append({**keys, **row, "crossover_tokens": crossover_tokens(model, rates[rate])})
    return pd.DataFrame(rows)


def check_exchange(exchange: str) -> None:
    """Refuse a name that is not one of EXCHANGES."""
    if exchange not in EXCHANGES:
        raise unknown("--exchange", shown(exchange), EXCHANGES)


def _check_rest(moe_share: float | None, step_us: float | None) -> Rest:
    if moe_share is not None and step_us is not None:
        raise InputError("--moe-share and --step-ms say the same: give one of them")
    if moe_share is not None:
        as_numbers("--moe-share", moe_share, 1e-6, 1)
    if step_us is not None:
        as_numbers("--step-ms", step_us / 1e3, 1e-3, 1e9)
    return Rest(moe_share, step_us)


def _gain_row(
    sample: StepSample, base: int, cell: int, rate: int, gpu: Gpu, exchange: str, rest: Rest
) -> dict[str, object]:
    grid = sample.plan.grid
    old, new = (cell_times(sample, c, rate, gpu, exchange) for c in (base, cell))
    sets, n_layers = sample.set_of_step(cell), sample.n_layers
    draw = (sets[:, None] * n_layers + np.arange(n_layers)).reshape(-1)
    row: dict[str, object] = {"ep_size": int(grid.ep_size_of_cell[cell]), "tokens": int(grid.tokens_of_cell[cell])}
    row |= {"steps": len(sets), "layer_draws": len(np.unique(draw))}
    for name, times in (("baseline_", old), ("", new)):
        row[f"{name}layer_us"] = times.layer_us.mean()
        row[f"{name}exchange_us"] = times.exchange_us.mean()
        p99 = clustered_quantile(times.layer_us.reshape(-1), draw, 0.99)
        row |= dict(zip((f"{name}layer_us_p99{end}" for end in ("", "_low", "_high")), p99, strict=True))
        steps_us = times.layer_us.sum(axis=1)
        row[f"{name}step_ms"] = steps_us.mean() / 1e3
        p99 = clustered_quantile(steps_us / 1e3, sets, 0.99)
        row |= dict(zip((f"{name}step_ms_p99{end}" for end in ("", "_low", "_high")), p99, strict=True))
        row[f"{name}imbalance"] = sample.max_load[base if name else cell].mean() / float(grid.mean_load(cell))
    saved = saved_share(new.layer_us, old.layer_us, draw)
    row |= dict(zip(("layer_saved", "layer_saved_low", "layer_saved_high"), saved, strict=True))
    of_experts = saved_share(new.experts_us, old.experts_us, draw)
    row |= dict(zip(("experts_saved", "experts_saved_low", "experts_saved_high"), of_experts, strict=True))
    share = rest.moe_share
    if rest.step_us is not None:
        share = float(old.layer_us.sum(axis=1).mean()) / rest.step_us
        if share > 1:
            raise InputError(
                f"--step-ms {rest.step_us / 1e3:g}: below the {share * rest.step_us / 1e3:.3g} ms that routed experts and "
                f"exchange take alone at EP {row['ep_size']} and {row['tokens']} tokens"
            )
    of_step = [np.nan] * 3 if share is None else [share * value for value in saved]
    row |= {"moe_share": np.nan if share is None else share}
    row |= dict(zip(("step_saved", "step_saved_low", "step_saved_high"), of_step, strict=True))
    row["load_bound"] = float(sample.load_bound[base][..., rate].mean())
    row["extrapolated"] = old.is_extrapolated
    return row


def saved_share(new_us: np.ndarray, old_us: np.ndarray, draw: np.ndarray) -> tuple[float, float, float]:
    """1 - new / old, with its interval; times float64 [steps, layers], `draw` int64 [steps * layers]."""
    there = np.bincount(draw) > 0
    new, old = (np.bincount(draw, weights=us.reshape(-1))[there] for us in (new_us, old_us))
    ratio, low, high = ratio_interval(new, old)
    return 1 - ratio, 1 - high, 1 - low
