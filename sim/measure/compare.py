"""The model of expert time beside what was measured. Constants are checked here, and never fed back to the model.

The unit of replication is a step: an independent layer draw, which all cells of the table share.
"""

from collections.abc import Iterable

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost import Gpu, load_gpu
from sim.cost.expert import counted_rows, expert_rates, reached_fractions, sides_us, time_ranks
from sim.cost.tables import MEASURED_KERNELS, grouped_gemm_profile
from sim.errors import InputError
from sim.measure.table import TILE_ROWS
from sim.model import load_model
from sim.placement import split_name
from sim.stats import half_width, ratio_interval, ratio_parts, student_quantile

CELL = ["dtype", "workload", "ep_size", "tokens"]
_WITHIN = 0.2
_FELT = 0.01  # a constant that moves no time by more than this share of its own change is not fitted


def with_predictions(rows: pd.DataFrame, gpu: Gpu | None = None) -> pd.DataFrame:
    """Rows of `read_measured` with what the model says of them, by the numbers of `gpu` (default: the preset that they name).

    New are predicted_us, error (predicted / measured - 1), memory_us and compute_us (ideal times), bound: 'compute' where that
    is longer in the model and some expert needs more than a tile, else 'memory', fixed_us (idle experts and spread), and the
    model's bandwidth_fraction and peak_fraction for this GPU.
    """
    model = load_model(rows.model.iloc[0])
    gpu = gpu or load_gpu(rows.gpu.iloc[0])
    parts = []
    for (dtype, ran), part in rows.groupby(["dtype", "kernel"], sort=False):
        kernel = kernel_that_ran(str(dtype), str(ran))
        rates = expert_rates(model, gpu, str(dtype), kernel)
        bandwidth, peak, _ = reached_fractions(gpu, kernel)
        slots = model.n_experts + part.placement.map(lambda name: split_name(name)[1])
        local = np.maximum(slots / part.ep_size, part.distinct)
        tiles = {size: part[f"tiles_{size}"] for size in TILE_ROWS if "tiles_128" in part}
        padded = counted_rows(rates, part.pairs, local, tiles) if tiles else np.zeros(len(part))
        work = (part.pairs, part.distinct, local, padded)
        predicted_us = time_ranks(rates, *work)
        memory_us, compute_us = sides_us(rates, *work)
        _, one_tile_us = sides_us(rates, part.distinct, part.distinct, local, np.zeros(len(part)))
        of_memory = (memory_us >= compute_us) | (compute_us <= one_tile_us)
        fixed_us = rates.idle_us * (local - part.distinct) + rates.spread_us * (1 - 1 / part.distinct.clip(lower=1))
        parts.append(
            part.assign(
                predicted_us=predicted_us,
                error=predicted_us / part.time_us - 1,
                memory_us=memory_us * bandwidth,
                compute_us=compute_us * peak,
                bound=np.where(of_memory, "memory", "compute"),
                fixed_us=fixed_us,
                bandwidth_fraction=bandwidth,
                peak_fraction=peak,
            )
        )
    return pd.concat(parts)


def kernel_that_ran(dtype: str, name: str) -> str:
    """The kernel of kernels.toml that a measured one is predicted by: its own, or that of its type."""
    return MEASURED_KERNELS[dtype] if name.startswith("torch") else dtype


def errors(predicted: pd.DataFrame) -> pd.DataFrame:
    """Error of the prediction, of rows `with_predictions`, a row per dtype and bound: ranks (rows), steps, error_mean with its
    95 % interval over steps, quantiles, and within_20, the share of ranks with an error of at most 20 %.
    """
    table = []
    for (dtype, bound), part in predicted.groupby(["dtype", "bound"]):
        by_step = part.groupby("step").error.agg(["sum", "size"])
        mean = ratio_interval(by_step["sum"].to_numpy(float), by_step["size"].to_numpy(float))
        p10, p50, p90 = part.error.quantile([0.1, 0.5, 0.9])
        within = float((part.error.abs() <= _WITHIN).mean())
        table.append([dtype, bound, len(part), len(by_step), *mean, p10, p50, p90, within])
    names = ["dtype", "bound", "ranks", "steps", "error_mean", "error_mean_low", "error_mean_high"]
    return pd.DataFrame(table, columns=[*names, "error_p10", "error_p50", "error_p90", "within_20"])


def gains(predicted: pd.DataFrame, baseline: str = "linear", other: str = "round_robin") -> pd.DataFrame:
    """Gain of one placement over another in the mean time of a layer, paired over steps.

    gain = time of the baseline / time of the other - 1, of sums over steps; its 95 % interval from the variation between
    steps (ratio estimator, Student). A step counts where both placements were measured. `predicted` is of the same ranks of
    the same steps, so that the interval of the difference knows more than the two apart.
    """
    check_measured(sorted(set(predicted.placement)), (baseline, other))
    slowest = predicted.groupby([*CELL, "step", "placement"])[["time_us", "predicted_us"]].max()
    wide = slowest.unstack("placement")[[(c, p) for c in ("time_us", "predicted_us") for p in (baseline, other)]]
    table = []
    for cell, part in wide.dropna().groupby(level=CELL):
        measured, parts = ratio_parts(*(part["time_us", name].to_numpy() for name in (baseline, other)))
        model, model_parts = ratio_parts(*(part["predicted_us", name].to_numpy() for name in (baseline, other)))
        half, apart = half_width(parts), half_width(parts - model_parts)
        gain = [measured - 1, measured - 1 - half, measured - 1 + half, model - 1]
        difference = [measured - model, measured - model - apart, measured - model + apart]
        table.append([*cell, len(part), *gain, *difference, *part["time_us"][[baseline, other]].mean()])
    names = ["steps", "measured", "measured_low", "measured_high", "predicted"]
    names += ["difference", "difference_low", "difference_high", "baseline_us", "other_us"]
    return pd.DataFrame(table, columns=[*CELL, *names])


def check_measured(there: list[str], names: Iterable[str]) -> None:
    """Refuse a placement that is not among the measured ones."""
    for name in names:
        if name not in there:
            raise InputError(f"`placements` {name}: measured were {', '.join(there)}")


def missed(predicted: pd.DataFrame) -> pd.DataFrame:
    """Of the layers with a rank that was picked at random, those where it was slowest, and excess_max, the largest share by which
    it exceeded the ranks that were picked: by so much the choice of ranks may miss.
    """
    wide = predicted.groupby([*CELL, "step", "placement", "chosen"]).time_us.max().unstack("chosen")
    wide = wide.reindex(columns=["busiest", "random"]).dropna()
    excess = wide.random / wide.busiest - 1
    by_type = excess.groupby(level="dtype")
    table = pd.DataFrame({"layers": by_type.size(), "missed": (excess > 0).groupby(level="dtype").sum()})
    return table.assign(excess_max=by_type.max().clip(lower=0)).reset_index()


CONSTANTS = ("launch_us", "bandwidth_fraction", "peak_fraction")


def constants(predicted: pd.DataFrame) -> pd.DataFrame:
    """The constants that these rows alone would give, beside the model's.

    Least squares of the logarithms of predicted over measured times; 95 % intervals from leaving out one step at a time, nan with
    one step, and where no row depends on the constant.
    """
    table = []
    for dtype, part in predicted.groupby("dtype"):
        kernel = grouped_gemm_profile(kernel_that_ran(str(dtype), part.kernel.iloc[0]))
        of_model = [kernel.launch_us, *part[["bandwidth_fraction", "peak_fraction"]].iloc[0]]
        fitted = _fit(part, of_model, kernel.sharpness)
        steps, half = part.step.unique(), np.full(3, np.nan)
        if (n := len(steps)) > 1:
            without = np.array([_fit(part[part.step != step], fitted, kernel.sharpness) for step in steps])
            half = student_quantile(n - 1) * np.sqrt((n - 1) / n * ((without - without.mean(axis=0)) ** 2).sum(axis=0))
        for i, name in enumerate(CONSTANTS):
            table.append([dtype, name, of_model[i], fitted[i], fitted[i] - half[i], fitted[i] + half[i]])
    return pd.DataFrame(table, columns=["dtype", "constant", "model", "fitted", "low", "high"])


def _fit(rows: pd.DataFrame, start: list[float] | np.ndarray, p: float) -> np.ndarray:
    names = ("memory_us", "compute_us", "fixed_us", "time_us")
    memory_us, compute_us, fixed_us, time_us = (rows[name].to_numpy(float) for name in names)

    def misfit(x: np.ndarray) -> np.ndarray:
        launch_us, bandwidth, peak = np.exp(x)
        longer_us = ((memory_us / bandwidth) ** p + (compute_us / peak) ** p) ** (1 / p)
        return np.log((launch_us + fixed_us + longer_us) / time_us)

    known = np.where(np.isfinite(start), start, 1.0)
    # Whether rows depend on a constant is judged where the fit starts: a free one can wander until it matters.
    felt = np.abs(least_squares(misfit, np.log(known), x_scale=0.1, max_nfev=1).jac).max(axis=0) > _FELT
    found = least_squares(misfit, np.log(known), x_scale=0.1)
    return np.where(felt, np.exp(found.x), np.nan)
