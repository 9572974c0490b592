"""What a serving engine would log of each step, balancedness over layers and the time of the slowest ranks: of layers that are
drawn alone, and of whole steps of recorded traffic, whose layers share their tokens. And what a user's own log holds.

A record is replayed in the phases of `sim.traffic.STEP_PHASES`: 'continuous' batching, 'together' (all requests start at once)
and 'independent' layers, whose tokens have the law of the first.
"""

import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from sim.cost.deployments import of_step
from sim.cost.exchange import DEFAULT_EXCHANGE, exchange_kind
from sim.cost.expert import expert_rates
from sim.cost.gpu import Gpu
from sim.cost.inputs import dtype_of, with_network
from sim.cost.steps import StepSample, cell_times, sample_steps
from sim.errors import InputError, shown
from sim.files import numbered_lines, open_stream, reading
from sim.model import ModelSpec, load_model
from sim.options import LayerOptions, StepOptions
from sim.options.declare import takes
from sim.stats import ratio_interval, student_quantile
from sim.traffic import STEP_PHASES, RecordedTraffic, Workload

METRICS = {
    "balancedness_vllm": "sum over layers of mean loads / sum of largest loads",
    "balancedness_sglang": "mean over layers of mean load / largest load",
    "slowest_rank_ms": "sum over layers of the slowest rank's expert time",
    "moe_ms": "the same with dispatch and combine",
    "mean_imbalance": "mean over layers of largest load / mean load, which the step's time follows",
    "worst_imbalance": "the largest over layers, which buffers must hold",
}
_BALANCEDNESS = re.compile(
    r"(?<![a-z])(?<!average[_ ])(?<!avg[_ ])(?<!log_)(?:current_pass_)?balancedness\\?[\"']?\s*[=:]\s*([-+.\w]+(?:,\d+)?%?)"
)
"""The step's own value in a line of an engine's log; averages over passes (last_10_average_balancedness) or over
layers (lmdeploy's avg_balancedness), and vLLM's option log_balancedness, are not."""
_BARE = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.IGNORECASE)
_COLOUR = re.compile(r"\x1b\[[\d;]*[A-Za-z]")
_SOURCE = re.compile(r"EngineCore\w*|for model [^\s:]+|\bDP\d+\b|\bTP\d+\b")
"""Which engine or rank a line is of, and which model."""
_MAX_LINE = 64 << 20
_MOST_STEPS = 10**8
QUANTILES = (0.01, 0.05, 0.5, 0.95, 0.99)
OPENING = 16
"""Steps after a common start that are looked at apart: the first 8 tokens of gpt-oss's answers are nearly all the same."""
MODES = ("continuous", "together", "after the opening", "independent")
SHARES, WINDOW = (0.5, 0.1, 0.01), 32
_PARTS = 16  # of consecutive steps, for the interval of a ratio of variances


@takes(StepOptions, "fit_tokens", "fit_on", "budget_tokens")
def predict_steps(
    model: ModelSpec | str | Path,
    workload: Workload | str | Path,
    gpu: Gpu | str | Path,
    *,
    placements: str | list[str],
    dtype: str | None = None,
    exchange: str = DEFAULT_EXCHANGE,
    network_gb_per_s: float | None = None,
    layer_correlation: float | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Distribution over steps of what engines log (METRICS), for every placement, EP size and number of tokens.

    Parameters
    ----------
    model, workload, gpu, placements, dtype, exchange, network_gb_per_s
        As in `predict_gain`.
    layer_correlation : float, optional
        Variance of a step's mean over its layers relative to layers that are independent, from 1 on, as `epsim step --traffic`
        measures it: the steps of a layer set are spread about their mean accordingly. Worst layers are left as they are:
        gpt-oss-20b's recorded steps have them 0 to 4 % lower, and their variance is 0.9 to 1.1 times that of independent layers.
    **options
    fit_tokens, fit_on, budget_tokens
        As in `predict_gain`.

    Returns
    -------
    DataFrame
        One row per cell and metric: mean with its 95 % interval over layer sets, quantiles p01 to p99 over all steps,
        and two standard deviations: between layer sets (one deployment and another; nan with fewer than two steps of
        each) and within them (one deployment's steps).
    """
    layers = LayerOptions(layer_correlation=layer_correlation)
    model, chip = load_model(model), with_network(gpu, network_gb_per_s)
    kind, dtype = exchange_kind(exchange), dtype_of(model, [chip], dtype)
    sample = sample_steps(
        model,
        workload,
        [expert_rates(model, chip, dtype)],
        placements=placements,
        counts_received=kind == "token",
        **options,
    )
    layers.check_layers(sample.max_load[0].shape[1])
    rows = []
    for cell in range(len(sample.plan.grid.cells)):
        keys = _keys(sample, cell, chip, dtype, exchange)
        layer_set = sample.set_of_step(cell)
        for metric, values in metrics_of_steps(sample, cell, chip, dtype, exchange).items():
            if layers.layer_correlation is not None and metric != "worst_imbalance":
                values = _spread(values, layer_set, layers.layer_correlation)
            rows.append({**keys, "metric": metric, **_distribution(values, layer_set)})
    return pd.DataFrame(rows)


def _keys(sample: StepSample, cell: int, gpu: Gpu, dtype: str, exchange: str) -> dict[str, Any]:
    """Columns that say what a row is of."""
    model, workload, placement, ep_size, tokens = sample.plan.grid.keys(cell)
    return {
        "model": model, "workload": workload, "gpu": gpu.name, "dtype": dtype, "exchange": exchange, "placement": placement,
        "ep_size": ep_size, "tokens": tokens,
    }  # fmt: skip


def _spread(values: np.ndarray, layer_set: np.ndarray, ratio: float) -> np.ndarray:
    """Values whose variance about the true mean of their layer set is `ratio` times as large: they are moved from their own
    mean, the more the fewer they are. InputError where a set has but one.
    """
    n = np.bincount(layer_set)
    if n[n > 0].min() < 2:
        raise InputError(
            "`layer_correlation` needs two steps of each layer set at least: take more `most_steps`, or fewer `layer_sets`"
        )
    mean = (np.bincount(layer_set, weights=values) / np.maximum(n, 1))[layer_set]
    n = n[layer_set]
    return mean + np.sqrt((ratio * n - 1) / (n - 1)) * (values - mean)


def balancedness_vllm(mean_load: float, max_load: np.ndarray) -> np.ndarray:
    """Balancedness of steps as vLLM logs it, from largest loads [..., layers]: the sum over layers of mean loads over that of the
    largest; 0 without load.

    Examples
    --------
    >>> float(balancedness_vllm(10, np.array([10, 40])))
    0.4
    """
    largest = max_load.sum(axis=-1)
    return np.divide(max_load.shape[-1] * mean_load, largest, out=np.zeros(np.shape(largest)), where=largest > 0)


def balancedness_sglang(mean_load: float, max_load: np.ndarray) -> np.ndarray:
    """The same as SGLang logs it: the mean over layers of (mean load + 1e-5) / (largest load + 1e-5).

    Examples
    --------
    >>> round(float(balancedness_sglang(10, np.array([10, 40]))), 3)
    0.625
    """
    return np.mean((mean_load + 1e-5) / (max_load + 1e-5), axis=-1)


def metrics_of_steps(sample: StepSample, cell: int, gpu: Gpu, dtype: str, exchange: str) -> dict[str, np.ndarray]:
    """Each of METRICS of a cell's steps, float64 [steps]."""
    times, mean_load = cell_times(sample, cell, 0, gpu, dtype, exchange), float(sample.plan.grid.mean_load(cell))
    return {
        "balancedness_vllm": balancedness_vllm(mean_load, sample.max_load[cell]),
        "balancedness_sglang": balancedness_sglang(mean_load, sample.max_load[cell]),
        "slowest_rank_ms": times.experts_us.sum(axis=1) / 1e3,
        "moe_ms": times.layer_us.sum(axis=1) / 1e3,
        "mean_imbalance": sample.max_load[cell].mean(axis=1) / mean_load,
        "worst_imbalance": sample.max_load[cell].max(axis=1) / mean_load,
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
    continuous, longest = samples["continuous"], int(np.diff(record.starts).max())
    of_steps: list[dict[str, Any]] = []
    exceeded: list[dict[str, Any]] = []
    for cell in range(len(continuous.plan.grid.cells)):
        found = {phase: metrics_of_steps(sample, cell, chip, dtype, exchange) for phase, sample in samples.items()}
        found["after the opening"] = {metric: values[OPENING:longest] for metric, values in found["together"].items()}
        keys = _keys(continuous, cell, chip, dtype, exchange)
        rows = [
            {**keys, "mode": mode, "metric": metric, **_described(values, found["independent"][metric])}
            for mode in MODES
            for metric, values in found[mode].items()
        ]
        for row in rows:
            if row["mode"] == "together":
                row |= {"variance_ratio_low": np.nan, "variance_ratio_high": np.nan}
        ratio = next(row["variance_ratio"] for row in rows if row["metric"] == "mean_imbalance")
        exceeded += [{**keys, **row} for row in _layers_exceed(continuous, cell, ratio)]
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


class StepLog(NamedTuple):
    """What a log holds.

    Attributes
    ----------
    values : float64 [steps]
    notes : list of str
        What it was recognised as, and how many lines were skipped.
    """

    values: np.ndarray
    notes: list[str]


def read_log(path: Path, metric: str) -> StepLog:
    """A user's own log: an engine's, of which the lines with balancedness are taken, or one number a line.

    vLLM logs `balancedness=0.8000` (eplb_state.py), SGLang `current_pass_balancedness=0.800` beside averages over passes
    (expert_distribution.py); lines without are skipped and counted, and so are idle steps (max_tokens=0). A plain log has
    one number a line; of several columns that which its first line names as the metric, or balancedness, else the last, with
    a note. A name that ends in .gz is unpacked.

    Parameters
    ----------
    path : Path
    metric : str
        One of METRICS: what the numbers are.

    Raises
    ------
    InputError
        The file cannot be read, or holds what is no value of the metric: balancedness is from 0 to 1, a time from 0 on.
    """
    where = f"--log {path}"
    engine: list[float] = []
    plain: list[float] = []
    n_lines = n_idle = n_sglang = n_several = n_cut = n_bare = longest = 0
    bad_line, place, n_columns = 0, -1, 1  # of a plain log
    sources: set[str] = set()
    with reading(where, "log"), open_stream(path, where) as file:
        lines = numbered_lines(file, where, _MAX_LINE)
        pieces = ((number, raw, piece) for number, raw in lines for piece in _shown_lines(raw))
        for number, raw, line in pieces:
            n_lines += 1
            if values := _BALANCEDNESS.findall(line):
                n_sglang += "current_pass_balancedness" in line
                n_several += len(set(values)) > 1
                sources.add(" ".join(_SOURCE.findall(line)))
                longest = max(longest, len(values[0]))
                if re.search(r"\bmax_tokens=0\b(?!\.)", line):
                    n_idle += 1
                elif len(values[0]) < longest and line.endswith(values[0]) and not raw.endswith(b"\n"):
                    n_cut += 1
                else:
                    try:
                        engine.append(float(values[0]))
                    except ValueError:
                        raise InputError(f"{where}: line {number}: '{shown(values[0])}' is no balancedness") from None
                continue
            n_bare += _BARE.fullmatch(line) is not None
            if not engine and not bad_line:
                try:
                    cells = line.replace(",", " ").replace(";", " ").split()
                    n_columns = max(n_columns, len(cells))
                    plain.append(float(cells[place]))
                except (ValueError, IndexError):
                    bad_line = number if n_lines > 1 else 0  # the first may name columns
                    named = [cell.strip('"').lower() for cell in cells]
                    known = (name for name in (metric, metric.partition("_")[0]) if name in named)
                    place = next(map(named.index, known), -1)
            if len(engine) + len(plain) > _MOST_STEPS:
                raise InputError(f"{where} has more than {_MOST_STEPS} steps; keep a part of it")
    n_engine = len(engine) + n_idle + n_cut
    if 0 < n_sglang < n_engine:
        raise InputError(f"{where} holds lines of SGLang and of vLLM, which mean different things by balancedness")
    notes = [f"{path}: its last line is cut off and left out"] if n_cut else []
    if len(sources - {""}) > 1:
        those = shown(", ".join(sorted(sources - {""})))
        notes.append(f"{path}: lines of {len(sources - {''})} engines or models, taken together: {those}")
    if engine or n_idle:
        name, wanted = ("SGLang", "balancedness_sglang") if n_sglang else ("vLLM", "balancedness_vllm")
        notes.append(
            f"{path}: {len(engine)} lines of {name} with balancedness, {n_lines - n_engine} other lines skipped"
        )
        notes += [f"{n_bare} of these are bare numbers, not taken: a log is either lines or numbers"] if n_bare else []
        notes += [f"{n_several} lines have several values: the first is taken"] if n_several else []
        notes += [f"{n_idle} idle steps (max_tokens=0) are left out"] if n_idle else []
        if not metric.startswith("balancedness"):
            raise InputError(
                f"{where} holds lines of {name} with balancedness: --log-metric {metric} is no balancedness"
            )
        if metric != wanted:
            notes.append(f"{name} logs what --log-metric {wanted} is; it is laid beside {metric}")
        plain = engine
    elif bad_line:
        raise InputError(f"{where}: line {bad_line} does not end with a number, and no line has balancedness=")
    elif plain and n_columns > 1 and place == -1:
        notes.append(f"{path}: of {n_columns} columns the last is taken")
    if not plain:
        raise InputError(f"{where} holds no numbers")
    log = np.array(plain)
    most = 1 + 1e-6 if metric.startswith("balancedness") else 1e12
    wrong = ~((log >= 0) & (log <= most))
    if wrong.any():
        raise InputError(f"{where}: {log[wrong][0]:g} is no value of {metric}: they are numbers from 0 to {most:.0g}")
    return StepLog(log, notes)


def _shown_lines(raw: bytes) -> list[str]:
    """What a terminal shows of a line, without its colours: a progress bar writes several over each other."""
    pieces = _COLOUR.sub("", raw.decode("utf-8", "replace")).lstrip("\ufeff").split("\r")
    return [piece.strip() for piece in pieces if piece.strip()]


def compare_log(steps: pd.DataFrame, metric: str, log: np.ndarray) -> pd.DataFrame:
    """A user's log beside the simulated distributions of a metric: one row per cell.

    `log_mean` is the log's; `inside` the share of its values between the cell's p01 and p99; `sds_apart` how far its mean
    lies from the cell's, in standard deviations of one deployment against another (nan where that is not known); `verdict`
    whether it agrees (within two of these), is unclear (within two, its own noise included), or lies above or below.
    """
    rows = steps[steps.metric == metric].reset_index(drop=True)
    inside = [float(np.mean((log >= row.p01) & (log <= row.p99))) for row in rows.itertuples()]
    away, between = log.mean() - rows["mean"], rows.sd_between_sets.where(rows.sd_between_sets > 0)
    own = (log.std(ddof=1) if len(log) > 1 else rows.sd_within_set) / len(log) ** 0.5
    within = [between.isna(), away.abs() <= 2 * between, away.abs() <= 2 * np.hypot(between, own), away > 0]
    verdict = np.select(within, ["", "agrees", "unclear", "above"], "below")
    told = {"inside": inside, "sds_apart": away / between, "verdict": verdict}
    return rows.assign(log_steps=len(log), log_mean=log.mean(), **told)
