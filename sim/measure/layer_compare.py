"""Measured layers read back: is a layer its slowest rank's experts and the exchange, and what does each placement gain.

The unit of replication is a step: an independent layer draw, which all cells of the table share.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from sim.cost import Gpu, exchange_time_us
from sim.cost.expert import expert_rates, time_ranks
from sim.cost.inputs import expert_width
from sim.cost.tables import MEASURED_KERNELS, exchange_profile
from sim.errors import InputError
from sim.measure.compare import check_measured
from sim.measure.layer import LAYER_COLUMNS
from sim.measure.layer_plan import EXCHANGES
from sim.measure.table import check_rows, read_header, read_typed
from sim.model import load_model
from sim.placement import split_name
from sim.stats import ratio_interval

_SETTING = ["exchange", "workload", "tokens"]
_TIMES = ["layer_us", "experts_us", "exchange_us"]


def is_of_layers(path: Path) -> bool:
    """Whether a file begins like a table of measured layers; not, where it cannot be read."""
    try:
        return read_header(path, "") == list(LAYER_COLUMNS)
    except InputError:
        return False


def read_layers(path: Path, gpu: Gpu | None = None) -> pd.DataFrame:
    """Read measured layers of one model, GPU and EP size, finished or partial. Raises InputError.

    A row per layer (exchange, workload, tokens, step, placement) has the layer_us, experts_us, exchange_us, pairs and received of
    the rank that had the most of each; and with a `gpu` predicted_experts_us and predicted_exchange_us by its numbers.
    """
    where = f"measured layers {path}"
    rows = read_typed(path, where, LAYER_COLUMNS, same=("model", "gpu", "dtype", "ep_size"))
    key = [*_SETTING, "step", "placement"]
    times = rows[_TIMES]
    check_rows(
        rows,
        where,
        (
            (~((times > 0) & (times < 1e9)).all(axis=1), "times must be above 0 and below 1e9"),
            (~rows.exchange.isin(EXCHANGES), f"exchange must be one of {', '.join(EXCHANGES)}"),
            (~rows.tokens.between(1, 2**20), "tokens must be from 1 to 1048576"),
            ((rows["rank"] < 0) | (rows["rank"] >= rows.ep_size), "rank must be from 0 to ep_size - 1"),
            ((rows.received < 0) | (rows.received > rows.tokens), "received must be from 0 to tokens"),
            ((rows.pairs < rows.received) | (rows.pairs > 2**32), "pairs must be at least received"),
            ((rows.distinct < 0) | (rows.distinct > rows.pairs), "distinct must be from 0 to pairs"),
            ((rows.step < 0) | (rows.layers < 1) | (rows.replays < 1), "step, layers and replays must count something"),
            (rows.duplicated([*key, "rank"]), "is measured twice"),
            (rows.groupby(key)["rank"].transform("size") != rows.ep_size, "a layer needs all its ranks"),
        ),
    )
    grouped = rows.groupby(key, sort=False)
    layers = grouped[[*_TIMES, "pairs", "received"]].max()
    if gpu is not None:
        layers["predicted_experts_us"] = rows.assign(us=_experts_us(rows, gpu)).groupby(key, sort=False).us.max()
    layers = layers.reset_index().assign(**rows.iloc[0][["model", "gpu", "dtype", "ep_size"]].to_dict())
    return layers if gpu is None else layers.assign(predicted_exchange_us=_exchange_us(layers, gpu))


def _experts_us(rows: pd.DataFrame, gpu: Gpu) -> np.ndarray:
    """Predicted times of the ranks' experts."""
    model = load_model(rows.model.iloc[0])
    slots = model.n_experts + rows.placement.map(lambda name: split_name(name)[1])
    dtype = rows["dtype"].iloc[0]
    rates = expert_rates(model, gpu, dtype, MEASURED_KERNELS[dtype])
    return time_ranks(rates, rows.pairs, rows.distinct, np.maximum(slots / rows.ep_size, rows.distinct))


def _exchange_us(layers: pd.DataFrame, gpu: Gpu) -> pd.Series:
    """Predicted times of the exchanges. In FP8 a row goes out in a byte for each value, and 16 that hold its scale."""
    model, times = load_model(layers.model.iloc[0]), pd.Series(np.nan, layers.index)
    for kind, part in layers.groupby("exchange"):
        profile = exchange_profile(str(kind), gpu.name)
        if layers["dtype"].iloc[0] == "fp8":
            profile = replace(profile, bytes_per_value=(1 + 16 / expert_width(model), 2.0))
        times[part.index] = exchange_time_us(
            model, gpu, kind=str(kind), ep_size=part.ep_size, tokens_per_rank=part.tokens / part.ep_size,
            received_tokens=part.received, pairs=part.pairs, profile=profile,
        ).total_us  # fmt: skip
    return times


def sums(layers: pd.DataFrame) -> pd.DataFrame:
    """Measured layers against the sum of their parts, the slowest rank's experts and the exchange: means over steps and
    placements, and excess (layer / (experts + exchange) - 1, of sums) with its 95 % interval over steps.
    """
    table = []
    for setting, part in layers.groupby(_SETTING, sort=False):
        by_step = part.groupby("step")[_TIMES].sum()
        of_parts = ratio_interval(by_step.layer_us.to_numpy(), (by_step.experts_us + by_step.exchange_us).to_numpy())
        table.append([*setting, len(by_step), *part[_TIMES].mean(), *(value - 1 for value in of_parts)])
    names = [*_SETTING, "steps", "layer_us", "experts_us", "exchange_us", "excess", "excess_low", "excess_high"]
    return pd.DataFrame(table, columns=names)


def predicted_gains(layers: pd.DataFrame, baseline: str = "linear", others: Sequence[str] = ()) -> pd.DataFrame:
    """`layer_gains` of layers that were read with a GPU, beside those that the cost model predicts for the same ranks of the same
    steps: predicted (gain), difference (measured - predicted), predicted_us (mean time of the baseline's layers) and error
    (predicted_us / baseline_us - 1).
    """
    predicted = layers.assign(layer_us=layers.predicted_experts_us + layers.predicted_exchange_us)
    found, model = (layer_gains(table, baseline, others) for table in (layers, predicted))
    return found.assign(
        predicted=model.gain,
        difference=found.gain - model.gain,
        predicted_us=model.baseline_us,
        error=model.baseline_us / found.baseline_us - 1,
    )


def layer_gains(layers: pd.DataFrame, baseline: str = "linear", others: Sequence[str] = ()) -> pd.DataFrame:
    """Gain of placements over a baseline in the mean time of a measured layer, paired over steps.

    As `sim.measure.compare.gains`; of all other placements by default. experts_gain is that of the slowest rank's experts alone.
    """
    there = list(dict.fromkeys(layers.placement))
    check_measured(there, (baseline, *others))
    table = []
    for setting, part in layers.groupby(_SETTING, sort=False):
        wide = part.pivot_table(index="step", columns="placement", values=_TIMES)
        for other in others or [name for name in there if name != baseline]:
            if ("layer_us", baseline) not in wide or ("layer_us", other) not in wide:
                continue
            both = wide.dropna(subset=[("layer_us", baseline), ("layer_us", other)])
            layer, *alone = (
                ratio_interval(both[what, baseline].to_numpy(), both[what, other].to_numpy()) for what in _TIMES
            )
            gains = [value - 1 for value in (*layer, *(of[0] for of in alone))]
            means = [both["layer_us", name].mean() for name in (baseline, other)]
            table.append([*setting, other, len(both), *gains, *means])
    names = [*_SETTING, "placement", "steps", "gain", "gain_low", "gain_high", "experts_gain", "exchange_gain"]
    return pd.DataFrame(table, columns=[*names, "baseline_us", "other_us"]).astype({"gain": np.float64})
