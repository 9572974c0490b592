"""Whole steps from recorded traffic: all layers of the same tokens, step after step, beside layers that are independent.

Recorded layers share their tokens, which draws do not. A record is replayed in the phases of `sim.traffic.STEP_PHASES`:
'continuous' batching, 'together' (all requests start at once) and 'independent' layers, whose tokens have the law of the first.
"""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.cost.deployments import of_step
from sim.cost.exchange import DEFAULT_EXCHANGE, exchange_kind
from sim.cost.expert import expert_rates
from sim.cost.gpu import Gpu
from sim.cost.inputs import dtype_of, with_network
from sim.cost.step_log import metrics_of_steps
from sim.cost.steps import StepSample, sample_steps
from sim.errors import InputError
from sim.model import ModelSpec, load_model
from sim.stats import student_quantile
from sim.traffic import STEP_PHASES, RecordedTraffic

OPENING = 16
"""Steps after a common start that are looked at apart: the first 8 tokens of gpt-oss's answers are nearly all the same."""
MODES = ("continuous", "together", "after the opening", "independent")
SHARES, WINDOW = (0.5, 0.1, 0.01), 32
_PARTS = 16  # of consecutive steps, for the interval of a ratio of variances


class Replay(NamedTuple):
    """Outcome of `replay_steps`."""

    steps: pd.DataFrame
    exceeded: pd.DataFrame


def replay_steps(
    model: ModelSpec | str | Path,
    record: RecordedTraffic,
    gpu: Gpu | str | Path,
    *,
    placements: str | list[str],
    dtype: str | None = None,
    exchange: str = DEFAULT_EXCHANGE,
    network_gb_per_s: float | None = None,
    **sampling: Any,
) -> Replay:
    """What whole steps of a record look like, beside steps of independent layers.

    Parameters are those of `predict_steps`; `record` is recorded routing.

    Returns
    -------
    Replay
        steps : a row per cell, mode (MODES; 'after the opening' is 'together' from step OPENING on, until the longest sequence
        ends) and metric (those of `predict_steps`): mean, sd, p50, p95 and p99 over steps; `autocorrelation` of consecutive
        steps (nan where there is no variation); `variance_ratio`, over independent layers, with its 95 % interval (jackknife
        over runs of steps; nan where they are few, or are no sample: 'together'). That of 'mean_imbalance' under continuous
        batching is what `layer_correlation` takes.
        exceeded : a row per cell and share (SHARES), for the largest imbalance `above` that at most such a share of steps has
        in some layer: the share `replayed`, the `product` over layers of each one's own share (what independent layers would
        give), and the same with the measured layer correlation; `window_replayed`, the share of windows of WINDOW steps with
        such a step, and `window_product`, what it would be if steps were independent.

    Raises
    ------
    InputError
        Traffic that is no recorded routing; else as `predict_steps`.
    """
    if not isinstance(record, RecordedTraffic):
        raise InputError("whole steps need the experts of single tokens: recorded routing, not synthetic traffic")
    model, chip, kind = load_model(model), with_network(gpu, network_gb_per_s), exchange_kind(exchange)
    dtype = dtype_of(model, [chip], dtype)
    samples = {
        phase: sample_steps(
            model, record.in_phase(phase), [expert_rates(model, chip, dtype)], placements=placements,
            counts_received=kind == "token", **sampling,
        )
        for phase in STEP_PHASES
    }  # fmt: skip
    plan = samples["continuous"].plan
    grid, longest = plan.grid, int(np.diff(plan.workload.starts).max())  # type: ignore[union-attr]
    of_steps: list[dict[str, Any]] = []
    exceeded: list[dict[str, Any]] = []
    for cell in range(len(grid.cells)):
        found = {phase: metrics_of_steps(sample, cell, chip, dtype, kind) for phase, sample in samples.items()}
        found["after the opening"] = {metric: values[OPENING:longest] for metric, values in found["together"].items()}
        keys: dict[str, Any] = {"model": model.name, "workload": grid.workload, "gpu": chip.name, "dtype": dtype}
        placement, ep_size = grid.pairs[grid.pair_of_cell[cell]]
        keys |= {"exchange": exchange, "placement": placement, "ep_size": ep_size}
        keys |= {"tokens": int(grid.tokens_of_cell[cell])}
        rows = [
            {**keys, "mode": mode, "metric": metric, **_described(values, found["independent"][metric])}
            for mode in MODES
            for metric, values in found[mode].items()
        ]
        for row in rows:
            if row["mode"] == "together":
                row |= {"variance_ratio_low": np.nan, "variance_ratio_high": np.nan}
        ratio = next(row["variance_ratio"] for row in rows if row["metric"] == "mean_imbalance")
        exceeded += [{**keys, **row} for row in _layers_exceed(samples["continuous"], cell, ratio)]
        of_steps += rows
    return Replay(pd.DataFrame(of_steps), pd.DataFrame(exceeded))


def _described(values: np.ndarray, alone: np.ndarray) -> dict[str, Any]:
    """Of a metric of steps, beside its values in steps of independent layers."""
    several = len(values) > 1
    row: dict[str, Any] = {"steps": len(values), "mean": values.mean() if len(values) else np.nan}
    row |= {"sd": values.std(ddof=1) if several else np.nan}
    quantiles = [np.quantile(values, q, method="inverted_cdf") if len(values) else np.nan for q in (0.5, 0.95, 0.99)]
    row |= dict(zip(("p50", "p95", "p99"), quantiles, strict=True))
    row |= {"autocorrelation": _lag_1(values) if several else np.nan}
    low, ratio, high = _variance_ratio(values, alone)
    return row | {"variance_ratio": ratio, "variance_ratio_low": low, "variance_ratio_high": high}


def _lag_1(values: np.ndarray) -> float:
    """Correlation of consecutive values."""
    centred = values - values.mean()
    square = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / square if square > 0 else np.nan


def _variance_ratio(values: np.ndarray, alone: np.ndarray) -> tuple[float, float, float]:
    """Variance of `values` over that of `alone`, between the ends of its 95 % interval: of the logarithm, by leaving out one
    run of consecutive steps after the other.
    """
    if min(len(values), len(alone)) < 2 or alone.var() == 0 or values.var() == 0:
        return np.nan, np.nan, np.nan
    ratio = float(values.var(ddof=1) / alone.var(ddof=1))
    if min(len(values), len(alone)) < 4 * _PARTS:
        return np.nan, ratio, np.nan
    square = 0.0
    for steps in (values, alone):
        parts = np.array_split(np.arange(len(steps)), _PARTS)
        without = np.log([np.delete(steps, part).var(ddof=1) for part in parts])
        square += (_PARTS - 1) / _PARTS * float(np.sum((without - without.mean()) ** 2))
    factor = float(np.exp(student_quantile(_PARTS - 1) * square**0.5))
    return ratio / factor, ratio, ratio * factor


def _layers_exceed(sample: StepSample, cell: int, ratio: float) -> list[dict[str, Any]]:
    """How often some layer of a step exceeds a load, and how often it would if layers were independent."""
    loads = sample.max_load[cell]
    worst, mean = loads.max(axis=1), float(sample.plan.grid.mean_load(cell))
    rows = []
    for share in SHARES:
        if share * len(worst) < 4:
            continue
        most = int(np.quantile(worst, 1 - share, method="inverted_cdf"))
        above = loads > most
        with np.errstate(divide="ignore"):
            fine = np.log1p(-above.mean(axis=0))[None]
        expected = [float(-np.expm1(of_step(fine, correlation))[0]) for correlation in (None, max(ratio, 1.0))]
        some = above.max(axis=1)
        row = {"steps": len(worst), "share": share, "above": most / mean, "replayed": float(some.mean())}
        row |= {"product": expected[0], "with_correlation": expected[1]}
        windows = some[: len(some) // WINDOW * WINDOW].reshape(-1, WINDOW).any(axis=1)
        row |= {"window_replayed": float(windows.mean()) if len(windows) else np.nan}
        rows.append({**row, "window_product": 1 - (1 - row["replayed"]) ** WINDOW})
    return rows


def measured_correlation(steps: pd.DataFrame) -> tuple[float, float, float]:
    """Least, middle (geometric mean) and largest of the layer correlations of a replay's cells; nan without variation."""
    rows = steps[(steps["mode"] == "continuous") & (steps.metric == "mean_imbalance")].variance_ratio.dropna()
    if not len(rows):
        return np.nan, np.nan, np.nan
    return float(rows.min()), float(np.exp(np.log(rows).mean())), float(rows.max())
