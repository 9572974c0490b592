"""Predicted gain of one placement over another: time of a layer and of a step, on the same sampled tokens."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.cost.exchange import DEFAULT_EXCHANGE, exchange_kind
from sim.cost.expert import crossover_tokens, expert_rates
from sim.cost.gpu import Gpu
from sim.cost.inputs import as_numbers
from sim.cost.steps import StepSample, sample_steps
from sim.cost.times import CellTimes, balanced_times, cell_times, with_network
from sim.errors import InputError
from sim.model import ModelSpec, load_model
from sim.placement import strategy_name
from sim.stats import bounded_mean_interval, clustered_quantile, moments_of_draws, ratio_interval
from sim.traffic import Workload

PERFECT = "perfect balance"
"""Pairs and distinct experts spread evenly over ranks: the least time that any placement could take."""

KNEE = {"bf16": (0.25, 0.8), "fp8": (0.3, 6.0), "fp4": (0.3, 6.0)}
"""Tokens over the crossover between which measured gains (results/measured) leave the predicted ones by more than 5 points, by
type: there kernels step at whole tiles, and a library changes from one kernel to another, which pairs and distinct experts do not
tell. In fp8 another kernel was measured (PyTorch's) than is predicted (DeepGEMM's). Of fp4 no gains were measured.
"""


class Rest(NamedTuple):
    """What a step does besides routed experts and their exchange: one of the two, or nothing known."""

    moe_share: float | None = None  # share of the baseline's step that experts and exchange take
    step_us: float | None = None  # time of the baseline's whole step


def predict_gain(
    model: ModelSpec | str | Path,
    workload: Workload | str | Path,
    gpus: Gpu | str | Path | list[Gpu | str | Path],
    *,
    placement: str | list[str] = "round_robin",
    baseline: str = "linear",
    dtype: str = "fp8",
    exchange: str | list[str] = DEFAULT_EXCHANGE,
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
    placement : str or list of str
        Placements that are compared with `baseline`. PERFECT is perfect balance, which none can beat.
    baseline : str
    dtype : str
        Type of weights and inputs, see `expert_time_us`.
    exchange : str or list of str
        Kinds of exchange, or backends that stand for one (`sim.cost.exchange.KINDS`, `BACKENDS`).
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
        One row per exchange, GPU, placement, EP size and number of tokens. `layer_saved` is 1 - time / baseline's time of a
        layer, with its paired 95 % interval over layer draws; `experts_saved` leaves the exchange out; `step_saved` is of
        the whole step, where its rest is known. `load_bound`: share of the baseline's layers whose slowest rank's time
        grows with its tokens, and not with its distinct experts alone; `crossover_tokens`: where that begins under even
        load.
        `imbalance`, `idle_ranks`, `ranks_per_token` and `nodes_per_token` are means over layers and steps.
        `extrapolated`: the exchange lies beyond what was measured. `knee`: the tokens lie within KNEE of
        the crossover.

    Raises
    ------
    InputError
        Names that are not known, equal placements, a model without sizes, numbers out of range.
    """
    model = load_model(model)
    placements = placement if isinstance(placement, list) else [placement]
    names = [name if name == PERFECT else strategy_name(name) for name in placements]
    if strategy_name(baseline) in names:
        same = placements[names.index(strategy_name(baseline))]
        raise InputError(f"`baseline` {baseline} and `placement` {same} are the same: there is nothing to compare")
    names, baseline = list(dict.fromkeys(names)), strategy_name(baseline)
    exchanges = list(dict.fromkeys(exchange if isinstance(exchange, list) else [exchange]))
    kinds = {name: exchange_kind(name) for name in exchanges}
    rest = _check_rest(moe_share, step_us)
    chips = [with_network(gpu, network_gb_per_s) for gpu in (gpus if isinstance(gpus, list) else [gpus])]
    rates = [expert_rates(model, gpu, dtype) for gpu in chips]
    sampled = [baseline, *(name for name in names if name != PERFECT)]
    sample = sample_steps(
        model, workload, rates, placements=sampled, counts_received="token" in kinds.values(), **sampling
    )
    grid, rows = sample.plan.grid, []
    for (exchange, kind), (rate, gpu), name in product(kinds.items(), enumerate(chips), names):
        for base in np.flatnonzero(grid.baseline_cells == np.arange(len(grid.cells))).tolist():
            old = cell_times(sample, base, rate, gpu, kind)
            if name == PERFECT:
                cell, new = None, balanced_times(sample, base, gpu, dtype, kind)
            else:
                cell = base + sampled.index(name) * len(grid.cells) // len(sampled)
                new = cell_times(sample, cell, rate, gpu, kind)
            row: dict[str, object] = {"model": model.name, "workload": grid.workload, "gpu": gpu.name, "dtype": dtype}
            row |= {"exchange": exchange, "baseline": baseline, "placement": name}
            row |= {"ep_size": int(grid.ep_size_of_cell[base]), "tokens": int(grid.tokens_of_cell[base])}
            row |= _times_row(sample, base, old, new, rest) | _loads_row(sample, base, "baseline_")
            row |= _loads_row(sample, cell, "") | {"load_bound": float(sample.load_bound[base][..., rate].mean())}
            crossover = crossover_tokens(model, rates[rate])
            of_crossover = int(grid.tokens_of_cell[base]) / crossover
            rows.append(
                {**row, "crossover_tokens": crossover, "knee": KNEE[dtype][0] <= of_crossover <= KNEE[dtype][1]}
            )
    return pd.DataFrame(rows)


def _check_rest(moe_share: float | None, step_us: float | None) -> Rest:
    if moe_share is not None and step_us is not None:
        raise InputError("`moe_share` and `step_us` say the same: give one of them")
    if moe_share is not None:
        as_numbers("`moe_share`", moe_share, 1e-6, 1)
    if step_us is not None:
        as_numbers("`step_us`", step_us, 1e-3, 1e9)
    return Rest(moe_share, step_us)


def _times_row(sample: StepSample, base: int, old: CellTimes, new: CellTimes, rest: Rest) -> dict[str, object]:
    """Times of the baseline's cell `base` and of another placement on the same steps, and what is saved."""
    sets, draw = sample.set_of_step(base), _draws(sample, len(old.experts_us))
    row: dict[str, object] = {"steps": len(sets), "layer_draws": len(np.unique(draw))}
    for name, times in (("baseline_", old), ("", new)):
        row[f"{name}layer_us"] = times.layer_us.mean()
        row[f"{name}exchange_us"] = times.exchange_us.mean()
        row |= _with_ends(f"{name}layer_us_p99", clustered_quantile(times.layer_us.reshape(-1), draw, 0.99))
        steps_us = times.layer_us.sum(axis=1)
        row[f"{name}step_ms"] = steps_us.mean() / 1e3
        row |= _with_ends(f"{name}step_ms_p99", clustered_quantile(steps_us / 1e3, sets, 0.99))
    saved = saved_share(new.layer_us, old.layer_us, draw)
    row |= _with_ends("layer_saved", saved)
    row |= _with_ends("experts_saved", saved_share(new.experts_us, old.experts_us, draw))
    share = rest.moe_share
    if rest.step_us is not None:
        share = float(old.layer_us.sum(axis=1).mean()) / rest.step_us
        if share > 1:
            grid = sample.plan.grid
            raise InputError(
                f"`step_us`: {rest.step_us / 1e3:g} ms is below the {share * rest.step_us / 1e3:.3g} ms that routed experts and "
                f"exchange take alone at EP {grid.ep_size_of_cell[base]} and {grid.tokens_of_cell[base]} tokens"
            )
    share = np.nan if share is None else share
    row |= {"moe_share": share, **_with_ends("step_saved", (share * saved[0], share * saved[1], share * saved[2]))}
    return row | {"extrapolated": old.is_extrapolated}


def _loads_row(sample: StepSample, cell: int | None, prefix: str) -> dict[str, object]:
    """Imbalance, idle ranks and fan-out of a cell with their intervals; of perfect balance (None) the imbalance alone."""
    row: dict[str, object] = {}
    if cell is None:
        return row | _with_ends("imbalance", (1.0, 1.0, 1.0))
    grid = sample.plan.grid
    imbalance = sample.max_load[cell] / float(grid.mean_load(cell))
    row |= _with_ends(
        prefix + "imbalance", ratio_of_draws(imbalance, np.ones(imbalance.shape), _draws(sample, len(imbalance)))
    )
    reached = sample.reached[int(grid.pair_of_cell[cell])]
    counted = {"idle_ranks": (sample.idle_ranks[cell], *(end[cell] for end in grid.idle_range))}
    for i, name in enumerate(("ranks_per_token", "nodes_per_token")):
        counted[name] = (reached[..., i], *(end[cell, i] for end in grid.reached_range))
    for name, (of_block, least, most) in counted.items():
        moments, design = moments_of_draws(of_block.reshape(-1), _draws(sample, len(of_block)))
        ends = (float(end) for end in bounded_mean_interval(moments, design, least, most))
        row |= _with_ends(prefix + name, ends)
    return row


def _draws(sample: StepSample, n_steps: int) -> np.ndarray:
    """Layer draw of each block, int64 [steps * layers]."""
    sets = np.arange(n_steps) % sample.n_sets
    return (sets[:, None] * sample.n_layers + np.arange(sample.n_layers)).reshape(-1)


def _with_ends(name: str, values: Iterable[float]) -> dict[str, float]:
    """Columns of an estimate and its interval."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), values, strict=True))


def ratio_of_draws(top: np.ndarray, bottom: np.ndarray, draw: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two sums over blocks [steps, layers], with its interval over draws, int64 [steps * layers]."""
    there = np.bincount(draw) > 0
    sums = (np.bincount(draw, weights=values.reshape(-1))[there] for values in (top, bottom))
    return ratio_interval(*sums)


def saved_share(new_us: np.ndarray, old_us: np.ndarray, draw: np.ndarray) -> tuple[float, float, float]:
    """1 - new / old, with its interval; times float64 [steps, layers], `draw` int64 [steps * layers]."""
    ratio, low, high = ratio_of_draws(new_us, old_us, draw)
    return 1 - ratio, 1 - high, 1 - low
