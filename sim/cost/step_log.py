"""What a serving engine would log of each step: balancedness over layers, and the time of the slowest ranks."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from sim.cost.expert import expert_rates
from sim.cost.gpu import Gpu
from sim.cost.layer import sglang_over_layers, vllm_over_layers
from sim.cost.steps import StepSample, sample_steps
from sim.cost.times import cell_times, check_exchange, with_network
from sim.errors import InputError
from sim.files import read_text
from sim.model import ModelSpec, load_model
from sim.stats import ratio_interval
from sim.traffic import Workload

METRICS = {
    "balancedness_vllm": "sum over layers of mean loads / sum of largest loads",
    "balancedness_sglang": "mean over layers of mean load / largest load",
    "slowest_rank_ms": "sum over layers of the slowest rank's expert time",
    "moe_ms": "the same with dispatch and combine",
}
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)


def predict_steps(
    model: ModelSpec | str | Path,
    workload: Workload | str | Path,
    gpu: Gpu | str | Path,
    *,
    placements: str | list[str],
    dtype: str = "fp8",
    exchange: str = "deepep_low_latency",
    network_gb_per_s: float | None = None,
    **sampling: Any,
) -> pd.DataFrame:
    """Distribution over steps of what engines log (METRICS), for every placement, EP size and number of tokens.

    Parameters are those of `predict_gain`.

    Returns
    -------
    DataFrame
        One row per cell and metric: mean with its 95 % interval over layer sets, quantiles p01 to p99 over all steps,
        and two standard deviations: between layer sets (one deployment and another; nan with fewer than two steps of
        each) and within them (one deployment's steps).
    """
    model, chip = load_model(model), with_network(gpu, network_gb_per_s)
    check_exchange(exchange)
    sample = sample_steps(model, workload, [expert_rates(model, chip, dtype)], placements=placements, **sampling)
    grid, rows = sample.plan.grid, []
    for cell in range(len(grid.cells)):
        placement, ep_size = grid.pairs[grid.pair_of_cell[cell]]
        keys: dict[str, object] = {"model": model.name, "workload": grid.workload, "gpu": chip.name, "dtype": dtype}
        keys |= {
            "exchange": exchange,
            "placement": placement,
            "ep_size": ep_size,
            "tokens": int(grid.tokens_of_cell[cell]),
        }
        for metric, values in _of_steps(sample, cell, chip, exchange).items():
            rows.append({**keys, "metric": metric, **_distribution(values, sample.set_of_step(cell))})
    return pd.DataFrame(rows)


def _of_steps(sample: StepSample, cell: int, gpu: Gpu, exchange: str) -> dict[str, np.ndarray]:
    """Each of METRICS of a cell's steps, float64 [steps]."""
    times, mean_load = cell_times(sample, cell, 0, gpu, exchange), float(sample.plan.grid.mean_load(cell))
    return {
        "balancedness_vllm": vllm_over_layers(mean_load, sample.max_load[cell]),
        "balancedness_sglang": sglang_over_layers(mean_load, sample.max_load[cell]),
        "slowest_rank_ms": times.experts_us.sum(axis=1) / 1e3,
        "moe_ms": times.layer_us.sum(axis=1) / 1e3,
    }


def _distribution(values: np.ndarray, layer_set: np.ndarray) -> dict[str, float]:
    """Mean, interval and quantiles of the steps' values; standard deviations between and within layer sets."""
    n = np.bincount(layer_set)
    n = n[n > 0]
    total = np.bincount(layer_set, weights=values)[: len(n)]
    mean, low, high = ratio_interval(total, n.astype(float))
    row = {"steps": len(values), "layer_sets": len(n), "mean": mean, "low": low, "high": high}
    quantiles = np.quantile(values, QUANTILES, method="inverted_cdf")
    row |= {f"p{round(100 * q):02d}": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)}
    within = between = np.nan
    if len(values) >= 2 * len(n):
        residual = values - (total / n)[layer_set]
        within_square = float(np.sum(residual**2)) / (len(values) - len(n))
        within = within_square**0.5
        if 1 < len(n) < 4:  # the means of so few sets often agree by chance: no less than the noise of the steps
            noise = -float(stdtrit(len(n) - 1, 0.025)) * (within_square / len(values)) ** 0.5
            row |= {"low": min(low, mean - noise), "high": max(high, mean + noise)}
        if len(n) > 1:
            of_means = float(np.var(total / n, ddof=1))
            between = max(of_means - within_square * float(np.mean(1 / n)), 0.0) ** 0.5
    return row | {"sd_between_sets": between, "sd_within_set": within}


def read_log(path: Path, metric: str) -> np.ndarray:
    """A user's own log: one number a line (of several columns the last), float64 [steps]; a first line of words is skipped.

    Raises
    ------
    InputError
        The file cannot be read, or holds what is no value of the metric: balancedness is from 0 to 1, a time from 0 on.
    """
    where = f"--log {path}"
    lines = [line.strip() for line in read_text(path, where).splitlines() if line.strip()]
    values = []
    for number, line in enumerate(lines, 1):
        try:
            values.append(float(line.replace(",", " ").replace(";", " ").split()[-1]))
        except (ValueError, IndexError):
            if number > 1:
                raise InputError(f"{where}: line {number} does not end with a number") from None
    if not values:
        raise InputError(f"{where} holds no numbers")
    log = np.array(values)
    most = 1 + 1e-6 if metric.startswith("balancedness") else 1e12
    wrong = ~((log >= 0) & (log <= most))
    if wrong.any():
        raise InputError(f"{where}: {log[wrong][0]:g} is no value of {metric}: they are numbers from 0 to {most:.0g}")
    return log


def compare_log(steps: pd.DataFrame, metric: str, log: np.ndarray) -> pd.DataFrame:
    """A user's log beside the simulated distributions of a metric: one row per cell.

    `log_mean` is the log's; `inside` the share of its values between the cell's p01 and p99; `sds_apart` how far its mean
    lies from the cell's, in standard deviations of one deployment against another (nan where that is not known).
    """
    rows = steps[steps.metric == metric].reset_index(drop=True)
    inside = [float(np.mean((log >= row.p01) & (log <= row.p99))) for row in rows.itertuples()]
    apart = (log.mean() - rows["mean"]) / rows.sd_between_sets.where(rows.sd_between_sets > 0)
    return rows.assign(log_steps=len(log), log_mean=log.mean(), inside=inside, sds_apart=apart)
