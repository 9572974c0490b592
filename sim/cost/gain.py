"""Predicted gain of one placement over another: time of a layer and of a step, on the same sampled tokens."""

from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.cost.exchange import DEFAULT_EXCHANGE, exchange_kind
from sim.cost.expert import crossover_tokens, expert_rates
from sim.cost.gpu import Gpu
from sim.cost.inputs import dtype_of, with_network
from sim.cost.steps import CellTimes, StepSample, balanced_times, cell_times, sample_steps
from sim.errors import InputError
from sim.model import ModelSpec, load_model
from sim.options import RestOptions, StepOptions
from sim.options.declare import takes
from sim.placement import strategy_name
from sim.stats import bounded_mean_interval, clustered_quantile, moments_of_draws, ratio_interval
from sim.traffic import Workload

PERFECT = "perfect balance"
"""Pairs and distinct experts spread evenly over ranks: the least time that a placement's experts could take, and a layer but for
exchange `token`, which goes by received tokens (`balanced_times`).
"""

IN_STEP = "in_step"
"""The pairs of each step split over the copies of a placement so that the busiest rank has the fewest (`sim.copies`): the upper
end of balancers within the step, before what they take themselves.
"""
BALANCER_US = (100.0, 200.0)
"""Time of a layer that a balancer within the step takes, within a node and across nodes. LPLB's solver takes about 100 us within
a node and longer across nodes (deepseek-ai/LPLB, README, limitations); its authors count with 100 to 200 us (issue 3 there). Not
verified by a measurement; for SGLang's solver, UltraEP and MoonEP no figure per layer was found.
"""

KNEE = {"bf16": (3.0, 5.0), "fp8": (0.3, 6.0), "fp4": (0.3, 6.0)}
"""Tokens over the crossover between which gains are not known to 5 points, by type. In bf16 (results/measured,
tests/test_advice.py) that is where an expert fills about one large tile: with copies, measured gains leave predicted ones by up
to 6.5 points there, and by 3.5 at most elsewhere. Of fp8 and fp4 no gains were measured: PyTorch's fp8 kernel, which was,
steps at tiles of 512 rows between these numbers, and DeepGEMM, which is predicted, has other tiles.
"""


@takes(StepOptions, "fit_tokens", "fit_on", "budget_tokens")
def predict_gain(
    model: ModelSpec | str | Path,
    workload: Workload | str | Path,
    gpus: Gpu | str | Path | list[Gpu | str | Path],
    *,
    placement: str | list[str] = "round_robin",
    baseline: str = "linear",
    dtype: str | None = None,
    exchange: str | list[str] = DEFAULT_EXCHANGE,
    network_gb_per_s: float | None = None,
    moe_share: float | None = None,
    step_us: float | None = None,
    balancer_us: float | None = None,
    paired_imbalance: bool = False,
    **options: Any,
) -> pd.DataFrame:
    """Time that a placement saves over another, per layer and per step, for every GPU, EP size and number of tokens.

    Parameters
    ----------
    model, workload
        As in `sim.sweep`.
    gpus : GPU or list of GPUs
        Names, files or Gpu.
    placement : str or list of str
        Placements that are compared with `baseline`. PERFECT is perfect balance, whose experts none can beat; IN_STEP the best
        split of each step's pairs over the copies of that placement which has the most slots.
    baseline : str
    dtype : str
        Type of weights and inputs, see `expert_time_us`; by default what the model's experts are stored in, where every GPU
        computes in it, else fp8 (`dtype_of`).
    exchange : str or list of str
        Kinds of exchange, or backends that stand for one (`sim.cost.exchange.KINDS`, `BACKENDS`).
    network_gb_per_s : float
        Network bandwidth of one GPU and direction, where another than the GPU's own.
    moe_share : float
        Share of the baseline's step time that routed experts and exchange take; the gain of the whole step is this share
        of the layers'.
    step_us : float
        Or: the baseline's measured step time.
    balancer_us : float
        Time of a layer that a balancer within the step takes; by default BALANCER_US. Times of IN_STEP are without it.
    paired_imbalance : bool
        Whether there are columns `imbalance_saved`, 1 - imbalance / baseline's, with its ends, paired like `layer_saved`.
    **options
    fit_tokens, fit_on, budget_tokens
        As in `sim.sweep`, and the routed tokens that are sampled of each number of tokens.

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

        Of IN_STEP besides: `copies_of`, the placement whose copies it has; `bought_us`, by how much its layers are faster than
        those of that placement, whose pairs are split evenly; `balancer_us`; and `break_even_tokens`, the tokens per step from
        which it buys more than that (between two numbers of tokens in proportion to their logarithms), at most the fewest
        tokens of the table, infinite where it does not at the most tokens.

    Raises
    ------
    InputError
        Names that are not known, equal placements, a model without sizes, numbers out of range.
    """
    model = load_model(model)
    placements = placement if isinstance(placement, list) else [placement]
    names = [name if name in (PERFECT, IN_STEP) else strategy_name(name) for name in placements]
    own = strategy_name(baseline, "baseline")
    if own in names:
        same = placements[names.index(own)]
        raise InputError(f"`baseline` {baseline} and `placement` {same} are the same: there is nothing to compare")
    names, baseline = list(dict.fromkeys(names)), own
    exchanges = list(dict.fromkeys(exchange if isinstance(exchange, list) else [exchange]))
    kinds = {name: exchange_kind(name) for name in exchanges}
    RestOptions(moe_share=moe_share, step_us=step_us, balancer_us=balancer_us)
    if moe_share is not None and step_us is not None:
        raise InputError("`moe_share` and `step_us` say the same: give one of them")
    if balancer_us is not None and IN_STEP not in names:
        raise InputError(f"`balancer_us` goes with `placement` {IN_STEP}, on copies of another placement")
    chips = [with_network(gpu, network_gb_per_s) for gpu in (gpus if isinstance(gpus, list) else [gpus])]
    dtype = dtype_of(model, chips, dtype)
    rates = [expert_rates(model, gpu, dtype) for gpu in chips]
    sampled = [baseline, *(name for name in names if name not in (PERFECT, IN_STEP))]
    sample = sample_steps(
        model, workload, rates, placements=sampled, counts_received="token" in kinds.values(), in_step=IN_STEP in names,
        **options,
    )  # fmt: skip
    grid, rows = sample.plan.grid, []
    for exchange, (rate, gpu), name in product(kinds, enumerate(chips), names):
        for base in np.flatnonzero(grid.baseline_cells == np.arange(len(grid.cells))).tolist():
            old, of = cell_times(sample, base, rate, gpu, dtype, exchange), sample
            if name == PERFECT:
                cell, new = None, balanced_times(sample, base, gpu, dtype, exchange)
            else:
                of = sample.in_step if name == IN_STEP and sample.in_step else sample
                placed = sampled.index(sample.copied if name == IN_STEP else name)
                cell = base + placed * len(grid.cells) // len(sampled)
                new = cell_times(of, cell, rate, gpu, dtype, exchange)
            row: dict[str, object] = {"model": model.name, "workload": grid.workload, "gpu": gpu.name, "dtype": dtype}
            row |= {"exchange": exchange, "baseline": baseline, "placement": name}
            row |= {"ep_size": int(grid.ep_size_of_cell[base]), "tokens": int(grid.tokens_of_cell[base])}
            row |= _times_row(sample, base, old, new, moe_share, step_us) | _loads_row(sample, base, "baseline_")
            row |= _loads_row(of, cell, "") | {"load_bound": float(sample.load_bound[base][..., rate].mean())}
            if paired_imbalance:
                loads = sample.max_load[base].astype(float)
                even = np.full(loads.shape, float(grid.mean_load(base)))
                saved = saved_share(even if cell is None else of.max_load[cell], loads, _draws(sample, len(loads)))
                row |= _with_ends("imbalance_saved", saved)
            crossover = crossover_tokens(model, rates[rate])
            of_crossover = int(grid.tokens_of_cell[base]) / crossover
            row |= {"crossover_tokens": crossover, "knee": KNEE[dtype][0] <= of_crossover <= KNEE[dtype][1]}
            if name == IN_STEP and cell is not None:
                saved_us = cell_times(sample, cell, rate, gpu, dtype, exchange).layer_us - new.layer_us
                bought = ratio_of_draws(saved_us, np.ones(saved_us.shape), _draws(sample, len(saved_us)))
                row |= {"copies_of": sample.copied, **_with_ends("bought_us", bought)}
                within = int(grid.ep_size_of_cell[base]) <= sample.plan.ranks_per_node
                row["balancer_us"] = BALANCER_US[0 if within else 1] if balancer_us is None else float(balancer_us)
            rows.append(row)
    return _with_break_even(pd.DataFrame(rows)) if IN_STEP in names else pd.DataFrame(rows)


def _with_break_even(gains: pd.DataFrame) -> pd.DataFrame:
    """With the tokens per step from which IN_STEP buys more than the balancer takes, and their interval."""
    gains = gains.copy()
    for _, rows in gains[gains.placement == IN_STEP].groupby(["exchange", "gpu", "ep_size"], sort=False):
        rows = rows.sort_values("tokens")
        for column, bought in (("", rows.bought_us), ("_low", rows.bought_us_high), ("_high", rows.bought_us_low)):
            found = break_even_tokens(rows.tokens.to_numpy(), (bought - rows.balancer_us).to_numpy())
            gains.loc[rows.index, f"break_even_tokens{column}"] = found
    return gains


def break_even_tokens(tokens: np.ndarray, net_us: np.ndarray) -> float:
    """Tokens from which the net gain is above 0, of numbers of tokens in ascending order: in proportion to their logarithms
    between two of them; the first where it always is, infinite where it is not at the last, NaN where it is not known.

    Examples
    --------
    >>> break_even_tokens(np.array([64, 1024, 16384]), np.array([-100.0, -50.0, 50.0]))
    4096.0
    """
    if np.isnan(net_us).any():
        return np.nan
    losing = np.flatnonzero(net_us <= 0)
    if not losing.size:
        return float(tokens[0])
    last = int(losing[-1])
    if last + 1 == len(tokens):
        return np.inf
    log2 = np.interp(0, net_us[last : last + 2], np.log2(tokens[last : last + 2]))
    return float(2**log2)


def _times_row(
    sample: StepSample, base: int, old: CellTimes, new: CellTimes, moe_share: float | None, step_us: float | None
) -> dict[str, object]:
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
    share = moe_share
    if step_us is not None:
        share = float(old.layer_us.sum(axis=1).mean()) / step_us
        if share > 1:
            grid = sample.plan.grid
            raise InputError(
                f"`step_us`: {step_us / 1e3:g} ms is below the {share * step_us / 1e3:.3g} ms that routed experts and "
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
